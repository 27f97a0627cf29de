//! QUIC in a simulated network: unmodified quinn over turmoil's UDP sockets and virtual clock, so that
//! minutes of partition pass in milliseconds. Time and network follow the seed; keys, connection ids
//! and back-off stay random.

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, UdpPoller};

/// A QUIC endpoint on `port` of the current simulated host; port 0 takes a free one. Call it inside a
/// turmoil host or client.
pub async fn endpoint(port: u16, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let socket = turmoil::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
    Endpoint::new_with_abstract_socket(
        EndpointConfig::default(),
        server,
        Arc::new(SimSocket::new(socket)),
        // Its tasks and timers are tokio's, whose clock turmoil drives.
        Arc::new(TokioRuntime),
    )
}

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// One datagram per call in each direction: turmoil has neither GSO nor GRO.
struct SimSocket {
    socket: Arc<turmoil::net::UdpSocket>,
    /// The wait for the next datagram. It holds the socket's receive lock, so it must be gone before
    /// the datagram is taken.
    readable: Mutex<Option<Readable>>,
}

impl SimSocket {
    fn new(socket: turmoil::net::UdpSocket) -> Self {
        Self {
            socket: Arc::new(socket),
            readable: Mutex::new(None),
        }
    }
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimSocket").field(&self.socket).finish()
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self
            .socket
            .try_send_to(transmit.contents, transmit.destination)
        {
            Ok(_) => Ok(()),
            // A host that does not exist is silence on a real network.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut slot = self.readable.lock().expect("no panic while it is held");
        loop {
            let readable = slot.get_or_insert_with(|| {
                let socket = Arc::clone(&self.socket);
                Box::pin(async move { socket.readable().await })
            });
            let readied = ready!(readable.as_mut().poll(cx));
            *slot = None;
            readied?;
            match self.socket.try_recv_from(&mut bufs[0]) {
                Ok((len, addr)) => {
                    meta[0] = RecvMeta {
                        addr,
                        len,
                        stride: len,
                        ecn: None,
                        dst_ip: None,
                    };
                    return Poll::Ready(Ok(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
