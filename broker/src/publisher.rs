//! The way in: from a publisher's message to the queues of everyone who wants it.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::message::{Class, Durability, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;

use crate::batch::{Batch, Flow, expiry_of};
use crate::clock;
use crate::fabric::Fabric;
use crate::policy::{Decision, LivePolicy, Verb};
use crate::queue::Pushed;
use crate::router::Route;
use crate::session::{Session, Subscriber};
use crate::store::{Store, StoreError, Synced};
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
    /// Something of it went to the store since [`Topic::take_stored`].
    stored: bool,
}

/// One message on its way in.
#[derive(Debug, Clone)]
pub struct Incoming<'a> {
    /// Quality of service it was published with; 2 is delivered as 1 to native receivers.
    pub qos: Qos,
    /// Keep it as the topic's retained message.
    pub retain: bool,
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

    /// Whether something that was published since the last call went to the store, so that an
    /// acknowledgement has to wait for it.
    pub fn take_stored(&mut self) -> bool {
        std::mem::take(&mut self.stored)
    }
}

impl Publisher {
    /// The publisher of a session, with the policy as it is now.
    pub fn new(fabric: &Arc<Fabric>, tenant: Arc<Tenant>, session: &Session) -> Self {
        let identity = session.key.identity.clone();
        Self {
            policy: LivePolicy::new(fabric, &identity),
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
            flow,
            denial,
            decided,
            class,
            pending: BytesMut::new(),
            pending_count: 0,
            pending_qos: Qos::AtMostOnce,
            stored: false,
        }
    }

    /// Takes one message. It reaches the receivers with the next [`Self::flush`] at the latest.
    ///
    /// # Errors
    /// Policy denies the topic, the retained messages are full, or the header does not decode.
    #[inline]
    pub fn publish(&self, topic: &mut Topic, message: &Incoming<'_>) -> Result<(), Status> {
        if topic.decided != self.fabric.policy_generation() {
            (topic.decided, topic.denial) = self.decide(&topic.flow.topic);
        }
        if let Some(denial) = &topic.denial {
            self.fabric.metrics.deny("publish");
            return Err(denial.clone());
        }
        if message.qos != Qos::AtMostOnce
            && let Some(store) = &self.fabric.store
            && let Err(error) = store.check()
        {
            let retry_after = match error {
                StoreError::Behind => Duration::from_millis(100),
                StoreError::Failed(_) => Duration::from_secs(1),
            };
            return Err(
                Status::new(Code::ResourceExhausted, error.to_string()).retry_after(retry_after)
            );
        }
        let payload = message.payload.as_slice();
        let simple = message.header.is_none() && !message.retain && payload.len() < LARGE;
        if !simple || !topic.route.groups.is_empty() {
            return self.publish_alone(topic, message);
        }
        let qos = message.qos.min(Qos::AtLeastOnce);
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

    /// The denial of a topic, if there is one, and the generation of the policy that says so.
    fn decide(&self, topic: &TopicName) -> (u64, Option<Status>) {
        // The generation first: if the policy is replaced in between, it is asked once more.
        let generation = self.fabric.policy_generation();
        let denial = match self.policy.now().decide(Verb::Publish, topic) {
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
        let batch = Batch {
            flow: Arc::clone(&topic.flow),
            class: topic.class,
            qos: topic.pending_qos,
            retain: false,
            retain_as_published: false,
            count: std::mem::take(&mut topic.pending_count),
            frames: topic.pending.split().freeze(),
            payload: Bytes::new(),
            expires: None,
        };
        self.dispatch(topic, batch);
    }

    /// Publishes one message to a topic that is not worth keeping open.
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
        self.publish(
            &mut topic,
            &Incoming {
                qos,
                retain,
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
    /// for [`Self::synced`]. `stored` says whether anything went to the store.
    pub fn reached(&self, demanded: Durability, stored: bool) -> Option<Durability> {
        match demanded {
            // What was put in no kept queue has nothing to be lost, but the demand is an order.
            Durability::Disk | Durability::Replicated => None,
            Durability::Default if stored && self.fabric.sync_by_default => None,
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
    /// retained, or goes to a share group.
    #[inline(never)]
    fn publish_alone(&self, topic: &mut Topic, message: &Incoming<'_>) -> Result<(), Status> {
        // What came before stays before.
        self.flush(topic);
        let expires = expiry_of(message.header, clock::now())
            .map_err(|error| Status::new(Code::InvalidArgument, error.to_string()))?;
        let qos = message.qos.min(Qos::AtLeastOnce);
        let payload = message.payload.as_slice();
        let mut frames = BytesMut::new();
        let (frames, apart) = match &message.payload {
            Payload::Shared(shared) if payload.len() >= LARGE => {
                lane::put_message_head(
                    &mut frames,
                    Flags::new(qos),
                    topic.flow.id,
                    message.header,
                    payload.len(),
                );
                (frames.freeze(), shared.clone())
            }
            _ => {
                lane::put_message(
                    &mut frames,
                    Flags::new(qos),
                    topic.flow.id,
                    message.header,
                    payload,
                );
                (frames.freeze(), Bytes::new())
            }
        };
        let batch = Batch {
            flow: Arc::clone(&topic.flow),
            class: topic.class,
            qos,
            retain: false,
            retain_as_published: message.retain,
            count: 1,
            frames,
            payload: apart,
            expires,
        };
        if message.retain {
            self.retain(&batch, payload.is_empty())?;
            topic.stored |= self.fabric.store.is_some();
        }
        self.dispatch(topic, batch);
        Ok(())
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

    fn dispatch(&self, topic: &mut Topic, batch: Batch) {
        let router = &self.tenant.router;
        if topic.route.generation != router.generation() {
            topic.route = router.route(&topic.flow.topic, self.session);
        }
        let metrics = &self.fabric.metrics;
        metrics.messages_in.inc_by(batch.count.into());
        metrics
            .bytes_in
            .inc_by((batch.frames.len() + batch.payload.len()) as u64);
        let batch = Arc::new(batch);
        // The same messages at QoS 0, made when the first receiver wants them.
        let mut downgraded: Option<Arc<Batch>> = None;
        let mut for_qos = |max: Qos| -> Arc<Batch> {
            if max >= batch.qos {
                Arc::clone(&batch)
            } else {
                Arc::clone(downgraded.get_or_insert_with(|| Arc::new(batch.with_flags(max, false))))
            }
        };
        let mut stored = false;
        for target in &topic.route.targets {
            stored |= self.push(&target.subscriber, &for_qos(target.max_qos));
        }
        for group in &topic.route.groups {
            if batch.count == 1 {
                if let Some(member) = group.choose(&topic.flow.topic, self.session) {
                    stored |= self.push(&member, &for_qos(member.max_qos));
                }
                continue;
            }
            // Filled before the first group subscribed: each message has its own receiver.
            for message in batch.messages() {
                let Some(member) = group.choose(&topic.flow.topic, self.session) else {
                    continue;
                };
                let qos = batch.qos.min(member.max_qos);
                let mut frames = BytesMut::new();
                lane::put_message(
                    &mut frames,
                    Flags::new(qos),
                    batch.flow.id,
                    message.header.as_deref(),
                    &message.payload,
                );
                let single = Batch {
                    flow: Arc::clone(&batch.flow),
                    qos,
                    count: 1,
                    frames: frames.freeze(),
                    payload: Bytes::new(),
                    ..*batch
                };
                stored |= self.push(&member, &Arc::new(single));
            }
        }
        topic.stored |= stored;
    }

    /// Puts a batch into a receiver's queue; whether it also goes to the store.
    #[inline]
    fn push(&self, subscriber: &Subscriber, batch: &Arc<Batch>) -> bool {
        let metrics = &self.fabric.metrics;
        match subscriber.queues[batch.class.index()].push(batch) {
            Pushed::Queued { dropped, stored } => {
                if dropped > 0 {
                    metrics.dropped_overflow.inc_by(dropped.into());
                }
                return stored;
            }
            Pushed::Full => {
                metrics.dropped_overflow.inc_by(batch.count.into());
            }
            Pushed::Offline => {
                metrics.dropped_offline.inc_by(batch.count.into());
            }
            Pushed::Disconnect => {
                metrics.dropped_overflow.inc_by(batch.count.into());
                if let Some(session) = subscriber.session.upgrade() {
                    session.kick(Status::new(
                        Code::ResourceExhausted,
                        "the queue of a subscription that disconnects on overflow is full",
                    ));
                }
            }
            Pushed::Closed => {
                metrics.dropped_session_ended.inc_by(batch.count.into());
            }
        }
        false
    }
}
