//! A whole local fabric in one process: a broker and two workers over real sockets, with a
//! certificate for every party. `selvedge dev` keeps one up.

mod folder;
mod pki;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use selvedge_broker::Config;
use selvedge_broker::{Addresses, Server};
use selvedge_client::{Options, Tier};
use selvedge_worker::model::ConfidenceRule;
use selvedge_worker::{ModelSpec, OnnxModel, Worker, WorkerOptions};

pub(crate) use self::folder::{
    CLOUD_MODEL, EDGE_MODEL, Folder, POLICY, TEST_IMAGES, USER_NAME, write_secret,
};

/// Folder of the authority and its certificates within that of a fabric.
pub(crate) const PKI: &str = "pki";
/// The model that both workers offer.
pub(crate) const MODEL: &str = "digits";
/// What a client may do everything as.
pub(crate) const ADMIN: &str = "dev/local/admin";
/// The worker beside the devices.
pub(crate) const EDGE_WORKER: &str = "dev/local/edge-worker";
/// The worker far away.
pub(crate) const CLOUD_WORKER: &str = "dev/cloud/cloud-worker";

/// How long a model of a few hundred kilobytes may take to load, on a machine that is busy.
pub(crate) const MODEL_LOAD: Duration = Duration::from_secs(60);

/// The folder that `selvedge dev` uses, and client commands look into, unless told otherwise:
/// `$XDG_STATE_HOME/selvedge/dev`, `~/.local/state/selvedge/dev` or, without a home, here.
pub(crate) fn default_dir() -> PathBuf {
    let set = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")));
    match state {
        Some(state) => state.join("selvedge").join("dev"),
        None => PathBuf::from("selvedge-dev"),
    }
}

/// Addresses that replace those of the configuration.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Listeners {
    /// Native clients.
    pub(crate) quic: Option<SocketAddr>,
    /// MQTT in the clear.
    pub(crate) mqtt: Option<SocketAddr>,
    /// MQTT over TLS.
    pub(crate) mqtts: Option<SocketAddr>,
    /// MQTT over WebSocket, in the clear.
    pub(crate) ws: Option<SocketAddr>,
    /// MQTT over WebSocket and TLS.
    pub(crate) wss: Option<SocketAddr>,
    /// Admin HTTP.
    pub(crate) admin: Option<SocketAddr>,
    /// The front door over gRPC, in the clear.
    pub(crate) grpc: Option<SocketAddr>,
    /// The front door over HTTP, in the clear.
    pub(crate) http: Option<SocketAddr>,
}

impl Listeners {
    /// Replaces the addresses in a configuration.
    pub(crate) fn apply(&self, config: &mut Config, folder: &Folder) -> anyhow::Result<()> {
        config.quic = self.quic.or(config.quic);
        config.mqtt.tls = self.mqtts.or(config.mqtt.tls);
        config.mqtt.wss = self.wss.or(config.mqtt.wss);
        config.admin = self.admin.or(config.admin);
        let front = &mut config.front;
        front.danger_plaintext_grpc = self.grpc.or(front.danger_plaintext_grpc);
        front.danger_plaintext_http = self.http.or(front.danger_plaintext_http);
        if self.grpc.or(self.http).is_some() && front.tokens.is_none() {
            front.tokens = Some(folder.tokens()?);
        }
        let mqtt = &mut config.mqtt;
        for (given, open) in [
            (self.mqtt, &mut mqtt.danger_plaintext),
            (self.ws, &mut mqtt.danger_ws),
        ] {
            let Some(address) = given else {
                continue;
            };
            let identity = match open.take() {
                Some((_, identity)) => identity,
                None => folder.identity(folder::PLAINTEXT)?,
            };
            *open = Some((address, identity));
        }
        Ok(())
    }
}

/// A running fabric. [`shutdown`](Self::shutdown) ends it in good order.
pub(crate) struct Fabric {
    server: Server,
    addresses: Addresses,
    workers: Vec<Worker>,
}

impl Fabric {
    /// The broker.
    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Starts the broker; returns once its ports are open.
    pub(crate) async fn start(config: Config) -> anyhow::Result<Self> {
        let server = Box::pin(Server::bind(config))
            .await
            .context("start the broker")?;
        Ok(Self {
            addresses: server.addresses(),
            server,
            workers: Vec::new(),
        })
    }

    /// Starts the edge worker and the cloud worker; returns once the broker has their models.
    pub(crate) async fn start_workers(&mut self, folder: &Folder) -> anyhow::Result<()> {
        let (edge, cloud) = tokio::join!(
            self.worker(folder, EDGE_WORKER, Tier::Edge),
            self.worker(folder, CLOUD_WORKER, Tier::Cloud),
        );
        self.workers.extend([edge?, cloud?]);
        Ok(())
    }

    /// The addresses in use.
    pub(crate) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Waits until the broker is at fault; it runs until then.
    pub(crate) async fn failed(&mut self) {
        self.server.join().await;
    }

    /// Options to connect as an identity of the folder, such as `dev/local/admin`.
    pub(crate) fn options(&self, folder: &Folder, identity: &str) -> anyhow::Result<Options> {
        let Some(address) = self.addresses.quic else {
            bail!("expected the broker to listen for native clients: set quic in [listen]");
        };
        let dir = folder.pki().join(identity);
        let options = Options::new(&reachable(address).to_string())?
            .server_name(folder::SERVER_NAME)
            .identity_files(
                &folder.pki().join("ca.pem"),
                &dir.join("cert.pem"),
                &dir.join("key.pem"),
            )?;
        Ok(options)
    }

    /// Ends workers and broker in good order.
    pub(crate) async fn shutdown(self) {
        // Workers first, so that the requests in hand are still answered by way of the broker.
        for worker in self.workers {
            worker.shutdown().await;
        }
        self.server.shutdown().await;
    }

    async fn worker(&self, folder: &Folder, identity: &str, tier: Tier) -> anyhow::Result<Worker> {
        let file = folder.model(tier);
        let confidence = ConfidenceRule::Max {
            output: "probabilities".to_owned(),
        };
        let load = move || OnnxModel::load(file, Some(confidence), MODEL_LOAD);
        let model = tokio::task::spawn_blocking(load)
            .await
            .context("load the model of a worker")??;
        let options = WorkerOptions::new(self.options(folder, identity)?, tier)
            .model(ModelSpec::new(MODEL), Arc::new(model));
        Box::pin(Worker::start(options))
            .await
            .with_context(|| format!("start {identity}"))
    }
}

/// The address to connect to for one that is listened on: that of every interface is no target.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
