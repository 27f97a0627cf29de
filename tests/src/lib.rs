//! The harness of Selvedge's integration tests: an authority, a broker, a bad network, a simulated
//! network, and clients of other makes, each made anew by every test.

#[cfg(target_os = "linux")]
pub mod bridging;
pub mod broker;
#[cfg(target_os = "linux")]
pub mod checker;
pub mod http;
pub mod link;
pub mod log;
pub mod mqtt;
pub mod pki;
#[cfg(target_os = "linux")]
pub mod power;
pub mod raw;
pub mod sim;
pub mod tunnel;
pub mod wait;

pub use broker::TestBroker;
pub use http::{GrpcPeer, HttpPeer};
pub use link::{LinkCounts, UdpLink, Weather};
pub use mqtt::{MqttAnswer, MqttEvent, MqttMessage, MqttOptions, MqttPeer, MqttVersion};
pub use pki::{IdentityFiles, RawCertificate, TestPki};
pub use raw::{RawControl, RawQuic};
