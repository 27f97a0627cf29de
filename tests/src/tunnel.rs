//! A way to the broker for MQTT clients that speak TCP only: a listener whose connections are carried
//! on over WebSocket or QUIC.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};
use tokio_util::task::AbortOnDropHandle;

use crate::pki::SERVER_NAME;

/// The tunnel, until dropped.
#[derive(Debug)]
pub struct Tunnel {
    /// Where to connect to.
    pub address: SocketAddr,
    _carrier: AbortOnDropHandle<()>,
}

/// How WebSockets of a tunnel are opened.
#[derive(Debug, Clone)]
pub struct WebSocketOptions {
    /// The broker's listener.
    pub broker: SocketAddr,
    /// TLS, for `wss`.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// Most bytes of a frame: packets are cut wherever this says.
    pub frame: usize,
}

impl Tunnel {
    /// Carries connections in WebSockets.
    pub async fn websocket(options: WebSocketOptions) -> Self {
        Self::open(move |local| {
            let options = options.clone();
            async move {
                let socket = open_websocket(&options).await?;
                carry_frames(local, socket, options.frame).await;
                Ok(())
            }
        })
        .await
    }

    /// Carries connections in a connection of QUIC each, on the stream it opens.
    pub async fn quic(broker: SocketAddr, config: quinn::ClientConfig) -> Self {
        let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
        Self::open(move |mut local| {
            let connecting = endpoint.connect_with(config.clone(), broker, SERVER_NAME);
            async move {
                let connection = connecting?.await?;
                let (send, recv) = connection.open_bi().await?;
                let mut stream = tokio::io::join(recv, send);
                let _ = tokio::io::copy_bidirectional(&mut local, &mut stream).await;
                Ok(())
            }
        })
        .await
    }

    async fn open<F, Fut>(carry: F) -> Self
    where
        F: Fn(TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let accept = async move {
            // Dropped with the tunnel, and with them the connections.
            let mut carried = tokio::task::JoinSet::new();
            while let Ok((local, _)) = listener.accept().await {
                carried.spawn(carry(local));
            }
        };
        Self {
            address,
            _carrier: AbortOnDropHandle::new(tokio::spawn(accept)),
        }
    }
}

/// What carries a WebSocket.
pub trait Carrier: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Carrier for S {}

/// Opens a WebSocket to a broker, as an MQTT client does.
///
/// # Errors
/// The broker refuses it.
pub async fn open_websocket(
    options: &WebSocketOptions,
) -> anyhow::Result<WebSocketStream<Box<dyn Carrier>>> {
    let tcp = TcpStream::connect(options.broker).await?;
    let (scheme, stream): (_, Box<dyn Carrier>) = match &options.tls {
        None => ("ws", Box::new(tcp)),
        Some(config) => {
            let name = ServerName::try_from(SERVER_NAME).expect("it is a name");
            let mut config = rustls::ClientConfig::clone(config);
            // As browsers do.
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            let connector = TlsConnector::from(Arc::new(config));
            ("wss", Box::new(connector.connect(name, tcp).await?))
        }
    };
    let uri = format!("{scheme}://{SERVER_NAME}:{}/mqtt", options.broker.port());
    let request = ClientRequestBuilder::new(uri.parse()?).with_sub_protocol("mqtt");
    let (socket, _) = client_async(request, stream).await?;
    Ok(socket)
}

async fn carry_frames(local: TcpStream, socket: WebSocketStream<Box<dyn Carrier>>, frame: usize) {
    let (mut from_client, mut to_client) = local.into_split();
    let (mut to_broker, mut from_broker) = socket.split();
    let out = async {
        let mut buffer = vec![0; frame];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            let piece = Bytes::copy_from_slice(&buffer[..count]);
            to_broker.send(Message::Binary(piece)).await?;
        }
        to_broker.close().await
    };
    let back = async {
        while let Some(Ok(message)) = from_broker.next().await {
            if let Message::Binary(bytes) = message
                && to_client.write_all(&bytes).await.is_err()
            {
                break;
            }
        }
        let _ = to_client.shutdown().await;
        Ok::<(), Error>(())
    };
    let _ = tokio::join!(out, back);
}
