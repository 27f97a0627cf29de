//! One tenant: its sessions, subscriptions, retained messages, services and models.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use dashmap::DashMap;
use selvedge_certs::Identity;
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::{SubscribeTarget, TopicFilter, TopicName};

use crate::backlog::Backlog;
use crate::batch::{Batch, Flow, FlowIds};
use crate::clock;
use crate::config::Limits;
use crate::dedup::Dedup;
use crate::explain::Explain;
use crate::fabric::Fabric;
use crate::history::{History, HistoryRule, Replay, ReplayRequest};
use crate::losses::Losses;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::policy::{Decision, FilterDecision, IdentityPolicy, Verb};
use crate::publisher::Publisher;
use crate::queue::Overflow;
use crate::quota::{ConnectionHold, Usages};
use crate::retained::{Retained, RetainedBacklog};
use crate::router::Router;
use crate::services::Services;
use crate::session::{
    Admission, ConnectionEnd, Detached, Kick, Session, SessionKey, SessionOptions, Subscriber, Will,
};
use crate::store::{Change, Store};

/// Everything that one tenant has on this broker. No name in it reaches another tenant.
#[derive(Debug)]
pub struct Tenant {
    /// From the certificates of its members.
    pub name: Arc<str>,
    /// Subscriptions.
    pub router: Router,
    /// Retained messages.
    pub retained: Arc<Retained>,
    /// Messages of topics that keep history.
    pub history: History,
    /// Message ids seen.
    pub dedup: Dedup,
    /// What went no further.
    pub explain: Arc<Explain>,
    /// Takes note of what goes no further.
    pub losses: Losses,
    /// What its identities use.
    pub usages: Usages,
    /// Who answers calls.
    pub services: Services,
    /// Who runs models.
    pub models: Models,
    limits: Limits,
    metrics: Arc<Metrics>,
    store: Option<Store>,
    sessions: DashMap<SessionKey, Arc<Session>>,
    flow_ids: Arc<FlowIds>,
}

/// What a client asks for when it connects.
#[derive(Debug)]
pub struct Connect {
    /// Whose session.
    pub key: SessionKey,
    /// Start empty even if a session is kept.
    pub clean_start: bool,
    /// How long to keep the session without a connection.
    pub expiry: Duration,
    /// Published when the connection is lost.
    pub will: Option<Will>,
}

/// A connection's hold on its session.
#[derive(Debug)]
pub struct Attachment {
    /// The session.
    pub session: Arc<Session>,
    /// Number of this connection within the session.
    pub epoch: u64,
    /// The session was kept: its subscriptions are in place.
    pub present: bool,
    /// Fires when the connection must end.
    pub kick: Kick,
    /// Counts the connection until it is taken over or detached.
    _hold: Arc<ConnectionHold>,
}

/// What a subscription asks for.
#[derive(Debug, Clone)]
pub struct SubscribeRequest {
    /// Unique within the session; an existing subscription of this id is replaced.
    pub id: u32,
    /// Filter and share group.
    pub target: SubscribeTarget,
    /// Highest quality of service wanted.
    pub max_qos: Qos,
    /// See [`Subscriber::no_local`].
    pub no_local: bool,
    /// See [`Subscriber::retain_as_published`].
    pub retain_as_published: bool,
    /// See [`Subscriber::identifier`].
    pub identifier: Option<u32>,
    /// Lanes of its own; a share group always has them.
    pub own_lane: bool,
    /// What a full queue does; only lanes of its own can differ from the default.
    pub overflow: Overflow,
    /// When to send retained messages.
    pub retain: RetainDelivery,
    /// Part of the history to send first; only lanes of its own can have one.
    pub replay: Option<Replay>,
    /// See [`Subscriber::datagrams`]; only lanes of its own can have it.
    pub datagrams: bool,
}

/// When a subscription is sent the retained messages (MQTT 5.0 section 3.8.3.1, Retain Handling).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetainDelivery {
    /// Always.
    #[default]
    Send,
    /// When the subscription is new.
    IfNew,
    /// Never.
    Never,
}

impl Tenant {
    pub(crate) fn new(
        name: Arc<str>,
        limits: Limits,
        metrics: Arc<Metrics>,
        store: Option<Store>,
        history: &[HistoryRule],
    ) -> Self {
        let explain = Arc::<Explain>::default();
        Self {
            router: Router::default(),
            retained: Arc::new(Retained::new(
                limits.retained_messages,
                limits.retained_bytes,
            )),
            history: History::new(
                history,
                Arc::clone(&name),
                store.clone(),
                Arc::clone(&metrics),
            ),
            dedup: Dedup::new(
                Arc::clone(&name),
                limits.dedup_window,
                limits.dedup_ids,
                store.clone(),
            ),
            losses: Losses::new(Arc::clone(&metrics), Arc::clone(&explain)),
            explain,
            usages: Usages::new(Arc::clone(&name), &limits, &metrics),
            name,
            services: Services::default(),
            models: Models::new(metrics.waiting_inferences.clone()),
            limits,
            metrics,
            store,
            sessions: DashMap::new(),
            flow_ids: Arc::default(),
        }
    }

    /// Connects to a session: the one kept under this identity and name, or a new one. A
    /// connection that holds it is told to go, and leaves its place among the identity's connections
    /// to the new one.
    ///
    /// # Errors
    /// The identity or the tenant has as many connections as it may.
    pub fn attach(
        self: &Arc<Self>,
        fabric: &Arc<Fabric>,
        connect: &Connect,
    ) -> Result<Attachment, Status> {
        let usage = self.usages.of(&connect.key.identity);
        if let Some(will) = &connect.will {
            let (found, most) = (will.size(), usage.message_bytes());
            if found > most {
                return Err(Status::new(
                    Code::InvalidArgument,
                    format!("a will of {found} bytes: expected at most {most}"),
                ));
            }
        }
        let _turn = usage.attaching();
        let held = self.sessions.get(&connect.key);
        let hold = match held.and_then(|session| session.take_hold()) {
            Some(hold) => hold,
            None => usage.connect()?,
        };
        let hold = Arc::new(hold);
        let kick = Kick::default();
        let now = clock::now();
        if connect.clean_start {
            self.end_session(&connect.key, "a new connection asked for a clean start");
        }
        let mut present = true;
        let (session, epoch, previous, will) = loop {
            let session = Arc::clone(&self.sessions.entry(connect.key.clone()).or_insert_with(
                || {
                    present = false;
                    self.metrics.sessions.inc();
                    Session::new(SessionOptions {
                        id: fabric.session_id(),
                        key: connect.key.clone(),
                        queue_limit: self.limits.queue_bytes,
                        losses: self.losses.clone(),
                        usage: Arc::clone(&usage),
                        store: self.store.clone(),
                    })
                },
            ));
            if present && session.is_expired(now) {
                self.remove_session(&session);
                continue;
            }
            let (epoch, previous, will) = session.attach(
                kick.clone(),
                Arc::downgrade(&hold),
                connect.expiry,
                connect.will.clone(),
            );
            // It may have expired between look-up and attach.
            if self
                .sessions
                .get(&connect.key)
                .is_some_and(|held| held.id == session.id)
            {
                break (session, epoch, previous, will);
            }
            present = true;
        };
        if let Some(previous) = previous {
            previous.kick(Status::new(
                Code::Aborted,
                "the session was taken over by another connection of the same identity",
            ));
        }
        if let Some(will) = will {
            self.publish_will(fabric, &session, &will);
        }
        Ok(Attachment {
            session,
            epoch,
            present,
            kick,
            _hold: hold,
        })
    }

    /// Ends a connection's hold on its session, publishes the will and forgets a session that is
    /// not kept.
    pub fn detach(
        self: &Arc<Self>,
        fabric: &Arc<Fabric>,
        attachment: &Attachment,
        end: ConnectionEnd,
    ) {
        let session = &attachment.session;
        let Detached::Held { expiry, will } = session.detach(attachment.epoch, end, clock::now())
        else {
            return;
        };
        if expiry.is_zero() {
            self.remove_session(session);
        }
        let Some(will) = will else {
            return;
        };
        // MQTT 5.0 section 3.1.3.2.2: at the end of the delay or of the session, whichever is first.
        let delay = will.delay.min(expiry);
        self.publish_will_after(fabric, session, attachment.epoch, will, delay);
    }

    /// Publishes the will of a session after a delay, unless a connection after the `epoch`-th has the
    /// session by then.
    pub(crate) fn publish_will_after(
        self: &Arc<Self>,
        fabric: &Arc<Fabric>,
        session: &Arc<Session>,
        epoch: u64,
        will: Will,
        delay: Duration,
    ) {
        let (tenant, fabric) = (Arc::clone(self), Arc::clone(fabric));
        let session = Arc::clone(session);
        if delay.is_zero() {
            tenant.publish_kept_will(&fabric, &session, &will);
        } else {
            let tasks = fabric.tasks.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = fabric.shutdown.cancelled() => return,
                }
                if session.epoch() == epoch {
                    tenant.publish_kept_will(&fabric, &session, &will);
                }
            });
        }
    }

    fn publish_kept_will(
        self: &Arc<Self>,
        fabric: &Arc<Fabric>,
        session: &Arc<Session>,
        will: &Will,
    ) {
        // It is published and forgotten in one commit.
        let _together = self.store.as_ref().map(Store::together);
        self.publish_will(fabric, session, will);
        if let Some(store) = &self.store {
            store.put(Change::RemoveWill(session.id));
        }
    }

    fn publish_will(self: &Arc<Self>, fabric: &Arc<Fabric>, session: &Arc<Session>, will: &Will) {
        let publisher = Publisher::new(fabric, Arc::clone(self), session);
        let published = publisher.publish_one(
            &will.topic,
            Class::Normal,
            will.qos,
            will.retain,
            will.header.as_ref(),
            &will.payload,
        );
        if let Err(status) = published {
            tracing::debug!(identity = %session.key.identity, %status, "the will was refused");
        }
    }

    /// Adds a subscription to a session.
    ///
    /// # Errors
    /// Policy denies it, or the session has as many subscriptions as it may.
    pub fn subscribe(
        &self,
        session: &Arc<Session>,
        policy: &IdentityPolicy,
        request: SubscribeRequest,
    ) -> Result<(), Status> {
        let filter = request.target.filter.clone();
        self.try_subscribe(session, policy, request, Admission::Limited)
            .inspect_err(|status| self.subscription_refused(session, &filter, status))
    }

    /// Remembers a subscription that was refused, for `selvedge explain`.
    fn subscription_refused(&self, session: &Session, filter: &TopicFilter, status: &Status) {
        let client = &session.key.identity;
        let explain = &self.explain;
        explain.request_refused(client, Verb::Subscribe, filter.as_str(), status);
    }

    fn try_subscribe(
        &self,
        session: &Arc<Session>,
        policy: &IdentityPolicy,
        request: SubscribeRequest,
        admission: Admission,
    ) -> Result<(), Status> {
        let residual = match policy.decide_filter(&request.target.filter) {
            FilterDecision::Allowed { residual, .. } => residual,
            FilterDecision::Denied(denial) => {
                self.metrics.deny("subscribe");
                return Err(denial.into());
            }
        };
        if let Some(status) = self.cannot_replay(&request) {
            return Err(status);
        }
        let previous = session.subscription(request.id);
        if previous.is_none()
            && admission == Admission::Limited
            && session.subscription_count() >= self.limits.subscriptions_per_session
        {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!(
                    "the session has {} subscriptions, the most it may",
                    self.limits.subscriptions_per_session
                ),
            ));
        }
        let shared = request.target.share.is_some();
        let replay = request.replay;
        let own_lane = request.own_lane || shared || replay.is_some() || request.datagrams;
        let reuse = previous.as_ref().filter(|previous| {
            previous.own_lane == own_lane && previous.target == request.target && replay.is_none()
        });
        let subscriber = Arc::new(Subscriber {
            id: request.id,
            session_id: session.id,
            max_qos: request.max_qos,
            no_local: request.no_local,
            retain_as_published: request.retain_as_published,
            identifier: request.identifier,
            residual,
            own_lane,
            overflow: request.overflow,
            queues: match reuse {
                Some(previous) => previous.queues.clone(),
                None => {
                    session.queues_for(request.id, own_lane, request.overflow, replay.is_some())
                }
            },
            datagrams: request.datagrams,
            session: Arc::downgrade(session),
            group: OnceLock::new(),
            target: request.target,
        });
        let is_new = reuse.is_none();
        let since = match session.insert(Arc::clone(&subscriber), admission)? {
            Some(previous) => {
                let since = self.router.replace(&previous, Arc::clone(&subscriber));
                if is_new {
                    previous.close();
                }
                since
            }
            None => {
                self.metrics.subscriptions.inc();
                self.router.insert(Arc::clone(&subscriber))
            }
        };
        let held = session.subscription(subscriber.id);
        if held.is_none_or(|held| !Arc::ptr_eq(&held, &subscriber)) {
            // What ended it in between did not find it in the router yet.
            self.router.remove(&subscriber);
            return Err(Status::new(Code::Aborted, "the subscription has ended"));
        }
        if let Some(replay) = replay {
            self.deliver_history(&subscriber, &replay, since);
        }
        if let Some(group) = subscriber.group() {
            group.hand_on();
        }
        // MQTT 5.0 section 4.8.2: retained messages are not sent to a shared subscription. A replay
        // has them already.
        let send = match request.retain {
            RetainDelivery::Send => true,
            RetainDelivery::IfNew => is_new,
            RetainDelivery::Never => false,
        } && subscriber.target.share.is_none()
            && replay.is_none();
        if send {
            self.deliver_retained(&subscriber);
        }
        Ok(())
    }

    /// Decides again about every subscription and registration. Returns how many ended.
    pub(crate) fn apply_policy(&self, policy_for: impl Fn(&Identity) -> IdentityPolicy) -> usize {
        let mut ended = 0;
        for session in self.sessions() {
            let identity = &session.key.identity;
            let policy = policy_for(identity);
            for subscriber in session.subscriptions() {
                let residual = match policy.decide_filter(&subscriber.target.filter) {
                    FilterDecision::Allowed { residual, .. } if residual == subscriber.residual => {
                        continue;
                    }
                    FilterDecision::Allowed { residual, .. } => residual,
                    FilterDecision::Denied(denial) => {
                        tracing::warn!(%identity, %denial, "a subscription ends with the new policy");
                        let (filter, status) = (&subscriber.target.filter, denial.into());
                        let explain = &self.explain;
                        explain.request_refused(
                            identity,
                            Verb::Subscribe,
                            filter.as_str(),
                            &status,
                        );
                        self.unsubscribe(&session, subscriber.id);
                        ended += 1;
                        continue;
                    }
                };
                let changed = Arc::new(subscriber.with_residual(residual));
                if session.replace(&subscriber, Arc::clone(&changed)) {
                    self.router.replace(&subscriber, changed);
                }
            }
        }
        let may = |verb: Verb| {
            let policy_for = &policy_for;
            move |identity: &Identity, name: &TopicName| match policy_for(identity)
                .decide(verb, name)
            {
                Decision::Allowed { .. } => true,
                Decision::Denied(denial) => {
                    let explain = &self.explain;
                    explain.request_refused(identity, verb, name.as_str(), &denial.into());
                    false
                }
            }
        };
        ended + self.services.retain(may(Verb::Serve)) + self.models.retain(may(Verb::Work))
    }

    /// Takes a subscription off a session; `false` when there is none of this id.
    pub fn unsubscribe(&self, session: &Session, id: u32) -> bool {
        let Some(subscriber) = session.subscription(id) else {
            return false;
        };
        // Out of the router first, so that nothing comes any more; then what a member of a share
        // group has not acknowledged goes to the others, while it is still in the store.
        self.router.remove(&subscriber);
        if let Some(group) = subscriber.group() {
            group.take_over(&subscriber);
        }
        let removed = session.remove(id).is_some();
        subscriber.close();
        if removed {
            self.metrics.subscriptions.dec();
        }
        removed
    }

    /// Remembers a refusal for `selvedge explain`.
    pub(crate) fn refused(&self, client: &Identity, status: &Status) {
        self.explain.refused(client, None, None, status);
    }

    /// Takes in a session that was kept, with its subscriptions in place.
    pub(crate) fn restore_session(&self, session: &Arc<Session>) {
        self.metrics.sessions.inc();
        self.sessions
            .insert(session.key.clone(), Arc::clone(session));
    }

    /// Puts a kept subscription in place, as policy allows it now.
    ///
    /// # Errors
    /// Policy denies it by now.
    pub(crate) fn restore_subscription(
        &self,
        session: &Arc<Session>,
        policy: &IdentityPolicy,
        request: SubscribeRequest,
    ) -> Result<(), Status> {
        let filter = request.target.filter.clone();
        self.try_subscribe(
            session,
            policy,
            SubscribeRequest {
                retain: RetainDelivery::Never,
                ..request
            },
            Admission::Kept,
        )
        .inspect_err(|status| self.subscription_refused(session, &filter, status))
    }

    /// Keeps or forgets a topic's retained message in the store, too.
    pub(crate) fn store_retained(&self, topic: &TopicName, message: Option<&Arc<Batch>>) {
        if let Some(store) = &self.store {
            store.put(match message {
                Some(message) => Change::PutRetained(Arc::clone(&self.name), Arc::clone(message)),
                None => Change::RemoveRetained(Arc::clone(&self.name), topic.as_str().into()),
            });
        }
    }

    /// The sessions kept now.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions
            .iter()
            .map(|session| Arc::clone(&session))
            .collect()
    }

    /// How many sessions there are.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Ends and forgets what nobody may come back for any more.
    pub(crate) fn sweep(&self, now: Instant) {
        self.services.forget_lost(now, self.limits.resume_grace);
        self.models.forget_lost(now, self.limits.resume_grace);
        self.dedup.sweep(now);
        self.usages.sweep(now);
        self.history.sweep(SystemTime::now());
        for topic in self.retained.sweep(now) {
            self.metrics.retained.dec();
            self.store_retained(&topic, None);
        }
        for session in self.sessions() {
            if session.is_expired(now) {
                self.remove_session(&session);
            }
        }
    }

    /// A flow for a topic that a session publishes to.
    pub(crate) fn flow(&self, topic: TopicName, publisher: &Identity, session: u64) -> Arc<Flow> {
        Arc::new(Flow::numbered(
            &self.flow_ids,
            topic,
            publisher.clone(),
            session,
        ))
    }

    /// Owes a subscription what is retained now.
    fn deliver_retained(&self, subscriber: &Subscriber) {
        let filter = &subscriber.target.filter;
        // One topic is not worth a walk.
        if let Some(topic) = filter.as_topic() {
            if let Some(message) = self.retained.get(&topic)
                && !subscriber
                    .residual
                    .iter()
                    .any(|filter| filter.matches(&topic))
            {
                let message = message.at_most(subscriber.max_qos);
                subscriber.queues[message.class.index()].push(&message);
            }
            return;
        }
        for (class, queue) in Class::ALL.into_iter().zip(&subscriber.queues) {
            let backlog = RetainedBacklog::new(
                &self.retained,
                filter,
                &subscriber.residual,
                class,
                subscriber.max_qos,
            );
            if let Some(backlog) = backlog {
                queue.owe(subscriber.id, Some(Box::new(backlog)));
            }
        }
    }

    /// Why a subscription cannot begin with the replay that it asks for, if it cannot.
    fn cannot_replay(&self, request: &SubscribeRequest) -> Option<Status> {
        request.replay?;
        let SubscribeTarget { filter, share } = &request.target;
        if share.is_some() {
            return Some(Status::new(
                Code::InvalidArgument,
                "a share group has no replay: its messages are handed out as they come",
            ));
        }
        if self.history.overlaps(filter) {
            return None;
        }
        Some(Status::new(
            Code::FailedPrecondition,
            format!("no topic of {filter} keeps history: the broker's configuration says which do"),
        ))
    }

    /// Owes a subscription a part of the history, and ends the hold of its queues. `since` is the
    /// first generation of the router that has it.
    fn deliver_history(&self, subscriber: &Subscriber, replay: &Replay, since: u64) {
        let request = ReplayRequest {
            filter: &subscriber.target.filter,
            residual: &subscriber.residual,
            replay,
            before: since,
            except: subscriber.no_local.then_some(subscriber.session_id),
            max_qos: subscriber.max_qos,
        };
        let backlogs = self.history.replay(&request, SystemTime::now());
        for (queue, backlog) in subscriber.queues.iter().zip(backlogs) {
            queue.owe(
                subscriber.id,
                backlog.map(|backlog| Box::new(backlog) as Box<dyn Backlog>),
            );
        }
    }

    fn end_session(&self, key: &SessionKey, why: &str) {
        if let Some(session) = self.sessions.get(key).map(|session| Arc::clone(&session)) {
            session.kick(Status::new(Code::Aborted, why));
            self.remove_session(&session);
        }
    }

    fn remove_session(&self, session: &Arc<Session>) {
        let removed = self
            .sessions
            .remove_if(&session.key, |_, held| held.id == session.id);
        if removed.is_none() {
            return;
        }
        self.metrics.sessions.dec();
        for subscriber in session.subscriptions() {
            self.router.remove(&subscriber);
            if let Some(group) = subscriber.group() {
                group.take_over(&subscriber);
            }
        }
        for subscriber in session.close() {
            // One of them may have come since.
            self.router.remove(&subscriber);
            self.metrics.subscriptions.dec();
        }
    }
}
