//! The fabric as its users see it: each test makes its own authority, broker and clients, and tells
//! one story.

#![allow(clippy::unwrap_used)]

mod admin;
mod bridge;
mod calls;
mod datagrams;
mod durability;
mod explain;
mod front;
mod history;
mod hostile;
mod identity;
mod inference;
mod inference_chaos;
mod limits;
mod message_ids;
mod mqtt;
mod mqtt_calls;
mod mqtt_transports;
mod overload;
mod policy;
mod priorities;
mod pubsub;
mod reload;
mod resilience;
mod retained;
mod revocation;
mod sim;
