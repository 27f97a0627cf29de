//! Peers that are connected with a certificate, so that one that is withdrawn ends their connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use dashmap::DashMap;
use selvedge_certs::{CertificateRefused, RefusalReason, TrustAnchors};
use selvedge_proto::status::{Code, Status};
use tokio_rustls::rustls::pki_types::CertificateDer;

use crate::metrics::Metrics;
use crate::session::Kick;

/// Every peer that has proved its identity with a certificate, on whichever listener, from the end
/// of its TLS handshake to the end of its connection. A handle; clones share the peers.
///
/// There is one entry for each connection, which `limits.connections` bounds, and it holds the
/// peer's certificates: about 600 bytes for one of ours.
#[derive(Debug, Clone, Default)]
pub struct Peers(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    entries: DashMap<u64, Entry>,
    next: AtomicU64,
    /// Rises each time that other authorities or revocations come into force.
    generation: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    listener: &'static str,
    /// As presented, leaf first.
    chain: Vec<CertificateDer<'static>>,
    /// When it was let in. It is judged as of then, so that a certificate that has expired since is
    /// no reason to end a connection.
    since: SystemTime,
    state: State,
}

#[derive(Debug)]
enum State {
    /// It has no session yet.
    Greeting,
    /// It has its session, and this ends its connection.
    Attached(Kick),
    /// It has been told to go, or will be as soon as it asks for a session.
    Evicted(Eviction),
}

/// Why a peer that was let in has to go.
#[derive(Debug, Clone, PartialEq)]
pub struct Eviction {
    /// What to tell it.
    pub status: Status,
    /// Label of the counters of refused and evicted connections.
    pub label: &'static str,
}

/// Which authorities and revocations were in force when a handshake began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation(u64);

/// What has to be looked at again when other authorities and revocations come into force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Review {
    /// Whether a certificate was withdrawn. Takes some microseconds for each connection.
    Revocations,
    /// Whole chains, since an authority is no longer trusted. Takes about a tenth of a millisecond
    /// for each connection.
    Chains,
}

impl Peers {
    /// To be asked before a handshake begins, for [`Self::enter`].
    pub fn generation(&self) -> Generation {
        Generation(self.0.generation.load(Ordering::SeqCst))
    }

    /// Takes a peer up whose handshake went well.
    ///
    /// # Errors
    /// Other revocations came into force during the handshake, and it would fail now.
    pub fn enter(
        &self,
        trust: &TrustAnchors,
        begun: Generation,
        listener: &'static str,
        chain: &[CertificateDer<'static>],
    ) -> Result<Peer, CertificateRefused> {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let since = SystemTime::now();
        let entry = Entry {
            listener,
            chain: chain.to_vec(),
            since,
            state: State::Greeting,
        };
        self.0.entries.insert(id, entry);
        let peer = Peer {
            peers: self.clone(),
            id,
        };
        // In this order: a review that begins after this look finds the entry, and one that began
        // before it has raised the generation.
        if self.generation() != begun {
            trust.check_client(chain, since)?;
        }
        Ok(peer)
    }

    /// Ends the connections of those whom `trust` would not let in any more, as lost ones, so that
    /// their wills are published. To be called after `trust` has come into force. Returns how many.
    pub fn review(&self, trust: &TrustAnchors, review: Review, metrics: &Metrics) -> usize {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        metrics.renew_lists_by(trust.next_update());
        let mut evicted = 0;
        for mut entry in self.0.entries.iter_mut() {
            let verdict = match review {
                Review::Revocations => trust.check_revoked(&entry.chain),
                Review::Chains => trust.check_client(&entry.chain, entry.since),
            };
            let Err(refused) = verdict else {
                continue;
            };
            let eviction = Eviction::of(&refused);
            let (status, label) = (eviction.status.clone(), eviction.label);
            let before = std::mem::replace(&mut entry.state, State::Evicted(eviction));
            // One without a session is refused when it asks for one, and counted then.
            let State::Attached(kick) = before else {
                continue;
            };
            tracing::info!(listener = entry.listener, %status, "a connected peer is evicted");
            kick.kick(status);
            metrics.evict(entry.listener, label);
            evicted += 1;
        }
        evicted
    }

    /// How many peers there are.
    pub fn len(&self) -> usize {
        self.0.entries.len()
    }

    /// Whether there are no peers.
    pub fn is_empty(&self) -> bool {
        self.0.entries.is_empty()
    }
}

/// One peer's place among [`Peers`], until dropped.
#[derive(Debug)]
pub struct Peer {
    peers: Peers,
    id: u64,
}

impl Peer {
    /// To be asked before the peer is given a session.
    ///
    /// # Errors
    /// It would not be let in any more.
    pub fn check(&self) -> Result<(), Eviction> {
        match self.peers.0.entries.get(&self.id).as_deref() {
            Some(Entry {
                state: State::Evicted(eviction),
                ..
            }) => Err(eviction.clone()),
            _ => Ok(()),
        }
    }

    /// The peer has its session: `kick` ends its connection from now on.
    pub fn attached(&self, kick: &Kick) {
        let Some(mut entry) = self.peers.0.entries.get_mut(&self.id) else {
            return;
        };
        match &entry.state {
            State::Evicted(eviction) => kick.kick(eviction.status.clone()),
            _ => entry.state = State::Attached(kick.clone()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.peers.0.entries.remove(&self.id);
    }
}

impl Eviction {
    fn of(refused: &CertificateRefused) -> Self {
        let what = if is_revocation(refused) {
            "certificate revoked"
        } else {
            "certificate no longer accepted"
        };
        let message = format!("{what}: {} {}", refused.certificate(), refused.reason());
        Self {
            status: Status::new(Code::Unauthenticated, message),
            label: label(refused),
        }
    }
}

/// Label of the counters of refused connections.
pub(crate) fn label(refused: &CertificateRefused) -> &'static str {
    if is_revocation(refused) {
        "revoked"
    } else {
        "certificate_refused_here"
    }
}

fn is_revocation(refused: &CertificateRefused) -> bool {
    matches!(
        refused.reason(),
        RefusalReason::Revoked | RefusalReason::ChainRevoked
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use selvedge_certs::{Authority, IssueRequest, IssuedCertificate, Overwrite};
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;

    use super::*;

    struct Plant {
        dir: tempfile::TempDir,
        authority: Authority,
        trust: TrustAnchors,
        metrics: Metrics,
        peers: Peers,
    }

    impl Plant {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let authority = Authority::init(dir.path(), "example.org", Overwrite::No).unwrap();
            let trust = TrustAnchors::from_pem(authority.ca_pem().as_bytes()).unwrap();
            Self {
                dir,
                authority,
                trust,
                metrics: Metrics::default(),
                peers: Peers::default(),
            }
        }

        fn device(&self) -> IssuedCertificate {
            let request = IssueRequest::client("acme", "plant-1", "press-7");
            self.authority.issue(&request).unwrap()
        }

        fn enter(
            &self,
            begun: Generation,
            device: &IssuedCertificate,
        ) -> Result<Peer, CertificateRefused> {
            let chain = CertificateDer::from_pem_slice(device.cert_pem.as_bytes()).unwrap();
            self.peers.enter(&self.trust, begun, "quic", &[chain])
        }

        fn revoke(&self, device: &IssuedCertificate) -> usize {
            let (serial, _) = self
                .authority
                .serial_of(device.cert_pem.as_bytes())
                .unwrap();
            let month = std::time::Duration::from_secs(30 * 86_400);
            let list = self.authority.revoke(self.dir.path(), &[serial], month);
            let path = list.unwrap().path;
            self.trust
                .replace(&self.trust.with_revocations_of_file(&path).unwrap());
            self.peers
                .review(&self.trust, Review::Revocations, &self.metrics)
        }
    }

    #[test]
    fn a_handshake_that_began_before_a_reload_is_judged_again_after_it() {
        let plant = Plant::new();
        let (good, bad) = (plant.device(), plant.device());
        let begun = plant.peers.generation();
        assert_eq!(plant.revoke(&bad), 0);
        let refused = plant.enter(begun, &bad).unwrap_err();
        assert_eq!(refused.reason(), &RefusalReason::Revoked);
        assert!(plant.peers.is_empty());
        let peer = plant.enter(begun, &good).unwrap();
        assert_eq!(peer.check(), Ok(()));
        assert_eq!(plant.peers.len(), 1);
        drop(peer);
        assert!(plant.peers.is_empty());
    }

    #[tokio::test]
    async fn who_is_revoked_between_check_and_session_is_kicked_from_it_at_once() {
        let plant = Plant::new();
        let device = plant.device();
        let peer = plant.enter(plant.peers.generation(), &device).unwrap();
        assert_eq!(peer.check(), Ok(()));
        assert_eq!(plant.revoke(&device), 0);
        let kick = Kick::default();
        peer.attached(&kick);
        let status = kick.kicked().await;
        assert_eq!(status.code, Code::Unauthenticated);
        assert_eq!(peer.check().unwrap_err().status, status);
    }

    #[tokio::test]
    async fn who_has_a_session_is_kicked_once_and_counted_once() {
        let plant = Plant::new();
        let (good, bad) = (plant.device(), plant.device());
        let begun = plant.peers.generation();
        let peers = [&good, &bad].map(|device| plant.enter(begun, device).unwrap());
        let kicks = [Kick::default(), Kick::default()];
        for (peer, kick) in peers.iter().zip(&kicks) {
            peer.attached(kick);
        }
        assert_eq!(plant.revoke(&bad), 1);
        let status = kicks[1].kicked().await;
        assert!(
            status.message.starts_with("certificate revoked: "),
            "{status}"
        );
        let all = (&plant.trust, &plant.metrics);
        for review in [Review::Revocations, Review::Chains] {
            assert_eq!(plant.peers.review(all.0, review, all.1), 0);
        }
        let text = plant.metrics.encode();
        let count = "selvedge_evicted_connections_total{listener=\"quic\",reason=\"revoked\"} 1";
        assert!(text.contains(count), "{text}");
        assert_eq!(peers[0].check(), Ok(()));
    }

    #[test]
    fn a_certificate_that_expired_since_it_was_let_in_is_no_reason_to_evict() {
        let plant = Plant::new();
        let now = SystemTime::now();
        let day = std::time::Duration::from_secs(86_400);
        let request = IssueRequest::client("acme", "plant-1", "press-7")
            .not_before(now - 2 * day)
            .validity(day);
        let expired = plant.authority.issue(&request).unwrap();
        let peer = plant.enter(plant.peers.generation(), &expired).unwrap();
        let mut entry = plant.peers.0.entries.get_mut(&peer.id).unwrap();
        entry.since = now - day - day / 2;
        entry.state = State::Attached(Kick::default());
        drop(entry);
        let review = |plant: &Plant, trust: &TrustAnchors| {
            plant.peers.review(trust, Review::Chains, &plant.metrics)
        };
        assert_eq!(review(&plant, &plant.trust), 0);
        assert_eq!(review(&plant, &Plant::new().trust), 1);
    }
}
