//! The queue between the router and one receiver's lane: bounded in bytes, with a policy when full.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use selvedge_proto::message::{Class, Qos};
use tokio::sync::Notify;

use crate::batch::Batch;
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
            Self::Disconnect => "disconnect",
        }
    }

    /// The policy of a word; an unknown one is the default.
    pub fn from_word(word: &str) -> Self {
        [Self::DropOldest, Self::DropNewest, Self::Disconnect]
            .into_iter()
            .find(|overflow| overflow.as_str() == word)
            .unwrap_or_default()
    }
}

/// What became of a batch that was pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It waits in the queue; so many older messages were given up for it.
    Queued {
        /// Older messages dropped.
        dropped: u32,
        /// It is also on its way to the store: an acknowledgement may have to wait for that.
        stored: bool,
    },
    /// The queue is full and the new messages were given up.
    Full,
    /// The receiver is offline and QoS 0 is not kept for it.
    Offline,
    /// The queue is full and its policy ends the connection.
    Disconnect,
    /// The session has ended.
    Closed,
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
    /// Bell of the session.
    pub outbox: Arc<Outbox>,
    /// Where its entries are kept, if anywhere.
    pub store: Option<QueueStore>,
    /// Number of the connection that the session has, if it has one.
    pub online: Option<u64>,
    /// The session outlives its connections.
    pub durable: bool,
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
    outbox: Arc<Outbox>,
    store: Option<QueueStore>,
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
            outbox,
            store,
            online,
            durable,
        } = options;
        Arc::new_cyclic(|this| Self {
            class,
            subscription,
            limit,
            overflow,
            outbox,
            store,
            wake: Notify::new(),
            this: this.clone(),
            inner: Mutex::new(Inner {
                online: online.is_some(),
                epoch: online.unwrap_or_default(),
                durable,
                ..Inner::default()
            }),
        })
    }

    /// Adds a batch and wakes the receiver if it sleeps.
    pub fn push(&self, batch: &Arc<Batch>) -> Pushed {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Pushed::Closed;
        }
        if !inner.online && batch.qos == Qos::AtMostOnce {
            return Pushed::Offline;
        }
        let cost = batch.cost();
        let mut dropped = 0;
        // A batch larger than the whole queue still passes when nothing else waits.
        if inner.bytes + cost > self.limit && inner.bytes > 0 {
            let overflow = match (self.overflow, batch.qos) {
                (Overflow::Default, Qos::AtMostOnce) => Overflow::DropOldest,
                (Overflow::Default, _) => Overflow::DropNewest,
                (other, _) => other,
            };
            match overflow {
                Overflow::Disconnect => return Pushed::Disconnect,
                Overflow::DropNewest | Overflow::Default => return Pushed::Full,
                Overflow::DropOldest => {
                    while inner.bytes + cost > self.limit
                        && let Some(front) = inner.entries.front()
                        && front.batch.qos == Qos::AtMostOnce
                    {
                        dropped += front.batch.count;
                        inner.bytes -= front.batch.cost();
                        inner.entries.pop_front();
                    }
                    if inner.bytes + cost > self.limit && inner.bytes > 0 {
                        return Pushed::Full;
                    }
                }
            }
        }
        inner.bytes += cost;
        let stored = match &self.store {
            Some(to) if inner.durable && batch.qos != Qos::AtMostOnce => {
                inner.sequence += 1;
                to.store.put(Change::Enqueue(
                    self.key(to, inner.sequence),
                    Arc::clone(batch),
                ));
                Some(inner.sequence)
            }
            _ => None,
        };
        inner.entries.push_back(Entry {
            batch: Arc::clone(batch),
            duplicate: false,
            stored,
        });
        self.schedule(inner);
        Pushed::Queued {
            dropped,
            stored: stored.is_some(),
        }
    }

    /// Puts back an entry that was read from the store.
    pub fn restore(&self, batch: Arc<Batch>, sequence: u64) {
        let mut inner = self.inner.lock();
        inner.bytes += batch.cost();
        inner.sequence = inner.sequence.max(sequence);
        inner.entries.push_back(Entry {
            batch,
            // It may have been sent before the broker stopped.
            duplicate: true,
            stored: Some(sequence),
        });
    }

    /// Begins or ends keeping QoS 1 in the store, for what comes from now on.
    pub fn set_durable(&self, durable: bool) {
        self.inner.lock().durable = durable;
    }

    /// Takes an entry out of the store.
    fn unstore(&self, entry: &Entry) {
        if let (Some(to), Some(sequence)) = (&self.store, entry.stored) {
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

    /// Takes entries up to about `budget` bytes. An empty answer means that the next push wakes.
    ///
    /// QoS 1 entries move to the in-flight part and stay there until acknowledged; their messages
    /// are numbered on from the last. Entries past their expiry are left out and counted.
    ///
    /// `epoch` is the connection's number within the session: one that no longer holds the session
    /// gets nothing, so that it cannot shift the numbers of the one that does.
    pub fn take(&self, epoch: u64, budget: usize, now: Instant) -> Taken {
        let mut inner = self.inner.lock();
        let mut taken = Taken::default();
        if inner.epoch != epoch {
            // The wake-up that led here was for the connection that holds the session now.
            self.wake.notify_one();
            taken.stale = true;
            return taken;
        }
        let mut bytes = 0;
        while bytes < budget {
            let Some(entry) = inner.entries.pop_front() else {
                break;
            };
            let cost = entry.batch.cost();
            if entry.batch.expires.is_some_and(|expires| expires <= now) {
                inner.bytes -= cost;
                taken.expired += entry.batch.count;
                self.unstore(&entry);
                continue;
            }
            // Small messages are packed together; only one that is alone can be too large.
            let size = entry.batch.frames.len() + entry.batch.payload.len();
            if inner.largest > 0 && entry.batch.count == 1 && size > inner.largest {
                inner.bytes -= cost;
                taken.too_large += 1;
                self.unstore(&entry);
                continue;
            }
            bytes += cost;
            if entry.batch.qos == Qos::AtMostOnce {
                inner.bytes -= cost;
            } else {
                inner.sent += u64::from(entry.batch.count);
                let last = inner.sent;
                inner.inflight.push_back((last, entry.clone()));
                inner.inflight_bytes += cost;
            }
            taken.entries.push(entry);
        }
        if taken.entries.is_empty() && inner.entries.is_empty() {
            inner.scheduled = false;
        }
        taken
    }

    /// Whether the lane may take more: fewer than `limit` bytes are unacknowledged. When it may
    /// not, an acknowledgement wakes the writer.
    pub fn has_window(&self, limit: usize) -> bool {
        self.inner.lock().inflight_bytes < limit
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
            self.unstore(&entry);
        }
        drop(inner);
        self.wake.notify_one();
        done
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
        if !inner.entries.is_empty() {
            self.schedule(inner);
        }
    }

    /// The connection is gone. What is unacknowledged waits; QoS 0 is dropped and counted.
    pub fn offline(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.online = false;
        inner.writer = false;
        requeue(&mut inner);
        let mut dropped = 0;
        let mut kept = 0;
        inner.entries.retain(|entry| {
            let keep = entry.batch.qos != Qos::AtMostOnce;
            if keep {
                kept += entry.batch.cost();
            } else {
                dropped += u64::from(entry.batch.count);
            }
            keep
        });
        inner.bytes = kept;
        dropped
    }

    /// The session has ended: nothing is taken any more.
    pub fn close(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.closed = true;
        let lost = inner
            .entries
            .iter()
            .chain(inner.inflight.iter().map(|(_, entry)| entry))
            .map(|entry| u64::from(entry.batch.count))
            .sum();
        inner.entries = VecDeque::new();
        inner.inflight = VecDeque::new();
        inner.inflight_bytes = 0;
        inner.bytes = 0;
        drop(inner);
        self.wake.notify_one();
        lost
    }

    /// Whether the session has ended.
    pub fn is_closed(&self) -> bool {
        self.inner.lock().closed
    }

    /// Bytes queued and in flight.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Whether a receiver is connected and the queue has room.
    pub fn has_room(&self) -> bool {
        let inner = self.inner.lock();
        inner.online && !inner.closed && inner.bytes < self.limit
    }

    fn schedule(&self, mut inner: parking_lot::MutexGuard<'_, Inner>) {
        if inner.scheduled || !inner.online {
            return;
        }
        inner.scheduled = true;
        let writer = inner.writer;
        drop(inner);
        if writer {
            self.wake.notify_one();
        } else if let Some(this) = self.this.upgrade() {
            self.outbox.activate(this);
        }
    }
}

/// What [`DeliveryQueue::take`] found.
#[derive(Debug, Default)]
pub struct Taken {
    /// Entries to send, in order.
    pub entries: Vec<Entry>,
    /// Messages left out because they had expired.
    pub expired: u32,
    /// Messages left out because the receiver does not accept their size.
    pub too_large: u32,
    /// Another connection holds the session: its lanes are the ones to write.
    pub stale: bool,
}

impl Taken {
    /// Messages that were in the queue and will not be sent.
    pub fn left_out(&self) -> u32 {
        self.expired + self.too_large
    }
}

fn requeue(inner: &mut Inner) {
    while let Some((_, mut entry)) = inner.inflight.pop_back() {
        entry.duplicate = true;
        inner.entries.push_front(entry);
    }
    inner.inflight_bytes = 0;
    inner.sent = 0;
}
