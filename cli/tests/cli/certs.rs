//! `selvedge certs`, and the refusals of its files.

use std::fs;
use std::path::Path;

use crate::program::{Done, Running, run, selvedge, text};

fn certs(dir: &Path, line: &str) -> Done {
    let dir = text(dir);
    run(selvedge(
        ["certs"]
            .into_iter()
            .chain(line.split_whitespace())
            .map(|word| word.replace("DIR", &dir)),
    ))
}

#[cfg(unix)]
fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

const INIT: &str = "init --dir DIR --trust-domain example.org";
const ISSUE: &str = "issue --dir DIR --tenant acme --site plant-1 --name press-7";

#[test]
fn an_authority_issues_a_certificate_that_is_explained_to_a_person() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("pki");
    let said = certs(&dir, INIT).ok();
    assert!(said.starts_with("authority of example.org"), "{said}");
    let said = certs(&dir, ISSUE).ok();
    let identity = "spiffe://example.org/acme/plant-1/press-7";
    assert!(said.contains(identity), "{said}");

    let leaf = dir.join("acme/plant-1/press-7");
    #[cfg(unix)]
    {
        assert_eq!(mode(&dir.join("ca.key")), 0o600);
        assert_eq!(mode(&leaf.join("key.pem")), 0o600);
    }
    let shown = run(selvedge(["certs", "show", &text(&leaf.join("cert.pem"))])).ok();
    assert!(
        shown.contains(&format!("identity     {identity}")),
        "{shown}"
    );
    assert!(shown.contains("expires in 89 days"), "{shown}");
    assert!(
        shown.contains("may be used for: client authentication"),
        "{shown}"
    );

    let shown = run(selvedge([
        "certs",
        "show",
        "--json",
        &text(&dir.join("ca.pem")),
    ]));
    let [json] = &shown.json()[..] else {
        panic!("{shown:?}")
    };
    assert_eq!(json["is_authority"], true);
    assert_eq!(json["valid_now"], true);
    assert_eq!(json["key_type"], "ECDSA P-256");
}

#[test]
fn a_broker_certificate_carries_its_names() {
    let folder = tempfile::tempdir().unwrap();
    certs(folder.path(), INIT).ok();
    certs(
        folder.path(),
        "issue --dir DIR --tenant acme --site cloud --name broker --server --dns localhost --ip 127.0.0.1 --days 7",
    )
    .ok();
    let file = folder.path().join("acme/cloud/broker/cert.pem");
    let shown = run(selvedge(["certs", "show", "--json", &text(&file)])).json();
    assert_eq!(shown[0]["dns_names"], serde_json::json!(["localhost"]));
    assert_eq!(shown[0]["ip_addresses"], serde_json::json!(["127.0.0.1"]));
    assert_eq!(
        shown[0]["purposes"],
        serde_json::json!(["client authentication", "server authentication"])
    );
    assert_eq!(shown[0]["validity"], "expires in 6 days");
}

#[test]
fn nothing_is_overwritten_without_force() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    certs(dir, INIT).ok();
    certs(dir, ISSUE).ok();
    for (line, file) in [(INIT, "ca.pem"), (ISSUE, "acme/plant-1/press-7/cert.pem")] {
        let before = fs::read(dir.join(file)).unwrap();
        let said = certs(dir, line).failed();
        assert!(said.contains("exists already"), "{said}");
        assert!(said.contains("--force"), "{said}");
        assert_eq!(fs::read(dir.join(file)).unwrap(), before);
        certs(dir, &format!("{line} --force")).ok();
        assert_ne!(fs::read(dir.join(file)).unwrap(), before);
    }
}

#[test]
fn what_cannot_be_issued_or_shown_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let said = certs(dir, ISSUE).failed();
    assert!(
        said.contains("make one with `selvedge certs init`"),
        "{said}"
    );
    certs(dir, INIT).ok();
    let said = certs(dir, &ISSUE.replace("plant-1", "..")).failed();
    assert!(
        said.contains("expected a site of 1 to 128 characters"),
        "{said}"
    );
    let said = certs(dir, &format!("{ISSUE} --days 99999")).failed();
    assert!(
        said.contains("it would end after the authority itself"),
        "{said}"
    );
    let said = certs(dir, "show DIR/ca.key").failed();
    assert!(said.contains("holds no certificate"), "{said}");
    let said = certs(dir, "show DIR/nothing").failed();
    assert!(said.contains("nothing: No such file"), "{said}");

    let usage = certs(dir, &format!("{ISSUE} --dns localhost"));
    assert_eq!(usage.code, Some(2), "{usage:?}");
    assert!(usage.stderr.contains("--server"), "{usage:?}");
}

#[test]
fn a_revoked_certificate_is_on_the_list_once_and_the_list_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let list = dir.join("crl.pem");
    certs(dir, INIT).ok();
    certs(dir, ISSUE).ok();
    let said = certs(dir, "revoke --dir DIR").ok();
    assert!(
        said.contains("number 1, 0 revoked, renew it before 20"),
        "{said}"
    );
    #[cfg(unix)]
    assert_eq!(mode(&list), 0o644);

    let said = certs(dir, "revoke --dir DIR acme/plant-1/press-7").ok();
    let name = "revoked spiffe://example.org/acme/plant-1/press-7 (serial ";
    assert!(said.starts_with(name), "{said}");
    assert!(said.contains("number 2, 1 revoked"), "{said}");
    let before = fs::read(&list).unwrap();
    let said = certs(dir, "revoke --dir DIR DIR/acme/plant-1/press-7/cert.pem").ok();
    assert!(
        said.starts_with("already revoked: spiffe://example.org/"),
        "{said}"
    );
    assert_eq!(fs::read(&list).unwrap(), before);

    // A certificate whose file is gone.
    let said = certs(dir, "revoke --dir DIR --serial 4f:1a:2B").ok();
    assert!(
        said.starts_with("revoked certificate (serial 4f1a2b)"),
        "{said}"
    );
    let shown = run(selvedge(["certs", "show", &text(&list)])).ok();
    for line in [
        "revocation list",
        "number       3",
        "revoked      2",
        "  serial 4f1a2b since 20",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let shown = run(selvedge(["certs", "show", "--json", &text(&list)])).json();
    assert_eq!(shown.len(), 1);
    assert_eq!(shown[0]["number"], "3");
    assert_eq!(shown[0]["overdue"], false);
    let revoked = shown[0]["revoked"].as_array().unwrap();
    assert_eq!(revoked.len(), 2);
    assert!(revoked.iter().any(|entry| entry["serial"] == "4f1a2b"));
}

#[test]
fn what_cannot_be_revoked_is_said_and_revokes_nothing_else() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dir = folder.path();
    let said = certs(dir, "revoke --dir DIR").failed();
    assert!(
        said.contains("make one with `selvedge certs init`"),
        "{said}"
    );
    for dir in [dir, other.path()] {
        certs(dir, INIT).ok();
        certs(dir, ISSUE).ok();
    }
    let said = certs(
        dir,
        "revoke --dir DIR acme/plant-1/press-7 acme/plant-1/press-8",
    )
    .failed();
    let expected = "or the file of a certificate, found acme/plant-1/press-8";
    assert!(said.contains(expected), "{said}");
    let foreign = text(&other.path().join("acme/plant-1/press-7/cert.pem"));
    let said = certs(
        dir,
        &format!("revoke --dir DIR acme/plant-1/press-7 {foreign}"),
    )
    .failed();
    assert!(said.contains("was issued by another authority"), "{said}");
    assert!(!dir.join("crl.pem").exists());

    fs::write(dir.join("crl.pem"), "nonsense").unwrap();
    let said = certs(dir, "revoke --dir DIR acme/plant-1/press-7").failed();
    let expected = "expected one revocation list, found 0; move it away to begin a new one";
    assert!(said.contains(expected), "{said}");
    assert_eq!(fs::read(dir.join("crl.pem")).unwrap(), b"nonsense");
    let usage = certs(dir, "revoke --dir DIR --serial xyz");
    assert_eq!(usage.code, Some(2), "{usage:?}");
    assert!(
        usage
            .stderr
            .contains("expected a serial number of 1 to 20 bytes"),
        "{usage:?}"
    );
}

const POLICY: &str = r##"
[[rule]]
name = "everyone"
identities = ["*/*/*"]
allow = ["publish", "subscribe"]
subjects = ["#"]
"##;

#[cfg(unix)]
#[test]
fn from_init_to_the_device_that_is_thrown_out() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, pki) = (folder.path(), folder.path().join("pki"));
    certs(&pki, INIT).ok();
    certs(
        &pki,
        "issue --dir DIR --tenant acme --site cloud --name broker --server --dns localhost --ip 127.0.0.1",
    )
    .ok();
    certs(&pki, ISSUE).ok();
    certs(
        &pki,
        "issue --dir DIR --tenant acme --site plant-1 --name press-8",
    )
    .ok();
    fs::write(dir.join("policy.toml"), POLICY).unwrap();
    let config = dir.join("broker.toml");
    fs::write(
        &config,
        "[identity]\ncert = 'pki/acme/cloud/broker/cert.pem'\nkey = 'pki/acme/cloud/broker/key.pem'\n\
         trust = 'pki/ca.pem'\ncrl = 'pki/crl.pem'\n[policy]\nfile = 'policy.toml'\n\
         [listen]\nquic = '127.0.0.1:0'\n",
    )
    .unwrap();
    // A list that is configured must be there.
    let said = run(selvedge(["broker", "--config", &text(&config), "--check"])).failed();
    assert!(said.contains("identity.crl: cannot read"), "{said}");
    certs(&pki, "revoke --dir DIR").ok();

    let broker = Running::start(selvedge(["broker", "--config", &text(&config)]));
    let lines = broker.lines_to("ready");
    let quic = lines[0].strip_prefix("quic=").unwrap().to_owned();
    let client = |who: &str, args: &[&str]| {
        let mut command = selvedge(args);
        command
            .env("SELVEDGE_BROKER", &quic)
            .env("SELVEDGE_PKI", text(&pki))
            .env("SELVEDGE_AS", format!("acme/plant-1/{who}"));
        command
    };
    let watching = Running::start(client("press-8", &["sub", "a"]));
    watching.wait_for_note("subscribed to a");
    let revoked = Running::start(client("press-7", &["sub", "a"]));
    revoked.wait_for_note("subscribed to a");
    let publish = ["pub", "a", "x", "--qos", "1"];

    certs(&pki, "revoke --dir DIR acme/plant-1/press-7").ok();
    let list = pki.join("crl.pem");
    let good = fs::read(&list).unwrap();
    broker.signal("HUP");
    broker.wait_for_note("a connected peer is evicted");
    broker.wait_for_note("evicted=1");
    let said = run(client("press-7", &publish)).failed();
    assert!(
        said.contains("was revoked by its authority; issue a new one"),
        "{said}"
    );

    // A damaged list is refused whole, and the one before stays in force.
    fs::write(&list, &good[..good.len() / 2]).unwrap();
    broker.signal("HUP");
    broker.wait_for_note("the configuration was not reloaded");
    let said = run(client("press-7", &publish)).failed();
    assert!(
        said.contains("was revoked by its authority; issue a new one"),
        "{said}"
    );

    run(client("press-8", &publish)).ok();
    assert_eq!(watching.line(), "a x");
    watching.stop();
    broker.stop();
}
