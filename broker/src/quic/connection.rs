//! One native connection: greeting, then one loop over everything that can happen to it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use quinn::{Connection, SendStream, VarInt};
use selvedge_certs::Identity;
use selvedge_proto::REVISION;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::datagram::{DatagramDelivery, DatagramIngest};
use super::delivery::Delivery;
use super::ingest::{Ingest, IngestError};
use super::{FIRST_LANES, FrameReader, LANES, LISTENER, ReadFrameError};
use crate::calls;
use crate::clock;
use crate::fabric::Fabric;
use crate::models::WorkerModel;
use crate::policy::LivePolicy;
use crate::publisher::Publisher;
use crate::queue::DeliveryQueue;
use crate::revocation::{Eviction, Peer};
use crate::services::Responder;
use crate::session::{ConnectionEnd, SessionKey, Will};
use crate::tenant::{Attachment, Connect, Tenant};

/// Control frames that wait to be written. A client that does not read them stops its own publish
/// lanes first, which wait to queue their acknowledgements, and in the end its own requests.
const CONTROL_QUEUE: usize = 256;

/// To the task that writes the control stream. Frames are boxed, since the queue of an idle connection has
/// room for 32 of them from the start.
pub(super) type ControlSender = mpsc::Sender<Box<wire::control::Frame>>;

/// Time for the last frame to reach the peer before the connection closes.
const FAREWELL: Duration = Duration::from_secs(1);

/// A client that was let in.
struct Established {
    actor: Box<Actor>,
    /// What it says on the control stream.
    reader: FrameReader,
    writer: JoinHandle<()>,
}

/// Runs a connection to its end.
///
/// The greeting's state is gone when the conversation begins, which lasts longer.
pub(super) async fn run(
    fabric: &Arc<Fabric>,
    connection: Connection,
    identity: Identity,
    peer: &Peer,
) {
    let remote = connection.remote_address();
    let established = Box::pin(establish(fabric, connection, identity, peer)).await;
    let Some(Established {
        mut actor,
        reader,
        writer,
    }) = established
    else {
        return;
    };
    let end = actor.run(reader).await;
    let clean = matches!(end, End::Goodbye);
    if clean {
        // The goodbye is read before datagrams that came ahead of it. What is wrong with them is of
        // no interest any more.
        let _ = actor.datagrams().drain().await;
    }
    let farewell_frame = match &end {
        End::Goodbye => Some(goodbye(&Status::ok())),
        End::Kicked(status) | End::Violation(status) => Some(goodbye(status)),
        End::Lost => None,
    };
    // Registrations go first, so that no new call is sent to a connection that is closing.
    actor.withdraw_all(!clean);
    actor.tenant.detach(
        fabric,
        &actor.attachment,
        if clean {
            ConnectionEnd::Clean { expiry: None }
        } else {
            ConnectionEnd::Lost
        },
    );
    if let Some(frame) = farewell_frame {
        let _ = actor.control.try_send(Box::new(frame));
    }
    actor.tasks.abort_all();
    let Actor {
        control,
        mut tasks,
        identity,
        connection,
        tenant,
        ..
    } = *actor;
    while tasks.join_next().await.is_some() {}
    drop(control);
    let _ = tokio::time::timeout(FAREWELL, writer).await;
    match end {
        End::Goodbye => close(&connection, Code::Ok, "goodbye"),
        End::Kicked(status) => {
            tracing::debug!(%identity, %status, "connection ended");
            close(&connection, status.code, &status.message);
        }
        End::Violation(status) => {
            tracing::warn!(%identity, %remote, %status, "protocol violation");
            fabric.metrics.protocol_error(LISTENER, "frame");
            tenant.refused(&identity, &status);
            close(&connection, status.code, &status.message);
        }
        End::Lost => close(&connection, Code::Unavailable, "connection lost"),
    }
}

/// Hears the client's Hello and lets it in, or tells it why not.
async fn establish(
    fabric: &Arc<Fabric>,
    connection: Connection,
    identity: Identity,
    peer: &Peer,
) -> Option<Established> {
    let remote = connection.remote_address();
    let greeting =
        tokio::time::timeout(fabric.limits.handshake_timeout, greet(fabric, &connection));
    let (hello, send, reader) = match greeting.await {
        Ok(Ok(greeting)) => greeting,
        Ok(Err(error)) => {
            tracing::debug!(%identity, %remote, %error, "no greeting");
            if error.is_protocol() {
                let status = Status::new(Code::InvalidArgument, error.to_string());
                fabric.tenant(&identity).refused(&identity, &status);
                fabric.metrics.protocol_error(LISTENER, "hello");
            } else {
                fabric.metrics.refuse(LISTENER, "closed_before_hello");
            }
            close(&connection, Code::InvalidArgument, &error.to_string());
            return None;
        }
        Err(_) => {
            fabric.metrics.refuse(LISTENER, "hello_timeout");
            let status = Status::new(Code::DeadlineExceeded, "no Hello arrived in time");
            fabric.tenant(&identity).refused(&identity, &status);
            close(&connection, status.code, &status.message);
            return None;
        }
    };
    let connect = match connect_of(fabric, &identity, &hello) {
        Ok(connect) => connect,
        Err(status) => {
            fabric.metrics.refuse(LISTENER, "hello");
            fabric.tenant(&identity).refused(&identity, &status);
            let goodbye = goodbye(&status);
            farewell(send, vec![goodbye]).await;
            close(&connection, status.code, &status.message);
            return None;
        }
    };
    let tenant = fabric.tenant(&identity);
    let policy = LivePolicy::new(fabric, &identity);
    let expiry = connect.expiry;
    if let Some(will) = &connect.will
        && let crate::policy::Decision::Denied(denial) = policy
            .now()
            .decide(crate::policy::Verb::Publish, &will.topic)
    {
        fabric.metrics.deny("publish");
        let status = Status::from(denial);
        (tenant.explain).refused(&identity, Some(&will.topic), None, &status);
        farewell(send, vec![goodbye(&status)]).await;
        close(&connection, status.code, &status.message);
        return None;
    }
    if let Err(Eviction { status, label }) = peer.check() {
        fabric.metrics.refuse(LISTENER, label);
        tenant.refused(&identity, &status);
        farewell(send, vec![goodbye(&status)]).await;
        close(&connection, status.code, &status.message);
        return None;
    }
    let attachment = match tenant.attach(fabric, &connect) {
        Ok(attachment) => attachment,
        Err(status) => {
            fabric.metrics.refuse(LISTENER, "quota");
            tenant.refused(&identity, &status);
            farewell(send, vec![goodbye(&status)]).await;
            close(&connection, status.code, &status.message);
            return None;
        }
    };
    peer.attached(&attachment.kick);
    let (control, outgoing) = mpsc::channel(CONTROL_QUEUE);
    let writer = tokio::spawn(write_control(send, outgoing));
    let message_bytes = attachment.session.usage().message_bytes();
    let welcome = wire::Welcome {
        revision: REVISION.min(hello.revision),
        broker: format!("{} selvedge/{}", fabric.name, env!("CARGO_PKG_VERSION")),
        identity: identity.uri().to_owned(),
        session_present: attachment.present,
        session_expiry_s: u32::try_from(expiry.as_secs()).unwrap_or(u32::MAX),
        max_frame_bytes: u32::try_from(message_bytes).unwrap_or(u32::MAX),
        max_aliases: fabric.limits.aliases_per_lane,
        reconnect: Some(wire::ReconnectAdvice {
            min_ms: 100,
            max_ms: 10_000,
        }),
        key_exchange: selvedge_certs::negotiated_group(&connection).unwrap_or_default(),
    };
    let welcome = Box::new(wire::control::Frame::Welcome(welcome));
    let _ = control.send(welcome).await;
    tracing::debug!(%identity, %remote, session = %attachment.session.key.name, present = attachment.present, "connected");

    let actor = Box::new(Actor {
        publisher: Publisher::new(fabric, Arc::clone(&tenant), &attachment.session),
        fabric: Arc::clone(fabric),
        tenant,
        connection,
        identity,
        policy,
        attachment,
        control,
        lanes: HashMap::new(),
        next_lane: 1,
        tasks: JoinSet::new(),
        services: HashMap::new(),
        models: HashMap::new(),
        message_bytes,
        peer_limit: hello.max_frame_bytes as usize,
    });
    Some(Established {
        actor,
        reader,
        writer,
    })
}

/// How a connection ends.
enum End {
    /// The client said goodbye.
    Goodbye,
    /// The broker ends it.
    Kicked(Status),
    /// The client broke the protocol.
    Violation(Status),
    /// The connection is gone.
    Lost,
}

#[derive(Debug, thiserror::Error)]
enum GreetError {
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Read(#[from] ReadFrameError),
    #[error("expected Hello as the first frame of the control stream")]
    NoHello,
}

impl GreetError {
    fn is_protocol(&self) -> bool {
        matches!(self, Self::NoHello | Self::Read(ReadFrameError::Frame(_)))
    }
}

async fn greet(
    fabric: &Fabric,
    connection: &Connection,
) -> Result<(wire::Hello, SendStream, FrameReader), GreetError> {
    let (send, recv) = connection.accept_bi().await?;
    let _ = send.set_priority(100);
    let mut reader = FrameReader::new(recv, fabric.limits.max_frame_bytes);
    let frame = reader.next().await?.ok_or(GreetError::NoHello)?;
    if frame.kind != Kind::CONTROL {
        return Err(GreetError::NoHello);
    }
    let control: wire::Control =
        frame::decode("control", frame.body).map_err(ReadFrameError::Frame)?;
    match control.frame {
        Some(wire::control::Frame::Hello(hello)) => Ok((hello, send, reader)),
        _ => Err(GreetError::NoHello),
    }
}

/// What a Hello asks for, checked.
fn connect_of(
    fabric: &Fabric,
    identity: &Identity,
    hello: &wire::Hello,
) -> Result<Connect, Status> {
    let invalid = |message: String| Status::new(Code::InvalidArgument, message);
    if hello.revision == 0 {
        return Err(Status::new(
            Code::Unimplemented,
            format!("revision 0 of selvedge/1: this broker speaks 1 to {REVISION}"),
        ));
    }
    let length = hello.session.len();
    if length == 0 || length > selvedge_proto::MAX_SESSION_NAME {
        return Err(invalid(format!(
            "session name of {length} bytes: expected 1 to {}",
            selvedge_proto::MAX_SESSION_NAME
        )));
    }
    let expiry =
        Duration::from_secs(hello.session_expiry_s.into()).min(fabric.limits.session_expiry);
    let will = match &hello.will {
        None => None,
        Some(will) => Some(Will {
            topic: TopicName::parse(will.topic.as_str())
                .map_err(|error| invalid(format!("will: {error}")))?,
            payload: will.payload.clone(),
            qos: u8::try_from(will.qos)
                .ok()
                .and_then(|qos| Qos::try_from(qos).ok())
                .ok_or_else(|| {
                    invalid(format!(
                        "will: quality of service {}: expected 0 or 1",
                        will.qos
                    ))
                })?,
            retain: will.retain,
            delay: Duration::from_secs(will.delay_s.into()),
            header: will
                .header
                .as_ref()
                .map(|header| prost::Message::encode_to_vec(header).into()),
        }),
    };
    Ok(Connect {
        key: SessionKey {
            identity: identity.clone(),
            name: hello.session.as_str().into(),
        },
        clean_start: hello.clean_start,
        expiry,
        will,
    })
}

/// Everything one connection owns.
pub(super) struct Actor {
    pub(super) fabric: Arc<Fabric>,
    pub(super) tenant: Arc<Tenant>,
    pub(super) connection: Connection,
    /// From the client's certificate.
    pub(super) identity: Identity,
    /// The policy for the identity.
    pub(super) policy: LivePolicy,
    /// Hold on the session.
    pub(super) attachment: Attachment,
    pub(super) publisher: Publisher,
    /// To the task that writes the control stream.
    control: ControlSender,
    /// Open delivery lanes, for acknowledgements.
    pub(super) lanes: HashMap<u32, Arc<DeliveryQueue>>,
    next_lane: u32,
    /// Publish and delivery lanes.
    tasks: JoinSet<LaneEnd>,
    /// Registered services, by the client's id.
    pub(super) services: HashMap<u32, (TopicName, Arc<Responder>)>,
    /// Registered models, by the client's id.
    pub(super) models: HashMap<u32, (TopicName, Arc<WorkerModel>)>,
    /// Largest message the client may send.
    message_bytes: usize,
    /// Largest frame the client accepts.
    peer_limit: usize,
}

/// How a lane's task ended.
enum LaneEnd {
    Ingest(Result<(), IngestError>),
    Delivery(u32),
}

impl Actor {
    async fn run(&mut self, mut reader: FrameReader) -> End {
        let outbox = Arc::clone(&self.attachment.session.outbox);
        let kick = self.attachment.kick.clone();
        let mut has_datagrams = false;
        loop {
            // In order of urgency: the end of the connection, what frees others (control frames
            // carry acknowledgements), what the client waits for, then new work.
            tokio::select! {
                biased;
                status = kick.kicked() => return End::Kicked(status),
                frame = reader.next() => {
                    let frame = match frame {
                        Ok(Some(frame)) => frame,
                        Ok(None) => return End::Violation(Status::new(
                            Code::InvalidArgument,
                            "the control stream ended: say Goodbye first",
                        )),
                        Err(ReadFrameError::Frame(error)) => {
                            return End::Violation(Status::new(Code::InvalidArgument, error.to_string()));
                        }
                        Err(ReadFrameError::Read(quinn::ReadError::ConnectionLost(error))) => {
                            return lost(&error);
                        }
                        Err(ReadFrameError::Read(error)) => {
                            return End::Violation(Status::new(Code::InvalidArgument, error.to_string()));
                        }
                    };
                    if frame.kind != Kind::CONTROL {
                        continue;
                    }
                    match self.control_frame(frame.body) {
                        Ok(super::control::Next::Continue) => {}
                        Ok(super::control::Next::Send(answer)) => {
                            // Waits for room, but not past the end of the connection.
                            tokio::select! {
                                sent = self.control.send(answer) => if sent.is_err() { return End::Lost },
                                status = kick.kicked() => return End::Kicked(status),
                            }
                        }
                        Ok(super::control::Next::Goodbye) => return End::Goodbye,
                        Err(status) => return End::Violation(status),
                    }
                }
                () = outbox.ready() => self.open_lanes(&outbox),
                Some(ended) = self.tasks.join_next() => {
                    if let Some(end) = self.lane_ended(ended) {
                        return end;
                    }
                }
                // Few clients send any, so who takes them begins with the first.
                datagram = self.connection.read_datagram(), if !has_datagrams => match datagram {
                    Ok(first) => {
                        has_datagrams = true;
                        let datagrams = self.datagrams();
                        self.tasks
                            .spawn(async move { LaneEnd::Ingest(datagrams.run(first).await) });
                    }
                    Err(error) => return lost(&error),
                },
                stream = self.connection.accept_uni() => match stream {
                    Ok(stream) => {
                        self.allow_more_lanes(stream.id().index());
                        let ingest = Ingest::new(
                            self.publisher.clone(),
                            self.control.clone(),
                            self.message_bytes,
                            self.fabric.limits.aliases_per_lane,
                        );
                        self.tasks.spawn(async move { LaneEnd::Ingest(ingest.run(stream).await) });
                    }
                    Err(error) => return lost(&error),
                },
                stream = self.connection.accept_bi() => match stream {
                    Ok((send, recv)) => {
                        self.allow_more_calls(recv.id().index());
                        let caller = calls::Caller {
                            fabric: Arc::clone(&self.fabric),
                            tenant: Arc::clone(&self.tenant),
                            identity: self.identity.clone(),
                            policy: self.policy.clone(),
                        };
                        self.fabric.tasks.spawn(calls::serve(caller, send, recv));
                    }
                    Err(error) => return lost(&error),
                },
            }
        }
    }

    fn datagrams(&self) -> DatagramIngest {
        DatagramIngest::new(
            self.connection.clone(),
            self.publisher.clone(),
            self.control.clone(),
        )
    }

    /// Lets a client that uses lanes open as many as it may.
    fn allow_more_lanes(&self, index: u64) {
        if index == u64::from(FIRST_LANES / 2) {
            self.connection
                .set_max_concurrent_uni_streams(VarInt::from_u32(LANES));
        }
    }

    /// Lets a client that calls open as many calls as it may. The control stream is the first stream.
    fn allow_more_calls(&self, index: u64) {
        if index == 1 {
            let calls = self.fabric.limits.calls_per_connection;
            self.connection
                .set_max_concurrent_bi_streams(VarInt::from_u32(calls + 1));
        }
    }

    /// Opens a lane for each queue that has its first messages.
    fn open_lanes(&mut self, outbox: &crate::queue::Outbox) {
        for queue in outbox.take(self.attachment.epoch) {
            let lane = self.next_lane;
            self.next_lane += 1;
            queue.set_writer(self.peer_limit);
            let owner = self.attachment.session.subscription(queue.subscription);
            let retain_as_published = owner
                .as_ref()
                .is_some_and(|owner| owner.retain_as_published);
            // Datagrams have no class: what is more or less urgent goes on its lane.
            let datagrams = owner
                .filter(|owner| owner.datagrams && queue.class == Class::Normal)
                .map(|owner| {
                    DatagramDelivery::new(self.connection.clone(), owner.id, retain_as_published)
                });
            self.lanes.insert(lane, Arc::clone(&queue));
            let delivery = Delivery::new(
                queue,
                Arc::clone(&self.fabric),
                self.attachment.epoch,
                retain_as_published,
                datagrams,
                lane,
            );
            let connection = self.connection.clone();
            self.tasks.spawn(async move {
                if let Ok(stream) = connection.open_uni().await {
                    // A write error means that the connection is lost, which the actor sees itself.
                    let _ = delivery.run(stream).await;
                }
                LaneEnd::Delivery(lane)
            });
        }
    }

    fn lane_ended(&mut self, ended: Result<LaneEnd, tokio::task::JoinError>) -> Option<End> {
        match ended {
            Ok(LaneEnd::Ingest(Ok(()))) => None,
            Ok(LaneEnd::Delivery(lane)) => {
                self.lanes.remove(&lane);
                None
            }
            Ok(LaneEnd::Ingest(Err(IngestError::Frame(error)))) => Some(End::Violation(
                Status::new(Code::InvalidArgument, error.to_string()),
            )),
            Ok(LaneEnd::Ingest(Err(IngestError::Read(quinn::ReadError::ConnectionLost(
                error,
            ))))) => Some(lost(&error)),
            // A lane that the client resets is its to give up.
            Ok(LaneEnd::Ingest(Err(IngestError::Read(_)))) => None,
            Ok(LaneEnd::Ingest(Err(IngestError::Closed))) => Some(End::Lost),
            Err(error) if error.is_panic() => {
                tracing::error!(identity = %self.identity, "a lane's task panicked");
                self.fabric.metrics.panics.inc();
                Some(End::Kicked(Status::new(
                    Code::Internal,
                    "a fault in the broker",
                )))
            }
            Err(_) => None,
        }
    }

    /// Takes every registration out. `lost`: the client may come back with them.
    fn withdraw_all(&mut self, lost: bool) {
        let since = lost.then(clock::now);
        for (_, (service, responder)) in self.services.drain() {
            self.tenant.services.remove(&service, &responder, since);
        }
        for (_, (model, worker)) in self.models.drain() {
            self.tenant.models.remove(&model, &worker, since);
        }
    }
}

fn lost(error: &quinn::ConnectionError) -> End {
    match error {
        // A client that closes with the code for OK said goodbye in the shortest way.
        quinn::ConnectionError::ApplicationClosed(close)
            if close.error_code.into_inner() == u64::from(Code::Ok.to_quic()) =>
        {
            End::Goodbye
        }
        _ => End::Lost,
    }
}

fn goodbye(status: &Status) -> wire::control::Frame {
    wire::control::Frame::Goodbye(wire::Goodbye {
        retry_after_ms: status
            .retry_after
            .map(|after| u32::try_from(after.as_millis()).unwrap_or(u32::MAX)),
        status: Some(status.clone().into()),
        alternate: String::new(),
    })
}

async fn farewell(send: SendStream, frames: Vec<wire::control::Frame>) {
    let (control, outgoing) = mpsc::channel(frames.len());
    for frame in frames {
        let _ = control.try_send(Box::new(frame));
    }
    drop(control);
    let _ = tokio::time::timeout(FAREWELL, write_control(send, outgoing)).await;
}

/// Writes control frames, all that wait at once, and at the end waits until the peer has them.
async fn write_control(
    mut stream: SendStream,
    mut frames: mpsc::Receiver<Box<wire::control::Frame>>,
) {
    // One at a time, since room for many would be kept while there are none.
    while let Some(first) = frames.recv().await {
        let mut buffer = BytesMut::new();
        let mut next = Some(first);
        while let Some(frame) = next {
            let frame = Some(*frame);
            frame::append(&mut buffer, Kind::CONTROL, &wire::Control { frame });
            next = frames.try_recv().ok();
        }
        if stream.write_chunk(buffer.freeze()).await.is_err() {
            return;
        }
    }
    if stream.finish().is_ok() {
        let _ = stream.stopped().await;
    }
}

fn close(connection: &Connection, code: Code, reason: &str) {
    connection.close(code.to_quic().into(), reason.as_bytes());
}
