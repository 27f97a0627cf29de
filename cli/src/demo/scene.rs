//! Everybody on the tour: one authority, one broker, and a party for each certificate.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use selvedge_broker::policy::Policy;
use selvedge_broker::{Config, Server};
use selvedge_certs::{Authority, Identity, IssueRequest, Overwrite};
use selvedge_client::{Client, Credentials, Options, State, Tier, TrustAnchors};
use selvedge_worker::model::ConfidenceRule;
use selvedge_worker::{Model, ModelSpec, OnnxModel, Worker, WorkerOptions};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::inference::IN_FLIGHT;
use super::report::{Finding, Progress};
use crate::fabric::{CLOUD_MODEL, EDGE_MODEL, MODEL, MODEL_LOAD};

/// First part of every identity.
pub(super) const TRUST_DOMAIN: &str = "demo.example";

const BROKER: &str = "fabric/cloud-1/broker";
/// Publishes images, and asks what they show.
pub(super) const CAMERA: &str = "acme/plant-1/camera-3";
/// Reads everything of its plant.
pub(super) const DASHBOARD: &str = "acme/plant-1/dashboard";
/// A machine that answers calls.
pub(super) const PRESS: &str = "acme/plant-1/press-7";
/// Calls machines, from elsewhere.
pub(super) const OPERATOR: &str = "acme/office/operator-1";
/// A sensor that speaks MQTT only.
pub(super) const THERMOSTAT: &str = "acme/plant-1/thermostat-4";
/// Brings in what another MQTT broker has.
pub(super) const BRIDGE: &str = "acme/plant-1/mqtt-bridge";
/// Has a certificate and no rights.
pub(super) const GUEST: &str = "acme/plant-1/guest-laptop";
/// Runs the small model at the plant.
pub(super) const EDGE: &str = "acme/plant-1/edge-worker";
/// Runs the large model elsewhere.
pub(super) const CLOUD: &str = "acme/cloud-1/cloud-worker";

const CLIENTS: [&str; 9] = [
    CAMERA, DASHBOARD, PRESS, OPERATOR, THERMOSTAT, BRIDGE, GUEST, EDGE, CLOUD,
];

/// Name in the broker's certificate.
pub(super) const SERVER_NAME: &str = "localhost";

const POLICY: &str = include_str!("policy.toml");

/// What is hoped for of the key exchange: hybrid post-quantum.
const KEY_EXCHANGE: &str = "X25519MLKEM768";

/// Requests that a worker takes at once. More than are ever under way, since a slot is free again
/// only a moment after its answer has arrived: what is measured is the models, not the slots.
const SLOTS: u32 = 2 * IN_FLIGHT as u32;

/// How long everybody may take to go home.
const SHUTDOWN: Duration = Duration::from_secs(15);

/// How long the ports of a broker that has ended may take to be free again.
const PORTS_FREE: Duration = Duration::from_secs(5);
/// Time between attempts to open them.
const RETRY: Duration = Duration::from_millis(20);

/// The parties, and what has been started so far.
pub(super) struct Scene {
    pub(super) progress: Progress,
    dir: TempDir,
    authority: Authority,
    credentials: HashMap<&'static str, Credentials>,
    config: Option<Config>,
    server: Option<Server>,
    clients: HashMap<&'static str, Client>,
    models: HashMap<&'static str, Arc<dyn Model>>,
    workers: HashMap<&'static str, Worker>,
    /// Answers for the machine.
    pub(super) press: Option<AbortOnDropHandle<()>>,
}

impl Scene {
    /// A folder and an authority; nothing is running yet.
    pub(super) fn prepare(progress: Progress) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("make a temporary folder")?;
        let authority = Authority::init(&dir.path().join("pki"), TRUST_DOMAIN, Overwrite::No)?;
        Ok(Self {
            progress,
            dir,
            authority,
            credentials: HashMap::new(),
            config: None,
            server: None,
            clients: HashMap::new(),
            models: HashMap::new(),
            workers: HashMap::new(),
            press: None,
        })
    }

    /// The identity URI of `tenant/site/name`.
    pub(super) fn uri(path: &str) -> String {
        format!("spiffe://{TRUST_DOMAIN}/{path}")
    }

    /// The certificate and key of a party.
    pub(super) fn credentials(&self, path: &str) -> anyhow::Result<&Credentials> {
        let credentials = self.credentials.get(path);
        credentials.with_context(|| format!("no certificate was issued to {path}"))
    }

    /// A certificate that is none of the parties'.
    pub(super) fn issue(&self, request: &IssueRequest) -> anyhow::Result<Credentials> {
        Ok(self.authority.issue(request)?.credentials())
    }

    /// The authorities that everybody trusts: this one.
    pub(super) fn anchors(&self) -> anyhow::Result<TrustAnchors> {
        Ok(TrustAnchors::from_pem(self.authority.ca_pem().as_bytes())?)
    }

    /// Folder with `ca.pem` and the certificates that were written to files.
    pub(super) fn pki(&self) -> PathBuf {
        self.dir.path().join("pki")
    }

    /// Address of the listener for native clients.
    pub(super) fn quic(&self) -> anyhow::Result<SocketAddr> {
        let config = self.config.as_ref();
        config
            .and_then(|config| config.quic)
            .context("the broker was not started")
    }

    /// Address of the listener for MQTT over TLS.
    pub(super) fn mqtts(&self) -> anyhow::Result<SocketAddr> {
        let config = self.config.as_ref();
        config
            .and_then(|config| config.mqtt.tls)
            .context("the broker was not started")
    }

    /// Options to connect with a certificate.
    pub(super) fn options(&self, credentials: &Credentials) -> anyhow::Result<Options> {
        Ok(Options::new(&self.quic()?.to_string())?
            .server_name(SERVER_NAME)
            .credentials(credentials.clone())
            .trust(self.anchors()?))
    }

    /// The client of a party, which connects when it is first asked for.
    pub(super) async fn client(&mut self, path: &'static str) -> anyhow::Result<Client> {
        if let Some(client) = self.clients.get(path) {
            return Ok(client.clone());
        }
        let options = self.options(self.credentials(path)?)?;
        let client = Client::connect(options)
            .await
            .with_context(|| format!("connect {path}"))?;
        self.clients.insert(path, client.clone());
        Ok(client)
    }

    /// Sees to it that a worker runs; returns once the broker has its model.
    pub(super) async fn start_worker(&mut self, path: &'static str) -> anyhow::Result<()> {
        if self.workers.contains_key(path) {
            return Ok(());
        }
        let tier = if path == EDGE {
            Tier::Edge
        } else {
            Tier::Cloud
        };
        let model = match self.models.get(path) {
            Some(model) => Arc::clone(model),
            None => {
                let model = load(self.dir.path(), tier).await?;
                self.models.insert(path, Arc::clone(&model));
                model
            }
        };
        let slots = SLOTS.try_into().context("expected a slot at least")?;
        let options = self.options(self.credentials(path)?)?;
        let options =
            WorkerOptions::new(options, tier).model(ModelSpec::new(MODEL).slots(slots), model);
        let worker = Box::pin(Worker::start(options))
            .await
            .with_context(|| format!("start {path}"))?;
        self.workers.insert(path, worker);
        Ok(())
    }

    /// Ends a worker in good order.
    pub(super) async fn stop_worker(&mut self, path: &str) {
        if let Some(worker) = self.workers.remove(path) {
            worker.shutdown().await;
        }
    }

    /// Ends the broker in good order; everybody loses the connection.
    pub(super) async fn stop_broker(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown().await;
        }
    }

    /// Starts the broker; the second time on the same ports.
    pub(super) async fn start_broker(&mut self) -> anyhow::Result<()> {
        let config = match &self.config {
            Some(config) => config.clone(),
            None => self.configure()?,
        };
        let until = Instant::now() + PORTS_FREE;
        let server = loop {
            match Box::pin(Server::bind(config.clone())).await {
                Ok(server) => break server,
                // The system frees the ports of the broker only a moment after it has ended.
                Err(_) if self.config.is_some() && Instant::now() < until => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error).context("start the broker"),
            }
        };
        let addresses = server.addresses();
        self.server = Some(server);
        let config = self.config.insert(config);
        (config.quic, config.mqtt.tls) = (addresses.quic, addresses.mqtts);
        Ok(())
    }

    /// Everybody goes home, those who need the broker before the broker.
    pub(super) async fn shutdown(mut self) {
        let shutdown = async {
            // The machine answers no more calls.
            self.press = None;
            // Workers end the requests in hand, which takes the broker.
            for (_, worker) in self.workers.drain() {
                worker.shutdown().await;
            }
            // Clients say goodbye, all at once.
            let mut closing = JoinSet::new();
            for (_, client) in self.clients.drain() {
                closing.spawn(async move { client.close().await });
            }
            while closing.join_next().await.is_some() {}
            // Nobody is left but the broker; the folder goes with the scene.
            self.stop_broker().await;
        };
        let _ = tokio::time::timeout(SHUTDOWN, shutdown).await;
    }

    fn configure(&self) -> anyhow::Result<Config> {
        let policy = Policy::parse(POLICY).context("read the policy of the tour")?;
        let free = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let credentials = self.credentials(BROKER)?.clone();
        let mut config = Config::new(credentials, self.anchors()?, policy);
        config.quic = free;
        config.mqtt.tls = free;
        Ok(config)
    }
}

/// Issues the certificates and starts the broker; the camera looks at the connection.
pub(super) async fn open(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    let broker = request(BROKER, IssueRequest::server)?
        .dns(SERVER_NAME)
        .ip(Ipv4Addr::LOCALHOST);
    let credentials = scene.issue(&broker)?;
    scene.credentials.insert(BROKER, credentials);
    for path in CLIENTS {
        let credentials = scene.issue(&request(path, IssueRequest::client)?)?;
        scene.credentials.insert(path, credentials);
    }
    // The bridge reads its certificate from files.
    let files = request(BRIDGE, IssueRequest::client)?;
    (scene.authority).issue_into(&scene.pki(), &files, Overwrite::Yes)?;
    let certificates = scene.credentials.len();
    progress.seen(format_args!(
        "{certificates} certificates, each with an identity such as {}",
        Scene::uri(CAMERA)
    ));

    scene.start_broker().await?;
    let (quic, mqtts) = (scene.quic()?, scene.mqtts()?);
    progress.seen(format_args!(
        "the broker listens: QUIC on {quic}, MQTT over TLS on {mqtts}"
    ));
    let rules = POLICY.matches("[[rule]]").count();
    progress.seen(format_args!(
        "its policy has {rules} rules; what none of them allows is denied"
    ));

    let camera = scene.client(CAMERA).await?;
    let state = camera.state().borrow().clone();
    let State::Connected {
        identity,
        key_exchange,
        ..
    } = state
    else {
        anyhow::bail!("expected the camera to be connected, found {state:?}");
    };
    ensure!(
        identity == scene.uri_of(CAMERA)?,
        "expected the broker to see {}, found {identity}",
        Scene::uri(CAMERA)
    );
    ensure!(
        &*key_exchange == KEY_EXCHANGE,
        "expected the key exchange {KEY_EXCHANGE}, found {key_exchange:?}"
    );
    Ok(Finding::new(
        format!(
            "{certificates} certificates, a broker, and post-quantum key exchange ({key_exchange})"
        ),
        json!({
            "certificates": certificates,
            "rules": rules,
            "key_exchange": &*key_exchange,
            "quic": quic.to_string(),
            "mqtts": mqtts.to_string(),
        }),
    ))
}

impl Scene {
    fn uri_of(&self, path: &str) -> anyhow::Result<Identity> {
        Ok(Self::uri(path).parse()?)
    }
}

/// A request for the certificate of `tenant/site/name`.
pub(super) fn request(
    path: &str,
    make: fn(String, String, String) -> IssueRequest,
) -> anyhow::Result<IssueRequest> {
    let identity: Identity = Scene::uri(path).parse()?;
    Ok(make(
        identity.tenant().to_owned(),
        identity.site().to_owned(),
        identity.name().to_owned(),
    ))
}

/// Loads the model of a tier.
async fn load(dir: &Path, tier: Tier) -> anyhow::Result<Arc<dyn Model>> {
    let file = dir.join(format!("{tier}.onnx"));
    let load = move || {
        let bytes = match tier {
            Tier::Edge => EDGE_MODEL,
            Tier::Cloud => CLOUD_MODEL,
        };
        std::fs::write(&file, bytes).context("write a model")?;
        let confidence = ConfidenceRule::Max {
            output: "probabilities".to_owned(),
        };
        anyhow::Ok(OnnxModel::load(file, Some(confidence), MODEL_LOAD)?)
    };
    let model = tokio::task::spawn_blocking(load)
        .await
        .with_context(|| format!("load the {tier} model"))??;
    Ok(Arc::new(model))
}
