//! The queue between the router and one receiver's lane: bounded in bytes, with a policy when full.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use selvedge_proto::message::{Class, Qos};
use tokio::sync::Notify;

use crate::backlog::Backlog;
use crate::batch::Batch;
use crate::losses::{Losses, Reason};
use crate::quota::{Reached, Usage};
use crate::session::SessionKey;
use crate::store::{Change, QueueKey, Store};

#[cfg(test)]
mod tests;

/// What a full queue does with one more message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Overflow {
    /// QoS 0 drops the oldest, QoS 1 the newest.
    #[default]
    Default,
    /// Gives up the oldest QoS 0 messages in it; the new one when there is none.
    DropOldest,
    /// Gives up the new message.
    DropNewest,
    /// The publisher is refused: the message reaches nobody, and the publisher may try again.
    Refuse,
    /// Ends the receiver's connection.
    Disconnect,
}

impl Overflow {
    /// The word for it in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::DropOldest => "drop_oldest",
            Self::DropNewest => "drop_newest",
            Self::Refuse => "refuse",
            Self::Disconnect => "disconnect",
        }
    }

    /// The policy of a word; an unknown one is the default.
    pub fn from_word(word: &str) -> Self {
        [
            Self::DropOldest,
            Self::DropNewest,
            Self::Refuse,
            Self::Disconnect,
        ]
        .into_iter()
        .find(|overflow| overflow.as_str() == word)
        .unwrap_or_default()
    }
}

/// What became of a batch that was pushed. What was given up for it has been counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It waits in the queue.
    Queued {
        /// It is also on its way to the store: an acknowledgement may have to wait for that.
        stored: bool,
    },
    /// It was given up.
    Lost {
        /// The queue is one whose messages are kept on disk, so an acknowledgement must not claim that.
        kept: bool,
    },
    /// It was given up, and the queue's policy is to end the connection.
    Disconnect,
}

/// Whether a queue has promised room for a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserved {
    /// There is room, and it is held until [`DeliveryQueue::push_reserved`] or
    /// [`DeliveryQueue::release`].
    Held,
    /// The queue does not refuse publishers: nothing is held.
    NotNeeded,
    /// There is no room.
    Full,
}

/// One place in a queue.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The messages.
    pub batch: Arc<Batch>,
    /// They may have been delivered before.
    pub duplicate: bool,
    /// Place in the store, if it is kept there.
    pub stored: Option<u64>,
    /// The MQTT packet ids that the first of its messages were sent with by an earlier connection:
    /// zero for one that has been acknowledged.
    pub sent_as: Option<Arc<Vec<u16>>>,
}

impl Entry {
    /// Whether some of it was sent with packet ids that the receiver may still know.
    fn is_begun(&self) -> bool {
        self.sent_as.as_ref().is_some_and(|ids| !ids.is_empty())
    }

    /// Whether nobody else may have it: at QoS 2 the receiver that it was sent to gets it, or nobody
    /// (MQTT 5.0 section 4.8.2).
    fn is_bound(&self) -> bool {
        let unknown = self.duplicate && self.sent_as.is_none();
        self.batch.qos == Qos::ExactlyOnce && (unknown || self.is_begun())
    }
}

#[derive(Debug, Default)]
struct Inner {
    entries: VecDeque<Entry>,
    /// QoS 1 sent and not yet acknowledged, with the number of its last message on the lane.
    inflight: VecDeque<(u64, Entry)>,
    /// Cost of `inflight` alone.
    inflight_bytes: usize,
    /// Cost of `entries` and `inflight`.
    bytes: usize,
    /// Cost of batches that were promised room and have not come yet.
    reserved: usize,
    /// Number of the last QoS 1 message sent on the current lane.
    sent: u64,
    /// The connection that may take and acknowledge; another one is stale.
    epoch: u64,
    online: bool,
    closed: bool,
    /// The receiver has been woken and has not found the queue empty since.
    scheduled: bool,
    /// The session outlives its connections, so QoS 1 goes to the store.
    durable: bool,
    /// Place in the store of the next entry.
    sequence: u64,
    /// Largest message the receiver accepts, in bytes; zero for no bound.
    largest: usize,
    /// A lane writer waits on `wake`; without one the session's activations are used.
    writer: bool,
    /// What is owed besides the entries, at most one for each subscription, whose id it has.
    backlogs: VecDeque<(u32, Box<dyn Backlog>)>,
    /// A replay is being looked up; nothing goes out before it.
    held: bool,
}

impl Inner {
    /// Whether a batch of this cost is too much. One that is larger than the whole queue still passes
    /// when nothing else waits.
    fn is_over(&self, cost: usize, limit: usize) -> bool {
        let bytes = self.bytes + self.reserved;
        bytes + cost > limit && bytes > 0
    }

    /// Whether what is published from now on has to wait for a replay.
    fn is_replaying(&self) -> bool {
        self.held
            || self
                .backlogs
                .iter()
                .any(|(_, backlog)| backlog.before_live())
    }

    /// Whether the next take would find something without a grant for backlog.
    fn has_live(&self) -> bool {
        self.entries
            .front()
            .is_some_and(|front| front.duplicate || !self.is_replaying())
    }
}

/// Queues that became ready and the receiver's bell.
#[derive(Debug, Default)]
pub struct Outbox {
    ready: Mutex<Ready>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct Ready {
    queues: Vec<Arc<DeliveryQueue>>,
    /// The connection that may take them.
    epoch: u64,
}

impl Outbox {
    /// Waits until a queue may be ready.
    pub async fn ready(&self) {
        self.notify.notified().await;
    }

    /// Takes the queues that became ready, most urgent class first. A connection that no longer
    /// holds the session gets none, and rings for the one that does.
    pub fn take(&self, epoch: u64) -> Vec<Arc<DeliveryQueue>> {
        let mut ready = self.ready.lock();
        if ready.epoch != epoch {
            drop(ready);
            self.notify.notify_one();
            return Vec::new();
        }
        let mut queues = std::mem::take(&mut ready.queues);
        drop(ready);
        queues.sort_by_key(|queue| queue.class.index());
        queues
    }

    /// Gives the bell to another connection.
    pub fn hand_over(&self, epoch: u64) {
        let mut ready = self.ready.lock();
        ready.epoch = epoch;
        ready.queues.clear();
    }

    fn activate(&self, queue: Arc<DeliveryQueue>) {
        self.ready.lock().queues.push(queue);
        self.notify.notify_one();
    }
}

/// Where a queue's entries are kept.
#[derive(Debug, Clone)]
pub struct QueueStore {
    /// The broker's store.
    pub store: Store,
    /// Id of the session.
    pub session: u64,
}

/// What all queues of a session have in common.
#[derive(Debug)]
pub struct Owner {
    /// Whose queues they are.
    pub key: SessionKey,
    /// Bell of the session.
    pub outbox: Arc<Outbox>,
    /// Takes note of what is given up.
    pub losses: Losses,
    /// What the identity may use.
    pub usage: Arc<Usage>,
    /// Where entries are kept, if anywhere.
    pub store: Option<QueueStore>,
}

/// What a queue is made of.
#[derive(Debug)]
pub struct QueueOptions {
    /// Class of its lane.
    pub class: Class,
    /// The subscription that owns it, or zero for the session's shared queues.
    pub subscription: u32,
    /// Most bytes in it.
    pub limit: usize,
    /// What it does when full.
    pub overflow: Overflow,
    /// The session that it is part of.
    pub owner: Arc<Owner>,
    /// Number of the connection that the session has, if it has one.
    pub online: Option<u64>,
    /// The session outlives its connections.
    pub durable: bool,
    /// Nothing goes out before [`DeliveryQueue::owe`] has been called.
    pub held: bool,
}

/// A bounded queue of batches for one receiver, one class and one lane group.
#[derive(Debug)]
pub struct DeliveryQueue {
    /// Class of its lane.
    pub class: Class,
    /// The subscription that owns it, or zero for the session's shared queues.
    pub subscription: u32,
    limit: usize,
    overflow: Overflow,
    owner: Arc<Owner>,
    wake: Notify,
    this: Weak<Self>,
    inner: Mutex<Inner>,
}

impl DeliveryQueue {
    /// An empty queue.
    pub fn new(options: QueueOptions) -> Arc<Self> {
        let QueueOptions {
            class,
            subscription,
            limit,
            overflow,
            owner,
            online,
            durable,
            held,
        } = options;
        Arc::new_cyclic(|this| Self {
            class,
            subscription,
            limit,
            overflow,
            owner,
            wake: Notify::new(),
            this: this.clone(),
            inner: Mutex::new(Inner {
                online: online.is_some(),
                epoch: online.unwrap_or_default(),
                durable,
                held,
                ..Inner::default()
            }),
        })
    }

    /// Adds a batch and wakes the receiver if it sleeps. What is given up is counted here.
    pub fn push(&self, batch: &Arc<Batch>) -> Pushed {
        let mut inner = self.inner.lock();
        if inner.closed {
            drop(inner);
            return self.give_up(Reason::SessionEnded, batch, false);
        }
        if !inner.online && batch.qos == Qos::AtMostOnce {
            drop(inner);
            return self.give_up(Reason::Offline, batch, false);
        }
        let cost = batch.cost();
        let kept = inner.durable && batch.qos != Qos::AtMostOnce;
        if let Err(full) = self.take_room(&inner, cost) {
            self.note(full);
            let overflow = match (self.overflow, batch.qos) {
                (Overflow::Default, Qos::AtMostOnce) => Overflow::DropOldest,
                (Overflow::Default, _) => Overflow::DropNewest,
                (other, _) => other,
            };
            match overflow {
                Overflow::Disconnect => {
                    drop(inner);
                    self.give_up(Reason::QueueFull, batch, kept);
                    return Pushed::Disconnect;
                }
                Overflow::DropOldest => {
                    if !self.make_room(&mut inner, cost) {
                        drop(inner);
                        return self.give_up(Reason::QueueFull, batch, kept);
                    }
                }
                // A publisher that asked for room and was refused does not come here.
                Overflow::DropNewest | Overflow::Default | Overflow::Refuse => {
                    drop(inner);
                    return self.give_up(Reason::QueueFull, batch, kept);
                }
            }
        }
        self.add(inner, batch, false)
    }

    /// Asks for room for a batch on behalf of a publisher that would rather be refused than have it
    /// given up: where the queue's policy is to refuse, and, if the publisher demands that the batch
    /// be on disk, where the queue is kept.
    pub fn reserve(&self, batch: &Batch, on_disk: bool) -> Reserved {
        let mut inner = self.inner.lock();
        let reliable = batch.qos != Qos::AtMostOnce;
        let matters = self.overflow == Overflow::Refuse || (on_disk && inner.durable && reliable);
        if !matters || inner.closed || (!inner.online && !reliable) {
            return Reserved::NotNeeded;
        }
        let cost = batch.cost();
        if let Err(full) = self.take_room(&inner, cost) {
            self.note(full);
            return Reserved::Full;
        }
        inner.reserved += cost;
        Reserved::Held
    }

    /// Gives back room that was held.
    pub fn release(&self, batch: &Batch) {
        self.inner.lock().reserved -= batch.cost();
        self.owner.usage.give_bytes(batch.cost());
    }

    /// Adds a batch that room is held for.
    pub fn push_reserved(&self, batch: &Arc<Batch>) -> Pushed {
        let mut inner = self.inner.lock();
        inner.reserved -= batch.cost();
        let reason = if inner.closed {
            Reason::SessionEnded
        } else if !inner.online && batch.qos == Qos::AtMostOnce {
            Reason::Offline
        } else {
            return self.add(inner, batch, false);
        };
        drop(inner);
        self.owner.usage.give_bytes(batch.cost());
        self.give_up(reason, batch, false)
    }

    /// Adds a batch whose bytes the identity has been charged for.
    fn add(&self, mut inner: MutexGuard<'_, Inner>, batch: &Arc<Batch>, duplicate: bool) -> Pushed {
        inner.bytes += batch.cost();
        let stored = self.keep(&mut inner, batch);
        inner.entries.push_back(Entry {
            batch: Arc::clone(batch),
            duplicate,
            stored,
            sent_as: None,
        });
        self.schedule(inner);
        Pushed::Queued {
            stored: stored.is_some(),
        }
    }

    /// Puts a batch in the store, if it is one to be kept.
    fn keep(&self, inner: &mut Inner, batch: &Arc<Batch>) -> Option<u64> {
        let to = self.owner.store.as_ref()?;
        if !inner.durable || batch.qos == Qos::AtMostOnce {
            return None;
        }
        inner.sequence += 1;
        let key = self.key(to, inner.sequence);
        to.store.put(Change::Enqueue(key, Arc::clone(batch)));
        Some(inner.sequence)
    }

    /// Charges the identity for a batch of this cost, if there is room for it here and there.
    fn take_room(&self, inner: &Inner, cost: usize) -> Result<(), Full> {
        if inner.is_over(cost, self.limit) {
            return Err(Full::Queue);
        }
        self.owner.usage.take_bytes(cost).map_err(Full::Usage)
    }

    /// Gives up the oldest QoS 0 batches until one of this cost fits, which is charged to the
    /// identity then; `false` when a QoS 1 batch is in the way.
    fn make_room(&self, inner: &mut Inner, cost: usize) -> bool {
        while self.take_room(inner, cost).is_err() {
            let Some(front) = inner
                .entries
                .pop_front_if(|front| front.batch.qos == Qos::AtMostOnce)
            else {
                return false;
            };
            inner.bytes -= front.batch.cost();
            self.owner.usage.give_bytes(front.batch.cost());
            self.lose(Reason::QueueFull, &front.batch);
        }
        true
    }

    /// Counts a batch that did not fit at first, if it was for a limit of the identity or the tenant.
    fn note(&self, full: Full) {
        if let Full::Usage(reached) = full {
            self.owner.usage.note(reached);
        }
    }

    fn lose(&self, reason: Reason, batch: &Batch) {
        let receiver = Some(&self.owner.key);
        self.owner.losses.lose(reason, receiver, batch, batch.count);
    }

    #[cold]
    fn give_up(&self, reason: Reason, batch: &Batch, kept: bool) -> Pushed {
        self.lose(reason, batch);
        Pushed::Lost { kept }
    }

    /// Says what a subscription is owed besides what is published, in place of what it was owed
    /// before. Ends the hold that the queue began with.
    pub fn owe(&self, subscription: u32, backlog: Option<Box<dyn Backlog>>) {
        let mut inner = self.inner.lock();
        inner.held = false;
        inner.backlogs.retain(|(id, _)| *id != subscription);
        inner
            .backlogs
            .extend(backlog.map(|backlog| (subscription, backlog)));
        if !inner.entries.is_empty() || !inner.backlogs.is_empty() {
            self.schedule(inner);
        }
    }

    /// Puts back an entry that was read from the store.
    pub fn restore(&self, batch: Arc<Batch>, sequence: u64) {
        let mut inner = self.inner.lock();
        inner.bytes += batch.cost();
        // What is kept stays, whatever the limits are by now.
        self.owner.usage.charge(batch.cost());
        inner.sequence = inner.sequence.max(sequence);
        inner.entries.push_back(Entry {
            // It may have been sent before the broker stopped. At QoS 2 that is known.
            duplicate: batch.qos != Qos::ExactlyOnce,
            batch,
            stored: Some(sequence),
            sent_as: None,
        });
    }

    /// Begins or ends keeping QoS 1 in the store, for what comes from now on.
    pub fn set_durable(&self, durable: bool) {
        self.inner.lock().durable = durable;
    }

    /// Takes an entry out of the store.
    fn unstore(&self, entry: &Entry) {
        if let (Some(to), Some(sequence)) = (&self.owner.store, entry.stored) {
            to.store.put(Change::Dequeue(self.key(to, sequence)));
        }
    }

    fn key(&self, to: &QueueStore, sequence: u64) -> QueueKey {
        QueueKey {
            session: to.session,
            subscription: self.subscription,
            class: self.class,
            sequence,
        }
    }

    /// Takes entries up to about `budget` bytes, and up to `owed` bytes of what is owed besides. An
    /// empty answer means that the next push wakes; [`Taken::owes`] says that there is more to come
    /// for a grant of owed bytes.
    ///
    /// QoS 1 entries move to the in-flight part and stay there until acknowledged; their messages
    /// are numbered on from the last. Entries past their expiry and those too large for the receiver
    /// are left out and counted.
    ///
    /// `epoch` is the connection's number within the session: one that no longer holds the session
    /// gets nothing, so that it cannot shift the numbers of the one that does.
    pub fn take(&self, epoch: u64, budget: usize, owed: usize, now: Instant) -> Taken {
        let mut inner = self.inner.lock();
        let mut taken = Taken::default();
        if inner.epoch != epoch {
            // The wake-up that led here was for the connection that holds the session now.
            self.wake.notify_one();
            taken.stale = true;
            return taken;
        }
        let mut bytes = 0;
        while bytes < budget && inner.has_live() {
            let Some(entry) = inner.entries.pop_front() else {
                break;
            };
            let cost = entry.batch.cost();
            if self.hand_out(&mut inner, entry, now, &mut taken) {
                bytes += cost;
            } else {
                inner.bytes -= cost;
                self.owner.usage.give_bytes(cost);
            }
        }
        let owed = owed.min(budget.saturating_sub(bytes));
        if owed > 0
            && !inner.held
            && let Some((_, backlog)) = inner.backlogs.front_mut()
        {
            let chunk = backlog.next(owed);
            if chunk.done {
                inner.backlogs.pop_front();
            }
            for batch in chunk.batches {
                let cost = batch.cost();
                let entry = Entry {
                    stored: self.keep(&mut inner, &batch),
                    batch,
                    duplicate: false,
                    sent_as: None,
                };
                inner.bytes += cost;
                self.owner.usage.charge(cost);
                if !self.hand_out(&mut inner, entry, now, &mut taken) {
                    inner.bytes -= cost;
                    self.owner.usage.give_bytes(cost);
                }
            }
        }
        taken.owes = !inner.backlogs.is_empty();
        if !taken.entries.is_empty() {
            let batches = || taken.entries.iter().map(|entry| &entry.batch);
            let messages = batches().map(|batch| u64::from(batch.count)).sum();
            let bytes = batches()
                .map(|batch| (batch.frames.len() + batch.payload.len()) as u64)
                .sum();
            self.owner.usage.count_sent(messages, bytes);
        }
        if taken.entries.is_empty() && !inner.has_live() {
            inner.scheduled = false;
        }
        taken
    }

    /// Gives an entry to the receiver; `false` when it is not to be sent. A QoS 0 entry is no longer
    /// the queue's after that.
    fn hand_out(&self, inner: &mut Inner, entry: Entry, now: Instant, taken: &mut Taken) -> bool {
        let cost = entry.batch.cost();
        // Once its delivery has begun it is brought to an end (MQTT 5.0 section 3.3.2.3.3).
        let expired =
            entry.batch.expires.is_some_and(|expires| expires <= now) && !entry.is_begun();
        // Small messages are packed together; only one that is alone can be too large.
        let size = entry.batch.frames.len() + entry.batch.payload.len();
        let too_large = inner.largest > 0 && entry.batch.count == 1 && size > inner.largest;
        if expired || too_large {
            self.unstore(&entry);
            let reason = if expired {
                Reason::Expired
            } else {
                Reason::TooLarge
            };
            self.lose(reason, &entry.batch);
            return false;
        }
        if entry.batch.qos == Qos::AtMostOnce {
            inner.bytes -= cost;
            self.owner.usage.give_bytes(cost);
        } else {
            inner.sent += u64::from(entry.batch.count);
            let last = inner.sent;
            inner.inflight.push_back((last, entry.clone()));
            inner.inflight_bytes += cost;
        }
        taken.entries.push(entry);
        true
    }

    /// Whether the lane may take more: fewer than `limit` bytes, and fewer than its identity may have,
    /// are unacknowledged. When it may not, an acknowledgement wakes the writer.
    pub fn has_window(&self, limit: usize) -> bool {
        self.inner.lock().inflight_bytes < limit.min(self.owner.usage.inflight_bytes())
    }

    /// Drops what the receiver has acknowledged: all QoS 1 messages up to `last`. Ignored from a
    /// connection that no longer holds the session.
    pub fn acknowledge(&self, epoch: u64, last: u64) -> u64 {
        let mut inner = self.inner.lock();
        if inner.epoch != epoch {
            return 0;
        }
        let mut done = 0;
        while let Some((_, entry)) = inner.inflight.pop_front_if(|(number, _)| *number <= last) {
            let cost = entry.batch.cost();
            done += u64::from(entry.batch.count);
            inner.bytes -= cost;
            inner.inflight_bytes -= cost;
            self.owner.usage.give_bytes(cost);
            self.unstore(&entry);
        }
        drop(inner);
        self.wake.notify_one();
        done
    }

    /// Drops the batch of one message that ends with this number: its receiver has it, whatever is
    /// still to be acknowledged before it. Ignored as in [`Self::acknowledge`].
    pub(crate) fn complete(&self, epoch: u64, number: u64) {
        let mut inner = self.inner.lock();
        if inner.epoch != epoch {
            return;
        }
        let found = inner
            .inflight
            .binary_search_by_key(&number, |(last, _)| *last);
        let Some((_, entry)) = found.ok().and_then(|index| inner.inflight.remove(index)) else {
            return;
        };
        let cost = entry.batch.cost();
        inner.bytes -= cost;
        inner.inflight_bytes -= cost;
        self.owner.usage.give_bytes(cost);
        self.unstore(&entry);
    }

    /// Notes with which MQTT packet ids messages were sent that are not acknowledged, by their number,
    /// before they are put back for the next connection.
    pub(crate) fn note_sent(&self, ids: &BTreeMap<u64, u16>) {
        let mut inner = self.inner.lock();
        let begun = ids.last_key_value().map_or(0, |(number, _)| *number);
        for (last, entry) in &mut inner.inflight {
            let first = *last + 1 - u64::from(entry.batch.count);
            let before = entry.sent_as.take();
            let mut sent_as = Vec::new();
            for number in first..=*last {
                let earlier = || {
                    let index = usize::try_from(number - first).ok()?;
                    before.as_ref()?.get(index).copied()
                };
                match ids.get(&number) {
                    Some(id) => sent_as.push(*id),
                    None if number < begun => sent_as.push(0),
                    // This connection has not come to it.
                    None => match earlier() {
                        Some(id) => sent_as.push(id),
                        None => break,
                    },
                }
            }
            entry.sent_as = Some(Arc::new(sent_as));
        }
    }

    /// Notes with which packet id a batch of one message was sent before the broker was started;
    /// `false` when it is not in the queue.
    pub(crate) fn restore_sent(&self, sequence: u64, id: u16) -> bool {
        let mut inner = self.inner.lock();
        let found = inner
            .entries
            .binary_search_by_key(&Some(sequence), |entry| entry.stored);
        let Some(entry) = found.ok().and_then(|index| inner.entries.get_mut(index)) else {
            return false;
        };
        entry.duplicate = true;
        entry.sent_as = Some(Arc::new(vec![id]));
        true
    }

    /// The packet ids that what waits was sent with.
    pub(crate) fn sent_ids(&self) -> Vec<u16> {
        let inner = self.inner.lock();
        let begun = inner
            .entries
            .iter()
            .filter_map(|entry| entry.sent_as.as_ref());
        begun
            .flat_map(|ids| ids.iter().copied())
            .filter(|id| *id != 0)
            .collect()
    }

    /// Waits until there may be entries, for the writer of this queue's lane.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Says that a lane writer now waits on this queue, so that pushes wake it directly, and that
    /// its receiver accepts messages of up to `largest` bytes, frame included (zero for any).
    pub fn set_writer(&self, largest: usize) {
        let mut inner = self.inner.lock();
        inner.writer = true;
        inner.largest = largest;
    }

    /// Starts delivery for a new connection, the session's `epoch`-th: everything unacknowledged
    /// is sent again, first.
    pub fn online(&self, epoch: u64) {
        let mut inner = self.inner.lock();
        inner.epoch = epoch;
        requeue(&mut inner);
        inner.online = true;
        inner.writer = false;
        inner.scheduled = false;
        if !inner.entries.is_empty() || !inner.backlogs.is_empty() {
            self.schedule(inner);
        }
    }

    /// The connection is gone. What is unacknowledged waits; QoS 0 is dropped and counted.
    pub fn offline(&self) {
        let mut inner = self.inner.lock();
        inner.online = false;
        inner.writer = false;
        requeue(&mut inner);
        let Inner { entries, bytes, .. } = &mut *inner;
        entries.retain(|entry| {
            let keep = entry.batch.qos != Qos::AtMostOnce;
            if !keep {
                *bytes -= entry.batch.cost();
                self.owner.usage.give_bytes(entry.batch.cost());
                self.lose(Reason::Offline, &entry.batch);
            }
            keep
        });
    }

    /// The session or subscription has ended: nothing is taken any more, and what waits is lost.
    pub fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        let entries = std::mem::take(&mut inner.entries);
        let inflight = std::mem::take(&mut inner.inflight);
        let bytes = std::mem::take(&mut inner.bytes);
        inner.inflight_bytes = 0;
        inner.backlogs.clear();
        drop(inner);
        self.owner.usage.give_bytes(bytes);
        for entry in inflight.iter().map(|(_, entry)| entry).chain(&entries) {
            self.lose(Reason::SessionEnded, &entry.batch);
        }
        self.wake.notify_one();
    }

    /// Takes the oldest entry out of a queue whose receiver is offline, to give it to another member
    /// of its share group. It stays in the store until [`Self::forget`].
    pub(crate) fn withdraw(&self) -> Option<Entry> {
        let mut inner = self.inner.lock();
        if inner.online {
            return None;
        }
        let free = inner.entries.iter().position(|entry| !entry.is_bound())?;
        let entry = inner.entries.remove(free)?;
        inner.bytes -= entry.batch.cost();
        self.owner.usage.give_bytes(entry.batch.cost());
        Some(entry)
    }

    /// Puts back what was withdrawn, unless the session has ended meanwhile.
    pub(crate) fn put_back(&self, entry: Entry) {
        let mut inner = self.inner.lock();
        if inner.closed {
            drop(inner);
            self.lose(Reason::SessionEnded, &entry.batch);
            return;
        }
        inner.bytes += entry.batch.cost();
        self.owner.usage.charge(entry.batch.cost());
        inner.entries.push_front(entry);
        self.schedule(inner);
    }

    /// Takes out of the store what was withdrawn and is in another queue now.
    pub(crate) fn forget(&self, entry: &Entry) {
        self.unstore(entry);
    }

    /// Adds a batch of another member; `false` when there is no room.
    pub(crate) fn adopt(&self, batch: &Arc<Batch>, duplicate: bool) -> bool {
        let inner = self.inner.lock();
        let cost = batch.cost();
        let takes = inner.online && !inner.closed;
        if !takes || self.take_room(&inner, cost).is_err() {
            return false;
        }
        self.add(inner, batch, duplicate);
        true
    }

    /// Whether the session has ended.
    pub fn is_closed(&self) -> bool {
        self.inner.lock().closed
    }

    /// Bytes queued and in flight.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Bytes that wait and bytes that are in flight, sent and not acknowledged.
    pub fn depth(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        let in_flight = inner.inflight_bytes;
        (inner.bytes.saturating_sub(in_flight), in_flight)
    }

    /// Up to `most` batches in the queue, oldest first, and whether each is in flight.
    pub fn peek(&self, most: usize) -> Vec<(Arc<Batch>, bool)> {
        let inner = self.inner.lock();
        let in_flight = inner.inflight.iter().map(|(_, entry)| (entry, true));
        let waiting = inner.entries.iter().map(|entry| (entry, false));
        in_flight
            .chain(waiting)
            .take(most)
            .map(|(entry, in_flight)| (Arc::clone(&entry.batch), in_flight))
            .collect()
    }

    /// What a queue can do for a share group now.
    pub fn vacancy(&self) -> Vacancy {
        let inner = self.inner.lock();
        let room = !inner.closed
            && inner.bytes + inner.reserved < self.limit
            && self.owner.usage.has_room();
        match (room, inner.online) {
            (true, true) => Vacancy::Takes,
            (true, false) if inner.durable => Vacancy::Keeps,
            _ => Vacancy::None,
        }
    }

    fn schedule(&self, mut inner: MutexGuard<'_, Inner>) {
        if inner.scheduled || !inner.online {
            return;
        }
        inner.scheduled = true;
        let writer = inner.writer;
        drop(inner);
        if writer {
            self.wake.notify_one();
        } else if let Some(this) = self.this.upgrade() {
            self.owner.outbox.activate(this);
        }
    }
}

/// What was put in the queue and never taken, or was promised room, is none of the identity's when
/// the queue is gone.
impl Drop for DeliveryQueue {
    fn drop(&mut self) {
        let inner = self.inner.get_mut();
        self.owner.usage.give_bytes(inner.bytes + inner.reserved);
    }
}

/// Why there is no room for a batch.
#[derive(Debug, Clone, Copy)]
enum Full {
    /// The queue itself is full.
    Queue,
    /// The identity or its tenant has as much in its queues as it may.
    Usage(Reached),
}

/// What a queue can do for a share group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vacancy {
    /// Its receiver is connected, and there is room.
    Takes,
    /// Its receiver is offline; QoS 1 can wait here until some member takes it.
    Keeps,
    /// It is full, or keeps nothing.
    None,
}

/// What [`DeliveryQueue::take`] found.
#[derive(Debug, Default)]
pub struct Taken {
    /// Entries to send, in order.
    pub entries: Vec<Entry>,
    /// The receiver is owed more, for which [`crate::pacer::Turn::granted`] gives leave.
    pub owes: bool,
    /// Another connection holds the session: its lanes are the ones to write.
    pub stale: bool,
}

fn requeue(inner: &mut Inner) {
    while let Some((_, mut entry)) = inner.inflight.pop_back() {
        entry.duplicate = true;
        inner.entries.push_front(entry);
    }
    inner.inflight_bytes = 0;
    inner.sent = 0;
}
