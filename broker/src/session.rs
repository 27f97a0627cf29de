//! Sessions: what belongs to an identity while its connections come and go.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use selvedge_certs::Identity;
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::{SubscribeTarget, TopicFilter, TopicName};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::losses::Losses;
use crate::queue::{DeliveryQueue, Outbox, Overflow, Owner, QueueOptions, QueueStore};
use crate::quota::{ConnectionHold, Usage};
use crate::router::Group;
use crate::store::{
    Change, QueueKey, Store, StoredPacket, StoredSession, StoredSubscription, StoredWill, unix_ms,
};

use self::packets::Packets;

pub(crate) mod packets;

/// Which session: identity and name, never the name alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionKey {
    /// The owner, from its certificate.
    pub identity: Identity,
    /// Chosen by the owner: session name or MQTT client id.
    pub name: Arc<str>,
}

/// One subscription of one session, as the router holds it.
#[derive(Debug)]
pub struct Subscriber {
    /// Unique within the session.
    pub id: u32,
    /// Id of the session, unique within the broker.
    pub session_id: u64,
    /// Filter and share group.
    pub target: SubscribeTarget,
    /// Messages above this quality of service are delivered at it.
    pub max_qos: Qos,
    /// Leave out what the same session published (MQTT 5.0 section 3.8.3.1).
    pub no_local: bool,
    /// Deliver with the retain flag as published (MQTT 5.0 section 3.8.3.1).
    pub retain_as_published: bool,
    /// MQTT subscription identifier (MQTT 5.0 section 3.8.2.1.2).
    pub identifier: Option<u32>,
    /// Topics within the filter that policy denies.
    pub residual: Arc<[TopicFilter]>,
    /// Whether its lanes are its own.
    pub own_lane: bool,
    /// What its queues do when full, if they are its own.
    pub overflow: Overflow,
    /// Where its messages go, by class.
    pub queues: [Arc<DeliveryQueue>; 3],
    /// QoS 0 messages that fit go as datagrams.
    pub datagrams: bool,
    /// The session, to end its connection when its policy says so.
    pub session: Weak<Session>,
    /// Its share group, once it is in the router.
    pub group: OnceLock<Weak<Group>>,
}

/// A message the broker publishes when a session's connection is lost.
#[derive(Debug, Clone)]
pub struct Will {
    /// Where.
    pub topic: TopicName,
    /// What.
    pub payload: Bytes,
    /// Quality of service.
    pub qos: Qos,
    /// Keep as the topic's retained message.
    pub retain: bool,
    /// Wait this long for the session to come back.
    pub delay: Duration,
    /// Encoded `MessageHeader`, if any.
    pub header: Option<Bytes>,
}

impl Will {
    /// Its bytes, as a message.
    pub fn size(&self) -> usize {
        self.payload.len() + self.header.as_ref().map_or(0, Bytes::len)
    }
}

/// Ends one connection from outside, with the status to tell it.
#[derive(Debug, Clone, Default)]
pub struct Kick {
    token: CancellationToken,
    status: Arc<OnceLock<Status>>,
}

impl Kick {
    /// Ends the connection. The first status counts.
    pub fn kick(&self, status: Status) {
        let _ = self.status.set(status);
        self.token.cancel();
    }

    /// Waits for the end.
    pub async fn kicked(&self) -> Status {
        self.token.cancelled().await;
        self.status.get().cloned().unwrap_or_else(|| {
            Status::new(
                selvedge_proto::status::Code::Unavailable,
                "the connection is ended",
            )
        })
    }
}

/// The connection that holds a session.
#[derive(Debug)]
struct Attached {
    epoch: u64,
    kick: Kick,
    /// Its place among those that the identity may have, unless its task is gone.
    hold: Weak<ConnectionHold>,
}

#[derive(Debug)]
struct State {
    /// Each is counted as the identity's as long as it is here.
    subscriptions: HashMap<u32, Arc<Subscriber>>,
    attached: Option<Attached>,
    /// The session has ended, and takes no more subscriptions.
    closed: bool,
    /// Counts connections, so that a late detach of an old one is told apart.
    epoch: u64,
    expiry: Duration,
    detached_at: Option<Instant>,
    /// When the connection came, or was lost.
    since: Instant,
    will: Option<Will>,
    /// The store has a will of the session.
    will_stored: bool,
    next_id: u32,
    /// It outlives its connections and so is kept in the store.
    durable: bool,
}

/// What belongs to an identity (and session name): subscriptions and queues.
#[derive(Debug)]
pub struct Session {
    /// Unique within the broker, never reused.
    pub id: u64,
    /// Owner and name.
    pub key: SessionKey,
    /// Bell and ready list of all its queues.
    pub outbox: Arc<Outbox>,
    /// Queues of the shared lanes, by class.
    pub shared: [Arc<DeliveryQueue>; 3],
    queue_limit: usize,
    owner: Arc<Owner>,
    store: Option<Store>,
    /// Taken before `state` and before the locks of queues.
    packets: Mutex<Packets>,
    state: Mutex<State>,
}

/// What a session is made of.
#[derive(Debug)]
pub struct SessionOptions {
    /// Unique within the broker, never reused.
    pub id: u64,
    /// Owner and name.
    pub key: SessionKey,
    /// Most bytes in each of its queues.
    pub queue_limit: usize,
    /// Takes note of what is given up.
    pub losses: Losses,
    /// What its identity may use.
    pub usage: Arc<Usage>,
    /// Where it is kept, if anywhere.
    pub store: Option<Store>,
}

impl Session {
    /// A new session with empty queues.
    pub fn new(options: SessionOptions) -> Arc<Self> {
        let SessionOptions {
            id,
            key,
            queue_limit,
            losses,
            usage,
            store,
        } = options;
        let outbox = Arc::new(Outbox::default());
        let owner = Arc::new(Owner {
            key: key.clone(),
            outbox: Arc::clone(&outbox),
            losses,
            usage,
            store: store.clone().map(|store| QueueStore { store, session: id }),
        });
        let shared = Class::ALL.map(|class| {
            DeliveryQueue::new(QueueOptions {
                class,
                subscription: 0,
                limit: queue_limit,
                overflow: Overflow::Default,
                owner: Arc::clone(&owner),
                online: None,
                durable: false,
                held: false,
            })
        });
        Arc::new(Self {
            id,
            key,
            outbox,
            shared,
            queue_limit,
            owner,
            store,
            packets: Mutex::default(),
            state: Mutex::new(State {
                subscriptions: HashMap::new(),
                attached: None,
                closed: false,
                epoch: 0,
                expiry: Duration::ZERO,
                detached_at: None,
                since: clock::now(),
                will: None,
                will_stored: false,
                next_id: 1,
                durable: false,
            }),
        })
    }

    /// A session as it was kept, without its subscriptions: it waits for its client from
    /// `detached_at` on, or from `now` if it was connected when it was last written.
    pub fn restore(
        stored: &StoredSession,
        options: SessionOptions,
        detached_at: Instant,
    ) -> Arc<Self> {
        let session = Self::new(options);
        let mut state = session.state.lock();
        state.expiry = Duration::from_millis(stored.expiry_ms);
        state.detached_at = Some(detached_at);
        state.since = detached_at;
        state.durable = true;
        drop(state);
        let kept = session.store.clone().map(|store| (store, session.id));
        session.packets.lock().begin(0, kept, &[]);
        for queue in &session.shared {
            queue.set_durable(true);
        }
        session
    }

    /// Connects a connection to the session: its number for [`Self::detach`], the connection that held
    /// the session until now, and its will, if that is to be published. `hold` counts the connection.
    pub fn attach(
        &self,
        kick: Kick,
        hold: Weak<ConnectionHold>,
        expiry: Duration,
        will: Option<Will>,
    ) -> (u64, Option<Kick>, Option<Will>) {
        let mut packets = self.packets.lock();
        let mut state = self.state.lock();
        state.epoch += 1;
        let epoch = state.epoch;
        let attached = Attached { epoch, kick, hold };
        let previous = state.attached.replace(attached).map(|held| held.kick);
        state.expiry = expiry;
        state.detached_at = None;
        state.since = clock::now();
        self.store_will(&mut state, will.as_ref(), None);
        // The network connection that it belonged to is closed (MQTT 5.0 section 3.1.2.5).
        let superseded = std::mem::replace(&mut state.will, will)
            .filter(|will| previous.is_some() && packets.in_use() && will.delay.is_zero());
        let queues = all_queues(&self.shared, &state);
        // Under the lock, so that of two connections at once the later number wins everywhere.
        self.outbox.hand_over(epoch);
        // A connection that is taken over leaves its unacknowledged messages to the next.
        note_sent(&mut packets, &queues);
        let mut again = Vec::new();
        for queue in queues {
            queue.offline();
            queue.set_durable(self.store.is_some() && !expiry.is_zero());
            if packets.in_use() {
                again.append(&mut queue.sent_ids());
            }
            queue.online(epoch);
        }
        self.record(&mut state, None);
        let kept = self.store.clone().filter(|_| state.durable);
        packets.begin(epoch, kept.map(|store| (store, self.id)), &again);
        let groups = groups(&state);
        drop(state);
        drop(packets);
        for group in groups {
            group.hand_on();
        }
        (epoch, previous, superseded)
    }

    /// Writes the session to the store, or takes it out when it is not to be kept any more.
    fn record(&self, state: &mut State, detached: Option<SystemTime>) {
        let Some(store) = self.store.as_ref().filter(|_| !state.closed) else {
            return;
        };
        let was_durable = state.durable;
        state.durable = !state.expiry.is_zero();
        if !state.durable {
            if was_durable {
                store.put(Change::RemoveSession(self.id));
            }
            return;
        }
        store.put(Change::PutSession(StoredSession {
            id: self.id,
            identity: self.key.identity.uri().to_owned(),
            name: self.key.name.to_string(),
            expiry_ms: u64::try_from(state.expiry.as_millis()).unwrap_or(u64::MAX),
            detached_ms: detached.map(unix_ms),
        }));
        if !was_durable {
            for subscriber in state.subscriptions.values() {
                store.put(Change::PutSubscription(self.id, subscriber.record()));
            }
        }
    }

    /// Takes the connection off, unless another one has the session by now. The answer says what
    /// to do next.
    pub fn detach(&self, epoch: u64, end: ConnectionEnd, now: Instant) -> Detached {
        let mut packets = self.packets.lock();
        let mut state = self.state.lock();
        let Some(attached) = state.attached.take_if(|held| held.epoch == epoch) else {
            return Detached::NotHeld;
        };
        // The connection may take a while to close, and is none of the identity's any more.
        if let Some(hold) = attached.hold.upgrade() {
            hold.release();
        }
        state.detached_at = Some(now);
        state.since = now;
        if let ConnectionEnd::Clean {
            expiry: Some(expiry),
        } = end
        {
            state.expiry = expiry;
        }
        let will = state.will.take();
        let will = if matches!(end, ConnectionEnd::Clean { .. }) {
            None
        } else {
            will
        };
        // The session may have been ended by a new connection, and its will does not wait then.
        let expiry = if state.closed {
            Duration::ZERO
        } else {
            state.expiry
        };
        let waits = will
            .as_ref()
            .is_some_and(|will| !will.delay.min(expiry).is_zero());
        if waits {
            self.store_will(&mut state, will.as_ref(), Some(SystemTime::now()));
        } else if will.is_none() {
            self.store_will(&mut state, None, None);
        }
        self.record(&mut state, Some(SystemTime::now()));
        let queues = all_queues(&self.shared, &state);
        let groups = groups(&state);
        note_sent(&mut packets, &queues);
        drop(state);
        drop(packets);
        for queue in &queues {
            queue.offline();
        }
        // What this member of share groups has not acknowledged, another may take.
        for group in groups {
            group.settle();
        }
        Detached::Held { expiry, will }
    }

    /// Keeps the will of the session in the store, or takes it out. It is `lost` since then, if it is
    /// to be published.
    fn store_will(&self, state: &mut State, will: Option<&Will>, lost: Option<SystemTime>) {
        let Some(store) = &self.store else {
            return;
        };
        if let Some(will) = will {
            store.put(Change::PutWill(Arc::new(StoredWill {
                session: self.id,
                identity: self.key.identity.uri().to_owned(),
                name: self.key.name.to_string(),
                topic: will.topic.as_str().to_owned(),
                payload: will.payload.clone(),
                header: will.header.clone(),
                qos: will.qos,
                retain: will.retain,
                delay_ms: u64::try_from(will.delay.as_millis()).unwrap_or(u64::MAX),
                lost_ms: lost.map(unix_ms),
            })));
        } else if state.will_stored {
            store.put(Change::RemoveWill(self.id));
        }
        state.will_stored = will.is_some();
    }

    /// Says that the store has a will of the session.
    pub(crate) fn restore_will(&self) {
        self.state.lock().will_stored = true;
    }

    /// Whether the session is without a connection for longer than its expiry.
    pub fn is_expired(&self, now: Instant) -> bool {
        let state = self.state.lock();
        state.attached.is_none()
            && state
                .detached_at
                .is_some_and(|since| now.saturating_duration_since(since) >= state.expiry)
    }

    /// Whether a connection is attached.
    pub fn is_online(&self) -> bool {
        self.state.lock().attached.is_some()
    }

    /// Whether a connection is attached, and since when that is so.
    pub fn presence(&self) -> (bool, Instant) {
        let state = self.state.lock();
        (state.attached.is_some(), state.since)
    }

    /// How long the session is kept without a connection.
    pub(crate) fn expiry(&self) -> Duration {
        self.state.lock().expiry
    }

    /// Number of the connection that holds the session now or held it last.
    pub fn epoch(&self) -> u64 {
        self.state.lock().epoch
    }

    /// Takes its place from the connection that holds the session, for one that takes over.
    pub(crate) fn take_hold(&self) -> Option<ConnectionHold> {
        let state = self.state.lock();
        state.attached.as_ref()?.hold.upgrade()?.hand_on()
    }

    /// Ends the connection, if there is one.
    pub fn kick(&self, status: Status) {
        let kick = self
            .state
            .lock()
            .attached
            .as_ref()
            .map(|held| held.kick.clone());
        if let Some(kick) = kick {
            kick.kick(status);
        }
    }

    /// Queues for a subscription: the shared ones, or new ones of its own, which may begin with a
    /// hold for a replay.
    pub fn queues_for(
        &self,
        id: u32,
        own_lane: bool,
        overflow: Overflow,
        held: bool,
    ) -> [Arc<DeliveryQueue>; 3] {
        if own_lane {
            let state = self.state.lock();
            let online = state.attached.as_ref().map(|held| held.epoch);
            Class::ALL.map(|class| {
                DeliveryQueue::new(QueueOptions {
                    class,
                    subscription: id,
                    limit: self.queue_limit,
                    overflow,
                    owner: Arc::clone(&self.owner),
                    online,
                    durable: state.durable,
                    held,
                })
            })
        } else {
            self.shared.clone()
        }
    }

    /// Adds a subscription or replaces the one with its id, which is returned.
    ///
    /// # Errors
    /// It is one more than the identity or its tenant may have, or the session has ended.
    pub fn insert(
        &self,
        subscriber: Arc<Subscriber>,
        admission: Admission,
    ) -> Result<Option<Arc<Subscriber>>, Status> {
        let id = subscriber.id;
        let mut state = self.state.lock();
        if state.closed {
            return Err(Status::new(Code::Aborted, "the session has ended"));
        }
        let previous = state.subscriptions.get(&id);
        let is_new = previous.is_none();
        let is_other = previous.is_some_and(|held| !held.shares_queues(&subscriber));
        if is_new {
            match admission {
                Admission::Limited => self.usage().subscribe()?,
                Admission::Kept => self.usage().charge_subscription(),
            }
        }
        state.next_id = state.next_id.max(id.saturating_add(1));
        if let Some(store) = self.store.as_ref().filter(|_| state.durable) {
            if is_other {
                // With what waits in its queues.
                store.put(Change::RemoveSubscription(self.id, id));
            }
            store.put(Change::PutSubscription(self.id, subscriber.record()));
        }
        Ok(state.subscriptions.insert(id, subscriber))
    }

    /// Puts `changed` in the place of `previous`; `false` when that is not there any more.
    pub(crate) fn replace(&self, previous: &Arc<Subscriber>, changed: Arc<Subscriber>) -> bool {
        let mut state = self.state.lock();
        match state.subscriptions.get_mut(&changed.id) {
            Some(held) if Arc::ptr_eq(held, previous) => {
                *held = changed;
                true
            }
            _ => false,
        }
    }

    /// Takes a subscription out.
    pub fn remove(&self, id: u32) -> Option<Arc<Subscriber>> {
        let mut state = self.state.lock();
        let removed = state.subscriptions.remove(&id);
        if removed.is_some() {
            self.usage().unsubscribe(1);
        }
        if let Some(store) = self
            .store
            .as_ref()
            .filter(|_| state.durable && removed.is_some())
        {
            store.put(Change::RemoveSubscription(self.id, id));
        }
        drop(state);
        removed
    }

    /// The packet ids of the session.
    pub(crate) fn packets(&self) -> MutexGuard<'_, Packets> {
        self.packets.lock()
    }

    /// Puts a packet id back that was kept, with the message that it was sent with. A message that is
    /// not there is one that the client has: it is owed the PUBREL.
    pub(crate) fn restore_packet(&self, packet: StoredPacket) {
        let mut packets = self.packets.lock();
        let packet = match packet {
            StoredPacket::Sent(id, place) if !self.restore_sent(place, id) => {
                StoredPacket::Released(id)
            }
            other => other,
        };
        packets.restore(packet);
    }

    fn restore_sent(&self, place: QueueKey, id: u16) -> bool {
        self.queue(place.subscription, place.class)
            .is_some_and(|queue| queue.restore_sent(place.sequence, id))
    }

    /// Drops what a queue's receiver has acknowledged, and lets a share group use the room.
    pub fn acknowledge(&self, queue: &DeliveryQueue, epoch: u64, last: u64) {
        if queue.acknowledge(epoch, last) == 0 || queue.subscription == 0 {
            return;
        }
        if let Some(group) = self
            .subscription(queue.subscription)
            .and_then(|subscriber| subscriber.group())
        {
            group.hand_on();
        }
    }

    /// Gives what waits in the queues of its share groups to members that can take it, now or when
    /// they come.
    pub(crate) fn reclaim(&self) {
        let groups = groups(&self.state.lock());
        for group in groups {
            group.settle();
        }
    }

    /// What the session's identity may use.
    pub fn usage(&self) -> &Arc<Usage> {
        &self.owner.usage
    }

    /// The subscription with this id.
    pub fn subscription(&self, id: u32) -> Option<Arc<Subscriber>> {
        self.state.lock().subscriptions.get(&id).cloned()
    }

    /// The subscription to exactly this filter and share group (MQTT names subscriptions so).
    pub fn find(&self, target: &SubscribeTarget) -> Option<Arc<Subscriber>> {
        self.state
            .lock()
            .subscriptions
            .values()
            .find(|subscriber| subscriber.target == *target)
            .cloned()
    }

    /// An id that no subscription of the session has, for protocols without ids.
    pub fn free_id(&self) -> u32 {
        self.state.lock().next_id
    }

    /// All subscriptions.
    pub fn subscriptions(&self) -> Vec<Arc<Subscriber>> {
        self.state.lock().subscriptions.values().cloned().collect()
    }

    /// How many subscriptions there are.
    pub fn subscription_count(&self) -> usize {
        self.state.lock().subscriptions.len()
    }

    /// The queue of this class that a subscription owns, or a shared one for zero.
    pub fn queue(&self, subscription: u32, class: Class) -> Option<Arc<DeliveryQueue>> {
        if subscription == 0 {
            return Some(Arc::clone(&self.shared[class.index()]));
        }
        let owner = self.subscription(subscription)?;
        Some(Arc::clone(&owner.queues[class.index()]))
    }

    /// Closes every queue; what waits in them is lost. Returns the subscriptions that there were.
    pub fn close(&self) -> Vec<Arc<Subscriber>> {
        let mut state = self.state.lock();
        state.closed = true;
        if let Some(store) = self.store.as_ref().filter(|_| state.durable) {
            store.put(Change::RemoveSession(self.id));
            state.durable = false;
        }
        let queues = all_queues(&self.shared, &state);
        let subscriptions = std::mem::take(&mut state.subscriptions);
        self.usage().unsubscribe(subscriptions.len());
        drop(state);
        for queue in queues {
            queue.close();
        }
        subscriptions.into_values().collect()
    }
}

/// Whether a subscription is one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is, and the limits hold.
    Limited,
    /// It was there before the broker was started, and stays, whatever the limits are by now.
    Kept,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// The client said so: no will. It may have changed the session's expiry.
    Clean {
        /// New expiry, if given.
        expiry: Option<Duration>,
    },
    /// Anything else.
    Lost,
}

/// What [`Session::detach`] found.
#[derive(Debug)]
pub enum Detached {
    /// Another connection has the session; nothing to do.
    NotHeld,
    /// The session is without a connection now.
    Held {
        /// How long it is kept.
        expiry: Duration,
        /// To be published after its delay.
        will: Option<Will>,
    },
}

impl Subscriber {
    /// Its share group, once it is in the router.
    pub fn group(&self) -> Option<Arc<Group>> {
        self.group.get()?.upgrade()
    }

    /// Whether both put what they receive in the same queues.
    fn shares_queues(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.queues[0], &other.queues[0])
    }

    /// Closes the queues that are its own; what waits in them is lost.
    /// What it is owed on queues that it shares is not sent any more.
    pub fn close(&self) {
        for queue in &self.queues {
            if self.own_lane {
                queue.close();
            } else {
                queue.owe(self.id, None);
            }
        }
    }

    /// The same subscription under another policy.
    pub(crate) fn with_residual(&self, residual: Arc<[TopicFilter]>) -> Self {
        Self {
            id: self.id,
            session_id: self.session_id,
            target: self.target.clone(),
            max_qos: self.max_qos,
            no_local: self.no_local,
            retain_as_published: self.retain_as_published,
            identifier: self.identifier,
            residual,
            own_lane: self.own_lane,
            overflow: self.overflow,
            queues: self.queues.clone(),
            datagrams: self.datagrams,
            session: Weak::clone(&self.session),
            group: OnceLock::new(),
        }
    }

    /// What the store keeps of it.
    fn record(&self) -> StoredSubscription {
        StoredSubscription {
            id: self.id,
            target: self.target.to_string(),
            max_qos: self.max_qos as u8,
            no_local: self.no_local,
            retain_as_published: self.retain_as_published,
            identifier: self.identifier,
            own_lane: self.own_lane,
            overflow: self.overflow.as_str().to_owned(),
            owed: false,
            datagrams: self.datagrams,
        }
    }
}

/// Tells the queues which messages the connection has sent with which packet ids.
fn note_sent(packets: &mut Packets, queues: &[Arc<DeliveryQueue>]) {
    if !packets.in_use() {
        return;
    }
    let sent = packets.hand_over();
    let nothing = BTreeMap::new();
    for queue in queues {
        let ids = sent.get(&(Arc::as_ptr(queue) as usize));
        queue.note_sent(ids.unwrap_or(&nothing));
    }
}

/// The share groups that the session's subscriptions are members of.
fn groups(state: &State) -> Vec<Arc<Group>> {
    let shared = state
        .subscriptions
        .values()
        .filter(|subscriber| subscriber.target.share.is_some());
    shared.filter_map(|subscriber| subscriber.group()).collect()
}

fn all_queues(shared: &[Arc<DeliveryQueue>; 3], state: &State) -> Vec<Arc<DeliveryQueue>> {
    let own = state
        .subscriptions
        .values()
        .filter(|subscriber| subscriber.own_lane)
        .flat_map(|subscriber| subscriber.queues.iter());
    shared.iter().chain(own).cloned().collect()
}
