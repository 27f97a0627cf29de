//! The flags that say where the broker is and who connects, shared by every client command.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use selvedge_client::{Client, Options, State};

use crate::{duration, fabric, output};

/// The identity that is used when none is named and it is there: the one `selvedge dev` makes.
const DEV_ADMIN: &str = "dev/local/admin";

/// Where the broker is, and who connects.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connection")]
#[group(skip)]
pub(crate) struct Args {
    /// Address of the broker.
    #[arg(
        long,
        value_name = "HOST[:PORT]",
        env = "SELVEDGE_BROKER",
        default_value = "127.0.0.1:7443"
    )]
    broker: String,
    /// Folder with ca.pem and TENANT/SITE/NAME/{cert,key}.pem, as `selvedge certs` makes it.
    /// Default: that of `selvedge dev`.
    #[arg(long, value_name = "DIR", env = "SELVEDGE_PKI")]
    pki: Option<PathBuf>,
    /// Identity in that folder to connect as. Default: dev/local/admin, if it is there.
    #[arg(long = "as", value_name = "TENANT/SITE/NAME", env = "SELVEDGE_AS")]
    identity: Option<String>,
    /// Certificate of the authority, instead of DIR/ca.pem.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Own certificate, instead of one in DIR.
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Own key, instead of one in DIR.
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Name that the broker's certificate must carry. Default: the host of --broker.
    #[arg(long, value_name = "HOST")]
    server_name: Option<String>,
    /// How long connecting may take.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration::parse)]
    connect_timeout: Duration,
}

/// The three files that a connection needs.
#[derive(Debug, PartialEq, Eq)]
struct Files {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl Args {
    /// Connects, and tells a person when the connection is lost and restored later on.
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        let client = Box::pin(Client::connect(self.options()?))
            .await
            .with_context(|| format!("connect to {}", self.broker))?;
        tokio::spawn(tell_of_losses(client.state()));
        Ok(client)
    }

    fn options(&self) -> anyhow::Result<Options> {
        let files = self.files()?;
        let mut options = Options::new(&self.broker)
            .and_then(|options| options.identity_files(&files.ca, &files.cert, &files.key))?
            .agent(concat!("selvedge/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(self.connect_timeout);
        if let Some(name) = &self.server_name {
            options = options.server_name(name);
        }
        Ok(options)
    }

    fn files(&self) -> anyhow::Result<Files> {
        let pki = match &self.pki {
            Some(dir) => dir.clone(),
            None => fabric::default_dir().join(fabric::PKI),
        };
        let ca = self.ca.clone().unwrap_or_else(|| pki.join("ca.pem"));
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            let (cert, key) = (cert.clone(), key.clone());
            return Ok(Files { ca, cert, key });
        }
        if self.pki.is_none() && !pki.is_dir() {
            bail!(
                "expected a certificate to connect with, found none: give --pki DIR and --as \
                 TENANT/SITE/NAME, or --ca, --cert and --key, or start `selvedge dev`, whose \
                 folder is used by default"
            );
        }
        let found = || identities(&pki).join(", ");
        let name = match &self.identity {
            Some(name) => name.as_str(),
            None if pki.join(DEV_ADMIN).is_dir() => DEV_ADMIN,
            None => bail!(
                "expected --as TENANT/SITE/NAME to say which identity of {} connects; it has: {}",
                pki.display(),
                found()
            ),
        };
        let dir = identity_dir(&pki, name)?;
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        if !cert.is_file() {
            bail!(
                "expected the certificate of {name} at {}, found none; {} has: {}",
                cert.display(),
                pki.display(),
                found()
            );
        }
        Ok(Files { ca, cert, key })
    }
}

/// The folder of `tenant/site/name`, which must not lead anywhere else.
fn identity_dir(pki: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let parts: Vec<&str> = name.split('/').collect();
    let [tenant, site, name] = parts.as_slice() else {
        bail!("expected an identity TENANT/SITE/NAME, found {name:?}");
    };
    // Only the rules for the parts matter here, so any trust domain will do.
    selvedge_certs::Identity::new("example.org", tenant, site, name)?;
    Ok(pki.join(tenant).join(site).join(name))
}

/// The identities in a folder that `selvedge certs` made, for messages.
fn identities(pki: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![(pki.to_owned(), String::new(), 0)];
    while let Some((folder, name, depth)) = folders.pop() {
        if depth == 3 {
            if folder.join("cert.pem").is_file() {
                found.push(name);
            }
            continue;
        }
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let part = entry.file_name().to_string_lossy().into_owned();
            let name = if name.is_empty() {
                part
            } else {
                format!("{name}/{part}")
            };
            if entry.path().is_dir() {
                folders.push((entry.path(), name, depth + 1));
            }
        }
    }
    if found.is_empty() {
        found.push("none".to_owned());
    }
    found.sort();
    found
}

async fn tell_of_losses(mut state: tokio::sync::watch::Receiver<State>) {
    let mut lost = false;
    while state.changed().await.is_ok() {
        let now = state.borrow_and_update().clone();
        match now {
            State::Disconnected { reason, retry_in } => {
                lost = true;
                output::note(format_args!(
                    "connection lost: {reason}; trying again in {retry_in:.1?}"
                ));
            }
            State::Connected { .. } if lost => {
                lost = false;
                output::note("connected again");
            }
            State::Closed { .. } => return,
            State::Connecting { .. } | State::Connected { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_cannot_lead_out_of_its_folder() {
        let pki = Path::new("pki");
        assert_eq!(
            identity_dir(pki, "acme/plant-1/press-7").unwrap(),
            Path::new("pki/acme/plant-1/press-7")
        );
        for bad in ["", "a/b", "a/b/c/d", "../b/c", "a/../c", "a//c", "/b/c"] {
            assert!(identity_dir(pki, bad).is_err(), "{bad:?}");
        }
    }
}
