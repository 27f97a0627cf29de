//! What this client wants of the broker: its subscriptions and registrations, and the control
//! frames that bring the broker to it.
//!
//! The tables say what is wanted. A change appends a frame while connected; a new connection
//! appends the frames for everything that the broker does not have.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use bytes::BytesMut;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::serve::IncomingCall;
use crate::subscription::Route;
use crate::sync::lock;
use crate::work::{IncomingInference, LoadReport};

/// How a request to the broker ended.
#[derive(Debug, Clone)]
pub(crate) enum Refusal {
    /// The broker said no.
    Status(Status),
    /// The client has ended.
    Closed(Arc<str>),
}

/// The answer to a request.
pub(crate) type Answer = oneshot::Receiver<Result<(), Refusal>>;
type Reply = oneshot::Sender<Result<(), Refusal>>;

/// What a client wants of its broker, and what has yet to be sent about it.
///
/// What waits to be sent is bounded by what the application asks for: each request of it is one
/// frame, and it waits for the answer.
#[derive(Debug)]
pub(crate) struct Control {
    state: Mutex<ControlState>,
    /// Told when there is something to send.
    wake: Arc<Notify>,
    /// Counts the changes of the subscriptions.
    generation: watch::Sender<u64>,
    /// Whether the broker has everything back that the client had before the connection.
    restored: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct ControlState {
    connected: bool,
    closed: Option<Arc<str>>,
    outgoing: BytesMut,
    last_request: u64,
    requests: HashMap<u64, Request>,
    subscriptions: BTreeMap<u32, Subscribed>,
    registrations: BTreeMap<u32, Registered>,
    last_registration: u32,
    /// Subscriptions that a kept session still has and nobody wants.
    unwanted: BTreeSet<u32>,
    /// Requests that put back what the client had before the connection; their answers are awaited.
    restoring: BTreeSet<u64>,
    /// Workers whose load has changed.
    reports: BTreeSet<u32>,
    /// The broker had kept the session from an earlier life of the application, whose
    /// subscriptions may yet be made again until this time.
    inherited_until: Option<Instant>,
}

#[derive(Debug)]
enum Request {
    Subscribe(u32),
    Unsubscribe(Vec<u32>, Option<Reply>),
    Register(u32),
    Withdraw,
}

#[derive(Debug)]
struct Subscribed {
    wire: wire::Subscription,
    route: Arc<Route>,
    /// The broker has accepted it in this session.
    confirmed: bool,
    /// The broker may have it in this session.
    sent: bool,
    reply: Option<Reply>,
}

#[derive(Debug)]
struct Registered {
    kind: Registration,
    sink: Sink,
    reply: Option<Reply>,
}

/// What is registered at the broker.
#[derive(Debug, Clone)]
pub(crate) enum Registration {
    Serve(wire::Serve),
    Work(wire::Work, u32),
}

/// Where requests for a registration go.
#[derive(Debug, Clone)]
pub(crate) enum Sink {
    Calls(mpsc::Sender<IncomingCall>),
    Inferences(mpsc::Sender<IncomingInference>),
}

impl Control {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::default(),
            wake: Arc::new(Notify::new()),
            generation: watch::Sender::new(0),
            restored: watch::Sender::new(false),
        }
    }

    /// Resolves when the broker has answered for everything the client had before the connection.
    /// Lanes and control stream are not ordered against each other, so a message published earlier
    /// could overtake the subscription that wants it.
    pub(crate) async fn restored(&self) {
        // The sender is this value's own, so it does not go away meanwhile.
        let _ = self
            .restored
            .subscribe()
            .wait_for(|restored| *restored)
            .await;
    }

    /// Told when there is something to send.
    pub(crate) fn wake(&self) -> &Arc<Notify> {
        &self.wake
    }

    /// Counts the changes of the subscriptions.
    pub(crate) fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Adds a subscription under an id derived from its filter, so that an application that starts
    /// again and subscribes as before takes over what a kept session has of it.
    pub(crate) fn subscribe(
        &self,
        mut wire: wire::Subscription,
        route: impl FnOnce(u32) -> Arc<Route>,
    ) -> Result<(Arc<Route>, Answer), Refusal> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some(reason) = &state.closed {
            return Err(Refusal::Closed(reason.clone()));
        }
        let mut id = stable_id(&wire.filter);
        while id == 0 || state.subscriptions.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        wire.id = id;
        let route = route(id);
        let (reply, answer) = oneshot::channel();
        state.unwanted.remove(&id);
        let subscribed = Subscribed {
            wire,
            route: route.clone(),
            confirmed: false,
            sent: false,
            reply: Some(reply),
        };
        state.subscriptions.insert(id, subscribed);
        state.send_subscribe(id);
        drop(guard);
        self.changed();
        Ok((route, answer))
    }

    /// Takes a subscription back. The answer comes when the broker has done so, or at once when
    /// there is no connection.
    pub(crate) fn unsubscribe(&self, route: &Arc<Route>) -> Answer {
        let (reply, answer) = oneshot::channel();
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let ours = state
            .subscriptions
            .get(&route.id())
            .is_some_and(|subscribed| Arc::ptr_eq(&subscribed.route, route));
        if ours && let Some(subscribed) = state.subscriptions.remove(&route.id()) {
            if state.connected {
                state.send_unsubscribe(vec![route.id()], Some(reply));
            } else {
                if subscribed.sent {
                    state.unwanted.insert(route.id());
                }
                let _ = reply.send(Ok(()));
            }
        } else {
            let _ = reply.send(Ok(()));
        }
        drop(guard);
        self.changed();
        answer
    }

    /// Registers a service or a model. Returns its id.
    pub(crate) fn register(
        &self,
        kind: Registration,
        sink: Sink,
    ) -> Result<(u32, Answer), Refusal> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some(reason) = &state.closed {
            return Err(Refusal::Closed(reason.clone()));
        }
        let (reply, answer) = oneshot::channel();
        state.last_registration = state.last_registration.wrapping_add(1).max(1);
        let id = state.last_registration;
        let registered = Registered {
            kind: kind.with_id(id),
            sink,
            reply: Some(reply),
        };
        state.registrations.insert(id, registered);
        state.send_register(id);
        drop(guard);
        self.wake.notify_one();
        Ok((id, answer))
    }

    /// Withdraws a registration.
    pub(crate) fn withdraw(&self, id: u32) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(registered) = state.registrations.remove(&id) else {
            return;
        };
        state.reports.remove(&id);
        if state.connected {
            let request_id = state.request(Request::Withdraw);
            state.send(match registered.kind {
                Registration::Serve(_) => Frame::Unserve(wire::Unserve { request_id, id }),
                Registration::Work(..) => Frame::Unwork(wire::Unwork { request_id, id }),
            });
        }
        drop(guard);
        self.wake.notify_one();
    }

    /// A worker's load has changed.
    pub(crate) fn report(&self, id: u32, report: LoadReport) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(Registered {
            kind: Registration::Work(work, queue_depth),
            ..
        }) = state.registrations.get_mut(&id)
        else {
            return;
        };
        work.slots = report.slots;
        work.loaded = report.loaded;
        work.service_time_us = report.service_time.map_or(0, micros);
        *queue_depth = report.queue_depth;
        if state.connected {
            state.reports.insert(id);
        }
        drop(guard);
        self.wake.notify_one();
    }

    /// Where requests for a registration go.
    pub(crate) fn sink(&self, id: u32) -> Option<Sink> {
        let state = lock(&self.state);
        Some(state.registrations.get(&id)?.sink.clone())
    }

    /// The subscription that owns lanes of its own.
    pub(crate) fn owner(&self, id: u32) -> Option<Arc<Route>> {
        let state = lock(&self.state);
        Some(state.subscriptions.get(&id)?.route.clone())
    }

    /// The subscriptions on shared lanes that want a topic.
    pub(crate) fn matching(&self, topic: &selvedge_proto::topic::TopicName) -> Vec<Arc<Route>> {
        let state = lock(&self.state);
        let routes = state.subscriptions.values().map(|s| &s.route);
        routes
            .filter(|route| !route.owns_lane() && route.filter().matches(topic))
            .cloned()
            .collect()
    }

    /// Until when messages that nobody wants are held for a subscription to come.
    pub(crate) fn inherited_until(&self) -> Option<Instant> {
        lock(&self.state).inherited_until
    }

    /// The session was kept from an earlier life of the application.
    pub(crate) fn inherit(&self, until: Instant) {
        lock(&self.state).inherited_until = Some(until);
    }

    /// A connection is up: everything the broker does not have is sent.
    pub(crate) fn connected(&self, session_present: bool) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        state.connected = true;
        let unwanted = std::mem::take(&mut state.unwanted);
        if !session_present {
            for subscribed in state.subscriptions.values_mut() {
                subscribed.confirmed = false;
                subscribed.sent = false;
                if let Some(replay) = subscribed.wire.replay {
                    subscribed.wire.replay = Some(subscribed.route.rest_of(replay));
                }
            }
        }
        if session_present && !unwanted.is_empty() {
            state.send_unsubscribe(unwanted.into_iter().collect(), None);
        }
        let ids: Vec<u32> = state
            .subscriptions
            .iter()
            .filter(|(_, subscribed)| !subscribed.confirmed)
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            state.send_subscribe(id);
        }
        let ids: Vec<u32> = state.registrations.keys().copied().collect();
        for id in ids {
            state.send_register(id);
        }
        state.restoring = state.requests.keys().copied().collect();
        self.restored.send_replace(state.restoring.is_empty());
        drop(guard);
        self.wake.notify_one();
    }

    /// The connection is gone. Requests wait for the next one.
    pub(crate) fn disconnected(&self) {
        let mut state = lock(&self.state);
        state.connected = false;
        state.restoring.clear();
        self.restored.send_replace(false);
        state.outgoing.clear();
        state.reports.clear();
        for request in std::mem::take(&mut state.requests).into_values() {
            if let Request::Unsubscribe(ids, reply) = request {
                // The request may be lost; a kept session is told again.
                for id in ids {
                    if !state.subscriptions.contains_key(&id) {
                        state.unwanted.insert(id);
                    }
                }
                if let Some(reply) = reply {
                    let _ = reply.send(Ok(()));
                }
            }
        }
    }

    /// The client has ended: everyone who waits is told so.
    pub(crate) fn close(&self, reason: &Arc<str>) {
        let mut state = lock(&self.state);
        state.closed = Some(reason.clone());
        state.connected = false;
        state.outgoing.clear();
        let subscriptions = std::mem::take(&mut state.subscriptions);
        let registrations = std::mem::take(&mut state.registrations);
        let requests = std::mem::take(&mut state.requests);
        drop(state);
        let closed = || Err(Refusal::Closed(reason.clone()));
        for subscribed in subscriptions.into_values() {
            subscribed.route.end(None);
            if let Some(reply) = subscribed.reply {
                let _ = reply.send(closed());
            }
        }
        for registered in registrations.into_values() {
            if let Some(reply) = registered.reply {
                let _ = reply.send(closed());
            }
        }
        for request in requests.into_values() {
            if let Request::Unsubscribe(_, Some(reply)) = request {
                let _ = reply.send(Ok(()));
            }
        }
        self.changed();
    }

    /// Appends a frame that answers to no request.
    pub(crate) fn send(&self, frame: Frame) {
        lock(&self.state).send(frame);
        self.wake.notify_one();
    }

    /// What is to be sent now.
    pub(crate) fn take_outgoing(&self) -> BytesMut {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        for id in std::mem::take(&mut state.reports) {
            if let Some(registered) = state.registrations.get(&id)
                && let Registration::Work(work, queue_depth) = &registered.kind
            {
                let report = Frame::LoadReport(wire::LoadReport {
                    id,
                    slots: work.slots,
                    loaded: work.loaded,
                    service_time_us: work.service_time_us,
                    queue_depth: *queue_depth,
                });
                state.send(report);
            }
        }
        state.outgoing.split()
    }

    /// The broker has answered a request.
    pub(crate) fn answered(&self, reply: wire::Reply) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(request) = state.requests.remove(&reply.request_id) else {
            return;
        };
        if state.restoring.remove(&reply.request_id) && state.restoring.is_empty() {
            self.restored.send_replace(true);
        }
        let status = reply.statuses.into_iter().next().map(Status::from);
        let status = status.unwrap_or_else(|| Status::new(Code::Internal, "an empty reply"));
        let (waiting, ended) = match request {
            Request::Subscribe(id) if status.is_ok() => {
                let subscribed = state.subscriptions.get_mut(&id);
                let waiting = subscribed.and_then(|subscribed| {
                    subscribed.confirmed = true;
                    subscribed.reply.take()
                });
                (waiting, None)
            }
            Request::Subscribe(id) => match state.subscriptions.remove(&id) {
                Some(subscribed) => (subscribed.reply, Some((subscribed.wire, subscribed.route))),
                None => (None, None),
            },
            Request::Unsubscribe(_, reply) => (reply, None),
            Request::Register(id) if status.is_ok() => {
                let registered = state.registrations.get_mut(&id);
                (
                    registered.and_then(|registered| registered.reply.take()),
                    None,
                )
            }
            Request::Register(id) => match state.registrations.remove(&id) {
                Some(registered) => {
                    if registered.reply.is_none() {
                        tracing::warn!(%status, "the broker no longer accepts a registration");
                    }
                    (registered.reply, None)
                }
                None => (None, None),
            },
            Request::Withdraw => (None, None),
        };
        drop(guard);
        if let Some((wire, route)) = ended {
            if waiting.is_none() {
                tracing::warn!(filter = wire.filter, %status, "the broker no longer accepts a subscription");
            }
            route.end(Some(status.clone()));
            self.changed();
        }
        if let Some(waiting) = waiting {
            let _ = waiting.send(status.into_result().map_err(Refusal::Status));
        }
    }

    fn changed(&self) {
        self.generation.send_modify(|generation| *generation += 1);
        self.wake.notify_one();
    }
}

impl ControlState {
    fn request(&mut self, request: Request) -> u64 {
        self.last_request += 1;
        self.requests.insert(self.last_request, request);
        self.last_request
    }

    fn send(&mut self, frame: Frame) {
        if self.connected {
            let control = wire::Control { frame: Some(frame) };
            frame::append(&mut self.outgoing, Kind::CONTROL, &control);
        }
    }

    fn send_subscribe(&mut self, id: u32) {
        if !self.connected {
            return;
        }
        if let Some(subscribed) = self.subscriptions.get_mut(&id) {
            subscribed.sent = true;
            let subscriptions = vec![subscribed.wire.clone()];
            let request_id = self.request(Request::Subscribe(id));
            self.send(Frame::Subscribe(wire::Subscribe {
                request_id,
                subscriptions,
            }));
        }
    }

    fn send_unsubscribe(&mut self, ids: Vec<u32>, reply: Option<Reply>) {
        let request_id = self.request(Request::Unsubscribe(ids.clone(), reply));
        self.send(Frame::Unsubscribe(wire::Unsubscribe { request_id, ids }));
    }

    fn send_register(&mut self, id: u32) {
        if !self.connected {
            return;
        }
        if let Some(registered) = self.registrations.get(&id) {
            let kind = registered.kind.clone();
            let request_id = self.request(Request::Register(id));
            self.send(match kind {
                Registration::Serve(serve) => Frame::Serve(wire::Serve {
                    request_id,
                    ..serve
                }),
                Registration::Work(work, _) => Frame::Work(wire::Work { request_id, ..work }),
            });
        }
    }
}

impl Registration {
    fn with_id(self, id: u32) -> Self {
        match self {
            Self::Serve(serve) => Self::Serve(wire::Serve { id, ..serve }),
            Self::Work(work, depth) => Self::Work(wire::Work { id, ..work }, depth),
        }
    }
}

/// Whole microseconds as the wire has them; at least 1 for a time that is known.
pub(crate) fn micros(duration: std::time::Duration) -> u32 {
    u32::try_from(duration.as_micros())
        .unwrap_or(u32::MAX)
        .max(1)
}

/// An id for a filter, the same in every run of the program: FNV-1a.
fn stable_id(filter: &str) -> u32 {
    filter.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests;
