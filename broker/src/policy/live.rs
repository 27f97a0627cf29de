//! The policy of one identity as it is now, however often it is replaced.

use std::sync::Arc;

use arc_swap::ArcSwap;
use selvedge_certs::Identity;

use super::IdentityPolicy;
use crate::fabric::Fabric;

/// Follows the fabric's policy for one identity. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LivePolicy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fabric: Arc<Fabric>,
    identity: Identity,
    /// Compiled from the policy of this generation.
    compiled: ArcSwap<(u64, IdentityPolicy)>,
}

impl LivePolicy {
    /// Follows the policy for `identity`.
    pub fn new(fabric: &Arc<Fabric>, identity: &Identity) -> Self {
        // The generation first: if the policy is replaced in between, it is compiled once more.
        let generation = fabric.policy_generation();
        let compiled = fabric.policy_for(identity);
        Self(Arc::new(Inner {
            fabric: Arc::clone(fabric),
            identity: identity.clone(),
            compiled: ArcSwap::from_pointee((generation, compiled)),
        }))
    }

    /// The policy now.
    pub fn now(&self) -> IdentityPolicy {
        let inner = &*self.0;
        let generation = inner.fabric.policy_generation();
        let held = inner.compiled.load();
        if held.0 == generation {
            return held.1.clone();
        }
        let compiled = inner.fabric.policy_for(&inner.identity);
        inner
            .compiled
            .store(Arc::new((generation, compiled.clone())));
        compiled
    }
}
