//! One connection to a remote, the same for MQTT 3.1.1 and MQTT 5: requests go in, events come out.
//!
//! rumqttc's codec reads and writes the packets; its event loop is not used. That loop chooses packet
//! ids itself and answers PUBREL before the application hears of it, and exactly once needs both in the
//! hands of whoever owns the journal. Reading and writing are tasks of their own, so that neither waits
//! for the other, and requests are only ever tried, so that the bridge waits for neither.

use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustls::pki_types::ServerName;
use selvedge_certs::{Credentials, ServerIdentity, TrustAnchors, tcp_client_config};
use selvedge_proto::message::Qos;
use selvedge_proto::topic::TopicFilter;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::config::{RemoteConfig, RemoteTls};
use crate::forward::Packet;
use codec::Codec;

mod codec;

/// QoS 1 and 2 messages that may be unacknowledged in either direction: enough to fill a long link
/// while each waits for two disks, and few enough to send again after a reconnect.
pub(crate) const WINDOW: u16 = 256;

/// Packets that may wait for the network. Twice the window holds every publish and, from a remote
/// that keeps to the window, every acknowledgement; when it is full the bridge tries again once there
/// is room.
const REQUESTS: usize = 2 * WINDOW as usize + 8;

/// Events that may wait for the bridge. Few, since each may hold a message; when it is full nothing
/// more is read from the remote.
const EVENTS: usize = 16;

/// Bytes written at once.
const WRITE: usize = 64 * 1024;

/// How long TCP, TLS and the MQTT handshake may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What the remote allows on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// It has kept the session.
    pub(crate) session_present: bool,
    /// QoS 1 and 2 messages it takes before it acknowledges.
    pub(crate) receive_maximum: u16,
    /// The largest packet it takes, in bytes.
    pub(crate) packet_bytes: usize,
    /// The best quality of service it takes.
    pub(crate) qos: Qos,
    /// It keeps retained messages.
    pub(crate) retain: bool,
    /// The keep-alive it insists on.
    pub(crate) keep_alive: Option<Duration>,
}

/// What happened on the connection.
#[derive(Debug)]
pub(crate) enum Event {
    /// The remote accepted the connection.
    Connected(Limits),
    /// The remote's answer to each subscription, in order.
    Subscribed(Vec<Result<(), String>>),
    /// A message; it wants an acknowledgement unless it is of QoS 0.
    Message(Box<Incoming>),
    /// The remote has answered for a QoS 1 message, perhaps with a refusal.
    Acknowledged(u16, Result<(), Refusal>),
    /// The remote has received a QoS 2 message, or refused it.
    Received(u16, Result<(), Refusal>),
    /// The remote releases a QoS 2 message of its own: it will not send it again.
    Released(u16),
    /// The remote has forgotten the id of a QoS 2 message.
    Completed(u16),
    /// A sign of life.
    Alive,
    /// The connection is over.
    Closed(String),
}

/// A message of the remote and how to acknowledge it.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) packet: Packet,
    pub(crate) receipt: Receipt,
}

/// What an acknowledgement needs. It is valid on the connection that the message came by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Receipt {
    pub(crate) packet_id: u16,
    pub(crate) qos: Qos,
}

/// Why the remote did not take a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    /// It may take the message later.
    pub(crate) passing: bool,
}

/// Why no connection could be tried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// A certificate, key or trust anchor cannot be loaded.
    #[error(transparent)]
    Load(#[from] selvedge_certs::LoadError),
    /// They do not make a TLS configuration.
    #[error(transparent)]
    Tls(#[from] selvedge_certs::TlsError),
    /// The host is no name that a certificate can carry.
    #[error("expected a host name that a certificate can carry, found {0:?}")]
    Name(String),
    /// The password cannot be read.
    #[error("cannot read password_file: {0}")]
    Password(#[source] std::io::Error),
}

/// The sending half; the connection ends with it.
#[derive(Debug)]
pub(crate) struct Link {
    codec: Codec,
    requests: mpsc::Sender<Request>,
    keep_alive: watch::Sender<Duration>,
    _reader: AbortOnDropHandle<()>,
}

/// What the writer is told.
#[derive(Debug)]
enum Request {
    Write(Bytes),
    /// The last packet: the connection is closed after it.
    Close(Bytes),
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tried {
    /// It is on its way.
    Taken,
    /// There is no room: try again when [`Link::writable`] says so.
    Full,
}

impl Link {
    /// Begins to connect; the first event says what came of it.
    pub(crate) async fn open(
        config: &RemoteConfig,
    ) -> Result<(Self, mpsc::Receiver<Event>), LinkError> {
        let login = match &config.login {
            Some((user, file)) => Some((user.clone(), read_password(file).await?)),
            None => None,
        };
        let tls = match &config.tls {
            Some(tls) => {
                let name = ServerName::try_from(config.host.clone())
                    .map_err(|_| LinkError::Name(config.host.clone()))?;
                Some((tls_config(tls)?, name))
            }
            None => None,
        };
        let (events, receiver) = mpsc::channel(EVENTS);
        let (requests, to_write) = mpsc::channel(REQUESTS);
        let (keep_alive, pinged) = watch::channel(config.keep_alive);
        let codec = Codec::new(config.version, config.max_packet_bytes);
        let connect = codec.connect(config, login);
        let address = match config.host.strip_prefix('[') {
            Some(v6) => (v6.trim_end_matches(']').to_owned(), config.port),
            None => (config.host.clone(), config.port),
        };
        let drive = Drive {
            codec,
            events,
            to_write,
            pinged,
        };
        let reader = tokio::spawn(drive.run(address, tls, connect));
        let link = Self {
            codec,
            requests,
            keep_alive,
            _reader: AbortOnDropHandle::new(reader),
        };
        Ok((link, receiver))
    }

    /// Probes an idle connection so often from now on.
    pub(crate) fn set_keep_alive(&self, keep_alive: Duration) {
        self.keep_alive.send_replace(keep_alive);
    }

    /// Asks for messages, all in one request.
    pub(crate) fn try_subscribe(&self, filters: &[(TopicFilter, Qos)], resumable: bool) -> Tried {
        self.request(self.codec.subscribe(filters, resumable))
    }

    /// A PUBLISH as it will be written: its length is what the remote's limit is about.
    pub(crate) fn encode(
        &self,
        packet: &Packet,
        packet_id: u16,
        duplicate: bool,
    ) -> Result<Bytes, String> {
        self.codec.publish(packet, packet_id, duplicate)
    }

    /// Writes what [`Self::encode`] gave.
    pub(crate) fn try_publish(&self, encoded: Bytes) -> Tried {
        self.request(encoded)
    }

    /// Sends PUBACK or PUBREC.
    pub(crate) fn try_ack(&self, receipt: Receipt) -> Tried {
        self.request(self.codec.acknowledge(receipt))
    }

    /// Sends PUBREL.
    pub(crate) fn try_release(&self, packet_id: u16) -> Tried {
        self.request(self.codec.release(packet_id))
    }

    /// Sends PUBCOMP.
    pub(crate) fn try_complete(&self, packet_id: u16) -> Tried {
        self.request(self.codec.complete(packet_id))
    }

    /// Says goodbye after everything requested so far.
    pub(crate) fn try_disconnect(&self) -> Tried {
        match self
            .requests
            .try_send(Request::Close(self.codec.disconnect()))
        {
            Err(mpsc::error::TrySendError::Full(_)) => Tried::Full,
            _ => Tried::Taken,
        }
    }

    /// Returns when there is room for a request.
    pub(crate) async fn writable(&self) {
        if self.requests.reserve().await.is_err() {
            // The connection is over, which is an event.
            std::future::pending::<()>().await;
        }
    }

    fn request(&self, packet: Bytes) -> Tried {
        match self.requests.try_send(Request::Write(packet)) {
            Err(mpsc::error::TrySendError::Full(_)) => Tried::Full,
            // After the end of the connection nothing is written, and the event says so.
            _ => Tried::Taken,
        }
    }
}

impl Receipt {
    /// Whether the remote waits for an acknowledgement.
    pub(crate) fn is_wanted(self) -> bool {
        self.qos > Qos::AtMostOnce
    }
}

async fn read_password(file: &Path) -> Result<String, LinkError> {
    let text = tokio::fs::read_to_string(file).await;
    let text = text.map_err(LinkError::Password)?;
    // Editors end a file with a line break, and no password does.
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn tls_config(tls: &RemoteTls) -> Result<std::sync::Arc<rustls::ClientConfig>, LinkError> {
    let anchors = TrustAnchors::from_file(&tls.ca)?;
    let credentials = match &tls.identity {
        Some((cert, key)) => Some(Credentials::from_files(cert, key)?),
        None => None,
    };
    let credentials = credentials.as_ref();
    Ok(tcp_client_config(
        credentials,
        &anchors,
        ServerIdentity::Any,
        &[],
    )?)
}

/// The reading task, which makes the connection and starts the writing one.
struct Drive {
    codec: Codec,
    events: mpsc::Sender<Event>,
    to_write: mpsc::Receiver<Request>,
    pinged: watch::Receiver<Duration>,
}

type Tls = (std::sync::Arc<rustls::ClientConfig>, ServerName<'static>);

impl Drive {
    async fn run(self, address: (String, u16), tls: Option<Tls>, connect: Bytes) {
        let events = self.events.clone();
        let until = tokio::time::Instant::now() + CONNECT_TIMEOUT;
        let opened = tokio::time::timeout_at(until, async {
            let stream = TcpStream::connect((&*address.0, address.1)).await?;
            stream.set_nodelay(true)?;
            std::io::Result::Ok(stream)
        });
        let reason = match opened.await {
            Err(_) => format!("no answer within {CONNECT_TIMEOUT:?}"),
            Ok(Err(error)) => format!("cannot connect: {error}"),
            Ok(Ok(stream)) => match tls {
                None => self.converse(stream, connect, until).await,
                Some((config, name)) => {
                    let connector = tokio_rustls::TlsConnector::from(config);
                    let handshake = connector.connect(name, stream);
                    match tokio::time::timeout_at(until, handshake).await {
                        Err(_) => format!("no TLS answer within {CONNECT_TIMEOUT:?}"),
                        Ok(Err(error)) => format!("TLS: {error}"),
                        Ok(Ok(stream)) => self.converse(stream, connect, until).await,
                    }
                }
            },
        };
        // Nobody listens when the bridge has let go of the connection.
        let _ = events.send(Event::Closed(reason)).await;
    }

    /// Reads until the connection ends, and says why.
    async fn converse<S>(self, stream: S, connect: Bytes, until: tokio::time::Instant) -> String
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let Self {
            codec,
            events,
            to_write,
            pinged,
        } = self;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let greeted = async {
            writer.write_all(&connect).await?;
            writer.flush().await
        };
        match tokio::time::timeout_at(until, greeted).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return format!("cannot send: {error}"),
            Err(_) => return format!("no answer within {CONNECT_TIMEOUT:?}"),
        }
        let mut to_write = Some((writer, to_write, pinged));
        let mut writing = None;
        let mut received = BytesMut::with_capacity(8 * 1024);
        loop {
            match codec.decode(&mut received) {
                Ok(Some(event)) => {
                    if matches!(event, Event::Connected(_)) {
                        // Nothing may be sent before the remote has accepted.
                        let Some((writer, requests, pinged)) = to_write.take() else {
                            return "the remote accepted the connection twice".to_owned();
                        };
                        let write = write(codec, writer, requests, pinged);
                        writing = Some(AbortOnDropHandle::new(tokio::spawn(write)));
                    } else if to_write.is_some() {
                        return "expected CONNACK first, found another packet".to_owned();
                    }
                    if events.send(event).await.is_err() {
                        return String::new();
                    }
                    continue;
                }
                Ok(None) => {}
                Err(reason) => return reason,
            }
            let read = reader.read_buf(&mut received);
            let read = async {
                match to_write {
                    Some(_) => tokio::time::timeout_at(until, read)
                        .await
                        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())),
                    None => read.await,
                }
            };
            let ended = async {
                match &mut writing {
                    Some(writing) => writing.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                read = read => match read {
                    Ok(0) => return "the remote closed the connection".to_owned(),
                    Ok(_) => {}
                    Err(error) => return format!("cannot receive: {error}"),
                },
                ended = ended => return match ended {
                    Ok(Ok(())) => "the bridge said goodbye".to_owned(),
                    Ok(Err(error)) => {
                        // What the remote said last tells more than that it no longer listens.
                        match tokio::time::timeout(Duration::from_millis(200), reader.read_buf(&mut received)).await {
                            Ok(Err(last)) => format!("cannot receive: {last}"),
                            _ => format!("cannot send: {error}"),
                        }
                    }
                    Err(_) => "the writing task has ended".to_owned(),
                },
            }
        }
    }
}

/// Writes what is asked for, and a ping when the keep-alive says so.
async fn write<W: AsyncWrite + Unpin>(
    codec: Codec,
    mut writer: W,
    mut requests: mpsc::Receiver<Request>,
    mut pinged: watch::Receiver<Duration>,
) -> std::io::Result<()> {
    let mut buffer = BytesMut::new();
    // Also while other packets go out: the answer to it is the sign of life that is waited for.
    let early = |keep_alive: Duration| keep_alive.mul_f64(0.75);
    let mut next_ping = tokio::time::Instant::now() + early(*pinged.borrow_and_update());
    loop {
        let mut close = false;
        tokio::select! {
            request = requests.recv() => match request {
                Some(Request::Write(packet)) => buffer.extend_from_slice(&packet),
                Some(Request::Close(packet)) => {
                    buffer.extend_from_slice(&packet);
                    close = true;
                }
                None => return Ok(()),
            },
            () = tokio::time::sleep_until(next_ping) => {
                buffer.extend_from_slice(&codec.ping());
                next_ping = tokio::time::Instant::now() + early(*pinged.borrow());
            }
            Ok(()) = pinged.changed() => {
                next_ping = tokio::time::Instant::now() + early(*pinged.borrow_and_update());
                continue;
            }
        }
        while !close
            && buffer.len() < WRITE
            && let Ok(request) = requests.try_recv()
        {
            let (packet, last) = match request {
                Request::Write(packet) => (packet, false),
                Request::Close(packet) => (packet, true),
            };
            buffer.extend_from_slice(&packet);
            close = last;
        }
        writer.write_all(&buffer).await?;
        writer.flush().await?;
        buffer.clear();
        if buffer.capacity() > 4 * WRITE {
            // One large message is not to cost its size for ever.
            buffer = BytesMut::new();
        }
        if close {
            return writer.shutdown().await;
        }
    }
}

#[cfg(test)]
mod tests;
