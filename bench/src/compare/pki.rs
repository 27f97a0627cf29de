//! The one authority of a run: every server and every client gets its certificate from it.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use selvedge_certs::{Authority, IssueRequest, Overwrite};

/// The name that clients expect of a server.
pub(super) const SERVER_NAME: &str = "localhost";
/// The tenant of everyone.
pub(super) const TENANT: &str = "bench";
/// The site of the clients.
pub(super) const CLIENT_SITE: &str = "load";

/// Where the certificates are.
#[derive(Debug, Clone)]
pub(super) struct Pki {
    /// Folder of the authority.
    pub(super) folder: PathBuf,
    /// The authority's certificate.
    pub(super) ca: PathBuf,
    /// The servers' certificate.
    pub(super) cert: PathBuf,
    /// Its key.
    pub(super) key: PathBuf,
}

impl Pki {
    /// Makes an authority and the servers' certificate.
    pub(super) fn make(folder: &Path) -> anyhow::Result<Self> {
        let authority =
            Authority::init(folder, "bench.example", Overwrite::No).context("make an authority")?;
        let request = IssueRequest::server(TENANT, "servers", "server")
            .dns(SERVER_NAME)
            .ip([127, 0, 0, 1]);
        let paths = authority.issue_into(folder, &request, Overwrite::No)?;
        Ok(Self {
            folder: folder.to_owned(),
            ca: folder.join("ca.pem"),
            cert: paths.cert,
            key: paths.key,
        })
    }
}
