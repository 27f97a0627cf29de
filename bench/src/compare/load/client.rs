//! The clients: one lean implementation for each protocol, which all write what was encoded before
//! and count what they read.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, SendStream, TransportConfig,
    VarInt,
};
use rustls::pki_types::ServerName;
use selvedge_certs::{
    Authority, IssueRequest, ServerIdentity, TrustAnchors, quic_client_config, tcp_client_config,
};
use selvedge_proto::status::Code;
use selvedge_proto::{ALPN, MAX_UDP_PAYLOAD, UDP_PAYLOAD_STEP};
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::framing::{Found, Framing, Splitter};
use super::locked;
use crate::compare::job::{Job, Protocol, Service};
use crate::compare::pki::{CLIENT_SITE, SERVER_NAME, TENANT};

mod mqtt;
mod nats;
mod relay;
mod selvedge;

/// Parts of a stream that are read at once; a part is about a packet.
const CHUNKS: usize = 64;
/// Bytes that are read from a TLS connection at once.
const READ: usize = 64 * 1024;
/// Kernel buffer asked for on a UDP socket.
const SOCKET_BUFFER: usize = 4 << 20;
/// Time to tell servers that connections end.
const FAREWELL: Duration = Duration::from_millis(300);
/// Connections that share a UDP socket when they are many and do nothing.
const IDLE_ON_A_SOCKET: usize = 50;

type Tls = TlsStream<TcpStream>;

/// Makes clients, each with a certificate of its own.
pub(super) struct Clients {
    protocol: Protocol,
    address: SocketAddr,
    run: String,
    authority: Authority,
    trust: TrustAnchors,
    /// For clients that share a socket, and how many do.
    shared: Mutex<Option<(Endpoint, usize)>>,
    /// What has to be closed, since a QUIC connection does not end with its process.
    opened: Mutex<Vec<(Endpoint, Connection)>>,
}

/// A client's name and its TLS configuration, so that a handshake can be timed without them.
pub(super) struct Prepared {
    name: String,
    tls: Configured,
}

enum Configured {
    Quic(ClientConfig),
    Tcp(Arc<rustls::ClientConfig>),
}

/// What a subscriber asks for.
pub(super) struct Wish {
    /// The topic's number, all that a relay looks at.
    pub(super) group: u32,
    /// The filters in the notation of MQTT.
    pub(super) filters: Vec<String>,
    pub(super) service: Service,
}

/// Where bytes come from.
enum Source {
    Quic(RecvStream),
    Tls(ReadHalf<Tls>, Vec<u8>),
}

/// Where bytes go.
enum Sink {
    Quic(SendStream),
    Tls(WriteHalf<Tls>),
}

/// A message that is sent again and again.
struct Template {
    frame: Bytes,
    /// Where the payload starts.
    payload: usize,
    /// Where the packet id is.
    id: Option<usize>,
}

/// A connection that has subscribed.
pub(super) struct Subscriber {
    protocol: Protocol,
    acknowledges: bool,
    /// QUIC: a delivery stream comes with the first message.
    source: Option<Source>,
    /// Where questions and messages are answered.
    answers: Option<Sink>,
    /// Kept because the connection ends with them.
    held: Held,
}

#[derive(Default)]
struct Held {
    quic: Option<(Endpoint, Connection)>,
    _control: (Option<SendStream>, Option<RecvStream>),
}

/// A connection that can publish.
pub(super) struct Publisher {
    sink: Sink,
    template: Template,
    /// Many copies of the template, for messages without ids.
    batch: Bytes,
    next_id: u16,
    /// What the server said in the meantime.
    pub(super) heard: Arc<Heard>,
    /// What is read until the connection ends.
    pub(super) listening: Option<Listening>,
    _held: Held,
}

/// What a publisher has to listen to.
pub(super) struct Listening(Ear);

enum Ear {
    Control(selvedge::Control),
    Tls(Source, Framing),
}

/// What a server said to a publisher.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Messages acknowledged.
    pub(super) acks: AtomicU64,
    /// Questions not yet answered.
    pings: AtomicU64,
}

impl Clients {
    pub(super) fn new(job: &Job) -> anyhow::Result<Self> {
        let authority = Authority::load(&job.pki).context("load the authority")?;
        let trust = TrustAnchors::from_pem(authority.ca_pem().as_bytes())?;
        Ok(Self {
            protocol: job.protocol,
            address: job.address,
            run: job.run.clone(),
            authority,
            trust,
            shared: Mutex::default(),
            opened: Mutex::default(),
        })
    }

    /// Makes a certificate and the configuration with it.
    pub(super) fn prepare(&self, name: &str) -> anyhow::Result<Prepared> {
        let name = format!("{}-{name}", self.run);
        let tls = match self.protocol {
            Protocol::Selvedge | Protocol::Relay => {
                Configured::Quic(quic_config(&self.authority, &self.trust, &name)?)
            }
            Protocol::Nats | Protocol::Mqtt => {
                let request = IssueRequest::client(TENANT, CLIENT_SITE, &name);
                let credentials = self.authority.issue(&request)?.credentials();
                let any = ServerIdentity::Any;
                Configured::Tcp(tcp_client_config(
                    Some(&credentials),
                    &self.trust,
                    any,
                    &[],
                )?)
            }
        };
        Ok(Prepared { name, tls })
    }

    /// Connects and subscribes, and returns when the server has said that it is done.
    pub(super) async fn subscribe(
        &self,
        client: Prepared,
        wish: &Wish,
    ) -> anyhow::Result<Subscriber> {
        let endpoint = endpoint()?;
        self.subscribe_on(&endpoint, client, wish).await
    }

    /// As [`Self::subscribe`], with a socket that is shared with other clients if it is UDP.
    pub(super) async fn subscribe_idle(
        &self,
        client: Prepared,
        wish: &Wish,
    ) -> anyhow::Result<Subscriber> {
        let endpoint = {
            let mut shared = locked(&self.shared);
            match &mut *shared {
                Some((endpoint, users)) if *users < IDLE_ON_A_SOCKET => {
                    *users += 1;
                    endpoint.clone()
                }
                _ => {
                    let endpoint = endpoint()?;
                    *shared = Some((endpoint.clone(), 1));
                    endpoint
                }
            }
        };
        self.subscribe_on(&endpoint, client, wish).await
    }

    async fn subscribe_on(
        &self,
        endpoint: &Endpoint,
        client: Prepared,
        wish: &Wish,
    ) -> anyhow::Result<Subscriber> {
        let name = client.name.clone();
        let subscriber = async {
            match self.protocol {
                Protocol::Selvedge => {
                    let connection = self.quic(endpoint, client.tls).await?;
                    selvedge::subscribe(endpoint, connection, &client.name, wish).await
                }
                Protocol::Relay => {
                    let connection = self.quic(endpoint, client.tls).await?;
                    relay::subscribe(endpoint, connection, wish.group).await
                }
                Protocol::Nats => {
                    let stream = self.tcp().await?;
                    nats::subscribe(stream, client.tls, &wish.filters).await
                }
                Protocol::Mqtt => {
                    let stream = tls(self.tcp().await?, client.tls).await?;
                    mqtt::subscribe(stream, &client.name, wish).await
                }
            }
        };
        subscriber
            .await
            .with_context(|| format!("connect the subscriber {name}"))
    }

    /// Connects a publisher on a topic.
    pub(super) async fn publish(
        &self,
        client: Prepared,
        group: u32,
        topic: &str,
        size: usize,
        service: Service,
    ) -> anyhow::Result<Publisher> {
        let name = client.name.clone();
        let publisher = async {
            match self.protocol {
                Protocol::Selvedge => {
                    let endpoint = endpoint()?;
                    let connection = self.quic(&endpoint, client.tls).await?;
                    let name = &client.name;
                    selvedge::publish(&endpoint, connection, name, topic, size, service).await
                }
                Protocol::Relay => {
                    let endpoint = endpoint()?;
                    let connection = self.quic(&endpoint, client.tls).await?;
                    relay::publish(&endpoint, connection, group, size).await
                }
                Protocol::Nats => {
                    let stream = self.tcp().await?;
                    nats::publish(stream, client.tls, topic, size).await
                }
                Protocol::Mqtt => {
                    let stream = tls(self.tcp().await?, client.tls).await?;
                    mqtt::publish(stream, &client.name, topic, size, service).await
                }
            }
        };
        publisher
            .await
            .with_context(|| format!("connect the publisher {name}"))
    }

    async fn quic(&self, endpoint: &Endpoint, tls: Configured) -> anyhow::Result<Connection> {
        let Configured::Quic(config) = tls else {
            anyhow::bail!("expected a configuration for QUIC");
        };
        let connecting = endpoint.connect_with(config, self.address, SERVER_NAME)?;
        let connection = connecting.await.context("handshake")?;
        locked(&self.opened).push((endpoint.clone(), connection.clone()));
        Ok(connection)
    }

    /// Ends all connections in good order.
    pub(super) async fn close(&self) {
        let opened = std::mem::take(&mut *locked(&self.opened));
        for (_, connection) in &opened {
            connection.close(Code::Ok.to_quic().into(), b"done");
        }
        let idle = async {
            for (endpoint, _) in &opened {
                endpoint.wait_idle().await;
            }
        };
        // Whoever has not heard it by then has lost the connection.
        let _ = tokio::time::timeout(FAREWELL, idle).await;
    }

    async fn tcp(&self) -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await.context("connect")?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// The settings of the client library.
fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .initial_rtt(Duration::from_millis(100))
        .keep_alive_interval(Some(Duration::from_secs(5)))
        .max_idle_timeout(Some(VarInt::from_u32(15_000).into()))
        .max_concurrent_bidi_streams(VarInt::from_u32(1024))
        .max_concurrent_uni_streams(VarInt::from_u32(1024));
    let mut acks = quinn::AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(25));
    transport.ack_frequency_config(Some(acks));
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_UDP_PAYLOAD)
        .minimum_change(UDP_PAYLOAD_STEP);
    transport.mtu_discovery_config(Some(mtu));
    transport
}

/// A UDP socket with as large a buffer as the broker asks for. With the default of about 200 KiB a
/// subscriber that is not scheduled for a millisecond loses packets, and the loss of the load process
/// would be counted against the server.
fn endpoint() -> io::Result<Endpoint> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(SocketProtocol::UDP))?;
    // Best effort: the system may allow less.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&address.into())?;
    let runtime = quinn::default_runtime().ok_or_else(|| io::Error::other("no runtime"))?;
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(MAX_UDP_PAYLOAD)
        .map_err(io::Error::other)?;
    Endpoint::new(config, None, socket.into(), runtime)
}

/// The configuration of a QUIC client with a certificate of its own.
pub(super) fn quic_config(
    authority: &Authority,
    trust: &TrustAnchors,
    name: &str,
) -> anyhow::Result<ClientConfig> {
    let request = IssueRequest::client(TENANT, CLIENT_SITE, name);
    let credentials = authority.issue(&request)?.credentials();
    let crypto = quic_client_config(credentials, trust, &[ALPN])?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

async fn tls(stream: TcpStream, tls: Configured) -> anyhow::Result<Tls> {
    let Configured::Tcp(config) = tls else {
        anyhow::bail!("expected a configuration for TCP");
    };
    let name = ServerName::try_from(SERVER_NAME).context("the server's name")?;
    TlsConnector::from(config)
        .connect(name, stream)
        .await
        .context("handshake")
}

impl Source {
    /// Reads what is there. `false` at the end.
    async fn read(&mut self, splitter: &mut Splitter, found: &mut Found) -> io::Result<bool> {
        match self {
            Self::Quic(stream) => {
                let mut chunks = [const { Bytes::new() }; CHUNKS];
                let Some(count) = stream.read_chunks(&mut chunks).await? else {
                    return Ok(false);
                };
                for chunk in &chunks[..count] {
                    splitter.feed(chunk, found)?;
                }
            }
            Self::Tls(stream, buffer) => {
                let count = stream.read(buffer).await?;
                if count == 0 {
                    return Ok(false);
                }
                splitter.feed(&buffer[..count], found)?;
            }
        }
        Ok(true)
    }

    fn tls(stream: ReadHalf<Tls>) -> Self {
        Self::Tls(stream, vec![0; READ])
    }
}

impl Sink {
    async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        match self {
            Self::Quic(stream) => stream.write_chunk(bytes).await.map_err(io::Error::from),
            Self::Tls(stream) => {
                stream.write_all(&bytes).await?;
                stream.flush().await
            }
        }
    }
}

impl Subscriber {
    /// Reads until the connection ends, and tells what was found in each read.
    pub(super) async fn run(
        mut self,
        stamped: bool,
        mut each: impl FnMut(&Found),
    ) -> io::Result<()> {
        let mut found = Found::default();
        let mut lane = 0;
        let (mut source, mut splitter) = match self.source.take() {
            Some(source) => {
                let framing = match self.protocol {
                    Protocol::Nats => Framing::Nats,
                    Protocol::Mqtt => Framing::Mqtt,
                    Protocol::Selvedge | Protocol::Relay => Framing::Lane,
                };
                (source, Splitter::new(framing, stamped))
            }
            None => {
                let Some((_, connection)) = &self.held.quic else {
                    return Err(io::Error::other("nothing to read from"));
                };
                let mut stream = connection.accept_uni().await?;
                let rest;
                (lane, rest) = selvedge::lane(&mut stream).await?;
                let mut splitter = Splitter::new(Framing::Lane, stamped);
                splitter.feed(&rest, &mut found)?;
                (Source::Quic(stream), splitter)
            }
        };
        let mut total = 0;
        let mut open = true;
        loop {
            if found.messages > 0 {
                each(&found);
            }
            total += found.messages;
            self.answer(&found, lane, total).await?;
            found.clear();
            if !open {
                return Ok(());
            }
            open = source.read(&mut splitter, &mut found).await?;
        }
    }

    async fn answer(&mut self, found: &Found, lane: u32, total: u64) -> io::Result<()> {
        let Some(sink) = &mut self.answers else {
            return Ok(());
        };
        let bytes = match self.protocol {
            Protocol::Selvedge if self.acknowledges && found.messages > 0 => {
                selvedge::delivery_ack(lane, total)
            }
            Protocol::Mqtt if !found.ids.is_empty() => mqtt::acks(&found.ids),
            Protocol::Nats if found.pings > 0 => Bytes::from_static(nats::PONG),
            _ => return Ok(()),
        };
        sink.send(bytes).await
    }
}

impl Publisher {
    fn new(sink: Sink, template: Template, per_write: usize) -> Self {
        let batch = template.frame.repeat(per_write);
        Self {
            sink,
            template,
            batch: batch.into(),
            next_id: 1,
            heard: Arc::default(),
            listening: None,
            _held: Held::default(),
        }
    }

    /// Messages that one write takes.
    pub(super) fn per_write(&self) -> usize {
        self.batch.len() / self.template.frame.len()
    }

    /// Writes messages, at most as many as one write takes.
    pub(super) async fn send(&mut self, messages: usize) -> io::Result<()> {
        self.pong().await?;
        let length = messages * self.template.frame.len();
        let Some(id) = self.template.id else {
            return self.sink.send(self.batch.slice(..length)).await;
        };
        let mut buffer = BytesMut::from(&self.batch[..length]);
        for frame in buffer.chunks_exact_mut(self.template.frame.len()) {
            frame[id..id + 2].copy_from_slice(&self.next_id.to_be_bytes());
            // Zero is no id.
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        }
        self.sink.send(buffer.freeze()).await
    }

    /// Writes one message for each stamp.
    pub(super) async fn send_stamped(
        &mut self,
        stamps: impl Iterator<Item = u64>,
    ) -> io::Result<()> {
        self.pong().await?;
        let mut buffer = BytesMut::new();
        let payload = self.template.payload;
        for stamp in stamps {
            buffer.extend_from_slice(&self.template.frame[..payload]);
            buffer.put_u64(stamp);
            buffer.extend_from_slice(&self.template.frame[payload + 8..]);
        }
        self.sink.send(buffer.freeze()).await
    }

    async fn pong(&mut self) -> io::Result<()> {
        if self.heard.pings.load(Ordering::Relaxed) > 0
            && self.heard.pings.swap(0, Ordering::Relaxed) > 0
        {
            self.sink.send(Bytes::from_static(nats::PONG)).await?;
        }
        Ok(())
    }
}

impl Listening {
    /// Listens until the connection ends, and calls `acked` when messages were acknowledged.
    pub(super) async fn run(self, heard: &Heard, acked: impl Fn()) -> io::Result<()> {
        let (mut source, framing) = match self.0 {
            Ear::Control(control) => return control.run(heard, acked).await,
            Ear::Tls(source, framing) => (source, framing),
        };
        let mut splitter = Splitter::new(framing, false);
        let mut found = Found::default();
        while source.read(&mut splitter, &mut found).await? {
            heard.pings.fetch_add(found.pings, Ordering::Relaxed);
            if found.acks > 0 {
                heard.acks.fetch_add(found.acks, Ordering::Release);
                acked();
            }
            found.clear();
        }
        Ok(())
    }
}
