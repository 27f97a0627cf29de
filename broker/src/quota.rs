//! What identities and tenants may use, and what they use now.
//!
//! Counting takes atomics and nothing else: no lock, and no clock where no rate is set. Bytes in queues
//! are not even counted where nothing limits them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use parking_lot::{Mutex, MutexGuard};
use prometheus_client::metrics::counter::Counter;
use selvedge_certs::Identity;
use selvedge_proto::status::{Code, Status};

use self::rate::Rate;
use crate::clock;
use crate::config::{IdentityLimits, Limits, TenantLimits};
use crate::metrics::Metrics;

pub(crate) mod rate;

#[cfg(test)]
mod tests;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Connections,
    Subscriptions,
    PublishRate,
    QueueBytes,
}

impl Limit {
    const ALL: [Self; 4] = [
        Self::Connections,
        Self::Subscriptions,
        Self::PublishRate,
        Self::QueueBytes,
    ];

    /// The label of the counter: the key in the configuration.
    fn label(self, whose: Whose) -> &'static str {
        match (whose, self) {
            (Whose::Identity, Self::Connections) => "identity.connections",
            (Whose::Identity, Self::Subscriptions) => "identity.subscriptions",
            (Whose::Identity, Self::PublishRate) => "identity.publish_rate",
            (Whose::Identity, Self::QueueBytes) => "identity.queue_bytes",
            (Whose::Tenant, Self::Connections) => "tenant.connections",
            (Whose::Tenant, Self::Subscriptions) => "tenant.subscriptions",
            (Whose::Tenant, Self::PublishRate) => "tenant.publish_rate",
            (Whose::Tenant, Self::QueueBytes) => "tenant.queue_bytes",
        }
    }
}

/// Whose limit it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Identity,
    Tenant,
}

/// A limit that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    limit: Limit,
    whose: Whose,
    /// How many it allows.
    most: usize,
    /// When there is room again, if that is known.
    wait: Option<Duration>,
}

/// How many there are, and how many there may be. What is given back is gone before it is taken again.
#[derive(Debug)]
struct Meter {
    used: AtomicUsize,
    /// `usize::MAX` for no limit.
    most: usize,
}

impl Meter {
    fn new(most: Option<usize>) -> Self {
        Self {
            used: AtomicUsize::new(0),
            most: most.unwrap_or(usize::MAX),
        }
    }

    fn is_limited(&self) -> bool {
        self.most != usize::MAX
    }

    /// Counts `more` of them; `false` when that would be too many.
    fn take(&self, more: usize) -> bool {
        let within = |used: usize| used.checked_add(more).filter(|sum| *sum <= self.most);
        self.used
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, within)
            .is_ok()
    }

    /// Counts `more` of them, even if that is too many.
    fn charge(&self, more: usize) {
        self.used.fetch_add(more, Ordering::Relaxed);
    }

    fn give(&self, back: usize) {
        let used = self.used.fetch_sub(back, Ordering::Release);
        debug_assert!(used >= back, "gave back {back} of {used}");
    }

    fn has_room(&self) -> bool {
        self.used.load(Ordering::Relaxed) < self.most
    }

    fn is_unused(&self) -> bool {
        self.used.load(Ordering::Relaxed) == 0
    }
}

/// What one identity, or one tenant, uses.
#[derive(Debug)]
struct Account {
    connections: Meter,
    subscriptions: Meter,
    bytes: Meter,
    rate: Option<Rate>,
}

/// One of the meters of an account.
type Which = fn(&Account) -> &Meter;

const CONNECTIONS: Which = |account| &account.connections;
const SUBSCRIPTIONS: Which = |account| &account.subscriptions;
const BYTES: Which = |account| &account.bytes;

/// What all identities of a tenant use together.
#[derive(Debug)]
struct TenantUsage {
    name: Arc<str>,
    account: Account,
    received: Counted,
    sent: Counted,
    connections_made: AtomicU64,
    /// Counts what was refused, by [`Whose`] and [`Limit`].
    refused: [[Counter; Limit::ALL.len()]; 2],
}

#[derive(Debug, Default)]
struct Counted {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Counted {
    fn add(&self, messages: u64, bytes: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn now(&self) -> Volume {
        Volume {
            messages: self.messages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// Messages and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Volume {
    /// Messages.
    pub messages: u64,
    /// Their bytes, frames and headers included.
    pub bytes: u64,
}

/// A tenant's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Connections now.
    pub connected: u64,
    /// Connections so far.
    pub connections_made: u64,
    /// Subscriptions now.
    pub subscriptions: u64,
    /// What its members have published so far.
    pub received: Volume,
    /// What was handed to its members so far.
    pub sent: Volume,
}

/// What one identity uses, all its sessions together.
#[derive(Debug)]
pub struct Usage {
    name: Box<str>,
    account: Account,
    tenant: Arc<TenantUsage>,
    message_bytes: usize,
    inflight_bytes: usize,
    /// Its own publishing or its tenant's is limited.
    is_rated: bool,
    /// Its own queues or its tenant's are limited.
    counts_bytes: bool,
    /// Taken while a connection is attached to a session.
    attaching: Mutex<()>,
}

/// One connection of an identity, counted until this is released, handed on or dropped.
#[derive(Debug)]
pub struct ConnectionHold(Mutex<Option<Arc<Usage>>>);

impl ConnectionHold {
    /// Counts the connection no more.
    pub fn release(&self) {
        drop(self.hand_on());
    }

    /// Gives the place to another connection; `None` when it is given away already.
    pub fn hand_on(&self) -> Option<Self> {
        let usage = self.0.lock().take()?;
        Some(Self(Mutex::new(Some(usage))))
    }
}

impl Drop for ConnectionHold {
    fn drop(&mut self) {
        if let Some(usage) = self.0.get_mut().take() {
            usage.give(CONNECTIONS, 1);
        }
    }
}

impl Usage {
    /// Waits for the other connections of the identity that are being attached to their sessions. Of
    /// two that take over the same session, the later one then finds the place of the earlier one.
    pub(crate) fn attaching(&self) -> MutexGuard<'_, ()> {
        self.attaching.lock()
    }

    /// Counts one more connection.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED: the identity or its tenant has as many as it may.
    pub fn connect(self: &Arc<Self>) -> Result<ConnectionHold, Status> {
        self.take(Limit::Connections, CONNECTIONS, 1)
            .map_err(|reached| self.refuse(reached))?;
        self.tenant.connections_made.fetch_add(1, Ordering::Relaxed);
        Ok(ConnectionHold(Mutex::new(Some(Arc::clone(self)))))
    }

    /// Counts what was published.
    pub(crate) fn count_received(&self, messages: u64, bytes: u64) {
        self.tenant.received.add(messages, bytes);
    }

    /// Counts what was handed to a receiver.
    pub(crate) fn count_sent(&self, messages: u64, bytes: u64) {
        self.tenant.sent.add(messages, bytes);
    }

    /// Counts one more subscription.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED: the identity or its tenant has as many as it may.
    pub fn subscribe(&self) -> Result<(), Status> {
        self.take(Limit::Subscriptions, SUBSCRIPTIONS, 1)
            .map_err(|reached| self.refuse(reached))
    }

    /// Counts one more subscription, whatever the limit: it was there before.
    pub fn charge_subscription(&self) {
        self.charge_to(SUBSCRIPTIONS, 1);
    }

    /// Counts subscriptions less.
    pub fn unsubscribe(&self, count: usize) {
        self.give(SUBSCRIPTIONS, count);
    }

    /// Asks whether one more message may be published now.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED, with the time to wait: too many were published in the last while.
    #[inline]
    pub fn admit(&self) -> Result<(), Status> {
        if !self.is_rated {
            return Ok(());
        }
        self.admit_at(clock::now())
            .map_err(|reached| self.refuse(reached))
    }

    /// Whether [`Self::admit`] counts.
    #[inline]
    pub fn is_rated(&self) -> bool {
        self.is_rated
    }

    /// As [`Self::admit`]. What the tenant refuses is not counted against the identity, and what the
    /// identity is refused is not counted against the tenant.
    fn admit_at(&self, now: Instant) -> Result<(), Reached> {
        let own = self.account.rate.as_ref();
        let admitted = own.map(|rate| (rate, rate.admit(now)));
        let admitted = match admitted {
            Some((rate, Ok(admitted))) => Some((rate, admitted)),
            Some((rate, Err(wait))) => return Err(too_fast(rate, Whose::Identity, wait)),
            None => None,
        };
        if let Some(rate) = &self.tenant.account.rate
            && let Err(wait) = rate.admit(now)
        {
            if let Some((own, admitted)) = admitted {
                own.take_back(admitted);
            }
            return Err(too_fast(rate, Whose::Tenant, wait));
        }
        Ok(())
    }

    /// Takes `bytes` for a queue of the identity.
    ///
    /// # Errors
    /// It or its tenant holds as many as it may.
    #[inline]
    pub fn take_bytes(&self, bytes: usize) -> Result<(), Reached> {
        if !self.counts_bytes {
            return Ok(());
        }
        self.take(Limit::QueueBytes, BYTES, bytes)
    }

    /// Takes `bytes` for a queue, whatever the limit: they are there already.
    #[inline]
    pub fn charge(&self, bytes: usize) {
        if self.counts_bytes {
            self.charge_to(BYTES, bytes);
        }
    }

    /// Gives back bytes of a queue.
    #[inline]
    pub fn give_bytes(&self, bytes: usize) {
        if self.counts_bytes {
            self.give(BYTES, bytes);
        }
    }

    /// Whether queues may hold anything more.
    pub fn has_room(&self) -> bool {
        self.account.bytes.has_room() && self.tenant.account.bytes.has_room()
    }

    /// Largest message of the identity, in bytes, and largest packet.
    pub fn message_bytes(&self) -> usize {
        self.message_bytes
    }

    /// QoS 1 bytes that one lane of the identity may have sent and not acknowledged.
    pub fn inflight_bytes(&self) -> usize {
        self.inflight_bytes
    }

    /// Counts something that was not done because a limit is reached.
    #[cold]
    pub fn note(&self, reached: Reached) {
        self.tenant.refused[reached.whose as usize][reached.limit as usize].inc();
    }

    /// Takes at the identity, then at the tenant. What the tenant does not have is given back.
    fn take(&self, limit: Limit, which: Which, more: usize) -> Result<(), Reached> {
        let (own, all) = (which(&self.account), which(&self.tenant.account));
        let reached = |whose, meter: &Meter| Reached {
            limit,
            whose,
            most: meter.most,
            wait: None,
        };
        if !own.take(more) {
            return Err(reached(Whose::Identity, own));
        }
        if !all.take(more) {
            own.give(more);
            return Err(reached(Whose::Tenant, all));
        }
        Ok(())
    }

    fn charge_to(&self, which: Which, more: usize) {
        which(&self.account).charge(more);
        which(&self.tenant.account).charge(more);
    }

    fn give(&self, which: Which, back: usize) {
        which(&self.account).give(back);
        which(&self.tenant.account).give(back);
    }

    /// What somebody is told of a limit, counted.
    #[cold]
    fn refuse(&self, reached: Reached) -> Status {
        self.note(reached);
        let who = match reached.whose {
            Whose::Identity => format!("identity {}", self.name),
            Whose::Tenant => format!("tenant {}", self.tenant.name),
        };
        let most = reached.most;
        let message = match reached.limit {
            Limit::Connections => format!("{who} has as many connections as it may: {most}"),
            Limit::Subscriptions => format!("{who} has as many subscriptions as it may: {most}"),
            Limit::QueueBytes => format!("{who} has as many bytes in its queues as it may: {most}"),
            Limit::PublishRate => format!("{who} may publish {most} messages a second"),
        };
        let status = Status::new(Code::ResourceExhausted, message);
        match reached.wait {
            Some(wait) => status.retry_after(wait),
            None => status,
        }
    }

    /// Nothing of the identity is left, and forgetting it gives it nothing back.
    fn is_idle(&self, now: Instant) -> bool {
        let Account {
            connections,
            subscriptions,
            bytes,
            rate,
        } = &self.account;
        [connections, subscriptions, bytes]
            .into_iter()
            .all(Meter::is_unused)
            && rate.as_ref().is_none_or(|rate| rate.is_rested(now))
    }
}

/// Without limits, and nobody's.
impl Default for Usage {
    fn default() -> Self {
        let usages = Usages::new("".into(), &Limits::default(), &Metrics::default());
        usages.open("", &IdentityLimits::default())
    }
}

fn too_fast(rate: &Rate, whose: Whose, wait: Duration) -> Reached {
    Reached {
        limit: Limit::PublishRate,
        whose,
        most: rate.per_second(),
        wait: Some(wait),
    }
}

/// The usage of every identity of one tenant.
#[derive(Debug)]
pub struct Usages {
    limits: Limits,
    tenant: Arc<TenantUsage>,
    beginning: Instant,
    /// Identities with a connection, a session or a subscription, and those that had one until the
    /// last [`Usages::sweep`].
    held: DashMap<Identity, Arc<Usage>>,
}

impl Usages {
    /// A tenant of which nothing is used.
    pub fn new(name: Arc<str>, limits: &Limits, metrics: &Metrics) -> Self {
        let beginning = clock::now();
        let TenantLimits {
            connections,
            subscriptions,
            queue_bytes,
            publish_rate,
        } = limits.tenant;
        Self {
            tenant: Arc::new(TenantUsage {
                name,
                account: Account {
                    connections: Meter::new(connections),
                    subscriptions: Meter::new(subscriptions),
                    bytes: Meter::new(queue_bytes),
                    rate: publish_rate.map(|most| Rate::new(most, beginning)),
                },
                received: Counted::default(),
                sent: Counted::default(),
                connections_made: AtomicU64::new(0),
                refused: [Whose::Identity, Whose::Tenant]
                    .map(|whose| Limit::ALL.map(|limit| metrics.limit_reached(limit.label(whose)))),
            }),
            limits: limits.clone(),
            beginning,
            held: DashMap::new(),
        }
    }

    /// The tenant's numbers now.
    pub fn figures(&self) -> Figures {
        let tenant = &self.tenant;
        let used = |meter: &Meter| meter.used.load(Ordering::Relaxed) as u64;
        Figures {
            connected: used(&tenant.account.connections),
            connections_made: tenant.connections_made.load(Ordering::Relaxed),
            subscriptions: used(&tenant.account.subscriptions),
            received: tenant.received.now(),
            sent: tenant.sent.now(),
        }
    }

    /// What an identity uses. It is forgotten when nothing refers to it any more.
    pub fn of(&self, identity: &Identity) -> Arc<Usage> {
        if let Some(usage) = self.held.get(identity) {
            return Arc::clone(&usage);
        }
        let usage = || Arc::new(self.open(identity.uri(), &self.limits.of_identity(identity)));
        Arc::clone(&self.held.entry(identity.clone()).or_insert_with(usage))
    }

    /// Forgets identities that have nothing here any more. One that has just published as much as it
    /// may is remembered until it would be allowed as much again, so that it gains nothing by coming
    /// back.
    pub(crate) fn sweep(&self, now: Instant) {
        // Whoever comes for it has to wait for the map, so nobody can get it in between.
        self.held
            .retain(|_, usage| Arc::strong_count(usage) > 1 || !usage.is_idle(now));
    }

    fn open(&self, name: &str, limits: &IdentityLimits) -> Usage {
        let account = Account {
            connections: Meter::new(limits.connections),
            subscriptions: Meter::new(limits.subscriptions),
            bytes: Meter::new(limits.queue_bytes),
            rate: limits
                .publish_rate
                .map(|most| Rate::new(most, self.beginning)),
        };
        let all = &self.tenant.account;
        let own = |key: Option<usize>, most: usize| key.unwrap_or(most).min(most);
        Usage {
            name: name.into(),
            message_bytes: own(limits.message_bytes, self.limits.max_frame_bytes),
            inflight_bytes: own(limits.inflight_bytes, self.limits.inflight_bytes),
            is_rated: account.rate.is_some() || all.rate.is_some(),
            counts_bytes: account.bytes.is_limited() || all.bytes.is_limited(),
            account,
            tenant: Arc::clone(&self.tenant),
            attaching: Mutex::new(()),
        }
    }
}
