//! What identities and tenants may use, and what they use now.

use std::sync::Arc;

use selvedge_certs::Identity;
use selvedge_proto::status::Status;

/// What one identity uses, all its sessions together.
#[derive(Debug, Default)]
pub struct Usage {}

/// One connection of an identity, counted while this lives.
#[derive(Debug)]
pub struct ConnectionHold(#[allow(dead_code)] Arc<Usage>);

impl Usage {
    /// Counts one more connection.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED: the identity or its tenant has as many as it may.
    pub fn connect(self: &Arc<Self>) -> Result<ConnectionHold, Status> {
        Ok(ConnectionHold(Arc::clone(self)))
    }

    /// Counts one more subscription.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED: the identity or its tenant has as many as it may.
    pub fn subscribe(&self) -> Result<(), Status> {
        Ok(())
    }

    /// Counts one subscription less.
    pub fn unsubscribe(&self) {}

    /// Asks whether one more message may be published now.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED, with the time to wait: too many were published in the last while.
    #[inline]
    pub fn admit(&self) -> Result<(), Status> {
        Ok(())
    }

    /// Takes `bytes` for a queue of the identity; `false` when it or its tenant holds as many as it may.
    #[inline]
    pub fn take_bytes(&self, bytes: usize) -> bool {
        let _ = bytes;
        true
    }

    /// Takes `bytes` for a queue, whatever the limit: they are there already.
    #[inline]
    pub fn charge(&self, bytes: usize) {
        let _ = bytes;
    }

    /// Gives back bytes of a queue.
    #[inline]
    pub fn give_bytes(&self, bytes: usize) {
        let _ = bytes;
    }
}

/// The usage of every identity of one tenant.
#[derive(Debug, Default)]
pub struct Usages {}

impl Usages {
    /// What an identity uses. It is forgotten when nothing refers to it.
    pub fn of(&self, identity: &Identity) -> Arc<Usage> {
        let _ = identity;
        Arc::default()
    }
}
