//! The state all listeners share: tenants, policy, limits and counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use selvedge_certs::Identity;
use selvedge_proto::status::{Code, Status};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{DurabilityRules, Limits};
use crate::history::HistoryRule;
use crate::metrics::Metrics;
use crate::mqtt::settings::Settings;
use crate::pacer::Pacer;
use crate::policy::{IdentityPolicy, Policy};
use crate::revocation::Peers;
use crate::store::Store;
use crate::tenant::Tenant;

/// Connections beyond the limit that are told so at once, which takes a handshake each. There are few,
/// as more of them are no reason to do more work; the others are refused without a word.
pub(crate) const REFUSALS: u32 = 64;

/// Everything that outlives a connection. One per broker, shared by its listeners.
#[derive(Debug)]
pub struct Fabric {
    /// Name of the broker, for people and for hop lists.
    pub name: Arc<str>,
    /// The broker's own identity.
    pub identity: Identity,
    /// Bounds on what peers may use.
    pub limits: Limits,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What outlives the process, if there is a folder for it.
    pub store: Option<Store>,
    /// Which topics' QoS 1 messages to kept sessions are acknowledged when they are on disk, unless
    /// the publisher says otherwise.
    pub durability: DurabilityRules,
    /// Settings of the MQTT protocol.
    pub mqtt: Settings,
    /// Paces what is delivered from backlogs.
    pub pacer: Pacer,
    history: Arc<[HistoryRule]>,
    /// Cancelled when the broker stops.
    pub shutdown: CancellationToken,
    /// Tasks that end soon after `shutdown`.
    pub tasks: TaskTracker,
    /// When the broker started.
    pub started: Instant,
    /// Peers that are connected with a certificate.
    pub peers: Peers,
    /// One permit for each connection that may still be accepted, all listeners together.
    pub connection_slots: Arc<Semaphore>,
    /// One permit for each connection beyond those that may be told why it is not let in.
    pub refusal_slots: Arc<Semaphore>,
    policy: ArcSwap<Policy>,
    /// Counts the policies so far, so that what was decided by an earlier one is decided again.
    policy_generation: AtomicU64,
    tenants: DashMap<Arc<str>, Arc<Tenant>>,
    next_session: AtomicU64,
}

/// What a fabric is made of.
#[derive(Debug)]
pub struct FabricOptions {
    /// See [`Fabric::name`].
    pub name: String,
    /// See [`Fabric::identity`].
    pub identity: Identity,
    /// See [`Fabric::limits`].
    pub limits: Limits,
    /// Who may do what.
    pub policy: Policy,
    /// See [`Fabric::metrics`].
    pub metrics: Arc<Metrics>,
    /// See [`Fabric::store`].
    pub store: Option<Store>,
    /// See [`Fabric::durability`].
    pub durability: DurabilityRules,
    /// Topics that keep history.
    pub history: Vec<HistoryRule>,
    /// See [`Fabric::mqtt`].
    pub mqtt: Settings,
}

impl Fabric {
    /// A fabric without tenants.
    pub fn new(options: FabricOptions) -> Arc<Self> {
        Arc::new(Self {
            name: options.name.into(),
            identity: options.identity,
            peers: Peers::default(),
            connection_slots: Arc::new(Semaphore::new(options.limits.connections)),
            refusal_slots: Arc::new(Semaphore::new(REFUSALS as usize)),
            limits: options.limits,
            metrics: options.metrics,
            store: options.store,
            durability: options.durability,
            mqtt: options.mqtt,
            pacer: Pacer::default(),
            history: options.history.into(),
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
            started: crate::clock::now(),
            policy: ArcSwap::from_pointee(options.policy),
            policy_generation: AtomicU64::new(0),
            tenants: DashMap::new(),
            next_session: AtomicU64::new(1),
        })
    }

    /// The tenant an identity belongs to. It comes into being with its first peer.
    pub fn tenant(&self, identity: &Identity) -> Arc<Tenant> {
        if let Some(tenant) = self.tenants.get(identity.tenant()) {
            return Arc::clone(&tenant);
        }
        let name: Arc<str> = identity.tenant().into();
        Arc::clone(&self.tenants.entry(Arc::clone(&name)).or_insert_with(|| {
            Arc::new(Tenant::new(
                name,
                self.limits.clone(),
                Arc::clone(&self.metrics),
                self.store.clone(),
                &self.history,
            ))
        }))
    }

    /// All tenants.
    pub fn tenants(&self) -> Vec<Arc<Tenant>> {
        self.tenants
            .iter()
            .map(|tenant| Arc::clone(&tenant))
            .collect()
    }

    /// The policy now, compiled for one identity.
    pub fn policy_for(&self, identity: &Identity) -> IdentityPolicy {
        self.policy.load().for_identity(identity)
    }

    /// Puts another policy in force: for what connections do from now on, and for the
    /// subscriptions and registrations that there are. Those it does not allow any more end.
    /// Returns how many ended.
    pub fn set_policy(&self, policy: Policy) -> usize {
        self.policy.store(Arc::new(policy));
        self.policy_generation.fetch_add(1, Ordering::AcqRel);
        self.tenants()
            .iter()
            .map(|tenant| tenant.apply_policy(|identity| self.policy_for(identity)))
            .sum()
    }

    /// Rises with each new policy.
    #[inline]
    pub fn policy_generation(&self) -> u64 {
        self.policy_generation.load(Ordering::Acquire)
    }

    /// The policy now.
    pub fn policy(&self) -> Arc<Policy> {
        self.policy.load_full()
    }

    /// Room for one more connection: to serve it, or else to tell it that there is none.
    pub(crate) fn admit_connection(&self) -> Option<Slot> {
        let slot = |slots: &Arc<Semaphore>| Arc::clone(slots).try_acquire_owned().ok();
        match slot(&self.connection_slots) {
            Some(permit) => Some(Slot {
                is_refusal: false,
                _permit: permit,
            }),
            None => slot(&self.refusal_slots).map(|permit| Slot {
                is_refusal: true,
                _permit: permit,
            }),
        }
    }

    /// A number for a new session, never given twice.
    pub fn session_id(&self) -> u64 {
        self.next_session.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes sure that no session gets a number up to this one.
    pub(crate) fn skip_session_ids(&self, last: u64) {
        self.next_session.fetch_max(last + 1, Ordering::Relaxed);
    }

    /// How much of the resume grace after a start is left.
    pub fn start_grace(&self, now: Instant) -> Duration {
        self.limits
            .resume_grace
            .saturating_sub(now.saturating_duration_since(self.started))
    }

    /// Ends sessions that have expired, and forgets services and models whose responders and workers
    /// did not come back, in every tenant.
    pub fn sweep(&self, now: Instant) {
        for tenant in self.tenants() {
            tenant.sweep(now);
        }
    }

    /// Tells every connection to go.
    pub fn kick_all(&self, retry_after: impl Fn() -> Duration) {
        for tenant in self.tenants() {
            for session in tenant.sessions() {
                session.kick(
                    Status::new(Code::Unavailable, "the broker is stopping")
                        .retry_after(retry_after()),
                );
            }
        }
    }
}

/// Room for one connection, until dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The connection is only told that it is one too many.
    pub(crate) is_refusal: bool,
    _permit: OwnedSemaphorePermit,
}

/// What a connection is told that is one too many for the broker.
pub(crate) fn no_slot() -> Status {
    Status::new(
        Code::ResourceExhausted,
        "the broker has as many connections as it may: try again later",
    )
}
