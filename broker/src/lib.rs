//! The Selvedge broker as a library: listeners, sessions, router, calls, inference, policy, admin.
//!
//! [`Server::bind`] takes a checked [`Config`] and returns once every port is open. The way of a
//! message: a listener reads it ([`quic`], [`mqtt`]), [`publisher`] checks and routes it
//! ([`policy`], [`router`]), a [`queue`] holds it, and the receiver's listener writes it out.

mod admin;
mod calls;
mod clock;
mod inference;

pub mod backlog;
pub mod batch;
pub mod config;
pub mod dedup;
pub mod explain;
pub mod fabric;
pub mod front;
pub mod history;
pub mod losses;
pub mod metrics;
pub mod models;
pub mod mqtt;
pub mod pacer;
pub mod placement;
pub mod policy;
pub mod publisher;
pub mod queue;
pub mod quic;
pub mod quota;
mod restore;
pub mod retained;
pub mod revocation;
pub mod router;
pub mod server;
pub mod services;
pub mod session;
pub mod statistics;
pub mod store;
mod sys;
mod system;
pub mod tenant;

pub use config::{Config, ConfigErrors, FrontConfig, Limits, MqttConfig, StoreConfig};
pub use server::{Addresses, BindError, Server};
