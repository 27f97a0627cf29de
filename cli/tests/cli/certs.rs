//! `selvedge certs`, and the refusals of its files.

use std::fs;
use std::path::Path;

use crate::program::{Done, run, selvedge, text};

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
