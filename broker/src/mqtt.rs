//! MQTT 3.1, 3.1.1 and 5.0 on the same sessions, router and policy as native clients.
//!
//! The versions differ in `packet`, where bytes become one packet type, and in `output`, where
//! answers become bytes. Between the two there is one code path, whatever carries the bytes: TCP, TLS,
//! a WebSocket in either, or a stream of QUIC.

use std::fmt;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use quinn::Connection;
use selvedge_certs::{Identity, TrustAnchors, peer_identity, refusal_of_io};
use selvedge_proto::status::{Code, Status};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::fabric::{Fabric, Slot};
use crate::revocation;

mod connect;
mod connection;
mod delivery;
mod exchange;
mod inflight;
mod output;
mod packet;
pub mod password;
mod properties;
pub mod proxy;
mod publishing;
mod reason;
mod requests;
mod responder;
pub mod settings;
pub mod websocket;

#[cfg(test)]
mod tests;

use self::connect::Proof;
use self::password::Passwords;
use self::proxy::TrustedProxies;
use self::websocket::{Origins, OwnOrigin};
use crate::revocation::Peer;

/// ALPN protocol name of MQTT, over TLS and over QUIC.
pub const ALPN: &[u8] = b"mqtt";

/// ALPN protocol name of what a WebSocket begins with.
pub const ALPN_HTTP: &[u8] = b"http/1.1";

/// Name of MQTT over QUIC in metrics.
pub(crate) const OVER_QUIC: &str = "mqtt-quic";

/// Silence after which the system asks whether the peer is still there. MQTT lets a client do
/// without keep-alive, and its connection would then outlive it.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(60);

/// How long the listener rests after `accept` has failed, which it does when the process is out of
/// file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How peers of a listener prove who they are.
#[derive(Clone)]
pub enum Mode {
    /// They do not: everyone is this identity. For `mqtt.danger_plaintext` only.
    Plaintext {
        /// The identity of everyone on the listener.
        identity: Identity,
    },
    /// TLS with a client certificate or, where there are passwords, a user name and password.
    Tls {
        /// Asks for client certificates; takes clients without one if there are passwords.
        acceptor: TlsAcceptor,
        /// What the acceptor was made with.
        trust: TrustAnchors,
        /// Users with passwords.
        passwords: Option<Passwords>,
    },
}

/// What carries the packets of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carrier {
    /// The connection itself.
    Stream,
    /// A WebSocket, which these web pages may open.
    WebSocket(Origins),
}

/// What holds for every connection of one listener.
#[derive(Debug, Clone)]
pub struct Listener {
    /// How peers prove who they are.
    pub mode: Mode,
    /// What carries the packets.
    pub carrier: Carrier,
    /// Load balancers, one of which every connection has to come from, with a header that names the
    /// client.
    pub proxies: Option<TrustedProxies>,
}

impl Listener {
    /// Name of the listener in metrics.
    pub fn label(&self) -> &'static str {
        match (&self.mode, &self.carrier) {
            (Mode::Plaintext { .. }, Carrier::Stream) => "mqtt",
            (Mode::Tls { .. }, Carrier::Stream) => "mqtts",
            (Mode::Plaintext { .. }, Carrier::WebSocket(_)) => "ws",
            (Mode::Tls { .. }, Carrier::WebSocket(_)) => "wss",
        }
    }
}

impl fmt::Debug for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plaintext { identity } => f
                .debug_struct("Plaintext")
                .field("identity", identity)
                .finish(),
            Self::Tls { passwords, .. } => f
                .debug_struct("Tls")
                .field("passwords", passwords)
                .finish_non_exhaustive(),
        }
    }
}

/// Serves MQTT on `socket` until the broker stops. Connections are tasks of the fabric.
pub async fn listen(fabric: Arc<Fabric>, socket: TcpListener, listener: Listener) {
    let label = listener.label();
    let listener = Arc::new(listener);
    loop {
        let accepted = tokio::select! {
            () = fabric.shutdown.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(listener = label, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(slot) = fabric.admit_connection() else {
            fabric.metrics.refuse(label, "connection_limit");
            continue;
        };
        // A small answer must not wait for the acknowledgement of the one before.
        let _ = stream.set_nodelay(true);
        let keep_alive = socket2::TcpKeepalive::new().with_time(TCP_KEEP_ALIVE);
        let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&keep_alive);
        let (task_fabric, listener) = (Arc::clone(&fabric), Arc::clone(&listener));
        fabric.tasks.spawn(async move {
            let connection = Box::pin(serve(&task_fabric, &listener, stream, peer, &slot));
            if AssertUnwindSafe(connection).catch_unwind().await.is_err() {
                task_fabric.metrics.panics.inc();
                tracing::error!(listener = label, %peer, "a connection panicked");
            }
        });
    }
}

/// Reads `stream` as it arrives in pieces: the packets it held, and what was wrong where reading ended.
///
/// For the fuzz target of the packet reader, which is private.
#[doc(hidden)]
pub fn read_packets(
    stream: &[u8],
    piece: usize,
    max_packet: usize,
) -> (usize, Option<&'static str>) {
    let mut reader = packet::Reader::new(max_packet);
    let mut buffer = bytes::BytesMut::new();
    let mut packets = 0;
    for piece in stream.chunks(piece.max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            match reader.next(&mut buffer) {
                Ok(Some(_)) => packets += 1,
                Ok(None) => break,
                Err(error) => return (packets, Some(error.what)),
            }
        }
    }
    (packets, None)
}

async fn serve(
    fabric: &Arc<Fabric>,
    listener: &Listener,
    mut stream: TcpStream,
    mut peer: SocketAddr,
    slot: &Slot,
) {
    let label = listener.label();
    let _connected = (!slot.is_refusal).then(|| fabric.metrics.connected(label));
    let deadline = Instant::now() + fabric.limits.handshake_timeout;
    if let Some(trusted) = &listener.proxies {
        let header = tokio::select! {
            () = fabric.shutdown.cancelled() => return,
            header = timeout_at(deadline, Box::pin(proxy::accept(&mut stream, peer, trusted))) => header,
        };
        peer = match header {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => {
                // Whoever is meant to be there is configured wrongly, or whoever is not has got through.
                tracing::warn!(listener = label, %peer, %error, "refused a connection");
                fabric.metrics.refuse(label, error.label());
                return;
            }
            Err(_) => {
                tracing::warn!(listener = label, %peer, "no PROXY protocol header came in time");
                fabric.metrics.refuse(label, "proxy_header_timeout");
                return;
            }
        };
    } else {
        let unexpected = tokio::select! {
            () = fabric.shutdown.cancelled() => return,
            found = timeout_at(deadline, proxy::is_announced(&stream)) => found,
        };
        if unexpected.is_ok_and(|found| found) {
            tracing::warn!(
                listener = label,
                %peer,
                "refused a connection: it begins with a PROXY protocol header, and this listener expects \
                 none: name the load balancer in mqtt.proxy_protocol, or have it send no header"
            );
            fabric.metrics.refuse(label, "proxy_header_unexpected");
            return;
        }
    }
    let arrival = Arrival {
        listener,
        label,
        peer,
        deadline,
        slot,
    };
    match &listener.mode {
        Mode::Plaintext { identity } => {
            let proof = Proof::Known(identity.clone());
            Box::pin(converse(fabric, arrival, stream, proof)).await;
        }
        Mode::Tls {
            acceptor,
            trust,
            passwords,
        } => {
            let begun = fabric.peers.generation();
            // Its state is large, and not needed after it.
            let handshake = Box::pin(timeout_at(deadline, acceptor.accept(stream)));
            let handshake = tokio::select! {
                () = fabric.shutdown.cancelled() => return,
                handshake = handshake => handshake,
            };
            let stream = match handshake {
                // Large, and handed on several times.
                Ok(Ok(stream)) => Box::new(stream),
                Ok(Err(error)) => {
                    let refused = refusal_of_io(&error);
                    let reason = refused.map_or_else(|| error.to_string(), ToString::to_string);
                    tracing::debug!(listener = label, %peer, %reason, "TLS handshake failed");
                    fabric
                        .metrics
                        .refuse(label, refused.map_or("handshake", revocation::label));
                    return;
                }
                Err(_) => {
                    fabric.metrics.refuse(label, "handshake_timeout");
                    return;
                }
            };
            let certificates = stream.get_ref().1.peer_certificates();
            let proof = match (certificates.map(peer_identity), passwords) {
                (Some(Ok(identity)), _) => {
                    let chain = certificates.unwrap_or_default();
                    match fabric.peers.enter(trust, begun, label, chain) {
                        Ok(peer) => Proof::Certificate { identity, peer },
                        Err(refused) => {
                            tracing::debug!(listener = label, %peer, reason = %refused, "TLS handshake failed");
                            fabric.metrics.refuse(label, revocation::label(&refused));
                            let status = Status::new(Code::Unauthenticated, refused.to_string());
                            fabric.tenant(&identity).refused(&identity, &status);
                            return;
                        }
                    }
                }
                (Some(Err(error)), _) => {
                    tracing::debug!(listener = label, %peer, %error, "no identity in the certificate");
                    fabric.metrics.refuse(label, "identity");
                    return;
                }
                (None, Some(passwords)) => Proof::Password(passwords.clone()),
                (None, None) => Proof::Missing,
            };
            Box::pin(converse(fabric, arrival, stream, proof)).await;
        }
    }
}

/// A connection that has been accepted.
struct Arrival<'a> {
    listener: &'a Listener,
    label: &'static str,
    /// Where the client is, or says its load balancer that it is.
    peer: SocketAddr,
    /// By when its CONNECT has to have come.
    deadline: Instant,
    slot: &'a Slot,
}

/// What may carry packets. Carriers that are in no hurry share one copy of the connection's code.
trait Transport: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Transport for S {}

/// Speaks MQTT on what carries it.
async fn converse<S>(fabric: &Arc<Fabric>, arrival: Arrival<'_>, stream: S, proof: Proof)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let Arrival {
        listener,
        label,
        peer,
        deadline,
        slot,
    } = arrival;
    let Carrier::WebSocket(origins) = &listener.carrier else {
        connection::run(fabric, label, stream, peer, proof, deadline, slot).await;
        return;
    };
    let upgrade = websocket::accept(
        stream,
        origins,
        match &listener.mode {
            Mode::Tls { .. } => OwnOrigin::Named,
            Mode::Plaintext { .. } => OwnOrigin::Addressed,
        },
        fabric.limits.max_frame_bytes,
        websocket::Report::new(&fabric.metrics, label, peer),
    );
    let upgrade = tokio::select! {
        () = fabric.shutdown.cancelled() => return,
        upgrade = timeout_at(deadline, Box::pin(upgrade)) => upgrade,
    };
    match upgrade {
        Ok(Ok(stream)) => {
            let stream: Box<dyn Transport + '_> = Box::new(stream);
            let connection = connection::run(fabric, label, stream, peer, proof, deadline, slot);
            Box::pin(connection).await;
        }
        Ok(Err(error)) => {
            tracing::debug!(listener = label, %peer, %error, "no WebSocket");
            fabric.metrics.refuse(label, error.label());
        }
        Err(_) => fabric.metrics.refuse(label, "upgrade_timeout"),
    }
}

/// Speaks MQTT on the stream that the client opens on a connection of QUIC. There is one; others are
/// reset.
pub(crate) async fn serve_quic(
    fabric: &Arc<Fabric>,
    connection: &Connection,
    identity: Identity,
    peer: Peer,
    deadline: Instant,
    slot: &Slot,
) {
    let remote = connection.remote_address();
    let opened = tokio::select! {
        () = fabric.shutdown.cancelled() => return,
        opened = timeout_at(deadline, connection.accept_bi()) => opened,
    };
    let (send, recv) = match opened {
        Ok(Ok(stream)) => stream,
        Ok(Err(_)) => return fabric.metrics.refuse(OVER_QUIC, "closed_before_connect"),
        Err(_) => return fabric.metrics.refuse(OVER_QUIC, "connect_timeout"),
    };
    let delivered = send.stopped();
    let stream: Box<dyn Transport> = Box::new(tokio::io::join(recv, send));
    let proof = Proof::Certificate { identity, peer };
    let conversation = connection::run(fabric, OVER_QUIC, stream, remote, proof, deadline, slot);
    tokio::select! {
        () = Box::pin(conversation) => {}
        () = refuse_streams(connection) => {}
    }
    // The last packet is on its way; closing the connection would overtake it.
    let _ = tokio::time::timeout(connection::FAREWELL, delivered).await;
}

/// Resets every further stream of a client. Never ends.
async fn refuse_streams(connection: &Connection) {
    let code = Code::InvalidArgument.to_quic().into();
    loop {
        tokio::select! {
            Ok((mut send, mut recv)) = connection.accept_bi() => {
                let _ = send.reset(code);
                let _ = recv.stop(code);
            }
            Ok(mut recv) = connection.accept_uni() => {
                let _ = recv.stop(code);
            }
            // The connection is lost, which its own stream shows.
            else => std::future::pending::<()>().await,
        }
    }
}
