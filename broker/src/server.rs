//! A running broker: every listener bound, then served until it is shut down.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::Endpoint;
use rand::Rng;
use selvedge_certs::{ClientAuth, ReloadableCredentials, TrustAnchors};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::admin;
use crate::clock;
use crate::config::{Config, DurabilityRules};
use crate::fabric::{Fabric, FabricOptions};
use crate::front::{self, Door, Protocol, Security};
use crate::metrics::Metrics;
use crate::mqtt;
use crate::quic;
use crate::restore;
use crate::revocation::Review;
use crate::store::{Loaded, Store, StoreError};
use crate::sys;

/// Time that connections have to end in good order when the broker stops.
const DRAIN: Duration = Duration::from_secs(5);

/// Clients are told when to come back, each in its own slot, so that about this many come in a
/// second: a handshake takes about a millisecond of CPU.
const RECONNECTS_PER_SECOND: f64 = 500.0;

/// Bounds of the time over which all clients come back, in seconds.
const RECONNECT_SPREAD: std::ops::RangeInclusive<f64> = 0.1..=30.0;

/// How often sessions, services and models are looked at for what has expired.
const SWEEP: Duration = Duration::from_secs(1);

/// A running broker. Dropping it stops it without saying goodbye.
#[derive(Debug)]
pub struct Server {
    fabric: Arc<Fabric>,
    door: Arc<Door>,
    endpoint: Option<Endpoint>,
    addresses: Addresses,
    /// The certificate of every listener.
    credentials: ReloadableCredentials,
    /// The authorities of every listener, and what they have withdrawn.
    trust: TrustAnchors,
    listeners: Vec<JoinHandle<()>>,
}

/// Where a broker listens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Native clients.
    pub quic: Option<SocketAddr>,
    /// MQTT without TLS.
    pub mqtt: Option<SocketAddr>,
    /// MQTT over TLS.
    pub mqtts: Option<SocketAddr>,
    /// MQTT over WebSocket, without TLS.
    pub ws: Option<SocketAddr>,
    /// MQTT over WebSocket and TLS.
    pub wss: Option<SocketAddr>,
    /// The Open Inference Protocol over gRPC, without TLS.
    pub grpc: Option<SocketAddr>,
    /// The Open Inference Protocol over gRPC and TLS.
    pub grpcs: Option<SocketAddr>,
    /// The Open Inference Protocol and the OpenAI API over HTTP, without TLS.
    pub http: Option<SocketAddr>,
    /// The Open Inference Protocol and the OpenAI API over HTTP and TLS.
    pub https: Option<SocketAddr>,
    /// Health, metrics and the live page.
    pub admin: Option<SocketAddr>,
}

/// Why a broker cannot start. No port stays open.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The QUIC listener cannot be opened.
    #[error("cannot listen for QUIC on {address}: {source}")]
    Quic {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: quic::BindError,
    },
    /// A TCP listener cannot be opened.
    #[error("cannot listen for {what} on {address}: {source}")]
    Tcp {
        /// Such as `MQTT over TLS` or `admin`.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The certificate cannot be used for a listener.
    #[error(transparent)]
    Tls(#[from] selvedge_certs::TlsError),
}

impl Server {
    /// Opens every port of the configuration, then serves them. When one cannot be opened, none
    /// is served.
    ///
    /// # Errors
    /// A port is taken, or the certificate cannot be used.
    pub async fn bind(config: Config) -> Result<Self, BindError> {
        let credentials = ReloadableCredentials::from(&config.credentials);
        let endpoint = match config.quic {
            None => None,
            Some(address) => Some(
                quic::bind(
                    address,
                    &credentials,
                    &config.trust,
                    &config.limits,
                    protocols(&config),
                )
                .map_err(|source| BindError::Quic { address, source })?,
            ),
        };
        Self::serve(config, credentials, endpoint).await
    }

    /// As [`Self::bind`], with a QUIC endpoint made elsewhere, for simulation. Its server
    /// configuration is set here.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub async fn bind_with_endpoint(config: Config, endpoint: Endpoint) -> Result<Self, BindError> {
        let credentials = ReloadableCredentials::from(&config.credentials);
        endpoint.set_server_config(Some(quic::server_config(
            &credentials,
            &config.trust,
            &config.limits,
            protocols(&config),
        )?));
        Self::serve(config, credentials, Some(endpoint)).await
    }

    async fn serve(
        config: Config,
        credentials: ReloadableCredentials,
        endpoint: Option<Endpoint>,
    ) -> Result<Self, BindError> {
        let mqtt = bind_mqtt(&config, &credentials).await?;
        let admin = match config.admin {
            None => None,
            Some(address) => Some(listen("admin", address).await?),
        };
        let front = front_listeners(&config, &credentials).await?;
        let front_address = |protocol, is_tls| {
            let found = front.iter().find(|(held, security, _)| {
                *held == protocol && matches!(security, Security::Tls(..)) == is_tls
            });
            found.and_then(|(_, _, listener)| listener.local_addr().ok())
        };
        let addresses = Addresses {
            grpc: front_address(Protocol::Grpc, false),
            grpcs: front_address(Protocol::Grpc, true),
            http: front_address(Protocol::Http, false),
            https: front_address(Protocol::Http, true),
            quic: endpoint
                .as_ref()
                .and_then(|endpoint| endpoint.local_addr().ok()),
            mqtt: address_of(&mqtt, "mqtt"),
            mqtts: address_of(&mqtt, "mqtts"),
            ws: address_of(&mqtt, "ws"),
            wss: address_of(&mqtt, "wss"),
            admin: admin
                .as_ref()
                .and_then(|listener| listener.local_addr().ok()),
        };

        let metrics = Arc::new(Metrics::default());
        let durability = config.store.as_ref().map_or_else(
            || DurabilityRules::all(false),
            |store| store.durability.clone(),
        );
        let (store, loaded) = match config.store {
            None => (None, Loaded::default()),
            Some(store) => {
                let metrics = Arc::clone(&metrics);
                let open = move || Store::open(&store.folder, metrics);
                let (store, loaded) = tokio::task::spawn_blocking(open)
                    .await
                    .unwrap_or_else(|_| Err(StoreError::Failed("opening it panicked".into())))?;
                (Some(store), loaded)
            }
        };
        let fabric = Fabric::new(FabricOptions {
            name: config.name,
            identity: config.credentials.identity().clone(),
            limits: config.limits,
            policy: config.policy,
            metrics,
            store,
            durability,
            history: config.history,
            mqtt: config.mqtt.settings,
        });
        fabric.metrics.renew_lists_by(config.trust.next_update());
        // Kept sessions are routable before any client, publisher or subscriber, is let in.
        restore::restore(&fabric, loaded);
        let mut listeners = Vec::new();
        if let Some(endpoint) = &endpoint {
            listeners.push(tokio::spawn(quic::accept(
                Arc::clone(&fabric),
                endpoint.clone(),
                config.trust.clone(),
            )));
        }
        for (socket, listener) in mqtt {
            let serve = mqtt::listen(Arc::clone(&fabric), socket, listener);
            listeners.push(tokio::spawn(serve));
        }
        let door = Arc::new(Door {
            fabric: Arc::clone(&fabric),
            tokens: arc_swap::ArcSwapOption::from_pointee(config.front.tokens),
        });
        for (protocol, security, listener) in front {
            let door = Arc::clone(&door);
            listeners.push(tokio::spawn(front::listen(
                door, listener, protocol, security,
            )));
        }
        if let Some(listener) = admin {
            listeners.push(tokio::spawn(admin::serve(Arc::clone(&fabric), listener)));
        }
        listeners.push(tokio::spawn(sweep(Arc::clone(&fabric))));
        listeners.push(tokio::spawn(sys::publish(Arc::clone(&fabric))));
        tracing::info!(broker = %fabric.name, ?addresses, "the broker is ready");
        Ok(Self {
            fabric,
            door,
            endpoint,
            addresses,
            credentials,
            trust: config.trust,
            listeners,
        })
    }

    /// Where the broker listens, with the ports that were chosen for port 0.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The broker's state, for inspection.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// Takes over what may change while the broker runs: policy, certificate and key, trust and
    /// revocations, bearer tokens. New handshakes use the new certificate and trust. The only connections that end
    /// are those of peers whose certificate was withdrawn, or whose authority is no longer trusted.
    /// Returns how many subscriptions and registrations the new policy ended.
    pub fn reload(&self, config: Config) -> usize {
        self.credentials.replace(config.credentials);
        let review = if config.trust.includes(&self.trust) {
            Review::Revocations
        } else {
            Review::Chains
        };
        self.trust.replace(&config.trust);
        self.door.tokens.store(config.front.tokens.map(Arc::new));
        // Before the policy, so that who is to go has no part in what it changes.
        let fabric = &self.fabric;
        let evicted = fabric.peers.review(&self.trust, review, &fabric.metrics);
        let ended = fabric.set_policy(config.policy);
        tracing::info!(
            ended,
            evicted,
            "policy, certificate, trust and revocations were reloaded"
        );
        ended
    }

    /// Waits until a listener ends, which it only does when the broker is shut down or at fault.
    pub async fn join(&mut self) {
        if self.listeners.is_empty() {
            return;
        }
        // By reference, so that a wait that is given up leaves the handles for the shutdown.
        let (_, ended, _) = futures_util::future::select_all(self.listeners.iter_mut()).await;
        self.listeners.swap_remove(ended);
    }

    /// Stops the broker in good order.
    pub async fn shutdown(mut self) {
        // 1. Readiness goes first, so that load balancers look elsewhere, and accept loops end.
        self.fabric.shutdown.cancel();
        // 2. Every connection is told to go and when to come back, each in its own slot.
        let sessions = self.fabric.metrics.sessions.get() as f64;
        let spread = (sessions / RECONNECTS_PER_SECOND)
            .clamp(*RECONNECT_SPREAD.start(), *RECONNECT_SPREAD.end());
        self.fabric.kick_all(|| {
            Duration::from_secs_f64(spread).mul_f64(rand::rng().random_range(0.05..1.0))
        });
        // 3. They flush and close.
        self.fabric.tasks.close();
        let _ = tokio::time::timeout(DRAIN, self.fabric.tasks.wait()).await;
        // 4. What is left is cut off, and the ports are freed.
        if let Some(endpoint) = &self.endpoint {
            quic::close(endpoint, Duration::from_secs(1)).await;
        }
        for listener in std::mem::take(&mut self.listeners) {
            listener.abort();
            let _ = listener.await;
        }
        if let Some(endpoint) = self.endpoint.take() {
            free(endpoint).await;
        }
        // 5. What was taken is on disk before the process may end.
        if let Some(store) = &self.fabric.store
            && let Err(error) = store.close().await
        {
            tracing::error!(%error, "the last commit failed");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.fabric.shutdown.cancel();
        if let Some(endpoint) = &self.endpoint {
            endpoint.close(
                selvedge_proto::status::Code::Unavailable.to_quic().into(),
                b"the broker was dropped",
            );
        }
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// Lets go of an endpoint and waits until its port is free. The endpoint's own task holds the socket,
/// and ends in its own time after the last handle is gone.
async fn free(endpoint: Endpoint) {
    let address = endpoint.local_addr();
    drop(endpoint);
    let Ok(address) = address else {
        return;
    };
    let in_use = || {
        std::net::UdpSocket::bind(address)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
    };
    for _ in 0..200 {
        if !in_use() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tracing::warn!(%address, "the port is still in use");
}

/// What clients of the QUIC listener may speak.
fn protocols(config: &Config) -> &'static [&'static [u8]] {
    if config.mqtt.quic {
        &[selvedge_proto::ALPN, mqtt::ALPN]
    } else {
        &[selvedge_proto::ALPN]
    }
}

/// Opens the TCP ports of MQTT.
async fn bind_mqtt(
    config: &Config,
    credentials: &ReloadableCredentials,
) -> Result<Vec<(TcpListener, mqtt::Listener)>, BindError> {
    let mqtt = &config.mqtt;
    let websocket = || mqtt::Carrier::WebSocket(mqtt.origins.clone());
    let mut listeners = Vec::new();
    let encrypted = [
        (
            "MQTT over TLS",
            mqtt.tls,
            mqtt::ALPN,
            mqtt::Carrier::Stream,
            &mqtt.proxies.tls,
        ),
        (
            "MQTT over WebSocket and TLS",
            mqtt.wss,
            mqtt::ALPN_HTTP,
            websocket(),
            &mqtt.proxies.wss,
        ),
    ];
    for (what, address, alpn, carrier, proxies) in encrypted {
        let Some(address) = address else {
            continue;
        };
        let auth = if mqtt.passwords.is_some() {
            ClientAuth::Optional(&config.trust)
        } else {
            ClientAuth::Required(&config.trust)
        };
        let domain = config.credentials.identity().trust_domain();
        let tls = selvedge_certs::tcp_server_config(credentials, auth, Some(domain), &[alpn])?;
        let mode = mqtt::Mode::Tls {
            acceptor: TlsAcceptor::from(tls),
            trust: config.trust.clone(),
            passwords: mqtt.passwords.clone(),
        };
        let proxies = proxies.clone();
        let listener = mqtt::Listener {
            mode,
            carrier,
            proxies,
        };
        listeners.push((listen(what, address).await?, listener));
    }
    let plaintext = [
        (
            "MQTT",
            &mqtt.danger_plaintext,
            mqtt::Carrier::Stream,
            &mqtt.proxies.danger_plaintext,
        ),
        (
            "MQTT over WebSocket",
            &mqtt.danger_ws,
            websocket(),
            &mqtt.proxies.danger_ws,
        ),
    ];
    for (what, open, carrier, proxies) in plaintext {
        let Some((address, identity)) = open else {
            continue;
        };
        let identity = identity.clone();
        let listener = mqtt::Listener {
            mode: mqtt::Mode::Plaintext { identity },
            carrier,
            proxies: proxies.clone(),
        };
        listeners.push((listen(what, *address).await?, listener));
    }
    Ok(listeners)
}

/// Where the listener of this label is bound.
fn address_of(listeners: &[(TcpListener, mqtt::Listener)], label: &str) -> Option<SocketAddr> {
    let (socket, _) = listeners.iter().find(|(_, found)| found.label() == label)?;
    socket.local_addr().ok()
}

/// Opens the listeners of the front door.
async fn front_listeners(
    config: &Config,
    credentials: &ReloadableCredentials,
) -> Result<Vec<(Protocol, Security, TcpListener)>, BindError> {
    let front = &config.front;
    let mut listeners = Vec::new();
    for (protocol, address, what) in [
        (Protocol::Grpc, front.grpc, "gRPC over TLS"),
        (Protocol::Http, front.http, "HTTP over TLS"),
    ] {
        let Some(address) = address else {
            continue;
        };
        let auth = if front.tokens.is_some() {
            ClientAuth::Optional(&config.trust)
        } else {
            ClientAuth::Required(&config.trust)
        };
        let domain = config.credentials.identity().trust_domain();
        let tls =
            selvedge_certs::tcp_server_config(credentials, auth, Some(domain), protocol.alpn())?;
        let security = Security::Tls(TlsAcceptor::from(tls), config.trust.clone());
        listeners.push((protocol, security, listen(what, address).await?));
    }
    for (protocol, address, what) in [
        (Protocol::Grpc, front.danger_plaintext_grpc, "gRPC"),
        (Protocol::Http, front.danger_plaintext_http, "HTTP"),
    ] {
        if let Some(address) = address {
            let listener = listen(what, address).await?;
            listeners.push((protocol, Security::Plaintext, listener));
        }
    }
    Ok(listeners)
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| BindError::Tcp {
            what,
            address,
            source,
        })
}

/// Ends and forgets what has expired.
async fn sweep(fabric: Arc<Fabric>) {
    let mut ticks = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            _ = ticks.tick() => fabric.sweep(clock::now()),
            () = fabric.shutdown.cancelled() => return,
        }
    }
}
