//! Messages of topics that are configured to keep history, for subscriptions that ask for a replay.
//!
//! A message is put in its topic's history and handed to the receivers under the topic's lock, together
//! with the generation of the router that decided who they are. A subscription that begins with a
//! replay is in the router first, from some generation on: of the history it is given exactly what was
//! handed out under an earlier one. So nothing is missing between the replay and what is published
//! from then on, and nothing comes twice.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, RwLock};
use selvedge_proto::lane::Flags;
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::topic::{TopicFilter, TopicName};

use crate::batch::{Batch, Flow};
use crate::clock;
use crate::metrics::{Metrics, Reason};
use crate::retained::prefix_of;
use crate::store::{Change, HistoryKey, Store, from_unix_ms, unix_ms};

mod replay;
#[cfg(test)]
mod tests;

pub use self::replay::ReplayBacklog;
use self::replay::{Item, Items};

/// Topics of one tenant that hold history at once. The messages of one more are delivered and not kept,
/// and counted under `topics` in `history_left_out`.
pub const MAX_TOPICS: usize = 100_000;

/// Memory of a record beyond its batch.
const RECORD: usize = 128;

/// Memory of a flow that no other record shares, beyond its announcement.
const FLOW: usize = 256;

/// Topics that keep history, and how much of it. Of several rules that match the first decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryRule {
    /// Which topics.
    pub filter: TopicFilter,
    /// Messages kept of each topic.
    pub messages: usize,
    /// How long they are kept.
    pub age: Duration,
    /// Bytes kept of all topics of the rule together, in one tenant. Beyond it the oldest messages go
    /// first, whichever topic they are of.
    pub bytes: usize,
}

/// Which part of the history a subscription wants; the bounds that are given all hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replay {
    /// The last so many messages of each topic.
    pub last: Option<u32>,
    /// Published at or after this time.
    pub from: Option<SystemTime>,
    /// Published before this time.
    pub until: Option<SystemTime>,
}

/// What a replay is asked for with.
#[derive(Debug)]
pub struct ReplayRequest<'a> {
    /// Topics of the subscription.
    pub filter: &'a TopicFilter,
    /// Topics that policy denies.
    pub residual: &'a [TopicFilter],
    /// Which messages.
    pub replay: &'a Replay,
    /// Only what was handed out under an earlier generation of the router: the first that has the
    /// subscription in it.
    pub before: u64,
    /// Nothing that this session published.
    pub except: Option<u64>,
    /// Highest quality of service of the subscription.
    pub max_qos: Qos,
}

/// The history of one tenant.
#[derive(Debug)]
pub struct History {
    rules: Vec<Arc<Rule>>,
    /// Topics that hold messages, and those that a publisher has open.
    topics: RwLock<BTreeMap<TopicName, Arc<TopicHistory>>>,
    shared: Arc<Shared>,
}

/// What all topics of a tenant have in common.
#[derive(Debug)]
struct Shared {
    tenant: Arc<str>,
    store: Option<Store>,
    metrics: Arc<Metrics>,
    /// Topics that hold messages, at most [`MAX_TOPICS`].
    topics: AtomicUsize,
    /// What replays have yet to send, so that it can be cut when it holds on to too much.
    replays: Mutex<Vec<Weak<Items>>>,
}

/// A rule and what its topics hold together.
#[derive(Debug)]
struct Rule {
    bounds: HistoryRule,
    state: Mutex<RuleState>,
    /// Bytes that the history has given up and a replay still holds on to.
    orphans: Arc<AtomicUsize>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct RuleState {
    bytes: usize,
    next: u64,
    /// Every record of the rule by its ticket, that is by age.
    order: BTreeMap<u64, (Weak<TopicHistory>, SystemTime)>,
}

/// The history of one topic.
#[derive(Debug)]
pub struct TopicHistory {
    topic: TopicName,
    rule: Arc<Rule>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    records: VecDeque<Record>,
    /// Messages in `records`.
    messages: usize,
    /// Place of the last record in the topic's history.
    sequence: u64,
}

#[derive(Debug)]
struct Record {
    sequence: u64,
    /// Place among all records of the rule.
    ticket: u64,
    /// It is in the store, too.
    stored: bool,
    kept: Arc<Kept>,
}

/// One batch of the history, shared with the replays that have yet to send it.
#[derive(Debug)]
struct Kept {
    batch: Arc<Batch>,
    published: SystemTime,
    /// Generation of the router when it was handed out.
    generation: u64,
    cost: usize,
    /// The history has given it up; its cost counts in `orphans` as long as a replay holds it.
    orphan: AtomicBool,
    orphans: Arc<AtomicUsize>,
}

impl History {
    /// An empty history.
    pub fn new(
        rules: &[HistoryRule],
        tenant: Arc<str>,
        store: Option<Store>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let shared = Arc::new(Shared {
            tenant,
            store,
            metrics,
            topics: AtomicUsize::new(0),
            replays: Mutex::default(),
        });
        let rule = |bounds: &HistoryRule| {
            Arc::new(Rule {
                bounds: bounds.clone(),
                state: Mutex::default(),
                orphans: Arc::default(),
                shared: Arc::clone(&shared),
            })
        };
        Self {
            rules: rules.iter().map(rule).collect(),
            topics: RwLock::default(),
            shared,
        }
    }

    /// Whether some topic of the filter keeps history.
    pub fn overlaps(&self, filter: &TopicFilter) -> bool {
        self.rules
            .iter()
            .any(|rule| rule.bounds.filter.overlaps(filter))
    }

    /// The history of a topic, if a rule says that it has one.
    pub fn topic(&self, topic: &TopicName) -> Option<Arc<TopicHistory>> {
        let rule = self
            .rules
            .iter()
            .find(|rule| rule.bounds.filter.matches(topic))?;
        if let Some(history) = self.topics.read().get(topic) {
            return Some(Arc::clone(history));
        }
        let mut topics = self.topics.write();
        let history = topics.entry(topic.clone()).or_insert_with(|| {
            Arc::new(TopicHistory {
                topic: topic.clone(),
                rule: Arc::clone(rule),
                inner: Mutex::default(),
            })
        });
        Some(Arc::clone(history))
    }

    /// The messages that a replay consists of, by class: topic by topic, each in the order in which
    /// they were published, with the time in their header. What is past its expiry is left out.
    pub fn replay(
        &self,
        request: &ReplayRequest<'_>,
        now: SystemTime,
    ) -> [Option<ReplayBacklog>; 3] {
        let mut found: [VecDeque<Item>; 3] = Default::default();
        for topic in self.matching(request) {
            topic.replay(request, now, &mut found);
        }
        found.map(|items| {
            if items.is_empty() {
                return None;
            }
            let backlog = ReplayBacklog::new(items, request.max_qos);
            self.shared.note(&backlog);
            Some(backlog)
        })
    }

    fn matching(&self, request: &ReplayRequest<'_>) -> Vec<Arc<TopicHistory>> {
        let prefix = prefix_of(request.filter);
        let topics = self.topics.read();
        topics
            .range::<str, _>((Bound::Included(&*prefix), Bound::Unbounded))
            .take_while(|(topic, _)| topic.as_str().starts_with(&*prefix))
            .filter(|(topic, _)| {
                let denied = || request.residual.iter().any(|filter| filter.matches(topic));
                request.filter.matches(topic) && !denied()
            })
            .map(|(_, history)| Arc::clone(history))
            .collect()
    }

    /// Forgets what has become too old, and topics that hold nothing and that nobody has open.
    pub fn sweep(&self, now: SystemTime) {
        for rule in &self.rules {
            rule.forget_old(now);
        }
        let spare = self.topics.read().len() > self.shared.topics.load(Ordering::Relaxed);
        if spare {
            // Whoever has the topic open could still put something in.
            self.topics.write().retain(|_, history| {
                Arc::strong_count(history) > 1 || !history.inner.lock().records.is_empty()
            });
        }
    }

    /// Puts back a batch that was read from the store; those of a topic come in their order, and all
    /// in the order in which they are to be given up. `false` when there is no place for it any more.
    pub(crate) fn restore(&self, batch: Batch, sequence: u64, published: SystemTime) -> bool {
        let Some(history) = self.topic(&batch.flow.topic) else {
            return false;
        };
        let mut inner = history.inner.lock();
        if !self.shared.may_hold(&inner) {
            return false;
        }
        inner.sequence = sequence;
        let batch = Arc::new(batch);
        // No subscription of this process was there when it was handed out.
        history.add(&mut inner, batch, published, 0, true);
        history.trim(&mut inner, published);
        drop(inner);
        history.rule.keep_bounds();
        true
    }
}

impl TopicHistory {
    /// Hands a batch out with `deliver`, which returns the generation of the router that it went by,
    /// and adds it, as one step for [`History::replay`]. Says whether it is on its way to the store.
    pub fn publish(
        self: &Arc<Self>,
        batch: &Arc<Batch>,
        now: SystemTime,
        deliver: impl FnOnce() -> u64,
    ) -> bool {
        // As exact as its record in the store and in a message's header.
        let published = from_unix_ms(unix_ms(now));
        let shared = &self.rule.shared;
        let copy = copy_of(batch);
        let mut inner = self.inner.lock();
        let generation = deliver();
        if !shared.may_hold(&inner) {
            drop(inner);
            shared.leave_out("topics", batch.count.into());
            return false;
        }
        inner.sequence += 1;
        let stored = shared.put(&self.topic, inner.sequence, &copy, published);
        self.add(&mut inner, copy, published, generation, stored);
        self.trim(&mut inner, now);
        drop(inner);
        self.rule.keep_bounds();
        stored
    }

    fn add(
        self: &Arc<Self>,
        inner: &mut Inner,
        batch: Arc<Batch>,
        published: SystemTime,
        generation: u64,
        stored: bool,
    ) {
        let rule = &self.rule;
        let shares = |last: &Record| Arc::ptr_eq(&last.kept.batch.flow, &batch.flow);
        let flow = if inner.records.back().is_some_and(shares) {
            0
        } else {
            FLOW + batch.flow.bind.len()
        };
        let cost = batch.cost() + RECORD + flow;
        let count = batch.count as usize;
        inner.records.push_back(Record {
            sequence: inner.sequence,
            ticket: rule.admit(Arc::downgrade(self), published, cost),
            stored,
            kept: Arc::new(Kept {
                batch,
                published,
                generation,
                cost,
                orphan: AtomicBool::new(false),
                orphans: Arc::clone(&rule.orphans),
            }),
        });
        inner.messages += count;
        rule.shared.metrics.history_messages.inc_by(count as i64);
    }

    /// Gives up what is too old, and the oldest batches while the others hold as many messages as are
    /// to be kept. So of the oldest batch there may be messages too many: a replay leaves them out.
    fn trim(&self, inner: &mut Inner, now: SystemTime) {
        let bounds = &self.rule.bounds;
        while let Some(oldest) = inner.records.front() {
            let without = inner.messages - oldest.kept.batch.count as usize;
            if without < bounds.messages && !bounds.is_too_old(oldest.kept.published, now) {
                break;
            }
            self.give_up_oldest(inner);
        }
    }

    fn give_up_oldest(&self, inner: &mut Inner) {
        let Some(record) = inner.records.pop_front() else {
            return;
        };
        let shared = &self.rule.shared;
        let count = record.kept.batch.count;
        inner.messages -= count as usize;
        shared.metrics.history_messages.dec_by(count.into());
        self.rule.forget(record.ticket, record.kept.cost);
        if let Some(store) = shared.store.as_ref().filter(|_| record.stored) {
            store.put(Change::RemoveHistory(
                shared.key(&self.topic, record.sequence),
            ));
        }
        if Arc::strong_count(&record.kept) > 1 {
            record.kept.orphan.store(true, Ordering::Release);
            let orphans = &self.rule.orphans;
            orphans.fetch_add(record.kept.cost, Ordering::Relaxed);
        }
        if inner.records.is_empty() {
            shared.topics.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Gives up every record up to this ticket.
    fn give_up_to(&self, ticket: u64) {
        let mut inner = self.inner.lock();
        while inner
            .records
            .front()
            .is_some_and(|oldest| oldest.ticket <= ticket)
        {
            self.give_up_oldest(&mut inner);
        }
    }

    /// Adds what a replay wants of this topic, as of one moment.
    fn replay(
        &self,
        request: &ReplayRequest<'_>,
        now: SystemTime,
        found: &mut [VecDeque<Item>; 3],
    ) {
        let Replay { last, from, until } = *request.replay;
        let bounds = &self.rule.bounds;
        let mut wanted = last.unwrap_or(u32::MAX);
        let mut newest_first = Vec::new();
        let (clock, inner) = (clock::now(), self.inner.lock());
        // Messages of the topic that are within the bound on their number.
        let mut within = bounds.messages;
        for record in inner.records.iter().rev() {
            let kept = &record.kept;
            let count = kept.batch.count as usize;
            let present = count.min(within);
            within -= present;
            if wanted == 0 || present == 0 {
                break;
            }
            let published = kept.published;
            let is_wanted = kept.generation < request.before
                && from.is_none_or(|from| from <= published)
                && until.is_none_or(|until| published < until)
                && !bounds.is_too_old(published, now)
                && request.except != Some(kept.batch.flow.session)
                && kept.batch.expires.is_none_or(|expires| expires > clock);
            if is_wanted {
                let taken = wanted.min(present as u32);
                wanted -= taken;
                newest_first.push(Item {
                    skip: count - taken as usize,
                    kept: Arc::clone(kept),
                });
            }
        }
        drop(inner);
        for item in newest_first.into_iter().rev() {
            found[item.kept.batch.class.index()].push_back(item);
        }
    }
}

impl HistoryRule {
    fn is_too_old(&self, published: SystemTime, now: SystemTime) -> bool {
        now.duration_since(published)
            .is_ok_and(|age| age >= self.age)
    }
}

impl Rule {
    /// Counts a record. Returns its ticket.
    fn admit(&self, topic: Weak<TopicHistory>, published: SystemTime, cost: usize) -> u64 {
        let mut state = self.state.lock();
        state.bytes += cost;
        state.next += 1;
        let ticket = state.next;
        state.order.insert(ticket, (topic, published));
        self.shared.metrics.history_bytes.inc_by(cost as i64);
        ticket
    }

    fn forget(&self, ticket: u64, cost: usize) {
        let mut state = self.state.lock();
        state.order.remove(&ticket);
        state.bytes -= cost;
        self.shared.metrics.history_bytes.dec_by(cost as i64);
    }

    /// Gives up the oldest records while there are more bytes than the rule allows, and takes back
    /// from replays what they hold on to if that is as much again.
    ///
    /// No topic's lock is held: the oldest records are other topics'.
    fn keep_bounds(&self) {
        self.give_up_while(|state, _| state.bytes > self.bounds.bytes);
        if self.orphans.load(Ordering::Relaxed) > self.bounds.bytes {
            self.shared.cut_replays();
        }
    }

    fn forget_old(&self, now: SystemTime) {
        self.give_up_while(|_, published| self.bounds.is_too_old(published, now));
    }

    fn give_up_while(&self, condition: impl Fn(&RuleState, SystemTime) -> bool) {
        loop {
            let (ticket, topic) = {
                let state = self.state.lock();
                match state.order.first_key_value() {
                    Some((&ticket, (topic, published))) if condition(&state, *published) => {
                        (ticket, topic.upgrade())
                    }
                    _ => return,
                }
            };
            match topic {
                Some(topic) => topic.give_up_to(ticket),
                // A topic with records is not forgotten before its tenant, which is ending.
                None => return,
            }
        }
    }
}

impl Shared {
    fn key(&self, topic: &TopicName, sequence: u64) -> HistoryKey {
        HistoryKey {
            tenant: Arc::clone(&self.tenant),
            topic: topic.clone().into(),
            sequence,
        }
    }

    /// Whether a topic may take one more record.
    fn may_hold(&self, inner: &Inner) -> bool {
        let more = |topics| (topics < MAX_TOPICS).then_some(topics + 1);
        !inner.records.is_empty()
            || self
                .topics
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
                .is_ok()
    }

    /// Puts a batch in the store; `false` when it is not kept there. Publishers of QoS 1 have asked
    /// whether the store can take it; QoS 0 must not fill the memory when it cannot.
    fn put(
        &self,
        topic: &TopicName,
        sequence: u64,
        batch: &Arc<Batch>,
        published: SystemTime,
    ) -> bool {
        let Some(store) = &self.store else {
            return false;
        };
        if batch.qos == Qos::AtMostOnce && store.check().is_err() {
            self.leave_out("not_stored", batch.count.into());
            return false;
        }
        let key = self.key(topic, sequence);
        store.put(Change::PutHistory(key, Arc::clone(batch), published));
        true
    }

    #[cold]
    fn leave_out(&self, reason: &'static str, count: u64) {
        self.metrics
            .history_left_out
            .get_or_create(&Reason { reason })
            .inc_by(count);
    }

    fn note(&self, backlog: &ReplayBacklog) {
        let mut replays = self.replays.lock();
        replays.retain(|replay| replay.strong_count() > 0);
        replays.push(backlog.items());
    }

    /// Takes from every replay what the history has given up by now: their readers are too slow.
    #[cold]
    fn cut_replays(&self) {
        let replays = self.replays.lock();
        let mut cut = 0;
        for replay in replays.iter().filter_map(Weak::upgrade) {
            replay.lock().retain(|item| {
                let stays = !item.kept.orphan.load(Ordering::Acquire);
                cut += if stays { 0 } else { item.count() };
                stays
            });
        }
        self.leave_out("slow_replay", cut);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if *self.orphan.get_mut() {
            self.orphans.fetch_sub(self.cost, Ordering::Relaxed);
        }
    }
}

/// A copy of a batch that keeps no larger buffer alive.
fn copy_of(batch: &Batch) -> Arc<Batch> {
    let frames = if batch.payload.is_empty() {
        Bytes::copy_from_slice(&batch.frames)
    } else {
        let mut frames = BytesMut::with_capacity(batch.frames.len() + batch.payload.len());
        batch.put(&mut frames, Flags::new(batch.qos).with_retain(batch.retain));
        frames.freeze()
    };
    Arc::new(Batch {
        flow: Arc::<Flow>::clone(&batch.flow),
        frames,
        payload: Bytes::new(),
        ..*batch
    })
}

/// Every class has its own lane.
const _: () = assert!(Class::ALL.len() == 3);
