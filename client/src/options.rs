//! What a client needs to connect, and how it behaves when the network does not.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use selvedge_certs::{Credentials, ReloadableCredentials, TrustAnchors};
use selvedge_proto::message::{Properties, Qos};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

/// UDP port of a broker when none is given.
pub(crate) const DEFAULT_PORT: u16 = 7443;

/// Where to connect, as whom, and how to behave.
#[derive(Debug, Clone)]
pub struct Options {
    pub(crate) broker: Endpoint,
    pub(crate) server_name: Option<String>,
    pub(crate) credentials: Option<ReloadableCredentials>,
    pub(crate) trust: Option<TrustAnchors>,
    pub(crate) session: String,
    pub(crate) session_expiry: Duration,
    pub(crate) clean_start: bool,
    pub(crate) agent: String,
    pub(crate) will: Option<Will>,
    pub(crate) connect_timeout: Duration,
    pub(crate) reconnect: Reconnect,
    pub(crate) keep_alive: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) max_frame_bytes: usize,
    pub(crate) outbox_bytes: usize,
    pub(crate) endpoint: Option<quinn::Endpoint>,
    pub(crate) resolve: Option<SocketAddr>,
}

impl Options {
    /// Options for the broker at `host:port`; the port is 7443 when not given.
    ///
    /// # Errors
    /// [`OptionsError::Broker`] when `broker` is not of that form.
    pub fn new(broker: &str) -> Result<Self, OptionsError> {
        Ok(Self {
            broker: Endpoint::parse(broker)?,
            server_name: None,
            credentials: None,
            trust: None,
            session: random_name(),
            session_expiry: Duration::ZERO,
            clean_start: false,
            agent: concat!("selvedge-client/", env!("CARGO_PKG_VERSION")).to_owned(),
            will: None,
            connect_timeout: Duration::from_secs(10),
            reconnect: Reconnect::default(),
            keep_alive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(15),
            max_frame_bytes: selvedge_proto::DEFAULT_MAX_FRAME,
            outbox_bytes: 16 * 1024 * 1024,
            endpoint: None,
            resolve: None,
        })
    }

    /// The name that the broker's certificate must carry. Default: the host.
    #[must_use]
    pub fn server_name(mut self, name: &str) -> Self {
        self.server_name = Some(name.to_owned());
        self
    }

    /// The client's own certificate and key. [`ReloadableCredentials`] may be given instead, to
    /// present a renewed certificate from the next connection on.
    #[must_use]
    pub fn credentials(mut self, credentials: impl Into<ReloadableCredentials>) -> Self {
        self.credentials = Some(credentials.into());
        self
    }

    /// The authorities whose brokers are trusted.
    #[must_use]
    pub fn trust(mut self, anchors: TrustAnchors) -> Self {
        self.trust = Some(anchors);
        self
    }

    /// Loads trust anchors, certificate chain and key from PEM files.
    ///
    /// # Errors
    /// [`OptionsError::Load`] naming the file and what is wrong with it.
    pub fn identity_files(self, ca: &Path, cert: &Path, key: &Path) -> Result<Self, OptionsError> {
        let anchors = TrustAnchors::from_file(ca)?;
        let credentials = Credentials::from_files(cert, key)?;
        Ok(self.trust(anchors).credentials(credentials))
    }

    /// Name of the session within the identity, 1 to 128 bytes, checked by [`Client::connect`].
    /// Default: a random name, so that every client has a session of its own.
    ///
    /// [`Client::connect`]: crate::Client::connect
    #[must_use]
    pub fn session(mut self, name: &str) -> Self {
        name.clone_into(&mut self.session);
        self
    }

    /// How long the broker keeps subscriptions and queued messages after the connection is lost.
    /// Default: zero, the session ends with the connection.
    #[must_use]
    pub fn session_expiry(mut self, expiry: Duration) -> Self {
        self.session_expiry = expiry;
        self
    }

    /// Discard what the broker kept of the session when the client first connects. Default: false.
    #[must_use]
    pub fn clean_start(mut self, clean: bool) -> Self {
        self.clean_start = clean;
        self
    }

    /// Program and version, shown to the broker's operators.
    #[must_use]
    pub fn agent(mut self, agent: &str) -> Self {
        agent.clone_into(&mut self.agent);
        self
    }

    /// A message that the broker publishes when the session ends without [`Client::close`].
    ///
    /// [`Client::close`]: crate::Client::close
    #[must_use]
    pub fn will(mut self, will: Will) -> Self {
        self.will = Some(will);
        self
    }

    /// How long the first connection may take, retries included. Default: 10 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Bounds of the back-off between attempts to reconnect, unless the broker advises others.
    #[must_use]
    pub fn reconnect(mut self, reconnect: Reconnect) -> Self {
        self.reconnect = reconnect;
        self
    }

    /// How often an idle connection is kept alive. Default: 5 s.
    #[must_use]
    pub fn keep_alive(mut self, interval: Duration) -> Self {
        self.keep_alive = interval;
        self
    }

    /// How long the broker may be silent before the connection counts as lost. Default: 15 s.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Largest message the client accepts, in bytes; at least 65,536. Default: 16 MiB.
    #[must_use]
    pub fn max_frame_bytes(mut self, bytes: usize) -> Self {
        self.max_frame_bytes = bytes.clamp(
            selvedge_proto::MIN_MAX_FRAME,
            selvedge_proto::frame::MAX_FRAME,
        );
        self
    }

    /// Bytes of messages that one class of publishes may hold unsent or unacknowledged; publishing
    /// waits beyond it. Default: 16 MiB.
    #[must_use]
    pub fn outbox_bytes(mut self, bytes: usize) -> Self {
        self.outbox_bytes = bytes;
        self
    }

    /// Uses a QUIC endpoint made by the caller, with a socket or runtime of its own.
    #[must_use]
    pub fn endpoint(mut self, endpoint: quinn::Endpoint) -> Self {
        self.endpoint = Some(endpoint);
        self
    }

    /// Connects to this address instead of asking DNS for the host.
    #[must_use]
    pub fn resolve(mut self, address: SocketAddr) -> Self {
        self.resolve = Some(address);
        self
    }
}

/// Bounds of the back-off between attempts to reconnect: a random delay between zero and a ceiling
/// that doubles from `min` to `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconnect {
    /// First ceiling.
    pub min: Duration,
    /// Last ceiling.
    pub max: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self {
            min: Duration::from_millis(100),
            max: Duration::from_secs(10),
        }
    }
}

/// A message that the broker publishes when the session ends without a goodbye.
#[derive(Debug, Clone)]
pub struct Will {
    topic: TopicName,
    payload: Bytes,
    qos: Qos,
    retain: bool,
    delay: Duration,
    properties: Properties,
}

impl Will {
    /// A will of QoS 0, not retained, published at once.
    pub fn new(topic: TopicName, payload: impl Into<Bytes>) -> Self {
        Self {
            topic,
            payload: payload.into(),
            qos: Qos::AtMostOnce,
            retain: false,
            delay: Duration::ZERO,
            properties: Properties::default(),
        }
    }

    /// Quality of service. Default: 0.
    #[must_use]
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }

    /// Keep as the topic's retained message. Default: false.
    #[must_use]
    pub fn retain(mut self, retain: bool) -> Self {
        self.retain = retain;
        self
    }

    /// How long after the loss of the connection it is published, whole seconds. Default: at once.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// What it carries besides the payload.
    #[must_use]
    pub fn properties(mut self, properties: Properties) -> Self {
        self.properties = properties;
        self
    }

    pub(crate) fn to_wire(&self) -> wire::Will {
        wire::Will {
            topic: self.topic.to_string(),
            payload: self.payload.clone(),
            qos: self.qos as u32,
            retain: self.retain,
            delay_s: whole_seconds(self.delay),
            header: (!self.properties.is_empty())
                .then(|| wire::MessageHeader::from(self.properties.clone())),
        }
    }
}

/// Why options are wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// The broker's address is not of the form `host:port`.
    #[error("expected a broker address host or host:port, found {found:?}")]
    Broker {
        /// What was given.
        found: String,
    },
    /// A certificate, key or trust anchor cannot be loaded.
    #[error(transparent)]
    Load(#[from] selvedge_certs::LoadError),
}

/// Host and port of a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Endpoint {
    /// Reads `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
    pub(crate) fn parse(text: &str) -> Result<Self, OptionsError> {
        let wrong = || OptionsError::Broker {
            found: text.chars().take(256).collect(),
        };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(wrong)?;
            let port = match rest {
                "" => None,
                rest => Some(rest.strip_prefix(':').ok_or_else(wrong)?),
            };
            (host, port)
        } else if text.parse::<std::net::Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let port = match port {
            Some(port) => port.parse().map_err(|_| wrong())?,
            None => DEFAULT_PORT,
        };
        let odd = |c: char| c.is_whitespace() || c.is_control() || c == '/';
        if host.is_empty() || port == 0 || host.contains(odd) {
            return Err(wrong());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Whole seconds, rounded up so that a short duration does not become none.
pub(crate) fn whole_seconds(duration: Duration) -> u32 {
    let part = u64::from(duration.subsec_nanos() > 0);
    let seconds = duration.as_secs().saturating_add(part);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

fn random_name() -> String {
    let bytes: [u8; 16] = rand::random();
    bytes.iter().fold(String::new(), |mut name, byte| {
        write!(name, "{byte:02x}").expect("writing to a string cannot fail");
        name
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broker_addresses_are_read_in_every_usual_form() {
        let table = [
            ("broker", "broker:7443"),
            ("broker:1", "broker:1"),
            ("10.0.0.1:99", "10.0.0.1:99"),
            ("::1", "[::1]:7443"),
            ("[::1]", "[::1]:7443"),
            ("[::1]:5", "[::1]:5"),
        ];
        for (text, expected) in table {
            assert_eq!(Endpoint::parse(text).unwrap().to_string(), expected);
        }
        for text in [
            "", ":1", "a:", "a:b", "a:70000", "a:0", "[::1", "[::1]x", "a b", "x/y",
        ] {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(
                matches!(&error, OptionsError::Broker { found } if found == text),
                "{text:?}"
            );
        }
    }

    #[test]
    fn short_durations_round_up() {
        assert_eq!(whole_seconds(Duration::ZERO), 0);
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(3)), 3);
        assert_eq!(whole_seconds(Duration::MAX), u32::MAX);
    }
}
