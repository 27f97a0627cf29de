//! The folder of a local fabric: PKI, policy, configuration, models; each made once, then kept.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use selvedge_broker::front::token::{self, Tokens};
use selvedge_broker::mqtt::password::{Passwords, set_user};
use selvedge_certs::{Identity, IssueRequest};
use selvedge_client::Tier;
use serde_json::json;

use super::pki::Pki;
use super::{ADMIN, CLOUD_WORKER, EDGE_WORKER, PKI};

/// First part of every identity of a local fabric.
const TRUST_DOMAIN: &str = "dev.example";
/// The broker.
const BROKER: &str = "dev/local/broker";
/// Everyone on the MQTT listener in the clear.
pub(super) const PLAINTEXT: &str = "dev/local/mqtt";
/// The MQTT user with a password.
const USER: &str = "dev/local/sensor";
/// The name that user logs in with.
pub(crate) const USER_NAME: &str = "sensor";
/// A name in the broker's certificate.
pub(super) const SERVER_NAME: &str = "localhost";

/// The small model, as an ONNX file.
pub(crate) const EDGE_MODEL: &[u8] = include_bytes!("../../../models/digits/digits-edge.onnx");
/// The large model, as an ONNX file.
pub(crate) const CLOUD_MODEL: &[u8] = include_bytes!("../../../models/digits/digits-cloud.onnx");
/// Images that no model was trained on: a header, then a label and 64 values on each line.
pub(crate) const TEST_IMAGES: &str = include_str!("../../../models/digits/test.csv");

/// The policy of a fabric for trying things.
pub(crate) const POLICY: &str = r##"# Made by `selvedge dev`, and read at each start: edit it as you like.
# Everything is denied unless a rule allows it; a rule that denies wins.
# Ask what it says: selvedge policy explain --help

[[rule]]
name = "the admin may do everything"
identities = ["dev/local/admin"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["#", "$SYS/#"]

[[rule]]
name = "MQTT without a certificate may publish and subscribe"
identities = ["dev/local/mqtt", "dev/local/sensor"]
allow = ["publish", "subscribe"]
subjects = ["#"]

[[rule]]
name = "MQTT without a certificate may read the broker's figures"
identities = ["dev/local/mqtt", "dev/local/sensor"]
allow = ["subscribe"]
subjects = ["$SYS/#"]

[[rule]]
name = "workers may run the model"
identities = ["dev/local/edge-worker", "dev/cloud/cloud-worker"]
allow = ["work"]
subjects = ["digits"]
"##;

const BROKER_TOML: &str = r##"# Made by `selvedge dev`, and read at each start: edit it as you like.
# Flags such as --quic replace the addresses. Paths start from this folder.

[identity]
cert = "pki/dev/local/broker/cert.pem"
key = "pki/dev/local/broker/key.pem"
trust = "pki/ca.pem"
# Who is on it is thrown out at SIGHUP: selvedge certs revoke --dir pki dev/local/…
crl = "pki/crl.pem"

[policy]
file = "policy.toml"

[listen]
quic = "127.0.0.1:7443"

[mqtt]
# A client certificate, or a user of the password file.
tls = "127.0.0.1:8883"
passwords = "mqtt-users.toml"
# In the clear, for trying things on this machine: everyone is this identity.
danger_plaintext = "127.0.0.1:1883"
danger_plaintext_identity = "spiffe://dev.example/dev/local/mqtt"
# Over QUIC, on the port of the native listener.
quic = true
# Over WebSocket, in the clear and over TLS; web pages may connect that are served from these origins.
# danger_ws = "127.0.0.1:8083"
# wss = "127.0.0.1:8084"
# origins = ["http://localhost:3000"]

[admin]
listen = "127.0.0.1:9443"

[store]
# Kept sessions, their QoS 1 messages and retained messages. QoS 1 to a kept session is acknowledged
# once it is fsynced; durability = "memory" does not wait for the disk.
folder = "store"
durability = "disk"

# What each identity, and each tenant, may use. Nothing is limited unless a key says so.
# [limits.identity]
# connections = 4
# subscriptions = 1000
# publish_rate = 1000
# message_bytes = 1048576
# queue_bytes = 67108864
# inflight_bytes = 1048576
# [limits.tenant]
# connections = 10000
# subscriptions = 100000
# publish_rate = 50000
# queue_bytes = 1073741824
# [[limits.override]]
# identities = ["dev/local/press-*"]
# publish_rate = 100
"##;

/// The folder of a local fabric. One process at a time has it.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: PathBuf,
    pki: Pki,
    /// Locked as long as it is open.
    _lock: File,
}

impl Folder {
    /// Makes what is missing or about to end, and keeps the rest. Blocks.
    pub(crate) fn prepare(dir: &Path, policy: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make the folder {}", dir.display()))?;
        // Absolute, so that what is printed can be used from anywhere.
        let dir = dir
            .canonicalize()
            .with_context(|| format!("find the folder {}", dir.display()))?;
        let lock = lock(&dir)?;
        let pki = Pki::open(&dir.join(PKI), TRUST_DOMAIN)?;
        let folder = Self {
            dir,
            pki,
            _lock: lock,
        };
        folder.issue(ADMIN)?;
        folder.issue(EDGE_WORKER)?;
        folder.issue(CLOUD_WORKER)?;
        folder.pki.ensure(
            &request(BROKER, IssueRequest::server)?
                .dns(SERVER_NAME)
                .ip(Ipv4Addr::LOCALHOST)
                .ip(Ipv6Addr::LOCALHOST),
        )?;
        folder.keep("policy.toml", policy.as_bytes())?;
        folder.keep("broker.toml", BROKER_TOML.as_bytes())?;
        folder.user()?;
        // The models belong to the program, so that a newer one brings its own.
        fs::create_dir_all(folder.dir.join("models")).context("make the folder of models")?;
        folder.write("models/digits-edge.onnx", EDGE_MODEL)?;
        folder.write("models/digits-cloud.onnx", CLOUD_MODEL)?;
        folder.write("models/digit.json", example_request().as_bytes())?;
        Ok(folder)
    }

    /// Sees to it that a client identity `tenant/site/name` has a certificate.
    pub(crate) fn issue(&self, path: &str) -> anyhow::Result<()> {
        self.pki.ensure(&request(path, IssueRequest::client)?)
    }

    /// The folder itself.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder of the authority and its certificates.
    pub(crate) fn pki(&self) -> &Path {
        self.pki.dir()
    }

    /// The broker's configuration.
    pub(crate) fn broker_toml(&self) -> PathBuf {
        self.dir.join("broker.toml")
    }

    /// The file with the password of [`USER_NAME`].
    pub(crate) fn password_file(&self) -> PathBuf {
        self.dir.join("mqtt-password")
    }

    /// The file with the bearer token of the front door.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.dir.join("token")
    }

    /// The tokens of the front door, with the one for applications on this machine. It is kept as
    /// long as it is good.
    pub(crate) fn tokens(&self) -> anyhow::Result<Tokens> {
        let (tokens, file) = (self.dir.join("tokens.toml"), self.token_file());
        let known = Tokens::load(&tokens).ok();
        let held = fs::read_to_string(&file).ok();
        if let (Some(known), Some(held)) = (known, held)
            && known.verify(held.trim()).is_some()
        {
            return Ok(known);
        }
        let identity = self.identity(ADMIN)?;
        let token = token::create(&tokens, "dev", &identity).context("make a bearer token")?;
        write_secret(&file, &token)?;
        Tokens::load(&tokens).context("read the bearer tokens")
    }

    /// The file with an inference request for the model, a real image.
    pub(crate) fn example_request(&self) -> PathBuf {
        self.dir.join("models/digit.json")
    }

    /// The ONNX file for a tier.
    pub(crate) fn model(&self, tier: Tier) -> PathBuf {
        match tier {
            Tier::Edge => self.dir.join("models/digits-edge.onnx"),
            Tier::Cloud => self.dir.join("models/digits-cloud.onnx"),
        }
    }

    /// The identity `tenant/site/name` of this fabric.
    pub(crate) fn identity(&self, path: &str) -> anyhow::Result<Identity> {
        self.pki.identity(path)
    }

    /// Makes the MQTT user with a random password, unless it is there.
    fn user(&self) -> anyhow::Result<()> {
        let (users, password_file) = (self.dir.join("mqtt-users.toml"), self.password_file());
        if password_file.exists() && Passwords::load(&users).is_ok_and(|users| !users.is_empty()) {
            return Ok(());
        }
        let password = crate::output::hex(&rand::random::<[u8; 12]>());
        let identity = self.identity(USER)?;
        set_user(&users, USER_NAME, &identity, &password).context("make the MQTT user")?;
        write_secret(&password_file, &password)
    }

    fn keep(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        if self.dir.join(name).exists() {
            return Ok(());
        }
        self.write(name, content)
    }

    fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))
    }
}

/// Writes what only its owner may read.
pub(crate) fn write_secret(path: &Path, secret: &str) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(secret.as_bytes()))
        .with_context(|| format!("write {}", path.display()))
}

fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "expected {} to be free, found another fabric running from it: stop that one, or \
             give another folder with --dir",
            dir.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock {}", path.display()))
        }
    }
}

fn request(
    path: &str,
    make: fn(String, String, String) -> IssueRequest,
) -> anyhow::Result<IssueRequest> {
    let parts: Vec<String> = path.split('/').map(str::to_owned).collect();
    match <[String; 3]>::try_from(parts) {
        Ok([tenant, site, name]) => Ok(make(tenant, site, name)),
        Err(_) => bail!("expected an identity TENANT/SITE/NAME, found {path:?}"),
    }
}

/// The first test image as a request of the Open Inference Protocol v2.
fn example_request() -> String {
    let values: Vec<f64> = (TEST_IMAGES.lines().nth(1).unwrap_or_default().split(','))
        .skip(1)
        .filter_map(|value| value.parse().ok())
        .collect();
    let request = json!({
        "inputs": [{ "name": "input", "datatype": "FP32", "shape": [1, 64], "data": values }],
    });
    format!("{request}\n")
}

#[cfg(test)]
mod tests {
    use selvedge_broker::policy::{Policy, Verb};

    use super::*;

    #[test]
    fn the_example_is_an_image() {
        let request = serde_json::from_str(&example_request()).unwrap();
        let tensors = crate::tensor::inputs(&request).unwrap();
        assert_eq!(tensors[0].shape, [1, 64]);
    }

    #[test]
    fn the_admin_may_do_everything_and_a_worker_may_only_work() {
        let policy = Policy::parse(POLICY).unwrap();
        let allowed = |path: &str, verb, subject: &str| {
            let identity = format!("spiffe://{TRUST_DOMAIN}/{path}").parse().unwrap();
            let subject = subject.parse().unwrap();
            policy
                .explain(&identity, verb, &subject)
                .decision
                .is_allowed()
        };
        for verb in Verb::ALL {
            assert!(allowed(ADMIN, verb, "anything/at/all"), "{verb}");
            assert_eq!(allowed(EDGE_WORKER, verb, "digits"), verb == Verb::Work);
        }
        assert!(allowed(ADMIN, Verb::Subscribe, "$SYS/#"));
        assert!(!allowed(PLAINTEXT, Verb::Publish, "$SYS/broker"));
        assert!(!allowed("other/local/admin", Verb::Publish, "x"));
    }
}
