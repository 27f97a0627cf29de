//! What a client's connection is doing, for applications that want to show it.

use std::sync::Arc;
use std::time::Duration;

use selvedge_certs::Identity;

/// What the connection is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// An attempt to connect is under way.
    Connecting {
        /// Attempts since the connection was last up, this one included.
        attempt: u32,
    },
    /// The broker has welcomed the client.
    Connected {
        /// The broker had kept the session: its subscriptions and queued messages are there.
        session_present: bool,
        /// Name and version of the broker, for people.
        broker: Arc<str>,
        /// The identity that the broker took from the client's certificate.
        identity: Identity,
        /// Negotiated key exchange group, such as `X25519MLKEM768`; empty when not known.
        key_exchange: Arc<str>,
    },
    /// The connection is lost and will be tried again.
    Disconnected {
        /// Why, for people.
        reason: Arc<str>,
        /// Time until the next attempt.
        retry_in: Duration,
    },
    /// The client has ended for good.
    Closed {
        /// Why, for people.
        reason: Arc<str>,
    },
}

impl State {
    /// Whether the broker has welcomed the client.
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected { .. })
    }
}
