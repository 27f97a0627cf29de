//! MQTT over WebSocket: the HTTP upgrade, and binary frames as the bytes of one stream.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{Sink as _, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::uri::Authority;
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config};

use crate::metrics::Metrics;
use crate::mqtt::packet::MAX_CONNECT;

/// The subprotocol that clients have to offer (MQTT 5.0 and 3.1.1, section 6).
const SUBPROTOCOL: &str = "mqtt";

/// Bytes read from the socket at once, and kept by a connection that is idle.
const READ: usize = 4 * 1024;

/// Most bytes of one frame to the client. A packet may go in several.
const WRITE: usize = 64 * 1024;

/// What a frame may have beyond the largest packet: clients put several packets in one.
const BESIDE_A_PACKET: usize = 64 * 1024;

/// What a client may send before it is answered: the upgrade, and the CONNECT with little behind it.
const BEFORE_AN_ANSWER: usize = MAX_CONNECT + 64 * 1024;

/// Which web pages may connect: a browser names the page's origin, other clients name none.
///
/// A browser adds its user's client certificate to any page's connection, and reaches listeners that
/// only its own machine does. So a page has to be named here to be let in. Some clients that are no
/// browsers name the listener itself, which no page can where that is believed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(Arc<[Box<str>]>);

/// A text that is no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} is no origin: expected a scheme and a host such as https://panel.example.org, with a \
     port if it is not the scheme's own, and nothing after it"
)]
pub struct OriginError {
    found: String,
}

impl Origins {
    /// The origins of a configuration.
    ///
    /// # Errors
    /// The first text that is no origin.
    pub fn parse<T: AsRef<str>>(origins: &[T]) -> Result<Self, OriginError> {
        let parsed = origins.iter().map(|text| {
            let text = text.as_ref();
            let whole = text.parse::<Uri>().ok().filter(|uri| {
                let host = uri.host().is_some_and(|host| !host.is_empty());
                let bare = uri
                    .authority()
                    .is_some_and(|found| !found.as_str().contains('@'));
                host && bare && matches!(uri.scheme_str(), Some("http" | "https"))
            });
            // As a browser writes it: the path of a page is no part of its origin.
            match whole {
                Some(_) if !text.ends_with('/') && text.matches('/').count() == 2 => {
                    Ok(text.to_ascii_lowercase().into())
                }
                _ => Err(OriginError {
                    found: text.to_owned(),
                }),
            }
        });
        parsed
            .collect::<Result<Vec<_>, _>>()
            .map(|all| Self(all.into()))
    }

    fn allow(&self, origin: &[u8]) -> bool {
        let allowed = |held: &str| held.as_bytes().eq_ignore_ascii_case(origin);
        self.0.iter().any(|held| allowed(held))
    }
}

/// Whether the origin of the listener itself is believed: the host and port that the request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OwnOrigin {
    /// Whatever the name: the certificate shows that it is the broker's.
    Named,
    /// When it is an address or `localhost`. Any other name may have come to mean this machine after a
    /// page of that name was loaded.
    Addressed,
}

impl OwnOrigin {
    fn allows(self, origin: &[u8], host: Option<&[u8]>) -> bool {
        let (Ok(origin), Some(Ok(host))) =
            (std::str::from_utf8(origin), host.map(std::str::from_utf8))
        else {
            return false;
        };
        let same = (origin.split_once("://")).is_some_and(|(_, at)| at.eq_ignore_ascii_case(host));
        let addressed = || {
            let name = host.parse::<Authority>();
            name.is_ok_and(|name| {
                let name = name.host().trim_start_matches('[').trim_end_matches(']');
                name.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
            })
        };
        same && (self == Self::Named || addressed())
    }
}

/// Why a connection does not become a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UpgradeError {
    /// It ended first.
    #[error("closed before the upgrade")]
    Closed,
    /// What came is no request for a WebSocket.
    #[error("expected an HTTP request for a WebSocket, found something else")]
    NoUpgrade,
    /// [`SUBPROTOCOL`] is not offered.
    #[error("expected the subprotocol \"mqtt\" to be offered in Sec-WebSocket-Protocol")]
    Subprotocol,
    /// A web page that may not connect.
    #[error("the origin of the page is not among mqtt.origins")]
    Origin,
}

impl UpgradeError {
    /// Label of the counter of refused connections.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed_before_upgrade",
            Self::NoUpgrade => "no_upgrade",
            Self::Subprotocol => "subprotocol",
            Self::Origin => "origin",
        }
    }
}

/// Answers the HTTP request on `stream`. Frames may have as many bytes as `max_packet`, and some.
///
/// # Errors
/// The client is told why, as far as HTTP can.
#[allow(
    clippy::result_large_err,
    reason = "the crate wants the answer of a refusal by value"
)]
pub(crate) async fn accept<S>(
    stream: S,
    origins: &Origins,
    own: OwnOrigin,
    max_packet: usize,
    report: Report,
) -> Result<WebSocket<S>, UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut refused = None;
    let check =
        |request: &Request, mut response: Response| match check(request.headers(), origins, own) {
            Ok(()) => {
                let chosen = HeaderValue::from_static(SUBPROTOCOL);
                response
                    .headers_mut()
                    .insert(header::SEC_WEBSOCKET_PROTOCOL, chosen);
                Ok(response)
            }
            Err(error) => {
                refused = Some(error);
                Err(refusal(error))
            }
        };
    let limit = max_packet.saturating_add(BESIDE_A_PACKET);
    let config = WebSocketConfig::default()
        .read_buffer_size(READ)
        // Each frame goes to the socket at once: what waits is in the connection's own output.
        .write_buffer_size(0)
        .max_write_buffer_size(2 * WRITE)
        .max_frame_size(Some(limit))
        .max_message_size(Some(limit));
    let gate = Gate {
        stream,
        allowance: Some(BEFORE_AN_ANSWER),
    };
    match accept_hdr_async_with_config(gate, check, Some(config)).await {
        Ok(inner) => Ok(WebSocket {
            inner,
            rest: Bytes::new(),
            report,
        }),
        Err(Error::Io(_) | Error::ConnectionClosed | Error::AlreadyClosed) => {
            Err(refused.unwrap_or(UpgradeError::Closed))
        }
        Err(_) => Err(refused.unwrap_or(UpgradeError::NoUpgrade)),
    }
}

fn check(headers: &HeaderMap, origins: &Origins, own: OwnOrigin) -> Result<(), UpgradeError> {
    let mut pages = headers.get_all(header::ORIGIN).iter();
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes);
    if !pages.all(|page| origins.allow(page.as_bytes()) || own.allows(page.as_bytes(), host)) {
        return Err(UpgradeError::Origin);
    }
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let mut offered = offered.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    if !offered.any(|name| name.trim_ascii() == SUBPROTOCOL.as_bytes()) {
        return Err(UpgradeError::Subprotocol);
    }
    Ok(())
}

fn refusal(error: UpgradeError) -> ErrorResponse {
    let status = match error {
        UpgradeError::Origin => StatusCode::FORBIDDEN,
        _ => StatusCode::BAD_REQUEST,
    };
    let text = error.to_string();
    let length = HeaderValue::from(text.len());
    let mut response = ErrorResponse::new(Some(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// A WebSocket as a stream of bytes. Where frames begin and end means nothing to MQTT (section 6 of
/// both standards). Pings are answered and closing is part of reading.
pub(crate) struct WebSocket<S> {
    inner: WebSocketStream<Gate<S>>,
    /// What has not been taken of the frame that was read last.
    rest: Bytes,
    report: Report,
}

/// Whom to tell of a client that breaks the WebSocket protocol.
pub(crate) struct Report {
    metrics: Arc<Metrics>,
    listener: &'static str,
    peer: SocketAddr,
}

impl Report {
    pub(crate) fn new(metrics: &Arc<Metrics>, listener: &'static str, peer: SocketAddr) -> Self {
        Self {
            metrics: Arc::clone(metrics),
            listener,
            peer,
        }
    }

    /// Counts the end of a connection.
    fn broken(&self, what: &'static str) -> io::Error {
        let Self { listener, peer, .. } = self;
        tracing::debug!(listener, %peer, "the client sent {what}");
        self.metrics.protocol_error(listener, what);
        io::Error::new(io::ErrorKind::InvalidData, what)
    }
}

impl<S> fmt::Debug for WebSocket<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSocket")
            .field("rest", &self.rest.len())
            .finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if !self.rest.is_empty() {
                let count = self.rest.len().min(buf.remaining());
                buf.put_slice(&self.rest[..count]);
                self.rest.advance(count);
                return Poll::Ready(Ok(()));
            }
            let what = match ready!(Pin::new(&mut self.inner).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => {
                    self.rest = bytes;
                    continue;
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                None
                | Some(
                    Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed),
                ) => return Poll::Ready(Ok(())),
                Some(Err(Error::Io(error))) => return Poll::Ready(Err(error)),
                Some(Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake))) => {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                Some(Ok(Message::Text(_))) => (CloseCode::Unsupported, "a WebSocket frame of text"),
                Some(Err(Error::Capacity(_))) => {
                    (CloseCode::Size, "a WebSocket frame that is too large")
                }
                Some(Err(_)) => (CloseCode::Protocol, "a malformed WebSocket frame"),
            };
            let (code, what) = what;
            self.say_why(cx, code, what);
            return Poll::Ready(Err(self.report.broken(what)));
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// Closes with a code (RFC 6455, section 7.4.1), as far as that goes without waiting: the connection
    /// ends whether the client hears why or not.
    fn say_why(&mut self, cx: &mut Context<'_>, code: CloseCode, what: &'static str) {
        let close = CloseFrame {
            code,
            reason: Utf8Bytes::from_static(what),
        };
        if let Poll::Ready(Ok(())) = Pin::new(&mut self.inner).poll_ready(cx)
            && (Pin::new(&mut self.inner).start_send(Message::Close(Some(close)))).is_ok()
        {
            let _ = Pin::new(&mut self.inner).poll_flush(cx);
        }
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        frame: impl FnOnce() -> Bytes,
    ) -> Poll<io::Result<usize>> {
        self.inner.get_mut().allowance = None;
        ready!(Pin::new(&mut self.inner).poll_ready(cx)).map_err(failed)?;
        let frame = frame();
        let count = frame.len();
        Pin::new(&mut self.inner)
            .start_send(Message::Binary(frame))
            .map_err(failed)?;
        Poll::Ready(Ok(count))
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        _ => io::ErrorKind::BrokenPipe.into(),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, || Bytes::copy_from_slice(&buf[..buf.len().min(WRITE)]))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, || {
            let all: usize = slices.iter().map(|slice| slice.len()).sum();
            let mut frame = BytesMut::with_capacity(all.min(WRITE));
            for slice in slices {
                let room = WRITE - frame.len();
                frame.extend_from_slice(&slice[..slice.len().min(room)]);
            }
            frame.freeze()
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx).map_err(failed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx).map_err(failed)
    }
}

/// What a WebSocket reads from, which gives only so much until the broker has answered. A frame is
/// held until it is whole, and until its CONNECT is answered a client is nobody.
struct Gate<S> {
    stream: S,
    /// Bytes that may still be read; `None` once the broker has answered.
    allowance: Option<usize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.allowance == Some(0) {
            let what = "more than a CONNECT before it was answered";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let count = buf.filled().len() - before;
        self.allowance = self.allowance.map(|left| left.saturating_sub(count));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
