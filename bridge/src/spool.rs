//! The messages on their way in one direction: in order, in the journal if there is one, each until the
//! other side has it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

use crate::journal::{Journal, Key, Op, Records, Space};
use record::Stored;

pub(crate) mod record;

/// Bytes of messages kept in memory besides the journal, newest last; what is before them is read
/// from the journal.
const TAIL_BYTES: usize = 2 << 20;
/// Bytes read from the journal at once.
const READ_BYTES: usize = 256 << 10;
/// Messages ahead of one that lead to its acknowledgement as soon as it is on disk: who waits for a
/// whole backlog to pass would be kept from sending, and would drop messages in the end.
const BACKLOG: u64 = 2048;

/// Who waits for a message: told once, when it need not keep the message any longer.
pub(crate) trait Waiter: Send + 'static {
    /// The bridge answers for the message from now on, or the other side has it.
    fn released(self);
}

/// Where a queue keeps its messages.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) remote: Arc<str>,
    pub(crate) space: Space,
    /// Without it, messages are in memory only and are never acknowledged early.
    pub(crate) journal: Option<Journal>,
    /// Most bytes of messages; beyond it whoever brings one waits.
    pub(crate) limit: usize,
}

impl Place {
    /// The key of a number in another space of the same remote.
    pub(crate) fn key(&self, space: Space, number: u64) -> Key {
        Key {
            space,
            remote: Arc::clone(&self.remote),
            number,
        }
    }
}

/// A queue at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueStatus {
    /// Messages that the other side does not have yet.
    pub messages: u64,
    /// Their bytes.
    pub bytes: usize,
    /// Bytes beyond which no more are taken.
    pub limit: usize,
    /// How long the oldest of them has been on its way; zero when there is none.
    pub lag: Duration,
    /// Messages acknowledged to where they came from although the other side did not have them:
    /// they were on the bridge's disk, and the other side was away or far behind.
    pub kept: u64,
    /// How often a message had to wait because the queue was full.
    pub full: u64,
}

/// What the journal held of a queue when it was opened.
#[derive(Debug, Default)]
pub(crate) struct Held {
    first: Option<u64>,
    /// The first number that was never used, in any space.
    next: u64,
    messages: u64,
    bytes: usize,
    by_rule: BTreeMap<usize, u64>,
    oldest: Option<SystemTime>,
}

impl Held {
    /// A record of the queue's own space.
    pub(crate) fn add(&mut self, number: u64, value: &[u8]) -> Result<(), record::Damaged> {
        self.used(number);
        self.first.get_or_insert(number);
        let stored = Stored::decode(value)?;
        self.messages += 1;
        self.bytes += stored.bytes();
        *self.by_rule.entry(stored.rule).or_default() += 1;
        self.oldest.get_or_insert(stored.taken);
        Ok(())
    }

    /// A number that is used in another space.
    pub(crate) fn used(&mut self, number: u64) {
        self.next = self.next.max(number + 1);
    }
}

/// The queue. A cheap handle.
#[derive(Debug)]
pub(crate) struct Spool<W>(Arc<Inner<W>>);

impl<W> Clone for Spool<W> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Inner<W> {
    place: Place,
    /// Messages below this number come from an earlier process.
    opened_at: u64,
    state: Mutex<State<W>>,
    /// Held while a message is numbered and given to the journal, so that numbers are in its order.
    order: tokio::sync::Mutex<()>,
    /// There is something to take.
    arrived: Notify,
    /// There is room again.
    room: Notify,
}

#[derive(Debug)]
struct State<W> {
    /// The number of the next message.
    next: u64,
    /// Everything below was taken by the consumer.
    read: u64,
    /// Everything below is in the journal.
    committed: u64,
    messages: u64,
    bytes: usize,
    by_rule: BTreeMap<usize, u64>,
    /// The newest committed messages without a gap.
    tail: VecDeque<(u64, Stored)>,
    tail_bytes: usize,
    waiters: BTreeMap<u64, W>,
    /// Taken by the consumer and not settled.
    in_hand: BTreeMap<u64, InHand>,
    /// When the oldest message that the consumer has not taken was taken, as far as it is known.
    oldest_unread: Option<SystemTime>,
    /// The other side is not there.
    away: bool,
    kept: u64,
    full: u64,
}

#[derive(Debug)]
struct InHand {
    rule: usize,
    taken: SystemTime,
    bytes: usize,
}

impl<W: Waiter> Spool<W> {
    pub(crate) fn new(place: Place, held: Held) -> Self {
        Self(Arc::new(Inner {
            place,
            opened_at: held.next,
            state: Mutex::new(State {
                next: held.next,
                read: held.first.unwrap_or(held.next),
                committed: held.next,
                messages: held.messages,
                bytes: held.bytes,
                by_rule: held.by_rule,
                tail: VecDeque::new(),
                tail_bytes: 0,
                waiters: BTreeMap::new(),
                in_hand: BTreeMap::new(),
                oldest_unread: held.oldest,
                away: true,
                kept: 0,
                full: 0,
            }),
            order: tokio::sync::Mutex::new(()),
            arrived: Notify::new(),
            room: Notify::new(),
        }))
    }

    pub(crate) fn place(&self) -> &Place {
        &self.0.place
    }

    fn state(&self) -> MutexGuard<'_, State<W>> {
        // Every change is made whole before the lock is let go of.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a message may be added now.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.state();
        state.messages == 0 || state.bytes < self.0.place.limit
    }

    /// Whether an earlier process may have handed the message over already.
    pub(crate) fn is_inherited(&self, number: u64) -> bool {
        number < self.0.opened_at
    }

    /// Counts that somebody has to wait for room.
    pub(crate) fn count_full(&self) {
        self.state().full += 1;
    }

    /// Waits until a message may be added.
    pub(crate) async fn room(&self) {
        loop {
            let room = self.0.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.has_room() {
                return;
            }
            room.await;
        }
    }

    /// Adds a message, whether there is room or not, and further records in the same commit: they get
    /// the message's number. Returns when its place is settled; the waiter is told later.
    pub(crate) async fn append(
        &self,
        stored: Stored,
        waiter: W,
        further: impl FnOnce(u64) -> Vec<Op>,
    ) -> u64 {
        let _in_order = self.0.order.lock().await;
        let place = &self.0.place;
        let number = {
            let mut state = self.state();
            let number = state.next;
            state.next += 1;
            state.messages += 1;
            state.bytes += stored.bytes();
            *state.by_rule.entry(stored.rule).or_default() += 1;
            state.waiters.insert(number, waiter);
            number
        };
        match &place.journal {
            None => self.committed(number, stored),
            Some(journal) => {
                let mut ops = further(number);
                ops.push(Op::Put(place.key(place.space, number), stored.encode()));
                let queue = self.clone();
                let committed = Box::new(move || queue.committed(number, stored));
                journal.put(ops, Some(committed)).await;
            }
        }
        number
    }

    /// The message is on disk, or as safe as it will be.
    fn committed(&self, number: u64, stored: Stored) {
        let mut state = self.state();
        state.committed = number + 1;
        let bounded = self.0.place.journal.is_some();
        if bounded && state.tail_bytes > TAIL_BYTES {
            // The consumer reads them from the journal.
            state.tail.clear();
            state.tail_bytes = 0;
        }
        state.oldest_unread.get_or_insert(stored.taken);
        state.tail_bytes += stored.bytes();
        state.tail.push_back((number, stored));
        let kept = match bounded && (state.away || state.committed - state.read > BACKLOG) {
            true => state.waiters.remove(&number),
            false => None,
        };
        state.kept += u64::from(kept.is_some());
        drop(state);
        self.0.arrived.notify_one();
        if let Some(waiter) = kept {
            waiter.released();
        }
    }

    /// Puts another waiter in the place of a message's first one. It is told at once if the message
    /// is safe or settled already.
    pub(crate) fn attach(&self, number: u64, waiter: W) {
        let mut state = self.state();
        if let Some(present) = state.waiters.get_mut(&number) {
            *present = waiter;
            return;
        }
        drop(state);
        waiter.released();
    }

    /// The other side is there, or not. While it is not, messages are acknowledged to where they came
    /// from once they are on the bridge's disk.
    pub(crate) fn set_away(&self, away: bool) {
        let mut state = self.state();
        state.away = away;
        if !away || self.0.place.journal.is_none() {
            return;
        }
        let committed = state.committed;
        let uncommitted = state.waiters.split_off(&committed);
        let kept = std::mem::replace(&mut state.waiters, uncommitted);
        state.kept += kept.len() as u64;
        drop(state);
        kept.into_values().for_each(Waiter::released);
    }

    /// The other side has the message, or never will.
    pub(crate) async fn settle(&self, number: u64, mut further: Vec<Op>) {
        let place = &self.0.place;
        let waiter = {
            let mut state = self.state();
            if let Some(in_hand) = state.in_hand.remove(&number) {
                state.messages = state.messages.saturating_sub(1);
                state.bytes = state.bytes.saturating_sub(in_hand.bytes);
                if let Some(count) = state.by_rule.get_mut(&in_hand.rule) {
                    *count = count.saturating_sub(1);
                }
            }
            state.waiters.remove(&number)
        };
        self.0.room.notify_waiters();
        if let Some(waiter) = waiter {
            waiter.released();
        }
        if let Some(journal) = &place.journal {
            further.push(Op::Remove(place.key(place.space, number)));
            // Should it come back after a crash, what it was given is known by its name or id.
            journal.put(further, None).await;
        }
    }

    pub(crate) fn status(&self) -> QueueStatus {
        let state = self.state();
        let in_hand = state.in_hand.values().map(|in_hand| in_hand.taken);
        let oldest = in_hand.chain(state.oldest_unread).min();
        QueueStatus {
            messages: state.messages,
            bytes: state.bytes,
            limit: self.0.place.limit,
            lag: oldest.map_or(Duration::ZERO, age),
            kept: state.kept,
            full: state.full,
        }
    }

    /// Messages of a rule that are on their way, and how long the oldest has been.
    pub(crate) fn rule_status(&self, rule: usize) -> (u64, Duration) {
        let state = self.state();
        let messages = state.by_rule.get(&rule).copied().unwrap_or_default();
        if messages == 0 {
            return (0, Duration::ZERO);
        }
        let in_hand = state.in_hand.values();
        let in_hand = in_hand.filter(|in_hand| in_hand.rule == rule);
        let oldest = in_hand.map(|in_hand| in_hand.taken).min();
        let oldest = oldest.or(state.oldest_unread);
        (messages, oldest.map_or(Duration::ZERO, age))
    }

    /// The one consumer.
    pub(crate) fn consumer(&self) -> Consumer<W> {
        Consumer {
            spool: self.clone(),
            reading: None,
            read: VecDeque::new(),
        }
    }
}

/// A clock that was set back makes nothing older.
fn age(since: SystemTime) -> Duration {
    since.elapsed().unwrap_or_default()
}

/// Takes the messages of a queue in their order.
#[derive(Debug)]
pub(crate) struct Consumer<W> {
    spool: Spool<W>,
    /// Being read from the journal, and the number that the read ends at. Kept when the wait for the
    /// next message is given up.
    reading: Option<(u64, Records)>,
    /// Read from the journal and not taken yet.
    read: VecDeque<(u64, Vec<u8>)>,
}

enum Source {
    Taken(u64, Box<Stored>),
    Journal { from: u64, below: u64 },
    Nothing,
}

impl<W: Waiter> Consumer<W> {
    /// The next message; waits until there is one, and loses nothing when the wait is given up. What it
    /// gave is in hand until it is settled.
    pub(crate) async fn next(&mut self) -> (u64, Stored) {
        loop {
            while let Some((number, value)) = self.read.pop_front() {
                match Stored::decode(&value) {
                    Ok(stored) => {
                        self.take(number, &stored);
                        return (number, stored);
                    }
                    Err(error) => {
                        tracing::error!(%error, number, "a message in the store is left out");
                        self.spool.state().read = number + 1;
                    }
                }
            }
            if let Some((below, reading)) = &mut self.reading {
                let records = match reading.await {
                    Ok(records) => records,
                    // The engine is gone; so is what it holds, for this process.
                    Err(_) => std::future::pending().await,
                };
                if records.is_empty() {
                    self.spool.state().read = *below;
                }
                self.reading = None;
                self.read = records.into();
                continue;
            }
            let arrived = self.spool.0.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            match self.source() {
                Source::Taken(number, stored) => {
                    self.take(number, &stored);
                    return (number, *stored);
                }
                Source::Nothing => arrived.await,
                Source::Journal { from, below } => {
                    let place = &self.spool.0.place;
                    let Some(journal) = &place.journal else {
                        // All of it is in the tail.
                        self.spool.state().read = below;
                        continue;
                    };
                    let from = place.key(place.space, from);
                    let reading = journal.read(from, below, READ_BYTES).await;
                    self.reading = Some((below, reading));
                }
            }
        }
    }

    fn source(&self) -> Source {
        let mut state = self.spool.state();
        let from = state.read;
        // Read from the journal while they were in the tail as well.
        while let Some((_, stored)) = state.tail.pop_front_if(|(number, _)| *number < from) {
            state.tail_bytes -= stored.bytes();
        }
        match state.tail.front() {
            Some((number, _)) if *number == from => {}
            Some((number, _)) => {
                return Source::Journal {
                    from,
                    below: *number,
                };
            }
            None if from < state.committed => {
                return Source::Journal {
                    from,
                    below: state.committed,
                };
            }
            None => {
                state.oldest_unread = None;
                return Source::Nothing;
            }
        }
        match state.tail.pop_front() {
            Some((number, stored)) => {
                state.tail_bytes -= stored.bytes();
                Source::Taken(number, Box::new(stored))
            }
            None => Source::Nothing,
        }
    }

    fn take(&self, number: u64, stored: &Stored) {
        let mut state = self.spool.state();
        state.read = number + 1;
        let next = state.tail.front().map(|(_, stored)| stored.taken);
        state.oldest_unread = match state.read < state.committed {
            // Not known exactly until it is read, and no older than this one.
            true => next.or(Some(stored.taken)),
            false => None,
        };
        state.in_hand.insert(
            number,
            InHand {
                rule: stored.rule,
                taken: stored.taken,
                bytes: stored.bytes(),
            },
        );
    }
}

#[cfg(test)]
mod tests;
