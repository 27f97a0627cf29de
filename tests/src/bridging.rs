//! A bridge under attack: numbered messages cross it both ways while the MQTT broker, the fabric and
//! the bridge itself are killed and restarted in turn, and a ledger says what became of each.

mod device;
mod ledger;
mod process;
mod run;
mod site;

pub use ledger::{Direction, Flow, Violation};
pub use process::mosquitto;
pub use run::{Fault, Report, Settings, soak};
