//! The task that owns the connection: connects, restores, reconnects, closes.

use std::time::Duration;

use selvedge_proto::status::Status;

/// Why the first connection was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Something that every client needs was not given.
    #[error("{missing} not given: {remedy}")]
    Incomplete {
        /// What is missing.
        missing: &'static str,
        /// How to give it.
        remedy: &'static str,
    },
    /// The options do not fit together.
    #[error("cannot use these options: {reason}")]
    Options {
        /// What is wrong.
        reason: String,
    },
    /// The host name has no address.
    #[error("cannot resolve {host}: {reason}")]
    Resolve {
        /// The host.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// No socket can send to that address.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// The address.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// Nobody answered in time.
    #[error("no answer from {address} within {after:?}: {last}")]
    Timeout {
        /// The address.
        address: String,
        /// How long was tried.
        after: Duration,
        /// How the last attempt failed.
        last: String,
    },
    /// This client does not accept the broker's certificate or TLS.
    #[error("this client refused the broker: {reason}")]
    Tls {
        /// What is wrong with it.
        reason: String,
    },
    /// The broker does not accept the client's certificate or TLS.
    #[error("the broker refused this client: {reason}")]
    Refused {
        /// What the broker said.
        reason: String,
    },
    /// The broker said goodbye instead of welcome.
    #[error("the broker said goodbye: {0}")]
    Goodbye(Status),
    /// The broker does not speak the protocol.
    #[error("the broker does not speak selvedge/1 as expected: {reason}")]
    Protocol {
        /// What it did.
        reason: String,
    },
    /// The connection broke before the broker's welcome.
    #[error("the connection was lost: {reason}")]
    Lost {
        /// How.
        reason: String,
    },
}
