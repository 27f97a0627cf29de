//! MQTT 3.1, 3.1.1 and 5.0 on the same sessions, router and policy as native clients.
//!
//! The versions differ in `packet`, where bytes become one packet type, and in `output`, where
//! answers become bytes. Between the two there is one code path.

use std::fmt;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use selvedge_certs::{Identity, TrustAnchors, peer_identity, refusal_of_io};
use selvedge_proto::status::{Code, Status};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::fabric::{Fabric, Slot};
use crate::revocation;

mod connect;
mod connection;
mod delivery;
mod inflight;
mod output;
mod packet;
pub mod password;
mod properties;
mod publishing;
mod reason;

#[cfg(test)]
mod tests;

use self::connect::Proof;
use self::password::Passwords;

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

impl Mode {
    /// Name of the listener in metrics.
    fn label(&self) -> &'static str {
        match self {
            Self::Plaintext { .. } => "mqtt",
            Self::Tls { .. } => "mqtts",
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

/// Serves MQTT on `listener` until the broker stops. Connections are tasks of the fabric.
pub async fn listen(fabric: Arc<Fabric>, listener: TcpListener, mode: Mode) {
    let label = mode.label();
    loop {
        let accepted = tokio::select! {
            () = fabric.shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
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
        let (task_fabric, mode) = (Arc::clone(&fabric), mode.clone());
        fabric.tasks.spawn(async move {
            let connection = Box::pin(serve(&task_fabric, &mode, stream, peer, &slot));
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
    mode: &Mode,
    stream: TcpStream,
    peer: SocketAddr,
    slot: &Slot,
) {
    let listener = mode.label();
    let _connected = (!slot.is_refusal).then(|| fabric.metrics.connected(listener));
    let deadline = Instant::now() + fabric.limits.handshake_timeout;
    match mode {
        Mode::Plaintext { identity } => {
            let proof = Proof::Known(identity.clone());
            connection::run(fabric, listener, stream, peer, proof, deadline, slot).await;
        }
        Mode::Tls {
            acceptor,
            trust,
            passwords,
        } => {
            let begun = fabric.peers.generation();
            let handshake = tokio::select! {
                () = fabric.shutdown.cancelled() => return,
                handshake = timeout_at(deadline, acceptor.accept(stream)) => handshake,
            };
            let stream = match handshake {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    let refused = refusal_of_io(&error);
                    let reason = refused.map_or_else(|| error.to_string(), ToString::to_string);
                    tracing::debug!(listener, %peer, %reason, "TLS handshake failed");
                    fabric
                        .metrics
                        .refuse(listener, refused.map_or("handshake", revocation::label));
                    return;
                }
                Err(_) => {
                    fabric.metrics.refuse(listener, "handshake_timeout");
                    return;
                }
            };
            let certificates = stream.get_ref().1.peer_certificates();
            let proof = match (certificates.map(peer_identity), passwords) {
                (Some(Ok(identity)), _) => {
                    let chain = certificates.unwrap_or_default();
                    match fabric.peers.enter(trust, begun, listener, chain) {
                        Ok(peer) => Proof::Certificate { identity, peer },
                        Err(refused) => {
                            tracing::debug!(listener, %peer, reason = %refused, "TLS handshake failed");
                            fabric.metrics.refuse(listener, revocation::label(&refused));
                            let status = Status::new(Code::Unauthenticated, refused.to_string());
                            fabric.tenant(&identity).refused(&identity, &status);
                            return;
                        }
                    }
                }
                (Some(Err(error)), _) => {
                    tracing::debug!(listener, %peer, %error, "no identity in the certificate");
                    fabric.metrics.refuse(listener, "identity");
                    return;
                }
                (None, Some(passwords)) => Proof::Password(passwords.clone()),
                (None, None) => Proof::Missing,
            };
            connection::run(fabric, listener, stream, peer, proof, deadline, slot).await;
        }
    }
}
