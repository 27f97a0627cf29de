//! Issuing: what is written, with which modes, and what the certificates say.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use selvedge_certs::{
    Authority, AuthorityError, Credentials, Identity, IdentityError, IssueRequest, LoadError,
    Overwrite, Segment, TrustAnchors, explain,
};
use tempfile::TempDir;

const DAY: Duration = Duration::from_secs(86_400);

fn press() -> IssueRequest {
    IssueRequest::client("acme", "hall-1", "press-7")
}

#[test]
fn an_authority_that_was_written_can_be_loaded_and_its_certificates_too() {
    let dir = TempDir::new().unwrap();
    Authority::init(&dir.path().join("pki"), "plant.example", Overwrite::No).unwrap();
    let authority = Authority::load(&dir.path().join("pki")).unwrap();
    assert_eq!(authority.trust_domain(), "plant.example");
    TrustAnchors::from_file(&dir.path().join("pki/ca.pem")).unwrap();

    let paths = authority
        .issue_into(&dir.path().join("out"), &press(), Overwrite::No)
        .unwrap();
    assert!(paths.cert.ends_with("out/acme/hall-1/press-7/cert.pem"));
    assert!(paths.key.ends_with("out/acme/hall-1/press-7/key.pem"));
    let credentials = Credentials::from_files(&paths.cert, &paths.key).unwrap();
    let expected = Identity::new("plant.example", "acme", "hall-1", "press-7").unwrap();
    assert_eq!(credentials.identity(), &expected);
    let left = credentials
        .not_after()
        .duration_since(SystemTime::now())
        .unwrap();
    assert!(left > 89 * DAY && left <= 90 * DAY);
    let description = credentials.description();
    assert!(
        description.starts_with("spiffe://plant.example/acme/hall-1/press-7 (serial ")
            && description.contains(", valid until 20"),
        "{description}"
    );
}

#[cfg(unix)]
#[test]
fn keys_are_for_their_owner_only_and_nothing_else_is_left_behind() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::new().unwrap();
    let pki = dir.path().join("pki");
    let authority = Authority::init(&pki, "plant.example", Overwrite::No).unwrap();
    authority
        .issue_into(dir.path(), &press(), Overwrite::No)
        .unwrap();
    authority
        .issue_into(dir.path(), &press(), Overwrite::Yes)
        .unwrap();
    let mode = |path: &str| {
        let metadata = std::fs::metadata(dir.path().join(path)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("pki"), 0o700);
    assert_eq!(mode("pki/ca.key"), 0o600);
    assert_eq!(mode("acme"), 0o700);
    assert_eq!(mode("acme/hall-1/press-7"), 0o700);
    assert_eq!(mode("acme/hall-1/press-7/key.pem"), 0o600);
    assert_eq!(files(&pki), ["ca.key", "ca.pem"]);
    assert_eq!(
        files(&dir.path().join("acme/hall-1/press-7")),
        ["cert.pem", "key.pem"]
    );
}

#[test]
fn nothing_is_overwritten_unless_allowed() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::init(dir.path(), "plant.example", Overwrite::No).unwrap();
    let again = Authority::init(dir.path(), "plant.example", Overwrite::No);
    assert!(
        matches!(&again, Err(AuthorityError::Exists { path }) if path.ends_with("ca.key")),
        "{again:?}"
    );
    let kept = std::fs::read_to_string(dir.path().join("ca.pem")).unwrap();
    assert_eq!(kept, authority.ca_pem());

    // A certificate alone is in the way as well, and no key appears beside it.
    std::fs::remove_file(dir.path().join("ca.key")).unwrap();
    let again = Authority::init(dir.path(), "plant.example", Overwrite::No);
    assert!(
        matches!(&again, Err(AuthorityError::Exists { path }) if path.ends_with("ca.pem")),
        "{again:?}"
    );
    assert_eq!(files(dir.path()), ["ca.pem"]);

    let replaced = Authority::init(dir.path(), "plant.example", Overwrite::Yes).unwrap();
    let now_there = std::fs::read_to_string(dir.path().join("ca.pem")).unwrap();
    assert_eq!(now_there, replaced.ca_pem());
    assert_ne!(now_there, authority.ca_pem());
    Authority::load(dir.path()).unwrap();
}

#[test]
fn an_authority_with_the_wrong_key_or_a_peers_certificate_is_not_loaded() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::init(dir.path(), "plant.example", Overwrite::No).unwrap();
    let other = authority.issue(&press()).unwrap();
    std::fs::write(dir.path().join("ca.key"), &other.key_pem).unwrap();
    let message = Authority::load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("ca.pem, found another"), "{message}");
    std::fs::write(dir.path().join("ca.pem"), &other.cert_pem).unwrap();
    let message = Authority::load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("found that of a peer"), "{message}");
    std::fs::remove_file(dir.path().join("ca.pem")).unwrap();
    let missing = Authority::load(dir.path());
    assert!(
        matches!(&missing, Err(AuthorityError::File { action: "read", .. })),
        "{missing:?}"
    );
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let authority = Authority::create("plant.example").unwrap();
    let refused = |request: IssueRequest| authority.issue(&request).unwrap_err();
    assert!(matches!(
        refused(IssueRequest::client("acme", "..", "press-7")),
        AuthorityError::Identity(IdentityError::Segment {
            segment: Segment::Site,
            ..
        })
    ));
    assert!(matches!(
        refused(press().dns("not a host")),
        AuthorityError::HostName { .. }
    ));
    for validity in [Duration::ZERO, Duration::MAX, 4000 * DAY] {
        assert!(matches!(
            refused(press().validity(validity)),
            AuthorityError::Validity { .. }
        ));
    }
    assert!(matches!(
        Authority::create("Plant"),
        Err(AuthorityError::Identity(IdentityError::TrustDomain { .. }))
    ));
}

#[test]
fn a_certificate_is_explained_to_people() {
    let authority = Authority::create("plant.example").unwrap();
    let now = SystemTime::now();
    let broker = authority
        .issue(
            &IssueRequest::server("acme", "cloud", "broker-1")
                .dns("broker.example")
                .ip(Ipv4Addr::LOCALHOST),
        )
        .unwrap();
    let pem = broker.cert_pem.clone() + authority.ca_pem();
    let summaries = explain(pem.as_bytes(), now + DAY / 2).unwrap();
    let [leaf, ca] = summaries.as_slice() else {
        panic!("expected two certificates, found {}", summaries.len());
    };

    assert_eq!(leaf.dns_names, ["broker.example"]);
    assert_eq!(leaf.ip_addresses, [Ipv4Addr::LOCALHOST]);
    assert_eq!(leaf.key_type, "ECDSA P-256");
    assert_eq!(leaf.serial.len(), 32);
    assert_eq!(leaf.fingerprint.len(), 64);
    assert!(leaf.valid_now && !leaf.is_authority);
    assert!(leaf.not_before <= now - 4 * DAY / 1440);
    let text = leaf.to_string();
    for line in [
        "identity     spiffe://plant.example/acme/cloud/broker-1",
        "subject      CN=broker-1",
        "issuer       CN=Selvedge authority of plant.example",
        "names        URI spiffe://plant.example/acme/cloud/broker-1, DNS broker.example, IP 127.0.0.1",
        "may be used for: client authentication, server authentication",
    ] {
        assert!(text.lines().any(|found| found == line), "{text}");
    }
    assert!(text.contains(", expires in 89 days"), "{text}");

    assert!(ca.is_authority);
    assert!(ca.to_string().contains("authority:   signs certificates"));

    let later = explain(broker.cert_pem.as_bytes(), now + 93 * DAY + DAY / 2).unwrap();
    assert_eq!(later[0].validity, "expired 3 days ago");
    assert!(!later[0].valid_now);
    let before = explain(broker.cert_pem.as_bytes(), now - DAY - DAY / 2).unwrap();
    assert_eq!(before[0].validity, "valid only in 1 day");
}

#[test]
fn clients_may_not_serve() {
    let authority = Authority::create("plant.example").unwrap();
    let device = authority.issue(&press()).unwrap();
    let summary = &explain(device.cert_pem.as_bytes(), SystemTime::now()).unwrap()[0];
    assert_eq!(summary.purposes, ["client authentication"]);
}

#[test]
fn debug_output_never_holds_a_private_key() {
    let authority = Authority::create("plant.example").unwrap();
    let device = authority.issue(&press()).unwrap();
    let shown = format!("{device:?} {:?} {authority:?}", device.credentials());
    let secret: Vec<&str> = device.key_pem.lines().collect();
    assert!(
        !shown.contains(secret[1]) && !shown.contains("PRIVATE"),
        "{shown}"
    );
}

#[test]
fn files_that_are_not_what_they_should_be_are_named_with_what_they_are() {
    let authority = Authority::create("plant.example").unwrap();
    let device = authority.issue(&press()).unwrap();
    let other = authority.issue(&press()).unwrap();
    let load =
        |cert: &str, key: &str| Credentials::from_pem(cert.as_bytes(), key.as_bytes()).unwrap_err();
    let (cert, key) = (device.cert_pem.as_str(), device.key_pem.as_str());

    assert!(matches!(
        load(key, cert),
        LoadError::NoCertificate { found, .. } if found == "PRIVATE KEY"
    ));
    assert!(matches!(
        load(cert, cert),
        LoadError::NoKey { found, .. } if found == "CERTIFICATE"
    ));
    assert!(matches!(
        load(cert, &format!("{key}{}", other.key_pem)),
        LoadError::NoKey { found, .. } if found == "PRIVATE KEY, PRIVATE KEY"
    ));
    assert!(matches!(
        load(cert, &other.key_pem),
        LoadError::KeyMismatch { .. }
    ));
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    assert!(matches!(
        load(cert, &encrypted),
        LoadError::EncryptedKey { .. }
    ));
    assert!(matches!(load("", key), LoadError::NoCertificate { .. }));
    assert!(matches!(
        load(&cert.replace("-----END", "----- END"), key),
        LoadError::Pem { .. }
    ));
    assert!(matches!(
        load(authority.ca_pem(), key),
        LoadError::Identity {
            source: IdentityError::Path { .. },
            ..
        }
    ));
    assert!(matches!(
        Credentials::from_files(Path::new("/nowhere/cert.pem"), Path::new("/nowhere/key.pem")),
        Err(LoadError::Read { path, .. }) if path == "/nowhere/cert.pem"
    ));
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
