//! The authority of a local fabric, and certificates and a revocation list that are renewed in time.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use selvedge_certs::{
    Authority, Credentials, Identity, IssueRequest, Overwrite, RevocationList, explain,
};

/// What has less time left than this is made anew.
const RENEW_BEFORE: Duration = Duration::from_secs(7 * 86_400);

/// How long a revocation list is good for.
const LIST_VALIDITY: Duration = Duration::from_secs(90 * 86_400);

/// An authority in a folder, with the certificates it issued.
#[derive(Debug)]
pub(super) struct Pki {
    dir: PathBuf,
    authority: Authority,
    /// The authority is new, so certificates that are there come from another.
    fresh: bool,
}

impl Pki {
    /// The authority that is there; a new one if there is none or it is about to end.
    pub(super) fn open(dir: &Path, trust_domain: &str) -> anyhow::Result<Self> {
        let (ca, key) = (dir.join("ca.pem"), dir.join("ca.key"));
        let fresh = !ca.exists() && !key.exists() || about_to_end(&ca);
        let authority = if fresh {
            Authority::init(dir, trust_domain, Overwrite::Yes)
        } else {
            Authority::load(dir)
        };
        let pki = Self {
            dir: dir.to_owned(),
            authority: authority.with_context(|| {
                let dir = dir.display();
                format!("open the authority in {dir}; remove that folder to start over")
            })?,
            fresh,
        };
        pki.ensure_list()?;
        Ok(pki)
    }

    /// Sees to it that there is a revocation list that will do for a while. One that cannot be read
    /// is for the broker to complain of.
    fn ensure_list(&self) -> anyhow::Result<()> {
        let lasting = SystemTime::now() + RENEW_BEFORE;
        let due = match std::fs::read(self.dir.join("crl.pem")) {
            Ok(pem) => RevocationList::all_from_pem(&pem)
                .is_ok_and(|lists| lists.iter().any(|list| list.is_overdue(lasting))),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        if due {
            (self.authority.revoke(&self.dir, &[], LIST_VALIDITY))
                .context("write the revocation list")?;
        }
        Ok(())
    }

    /// Sees to it that an identity has a certificate and key that will do for a while.
    pub(super) fn ensure(&self, request: &IssueRequest) -> anyhow::Result<()> {
        let IssueRequest {
            tenant, site, name, ..
        } = request;
        let dir = self.dir.join(tenant).join(site).join(name);
        let lasting = SystemTime::now() + RENEW_BEFORE;
        let kept = Credentials::from_files(&dir.join("cert.pem"), &dir.join("key.pem"));
        if !self.fresh && kept.is_ok_and(|kept| kept.not_after() > lasting) {
            return Ok(());
        }
        self.authority
            .issue_into(&self.dir, request, Overwrite::Yes)
            .with_context(|| format!("issue the certificate of {tenant}/{site}/{name}"))?;
        Ok(())
    }

    /// The identity `tenant/site/name` of this authority's trust domain.
    pub(super) fn identity(&self, path: &str) -> anyhow::Result<Identity> {
        let uri = format!("spiffe://{}/{path}", self.authority.trust_domain());
        Ok(uri.parse()?)
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Whether a certificate that can be read ends soon. One that cannot is for a person to look at.
fn about_to_end(cert: &Path) -> bool {
    let now = SystemTime::now();
    let summaries = std::fs::read(cert)
        .ok()
        .and_then(|pem| explain(&pem, now).ok());
    summaries.is_some_and(|summaries| {
        (summaries.iter()).any(|summary| summary.not_after < now + RENEW_BEFORE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(pki: &Pki) -> Vec<u8> {
        std::fs::read(pki.dir.join("dev/local/admin/cert.pem")).unwrap()
    }

    #[test]
    fn only_what_is_missing_or_about_to_end_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("pki");
        let request = IssueRequest::client("dev", "local", "admin");

        let pki = Pki::open(&dir, "dev.example").unwrap();
        pki.ensure(&request).unwrap();
        let first = certificate(&pki);

        let pki = Pki::open(&dir, "dev.example").unwrap();
        pki.ensure(&request).unwrap();
        assert_eq!(certificate(&pki), first);

        std::fs::remove_file(dir.join("dev/local/admin/key.pem")).unwrap();
        pki.ensure(&request).unwrap();
        let second = certificate(&pki);
        assert_ne!(second, first);

        let short = request
            .clone()
            .validity(RENEW_BEFORE - Duration::from_secs(60));
        pki.authority
            .issue_into(&dir, &short, Overwrite::Yes)
            .unwrap();
        let ending = certificate(&pki);
        pki.ensure(&request).unwrap();
        assert_ne!(certificate(&pki), ending);
    }

    #[test]
    fn there_is_a_revocation_list_from_the_start_and_what_is_on_it_stays() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let lists = || {
            let pem = std::fs::read(dir.join("crl.pem")).unwrap();
            RevocationList::all_from_pem(&pem).unwrap()
        };
        let pki = Pki::open(dir, "dev.example").unwrap();
        assert_eq!(lists()[0].number.as_deref(), Some("1"));
        let serials = ["4f1a2b".parse().unwrap()];
        let soon = RENEW_BEFORE / 2;
        pki.authority.revoke(dir, &serials, soon).unwrap();
        Pki::open(dir, "dev.example").unwrap();
        assert_eq!(lists()[0].number.as_deref(), Some("3"), "renewed");
        assert_eq!(lists()[0].revoked.len(), 1);
        Pki::open(dir, "dev.example").unwrap();
        assert_eq!(lists()[0].number.as_deref(), Some("3"), "kept");
    }

    #[test]
    fn an_authority_without_its_key_is_left_for_a_person_to_look_at() {
        let folder = tempfile::tempdir().unwrap();
        Pki::open(folder.path(), "dev.example").unwrap();
        std::fs::remove_file(folder.path().join("ca.key")).unwrap();
        let error = Pki::open(folder.path(), "dev.example").unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("ca.key"), "{error}");
        assert!(
            error.contains("remove that folder to start over"),
            "{error}"
        );
    }
}
