//! The way in: from a publisher's message to the queues of everyone who wants it.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::message::{Class, Durability, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;

use crate::batch::{Batch, Flow, HeaderFacts};
use crate::clock;
use crate::dedup::{MAX_MESSAGE_ID, Taken};
use crate::fabric::Fabric;
use crate::history::TopicHistory;
use crate::losses::Reason;
use crate::policy::{Decision, LivePolicy, Verb};
use crate::queue::{Pushed, Reserved};
use crate::quota::Usage;
use crate::router::{Choice, Group, Route};
use crate::session::{Session, Subscriber};
use crate::store::{Store, StoreError, Synced};
use crate::sys;
use crate::tenant::Tenant;

/// Payloads from this size on are passed on as they were received instead of copied into a batch.
pub const LARGE: usize = 4096;

/// Batches are closed at this size, so that no receiver waits for a long one.
const BATCH: usize = 64 * 1024;

/// One session as a publisher. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Publisher {
    fabric: Arc<Fabric>,
    tenant: Arc<Tenant>,
    identity: Identity,
    session: u64,
    policy: LivePolicy,
    usage: Arc<Usage>,
}

/// One topic of a publisher: its permission, its route and the batch being filled.
#[derive(Debug)]
pub struct Topic {
    flow: Arc<Flow>,
    route: Route,
    denial: Option<Status>,
    /// Generation of the policy that decided.
    decided: u64,
    class: Class,
    pending: BytesMut,
    pending_count: u32,
    pending_qos: Qos,
    /// An acknowledgement waits for the disk, unless the publisher says otherwise.
    on_disk: bool,
    history: Option<Arc<TopicHistory>>,
    /// What happened since [`Topic::take_outcome`].
    outcome: Outcome,
}

/// What became of messages, as far as their acknowledgement depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Something went to the store, so the disk may have to be waited for.
    pub stored: bool,
    /// A receiver whose messages are kept did not get one, as its queue is full. An acknowledgement
    /// must not claim more than memory then.
    pub given_up: bool,
}

impl Outcome {
    /// Adds another outcome.
    pub fn merge(&mut self, other: Self) {
        self.stored |= other.stored;
        self.given_up |= other.given_up;
    }
}

/// One receiver of a message that had to be asked for room first.
struct Planned {
    receiver: Arc<Subscriber>,
    batch: Arc<Batch>,
    /// Room is held in its queue.
    reserved: bool,
    /// It keeps the message for this share group, none of whose members can take it now.
    waits: Option<Arc<Group>>,
}

/// Whom a message that had to be asked for room first goes to.
#[derive(Default)]
struct Plan {
    receivers: Vec<Planned>,
    /// A share group has nobody for it.
    nobody: bool,
}

impl Plan {
    /// Gives back all room that is held.
    fn release(self) {
        for planned in self.receivers {
            if planned.reserved {
                planned.receiver.queues[planned.batch.class.index()].release(&planned.batch);
            }
        }
    }
}

/// One message on its way in.
#[derive(Debug, Clone)]
pub struct Incoming<'a> {
    /// Quality of service it was published with; 2 is delivered as 1 to native receivers, whose
    /// subscriptions ask for no more.
    pub qos: Qos,
    /// Keep it as the topic's retained message.
    pub retain: bool,
    /// What the publisher demands of the acknowledgement.
    pub durability: Durability,
    /// The publisher sends it again, so receivers may have it already. They are told if it is alone.
    pub duplicate: bool,
    /// Encoded `MessageHeader`, if any.
    pub header: Option<&'a [u8]>,
    /// The payload.
    pub payload: Payload<'a>,
}

/// A payload, shared when that saves a copy.
#[derive(Debug, Clone)]
pub enum Payload<'a> {
    /// Copied into the batch.
    Borrowed(&'a [u8]),
    /// Passed on as it is when it is large.
    Shared(Bytes),
}

impl Payload<'_> {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

impl Topic {
    /// The topic's name.
    pub fn name(&self) -> &TopicName {
        &self.flow.topic
    }

    /// Its alias on every delivery lane.
    pub fn alias(&self) -> u32 {
        self.flow.id
    }

    /// What became of what was published since the last call.
    pub fn take_outcome(&mut self) -> Outcome {
        std::mem::take(&mut self.outcome)
    }

    /// The durability that an acknowledgement has to reach when the publisher demands `demanded`.
    pub fn durability(&self, demanded: Durability) -> Durability {
        match demanded {
            Durability::Default if !self.on_disk => Durability::Memory,
            other => other,
        }
    }
}

impl Publisher {
    /// The publisher of a session, with the policy as it is now.
    pub fn new(fabric: &Arc<Fabric>, tenant: Arc<Tenant>, session: &Session) -> Self {
        let identity = session.key.identity.clone();
        Self {
            policy: LivePolicy::new(fabric, &identity),
            usage: Arc::clone(session.usage()),
            fabric: Arc::clone(fabric),
            tenant,
            identity,
            session: session.id,
        }
    }

    /// Opens a topic for publishing. A topic that policy denies opens, too: each message to it is
    /// refused with the denial.
    pub fn open(&self, topic: TopicName, class: Class) -> Topic {
        let (decided, denial) = self.decide(&topic);
        let flow = self.tenant.flow(topic, &self.identity, self.session);
        Topic {
            route: self.tenant.router.route(&flow.topic, self.session),
            on_disk: self.fabric.durability.on_disk(&flow.topic),
            history: self.tenant.history.topic(&flow.topic),
            flow,
            denial,
            decided,
            class,
            pending: BytesMut::new(),
            pending_count: 0,
            pending_qos: Qos::AtMostOnce,
            outcome: Outcome::default(),
        }
    }

    /// Takes one message. It reaches the receivers with the next [`Self::flush`] at the latest.
    ///
    /// # Errors
    /// Policy denies the topic, a limit is reached, the store or a receiver that refuses publishers
    /// has no room, or the header does not decode. Nobody gets the message then.
    #[inline]
    pub fn publish(&self, topic: &mut Topic, message: &Incoming<'_>) -> Result<(), Status> {
        self.check(topic)
            .and_then(|()| self.usage.admit())
            .and_then(|()| self.take(topic, message))
            .inspect_err(|status| self.refused(topic, message, status))
    }

    /// Asks whether one more message may be published now, for [`Self::publish_admitted`].
    ///
    /// # Errors
    /// The identity or its tenant has just published as much as it may.
    pub fn admit(&self) -> Result<(), Status> {
        self.usage.admit()
    }

    /// As [`Self::publish`], for a message that [`Self::admit`] has let in, or that the broker
    /// publishes in the name of its client.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub fn publish_admitted(
        &self,
        topic: &mut Topic,
        message: &Incoming<'_>,
    ) -> Result<(), Status> {
        self.check(topic)
            .and_then(|()| self.take(topic, message))
            .inspect_err(|status| self.refused(topic, message, status))
    }

    /// Whether policy allows the topic.
    #[inline]
    fn check(&self, topic: &mut Topic) -> Result<(), Status> {
        if topic.decided != self.fabric.policy_generation() {
            (topic.decided, topic.denial) = self.decide(&topic.flow.topic);
        }
        if let Some(denial) = &topic.denial {
            self.fabric.metrics.deny("publish");
            return Err(denial.clone());
        }
        Ok(())
    }

    #[inline]
    fn take(&self, topic: &mut Topic, message: &Incoming<'_>) -> Result<(), Status> {
        self.refresh(topic);
        let mut failing = None;
        if message.qos != Qos::AtMostOnce
            && let Some(store) = &self.fabric.store
            && let Err(error) = store.check()
        {
            failing = Some(refusal(&error)?);
        }
        let payload = message.payload.as_slice();
        let simple = message.header.is_none()
            && !message.retain
            && payload.len() < LARGE
            && message.durability != Durability::Disk
            // Each has a packet id of its own to be kept with.
            && message.qos != Qos::ExactlyOnce
            && failing.is_none();
        if !simple || topic.route.may_refuse || !topic.route.groups.is_empty() {
            return self.publish_alone(topic, message, failing.as_ref());
        }
        let qos = message.qos;
        if topic.pending_qos != qos || topic.pending.len() >= BATCH {
            self.flush(topic);
            topic.pending_qos = qos;
        }
        lane::put_message(
            &mut topic.pending,
            Flags::new(qos),
            topic.flow.id,
            None,
            payload,
        );
        topic.pending_count += 1;
        Ok(())
    }

    /// Whether plain messages ([`Flags::is_plain`]) of a topic may go on as they came, with
    /// [`Self::publish_run`]: nobody has to be asked, and nothing is counted for each of them.
    #[inline]
    pub fn takes_runs(&self, topic: &mut Topic, qos: Qos) -> bool {
        self.refresh(topic);
        topic.denial.is_none()
            && topic.decided == self.fabric.policy_generation()
            && !self.usage.is_rated()
            && !topic.route.may_refuse
            && topic.route.groups.is_empty()
            && (qos == Qos::AtMostOnce
                || (self.fabric.store.as_ref()).is_none_or(|store| store.check().is_ok()))
    }

    /// Takes `count` plain messages for which [`Self::takes_runs`], encoded as a batch has them: under
    /// [`Topic::alias`], with no flag but their quality of service. Shared ones are handed out at once,
    /// and keep all of the memory that they are a part of.
    pub fn publish_run(&self, topic: &mut Topic, qos: Qos, count: u32, frames: Payload<'_>) {
        let is_shared = matches!(frames, Payload::Shared(_));
        if is_shared || topic.pending_qos != qos || topic.pending.len() >= BATCH {
            self.flush(topic);
            topic.pending_qos = qos;
        }
        match frames {
            Payload::Borrowed(frames) => {
                topic.pending.extend_from_slice(frames);
                topic.pending_count += count;
            }
            Payload::Shared(frames) => self.hand_out_frames(topic, qos, count, frames),
        }
    }

    /// Remembers a refusal for `selvedge explain`.
    #[cold]
    pub(crate) fn refused(&self, topic: &Topic, message: &Incoming<'_>, status: &Status) {
        let id = HeaderFacts::read(message.header, clock::now())
            .map(|facts| facts.message_id)
            .unwrap_or_default();
        let id = (!id.is_empty()).then_some(id);
        self.tenant.explain.refused(
            &self.identity,
            Some(&topic.flow.topic),
            id.as_deref(),
            status,
        );
    }

    /// Remembers that the store could not keep `count` messages, which were handed out already.
    #[cold]
    pub(crate) fn not_kept(&self, count: u64, status: &Status) {
        self.tenant.explain.not_kept(&self.identity, count, status);
    }

    /// Finds the route again if subscriptions have changed.
    #[inline]
    fn refresh(&self, topic: &mut Topic) {
        let router = &self.tenant.router;
        if topic.route.generation != router.generation() {
            topic.route = router.route(&topic.flow.topic, self.session);
        }
    }

    /// The denial of a topic, if there is one, and the generation of the policy that says so.
    fn decide(&self, topic: &TopicName) -> (u64, Option<Status>) {
        // The generation first: if the policy is replaced in between, it is asked once more.
        let generation = self.fabric.policy_generation();
        let denial = match self.policy.now().decide(Verb::Publish, topic) {
            Decision::Allowed { .. } if topic.as_str().starts_with(sys::PREFIX) => {
                Some(Status::new(
                    Code::PermissionDenied,
                    format!(
                        "publish on {:?} denied: topics that begin with {} are the broker's own",
                        topic.as_str(),
                        sys::PREFIX
                    ),
                ))
            }
            Decision::Allowed { .. } => None,
            Decision::Denied(denial) => Some(denial.into()),
        };
        (generation, denial)
    }

    /// Hands what was taken to the receivers' queues.
    #[inline]
    pub fn flush(&self, topic: &mut Topic) {
        if topic.pending_count == 0 {
            return;
        }
        let count = std::mem::take(&mut topic.pending_count);
        let frames = topic.pending.split().freeze();
        self.hand_out_frames(topic, topic.pending_qos, count, frames);
    }

    fn hand_out_frames(&self, topic: &mut Topic, qos: Qos, count: u32, frames: Bytes) {
        let batch = Batch {
            flow: Arc::clone(&topic.flow),
            class: topic.class,
            qos,
            retain: false,
            retain_as_published: false,
            count,
            frames,
            payload: Bytes::new(),
            expires: None,
        };
        self.refresh(topic);
        self.hand_out(topic, &Arc::new(batch), None);
    }

    /// Publishes one message to a topic that is not worth keeping open: a will, which is not lost
    /// because its client had just published as much as it may.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub fn publish_one(
        &self,
        topic: &TopicName,
        class: Class,
        qos: Qos,
        retain: bool,
        header: Option<&Bytes>,
        payload: &Bytes,
    ) -> Result<(), Status> {
        let mut topic = self.open(topic.clone(), class);
        self.publish_admitted(
            &mut topic,
            &Incoming {
                qos,
                retain,
                durability: Durability::Default,
                duplicate: false,
                header: header.map(|header| &header[..]),
                payload: Payload::Shared(payload.clone()),
            },
        )?;
        self.flush(&mut topic);
        Ok(())
    }

    /// Checks the durability that a publisher demands of an acknowledgement.
    ///
    /// # Errors
    /// It demands more than the broker has.
    pub fn check_durability(&self, demanded: Durability) -> Result<(), Status> {
        let has = match demanded {
            Durability::Default | Durability::Memory => true,
            Durability::Disk => self.fabric.store.is_some(),
            Durability::Replicated => false,
        };
        if has {
            return Ok(());
        }
        Err(Status::new(
            Code::FailedPrecondition,
            match &self.fabric.store {
                Some(_) => "this broker keeps messages on its own disk only: demand disk or less",
                None => "this broker has no store: demand memory or nothing",
            },
        ))
    }

    /// Durability that is reached without waiting, or `None` when an acknowledgement has to wait
    /// for [`Self::synced`]. `demanded` is what [`Topic::durability`] says.
    pub fn reached(&self, demanded: Durability, outcome: Outcome) -> Option<Durability> {
        match demanded {
            // What was put in no kept queue has nothing to be lost, but the demand is an order.
            Durability::Disk | Durability::Replicated => None,
            Durability::Default if outcome.stored && !outcome.given_up => None,
            Durability::Default | Durability::Memory => Some(Durability::Memory),
        }
    }

    /// Resolves when everything published so far is on disk; `None` without a store.
    pub fn synced(&self) -> Option<Synced> {
        self.fabric.store.as_ref().map(Store::sync)
    }

    /// Counts messages acknowledged to the publisher.
    pub fn count_acknowledged(&self, count: u64) {
        self.fabric.metrics.acknowledged.inc_by(count);
    }

    /// Publishes a message that cannot be packed with others: it is large, has a header, is to be
    /// retained, goes to a share group, or somebody has to be asked for room first. `failing` says
    /// that the store cannot keep it.
    #[inline(never)]
    fn publish_alone(
        &self,
        topic: &mut Topic,
        message: &Incoming<'_>,
        failing: Option<&Status>,
    ) -> Result<(), Status> {
        // What came before stays before.
        self.flush(topic);
        let now = clock::now();
        let facts = HeaderFacts::read(message.header, now)
            .map_err(|error| Status::new(Code::InvalidArgument, error.to_string()))?;
        let id = &facts.message_id;
        if id.len() > MAX_MESSAGE_ID {
            return Err(Status::new(
                Code::InvalidArgument,
                format!(
                    "message id of {} bytes: expected at most {MAX_MESSAGE_ID}",
                    id.len()
                ),
            ));
        }
        if facts.is_dated {
            return Err(Status::new(
                Code::InvalidArgument,
                "a header with published_ms: expected none, since that is the broker's to set",
            ));
        }
        let batch = Arc::new(alone(topic, message, facts.expires));
        let outlives = message.retain || topic.history.is_some();
        if !id.is_empty()
            && let Some(first) = self.tenant.dedup.find(&self.identity, id, now)
        {
            self.taken_before(topic, &batch, first);
            return Ok(());
        }
        if let Some(status) = failing.filter(|_| outlives) {
            return Err(status.clone());
        }
        let on_disk = message.durability == Durability::Disk;
        let ask = topic.route.may_refuse
            || failing.is_some()
            || (on_disk && batch.qos != Qos::AtMostOnce);
        let plan = if ask {
            Some(self.plan(topic, &batch, on_disk, failing)?)
        } else {
            None
        };
        if id.is_empty() {
            return self.retain_and_hand_out(topic, message, &batch, plan);
        }
        let mut plan = Some(plan);
        let keep = batch.qos != Qos::AtMostOnce;
        let first = self.tenant.dedup.once(&self.identity, id, keep, now, || {
            let plan = plan.take().flatten();
            let others = std::mem::take(&mut topic.outcome.given_up);
            let result = self.retain_and_hand_out(topic, message, &batch, plan);
            let whole = !topic.outcome.given_up;
            topic.outcome.given_up |= others;
            result.map(|()| Taken { whole })
        })?;
        if let Some(first) = first {
            // The same id on another connection of the publisher was quicker.
            if let Some(plan) = plan.flatten() {
                plan.release();
            }
            self.taken_before(topic, &batch, first);
        }
        Ok(())
    }

    /// Retains a message if it is to be, and hands it out.
    fn retain_and_hand_out(
        &self,
        topic: &mut Topic,
        message: &Incoming<'_>,
        batch: &Arc<Batch>,
        plan: Option<Plan>,
    ) -> Result<(), Status> {
        if message.retain {
            let clear = message.payload.as_slice().is_empty();
            if let Err(status) = self.retain(batch, clear) {
                if let Some(plan) = plan {
                    plan.release();
                }
                return Err(status);
            }
            topic.outcome.stored |= self.fabric.store.is_some();
        }
        self.hand_out(topic, batch, plan);
        Ok(())
    }

    /// Notes a message that was taken before: it goes nowhere, and its acknowledgement waits until
    /// the first one is kept, and claims no more than that of the first.
    #[cold]
    fn taken_before(&self, topic: &mut Topic, batch: &Batch, first: Taken) {
        topic.outcome.stored |= self.fabric.store.is_some();
        topic.outcome.given_up |= !first.whole;
        self.tenant
            .losses
            .lose(Reason::Duplicate, None, batch, batch.count);
    }

    fn retain(&self, batch: &Batch, clear: bool) -> Result<(), Status> {
        if clear {
            if self.tenant.retained.clear(&batch.flow.topic) {
                self.fabric.metrics.retained.dec();
                self.tenant.store_retained(&batch.flow.topic, None);
            }
            return Ok(());
        }
        let kept = Arc::new(batch.with_flags(batch.qos, true));
        match self.tenant.retained.set(Arc::clone(&kept)) {
            Ok(grown) => {
                self.fabric.metrics.retained.inc_by(grown);
                self.tenant.store_retained(&batch.flow.topic, Some(&kept));
                Ok(())
            }
            Err(full) => Err(Status::new(Code::ResourceExhausted, full.to_string())),
        }
    }

    /// Asks every receiver for room.
    ///
    /// # Errors
    /// One has none: no room is held then.
    fn plan(
        &self,
        topic: &Topic,
        batch: &Arc<Batch>,
        on_disk: bool,
        failing: Option<&Status>,
    ) -> Result<Plan, Status> {
        let mut plan = Plan::default();
        let mut refusal = None;
        let targets = topic
            .route
            .targets
            .iter()
            .map(|target| (Arc::clone(&target.subscriber), target.max_qos, None));
        let mut members = Vec::new();
        for group in &topic.route.groups {
            match group.choose(&topic.flow.topic, self.session, batch.class, batch.qos) {
                Choice::Member(member) => {
                    let max_qos = member.max_qos;
                    members.push((member, max_qos, None));
                }
                Choice::Waits(member) => {
                    let max_qos = member.max_qos;
                    members.push((member, max_qos, Some(Arc::clone(group))));
                }
                Choice::Nobody if on_disk || group.refuses() => {
                    refusal = Some(full("no member of a share group has room"));
                }
                Choice::Nobody => plan.nobody = true,
            }
        }
        for (receiver, max_qos, waits) in targets.chain(members) {
            let batch = Arc::clone(batch).at_most(max_qos);
            // A store that fails keeps nothing, so whoever is kept there cannot be served.
            let reserved =
                receiver.queues[batch.class.index()].reserve(&batch, on_disk || failing.is_some());
            match (reserved, failing) {
                (Reserved::Held, None) | (Reserved::NotNeeded, _) => {}
                (Reserved::Full, None) => {
                    refusal.get_or_insert_with(|| full("the queue of a receiver is full"));
                    continue;
                }
                (Reserved::Held | Reserved::Full, Some(status)) => {
                    refusal.get_or_insert_with(|| status.clone());
                }
            }
            plan.receivers.push(Planned {
                receiver,
                batch,
                reserved: reserved == Reserved::Held,
                waits,
            });
        }
        match refusal {
            None => Ok(plan),
            Some(status) => {
                plan.release();
                Err(status)
            }
        }
    }

    /// Hands a batch to its receivers, and to the history if the topic has one.
    fn hand_out(&self, topic: &mut Topic, batch: &Arc<Batch>, plan: Option<Plan>) {
        let metrics = &self.fabric.metrics;
        metrics.messages_in.inc_by(batch.count.into());
        metrics
            .bytes_in
            .inc_by((batch.frames.len() + batch.payload.len()) as u64);
        let bytes = (batch.frames.len() + batch.payload.len()) as u64;
        self.usage.count_received(batch.count.into(), bytes);
        match topic.history.clone() {
            None => self.deliver(topic, batch, plan),
            Some(history) => {
                let stored = history.publish(batch, SystemTime::now(), || {
                    // A subscription that begins with a replay has either seen this message in the
                    // history, or is in the route by now.
                    self.refresh(topic);
                    let late = plan
                        .as_ref()
                        .map(|plan| unplanned(&topic.route, batch, &plan.receivers));
                    self.deliver(topic, batch, plan);
                    for (receiver, batch) in late.into_iter().flatten() {
                        let pushed = receiver.queues[batch.class.index()].push(&batch);
                        note(&mut topic.outcome, &receiver, pushed);
                    }
                    topic.route.generation
                });
                topic.outcome.stored |= stored && batch.qos != Qos::AtMostOnce;
            }
        }
    }

    #[inline]
    fn deliver(&self, topic: &mut Topic, batch: &Arc<Batch>, plan: Option<Plan>) {
        if let Some(plan) = plan {
            if plan.nobody {
                self.lose_for_nobody(&mut topic.outcome, batch);
            }
            for planned in plan.receivers {
                let queue = &planned.receiver.queues[planned.batch.class.index()];
                let pushed = if planned.reserved {
                    queue.push_reserved(&planned.batch)
                } else {
                    queue.push(&planned.batch)
                };
                note(&mut topic.outcome, &planned.receiver, pushed);
                if let Some(group) = planned.waits {
                    group.settle();
                }
            }
            return;
        }
        // The same messages at QoS 0 and 1, made when the first receiver wants them.
        let mut downgraded: [Option<Arc<Batch>>; 2] = [None, None];
        for target in &topic.route.targets {
            let batch = if target.max_qos >= batch.qos {
                batch
            } else {
                downgraded[usize::from(target.max_qos == Qos::AtLeastOnce)]
                    .get_or_insert_with(|| Arc::new(batch.with_flags(target.max_qos, false)))
            };
            let pushed = target.subscriber.queues[batch.class.index()].push(batch);
            note(&mut topic.outcome, &target.subscriber, pushed);
        }
        if topic.route.groups.is_empty() {
            return;
        }
        if batch.count == 1 {
            self.deliver_to_groups(topic, batch);
        } else {
            // Filled before the first group subscribed: each message has its own receiver.
            for single in batch.singles() {
                self.deliver_to_groups(topic, &Arc::new(single));
            }
        }
    }

    fn deliver_to_groups(&self, topic: &mut Topic, batch: &Arc<Batch>) {
        for group in &topic.route.groups {
            match group.choose(&topic.flow.topic, self.session, batch.class, batch.qos) {
                Choice::Member(member) => {
                    let batch = Arc::clone(batch).at_most(member.max_qos);
                    let pushed = member.queues[batch.class.index()].push(&batch);
                    note(&mut topic.outcome, &member, pushed);
                }
                Choice::Waits(member) => {
                    let batch = Arc::clone(batch).at_most(member.max_qos);
                    let pushed = member.queues[batch.class.index()].push(&batch);
                    note(&mut topic.outcome, &member, pushed);
                    // Somebody may have come while it was put there.
                    group.settle();
                }
                Choice::Nobody => self.lose_for_nobody(&mut topic.outcome, batch),
            }
        }
    }

    /// A share group has nobody for a message, and nobody keeps it.
    #[cold]
    fn lose_for_nobody(&self, outcome: &mut Outcome, batch: &Batch) {
        outcome.given_up |= batch.qos != Qos::AtMostOnce;
        let losses = &self.tenant.losses;
        losses.lose(Reason::NoMember, None, batch, batch.count);
    }
}

/// Who has come since the others were asked for room, with the batch as they take it.
fn unplanned(
    route: &Route,
    batch: &Arc<Batch>,
    plan: &[Planned],
) -> Vec<(Arc<Subscriber>, Arc<Batch>)> {
    let class = batch.class.index();
    let is_planned = |receiver: &Subscriber| {
        plan.iter()
            .any(|planned| Arc::ptr_eq(&planned.receiver.queues[class], &receiver.queues[class]))
    };
    let late = route
        .targets
        .iter()
        .filter(|target| !is_planned(&target.subscriber));
    late.map(|target| {
        let batch = Arc::clone(batch).at_most(target.max_qos);
        (Arc::clone(&target.subscriber), batch)
    })
    .collect()
}

/// Notes what became of a batch in a receiver's queue.
#[inline]
fn note(outcome: &mut Outcome, receiver: &Subscriber, pushed: Pushed) {
    match pushed {
        Pushed::Queued { stored } => outcome.stored |= stored,
        Pushed::Lost { kept } => outcome.given_up |= kept,
        Pushed::Disconnect => {
            outcome.given_up = true;
            if let Some(session) = receiver.session.upgrade() {
                session.kick(Status::new(
                    Code::ResourceExhausted,
                    "the queue of a subscription that disconnects on overflow is full",
                ));
            }
        }
    }
}

fn full(what: &str) -> Status {
    Status::new(
        Code::ResourceExhausted,
        format!("{what}: try again when it has caught up"),
    )
    .retry_after(Duration::from_millis(100))
}

/// What a publisher is told of a store that fails, for messages that would have to be kept.
///
/// # Errors
/// The store is only behind: then nothing is taken at QoS 1 until it has caught up.
fn refusal(error: &StoreError) -> Result<Status, Status> {
    let status = Status::new(Code::ResourceExhausted, error.to_string());
    match error {
        StoreError::Behind => Err(status.retry_after(Duration::from_millis(100))),
        StoreError::Failed(_) => Ok(status.retry_after(Duration::from_secs(1))),
    }
}

/// The batch of a message that is alone.
fn alone(topic: &Topic, message: &Incoming<'_>, expires: Option<Instant>) -> Batch {
    let qos = message.qos;
    let flags = Flags::new(qos).with_duplicate(message.duplicate);
    let payload = message.payload.as_slice();
    let mut frames = BytesMut::new();
    let (frames, apart) = match &message.payload {
        Payload::Shared(shared) if payload.len() >= LARGE => {
            lane::put_message_head(
                &mut frames,
                flags,
                topic.flow.id,
                message.header,
                payload.len(),
            );
            (frames.freeze(), shared.clone())
        }
        _ => {
            lane::put_message(&mut frames, flags, topic.flow.id, message.header, payload);
            (frames.freeze(), Bytes::new())
        }
    };
    Batch {
        flow: Arc::clone(&topic.flow),
        class: topic.class,
        qos,
        retain: false,
        retain_as_published: message.retain,
        count: 1,
        frames,
        payload: apart,
        expires,
    }
}
