//! One attempt to connect: address, handshake, hello and welcome.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::{ConnectionError, VarInt};
use selvedge_certs::{
    Identity, ReloadableCredentials, explain_connection_error, quic_client_config,
};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use selvedge_proto::{MAX_UDP_PAYLOAD, UDP_PAYLOAD_STEP};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::ConnectError;
use crate::datagram;
use crate::framed::{FramedError, FramedReader};
use crate::options::{Endpoint, Options, whole_seconds};

/// Calls and inferences that the broker may have open to this client at once.
pub(crate) const MAX_INCOMING_CALLS: u32 = 1024;
/// Delivery lanes that the broker may have open at once: one for each subscription that owns its
/// lane, and the shared ones.
const MAX_DELIVERY_LANES: u32 = 1024;
/// Round trip assumed before one is measured. A third of what QUIC recommends: a lost first packet,
/// or one sent while the broker was starting, is repeated after 300 ms instead of a second.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Time between attempts at the addresses of one host.
const STAGGER: Duration = Duration::from_millis(200);
/// Addresses of one host that are tried.
const MAX_ADDRESSES: usize = 8;

/// Kernel buffer asked for on the UDP socket. With the default of about 200 KiB a client that is not
/// scheduled for a millisecond at full speed loses packets, which QUIC then takes for congestion.
const SOCKET_BUFFER: usize = 4 << 20;

/// Opens an endpoint for connections to brokers.
fn open(address: SocketAddr) -> std::io::Result<quinn::Endpoint> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    // Best effort: the system may allow less.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&address.into())?;
    let runtime =
        quinn::default_runtime().ok_or_else(|| std::io::Error::other("no async runtime"))?;
    let mut config = quinn::EndpointConfig::default();
    config
        .max_udp_payload_size(MAX_UDP_PAYLOAD)
        .map_err(std::io::Error::other)?;
    quinn::Endpoint::new(config, None, socket.into(), runtime)
}

/// Makes connections to the broker.
pub(crate) struct Connector {
    options: Options,
    credentials: ReloadableCredentials,
    config: quinn::ClientConfig,
    /// Endpoints made so far, for IPv4 and IPv6.
    endpoints: [Option<quinn::Endpoint>; 2],
}

/// A connection that the broker has welcomed.
pub(crate) struct Established {
    pub(crate) connection: quinn::Connection,
    pub(crate) control_send: quinn::SendStream,
    pub(crate) control_frames: FramedReader,
    pub(crate) welcome: wire::Welcome,
}

/// An attempt that failed, and what the broker advised.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: ConnectError,
    /// Another broker to use.
    pub(crate) alternate: Option<Endpoint>,
    /// Reconnect no sooner.
    pub(crate) retry_after: Option<Duration>,
}

impl Failed {
    pub(crate) fn lost(reason: String) -> Self {
        ConnectError::Lost { reason }.into()
    }

    pub(crate) fn goodbye(goodbye: wire::Goodbye) -> Self {
        let status = goodbye.status.map(Status::from);
        let status = status.unwrap_or_else(|| Status::new(Code::Unavailable, "no reason given"));
        let own = goodbye.retry_after_ms;
        Self {
            retry_after: own
                .map(|ms| Duration::from_millis(ms.into()))
                .or(status.retry_after),
            // An alternate that cannot be read is as good as none.
            alternate: Endpoint::parse(&goodbye.alternate).ok(),
            error: ConnectError::Goodbye(status),
        }
    }

    /// Whether another connection has taken the session over.
    pub(crate) fn is_takeover(&self) -> bool {
        matches!(&self.error, ConnectError::Goodbye(status) if status.code == Code::Aborted)
    }

    /// Whether trying again can only end the same way.
    pub(crate) fn is_final(&self) -> bool {
        match &self.error {
            ConnectError::Goodbye(status) => !matches!(
                status.code,
                Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded
            ),
            ConnectError::Resolve { .. }
            | ConnectError::Unreachable { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Lost { .. } => false,
            ConnectError::Incomplete { .. }
            | ConnectError::Options { .. }
            | ConnectError::Tls { .. }
            | ConnectError::Refused { .. }
            | ConnectError::Protocol { .. } => true,
        }
    }
}

impl From<ConnectError> for Failed {
    fn from(error: ConnectError) -> Self {
        Self {
            error,
            alternate: None,
            retry_after: None,
        }
    }
}

impl Connector {
    pub(crate) fn new(options: &Options) -> Result<Self, ConnectError> {
        let credentials = options
            .credentials
            .clone()
            .ok_or(ConnectError::Incomplete {
                missing: "certificate and key",
                remedy: "use Options::credentials or Options::identity_files",
            })?;
        let trust = options.trust.as_ref().ok_or(ConnectError::Incomplete {
            missing: "trust anchors",
            remedy: "use Options::trust or Options::identity_files",
        })?;
        let wrong = |reason: String| ConnectError::Options { reason };
        let session = options.session.len();
        if !(1..=selvedge_proto::MAX_SESSION_NAME).contains(&session) {
            return Err(wrong(format!(
                "expected a session name of 1 to {} bytes, found {session}",
                selvedge_proto::MAX_SESSION_NAME
            )));
        }
        let crypto = quic_client_config(&credentials, trust, &[selvedge_proto::ALPN])
            .map_err(|error| wrong(error.to_string()))?;
        let mut transport = quinn::TransportConfig::default();
        transport
            .initial_rtt(INITIAL_RTT)
            .keep_alive_interval(Some(options.keep_alive))
            .max_idle_timeout(Some(options.idle_timeout.try_into().map_err(|_| {
                wrong(format!(
                    "idle timeout of {:?} is too long",
                    options.idle_timeout
                ))
            })?))
            .max_concurrent_bidi_streams(VarInt::from_u32(MAX_INCOMING_CALLS))
            .max_concurrent_uni_streams(VarInt::from_u32(MAX_DELIVERY_LANES))
            .datagram_receive_buffer_size(Some(datagram::RECEIVE_BUFFER))
            .datagram_send_buffer_size(datagram::SEND_BUFFER);
        // One acknowledgement of the broker's for 25 packets instead of 2: each costs both ends a packet.
        let mut acks = quinn::AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(25));
        transport.ack_frequency_config(Some(acks));
        // Fewer, larger packets where the path and the broker allow them.
        let mut mtu = quinn::MtuDiscoveryConfig::default();
        mtu.upper_bound(MAX_UDP_PAYLOAD)
            .minimum_change(UDP_PAYLOAD_STEP);
        transport.mtu_discovery_config(Some(mtu));
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        Ok(Self {
            options: options.clone(),
            credentials,
            config,
            endpoints: [None, None],
        })
    }

    /// The client's own identity.
    pub(crate) fn identity(&self) -> Identity {
        self.credentials.current().identity().clone()
    }

    /// Connects, and returns when the broker has welcomed the client.
    pub(crate) async fn establish(
        &mut self,
        target: &Endpoint,
        clean_start: bool,
        within: Duration,
    ) -> Result<Established, Failed> {
        match timeout(within, self.attempt(target, clean_start)).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::Timeout {
                address: target.to_string(),
                after: within,
                last: "nothing came back".to_owned(),
            }
            .into()),
        }
    }

    async fn attempt(
        &mut self,
        target: &Endpoint,
        clean_start: bool,
    ) -> Result<Established, Failed> {
        let own = *target == self.options.broker;
        // Another broker has another name, unless one name was given for all.
        let name = self.options.server_name.as_ref().unwrap_or(&target.host);
        let name = name.clone();
        let addresses = match self.options.resolve {
            Some(address) if own => vec![address],
            _ => resolve(target).await?,
        };
        let connection = self.handshake(&addresses, &name, target).await?;
        let lost = |error: &ConnectionError| Failed::from(self.classify(error, target));
        let (mut control_send, receive) =
            connection.open_bi().await.map_err(|error| lost(&error))?;
        let hello = wire::Control {
            frame: Some(Frame::Hello(self.hello(clean_start))),
        };
        let hello = frame::encode(Kind::CONTROL, &hello);
        if let Err(error) = control_send.write_chunk(hello).await {
            let error = connection.close_reason().ok_or(error);
            return Err(match error {
                Ok(error) => lost(&error),
                Err(error) => Failed::lost(error.to_string()),
            });
        }
        let mut control_frames = FramedReader::new(receive, self.options.max_frame_bytes);
        let protocol = |reason: String| Failed::from(ConnectError::Protocol { reason });
        let first = match control_frames.next().await {
            Ok(Some(frame)) if frame.kind == Kind::CONTROL => frame,
            Ok(_) => return Err(protocol("expected a welcome first".to_owned())),
            Err(FramedError::Read(error)) => {
                return Err(match connection.close_reason() {
                    Some(error) => lost(&error),
                    None => Failed::lost(error.to_string()),
                });
            }
            Err(FramedError::Frame(error)) => return Err(protocol(error.to_string())),
        };
        let first: wire::Control =
            frame::decode("control", first.body).map_err(|error| protocol(error.to_string()))?;
        match first.frame {
            Some(Frame::Welcome(welcome)) => Ok(Established {
                connection,
                control_send,
                control_frames,
                welcome,
            }),
            Some(Frame::Goodbye(goodbye)) => {
                connection.close(Code::Ok.to_quic().into(), b"goodbye");
                Err(Failed::goodbye(goodbye))
            }
            _ => Err(protocol("expected a welcome first".to_owned())),
        }
    }

    fn hello(&self, clean_start: bool) -> wire::Hello {
        let options = &self.options;
        wire::Hello {
            revision: selvedge_proto::REVISION,
            agent: options.agent.clone(),
            session: options.session.clone(),
            session_expiry_s: whole_seconds(options.session_expiry),
            clean_start,
            max_frame_bytes: u32::try_from(options.max_frame_bytes).unwrap_or(u32::MAX),
            will: options.will.as_ref().map(crate::options::Will::to_wire),
        }
    }

    /// Tries the addresses one after the other without waiting for each to fail; the first
    /// handshake that completes wins.
    async fn handshake(
        &mut self,
        addresses: &[SocketAddr],
        name: &str,
        target: &Endpoint,
    ) -> Result<quinn::Connection, Failed> {
        let mut attempts = JoinSet::new();
        let mut failure = None;
        for (index, &address) in addresses.iter().enumerate() {
            let unreachable = |reason: String| ConnectError::Unreachable {
                address: address.to_string(),
                reason,
            };
            let connecting = match self.endpoint(address.ip()) {
                Ok(endpoint) => endpoint
                    .connect_with(self.config.clone(), address, name)
                    .map_err(|error| unreachable(error.to_string())),
                Err(error) => Err(unreachable(error.to_string())),
            };
            match connecting {
                Ok(connecting) => drop(attempts.spawn(connecting)),
                Err(error) => {
                    failure = Some(error);
                    continue;
                }
            }
            let stagger = if index + 1 < addresses.len() {
                STAGGER
            } else {
                Duration::MAX
            };
            // A later address is tried when the earlier ones have failed or been slow.
            while let Ok(Some(done)) = timeout(stagger, attempts.join_next()).await {
                match done {
                    Ok(Ok(connection)) => return Ok(connection),
                    Ok(Err(error)) => failure = Some(self.classify(&error, target)),
                    Err(error) => failure = Some(unreachable(error.to_string())),
                }
            }
        }
        Err(failure
            .unwrap_or_else(|| ConnectError::Resolve {
                host: target.host.clone(),
                reason: "no address".to_owned(),
            })
            .into())
    }

    fn endpoint(&mut self, address: IpAddr) -> std::io::Result<quinn::Endpoint> {
        if let Some(endpoint) = &self.options.endpoint {
            return Ok(endpoint.clone());
        }
        let (slot, any) = match address {
            IpAddr::V4(_) => (0, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            IpAddr::V6(_) => (1, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        };
        match &mut self.endpoints[slot] {
            Some(endpoint) => Ok(endpoint.clone()),
            empty => {
                let endpoint = open(SocketAddr::new(any, 0))?;
                Ok(empty.insert(endpoint).clone())
            }
        }
    }

    fn classify(&self, error: &ConnectionError, target: &Endpoint) -> ConnectError {
        /// Transport error codes of this range are TLS alerts (RFC 9001 section 4.8).
        const ALERTS: std::ops::RangeInclusive<u64> = 0x100..=0x1ff;
        let reason = explain_connection_error(error);
        match error {
            ConnectionError::ConnectionClosed(close)
                if ALERTS.contains(&u64::from(close.error_code)) =>
            {
                let reason = match reason.strip_prefix("the peer refused us: ") {
                    Some(sentence) => sentence.to_owned(),
                    None => reason,
                };
                ConnectError::Refused { reason }
            }
            ConnectionError::TransportError(ours) if ALERTS.contains(&u64::from(ours.code)) => {
                ConnectError::Tls { reason }
            }
            ConnectionError::ApplicationClosed(close) => {
                ConnectError::Goodbye(status_of_close(close))
            }
            ConnectionError::VersionMismatch => ConnectError::Protocol { reason },
            ConnectionError::TimedOut => ConnectError::Timeout {
                address: target.to_string(),
                after: self.options.idle_timeout,
                last: reason,
            },
            _ => ConnectError::Lost { reason },
        }
    }
}

/// What the broker means by closing the connection.
pub(crate) fn status_of_close(close: &quinn::ApplicationClose) -> Status {
    let code = match close.error_code.into_inner() {
        code @ 0x100..=0x110 => Code::from_quic(code),
        // Closed without a word, as an endpoint that shuts down does.
        _ => Code::Unavailable,
    };
    Status::new(code, String::from_utf8_lossy(&close.reason))
}

async fn resolve(target: &Endpoint) -> Result<Vec<SocketAddr>, ConnectError> {
    let failed = |reason: String| ConnectError::Resolve {
        host: target.host.clone(),
        reason,
    };
    let addresses = tokio::net::lookup_host((target.host.as_str(), target.port))
        .await
        .map_err(|error| failed(error.to_string()))?;
    let addresses: Vec<_> = addresses.take(MAX_ADDRESSES).collect();
    if addresses.is_empty() {
        return Err(failed("no address".to_owned()));
    }
    Ok(addresses)
}
