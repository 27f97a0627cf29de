//! Existing MQTT brokers to and from the fabric: a pure topic mapping over rumqttc's codec and the client.
//!
//! [`Bridge::start`] takes a checked [`BridgeConfig`]. Each remote has a client of the fabric of its
//! own, a queue for each direction, kept in the bridge's [store](BridgeConfig::store) if it has one,
//! and the task that decides what is sent to the remote. A message is acknowledged to the side it came
//! from only when the other side has it, or, while the other side is away, when the bridge's disk has.

mod admin;
mod bridge;
pub mod config;
mod forward;
mod inward;
mod journal;
mod link;
pub mod mapping;
mod names;
mod outbox;
mod properties;
mod remote;
mod spool;
mod status;

pub use bridge::{Bridge, StartError};
pub use config::{BridgeConfig, ConfigError};
pub use journal::JournalError;
pub use properties::{HOP_PROPERTY, MAX_HOPS, TRACE_PROPERTY};
pub use spool::QueueStatus;
pub use status::{DropReason, RemoteStatus, RuleStatus};
