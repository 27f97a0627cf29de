//! Model servers elsewhere, as engines of this worker: where they are, how they are reached, and how
//! much they can take.

use std::sync::Arc;
use std::time::Duration;

use hyper::Uri;
use hyper_util::rt::TokioIo;
use selvedge_certs::{ServerIdentity, TrustAnchors, tcp_client_config};
use selvedge_client::{Code, Status};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::config::UpstreamConfig;
use crate::engine::Capacity;

pub mod open_inference;
pub mod openai;

#[cfg(test)]
mod tests;

/// Time to open a connection to a server.
const CONNECT: Duration = Duration::from_secs(5);

/// Largest answer, or event of a stream, that is taken from a server.
pub(crate) const LARGEST: usize = 64 << 20;

/// Why a server elsewhere cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// A file it names cannot be read.
    #[error("read {path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The address is none.
    #[error("{url:?} is no address of a server: {reason}")]
    Address {
        /// What was found.
        url: String,
        /// What was expected.
        reason: &'static str,
    },
    /// It did not say what its model takes within the time to load it.
    #[error("{url}: the model {model} was not ready in {time:?}: {last}")]
    NotReady {
        /// The server.
        url: String,
        /// The model there.
        model: String,
        /// How long it was waited for.
        time: Duration,
        /// Its last answer.
        last: Box<Status>,
    },
}

/// A stream with or without TLS.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Where a server is.
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(crate) url: String,
    host: String,
    port: u16,
    /// What comes before the paths of the protocol, without a slash at its end.
    pub(crate) prefix: String,
    tls: Option<Arc<ClientConfig>>,
    /// The value of `authorization`.
    pub(crate) authorization: Option<String>,
}

impl Endpoint {
    pub(crate) fn new(config: &UpstreamConfig, alpn: &[u8]) -> Result<Self, UpstreamError> {
        let wrong = |reason| UpstreamError::Address {
            url: config.url.clone(),
            reason,
        };
        let uri: Uri = config
            .url
            .parse()
            .map_err(|_| wrong("expected http://host:port or https://host:port"))?;
        let host = uri.host().ok_or_else(|| wrong("expected a host"))?;
        let file = |path: &std::path::Path, reason: String| UpstreamError::File {
            path: path.display().to_string(),
            reason,
        };
        let (tls, default) = match (uri.scheme_str(), &config.ca) {
            (Some("http"), None) => (None, 80),
            (Some("http"), Some(_)) => return Err(wrong("expected https:// where there is a ca")),
            (Some("https"), None) => return Err(wrong("expected a ca for https://")),
            (Some("https"), Some(ca)) => {
                let anchors =
                    TrustAnchors::from_file(ca).map_err(|error| file(ca, error.to_string()))?;
                let tls = tcp_client_config(None, &anchors, ServerIdentity::Any, &[alpn]);
                (Some(tls.map_err(|error| file(ca, error.to_string()))?), 443)
            }
            _ => return Err(wrong("expected http:// or https://")),
        };
        let authorization = match &config.token_file {
            None => None,
            Some(path) => {
                let token =
                    std::fs::read_to_string(path).map_err(|error| file(path, error.to_string()))?;
                let token = token.trim();
                if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                    return Err(file(
                        path,
                        "expected one token of printable ASCII".to_owned(),
                    ));
                }
                Some(format!("Bearer {token}"))
            }
        };
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(default),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            url: config.url.clone(),
            tls,
            authorization,
        })
    }

    /// Host and port as requests name them.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Opens a connection.
    pub(crate) async fn connect(&self) -> Result<TokioIo<Box<dyn Stream>>, Status> {
        let connecting = async {
            let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
            stream.set_nodelay(true)?;
            let Some(tls) = &self.tls else {
                return Ok::<_, std::io::Error>(Box::new(stream) as Box<dyn Stream>);
            };
            let name = ServerName::try_from(self.host.clone()).map_err(std::io::Error::other)?;
            let connector = TlsConnector::from(Arc::clone(tls));
            Ok(Box::new(connector.connect(name, stream).await?) as Box<dyn Stream>)
        };
        match tokio::time::timeout(CONNECT, connecting).await {
            Ok(Ok(stream)) => Ok(TokioIo::new(stream)),
            Ok(Err(error)) => Err(self.unreachable(&error.to_string())),
            Err(_) => Err(self.unreachable(&format!("no connection in {CONNECT:?}"))),
        }
    }

    pub(crate) fn unreachable(&self, why: &str) -> Status {
        Status::new(
            Code::Unavailable,
            format!("the model server {} cannot be reached: {why}", self.url),
        )
    }
}

/// How much a server can take, from what it says and from how it answers. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Health {
    most: u32,
    slots: u32,
}

/// What was learnt of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// It says that it is ready.
    Ready,
    /// It says that it is not, or says nothing.
    NotReady,
    /// It turned a request away for its load.
    Overloaded,
}

impl Health {
    /// Of a server of which nothing is known yet, which takes `most` requests at once.
    pub(crate) fn new(most: u32) -> Self {
        Self { most, slots: 0 }
    }

    /// Takes a sign in. A server that comes back gets everything at once; one that was overloaded
    /// gets an eighth more with each sign of life.
    pub(crate) fn see(&mut self, sign: Sign) {
        self.slots = match sign {
            Sign::NotReady => 0,
            Sign::Ready if self.slots == 0 => self.most,
            Sign::Ready => self.most.min(self.slots + (self.most / 8).max(1)),
            // Not to zero: whoever is sent still finds out when there is room again.
            Sign::Overloaded => (self.slots / 2).max(1).min(self.slots),
        };
    }

    pub(crate) fn capacity(self) -> Capacity {
        Capacity {
            slots: self.slots,
            loaded: self.slots > 0,
        }
    }
}

/// Shares a server's health with those who ask it and with the worker.
#[derive(Debug)]
pub(crate) struct Watched {
    health: watch::Sender<Health>,
    capacity: watch::Sender<Capacity>,
}

impl Watched {
    pub(crate) fn new(most: u32) -> Self {
        let health = Health::new(most);
        Self {
            health: watch::Sender::new(health),
            capacity: watch::Sender::new(health.capacity()),
        }
    }

    pub(crate) fn see(&self, sign: Sign) {
        self.health.send_modify(|health| health.see(sign));
        let capacity = self.health.borrow().capacity();
        self.capacity.send_if_modified(|held| {
            let changed = *held != capacity;
            *held = capacity;
            changed
        });
    }

    /// Learns from how a request ended.
    pub(crate) fn see_outcome(&self, outcome: &Result<(), Status>) {
        match outcome.as_ref().map_err(|status| status.code) {
            Err(Code::ResourceExhausted) => self.see(Sign::Overloaded),
            Err(Code::Unavailable) => self.see(Sign::NotReady),
            _ => {}
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Capacity> {
        self.capacity.subscribe()
    }
}
