//! Clients of the front door: one HTTP/1.1 or gRPC connection, without retries or any other help.

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use crate::pki::SERVER_NAME;

/// A stream with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

async fn connect(
    address: SocketAddr,
    tls: Option<rustls::ClientConfig>,
) -> std::io::Result<Box<dyn Stream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let Some(config) = tls else {
        return Ok(Box::new(stream));
    };
    let name = ServerName::try_from(SERVER_NAME).expect("a host name");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    Ok(Box::new(connector.connect(name, stream).await?))
}

/// One HTTP/1.1 connection. Dropping it closes the connection, whatever is under way.
#[derive(Debug)]
pub struct HttpPeer {
    sender: http1::SendRequest<Full<Bytes>>,
    _connection: AbortOnDropHandle<()>,
}

impl HttpPeer {
    /// Connects, with TLS if there is a configuration for it.
    ///
    /// # Errors
    /// Nobody listens there, or TLS fails.
    pub async fn connect(
        address: SocketAddr,
        tls: Option<rustls::ClientConfig>,
    ) -> std::io::Result<Self> {
        let io = TokioIo::new(connect(address, tls).await?);
        let (sender, connection) = http1::handshake(io).await.map_err(std::io::Error::other)?;
        Ok(Self {
            sender,
            _connection: AbortOnDropHandle::new(tokio::spawn(async move {
                let _ = connection.await;
            })),
        })
    }

    /// Sends a request, with a body unless it is empty, and returns the answer as it begins.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn begin(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> hyper::Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", SERVER_NAME);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).expect("a request");
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }

    /// As [`Self::begin`], with the whole body of the answer.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn ask(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> hyper::Result<Response<Bytes>> {
        let (parts, body) = self.begin(method, path, headers, body).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(parts, body))
    }
}

/// One HTTP/2 connection, for a client of tonic.
#[derive(Debug, Clone)]
pub struct GrpcPeer {
    sender: http2::SendRequest<tonic::body::Body>,
    _connection: Arc<AbortOnDropHandle<()>>,
}

impl GrpcPeer {
    /// Connects, with TLS if there is a configuration for it.
    ///
    /// # Errors
    /// Nobody listens there, or TLS fails.
    pub async fn connect(
        address: SocketAddr,
        tls: Option<rustls::ClientConfig>,
    ) -> std::io::Result<Self> {
        let io = TokioIo::new(connect(address, tls).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
            .await
            .map_err(std::io::Error::other)?;
        Ok(Self {
            sender,
            _connection: Arc::new(AbortOnDropHandle::new(tokio::spawn(async move {
                let _ = connection.await;
            }))),
        })
    }
}

impl tower_service::Service<Request<tonic::body::Body>> for GrpcPeer {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, hyper::Result<Self::Response>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<tonic::body::Body>) -> Self::Future {
        // Of HTTP/2 the whole address is asked for.
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str());
        let uri = format!("http://{SERVER_NAME}{path}")
            .parse()
            .expect("a path");
        *request.uri_mut() = uri;
        Box::pin(self.sender.send_request(request))
    }
}
