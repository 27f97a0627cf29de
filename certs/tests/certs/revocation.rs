//! Withdrawing certificates: the list an authority writes, whose lists are taken, who is refused.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use selvedge_certs::{
    Authority, AuthorityError, IssueRequest, IssuedCertificate, LoadError, Overwrite,
    RefusalReason, RevocationList, Serial, TrustAnchors, explain_connection_error, peer_identity,
    quic_client_config, quic_server_config, was_revoked,
};
use tempfile::TempDir;
use time::OffsetDateTime;
use time::macros::datetime;

use crate::pki::{CLIENT, Ca, Leaf};
use crate::quic::{ALPN, attempt, turned_away};

const MONTH: Duration = Duration::from_secs(30 * 86_400);

/// An authority in a folder, which is where it keeps what it has withdrawn.
struct Plant {
    dir: TempDir,
    authority: Authority,
}

impl Plant {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Authority::init(dir.path(), "plant.example", Overwrite::No).unwrap();
        Self { dir, authority }
    }

    fn device(&self, name: &str) -> IssuedCertificate {
        let request = IssueRequest::client("acme", "hall-1", name);
        self.authority.issue(&request).unwrap()
    }

    fn serial(&self, issued: &IssuedCertificate) -> Serial {
        let (serial, _) = self
            .authority
            .serial_of(issued.cert_pem.as_bytes())
            .unwrap();
        serial
    }

    fn revoke(&self, certificates: &[&IssuedCertificate]) -> selvedge_certs::RevocationFile {
        let serials: Vec<Serial> = certificates.iter().map(|cert| self.serial(cert)).collect();
        self.authority
            .revoke(self.dir.path(), &serials, MONTH)
            .unwrap()
    }

    fn anchors(&self) -> TrustAnchors {
        TrustAnchors::from_pem(self.authority.ca_pem().as_bytes()).unwrap()
    }

    fn strict(&self) -> TrustAnchors {
        let list = self.dir.path().join("crl.pem");
        self.anchors().with_revocations_of_file(&list).unwrap()
    }
}

fn chain(pems: &[&str]) -> Vec<CertificateDer<'static>> {
    pems.iter()
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .collect()
}

/// A list as another program would make it, of certificates with the serial number of `Ca`.
fn list(issuer: &Issuer<'static, KeyPair>, next_update: OffsetDateTime) -> String {
    CertificateRevocationListParams {
        this_update: datetime!(2020-01-01 0:00 UTC),
        next_update,
        crl_number: SerialNumber::from(7),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[0x1a, 0x2b]),
            revocation_time: datetime!(2020-01-01 0:00 UTC),
            reason_code: Some(rcgen::RevocationReason::KeyCompromise),
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    }
    .signed_by(issuer)
    .unwrap()
    .pem()
    .unwrap()
}

const FAR: OffsetDateTime = datetime!(2120-01-01 0:00 UTC);

#[test]
fn a_list_grows_its_number_rises_and_nothing_is_revoked_twice() {
    let plant = Plant::new();
    let (one, two) = (plant.device("press-1"), plant.device("press-2"));
    let first = plant.revoke(&[]);
    assert_eq!(first.path, plant.dir.path().join("crl.pem"));
    assert_eq!(first.list.number.as_deref(), Some("1"));
    assert_eq!((first.list.revoked.len(), first.added.len()), (0, 0));

    let second = plant.revoke(&[&one]);
    assert_eq!(second.list.number.as_deref(), Some("2"));
    assert_eq!(second.added, [plant.serial(&one)]);
    let written = fs::read(&second.path).unwrap();

    let again = plant.revoke(&[&one]);
    assert_eq!(again.list, second.list);
    assert!(again.added.is_empty());
    assert_eq!(fs::read(&second.path).unwrap(), written);

    let third = plant.revoke(&[&one, &two]);
    assert_eq!(third.list.number.as_deref(), Some("3"));
    assert_eq!(third.added, [plant.serial(&two)]);
    assert!(third.list.revoked.contains(&second.list.revoked[0]));

    let renewed = plant.revoke(&[]);
    assert_eq!(renewed.list.number.as_deref(), Some("4"));
    assert_eq!(renewed.list.revoked, third.list.revoked);
    let left = renewed.list.next_update.unwrap();
    let left = left.duration_since(SystemTime::now()).unwrap();
    assert!(left > MONTH - Duration::from_secs(60) && left <= MONTH);
    let read = RevocationList::all_from_pem(&fs::read(&renewed.path).unwrap()).unwrap();
    assert_eq!(read, [renewed.list]);
    assert_eq!(plant.strict().revoked(), 2);
    assert_eq!(plant.strict().next_update(), read[0].next_update);
    assert_eq!(plant.anchors().next_update(), None);
}

#[test]
fn what_revokes_at_the_same_time_loses_nothing() {
    let plant = Plant::new();
    let devices: Vec<_> = (0..8)
        .map(|n| plant.device(&format!("press-{n}")))
        .collect();
    std::thread::scope(|scope| {
        for device in &devices {
            scope.spawn(|| plant.revoke(&[device]));
        }
    });
    assert_eq!(plant.strict().revoked(), devices.len());
}

#[test]
fn only_the_authority_that_issued_a_certificate_can_revoke_it() {
    let (plant, other) = (Plant::new(), Plant::new());
    let foreign = other.device("press-7");
    let error = plant
        .authority
        .serial_of(foreign.cert_pem.as_bytes())
        .unwrap_err();
    // Both authorities have the same name, so it is the signature that tells.
    assert_eq!(
        error.to_string(),
        format!(
            "certificate spiffe://plant.example/acme/hall-1/press-7 (serial {}) was issued by another \
             authority (CN=Selvedge authority of plant.example); only the one that issued it can revoke it",
            other.serial(&foreign)
        )
    );
    assert!(matches!(error, AuthorityError::NotIssuedHere { .. }));
}

#[test]
fn a_list_that_cannot_be_extended_is_left_as_it_is() {
    let (plant, other) = (Plant::new(), Plant::new());
    let path = plant.dir.path().join("crl.pem");
    other.revoke(&[]);
    fs::copy(other.dir.path().join("crl.pem"), &path).unwrap();
    let serials = [plant.serial(&plant.device("press-7"))];
    let extend = |path: &Path| {
        let before = fs::read(path).unwrap();
        let error = plant
            .authority
            .revoke(plant.dir.path(), &serials, MONTH)
            .unwrap_err();
        assert_eq!(fs::read(path).unwrap(), before);
        error.to_string()
    };
    assert_eq!(
        extend(&path),
        format!(
            "{} cannot be used: it is not signed by this authority (issuer CN=Selvedge authority of \
             plant.example); move it away to begin a new list",
            path.display()
        )
    );
    fs::write(&path, plant.authority.ca_pem()).unwrap();
    assert_eq!(
        extend(&path),
        format!(
            "{} cannot be used: expected one revocation list, found 0; move it away to begin a new one",
            path.display()
        )
    );
    // A new authority in the same folder has withdrawn nothing.
    Authority::init(plant.dir.path(), "plant.example", Overwrite::Yes).unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn a_revoked_client_and_the_server_that_refused_it_read_the_same_sentence() {
    let plant = Plant::new();
    let (good, bad) = (plant.device("press-1"), plant.device("press-2"));
    let broker = plant
        .authority
        .issue(&IssueRequest::server("acme", "cloud", "broker-1").dns("localhost"))
        .unwrap();
    plant.revoke(&[&bad]);
    let trusted = plant.anchors();
    let server = || quic_server_config(broker.credentials(), &trusted, None, &[ALPN]).unwrap();
    let client = |device: &IssuedCertificate| {
        quic_client_config(device.credentials(), &plant.anchors(), &[ALPN]).unwrap()
    };
    let early = server();
    assert!(attempt(server(), client(&bad)).await.server.is_ok());

    // The configuration made before follows.
    trusted.replace(&plant.strict());
    let refused = attempt(early, client(&bad)).await;
    let sentence = format!(
        "certificate spiffe://plant.example/acme/hall-1/press-2 (serial {}) refused: was revoked by \
         its authority; issue a new one",
        plant.serial(&bad)
    );
    let at_server = turned_away(refused.server).await;
    assert_eq!(explain_connection_error(&at_server), sentence);
    assert!(was_revoked(&at_server));
    let at_client = turned_away(refused.client).await;
    assert_eq!(
        explain_connection_error(&at_client),
        format!("the peer refused us: {sentence}")
    );
    assert!(!was_revoked(&at_client));
    assert!(attempt(server(), client(&good)).await.server.is_ok());
}

#[tokio::test]
async fn a_client_refuses_a_revoked_broker() {
    let plant = Plant::new();
    let broker = plant
        .authority
        .issue(&IssueRequest::server("acme", "cloud", "broker-1").dns("localhost"))
        .unwrap();
    plant.revoke(&[&broker]);
    let server = quic_server_config(broker.credentials(), &plant.anchors(), None, &[ALPN]).unwrap();
    let device = plant.device("press-1").credentials();
    let client = quic_client_config(&device, &plant.strict(), &[ALPN]).unwrap();
    let refused = attempt(server, client).await;
    let at_client = turned_away(refused.client).await;
    assert!(was_revoked(&at_client), "{at_client}");
}

#[test]
fn a_list_must_be_there_whole_and_of_a_trusted_authority() {
    let ca = Ca::new("authority");
    let take = |pem: &str| {
        ca.anchors()
            .with_revocations_of_pem(pem.as_bytes())
            .unwrap_err()
    };
    assert_eq!(
        take(&ca.pem).to_string(),
        "revocation list holds no revocation list: expected a PEM section X509 CRL, found CERTIFICATE"
    );
    assert!(
        matches!(take(""), LoadError::NoRevocationList { found, .. } if found == "an empty text")
    );
    let good = list(&ca.issuer, FAR);
    assert!(matches!(
        take(&good.replace("-----END", "")),
        LoadError::Pem { .. }
    ));
    let unusable = |pem: &str| match take(pem) {
        LoadError::UnusableRevocationList { reason, .. } => reason,
        other => panic!("{other:?}"),
    };
    for stranger in ["strangers", "authority"] {
        assert_eq!(
            unusable(&list(&Ca::new(stranger).issuer, FAR)),
            format!(
                "it is signed by nobody who is trusted here (issuer CN={stranger}); expected a list \
                 of one of the trust anchors"
            )
        );
    }
    // One good list does not make up for a bad one beside it.
    let both = good.clone() + &list(&Ca::new("strangers").issuer, FAR);
    assert!(unusable(&both).starts_with("it is signed by nobody"));
    let missing = ca
        .anchors()
        .with_revocations_of_file(Path::new("/nowhere/crl.pem"))
        .unwrap_err();
    assert!(matches!(missing, LoadError::Read { path, .. } if path == "/nowhere/crl.pem"));
    assert_eq!(
        ca.anchors()
            .with_revocations_of_pem(good.as_bytes())
            .unwrap()
            .revoked(),
        1
    );
}

#[test]
fn an_authority_that_may_not_sign_lists_withdraws_nothing() {
    let make = |usages: Vec<KeyUsagePurpose>, key: KeyPair| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = usages;
        let pem = params.self_signed(&key).unwrap().pem();
        (pem, Issuer::new(params, key))
    };
    let key = KeyPair::generate().unwrap();
    let same = KeyPair::from_pem(&key.serialize_pem()).unwrap();
    let (pem, _) = make(vec![KeyUsagePurpose::KeyCertSign], key);
    let (_, issuer) = make(vec![KeyUsagePurpose::CrlSign], same);
    let error = TrustAnchors::from_pem(pem.as_bytes())
        .unwrap()
        .with_revocations_of_pem(list(&issuer, FAR).as_bytes())
        .unwrap_err();
    assert!(
        error.to_string().ends_with("may not sign revocation lists"),
        "{error}"
    );
}

#[test]
fn a_list_past_its_next_update_stays_in_force() {
    let ca = Ca::new("authority");
    let overdue = list(&ca.issuer, datetime!(2021-01-01 0:00 UTC));
    let anchors = ca
        .anchors()
        .with_revocations_of_pem(overdue.as_bytes())
        .unwrap();
    let leaf = chain(&[&ca.issue(&Leaf::good(CLIENT)).cert_pem]);
    let refused = anchors.check_client(&leaf, SystemTime::now()).unwrap_err();
    assert_eq!(refused.reason(), &RefusalReason::Revoked);
    let read = RevocationList::all_from_pem(overdue.as_bytes()).unwrap();
    assert!(read[0].is_overdue(SystemTime::now()));
}

#[test]
fn an_authority_of_the_same_name_without_a_list_is_not_touched_by_it() {
    let (old, new) = (Plant::new(), Plant::new());
    old.revoke(&[&old.device("press-1")]);
    let both = format!("{}{}", old.authority.ca_pem(), new.authority.ca_pem());
    let anchors = TrustAnchors::from_pem(both.as_bytes())
        .unwrap()
        .with_revocations_of_file(&old.dir.path().join("crl.pem"))
        .unwrap();
    for plant in [&old, &new] {
        let good = chain(&[&plant.device("press-2").cert_pem]);
        anchors.check_client(&good, SystemTime::now()).unwrap();
    }
}

#[test]
fn a_chain_over_a_revoked_intermediate_is_refused() {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root_pem = params.self_signed(&key).unwrap().pem();
    let root = Issuer::new(params, key);

    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "hall 1");
    params.serial_number = Some(SerialNumber::from_slice(&[0x1a, 0x2b]));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let key = KeyPair::generate().unwrap();
    let middle_pem = params.signed_by(&key, &root).unwrap().pem();
    let middle = Issuer::new(params, key);

    let mut params = CertificateParams::default();
    let uri = "spiffe://plant.example/acme/hall-1/press-7";
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.extended_key_usages = CLIENT.to_vec();
    let leaf = params
        .signed_by(&KeyPair::generate().unwrap(), &middle)
        .unwrap();
    let presented = chain(&[&leaf.pem(), &middle_pem]);
    assert_eq!(peer_identity(&presented).unwrap().uri(), uri);

    let anchors = TrustAnchors::from_pem(root_pem.as_bytes()).unwrap();
    anchors.check_client(&presented, SystemTime::now()).unwrap();
    let strict = anchors
        .with_revocations_of_pem(list(&root, FAR).as_bytes())
        .unwrap();
    for verdict in [
        strict.check_client(&presented, SystemTime::now()),
        strict.check_revoked(&presented),
    ] {
        let refused = verdict.unwrap_err();
        assert_eq!(refused.reason(), &RefusalReason::ChainRevoked);
        assert!(refused.certificate().starts_with(uri));
    }
}

#[test]
fn whether_an_authority_was_taken_out_is_known() {
    let (one, two) = (Plant::new(), Plant::new());
    let both = format!("{}{}", one.authority.ca_pem(), two.authority.ca_pem());
    let both = TrustAnchors::from_pem(both.as_bytes()).unwrap();
    assert!(both.includes(&one.anchors()));
    assert!(both.includes(&both));
    assert!(!one.anchors().includes(&both));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_mutated_list_is_refused_without_a_panic(
        at in any::<prop::sample::Index>(),
        change in 1..=u8::MAX,
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        use std::sync::OnceLock;
        static GOOD: OnceLock<(Ca, Vec<u8>)> = OnceLock::new();
        let (ca, good) = GOOD.get_or_init(|| {
            let ca = Ca::new("authority");
            let pem = list(&ca.issuer, FAR);
            let der = rustls::pki_types::CertificateRevocationListDer::from_pem_slice(pem.as_bytes());
            (ca, der.unwrap().to_vec())
        });
        let mut der = good.clone();
        let at = at.index(der.len());
        der[at] ^= change;
        if let Some(cut) = cut {
            der.truncate(cut.index(der.len()));
        }
        let pem = crate::hostile::pem_of("X509 CRL", &der);
        if let Ok(lists) = RevocationList::all_from_pem(pem.as_bytes()) {
            for list in lists {
                let text = list.to_string();
                prop_assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
            }
        }
        let error = ca.anchors().with_revocations_of_pem(pem.as_bytes()).unwrap_err();
        prop_assert!(!error.to_string().contains(char::is_control), "{error}");
    }
}
