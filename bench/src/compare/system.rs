//! The systems that are compared: how each is started, on the same certificates.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::job::Protocol;
use super::pki::Pki;
use super::process::{self, Server};

/// Name of this project's broker in results.
pub(super) const SELVEDGE: &str = "selvedge";
/// Name of the relay in results.
pub(super) const RELAY: &str = "relay";
/// Name of the NATS server of the system in results; that of others starts with it.
pub(super) const NATS: &str = "nats";
/// Name of mosquitto in results.
pub(super) const MOSQUITTO: &str = "mosquitto";
/// Time for a server to open its port.
const START: Duration = Duration::from_secs(20);
/// Times that a server is started which finds its port taken.
const TRIES: usize = 3;

const POLICY: &str = r##"[[rule]]
name = "load may publish, subscribe, call and serve"
identities = ["bench/load/*"]
allow = ["publish", "subscribe", "call", "serve"]
subjects = ["bench/#"]

[[rule]]
name = "operators may do everything"
identities = ["bench/operators/*"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["#"]

[[rule]]
name = "nobody touches what is locked"
identities = ["bench/*/*"]
deny = ["publish"]
subjects = ["locked/{site}/#"]
"##;

/// The configuration of every broker here: what it has to have, and where it speaks QUIC.
pub(crate) const BASE: &str = r#"[identity]
cert = "{cert}"
key = "{key}"
trust = "{ca}"

[policy]
file = "{dir}/policy.toml"

[listen]
quic = "127.0.0.1:0"
"#;

/// What the broker of a comparison has besides [`BASE`].
const BROKER: &str = r#"
[mqtt]
tls = "127.0.0.1:0"

[admin]
listen = "127.0.0.1:0"

[store]
folder = "{dir}/store"
"#;

const NATS_CONFIG: &str = r#"host: "127.0.0.1"
port: {port}
tls {
  cert_file: "{cert}"
  key_file: "{key}"
  ca_file: "{ca}"
  verify: true
  timeout: 10
}
"#;

const MOSQUITTO_CONFIG: &str = "\
user root
listener {port} 127.0.0.1
cafile {ca}
certfile {cert}
keyfile {key}
require_certificate true
use_identity_as_username true
set_tcp_nodelay true
persistence true
persistence_location {dir}/
max_inflight_messages 0
max_queued_messages 0
log_dest stderr
log_type error
";

/// A system of the comparison.
#[derive(Debug, Clone)]
pub(super) struct System {
    /// What it is called in results.
    pub(super) name: String,
    /// What it speaks.
    pub(super) protocol: Protocol,
    /// Largest UDP payload, of ours; none for the broker's default.
    pub(super) packet_bytes: Option<u16>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Broker,
    Relay,
    Peer(Peer),
}

/// A peer, as the configuration of the comparison describes one.
///
/// In `command` and `config`, `{port}`, `{dir}`, `{ca}`, `{cert}`, `{key}` and `{config}` stand for
/// the port to listen on at 127.0.0.1, an empty folder, the certificates, and the file that `config`
/// was written to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    /// What it is called in results.
    name: String,
    /// `nats` or `mqtt`, over TLS with client certificates.
    protocol: Protocol,
    /// The program and its arguments.
    command: Vec<String>,
    /// What its configuration file holds.
    #[serde(default)]
    config: String,
    /// Arguments that make the program tell its version.
    #[serde(default = "version_args")]
    version: Vec<String>,
}

/// The configuration of the comparison.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerFile {
    #[serde(default)]
    peer: Vec<Peer>,
}

/// What is known about a system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct About {
    /// What it is called in results.
    pub name: String,
    /// Its program's word for its version.
    pub version: String,
    /// Its program.
    pub program: String,
    /// The configuration it ran with, with places for what differs.
    pub config: String,
}

/// A system that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    /// Where it speaks MQTT besides.
    pub(crate) mqtt: Option<SocketAddr>,
    /// Where its front door is.
    pub(crate) https: Option<SocketAddr>,
    process: Server,
}

impl Running {
    /// Number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }
}

fn version_args() -> Vec<String> {
    vec!["--version".into()]
}

/// Every system that is on the machine, and a line about each that is not.
///
/// # Errors
/// The configuration cannot be read.
pub(super) fn find(
    config: Option<&Path>,
    more_nats: &[PathBuf],
    packet_bytes: Option<u16>,
) -> anyhow::Result<(Vec<System>, Vec<String>)> {
    let mut systems = vec![
        System {
            name: SELVEDGE.into(),
            protocol: Protocol::Selvedge,
            packet_bytes,
            kind: Kind::Broker,
        },
        System {
            name: RELAY.into(),
            protocol: Protocol::Relay,
            packet_bytes,
            kind: Kind::Relay,
        },
    ];
    let mut missing = Vec::new();
    let mut peers = Vec::new();
    match in_path("nats-server") {
        Some(program) => peers.push(Peer::nats(NATS.into(), &program)),
        None => missing.push("nats is left out: no nats-server in PATH".into()),
    }
    for program in more_nats {
        let mut peer = Peer::nats(NATS.into(), program);
        let version = peer.version_line();
        let number = version.rsplit(['v', ' ']).next().unwrap_or_default();
        let short: Vec<&str> = number.split('.').take(2).collect();
        peer.name = format!("{NATS}-{}", short.join("."));
        peers.push(peer);
    }
    match in_path("mosquitto") {
        Some(program) => peers.push(Peer {
            name: MOSQUITTO.into(),
            protocol: Protocol::Mqtt,
            command: words(&program, &["-c", "{config}"]),
            config: MOSQUITTO_CONFIG.into(),
            version: vec!["-h".into()],
        }),
        None => missing.push("mosquitto is left out: no mosquitto in PATH".into()),
    }
    if let Some(path) = config {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let file: PeerFile =
            toml::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        for peer in file.peer {
            ensure!(
                matches!(peer.protocol, Protocol::Nats | Protocol::Mqtt),
                "peer {:?}: expected the protocol nats or mqtt",
                peer.name
            );
            let program = peer.command.first().cloned().unwrap_or_default();
            if in_path(&program).is_some() {
                peers.push(peer);
            } else {
                missing.push(format!("{} is left out: no {program:?}", peer.name));
            }
        }
    }
    systems.extend(peers.into_iter().map(|peer| System {
        name: peer.name.clone(),
        protocol: peer.protocol,
        packet_bytes: None,
        kind: Kind::Peer(peer),
    }));
    let mut names: Vec<&str> = systems.iter().map(|system| system.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two systems are called {:?}: rename one", pair[0]);
    }
    Ok((systems, missing))
}

impl System {
    /// Starts it in a folder of its own, and returns once its port is open.
    ///
    /// # Errors
    /// It ends, or does not open its port in time.
    pub(super) async fn start(
        &self,
        program: &Path,
        pki: &Pki,
        dir: &Path,
    ) -> anyhow::Result<Running> {
        fs::create_dir(dir).with_context(|| format!("make {}", dir.display()))?;
        let log = dir.join("log");
        let own = program.to_str().context("this program's path is no text")?;
        let started = match &self.kind {
            Kind::Broker => {
                fs::write(dir.join("policy.toml"), POLICY)?;
                let config = dir.join("broker.toml");
                fs::write(&config, pki.fill(&self.broker_config(), dir, 0))?;
                let config = config.to_str().context("the folder's path is no text")?;
                let command = [own, "broker", "--config", config].map(String::from);
                start_ours(program, &command, &log).await
            }
            Kind::Relay => {
                let mut command = [own, "bench", "relay"].map(String::from).to_vec();
                for (flag, path) in [
                    ("--cert", &pki.cert),
                    ("--key", &pki.key),
                    ("--ca", &pki.ca),
                ] {
                    command.extend([flag.into(), path.display().to_string()]);
                }
                if let Some(bytes) = self.packet_bytes {
                    command.extend(["--packet-bytes".into(), bytes.to_string()]);
                }
                start_ours(program, &command, &log).await
            }
            Kind::Peer(peer) => {
                let mut started = peer.start(program, pki, dir, &log).await;
                for _ in 1..TRIES {
                    if started.is_ok() {
                        break;
                    }
                    started = peer.start(program, pki, dir, &log).await;
                }
                started
            }
        };
        started.with_context(|| {
            let log = fs::read_to_string(&log).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(3).collect();
            format!("start {}: it said {last:?}", self.name)
        })
    }

    /// The broker's configuration, with places for what differs.
    fn broker_config(&self) -> String {
        let limits = self
            .packet_bytes
            .map(|bytes| format!("\n[limits]\npacket_bytes = {bytes}\n"));
        format!("{BASE}{BROKER}{}", limits.unwrap_or_default())
    }

    /// What there is to say about it.
    pub(super) fn about(&self, program: &Path) -> About {
        let (version, program, config) = match &self.kind {
            Kind::Broker => (
                concat!("selvedge ", env!("CARGO_PKG_VERSION")).to_owned(),
                program.display().to_string(),
                format!("{}\n# policy.toml\n{POLICY}", self.broker_config()),
            ),
            Kind::Relay => (
                concat!("selvedge ", env!("CARGO_PKG_VERSION")).to_owned(),
                program.display().to_string(),
                "the broker's endpoint and transport settings".to_owned(),
            ),
            Kind::Peer(peer) => (
                peer.version_line(),
                peer.command.first().cloned().unwrap_or_default(),
                peer.config.clone(),
            ),
        };
        About {
            name: self.name.clone(),
            version,
            program,
            config,
        }
    }
}

/// Starts a process of this binary that prints where it listens and then `ready`.
///
/// # Errors
/// It ends, or is not ready in time.
pub(crate) async fn start_ours(
    program: &Path,
    command: &[String],
    log: &Path,
) -> anyhow::Result<Running> {
    let mut process = Server::start(process::guarded(program, command), log, true)?;
    let output = process.output().context("it has no output")?;
    let reading = tokio::task::spawn_blocking(move || {
        let mut addresses = HashMap::new();
        let mut output = BufReader::new(output);
        let mut line = String::new();
        while output.read_line(&mut line)? > 0 {
            if line.trim_end() == "ready" {
                // The end of the pipe stays open, or what is printed later would end the process.
                return Ok((addresses, output));
            }
            if let Some((name, value)) = line.trim_end().split_once('=')
                && let Ok(address) = value.parse::<SocketAddr>()
            {
                addresses.insert(name.to_owned(), address);
            }
            line.clear();
        }
        bail!("it ended")
    });
    let (addresses, output) = tokio::time::timeout(START, reading)
        .await
        .context("it was not ready in time")???;
    drain(output);
    let named = |name: &str| addresses.get(name).copied();
    Ok(Running {
        address: named("quic").context("it did not say where it listens")?,
        mqtt: named("mqtts"),
        https: named("https"),
        process,
    })
}

/// Reads and forgets until the other side closes.
fn drain(mut output: impl std::io::Read + Send + 'static) {
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
}

impl Peer {
    fn nats(name: String, program: &Path) -> Self {
        Self {
            name,
            protocol: Protocol::Nats,
            command: words(program, &["-c", "{config}"]),
            config: NATS_CONFIG.into(),
            version: version_args(),
        }
    }

    async fn start(
        &self,
        program: &Path,
        pki: &Pki,
        dir: &Path,
        log: &Path,
    ) -> anyhow::Result<Running> {
        let port = free_port()?;
        let config = dir.join("peer.conf");
        fs::write(&config, pki.fill(&self.config, dir, port))?;
        let config = config.display().to_string();
        let command = self.command.iter();
        let command: Vec<String> = command
            .map(|word| pki.fill(word, dir, port).replace("{config}", &config))
            .collect();
        let mut process = Server::start(process::guarded(program, &command), log, false)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let deadline = Instant::now() + START;
        while tokio::net::TcpStream::connect(address).await.is_err() {
            ensure!(!process.has_ended(), "it ended");
            ensure!(Instant::now() < deadline, "its port was not open in time");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Running {
            address,
            mqtt: None,
            https: None,
            process,
        })
    }

    /// The line in which the program tells its version.
    fn version_line(&self) -> String {
        let Some(program) = self.command.first() else {
            return String::new();
        };
        let output = Command::new(program).args(&self.version).output();
        let output = output.map(|output| [output.stdout, output.stderr].concat());
        let text = String::from_utf8(output.unwrap_or_default()).unwrap_or_default();
        let mut lines = text.lines();
        let line = lines.find(|line| line.chars().any(|c| c.is_ascii_digit()));
        line.unwrap_or("unknown").trim().to_owned()
    }
}

impl Pki {
    /// Puts paths and port in their places.
    pub(crate) fn fill(&self, text: &str, dir: &Path, port: u16) -> String {
        let path = |path: &Path| path.display().to_string();
        text.replace("{dir}", &path(dir))
            .replace("{ca}", &path(&self.ca))
            .replace("{cert}", &path(&self.cert))
            .replace("{key}", &path(&self.key))
            .replace("{port}", &port.to_string())
    }
}

/// A port that was free just now.
fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

/// A program as a shell would find it. Debian keeps servers where users often do not look.
fn in_path(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")])
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

fn words(program: &Path, args: &[&str]) -> Vec<String> {
    let program = program.display().to_string();
    let args = args.iter().map(|word| (*word).to_owned());
    std::iter::once(program).chain(args).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_is_not_there_is_left_out_with_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("peers.toml");
        let text = "[[peer]]\nname = 'x'\nprotocol = 'mqtt'\ncommand = ['no-such-broker']";
        fs::write(&config, text).unwrap();
        let (systems, missing) = find(Some(&config), &[], None).unwrap();
        assert!(systems.iter().all(|system| system.name != "x"));
        assert!(missing.contains(&"x is left out: no \"no-such-broker\"".to_owned()));
    }

    #[test]
    fn a_peer_of_our_own_protocol_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("peers.toml");
        let text = "[[peer]]\nname = 'x'\nprotocol = 'relay'\ncommand = ['sh']";
        fs::write(&config, text).unwrap();
        let error = find(Some(&config), &[], None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "peer \"x\": expected the protocol nats or mqtt"
        );
    }
}
