//! The QUIC listener, for native clients and for MQTT: endpoint, accept loop and transport settings.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use quinn::crypto::rustls::HandshakeData;
use quinn::{Endpoint, EndpointConfig, Incoming, ServerConfig, TransportConfig, VarInt};
use selvedge_certs::{ReloadableCredentials, TrustAnchors};
use selvedge_proto::status::{Code, Status};

use crate::config::Limits;
use crate::fabric::{Fabric, Slot, no_slot};
use crate::mqtt;
use crate::revocation;

mod connection;
mod control;
mod datagram;
mod delivery;
mod ingest;
mod reader;

pub(crate) use self::reader::{FrameReader, ReadFrameError};

/// Name of this listener in metrics.
const LISTENER: &str = "quic";

/// Kernel buffer asked for on the UDP socket. The default of about 200 KiB overflows within a
/// millisecond at full speed, which QUIC then takes for congestion.
const SOCKET_BUFFER: usize = 4 << 20;

/// Calls that a client may open before its first one has come.
const FIRST_CALLS: u32 = 8;

/// Publish lanes that a client may open before it has used half of them: one for each class, and some.
const FIRST_LANES: u32 = 8;

/// Publish lanes that a client may have open: one for each class, and some for isolation.
const LANES: u32 = 64;

/// Opens the endpoint for clients that speak one of `protocols`, which are names of ALPN. Nothing is
/// accepted before [`accept`] runs.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn bind(
    address: SocketAddr,
    credentials: &ReloadableCredentials,
    trust: &TrustAnchors,
    limits: &Limits,
    protocols: &[&[u8]],
) -> Result<Endpoint, BindError> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    // Best effort: the system may allow less.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    if address.is_ipv6() {
        let _ = socket.set_only_v6(false);
    }
    socket.bind(&address.into())?;
    let runtime = quinn::default_runtime().ok_or(BindError::NoRuntime)?;
    let config = server_config(credentials, trust, limits, protocols)?;
    let mut endpoint = EndpointConfig::default();
    endpoint
        .max_udp_payload_size(limits.packet_bytes)
        .map_err(|error| std::io::Error::other(format!("limits.packet_bytes: {error}")))?;
    Ok(Endpoint::new(
        endpoint,
        Some(config),
        socket.into(),
        runtime,
    )?)
}

/// The server side's TLS and transport settings, for endpoints that are made elsewhere.
///
/// # Errors
/// The certificate and key cannot be used.
pub fn server_config(
    credentials: &ReloadableCredentials,
    trust: &TrustAnchors,
    limits: &Limits,
    protocols: &[&[u8]],
) -> Result<ServerConfig, selvedge_certs::TlsError> {
    let current = credentials.current();
    let domain = current.identity().trust_domain();
    let tls = selvedge_certs::quic_server_config(credentials, trust, Some(domain), protocols)?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport(limits)));
    Ok(config)
}

/// Why the endpoint cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket cannot be opened or bound.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] selvedge_certs::TlsError),
    /// Called outside an async runtime.
    #[error("no async runtime: bind from within tokio")]
    NoRuntime,
}

fn transport(limits: &Limits) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(quinn::IdleTimeout::try_from(limits.idle_timeout).ok())
        // A stream that a client may open takes memory before it is opened, so a client begins with
        // few, and gets all when it shows that it uses them: `Actor::allow_more_calls` and `allow_more_lanes`.
        .max_concurrent_bidi_streams(VarInt::from_u32(
            FIRST_CALLS.min(limits.calls_per_connection) + 1,
        ))
        .max_concurrent_uni_streams(VarInt::from_u32(FIRST_LANES))
        .datagram_receive_buffer_size(Some(datagram::RECEIVE_BUFFER))
        .datagram_send_buffer_size(datagram::SEND_BUFFER);
    // One acknowledgement for 25 packets instead of 2: a broker sends far more than it receives,
    // and each acknowledgement costs it a packet to read.
    let mut acks = quinn::AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(25));
    transport.ack_frequency_config(Some(acks));
    // What a packet costs hardly depends on its size, so paths that allow it have large ones.
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(limits.packet_bytes)
        .minimum_change(selvedge_proto::UDP_PAYLOAD_STEP);
    transport.mtu_discovery_config(Some(mtu));
    transport
}

/// Accepts connections until the broker stops. One client's handshake never delays another's: each
/// runs in its own task.
///
/// `trust` is what the endpoint's configuration was made with.
pub async fn accept(fabric: Arc<Fabric>, endpoint: Endpoint, trust: TrustAnchors) {
    let handshakes = Arc::new(AtomicUsize::new(0));
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = fabric.shutdown.cancelled() => None,
        };
        let Some(incoming) = incoming else {
            return;
        };
        // An address that was not proven gets a Retry once many handshakes are in progress, since
        // the endpoint may otherwise send three times what it receives to a forged address.
        if !incoming.remote_address_validated()
            && incoming.may_retry()
            && handshakes.load(Ordering::Relaxed) >= fabric.limits.handshakes_before_retry
        {
            let _ = incoming.retry();
            continue;
        }
        let Some(slot) = fabric.admit_connection() else {
            fabric.metrics.refuse(LISTENER, "connection_limit");
            incoming.refuse();
            continue;
        };
        let handshake = Handshake::begin(&handshakes);
        let (task, trust) = (Arc::clone(&fabric), trust.clone());
        fabric.tasks.spawn(async move {
            serve(task, incoming, handshake, trust, &slot).await;
        });
    }
}

/// One handshake in progress, until dropped.
struct Handshake(Arc<AtomicUsize>);

impl Handshake {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(
    fabric: Arc<Fabric>,
    incoming: Incoming,
    handshake: Handshake,
    trust: TrustAnchors,
    slot: &Slot,
) {
    let remote = incoming.remote_address();
    let begun = fabric.peers.generation();
    let deadline = tokio::time::Instant::now() + fabric.limits.handshake_timeout;
    let connecting = match incoming.accept() {
        Ok(connecting) => connecting,
        Err(error) => {
            tracing::debug!(%remote, %error, "connection refused before its handshake");
            fabric.metrics.refuse(LISTENER, "handshake");
            return;
        }
    };
    let connection = match tokio::time::timeout_at(deadline, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            let reason = selvedge_certs::explain_connection_error(&error);
            tracing::warn!(%remote, %reason, "handshake failed");
            fabric.metrics.refuse(LISTENER, handshake_reason(&error));
            return;
        }
        Err(_) => {
            fabric.metrics.refuse(LISTENER, "handshake_timeout");
            return;
        }
    };
    drop(handshake);
    let speaks_mqtt = speaks(&connection, mqtt::ALPN);
    let listener = if speaks_mqtt {
        mqtt::OVER_QUIC
    } else {
        LISTENER
    };
    let identity = match selvedge_certs::peer_identity_of_quinn(&connection) {
        Ok(identity) => identity,
        // The verifier has refused such certificates already.
        Err(error) => {
            fabric.metrics.refuse(listener, "identity");
            connection.close(
                Code::Unauthenticated.to_quic().into(),
                error.to_string().as_bytes(),
            );
            return;
        }
    };
    // MQTT has words of its own for it.
    if slot.is_refusal && !speaks_mqtt {
        fabric.metrics.refuse(LISTENER, "connection_limit");
        let status = no_slot();
        fabric.tenant(&identity).refused(&identity, &status);
        connection.close(status.code.to_quic().into(), status.message.as_bytes());
        return;
    }
    let chain = selvedge_certs::peer_certificates(&connection).unwrap_or_default();
    let peer = match fabric.peers.enter(&trust, begun, listener, &chain) {
        Ok(peer) => peer,
        Err(refused) => {
            tracing::warn!(%remote, reason = %refused, "handshake failed");
            fabric.metrics.refuse(listener, revocation::label(&refused));
            let reason = refused.to_string();
            let status = Status::new(Code::Unauthenticated, reason.as_str());
            fabric.tenant(&identity).refused(&identity, &status);
            connection.close(Code::Unauthenticated.to_quic().into(), reason.as_bytes());
            return;
        }
    };
    let guard = (!slot.is_refusal).then(|| fabric.metrics.connected(listener));
    if speaks_mqtt {
        let conversation = mqtt::serve_quic(&fabric, &connection, identity, peer, deadline, slot);
        Box::pin(conversation).await;
    } else {
        connection::run(&fabric, connection, identity, &peer).await;
    }
    drop(guard);
}

/// Whether a connection has agreed on a protocol by ALPN.
fn speaks(connection: &quinn::Connection, protocol: &[u8]) -> bool {
    connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok())
        .is_some_and(|data| data.protocol.as_deref() == Some(protocol))
}

fn handshake_reason(error: &quinn::ConnectionError) -> &'static str {
    match error {
        error if selvedge_certs::was_revoked(error) => "revoked",
        quinn::ConnectionError::TransportError(_) => "certificate_refused_here",
        quinn::ConnectionError::ConnectionClosed(_) => "refused_by_peer",
        quinn::ConnectionError::TimedOut => "handshake_timeout",
        _ => "handshake",
    }
}

/// Stops the endpoint: says goodbye with what is left of `grace`, and frees the port.
pub async fn close(endpoint: &Endpoint, grace: Duration) {
    endpoint.close(
        Code::Unavailable.to_quic().into(),
        b"the broker is stopping",
    );
    let _ = tokio::time::timeout(grace, endpoint.wait_idle()).await;
}
