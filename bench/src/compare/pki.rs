//! The one authority of a run: every server and every client gets its certificate from it.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use selvedge_certs::{Authority, IssueRequest, Overwrite};

/// The name that clients expect of a server.
pub(crate) const SERVER_NAME: &str = "localhost";
/// The tenant of everyone.
pub(crate) const TENANT: &str = "bench";
/// The site of the clients.
pub(crate) const CLIENT_SITE: &str = "load";

/// Where the certificates are.
#[derive(Debug, Clone)]
pub(crate) struct Pki {
    /// Folder of the authority.
    pub(crate) folder: PathBuf,
    /// The authority's certificate.
    pub(crate) ca: PathBuf,
    /// The servers' certificate.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

impl Pki {
    /// Makes an authority and the servers' certificate.
    pub(crate) fn make(folder: &Path) -> anyhow::Result<Self> {
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
