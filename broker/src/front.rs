//! The front door: inference for applications without a native client, by the Open Inference Protocol
//! over gRPC and HTTP and by the OpenAI API.
//!
//! What is asked here becomes a request like any other before a worker is looked for: the same
//! policy, admission, placement and cancellation.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use selvedge_certs::{TrustAnchors, peer_identity, refusal_of_io};
use selvedge_proto::status::{Code, Status};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::fabric::Slot;
use crate::revocation;
use crate::session::Kick;

pub(crate) mod ask;
mod grpc;
mod http;
pub mod json;
mod known;
mod openai;
mod path;
pub mod request;
pub(crate) mod rest;
pub mod tensors;
pub mod token;
mod visitor;

use self::http::Body;
use self::path::Route;
pub(crate) use self::visitor::Door;
use self::visitor::Visitor;

/// How long the listener rests after `accept` has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Time without a request after which a connection is closed. Clients keep connections for reuse.
const IDLE: Duration = Duration::from_secs(120);

/// Time that requests have to end when the broker stops, within that of the whole broker.
const DRAIN: Duration = Duration::from_secs(4);

/// Bytes of all headers of a request.
const HEADERS: usize = 32 << 10;

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// The Open Inference Protocol over gRPC.
    Grpc,
    /// The same over HTTP, and the OpenAI API.
    Http,
}

impl Protocol {
    /// What TLS may agree on.
    pub(crate) fn alpn(self) -> &'static [&'static [u8]] {
        match self {
            Self::Grpc => &[b"h2"],
            Self::Http => &[b"h2", b"http/1.1"],
        }
    }

    /// Name of the listener in metrics.
    fn label(self, is_tls: bool) -> &'static str {
        match (self, is_tls) {
            (Self::Grpc, true) => "grpcs",
            (Self::Grpc, false) => "grpc",
            (Self::Http, true) => "https",
            (Self::Http, false) => "http",
        }
    }
}

/// How a listener is encrypted.
#[derive(Clone)]
pub(crate) enum Security {
    /// TLS, with client certificates for those who have one.
    Tls(TlsAcceptor, TrustAnchors),
    /// None. For `front.danger_plaintext_…` only.
    Plaintext,
}

/// Serves one listener until the broker stops. Connections are tasks of the fabric.
pub(crate) async fn listen(
    door: Arc<Door>,
    listener: TcpListener,
    protocol: Protocol,
    security: Security,
) {
    let fabric = Arc::clone(&door.fabric);
    let label = protocol.label(matches!(security, Security::Tls(..)));
    loop {
        let accepted = tokio::select! {
            () = fabric.shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(listener = label, %error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let slot = match fabric.admit_connection() {
            Some(slot) if !slot.is_refusal => slot,
            _ => {
                fabric.metrics.refuse(label, "connection_limit");
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (door, security) = (Arc::clone(&door), security.clone());
        let task = Arc::clone(&fabric);
        fabric.tasks.spawn(async move {
            let connection = Connection {
                door,
                protocol,
                label,
                peer,
                _slot: slot,
            };
            let served = Box::pin(connection.serve(stream, security));
            if AssertUnwindSafe(served).catch_unwind().await.is_err() {
                task.metrics.panics.inc();
                tracing::error!(listener = label, %peer, "a connection panicked");
            }
        });
    }
}

/// One connection.
struct Connection {
    door: Arc<Door>,
    protocol: Protocol,
    label: &'static str,
    peer: SocketAddr,
    _slot: Slot,
}

impl Connection {
    async fn serve(&self, stream: TcpStream, security: Security) {
        let fabric = &self.door.fabric;
        let _connected = fabric.metrics.connected(self.label);
        let (label, peer) = (self.label, self.peer);
        let (acceptor, trust) = match security {
            Security::Plaintext => {
                let visitor = Visitor::new(&self.door, label, None);
                return self.drive(stream, visitor, Kick::default()).await;
            }
            Security::Tls(acceptor, trust) => (acceptor, trust),
        };
        let begun = fabric.peers.generation();
        let deadline = Instant::now() + fabric.limits.handshake_timeout;
        let handshake = tokio::select! {
            () = fabric.shutdown.cancelled() => return,
            handshake = timeout_at(deadline, acceptor.accept(stream)) => handshake,
        };
        let stream = match handshake {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let refused = refusal_of_io(&error);
                let reason = refused.map_or_else(|| error.to_string(), ToString::to_string);
                tracing::debug!(listener = label, %peer, %reason, "TLS handshake failed");
                let reason = refused.map_or("handshake", revocation::label);
                return fabric.metrics.refuse(label, reason);
            }
            Err(_) => return fabric.metrics.refuse(label, "handshake_timeout"),
        };
        let Some(chain) = stream.get_ref().1.peer_certificates() else {
            let visitor = Visitor::new(&self.door, label, None);
            return self.drive(stream, visitor, Kick::default()).await;
        };
        let identity = match peer_identity(chain) {
            Ok(identity) => identity,
            Err(error) => {
                tracing::debug!(listener = label, %peer, %error, "no identity in the certificate");
                return fabric.metrics.refuse(label, "identity");
            }
        };
        // Held to the end, so that a certificate that is withdrawn ends the connection.
        let place = match fabric.peers.enter(&trust, begun, label, chain) {
            Ok(place) => place,
            Err(refused) => {
                fabric.metrics.refuse(label, revocation::label(&refused));
                let status = Status::new(Code::Unauthenticated, refused.to_string());
                return fabric.tenant(&identity).refused(&identity, &status);
            }
        };
        let kick = Kick::default();
        place.attached(&kick);
        let visitor = Visitor::new(&self.door, label, Some(&identity));
        self.drive(stream, visitor, kick).await;
        drop(place);
    }

    /// Answers the requests of a connection until it ends, is idle, or has to go.
    async fn drive<S>(&self, stream: S, visitor: Visitor, kick: Kick)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let fabric = &self.door.fabric;
        let limits = &fabric.limits;
        let visitor = Arc::new(visitor);
        let activity = Arc::new(Activity::default());
        let protocol = self.protocol;
        let service = service_fn(|request| {
            let visitor = Arc::clone(&visitor);
            let busy = Busy::begin(&activity);
            async move {
                let response = Box::pin(answer(protocol, &visitor, request)).await;
                Ok::<_, Infallible>(response.map(|body| Body::new(Watched { body, _busy: busy })))
            }
        });
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(HEADERS.max(8 << 10));
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(limits.idle_timeout)
            .keep_alive_timeout(limits.idle_timeout)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEADERS as u32)
            .max_concurrent_streams(limits.calls_per_connection);
        let builder = match protocol {
            Protocol::Grpc => builder.http2_only(),
            Protocol::Http => builder,
        };
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut quiet = pin!(sleep(limits.handshake_timeout));
        let mut drained = pin!(sleep(DRAIN));
        let mut stopping = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(listener = self.label, peer = %self.peer, %error, "a connection ended");
                    }
                    return;
                }
                // The requests in hand go with the connection.
                _ = kick.kicked() => return,
                () = fabric.shutdown.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                    drained.as_mut().reset(Instant::now() + DRAIN);
                }
                () = drained.as_mut(), if stopping => return,
                () = quiet.as_mut() => {
                    if activity.ended_in(IDLE).is_zero() {
                        return;
                    }
                    quiet.as_mut().reset(Instant::now() + activity.ended_in(IDLE));
                }
            }
        }
    }
}

/// Bytes of one request that may be under way. Larger requests wait for what was read.
const STREAM_WINDOW: u32 = 1 << 20;

/// Bytes of all requests of a connection that may be under way.
const CONNECTION_WINDOW: u32 = 4 << 20;

async fn answer(
    protocol: Protocol,
    visitor: &Visitor,
    request: Request<Incoming>,
) -> Response<Body> {
    match protocol {
        Protocol::Grpc => grpc::serve(visitor, request).await,
        Protocol::Http => match path::route(request.uri().path()) {
            Some(route @ (Route::List | Route::Listed(_) | Route::Operation(_))) => {
                openai::serve(visitor, route, request).await
            }
            Some(route) => rest::serve(visitor, route, request).await,
            None => {
                let path = request.uri().path();
                let status = Status::new(
                    Code::NotFound,
                    format!("{path} is nothing that is served here"),
                );
                if path.starts_with("/v1") {
                    openai::problem(&status)
                } else {
                    rest::problem(&status)
                }
            }
        },
    }
}

/// Whether a connection has requests in hand, and since when it has none.
#[derive(Default)]
struct Activity {
    in_hand: AtomicUsize,
    last: parking_lot::Mutex<Option<Instant>>,
}

impl Activity {
    /// How long the connection may still be quiet; zero when it is over.
    fn ended_in(&self, idle: Duration) -> Duration {
        if self.in_hand.load(Ordering::Acquire) > 0 {
            return idle;
        }
        let last = *self.last.lock();
        // Without any request the time for the first one is over.
        last.map_or(Duration::ZERO, |last| idle.saturating_sub(last.elapsed()))
    }
}

/// One request in hand, from its headers to the end of its answer.
struct Busy(Arc<Activity>);

impl Busy {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.in_hand.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(activity))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        *self.0.last.lock() = Some(Instant::now());
        self.0.in_hand.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The body of an answer, which keeps its request in hand to its end.
struct Watched {
    body: Body,
    _busy: Busy,
}

impl hyper::body::Body for Watched {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// Reads what a request over HTTP may be, for the fuzz targets.
#[doc(hidden)]
pub fn read_request(path: &str, body: &[u8], json_bytes: Option<usize>) -> bool {
    let _ = openai::Head::read(body);
    let _ = openai::event(body);
    let known = path::route(path).is_some();
    let body = bytes::Bytes::copy_from_slice(body);
    known && json::decode(&body, json_bytes).is_ok()
}
