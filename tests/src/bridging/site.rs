//! The three that are broken in turn: mosquitto, a broker of the fabric, and the bridge between them,
//! each a process of its own on this machine.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use selvedge_client::{Options, Reconnect};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::process::Process;
use super::run::{Fault, Settings};
use crate::broker::OPEN;
use crate::pki::{SERVER_NAME, TestPki};

/// Where the devices are.
const HOME: (&str, &str) = ("acme", "plant-1");
/// Longer than any outage.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longer than mosquitto takes to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// The processes, their configuration and their addresses.
#[derive(Debug)]
pub(crate) struct Site {
    pki: TestPki,
    fabric: Process,
    bridge: Process,
    remote: Process,
    quic: SocketAddr,
    pub(crate) mqtt: SocketAddr,
    admin: SocketAddr,
}

impl Site {
    /// Starts all three in `folder`. The bridge is ready when this returns.
    pub(crate) async fn start(
        settings: &Settings,
        mosquitto: &Path,
        folder: &Path,
    ) -> io::Result<Self> {
        let pki = TestPki::new();
        let file = |name: &str| folder.join(name);
        let mqtt = free_port()?;
        let admin = free_port()?;
        fs::write(
            file("mosquitto.conf"),
            format!(
                "user root\nlog_dest stderr\nlog_type error\nlog_type warning\n\
                 listener {} 127.0.0.1\nallow_anonymous true\n\
                 persistence true\npersistence_location {}/\nautosave_interval 1\n\
                 max_queued_messages 0\nmax_inflight_messages 250\nset_tcp_nodelay true\n",
                mqtt.port(),
                folder.display()
            ),
        )?;
        let mut remote = Process::new(
            mosquitto,
            &["-c"],
            &file("mosquitto.conf"),
            &file("mosquitto.log"),
        );
        remote.start()?;
        listening(mqtt).await?;

        fs::write(file("policy.toml"), OPEN)?;
        let broker = file("broker.toml");
        let any = ([127, 0, 0, 1], 0).into();
        fs::write(&broker, fabric_toml(&pki, &file("store"), any))?;
        let arguments = ["broker", "--config"];
        let mut fabric = Process::new(&settings.binary, &arguments, &broker, &file("fabric.log"));
        fabric.start()?;
        let quic = fabric.line("quic=").await?;
        let quic = quic.parse().map_err(io::Error::other)?;
        fabric.line("ready").await?;
        // It comes back on the port it has.
        fs::write(&broker, fabric_toml(&pki, &file("store"), quic))?;

        fs::write(
            file("bridge.toml"),
            bridge_toml(settings, &pki, quic, mqtt, admin),
        )?;
        let arguments = ["bridge", "--config"];
        let config = file("bridge.toml");
        let mut bridge = Process::new(&settings.binary, &arguments, &config, &file("bridge.log"));
        bridge.start()?;
        bridge.line("ready").await?;
        Ok(Self {
            pki,
            fabric,
            bridge,
            remote,
            quic,
            mqtt,
            admin,
        })
    }

    /// How a device of the fabric connects.
    pub(crate) fn options(&self, name: &str) -> Options {
        Options::new(&format!("{SERVER_NAME}:{}", self.quic.port()))
            .expect("a host and a port")
            .resolve(self.quic)
            .credentials(self.pki.device(HOME.0, HOME.1, name))
            .trust(self.pki.anchors())
            .keep_alive(Duration::from_millis(500))
            .idle_timeout(Duration::from_secs(3))
            .connect_timeout(CONNECT_TIMEOUT)
            .reconnect(Reconnect {
                min: Duration::from_millis(20),
                max: Duration::from_millis(200),
            })
    }

    /// Fails if one of them has ended by itself.
    pub(crate) fn check(&mut self) -> io::Result<()> {
        self.fabric.check()?;
        self.bridge.check()?;
        self.remote.check()
    }

    /// Breaks something, leaves it so for a time, and puts it in order.
    pub(crate) async fn suffer(&mut self, fault: Fault, down: Duration) -> io::Result<()> {
        match fault {
            Fault::KillFabric => self.fabric.kill().await?,
            Fault::StopFabric => self.fabric.terminate().await?,
            Fault::KillBridge => self.bridge.kill().await?,
            Fault::StopBridge => self.bridge.terminate().await?,
            Fault::StopRemote => self.remote.terminate().await?,
            Fault::HoldRemote => self.remote.pause()?,
            Fault::KillBridgeWithoutFabric => {
                self.fabric.kill().await?;
                tokio::time::sleep(down / 2).await;
                self.bridge.kill().await?;
                self.bridge.start()?;
            }
            Fault::KillBridgeWithoutRemote => {
                self.remote.terminate().await?;
                tokio::time::sleep(down / 2).await;
                self.bridge.kill().await?;
                self.bridge.start()?;
            }
        }
        tokio::time::sleep(down).await;
        match fault {
            Fault::KillFabric | Fault::StopFabric | Fault::KillBridgeWithoutFabric => {
                self.fabric.start()?;
                self.fabric.line("ready").await?;
            }
            Fault::KillBridge | Fault::StopBridge => self.bridge.start()?,
            Fault::StopRemote | Fault::KillBridgeWithoutRemote => self.remote.start()?,
            Fault::HoldRemote => self.remote.resume()?,
        }
        Ok(())
    }

    /// Waits until a bridge that was started is ready.
    pub(crate) async fn bridge_ready(&mut self, fault: Fault) -> io::Result<()> {
        match fault {
            Fault::KillBridge
            | Fault::StopBridge
            | Fault::KillBridgeWithoutFabric
            | Fault::KillBridgeWithoutRemote => self.bridge.line("ready").await.map(drop),
            _ => Ok(()),
        }
    }

    /// What the bridge says of its one remote.
    pub(crate) async fn bridge_status(&self) -> io::Result<Value> {
        let mut stream = TcpStream::connect(self.admin).await?;
        let request = "GET /api/status HTTP/1.1\r\nhost: bridge\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
        let body = body.ok_or_else(|| io::Error::other("expected an answer with a body"))?;
        let status: Value = serde_json::from_str(body)?;
        Ok(status["remotes"][0].clone())
    }

    /// Ends all three in good order.
    pub(crate) async fn stop(mut self) -> io::Result<()> {
        self.bridge.terminate().await?;
        self.fabric.terminate().await?;
        self.remote.terminate().await
    }
}

fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind(("127.0.0.1", 0))?.local_addr()
}

async fn listening(address: SocketAddr) -> io::Result<()> {
    let connected = tokio::time::timeout(PATIENCE, async {
        // There is no event for it.
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let late = |_| io::Error::other(format!("nothing listens on {address}"));
    connected.await.map_err(late)
}

fn fabric_toml(pki: &TestPki, store: &Path, quic: SocketAddr) -> String {
    let identity = pki.server_files();
    format!(
        "[identity]\ncert = {:?}\nkey = {:?}\ntrust = {:?}\n[policy]\nfile = \"policy.toml\"\n\
         [listen]\nquic = \"{quic}\"\n\
         [limits]\nidle_timeout = \"3s\"\nqueue_bytes = {}\ndedup_ids = 1000000\n\
         [store]\nfolder = {store:?}\n",
        identity.cert,
        identity.key,
        identity.ca,
        256 << 20
    )
}

fn bridge_toml(
    settings: &Settings,
    pki: &TestPki,
    quic: SocketAddr,
    mqtt: SocketAddr,
    admin: SocketAddr,
) -> String {
    let files = pki.device_files(HOME.0, HOME.1, "bridge");
    let path = |path: &PathBuf| format!("{path:?}");
    let qos = settings.qos;
    let rule = |direction: &str, filter: &str| {
        format!(
            "[[remote.rule]]\ndirection = \"{direction}\"\nfilter = \"{filter}\"\n\
             local_prefix = \"site/\"\nqos = {qos}\n"
        )
    };
    // MQTT 3.1.1 has nothing that would stop an echo over one mapping both ways.
    let rules = match settings.v5 {
        true => rule("both", "soak/#"),
        false => rule("in", "soak/in") + &rule("out", "soak/out"),
    };
    format!(
        "[fabric]\nbroker = \"{SERVER_NAME}:{}\"\nca = {}\ncert = {}\nkey = {}\nsession = \"bridge\"\n\
         [store]\nfolder = \"bridge-store\"\n[admin]\nlisten = \"{admin}\"\n\
         [[remote]]\nname = \"mosquitto\"\nurl = \"mqtt://{mqtt}\"\nversion = \"{}\"\n\
         client_id = \"bridge\"\nkeep_alive = 5\nreconnect_max = 1\n{rules}",
        quic.port(),
        path(&files.ca),
        path(&files.cert),
        path(&files.key),
        if settings.v5 { "5" } else { "3.1.1" },
    )
}
