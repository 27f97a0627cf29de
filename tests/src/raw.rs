//! Peers without manners: a QUIC and a TCP client that write any bytes they like.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use selvedge_certs::{Credentials, TrustAnchors, provider, quic_client_config};
use selvedge_proto::ALPN;
use selvedge_proto::frame::{self, Frame, FrameDecoder, Kind};
use selvedge_proto::wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::pki::{RawCertificate, SERVER_NAME};
use crate::wait::within;

/// The largest frame a raw peer reads; tests look at control frames only.
const MAX_FRAME: usize = 1 << 20;
/// What a raw peer reads of a stream it does not understand.
const MAX_READ: usize = 1 << 20;

/// The quinn configuration of an honest client.
pub fn quic_config(credentials: Credentials, anchors: &TrustAnchors) -> ClientConfig {
    let crypto = quic_client_config(credentials, anchors, &[ALPN]).expect("good parts");
    ClientConfig::new(Arc::new(crypto))
}

/// The quinn configuration of a client with a certificate that the project itself would not load.
pub fn quic_config_with(certificate: RawCertificate, ca_file: &std::path::Path) -> ClientConfig {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(ca_file).expect("read the authority");
    roots.add(ca).expect("our own authority");
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(certificate.chain, certificate.key)
        .expect("a key that belongs to its certificate");
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let crypto = QuicClientConfig::try_from(tls).expect("the provider has QUIC's first suite");
    ClientConfig::new(Arc::new(crypto))
}

/// A QUIC connection on an endpoint of its own, with nothing of the protocol on it yet.
#[derive(Debug)]
pub struct RawQuic {
    /// The connection.
    pub connection: Connection,
    /// Kept because a connection ends with its endpoint.
    pub endpoint: Endpoint,
}

impl RawQuic {
    /// Completes the handshake as the client sees it. In TLS 1.3 a broker may still refuse the
    /// certificate: see [`RawQuic::closed`].
    pub async fn connect(
        broker: SocketAddr,
        config: ClientConfig,
    ) -> Result<Self, ConnectionError> {
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("a free port");
        let connecting = endpoint
            .connect_with(config, broker, SERVER_NAME)
            .expect("a good name and address");
        let connection = within("a QUIC handshake", connecting).await?;
        Ok(Self {
            connection,
            endpoint,
        })
    }

    /// Opens the control stream, says hello as `session` and reads the welcome.
    pub async fn greet(&self, session: &str) -> io::Result<RawControl> {
        let (send, receive) = self.connection.open_bi().await?;
        let mut control = RawControl {
            send,
            receive,
            decoder: FrameDecoder::new(MAX_FRAME),
        };
        control.write(&control_frame(hello(session))).await?;
        match control.read().await? {
            wire::control::Frame::Welcome(_) => Ok(control),
            other => Err(io::Error::other(format!(
                "expected Welcome, found {other:?}"
            ))),
        }
    }

    /// Waits until the broker ends the connection and says how.
    pub async fn closed(&self) -> ConnectionError {
        within("the broker to end the connection", self.connection.closed()).await
    }
}

/// The control stream of a raw peer.
#[derive(Debug)]
pub struct RawControl {
    /// Towards the broker.
    pub send: SendStream,
    /// From the broker.
    pub receive: RecvStream,
    decoder: FrameDecoder,
}

impl RawControl {
    /// Writes bytes, frames or not.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.send.write_all(bytes).await.map_err(io::Error::from)
    }

    /// The next control frame; frames of other kinds are skipped.
    pub async fn read(&mut self) -> io::Result<wire::control::Frame> {
        loop {
            while let Some(Frame { kind, body }) =
                self.decoder.next_frame().map_err(io::Error::other)?
            {
                if kind != Kind::CONTROL {
                    continue;
                }
                let control: wire::Control =
                    frame::decode("Control", body).map_err(io::Error::other)?;
                if let Some(frame) = control.frame {
                    return Ok(frame);
                }
            }
            let chunk = within("a control frame", self.receive.read_chunk(MAX_READ, true)).await;
            match chunk.map_err(io::Error::from)? {
                Some(chunk) => self.decoder.push(chunk.bytes),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }
}

/// The first frame of a client.
pub fn hello(session: &str) -> wire::control::Frame {
    wire::control::Frame::Hello(wire::Hello {
        revision: selvedge_proto::REVISION,
        agent: "raw".into(),
        session: session.into(),
        max_frame_bytes: MAX_FRAME as u32,
        ..Default::default()
    })
}

/// A control frame in bytes.
pub fn control_frame(content: wire::control::Frame) -> Bytes {
    let control = wire::Control {
        frame: Some(content),
    };
    frame::encode(Kind::CONTROL, &control)
}

/// Writes bytes to a TCP port and reads what comes until the other side closes or resets, as it must
/// some time. Our own side stays open, since servers may take its end for that of the request.
pub async fn tcp_exchange(address: SocketAddr, bytes: &[u8]) -> io::Result<Bytes> {
    let mut stream = TcpStream::connect(address).await?;
    // The other side may have closed before everything is written: that is an answer too.
    let _ = stream.write_all(bytes).await;
    let mut answer = BytesMut::new();
    within("the end of a TCP connection", async {
        while answer.len() < MAX_READ {
            match stream.read_buf(&mut answer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    })
    .await;
    Ok(answer.freeze())
}
