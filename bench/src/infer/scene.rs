//! A broker process, and clients and workers of it in this process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use selvedge_certs::{
    Authority, IssueRequest, Overwrite, ServerIdentity, TrustAnchors, tcp_client_config,
};
use selvedge_client::{Client, ModelRegistration, Options, TensorSpec, Tier, WorkerHandle};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use crate::compare::pki::{Pki, SERVER_NAME, TENANT};
use crate::compare::process;
use crate::compare::system::{BASE, Running, start_ours};

/// What the broker has besides [`BASE`].
const FRONT: &str = r#"
[front]
http = "127.0.0.1:0"
"#;

const POLICY: &str = r##"[[rule]]
name = "everyone may ask and work"
identities = ["bench/*/*"]
allow = ["infer", "work"]
subjects = ["#"]
"##;

/// The site of those who ask and of edge workers.
pub(super) const PLANT: &str = "plant";
/// The site of cloud workers.
pub(super) const CLOUD: &str = "cloud";

/// What every scene is made from.
pub(super) struct Ground<'a> {
    /// The `selvedge` binary.
    pub(super) program: &'a Path,
    /// Where scenes have their folders.
    pub(super) root: &'a Path,
}

/// A broker process, and an authority for its clients.
pub(super) struct Scene {
    running: Running,
    pki: Pki,
    // Removed after the process has ended.
    _folder: tempfile::TempDir,
}

/// One HTTP/1.1 connection with TLS and a client certificate.
pub(super) struct Http {
    pub(super) sender: http1::SendRequest<Full<Bytes>>,
    _connection: AbortOnDropHandle<()>,
}

impl Ground<'_> {
    /// Starts a broker.
    pub(super) async fn open(&self) -> anyhow::Result<Scene> {
        let Self { program, root } = *self;
        let folder = tempfile::tempdir_in(root)?;
        let dir = folder.path().to_owned();
        let pki = Pki::make(&dir.join("pki"))?;
        std::fs::write(dir.join("policy.toml"), POLICY)?;
        let config = dir.join("broker.toml");
        std::fs::write(&config, pki.fill(&format!("{BASE}{FRONT}"), &dir, 0))?;
        let text = |path: &Path| path.to_str().map(String::from).context("a path is no text");
        let command = [
            text(program)?,
            "broker".into(),
            "--config".into(),
            text(&config)?,
        ];
        let log: PathBuf = dir.join("log");
        let running = start_ours(program, &command, &log).await.with_context(|| {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            format!(
                "start the broker: it said {:?}",
                log.lines().last().unwrap_or_default()
            )
        })?;
        Ok(Scene {
            running,
            pki,
            _folder: folder,
        })
    }
}

impl Scene {
    /// Where the broker speaks QUIC.
    pub(super) fn address(&self) -> SocketAddr {
        self.running.address
    }

    pub(super) fn pki(&self) -> &Pki {
        &self.pki
    }

    /// Largest resident memory of the broker so far, in KiB.
    pub(super) fn peak_kib(&self) -> anyhow::Result<u64> {
        process::peak_kib(self.running.id())
    }

    /// Options of a client with a certificate of its own.
    pub(super) fn options(&self, site: &str, name: &str) -> anyhow::Result<Options> {
        let authority = Authority::load(&self.pki.folder).context("load the authority")?;
        let request = IssueRequest::client(TENANT, site, name);
        let files = authority.issue_into(&self.pki.folder, &request, Overwrite::Yes)?;
        let broker = format!("{SERVER_NAME}:{}", self.address().port());
        let options = Options::new(&broker)?.resolve(self.address());
        Ok(options.identity_files(&self.pki.ca, &files.cert, &files.key)?)
    }

    pub(super) async fn client(&self, site: &str, name: &str) -> anyhow::Result<Client> {
        Ok(Client::connect(self.options(site, name)?).await?)
    }

    /// Opens a connection to the front door.
    pub(super) async fn http(&self, name: &str) -> anyhow::Result<Http> {
        let authority = Authority::load(&self.pki.folder).context("load the authority")?;
        let request = IssueRequest::client(TENANT, PLANT, name);
        let credentials = authority.issue(&request)?.credentials();
        let trust = TrustAnchors::from_pem(authority.ca_pem().as_bytes())?;
        let config = tcp_client_config(Some(&credentials), &trust, ServerIdentity::Any, &[])?;
        let address = self.running.https.context("the broker has no front door")?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let server = ServerName::try_from(SERVER_NAME)?;
        let stream = tokio_rustls::TlsConnector::from(config)
            .connect(server, stream)
            .await
            .context("handshake with the front door")?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(async move {
            // Whoever waits for an answer sees it when this fails.
            let _ = connection.await;
        });
        Ok(Http {
            sender,
            _connection: AbortOnDropHandle::new(connection),
        })
    }
}

/// Registers a model; its requests come out of the handle.
pub(super) async fn work(
    client: &Client,
    model: &str,
    tier: Tier,
    slots: u32,
) -> anyhow::Result<WorkerHandle> {
    let json = TensorSpec {
        name: "chat.completions".into(),
        datatype: "JSON".into(),
        shape: vec![1],
    };
    let registration = ModelRegistration {
        model: model.into(),
        version: "1".into(),
        tier,
        slots,
        inputs: vec![json],
        outputs: Vec::new(),
        loaded: true,
        service_time: None,
        continues: false,
    };
    Ok(client.work(registration).await?)
}
