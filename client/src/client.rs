//! The handle that an application holds, and what it shares with the tasks behind it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use selvedge_certs::Identity;
use selvedge_proto::lane::Flags;
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::status::Status;
use selvedge_proto::topic::{SubscribeTarget, TopicName};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::call::{Call, CallError, CallStream};
use crate::control::Control;
use crate::datagram::{Datagrams, Offer};
use crate::driver::{self, ConnectError};
use crate::infer::{Infer, InferStream, Inference};
use crate::lane::{Lane, Outgoing};
use crate::options::Options;
use crate::publish::{FlushError, IntoTopic, Publish, PublishAck, PublishError};
use crate::serve::{Responder, ServeError, ServeOptions};
use crate::state::State;
use crate::stats::{ClientStats, Counters};
use crate::subscription::{Route, SubscribeError, SubscribeOptions, Subscription};
use crate::sync::lock;
use crate::work::{ModelRegistration, WorkError, WorkerHandle};

/// A connection to a broker that restores itself. Clones are cheap and share it; it is closed when
/// the last clone, subscription, responder, worker handle and call is dropped.
#[derive(Clone)]
pub struct Client(Arc<Handle>);

/// Ends the driver when the application lets go.
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.closing.cancel();
    }
}

/// What the application's handles and the tasks of the connection share.
pub(crate) struct Shared {
    pub(crate) settings: Options,
    pub(crate) identity: Identity,
    pub(crate) state: watch::Sender<State>,
    /// The connection, while it is up.
    pub(crate) link: watch::Sender<Option<Link>>,
    /// Publish lanes, by class.
    pub(crate) lanes: [Lane; 3],
    pub(crate) datagrams: Datagrams,
    pub(crate) control: Control,
    pub(crate) counters: Arc<Counters>,
    /// Flushes that wait for the broker's pong, by token.
    pub(crate) marks: Mutex<HashMap<u64, oneshot::Sender<()>>>,
    next_mark: AtomicU64,
    /// The last refusal of a QoS 0 message since the last flush.
    pub(crate) refused: Mutex<Option<Status>>,
    /// The application wants the client to end.
    pub(crate) closing: CancellationToken,
    /// The client has ended.
    pub(crate) ended: CancellationToken,
}

/// A connection that is up.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) connection: quinn::Connection,
    /// Largest frame that the broker accepts.
    pub(crate) max_frame: usize,
}

impl Shared {
    pub(crate) fn new(settings: Options, identity: Identity) -> Self {
        let counters = Arc::new(Counters::default());
        let lane = |class| Lane::new(class, settings.outbox_bytes, counters.clone());
        Self {
            lanes: Class::ALL.map(lane),
            datagrams: Datagrams::new(counters.clone()),
            identity,
            state: watch::Sender::new(State::Connecting { attempt: 1 }),
            link: watch::Sender::new(None),
            control: Control::new(),
            counters,
            marks: Mutex::default(),
            next_mark: AtomicU64::new(1),
            refused: Mutex::default(),
            closing: CancellationToken::new(),
            ended: CancellationToken::new(),
            settings,
        }
    }

    pub(crate) fn lane(&self, class: Class) -> &Lane {
        &self.lanes[class.index()]
    }

    /// Publishes in a datagram, or on the normal lane if it does not fit one.
    async fn publish_datagram(&self, message: Outgoing<TopicName>) -> Result<(), PublishError> {
        let lane = self.lane(Class::Normal);
        lane.admits(&message)?;
        match self.datagrams.offer(message) {
            Offer::Taken { crowded } => {
                if crowded {
                    // Nothing else makes a publisher wait that is faster than the network.
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
            Offer::Unfit(message) => lane.publish(message).await,
            Offer::Disconnected => Err(PublishError::Disconnected),
        }
    }

    /// Waits until the broker has processed everything published before, except that datagrams may
    /// still be under way.
    pub(crate) async fn flush(&self) -> Result<(), FlushError> {
        self.datagrams.drained().await;
        let mut waits = Vec::new();
        for lane in &self.lanes {
            let token = self.next_mark.fetch_add(1, Ordering::Relaxed);
            let (reply, pong) = oneshot::channel();
            lock(&self.marks).insert(token, reply);
            match lane.mark(token) {
                Ok(true) => waits.push(pong),
                Ok(false) => {
                    lock(&self.marks).remove(&token);
                }
                Err(reason) => {
                    lock(&self.marks).remove(&token);
                    return Err(FlushError::Closed(reason));
                }
            }
        }
        for pong in waits {
            // The sender is dropped when the connection is lost.
            pong.await.map_err(|_| FlushError::Disconnected)?;
        }
        match lock(&self.refused).take() {
            Some(status) => Err(FlushError::Refused(status)),
            None => Ok(()),
        }
    }

    /// Why the client has ended.
    pub(crate) fn end_reason(&self) -> Arc<str> {
        match &*self.state.borrow() {
            State::Closed { reason } => reason.clone(),
            _ => "the client is ending".into(),
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = self.shared();
        f.debug_struct("Client")
            .field("identity", &shared.identity)
            .field("state", &*shared.state.borrow())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects, and returns once the broker has welcomed the client. Attempts that nobody answers
    /// are repeated within [`Options::connect_timeout`].
    ///
    /// # Errors
    /// A refusal is returned at once with the broker's reason.
    pub async fn connect(options: Options) -> Result<Self, ConnectError> {
        let shared = driver::start(options).await?;
        Ok(Self(Arc::new(Handle(shared))))
    }

    #[inline]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// What the connection is doing, now and in future.
    pub fn state(&self) -> watch::Receiver<State> {
        self.shared().state.subscribe()
    }

    /// The client's own identity.
    pub fn identity(&self) -> &Identity {
        &self.shared().identity
    }

    /// Publishes with QoS 0; returns when the message is queued, and waits for room if need be.
    ///
    /// While disconnected, messages are queued for the next connection as far as
    /// [`Options::outbox_bytes`] goes. A refusal is reported by later publishes to the same topic,
    /// and by [`Self::flush`].
    ///
    /// # Errors
    /// As [`PublishError`].
    pub async fn publish(
        &self,
        topic: impl IntoTopic,
        payload: impl Into<Bytes>,
    ) -> Result<(), PublishError> {
        let message = Outgoing {
            topic,
            flags: Flags::new(Qos::AtMostOnce),
            header: None,
            payload: payload.into(),
        };
        self.shared().lane(Class::Normal).publish(message).await
    }

    /// Publishes a message. With QoS 1 it returns when the broker has it as safe as demanded,
    /// across reconnects if need be; giving up the wait does not take the message back. With QoS 0
    /// it is as [`Self::publish`].
    ///
    /// # Errors
    /// As [`PublishError`].
    pub async fn publish_message(&self, message: Publish) -> Result<PublishAck, PublishError> {
        let lane = self.shared().lane(message.class);
        let outgoing = Outgoing {
            topic: message.topic?,
            flags: Flags::new(message.qos)
                .with_retain(message.retain)
                .with_duplicate(message.duplicate && message.qos > Qos::AtMostOnce)
                .with_durability(message.durability),
            header: message.properties.encode(),
            payload: message.payload,
        };
        let as_datagram = message.datagram && !message.retain && message.class == Class::Normal;
        match message.qos {
            Qos::AtMostOnce if as_datagram => {
                self.shared().publish_datagram(outgoing).await?;
                Ok(PublishAck { durability: None })
            }
            Qos::AtMostOnce => {
                lane.publish(outgoing).await?;
                Ok(PublishAck { durability: None })
            }
            Qos::AtLeastOnce => lane.publish_acknowledged(outgoing).await,
            Qos::ExactlyOnce => Err(PublishError::Qos),
        }
    }

    /// Waits until the broker has processed everything published before; datagrams may still be
    /// under way, or lost.
    ///
    /// # Errors
    /// [`FlushError::Refused`] when QoS 0 messages before it were refused.
    pub async fn flush(&self) -> Result<(), FlushError> {
        self.shared().flush().await
    }

    /// Subscribes to a topic filter, or to `$share/<group>/<filter>`. Returns when the broker has
    /// accepted; while disconnected that is after the reconnect.
    ///
    /// # Errors
    /// As [`SubscribeError`].
    pub async fn subscribe(&self, filter: &str) -> Result<Subscription, SubscribeError> {
        self.subscribe_with(filter, SubscribeOptions::default())
            .await
    }

    /// Subscribes as told.
    ///
    /// # Errors
    /// As [`SubscribeError`].
    pub async fn subscribe_with(
        &self,
        filter: &str,
        options: SubscribeOptions,
    ) -> Result<Subscription, SubscribeError> {
        let target = SubscribeTarget::parse(filter)?;
        let (route, answer) = self
            .shared()
            .control
            .subscribe(options.to_wire(&target), |id| {
                Arc::new(Route::new(id, &target, &options))
            })?;
        // Unsubscribes if the wait is given up.
        let subscription = Subscription::new(self.clone(), route);
        match answer.await {
            Ok(Ok(())) => Ok(subscription),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(SubscribeError::Closed(self.shared().end_reason())),
        }
    }

    /// Calls a service: one message each way, within 30 s.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn call(&self, service: &str, request: impl Into<Bytes>) -> Result<Bytes, CallError> {
        self.request(Call::new(service).payload(request)).await
    }

    /// Makes a call with one message each way; one that is idempotent is made again when its
    /// responder or the connection is lost, as long as the deadline allows.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn request(&self, call: Call) -> Result<Bytes, CallError> {
        CallStream::unary(self, &call).await
    }

    /// Makes a call that streams both ways.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn call_with(&self, call: Call) -> Result<CallStream, CallError> {
        CallStream::call(self, &call).await
    }

    /// Registers a service that this client answers.
    ///
    /// # Errors
    /// As [`ServeError`].
    pub async fn serve(&self, service: &str) -> Result<Responder, ServeError> {
        self.serve_with(service, ServeOptions::default()).await
    }

    /// Registers a service as told.
    ///
    /// # Errors
    /// As [`ServeError`].
    pub async fn serve_with(
        &self,
        service: &str,
        options: ServeOptions,
    ) -> Result<Responder, ServeError> {
        Responder::register(self, service, &options).await
    }

    /// Asks for an inference and waits for the whole answer.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn infer(&self, request: Infer) -> Result<Inference, CallError> {
        let limit = self.shared().settings.max_frame_bytes;
        Inference::collect(self, &request, limit).await
    }

    /// Asks for an inference and returns when the answer begins.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn infer_stream(&self, request: Infer) -> Result<InferStream, CallError> {
        InferStream::open(self, &request).await
    }

    /// Registers a model that this client runs.
    ///
    /// # Errors
    /// As [`WorkError`].
    pub async fn work(&self, registration: ModelRegistration) -> Result<WorkerHandle, WorkError> {
        WorkerHandle::register(self, registration).await
    }

    /// Counters since the client was made.
    pub fn stats(&self) -> ClientStats {
        let shared = self.shared();
        let on_lanes: u64 = shared.lanes.iter().map(Lane::published).sum();
        shared.counters.snapshot(on_lanes)
    }

    /// Sends what is queued, says goodbye and closes, for every clone. Takes a few seconds at most.
    pub async fn close(&self) {
        self.shared().closing.cancel();
        self.shared().ended.cancelled().await;
    }
}
