//! The broker under attack with everything around it that can break: its process, its disk, and two
//! links to it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use selvedge_client::{Options, Reconnect};

use super::plan::{Fault, Side};
use super::program::Program;
use crate::broker::OPEN;
use crate::link::{UdpLink, Weather};
use crate::pki::{SERVER_NAME, TestPki};
use crate::power::{FragileDisk, Fsync, Loss};

/// How soon a client notices that the broker is gone; shorter than the longer outages.
const IDLE_TIMEOUT: Duration = Duration::from_millis(1500);
/// Several in an idle timeout, so that a busy machine does not end connections.
const KEEP_ALIVE: Duration = Duration::from_millis(300);
/// Longer than any outage.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes that one client may have unanswered.
const OUTBOX: usize = 512 * 1024;
/// Bytes that a reader's queue may have: more than an absence brings, since a full queue loses, as it
/// should.
const QUEUE: usize = 256 << 20;
/// Where the devices are.
const HOME: (&str, &str) = ("acme", "plant-1");

/// What a storm does to a link.
const STORM: Weather = Weather {
    loss: 0.08,
    delay: Duration::from_millis(5),
    jitter: Duration::from_millis(5),
    reorder: 0.08,
    ..Weather::FAIR
};

/// Broker, disk and links.
#[derive(Debug)]
pub(crate) struct Site {
    pki: TestPki,
    program: Program,
    disk: Option<FragileDisk>,
    no_power_cuts: Option<String>,
    quic: SocketAddr,
    links: [UdpLink; 2],
    random: StdRng,
    /// Bytes that power cuts have caught before they were fsynced.
    pub(crate) unsynced: u64,
}

impl Site {
    /// Starts a broker with everything it needs in `folder`.
    pub(crate) async fn start(
        binary: &Path,
        folder: &Path,
        fsync: Fsync,
        seed: u64,
        random: StdRng,
    ) -> io::Result<Self> {
        let pki = TestPki::new();
        let behind = folder.join("disk");
        let mounted = FragileDisk::mount(&behind, &folder.join("place"), fsync);
        let (disk, no_power_cuts) = match mounted {
            Ok(disk) => (Some(disk), None),
            Err(error) => (None, Some(format!("FUSE cannot be mounted: {error}"))),
        };
        let store = disk.as_ref().map_or(&*behind, FragileDisk::place);
        let store = store.join("store");
        fs::write(folder.join("policy.toml"), OPEN)?;
        let config = folder.join("broker.toml");
        fs::write(
            &config,
            configuration(&pki, &store, ([127, 0, 0, 1], 0).into()),
        )?;
        let mut program = Program::new(binary, &config, &folder.join("broker.log"));
        let quic = program.start().await?;
        // It comes back on the port it has.
        fs::write(&config, configuration(&pki, &store, quic))?;
        let links = [
            UdpLink::start(quic, seed).await?,
            UdpLink::start(quic, !seed).await?,
        ];
        Ok(Self {
            pki,
            program,
            disk,
            no_power_cuts,
            quic,
            links,
            random,
            unsynced: 0,
        })
    }

    /// Why the power cannot be cut, if it cannot.
    pub(crate) fn no_power_cuts(&self) -> Option<&str> {
        self.no_power_cuts.as_deref()
    }

    /// How a device connects: over one of the links, or straight.
    pub(crate) fn options(&self, name: &str, over: Option<Side>) -> Options {
        let address = match over {
            Some(side) => self.link(side).address(),
            None => self.quic,
        };
        Options::new(&format!("{SERVER_NAME}:{}", address.port()))
            .expect("a host and a port")
            .resolve(address)
            .credentials(self.pki.device(HOME.0, HOME.1, name))
            .trust(self.pki.anchors())
            .keep_alive(KEEP_ALIVE)
            .idle_timeout(IDLE_TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            .outbox_bytes(OUTBOX)
            .reconnect(Reconnect {
                min: Duration::from_millis(20),
                max: Duration::from_millis(200),
            })
    }

    /// The identity of a device as the broker stamps it.
    pub(crate) fn identity(name: &str) -> String {
        format!("spiffe://test.example/{}/{}/{name}", HOME.0, HOME.1)
    }

    /// Fails if the broker has ended by itself.
    pub(crate) fn check(&mut self) -> io::Result<()> {
        self.program.check()
    }

    /// Lets something go wrong; everything but a reader's absence is over when this returns.
    pub(crate) async fn suffer(&mut self, fault: Fault) -> io::Result<()> {
        match fault {
            Fault::Kill => {
                self.program.kill()?;
                self.come_back().await
            }
            Fault::Restart => {
                self.program.terminate()?;
                self.come_back().await
            }
            Fault::Pause(time) => {
                self.program.pause()?;
                tokio::time::sleep(time).await;
                self.program.resume()
            }
            Fault::Cut(side, time) => {
                self.link(side).cut();
                tokio::time::sleep(time).await;
                self.link(side).heal();
                Ok(())
            }
            Fault::Storm(side, time) => {
                self.link(side).set(STORM);
                tokio::time::sleep(time).await;
                self.link(side).set(Weather::FAIR);
                Ok(())
            }
            Fault::Rebind(side) => {
                self.link(side).rebind().await;
                Ok(())
            }
            Fault::PowerCut(loss) => self.power_cut(loss).await,
            // Those are the reader's affair.
            Fault::Leave | Fault::Return => Ok(()),
        }
    }

    /// Ends the broker.
    pub(crate) async fn stop(mut self) -> io::Result<()> {
        self.program.terminate()?;
        let status = self.program.ended().await?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("the broker ended with {status}")))
        }
    }

    /// Without a disk that can lose power this is a kill.
    async fn power_cut(&mut self, loss: Loss) -> io::Result<()> {
        if let Some(disk) = &self.disk {
            disk.freeze();
        }
        self.program.kill()?;
        if let Some(disk) = &self.disk {
            disk.let_go();
        }
        self.program.ended().await?;
        if let Some(disk) = &mut self.disk {
            self.unsynced += disk.cut(loss, &mut self.random)?;
        }
        self.program.start().await?;
        Ok(())
    }

    async fn come_back(&mut self) -> io::Result<()> {
        self.program.ended().await?;
        self.program.start().await?;
        Ok(())
    }

    fn link(&self, side: Side) -> &UdpLink {
        match side {
            Side::A => &self.links[0],
            Side::B => &self.links[1],
        }
    }
}

impl Drop for Site {
    /// The disk can be unmounted once the process is gone, which may wait for the disk.
    fn drop(&mut self) {
        let _ = self.program.kill();
        if let Some(disk) = &self.disk {
            disk.let_go();
        }
        self.program.bury();
    }
}

fn configuration(pki: &TestPki, store: &Path, quic: SocketAddr) -> String {
    let identity = pki.server_files();
    format!(
        "[identity]\ncert = {:?}\nkey = {:?}\ntrust = {:?}\n\n[policy]\nfile = \"policy.toml\"\n\n\
         [listen]\nquic = \"{quic}\"\n\n[limits]\nidle_timeout = \"2s\"\nqueue_bytes = {QUEUE}\n\n[store]\nfolder = {store:?}\n",
        identity.cert, identity.key, identity.ca
    )
}
