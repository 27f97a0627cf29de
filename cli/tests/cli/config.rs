//! Checking configurations and policies, password files, and every `--help`.

use std::fs;

use crate::program::{Running, run, run_with_input, selvedge, text};

const POLICY: &str = r#"
[[rule]]
name = "presses publish their own"
identities = ["acme/plant-1/*"]
allow = ["publish"]
subjects = ["sites/{site}/{name}/#"]

[[rule]]
name = "secrets stay"
identities = ["*/*/*"]
deny = ["publish"]
subjects = ["sites/+/+/secret"]
"#;

const PRESS: &str = "spiffe://example.org/acme/plant-1/press-7";

#[test]
fn a_policy_explains_its_decisions() {
    let folder = tempfile::tempdir().unwrap();
    let policy = text(&folder.path().join("policy.toml"));
    fs::write(&policy, POLICY).unwrap();
    assert_eq!(run(selvedge(["policy", "check", &policy])).ok(), "ok\n");

    let explain = |subject: &str, more: &[&str]| {
        let args = [
            "policy",
            "explain",
            "--policy",
            &policy,
            "--identity",
            PRESS,
            "publish",
            subject,
        ];
        run(selvedge(args.iter().chain(more)))
    };
    let said = explain("sites/plant-1/press-7/heat", &[]).ok();
    assert!(
        said.contains("allowed by rule \"presses publish their own\""),
        "{said}"
    );

    let denied = explain("sites/plant-1/press-7/secret", &[]);
    assert_eq!(denied.code, Some(1));
    assert!(
        denied.stdout.contains("denied by rule \"secrets stay\""),
        "{denied:?}"
    );
    assert_eq!(denied.stderr, "");

    let denied = explain("sites/plant-2/press-7/heat", &["--json"]);
    assert_eq!(denied.code, Some(1));
    let json = &denied.json()[0];
    assert_eq!(json["allowed"], false);
    assert_eq!(json["rule"], serde_json::Value::Null);
    assert_eq!(json["rules"][0]["verdict"], "other subject");

    let usage = run(selvedge([
        "policy",
        "explain",
        "--policy",
        &policy,
        "--identity",
        "press-7",
        "eat",
        "x",
    ]));
    assert_eq!(usage.code, Some(2));
    assert!(
        usage.stderr.contains("spiffe://<trust-domain>"),
        "{usage:?}"
    );
}

#[test]
fn every_problem_of_a_policy_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let policy = text(&folder.path().join("policy.toml"));
    fs::write(&policy, POLICY.replace("publish\"]", "publsh\"]")).unwrap();
    let said = run(selvedge(["policy", "check", &policy, "--json"]));
    assert_eq!(said.code, Some(1));
    let problems = said.json()[0]["problems"].as_array().unwrap().clone();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(
        problems[0]["problem"].as_str().unwrap().contains("publsh"),
        "{problems:?}"
    );
    assert!(said.stderr.contains("2 problems"), "{said:?}");
}

#[test]
fn every_problem_of_a_broker_configuration_is_named_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = text(&folder.path().join("broker.toml"));
    fs::write(
        &file,
        r#"
        [identity]
        cert = "no-cert.pem"
        key = "no-key.pem"
        trust = "no-ca.pem"
        [policy]
        file = "no-policy.toml"
        [listen]
        quic = "localhost"
        [limits]
        queue_bytes = 1
        "#,
    )
    .unwrap();
    let keys = [
        "identity.cert",
        "identity.trust",
        "policy.file",
        "listen.quic",
        "limits.queue_bytes",
    ];
    let said = run(selvedge(["broker", "--config", &file, "--check"])).failed();
    for key in keys {
        assert!(said.contains(key), "{key} is missing from {said}");
    }
    let said = run(selvedge(["broker", "--config", &file, "--check", "--json"]));
    assert_eq!(said.code, Some(1));
    assert_eq!(
        said.json()[0]["problems"].as_array().unwrap().len(),
        keys.len()
    );
    // Without --check it starts nothing either.
    let said = run(selvedge(["broker", "--config", &file])).failed();
    assert!(said.contains("5 problems"), "{said}");
}

#[test]
fn a_broker_says_where_it_listens_and_stops_when_told() {
    let folder = tempfile::tempdir().unwrap();
    let dir = text(folder.path());
    run(selvedge([
        "certs",
        "init",
        "--dir",
        &dir,
        "--trust-domain",
        "example.org",
    ]))
    .ok();
    let issue = [
        "certs", "issue", "--dir", &dir, "--tenant", "acme", "--site", "cloud", "--name", "broker",
    ];
    run(selvedge(issue.iter().chain(&[
        "--server",
        "--ip",
        "127.0.0.1",
    ])))
    .ok();
    fs::write(folder.path().join("policy.toml"), POLICY).unwrap();
    let file = text(&folder.path().join("broker.toml"));
    fs::write(
        &file,
        r#"
        identity = { cert = "acme/cloud/broker/cert.pem", key = "acme/cloud/broker/key.pem", trust = "ca.pem" }
        policy = { file = "policy.toml" }
        listen = { quic = "127.0.0.1:0" }
        admin = { listen = "127.0.0.1:0" }
        "#,
    )
    .unwrap();
    let checked = run(selvedge(["broker", "--config", &file, "--check"])).ok();
    assert!(checked.starts_with("ok\n"), "{checked}");
    assert!(
        checked.contains("spiffe://example.org/acme/cloud/broker"),
        "{checked}"
    );

    let broker = Running::start(selvedge(["broker", "--config", &file]));
    let lines = broker.lines_to("ready");
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[0].starts_with("quic=127.0.0.1:"), "{lines:?}");
    assert!(lines[1].starts_with("admin=127.0.0.1:"), "{lines:?}");
    assert!(!lines[0].ends_with(":0"), "{lines:?}");
    broker.stop();
}

#[test]
fn a_password_file_takes_a_user_from_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = text(&folder.path().join("users.toml"));
    let set = |password: &str| {
        let args = [
            "mqtt",
            "passwd",
            &file,
            "--user",
            "press-7",
            "--identity",
            PRESS,
            "--password-stdin",
        ];
        run_with_input(selvedge(args), password.as_bytes())
    };
    let said = set("open sesame\n").ok();
    assert!(said.contains(PRESS), "{said}");
    let first = fs::read_to_string(&file).unwrap();
    assert!(first.contains("$argon2id$"), "{first}");
    assert!(!first.contains("sesame"), "{first}");
    set("another\n").ok();
    assert_ne!(fs::read_to_string(&file).unwrap(), first);
    let said = set("\n").failed();
    assert!(said.contains("the password is empty"), "{said}");
}

#[test]
fn worker_and_bridge_name_every_problem() {
    let folder = tempfile::tempdir().unwrap();
    let file = text(&folder.path().join("some.toml"));
    fs::write(
        &file,
        "tier = \"fog\"\n[[model]]\nname = \"a/#\"\npath = \"no.onnx\"\n",
    )
    .unwrap();
    let said = run(selvedge(["worker", "--config", &file, "--check"])).failed();
    for key in ["tier", "connect", "model[0].name", "model[0].path"] {
        assert!(said.contains(key), "{key} is missing from {said}");
    }
    fs::write(
        &file,
        "[fabric]\nbroker = \"x y\"\n[[remote]]\nname = \"plant\"\n",
    )
    .unwrap();
    let said = run(selvedge(["bridge", "--config", &file, "--check"])).failed();
    for key in ["fabric.broker", "fabric.ca", "remote \"plant\""] {
        assert!(said.contains(key), "{key} is missing from {said}");
    }
}

#[test]
fn every_help_has_an_example() {
    let commands = [
        "",
        "dev",
        "broker",
        "bridge",
        "worker",
        "certs",
        "certs init",
        "certs issue",
        "certs show",
        "policy",
        "policy check",
        "policy explain",
        "mqtt",
        "mqtt passwd",
        "pub",
        "sub",
        "call",
        "serve",
        "infer",
    ];
    for command in commands {
        let help = run(selvedge(command.split_whitespace().chain(["--help"]))).ok();
        assert!(help.contains("Example"), "{command}: {help}");
    }
    let help = run(selvedge(["--help"])).ok();
    for command in commands.iter().filter(|command| !command.contains(' ')) {
        assert!(help.contains(command), "{command} is tested but not listed");
    }
}
