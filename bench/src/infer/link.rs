//! A UDP relay of one client that can be cut, so that nothing passes and nobody is told.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::UdpSocket;
use tokio_util::task::AbortOnDropHandle;

/// The largest UDP payload.
const DATAGRAM: usize = 65_536;

pub(super) struct Link {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Link {
    pub(super) async fn to(broker: SocketAddr) -> std::io::Result<Self> {
        let near = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
        let far = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
        far.connect(broker).await?;
        let address = near.local_addr()?;
        let cut = Arc::new(AtomicBool::new(false));
        let (learned, client) = tokio::sync::watch::channel(None);
        let up = {
            let (near, far, cut) = (Arc::clone(&near), Arc::clone(&far), Arc::clone(&cut));
            async move {
                let mut datagram = vec![0; DATAGRAM];
                while let Ok((length, from)) = near.recv_from(&mut datagram).await {
                    learned.send_replace(Some(from));
                    if !cut.load(Ordering::Relaxed) {
                        // A full buffer loses it, as any network may.
                        let _ = far.send(&datagram[..length]).await;
                    }
                }
            }
        };
        let down = {
            let cut = Arc::clone(&cut);
            async move {
                let mut datagram = vec![0; DATAGRAM];
                // An error is the broker's port being closed, which may open again.
                loop {
                    let Ok(length) = far.recv(&mut datagram).await else {
                        continue;
                    };
                    let client = *client.borrow();
                    if let Some(client) = client.filter(|_| !cut.load(Ordering::Relaxed)) {
                        let _ = near.send_to(&datagram[..length], client).await;
                    }
                }
            }
        };
        Ok(Self {
            address,
            cut,
            _tasks: [
                AbortOnDropHandle::new(tokio::spawn(up)),
                AbortOnDropHandle::new(tokio::spawn(down)),
            ],
        })
    }

    /// Where the client connects to.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Nothing passes from now on, or everything again.
    pub(super) fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}
