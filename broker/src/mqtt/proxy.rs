//! PROXY protocol, version 2: a load balancer says in a header for whom it connects.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use ppp::v2::{Addresses, Command, Header, PROTOCOL_PREFIX};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::TcpStream;

/// The fixed part of a header: prefix, version and command, family, length of the rest.
const MINIMUM_LENGTH: usize = PROTOCOL_PREFIX.len() + 4;

/// Longest header after its fixed part: the addresses, and additions of the balancer, which are
/// skipped. Those of known balancers have a few hundred bytes.
const MAX_HEADER: usize = 4 * 1024;

/// Load balancers whose headers are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedProxies(Arc<[Network]>);

impl TrustedProxies {
    /// Those of these networks.
    pub fn new(networks: impl IntoIterator<Item = Network>) -> Self {
        Self(networks.into_iter().collect())
    }

    fn include(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }
}

/// Addresses with a common prefix, such as `10.1.0.0/16`, or a single one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// A text that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} is no network: expected an address such as 10.1.0.7, or 10.1.0.0/16 or fd00::/8"
)]
pub struct NetworkError {
    found: String,
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let network = || {
            let (address, prefix) = match text.split_once('/') {
                Some((address, prefix)) => (address, Some(prefix)),
                None => (text, None),
            };
            let address: IpAddr = address.parse().ok()?;
            let width = if address.is_ipv4() { 32 } else { 128 };
            let prefix = match prefix {
                Some(prefix) if prefix.bytes().all(|byte| byte.is_ascii_digit()) => {
                    prefix.parse().ok().filter(|prefix| *prefix <= width)?
                }
                Some(_) => return None,
                None => width,
            };
            Some(Self { address, prefix })
        };
        network().ok_or_else(|| NetworkError {
            found: text.to_owned(),
        })
    }
}

impl Network {
    /// Whether an address is one of it. One of IPv4 may be written as IPv6.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(held), IpAddr::V4(asked)) => {
                let differ = held.to_bits() ^ asked.to_bits();
                differ.checked_shr(32 - u32::from(self.prefix)).unwrap_or(0) == 0
            }
            (IpAddr::V6(held), IpAddr::V6(asked)) => {
                let differ = held.to_bits() ^ asked.to_bits();
                differ
                    .checked_shr(128 - u32::from(self.prefix))
                    .unwrap_or(0)
                    == 0
            }
            _ => false,
        }
    }
}

/// Why a connection on a listener behind load balancers is closed.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It comes from somewhere else.
    #[error("expected a load balancer of mqtt.proxy_protocol, found {0}")]
    Untrusted(IpAddr),
    /// It does not begin with a header.
    #[error(
        "expected a PROXY protocol header of version 2, found other bytes: have the load balancer send it"
    )]
    Missing,
    /// The header is malformed.
    #[error("expected a PROXY protocol header of version 2, found a malformed one: {0}")]
    Malformed(String),
    /// The header is longer than those of known balancers by far.
    #[error("expected a PROXY protocol header of up to {MAX_HEADER} bytes, found one of {0}")]
    TooLong(usize),
    /// The connection ended or failed first.
    #[error("the connection ended before its PROXY protocol header: {0}")]
    Closed(#[from] io::Error),
}

impl ProxyError {
    /// Label of the counter of refused connections.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Untrusted(_) => "proxy_untrusted",
            Self::Missing => "proxy_header_missing",
            Self::Malformed(_) | Self::TooLong(_) => "proxy_header_malformed",
            Self::Closed(_) => "closed_before_proxy_header",
        }
    }
}

/// Whether a connection begins with a header, of either version, that nobody expects. Nothing is taken from
/// the connection. Waits for its first bytes; no client of any protocol here lets the broker speak first.
pub(crate) async fn is_announced(stream: &TcpStream) -> bool {
    let mut start = [0; PROTOCOL_PREFIX.len()];
    match stream.peek(&mut start).await {
        Ok(count) => is_header(&start[..count]),
        // Whoever reads next finds it, too.
        Err(_) => false,
    }
}

/// Whether these are the first bytes of a header, as far as they go.
fn is_header(start: &[u8]) -> bool {
    // No packet of MQTT, record of TLS or request of HTTP begins with the first byte of version 2.
    let second = !start.is_empty() && PROTOCOL_PREFIX.starts_with(start);
    second || start.starts_with(b"PROXY ")
}

/// Reads the header that a connection from `peer` begins with, and not a byte more. Returns the address
/// of the client; that of the balancer when it speaks for itself, as its health checks do.
///
/// # Errors
/// The connection has to be closed.
pub async fn accept<S: AsyncRead + Unpin>(
    stream: &mut S,
    peer: SocketAddr,
    trusted: &TrustedProxies,
) -> Result<SocketAddr, ProxyError> {
    if !trusted.include(peer.ip()) {
        return Err(ProxyError::Untrusted(peer.ip()));
    }
    let mut header = vec![0; MINIMUM_LENGTH];
    stream
        .read_exact(&mut header[..PROTOCOL_PREFIX.len()])
        .await?;
    if !header.starts_with(PROTOCOL_PREFIX) {
        return Err(ProxyError::Missing);
    }
    stream
        .read_exact(&mut header[PROTOCOL_PREFIX.len()..])
        .await?;
    let rest = usize::from(u16::from_be_bytes([header[14], header[15]]));
    if rest > MAX_HEADER {
        return Err(ProxyError::TooLong(rest));
    }
    header.resize(MINIMUM_LENGTH + rest, 0);
    stream.read_exact(&mut header[MINIMUM_LENGTH..]).await?;
    let header =
        Header::try_from(&header[..]).map_err(|error| ProxyError::Malformed(error.to_string()))?;
    Ok(match (header.command, header.addresses) {
        (Command::Proxy, Addresses::IPv4(found)) => {
            SocketAddr::new(found.source_address.into(), found.source_port)
        }
        (Command::Proxy, Addresses::IPv6(found)) => SocketAddr::new(
            IpAddr::from(found.source_address).to_canonical(),
            found.source_port,
        ),
        _ => peer,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    const BALANCER: &str = "10.1.2.3:40000";

    fn trusted() -> TrustedProxies {
        TrustedProxies::new(["10.1.0.0/16".parse().unwrap(), "fd00::7".parse().unwrap()])
    }

    fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = PROTOCOL_PREFIX.to_vec();
        bytes.extend_from_slice(&[command, family]);
        bytes.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    async fn read(bytes: &[u8], peer: &str) -> (Result<SocketAddr, String>, usize) {
        let mut rest = bytes;
        let read = accept(&mut rest, peer.parse().unwrap(), &trusted()).await;
        (read.map_err(|error| error.label().to_owned()), rest.len())
    }

    #[test]
    fn a_header_that_nobody_expects_is_told_from_what_clients_send() {
        for header in [PROTOCOL_PREFIX, b"\r", b"\r\n\r\n", b"PROXY TCP4 1."] {
            assert!(is_header(header), "{header:?}");
        }
        // CONNECT, a TLS record, requests of HTTP, and nothing.
        for other in [
            &b"\x10\x10\0\x04MQTT"[..],
            b"\x16\x03\x01",
            b"GET / HTTP/1",
            b"P",
            b"PUT /",
            b"",
        ] {
            assert!(!is_header(other), "{other:?}");
        }
    }

    #[tokio::test]
    async fn the_client_is_who_the_header_names_and_nothing_behind_it_is_touched() {
        let mut body = vec![192, 0, 2, 7, 10, 0, 0, 1, 0x1F, 0x90, 0x22, 0xB3];
        // An addition of a kind that nobody knows.
        body.extend_from_slice(&[0xEA, 0, 3, 1, 2, 3]);
        let mut bytes = header(0x21, 0x11, &body);
        bytes.extend_from_slice(b"MQTT");
        assert_eq!(
            read(&bytes, BALANCER).await,
            (Ok("192.0.2.7:8080".parse().unwrap()), 4)
        );
        let mut v6 = [0; 36];
        v6[..16].copy_from_slice(
            &"2001:db8::9"
                .parse::<std::net::Ipv6Addr>()
                .unwrap()
                .octets(),
        );
        v6[32..34].copy_from_slice(&443u16.to_be_bytes());
        assert_eq!(
            read(&header(0x21, 0x21, &v6), "[fd00::7]:1").await,
            (Ok("[2001:db8::9]:443".parse().unwrap()), 0)
        );
        // A health check of the balancer itself, and a client without an address.
        for bytes in [header(0x20, 0, &[]), header(0x21, 0, &[])] {
            assert_eq!(
                read(&bytes, BALANCER).await,
                (Ok(BALANCER.parse().unwrap()), 0)
            );
        }
    }

    #[tokio::test]
    async fn what_is_no_header_or_from_nobody_known_is_refused() {
        let good = header(0x20, 0, &[]);
        for (bytes, peer, label) in [
            (&good[..], "10.2.0.1:1", "proxy_untrusted"),
            (
                b"\x10\x0c\0\x04MQTT\x05\x02\0\0",
                BALANCER,
                "proxy_header_missing",
            ),
            (
                b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n",
                BALANCER,
                "proxy_header_missing",
            ),
            (&good[..15], BALANCER, "closed_before_proxy_header"),
            (
                &header(0x31, 0x11, &[0; 12]),
                BALANCER,
                "proxy_header_malformed",
            ),
            (
                &header(0x21, 0x11, &[0; 11]),
                BALANCER,
                "proxy_header_malformed",
            ),
            (
                &header(0x21, 0, &[0; MAX_HEADER + 1]),
                BALANCER,
                "proxy_header_malformed",
            ),
        ] {
            assert_eq!(
                read(bytes, peer).await.0,
                Err(label.to_owned()),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn networks_are_read_and_matched() {
        let network = |text: &str| text.parse::<Network>().unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(network("10.1.0.0/16").contains(address("10.1.255.1")));
        assert!(network("10.1.0.0/16").contains(address("::ffff:10.1.0.1")));
        assert!(!network("10.1.0.0/16").contains(address("10.2.0.1")));
        assert!(network("0.0.0.0/0").contains(address("203.0.113.9")));
        assert!(!network("0.0.0.0/0").contains(address("2001:db8::1")));
        assert!(network("fd00::/8").contains(address("fdff::1")));
        assert!(!network("fd00::7").contains(address("fd00::8")));
        for bad in [
            "",
            "10.1.0.0/33",
            "::/129",
            "10.1/16",
            "10.1.0.0/",
            "10.1.0.0/+8",
            "host",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_an_address(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut all = PROTOCOL_PREFIX.to_vec();
            all.extend_from_slice(&bytes);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(read(&all, BALANCER));
        }
    }
}
