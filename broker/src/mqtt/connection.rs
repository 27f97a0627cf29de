//! One MQTT connection: greeting, then one loop over everything that can happen to it.

use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures_util::FutureExt as _;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::SubscribeTarget;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, timeout, timeout_at};

use crate::calls::Caller;
use crate::fabric::{Fabric, Slot, no_slot};
use crate::mqtt::connect::{self, Greeting, Proof, Refusal};
use crate::mqtt::delivery::{Delivery, HIGH_WATER};
use crate::mqtt::exchange::{self, Exchange};
use crate::mqtt::output::{ConnAck, Output};
use crate::mqtt::packet::{
    Connect, Disconnect, Packet, ProtocolError, Reader, Subscribe, Unsubscribe, Version,
};
use crate::mqtt::publishing::{Manners, Publishing};
use crate::mqtt::reason::Reason;
use crate::mqtt::settings::DeniedSubscription;
use crate::policy::LivePolicy;
use crate::publisher::Publisher;
use crate::queue::Overflow;
use crate::session::ConnectionEnd;
use crate::tenant::{Attachment, SubscribeRequest, Tenant};

/// Least and most bytes read at once. A connection starts with the least and goes up while its
/// reads are full, so that idle ones stay small.
const READ: (usize, usize) = (4 * 1024, 64 * 1024);

/// Room for the first read, which is rarely more than a CONNECT.
const CONNECT: usize = 256;

/// Silence after which a client is not busy publishing.
const PAUSE: Duration = Duration::from_millis(1);

/// Type of a PUBLISH packet (MQTT 5.0 section 2.1.2).
const PUBLISH: u8 = 3;

/// Bytes waiting for the socket beyond which nothing is read. A client gets there only by asking
/// without reading the answers; keep-alive then ends it.
const STOP_READING: usize = 4 * HIGH_WATER;

/// Time for the last packet to reach the peer before the connection closes.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// Runs a connection to its end. CONNECT has to arrive before `deadline`.
///
/// The greeting's state is gone when the conversation begins, which lasts longer.
pub(crate) async fn run<S>(
    fabric: &Arc<Fabric>,
    listener: &'static str,
    stream: S,
    peer: SocketAddr,
    proof: Proof,
    deadline: Instant,
    slot: &Slot,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let greeting = Box::pin(greet(fabric, listener, stream, peer, proof, deadline, slot));
    if let Some(conversation) = greeting.await {
        conversation.run().await;
    }
}

/// A client that was let in.
struct Conversation<S> {
    actor: Box<Actor>,
    stream: S,
    reader: Reader,
    /// What was read and not yet taken.
    buffer: BytesMut,
    /// Its CONNACK.
    output: Output,
    peer: SocketAddr,
    /// A certificate that is revoked while it is kept ends the connection.
    proof: Proof,
}

/// Reads CONNECT and lets the client in, or tells it why not.
async fn greet<S>(
    fabric: &Arc<Fabric>,
    listener: &'static str,
    mut stream: S,
    peer: SocketAddr,
    proof: Proof,
    deadline: Instant,
    slot: &Slot,
) -> Option<Box<Conversation<S>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut reader = Reader::new(fabric.limits.max_frame_bytes);
    let mut buffer = BytesMut::with_capacity(CONNECT);
    let greeting = timeout_at(deadline, async {
        let mut connect = connect::read(&mut reader, &mut stream, &mut buffer).await?;
        if slot.is_refusal {
            let status = no_slot();
            let reason = Reason::of_refusal(&status);
            return Err(Refusal::answer(reason, "connection_limit", status.message));
        }
        let greeting = connect::greet(fabric, &proof, &mut connect).await?;
        Ok((connect, greeting))
    });
    let greeting = tokio::select! {
        () = fabric.shutdown.cancelled() => Err(stopping().into()),
        greeting = greeting => greeting.unwrap_or(Err(Refusal::Answer {
            reason: Reason::UNSPECIFIED,
            text: "CONNECT did not arrive in time".to_owned(),
            label: "connect_timeout",
        })),
    };
    let (connect, greeting) = match greeting {
        Ok(greeting) => greeting,
        Err(refusal) => {
            refuse(
                fabric,
                listener,
                &mut stream,
                peer,
                reader.version(),
                refusal,
            )
            .await;
            return None;
        }
    };
    let tenant = fabric.tenant(&greeting.identity);
    let attachment = match tenant.attach(fabric, &greeting.attach) {
        Ok(attachment) => attachment,
        Err(status) => {
            tenant.refused(&greeting.identity, &status);
            let refusal = Refusal::answer(Reason::of_refusal(&status), "quota", status.message);
            let version = reader.version();
            refuse(fabric, listener, &mut stream, peer, version, refusal).await;
            return None;
        }
    };
    let attached = Attached {
        attachment,
        tenant: Arc::clone(&tenant),
        fabric: Arc::clone(fabric),
        end: ConnectionEnd::Lost,
    };
    if let Proof::Certificate { peer, .. } = &proof {
        peer.attached(&attached.attachment.kick);
    }
    let session = &attached.attachment.session;
    tracing::debug!(
        listener, %peer, identity = %greeting.identity, client = %session.key.name,
        present = attached.attachment.present, "connected"
    );
    let message_bytes = session.usage().message_bytes();
    reader.set_max_packet(message_bytes);
    let settings = &fabric.mqtt;
    let keep_alive = settings.keep_alive(connect.version, connect.keep_alive);
    let information = connect
        .wants_response_information
        .then(|| settings.response_information(&greeting.identity))
        .flatten();
    let mut output = Output::default();
    output.connack(
        connect.version,
        &ConnAck {
            session_present: attached.attachment.present,
            session_expiry: greeting.expiry_reduced.then_some(greeting.attach.expiry),
            assigned_client_id: greeting
                .assigned_client_id
                .then_some(&*greeting.attach.key.name),
            maximum_packet_size: message_bytes,
            receive_maximum: settings.receive_maximum,
            topic_alias_maximum: settings.topic_alias_maximum,
            keep_alive: (keep_alive != connect.keep_alive).then_some(keep_alive),
            response_information: information.as_deref(),
        },
    );
    let actor = Actor::new(fabric, tenant, attached, listener, &connect, greeting);
    Some(Box::new(Conversation {
        actor: Box::new(actor),
        stream,
        reader,
        buffer,
        output,
        peer,
        proof,
    }))
}

/// Tells a client why it is not let in, as far as its version can.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(
    fabric: &Fabric,
    listener: &'static str,
    stream: &mut S,
    peer: SocketAddr,
    version: Option<Version>,
    refusal: Refusal,
) {
    let (reason, text) = match refusal {
        Refusal::Closed => {
            fabric.metrics.refuse(listener, "closed_before_connect");
            return;
        }
        Refusal::Answer {
            reason,
            text,
            label,
        } => {
            fabric.metrics.refuse(listener, label);
            (reason, text)
        }
        Refusal::Protocol(error) => {
            fabric.metrics.protocol_error(listener, error.what);
            (error.reason, error.to_string())
        }
    };
    tracing::debug!(listener, %peer, reason = reason.0, text, "refused");
    let version = match version {
        Some(version) => version,
        None if reason == Reason::UNSUPPORTED_VERSION => Version::V5,
        // It does not speak MQTT, so there is nothing it would understand.
        None => return,
    };
    let (reason, reference) = fabric.mqtt.redirect(reason);
    let mut output = Output::default();
    output.connack_refusal(version, reason, &text, reference);
    let (mut read_half, mut write_half) = tokio::io::split(stream);
    farewell(&mut read_half, &mut write_half, &mut output).await;
}

/// Writes what is left and closes, within [`FAREWELL`]. What the peer still sends is read until it
/// closes, too: closing on it would take the last packet from a peer that has not read it yet.
async fn farewell<R, W>(reader: &mut R, writer: &mut W, output: &mut Output)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let says_something = output.has_remaining();
    let _ = timeout(FAREWELL, async {
        writer.write_all_buf(output).await?;
        writer.shutdown().await?;
        if says_something {
            tokio::io::copy(reader, &mut tokio::io::sink()).await?;
        }
        std::io::Result::Ok(())
    })
    .await;
}

/// Takes the connection off its session, however its task ends.
struct Attached {
    attachment: Attachment,
    tenant: Arc<Tenant>,
    fabric: Arc<Fabric>,
    end: ConnectionEnd,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.tenant.detach(&self.fabric, &self.attachment, self.end);
    }
}

/// The state of a connection after its greeting.
struct Actor {
    fabric: Arc<Fabric>,
    tenant: Arc<Tenant>,
    listener: &'static str,
    version: Version,
    manners: Manners,
    policy: LivePolicy,
    /// As asked for in CONNECT; a session without expiry cannot be given one later.
    session_expiry: Duration,
    /// Longest silence of the client, if there is one.
    patience: Option<Duration>,
    publishing: Publishing,
    exchange: Exchange,
    /// Before `delivery`, so that the session leaves the connection while its queues are known.
    attached: Attached,
    delivery: Delivery,
}

/// Why a connection ends.
enum End {
    /// The client said so.
    Disconnected(Disconnect),
    /// The transport ended or failed.
    Closed,
    /// The client broke the protocol.
    Protocol(ProtocolError),
    /// The broker wants it.
    Kicked(Status),
    /// The client was silent for too long.
    Silent,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conversation<S> {
    /// Speaks with the client until one of them ends it.
    async fn run(self: Box<Self>) {
        let Self {
            mut actor,
            stream,
            mut reader,
            mut buffer,
            mut output,
            peer,
            proof: _proof,
        } = *self;
        let (mut read_half, mut write_half) = tokio::io::split(stream);
        let end = actor
            .serve(
                &mut read_half,
                &mut write_half,
                &mut reader,
                &mut buffer,
                &mut output,
            )
            .await;
        let limit = actor.manners.limit;
        match &end {
            End::Disconnected(disconnect) if !disconnect.with_will => {
                actor.exchange.leave();
                actor.attached.end = ConnectionEnd::Clean {
                    expiry: disconnect
                        .session_expiry
                        .map(|expiry| expiry.min(actor.fabric.limits.session_expiry)),
                };
            }
            End::Disconnected(_) | End::Closed => {}
            End::Protocol(error) => {
                actor
                    .fabric
                    .metrics
                    .protocol_error(actor.listener, error.what);
                actor.refused(Code::InvalidArgument, &error.to_string());
                let text = error.to_string();
                output.disconnect(actor.version, error.reason, &text, None, limit);
            }
            End::Kicked(status) => {
                let (reason, reference) = actor.fabric.mqtt.redirect(Reason::of_kick(status));
                output.disconnect(actor.version, reason, &status.message, reference, limit);
            }
            End::Silent => {
                actor
                    .fabric
                    .metrics
                    .protocol_error(actor.listener, "keep_alive");
                let text = "nothing arrived for one and a half times the keep-alive";
                actor.refused(Code::DeadlineExceeded, text);
                let reason = Reason::KEEP_ALIVE_TIMEOUT;
                output.disconnect(actor.version, reason, text, None, limit);
            }
        }
        tracing::debug!(
            listener = actor.listener, %peer, client = %actor.attached.attachment.session.key.name,
            end = end.as_str(), "disconnected"
        );
        // The will and the session's next connection do not wait for a peer that may be gone.
        drop(actor);
        farewell(&mut read_half, &mut write_half, &mut output).await;
    }
}

impl Actor {
    fn new(
        fabric: &Arc<Fabric>,
        tenant: Arc<Tenant>,
        attached: Attached,
        listener: &'static str,
        connect: &Connect,
        greeting: Greeting,
    ) -> Self {
        let session = &attached.attachment.session;
        let publisher = Publisher::new(fabric, Arc::clone(&tenant), session);
        Self {
            listener,
            version: connect.version,
            manners: Manners {
                limit: connect.maximum_packet_size,
                reasons: connect.wants_reasons,
            },
            exchange: Exchange::new(
                connect.version,
                Caller {
                    fabric: Arc::clone(fabric),
                    tenant: Arc::clone(&tenant),
                    identity: greeting.identity.clone(),
                    policy: greeting.policy.clone(),
                },
                Arc::clone(session),
                connect.maximum_packet_size,
                connect.receive_maximum,
            ),
            policy: greeting.policy,
            session_expiry: connect.session_expiry,
            patience: connect::patience(
                fabric.mqtt.keep_alive(connect.version, connect.keep_alive),
            ),
            publishing: Publishing::new(
                connect.version,
                publisher,
                Arc::clone(session),
                attached.attachment.epoch,
                &fabric.mqtt,
            ),
            delivery: Delivery::new(
                connect.version,
                Arc::clone(session),
                attached.attachment.epoch,
                connect.receive_maximum,
                connect.maximum_packet_size,
                connect
                    .topic_alias_maximum
                    .min(fabric.mqtt.topic_alias_maximum),
            ),
            fabric: Arc::clone(fabric),
            tenant,
            attached,
        }
    }

    async fn serve<R, W>(
        &mut self,
        read_half: &mut R,
        write_half: &mut W,
        reader: &mut Reader,
        buffer: &mut BytesMut,
        output: &mut Output,
    ) -> End
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let session = Arc::clone(&self.attached.attachment.session);
        let kick = self.attached.attachment.kick.clone();
        let shutdown = self.fabric.shutdown.clone();
        let ended = async {
            tokio::select! {
                status = kick.kicked() => status,
                () = shutdown.cancelled() => stopping(),
            }
        };
        tokio::pin!(ended);
        let mut last_seen = Instant::now();
        let silence = tokio::time::sleep(self.patience.unwrap_or_default());
        tokio::pin!(silence);
        let mut chunk = READ.0;
        // TLS may hold back what it has taken until it is flushed.
        let mut unflushed = false;
        let mut turn = self.fabric.pacer.turn();

        self.delivery.resume(output);
        // CONNECT may have come with more behind it.
        if let Err(end) = self.process(reader, buffer, output) {
            return end;
        }
        loop {
            self.delivery
                .fill(output, &self.fabric.metrics, &self.tenant.losses);
            while output.has_remaining() || unflushed {
                match write_some(write_half, output, &mut unflushed).now_or_never() {
                    Some(Ok(())) => {}
                    Some(Err(_)) => return End::Closed,
                    None => break,
                }
            }
            let room = make_room(buffer, chunk);
            let writable = output.has_remaining() || unflushed;
            let resting = self.publishing.resting_until();
            let may_fill = self.delivery.has_more() && self.delivery.has_room(output);

            // In order: the end, since nothing matters after it. Reading before writing, since
            // acknowledgements are what lets a full window move; writing is not starved by it, as
            // each turn writes above what the socket takes. Then more from the queues, after a
            // turn of the other tasks, and last what only wakes an idle connection.
            tokio::select! {
                biased;
                status = &mut ended => return End::Kicked(status),
                read = read(read_half, buffer), if output.remaining() < STOP_READING && self.publishing.may_take() => {
                    let count = match read {
                        Ok(0) | Err(_) => return End::Closed,
                        Ok(count) => count,
                    };
                    let now = Instant::now();
                    // MQTT orders nothing between connections, but clients on one machine take for
                    // granted that what one of them has subscribed to, another can publish to. So a
                    // PUBLISH after a pause lets those go first that are ready by now.
                    if now - last_seen > PAUSE && buffer.first().is_some_and(|byte| byte >> 4 == PUBLISH) {
                        tokio::task::yield_now().await;
                    }
                    last_seen = now;
                    if count == room {
                        chunk = (chunk * 2).min(READ.1);
                    } else if count < chunk / 4 {
                        chunk = (chunk / 2).max(READ.0);
                    }
                    if let Err(end) = self.process(reader, buffer, output) {
                        return end;
                    }
                }
                () = rested(resting), if resting.is_some() => {
                    // It may have said anything meanwhile; nobody has read it.
                    last_seen = Instant::now();
                    if let Err(end) = self.process(reader, buffer, output) {
                        return end;
                    }
                }
                Some((synced, answers)) = self.publishing.synced(), if self.publishing.is_waiting() => {
                    match synced {
                        Ok(()) => output.append(answers),
                        // The answers claim what is not so. The client sends the messages again.
                        Err(error) => {
                            let status = Status::new(Code::ResourceExhausted, error.to_string());
                            self.refused(status.code, &status.message);
                            return End::Kicked(status);
                        }
                    }
                }
                Some(packets) = self.delivery.synced(), if self.delivery.is_waiting() => {
                    output.append(packets);
                }
                message = self.exchange.next(), if output.remaining() < HIGH_WATER => {
                    self.exchange.write(&message, output);
                }
                written = write_some(write_half, output, &mut unflushed), if writable => {
                    if written.is_err() {
                        return End::Closed;
                    }
                }
                () = tokio::task::yield_now(), if may_fill => {}
                bytes = turn.granted(), if self.delivery.owes() => {
                    self.delivery.grant(bytes);
                }
                () = session.outbox.ready() => {}
                () = &mut silence, if self.patience.is_some() => {
                    let patience = self.patience.unwrap_or_default();
                    if last_seen.elapsed() >= patience {
                        return End::Silent;
                    }
                    silence.as_mut().reset(last_seen + patience);
                }
            }
        }
    }

    /// Handles every packet that is complete. Whatever stops it, what was published before is
    /// handed on.
    fn process(
        &mut self,
        reader: &mut Reader,
        buffer: &mut BytesMut,
        output: &mut Output,
    ) -> Result<(), End> {
        let mut result = match self.publishing.take_held() {
            Some(publish) => self.handle(Packet::Publish(publish), output),
            None => Ok(()),
        };
        while result.is_ok() && !self.publishing.is_resting() {
            result = match reader.next(buffer) {
                Ok(Some(packet)) => self.handle(packet, output),
                Ok(None) => break,
                Err(error) => Err(End::Protocol(error)),
            };
        }
        self.publishing.flush(output);
        self.delivery.settle();
        result
    }

    fn handle(&mut self, packet: Packet, output: &mut Output) -> Result<(), End> {
        match packet {
            Packet::Publish(publish) => self
                .publishing
                .publish(
                    publish,
                    self.manners,
                    &self.fabric.metrics,
                    &mut self.exchange,
                )
                .map_err(End::Protocol)?,
            Packet::PubAck(id) => self.delivery.acknowledge(id).map_err(End::Protocol)?,
            Packet::PubRec { packet_id, refused } => self
                .delivery
                .received(packet_id, refused, output)
                .map_err(End::Protocol)?,
            Packet::PubComp(id) => self.delivery.complete(id).map_err(End::Protocol)?,
            Packet::PubRel(id) => self.publishing.release(id, self.manners, output),
            Packet::Subscribe(subscribe) => {
                self.subscribe(subscribe, output).map_err(End::Protocol)?;
            }
            Packet::Unsubscribe(unsubscribe) => self.unsubscribe(&unsubscribe, output),
            Packet::Ping => output.pong(),
            Packet::Disconnect(disconnect) => {
                let raises = disconnect
                    .session_expiry
                    .is_some_and(|expiry| !expiry.is_zero());
                // MQTT 5.0 section 3.14.2.2.2.
                if raises && self.session_expiry.is_zero() {
                    return Err(End::Protocol(ProtocolError::new(
                        Reason::PROTOCOL_ERROR,
                        "a session expiry in DISCONNECT after none in CONNECT",
                    )));
                }
                return Err(End::Disconnected(disconnect));
            }
            Packet::Connect(_) => {
                return Err(End::Protocol(ProtocolError::new(
                    Reason::PROTOCOL_ERROR,
                    "a second CONNECT",
                )));
            }
            Packet::Auth => {
                return Err(End::Protocol(ProtocolError::new(
                    Reason::PROTOCOL_ERROR,
                    "AUTH without an authentication method",
                )));
            }
        }
        Ok(())
    }

    fn subscribe(
        &mut self,
        subscribe: Subscribe,
        output: &mut Output,
    ) -> Result<(), ProtocolError> {
        let session = Arc::clone(&self.attached.attachment.session);
        let mut reasons = Vec::with_capacity(subscribe.filters.len());
        let mut text = None;
        for wanted in subscribe.filters {
            if exchange::is_reserved_filter(&wanted.filter) {
                let served = self
                    .exchange
                    .subscribe(&wanted.filter, subscribe.identifier);
                reasons.push(match &served {
                    Ok(()) => Reason::SUCCESS,
                    Err(status) => Reason::of_refusal(status),
                });
                if let Err(status) = served {
                    text.get_or_insert(status.message);
                }
                continue;
            }
            let target = match SubscribeTarget::parse(&wanted.filter) {
                Ok(target) => target,
                Err(error) => {
                    text.get_or_insert(error.to_string());
                    reasons.push(Reason::TOPIC_FILTER_INVALID);
                    continue;
                }
            };
            if target.share.is_some() && wanted.no_local {
                // MQTT 5.0 section 3.8.3.1.
                return Err(ProtocolError::new(
                    Reason::PROTOCOL_ERROR,
                    "a shared subscription with no local",
                ));
            }
            let max_qos = wanted.max_qos;
            let request = SubscribeRequest {
                id: session
                    .find(&target)
                    .map_or_else(|| session.free_id(), |subscriber| subscriber.id),
                target,
                max_qos,
                no_local: wanted.no_local,
                retain_as_published: wanted.retain_as_published,
                identifier: subscribe.identifier,
                own_lane: false,
                overflow: Overflow::Default,
                retain: wanted.retain,
                replay: None,
                datagrams: false,
            };
            match self.tenant.subscribe(&session, &self.policy.now(), request) {
                Ok(()) => reasons.push(Reason(max_qos as u8)),
                Err(status) => {
                    reasons.push(
                        match (
                            Reason::of_refusal(&status),
                            self.fabric.mqtt.denied_subscription,
                        ) {
                            (Reason::NOT_AUTHORIZED, DeniedSubscription::Unspecified) => {
                                Reason::UNSPECIFIED
                            }
                            (reason, _) => reason,
                        },
                    );
                    text.get_or_insert(status.message);
                }
            }
        }
        self.delivery.subscriptions_changed();
        output.suback(
            self.version,
            subscribe.packet_id,
            &reasons,
            text.as_deref().filter(|_| self.manners.reasons),
            self.manners.limit,
        );
        Ok(())
    }

    /// Remembers, for `selvedge explain`, why the connection ends.
    fn refused(&self, code: Code, why: &str) {
        let identity = &self.attached.attachment.session.key.identity;
        self.tenant.refused(identity, &Status::new(code, why));
    }

    fn unsubscribe(&mut self, unsubscribe: &Unsubscribe, output: &mut Output) {
        let session = &self.attached.attachment.session;
        let reasons: Vec<Reason> = unsubscribe
            .filters
            .iter()
            .map(|filter| match SubscribeTarget::parse(filter) {
                _ if exchange::is_reserved_filter(filter) => {
                    if self.exchange.unsubscribe(filter) {
                        Reason::SUCCESS
                    } else {
                        Reason::NO_SUBSCRIPTION_EXISTED
                    }
                }
                Err(_) => Reason::TOPIC_FILTER_INVALID,
                Ok(target) => match session.find(&target) {
                    Some(held) if self.tenant.unsubscribe(session, held.id) => Reason::SUCCESS,
                    _ => Reason::NO_SUBSCRIPTION_EXISTED,
                },
            })
            .collect();
        self.delivery.subscriptions_changed();
        output.unsuback(self.version, unsubscribe.packet_id, &reasons);
    }
}

impl End {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Disconnected(_) => "DISCONNECT",
            Self::Closed => "connection closed",
            Self::Protocol(error) => error.what,
            Self::Kicked(_) => "ended by the broker",
            Self::Silent => "keep-alive",
        }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Answer {
            reason: Reason::of_kick(&status),
            text: status.message,
            label: "stopping",
        }
    }
}

fn stopping() -> Status {
    Status::new(Code::Unavailable, "the broker is stopping")
}

async fn rested(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Makes room to read `chunk` bytes, and says how much there is. A connection that reads little keeps no
/// buffer while it waits: [`read`] has a place of its own then.
fn make_room(buffer: &mut BytesMut, chunk: usize) -> usize {
    if buffer.is_empty() && chunk == READ.0 {
        *buffer = BytesMut::new();
        return READ.0;
    }
    if buffer.capacity() - buffer.len() < READ.0 / 4 {
        buffer.reserve(chunk);
    }
    buffer.capacity() - buffer.len()
}

/// Reads into the room of `buffer`, or if that has none at all, makes it as large as what there is to
/// read, up to the least of [`READ`]. Dropping the future loses nothing.
async fn read<R: AsyncRead + Unpin>(
    reader: &mut R,
    buffer: &mut BytesMut,
) -> std::io::Result<usize> {
    if buffer.capacity() > 0 {
        return reader.read_buf(buffer).await;
    }
    poll_fn(|context| {
        // On the stack, so that it is no part of what an idle connection holds.
        let mut place = [MaybeUninit::<u8>::uninit(); READ.0];
        let mut place = ReadBuf::uninit(&mut place);
        ready!(Pin::new(&mut *reader).poll_read(context, &mut place))?;
        buffer.extend_from_slice(place.filled());
        Poll::Ready(Ok(place.filled().len()))
    })
    .await
}

/// Writes what the transport takes at once, then flushes. Dropping the future loses nothing.
async fn write_some<W: AsyncWrite + Unpin>(
    writer: &mut W,
    output: &mut Output,
    unflushed: &mut bool,
) -> std::io::Result<()> {
    if output.has_remaining() {
        if writer.write_buf(output).await? == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        *unflushed = true;
    } else {
        writer.flush().await?;
        *unflushed = false;
    }
    Ok(())
}
