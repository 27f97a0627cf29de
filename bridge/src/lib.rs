//! Existing MQTT brokers to and from the fabric: a pure topic mapping over rumqttc and the client.
//!
//! [`Bridge::start`] takes a checked [`BridgeConfig`]. Each remote has a client of the fabric of its
//! own and two tasks: rumqttc's event loop, and the task that decides what goes into it. A message is
//! acknowledged to the side it came from only when the other side has it.

mod bridge;
pub mod config;
mod forward;
mod link;
pub mod mapping;
mod outbox;
mod properties;
mod remote;
mod status;

pub use bridge::{Bridge, StartError};
pub use config::{BridgeConfig, ConfigError};
pub use properties::{HOP_PROPERTY, MAX_HOPS, TRACE_PROPERTY};
pub use status::{DropReason, RemoteStatus, RuleStatus};
