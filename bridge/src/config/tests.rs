//! Tests of the configuration's checks.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use selvedge_certs::{Authority, IssueRequest};
use tempfile::TempDir;

use super::*;

/// A directory with `ca.pem`, a certificate `bridge.crt` with its key, and a password file.
fn files() -> TempDir {
    let dir = TempDir::new().unwrap();
    let authority = Authority::create("example.test").unwrap();
    let issued = authority
        .issue(&IssueRequest::client("acme", "site", "bridge"))
        .unwrap();
    write(dir.path(), "ca.pem", authority.ca_pem());
    write(dir.path(), "bridge.pem", &issued.cert_pem);
    write(dir.path(), "bridge.key", &issued.key_pem);
    write(dir.path(), "password", "secret\n");
    dir
}

fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(name), text).unwrap();
}

const FABRIC: &str = r#"
[fabric]
broker = "broker.example:7443"
ca = "ca.pem"
cert = "bridge.pem"
key = "bridge.key"
"#;

fn problems(remotes: &str) -> Vec<String> {
    let dir = files();
    match BridgeConfig::parse(&format!("{FABRIC}{remotes}"), dir.path()) {
        Err(ConfigError::Invalid { problems }) => problems,
        other => panic!("expected problems, found {other:?}"),
    }
}

#[test]
fn a_full_configuration_is_read() {
    let dir = files();
    let text = format!(
        r#"{FABRIC}
session = "bridge"
session_expiry = 60
[[remote]]
name = "plant"
url = "mqtts://mosquitto.plant"
version = "3.1.1"
client_id = "selvedge"
username = "u"
password_file = "password"
ca = "ca.pem"
cert = "bridge.pem"
key = "bridge.key"
keep_alive = 10
clean_session = true
reconnect_max = 5
max_packet_bytes = 2048
outbox_bytes = 100000
[[remote.rule]]
direction = "in"
filter = "sensors/#"
remote_prefix = ""
local_prefix = "plant/"
qos = 0
retain = "clear"
durability = "disk"
[[remote]]
name = "other"
url = "mqtt://[::1]:1884"
client_id = "selvedge"
[[remote.rule]]
direction = "both"
filter = "+/#"
local_prefix = "other/"
"#
    );
    let config = BridgeConfig::parse(&text, dir.path()).unwrap();
    assert_eq!(config.fabric.session.as_deref(), Some("bridge"));
    assert_eq!(config.fabric.ca, dir.path().join("ca.pem"));
    let plant = &config.remotes[0];
    assert_eq!((&*plant.host, plant.port), ("mosquitto.plant", 8883));
    assert!(plant.tls.as_ref().unwrap().identity.is_some());
    assert_eq!(plant.version, Version::V311);
    assert_eq!(plant.rules[0].qos_cap, Qos::AtMostOnce);
    assert_eq!(plant.max_inflight, 20);
    assert_eq!(plant.rules[0].retain, Retain::Clear);
    assert_eq!(plant.rules[0].durability, Durability::Disk);
    let other = &config.remotes[1];
    assert_eq!((&*other.host, other.port), ("[::1]", 1884));
    assert_eq!(other.version, Version::V5);
    assert_eq!(other.rules[0].qos_cap, Qos::AtLeastOnce);
    assert!(!format!("{config:?}").contains("secret"));
}

#[test]
fn every_problem_is_reported_at_once() {
    let found = problems(
        r#"
[[remote]]
name = "a b"
url = "http://x"
version = "4"
client_id = ""
keep_alive = 1
keep_alvie = 2
username = "u"
[[remote.rule]]
direction = "up"
filter = "a"
qos = 3
[[remote.rule]]
direction = "in"
filter = "a/#"
local_prefix = "x"
"#,
    );
    let starts = [
        r#"remote "a b": version: expected "5" or "3.1.1", found "4""#,
        r#"remote "a b": keep_alive: expected 5 to 65535 seconds, found 1"#,
        r#"remote "a b": name: expected 1 to 64 characters of A-Z a-z 0-9 . _ -, found "a b""#,
        r#"remote "a b": client_id: expected a name, found an empty one"#,
        r#"remote "a b": url: expected mqtt://host:port or mqtts://host:port, found "http""#,
        r#"remote "a b": username: expected username and password_file together"#,
        r#"remote "a b": rule 1: direction: expected "in", "out" or "both", found "up""#,
        r#"remote "a b": rule 1: qos: expected 0, 1 or 2, found 3"#,
        r#"remote "a b": rule 2: filter: expected local_prefix to be empty or to end with `/`"#,
        r#"remote "a b": keep_alvie: expected one of name, url"#,
    ];
    for (start, problem) in starts.iter().zip(&found) {
        assert!(
            problem.starts_with(start),
            "expected {start}\nfound {problem}"
        );
    }
    assert_eq!(found.len(), starts.len(), "{found:#?}");
}

#[test]
fn a_loop_is_refused_with_both_rules_named() {
    let found = problems(
        r#"
[[remote]]
name = "old"
url = "mqtt://x"
version = "3.1.1"
client_id = "c"
[[remote.rule]]
direction = "in"
filter = "a/#"
[[remote.rule]]
direction = "out"
filter = "+/#"
"#,
    );
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("remote \"old\": rules 1 in \"a/#\""),
        "{}",
        found[0]
    );
    assert!(found[0].contains("2 out \"+/#\""), "{}", found[0]);
}

#[test]
fn tls_keys_must_fit_the_url() {
    let remote = |keys: &str| {
        problems(&format!(
            "[[remote]]\nname = \"r\"\nclient_id = \"c\"\n{keys}\n\
             [[remote.rule]]\ndirection = \"in\"\nfilter = \"#\"\n"
        ))
    };
    let found = remote("url = \"mqtts://x\"");
    assert_eq!(
        found,
        ["remote \"r\": ca: expected a PEM file for an mqtts:// remote, found none"]
    );
    let found = remote("url = \"mqtt://x\"\nca = \"ca.pem\"");
    assert!(
        found[0].starts_with("remote \"r\": url: expected mqtts://"),
        "{found:?}"
    );
    let found = remote("url = \"mqtts://x\"\nca = \"missing.pem\"");
    assert!(found[0].contains("missing.pem"), "{found:?}");
    let found = remote("url = \"mqtt://u:hunter2@x\"");
    assert!(
        found[0].contains("use username and password_file"),
        "{found:?}"
    );
    assert!(!found[0].contains("hunter2"));
}

#[test]
fn missing_tables_and_names_used_twice_are_reported() {
    let Err(ConfigError::Invalid { problems: found }) =
        BridgeConfig::parse("[fabirc]", Path::new(""))
    else {
        panic!("expected problems");
    };
    assert_eq!(
        found,
        [
            "fabric: expected a table, found no such key; add it",
            "remote: expected an array of tables, [[remote]], found no such key; add it",
            "fabirc: expected one of fabric, store, admin, remote, found this key; remove or correct it",
        ]
    );
    let none = BridgeConfig::parse(&format!("remote = []\n{FABRIC}"), files().path());
    let none = none.unwrap_err().to_string();
    assert_eq!(
        none,
        "the bridge configuration has 1 problem:\n  - remote: expected at least one [[remote]], \
         found none"
    );
    let remote = "[[remote]]\nname = \"r\"\nurl = \"mqtt://x\"\nclient_id = \"c\"\n\
                  [[remote.rule]]\ndirection = \"in\"\nfilter = \"#\"\n";
    let found = problems(&format!("{remote}{remote}"));
    assert_eq!(
        found,
        ["remote \"r\": expected a name of its own, found it twice; rename one"]
    );
}

#[test]
fn exactly_once_needs_three_that_remember() {
    let remote = |more: &str| {
        format!(
            "[[remote]]\nname = \"plant\"\nurl = \"mqtt://plant\"\nclient_id = \"b\"\n{more}\
             [[remote.rule]]\ndirection = \"in\"\nfilter = \"#\"\nlocal_prefix = \"p/\"\nqos = 2\n"
        )
    };
    let found = problems(&remote("clean_session = true\n"));
    assert_eq!(found.len(), 3, "{found:?}");
    for (problem, missing) in found
        .iter()
        .zip(["[store]", "fabric.session", "clean_session"])
    {
        let start = format!("remote \"plant\": rule 1: qos: expected {missing}");
        assert!(problem.starts_with(&start), "{problem}");
    }
    let dir = files();
    let text = format!(
        "{FABRIC}session = \"bridge\"\n[store]\nfolder = \"store\"\n\
         [admin]\nlisten = \"127.0.0.1:9464\"\n{}",
        remote("disk_bytes = 100000\n")
    );
    let config = BridgeConfig::parse(&text, dir.path()).unwrap();
    assert_eq!(config.store, Some(dir.path().join("store")));
    assert_eq!(config.admin, Some(([127, 0, 0, 1], 9464).into()));
    assert_eq!(config.remotes[0].disk_bytes, 100_000);
    assert_eq!(config.remotes[0].max_inflight, 256);
    assert_eq!(config.remotes[0].rules[0].qos_cap, Qos::ExactlyOnce);
}
