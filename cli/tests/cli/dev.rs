//! `selvedge dev`, and the client commands against it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::program::{Done, Running, run, run_with_input, selvedge, text};

/// A fabric of its own for a test.
pub(crate) struct Dev {
    pub(crate) process: Running,
    values: HashMap<String, String>,
}

impl Dev {
    pub(crate) fn start(dir: &Path, more: &[&str]) -> Self {
        let dir = text(dir);
        let mut args = vec!["dev", "--dir", &dir];
        for flag in ["--quic", "--mqtt", "--mqtts", "--admin"] {
            args.extend([flag, "127.0.0.1:0"]);
        }
        args.extend(more);
        let process = Running::start(selvedge(args));
        let lines = process.lines_to("ready");
        let values = (lines.iter())
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Self { process, values }
    }

    fn value(&self, name: &str) -> &str {
        &self.values[name]
    }

    /// A client command, connecting as the admin unless its arguments say otherwise.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = selvedge(args);
        command
            .env("SELVEDGE_BROKER", self.value("quic"))
            .env("SELVEDGE_PKI", self.value("pki"));
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Done {
        run(self.command(args))
    }

    pub(crate) fn start_command(&self, args: &[&str]) -> Running {
        Running::start(self.command(args))
    }
}

#[test]
fn sighup_puts_an_edited_policy_in_force_and_a_broken_one_not() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let publish = ["pub", "demo/a", "x", "--qos", "1"];
    dev.run(&publish).ok();
    let policy = folder.path().join("policy.toml");
    let before = fs::read_to_string(&policy).unwrap();

    fs::write(&policy, "nonsense").unwrap();
    dev.process.signal("HUP");
    dev.process
        .wait_for_note("the configuration was not reloaded");
    dev.run(&publish).ok();

    let denying = "[[rule]]\nname = \"quiet\"\nidentities = [\"*/*/*\"]\ndeny = [\"publish\"]\nsubjects = [\"#\"]\n";
    fs::write(&policy, format!("{before}\n{denying}")).unwrap();
    dev.process.signal("HUP");
    dev.process.wait_for_note("were reloaded");
    let denied = dev.run(&publish).failed();
    assert!(denied.contains("denied by rule \"quiet\""), "{denied}");
    dev.process.stop();
}

#[test]
fn a_message_id_counts_once_and_telemetry_goes_in_datagrams() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let sub = dev.start_command(&[
        "sub",
        "line/#",
        "--count",
        "3",
        "--json",
        "--datagrams",
        "--overflow",
        "refuse",
    ]);
    sub.wait_for_note("subscribed to line/#");
    dev.run(&["pub", "line/a", "21.5", "--datagram"]).ok();
    let named = |id: &str| {
        let arguments = ["pub", "line/b", "x", "--qos", "1", "--message-id", id];
        dev.run(&arguments).ok()
    };
    for id in ["order-1", "order-1", "order-2"] {
        let said = named(id);
        assert!(said.contains("acknowledged"), "{said}");
    }
    let (status, rest) = sub.wait();
    assert!(status.success());
    let seen: Vec<serde_json::Value> = rest
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let ids: Vec<_> = seen.iter().map(|message| &message["message_id"]).collect();
    assert_eq!(
        ids,
        [
            &serde_json::Value::Null,
            &"order-1".into(),
            &"order-2".into()
        ]
    );
    assert_eq!(
        (&seen[0]["topic"], &seen[0]["payload"]),
        (&"line/a".into(), &"21.5".into())
    );

    let both = dev
        .run(&["pub", "line/a", "x", "--datagram", "--qos", "1"])
        .failed();
    assert!(both.contains("a datagram is not acknowledged"), "{both}");
    dev.process.stop();
}

#[test]
fn messages_go_from_pub_to_sub() {
    let folder = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0";
    let dev = Dev::start(folder.path(), &["--no-workers", "--ws", any, "--wss", any]);
    for name in ["quic", "mqtt", "mqtts", "ws", "wss", "admin"] {
        assert!(dev.value(name).starts_with("127.0.0.1:"), "{name}");
        assert!(!dev.value(name).ends_with(":0"), "{name}");
    }
    let sub = dev.start_command(&["sub", "demo/#", "--count", "4", "--verbose"]);
    sub.wait_for_note("subscribed to demo/#");
    let said = dev.run(&["pub", "demo/a", "hello\u{7}", "--qos", "1"]).ok();
    assert!(
        said.starts_with("published 1 message of 6 bytes in all to demo/a, acknowledged"),
        "{said}"
    );
    assert_eq!(
        sub.line(),
        "demo/a qos=1 from=spiffe://dev.example/dev/local/admin hello\\u{7}"
    );
    let published = run_with_input(
        dev.command(&["pub", "demo/lines", "--lines", "--json"]),
        b"one\r\ntwo\n",
    );
    assert_eq!(published.json()[0]["messages"], 2);
    assert_eq!(published.json()[0]["bytes"], 6);
    assert!(sub.line().ends_with(" one"));
    assert!(sub.line().ends_with(" two"));
    let binary = folder.path().join("binary");
    fs::write(&binary, [0xff, 0x00]).unwrap();
    dev.run(&["pub", "demo/b", "--file", &text(&binary)]).ok();
    let (status, rest) = sub.wait();
    assert!(status.success());
    assert_eq!(
        rest,
        ["demo/b qos=0 from=spiffe://dev.example/dev/local/admin hex:ff00"]
    );

    dev.run(&["pub", "demo/kept", "21.5", "--retain", "--qos", "1"])
        .ok();
    let sub = dev.run(&["sub", "demo/kept", "--count", "1", "--json"]);
    let json = &sub.json()[0];
    assert_eq!(json["payload"], "21.5");
    assert_eq!(json["retain"], true);
    assert_eq!(json["publisher"], "spiffe://dev.example/dev/local/admin");

    let quiet = dev.run(&["sub", "silence", "--timeout", "100ms"]).failed();
    assert!(
        quiet.contains("expected 1 message in time, received 0"),
        "{quiet}"
    );
    dev.process.stop();
}

#[test]
fn denials_are_told_with_their_rule_and_by_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let denied = |args: &[&str]| {
        let mut args = args.to_vec();
        args.extend(["--as", "dev/local/edge-worker"]);
        dev.run(&args).failed()
    };
    let cases: [(&[&str], &str); 6] = [
        (
            &["pub", "x", "y"],
            "publish on \"x\" denied: no rule allows it",
        ),
        (
            &["pub", "x", "y", "--qos", "1"],
            "publish on \"x\" denied: no rule allows it",
        ),
        (
            &["sub", "x/#"],
            "subscribe on \"x/#\" denied: no rule allows it",
        ),
        (&["call", "x"], "call on \"x\" denied: no rule allows it"),
        (
            &["serve", "x", "--echo"],
            "serve on \"x\" denied: no rule allows it",
        ),
        (
            &["infer", "digits", "--tensor", "a:FP32:[1]:1"],
            "infer on \"digits\" denied: no rule allows it",
        ),
    ];
    for (args, expected) in cases {
        let said = denied(args);
        assert!(said.contains(expected), "{args:?}: {said}");
        assert!(said.contains("PERMISSION_DENIED"), "{args:?}: {said}");
    }
    let said = dev.run(&["pub", "x", "y", "--json", "--as", "dev/local/edge-worker"]);
    let json = &said.json()[0];
    assert_eq!(json["ok"], false);
    assert_eq!(json["status"]["code"], "PERMISSION_DENIED");
    assert_eq!(
        json["status"]["denial"],
        serde_json::json!({ "verb": "publish", "subject": "x", "rule": null })
    );
    let said = dev
        .run(&["call", "nobody/here", "--deadline", "20s"])
        .failed();
    assert!(said.contains("call nobody/here: NOT_FOUND"), "{said}");
    dev.process.stop();
}

#[test]
fn who_cannot_connect_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(&folder.path().join("fabric"), &["--no-workers"]);
    let said = dev
        .run(&["pub", "x", "y", "--as", "dev/local/nobody"])
        .failed();
    assert!(
        said.contains("expected the certificate of dev/local/nobody"),
        "{said}"
    );
    assert!(said.contains("dev/local/admin"), "{said}");

    let other = text(&folder.path().join("other"));
    run(selvedge([
        "certs",
        "init",
        "--dir",
        &other,
        "--trust-domain",
        "dev.example",
    ]))
    .ok();
    run(selvedge([
        "certs", "issue", "--dir", &other, "--tenant", "dev", "--site", "local", "--name", "admin",
    ]))
    .ok();
    // The broker is not who this client trusts.
    let said = dev.run(&["pub", "x", "y", "--pki", &other]).failed();
    assert!(said.contains("this client refused the broker"), "{said}");
    // The client is not who the broker trusts.
    let ca = text(&Path::new(dev.value("pki")).join("ca.pem"));
    let said = dev
        .run(&["pub", "x", "y", "--pki", &other, "--ca", &ca])
        .failed();
    assert!(said.contains("the broker refused this client"), "{said}");
    dev.process.stop();

    let mut alone = selvedge(["pub", "x", "y"]);
    alone.env("XDG_STATE_HOME", folder.path().join("empty"));
    let said = run(alone).failed();
    assert!(said.contains("start `selvedge dev`"), "{said}");
}

#[test]
fn calls_reach_a_service_and_tell_how_they_ended() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let echo = dev.start_command(&["serve", "demo/echo", "--echo"]);
    echo.wait_for_note("serving demo/echo");
    assert_eq!(dev.run(&["call", "demo/echo", "hello"]).ok(), "hello\n");
    let called = dev.run(&["call", "demo/echo", "hello", "--json"]);
    let json = called.json();
    assert_eq!(json[0]["payload"], "hello");
    assert_eq!(json[1]["ok"], true);
    assert!(
        echo.line()
            .starts_with("spiffe://dev.example/dev/local/admin OK")
    );

    let upper = dev.start_command(&["serve", "demo/upper", "--exec", "tr a-z A-Z"]);
    upper.wait_for_note("serving demo/upper");
    // More than a pipe holds, each way.
    let big = "selvedge".repeat(50_000);
    let called = run_with_input(
        dev.command(&["call", "demo/upper", "--stdin", "--raw"]),
        big.as_bytes(),
    );
    assert_eq!(called.ok(), big.to_uppercase());

    let failing = dev.start_command(&["serve", "demo/fail", "--exec", "echo no paper >&2; exit 3"]);
    failing.wait_for_note("serving demo/fail");
    let said = dev.run(&["call", "demo/fail"]).failed();
    assert!(
        said.contains("call demo/fail: INTERNAL: the command ended with exit status: 3: no paper"),
        "{said}"
    );

    let slow = dev.start_command(&["serve", "demo/slow", "--exec", "sleep 60"]);
    slow.wait_for_note("serving demo/slow");
    let said = dev.run(&["call", "demo/slow", "--deadline", "300ms", "--json"]);
    assert_eq!(said.code, Some(1));
    assert_eq!(
        said.json()[0]["status"]["code"],
        "DEADLINE_EXCEEDED",
        "{said:?}"
    );

    upper.stop();
    let said = dev.run(&["call", "demo/upper", "x"]).failed();
    assert!(said.contains("NOT_FOUND"), "{said}");
    drop((echo, failing, slow));
    dev.process.stop();
}

#[test]
fn inferences_run_at_the_edge_or_in_the_cloud() {
    let folder = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &[]);
    let request = text(&folder.path().join("models/digit.json"));
    let infer = |more: &[&str]| {
        let mut args = vec!["infer", "digits", "--input", &request, "--json"];
        args.extend(more);
        let done = dev.run(&args);
        assert_eq!(done.code, Some(0), "{done:?}");
        done.json().remove(0)
    };
    // The first test image is a zero that the edge model takes for a six, unsure of itself.
    let edge = infer(&["--prefer", "edge"]);
    assert_eq!(edge["tier"], "edge");
    assert_eq!(edge["worker"], "spiffe://dev.example/dev/local/edge-worker");
    assert_eq!(edge["outputs"][0]["argmax"], 6);
    assert_eq!(edge["outputs"][0]["data"].as_array().unwrap().len(), 10);
    let cloud = infer(&["--prefer", "cloud"]);
    assert_eq!(cloud["tier"], "cloud");
    let stays = infer(&["--prefer", "cloud", "--residency", "site"]);
    assert_eq!(stays["tier"], "edge");
    let escalated = infer(&["--prefer", "edge", "--min-confidence", "0.9"]);
    assert_eq!(escalated["escalated"], true);
    assert_eq!(escalated["tier"], "cloud");
    assert_eq!(escalated["outputs"][0]["argmax"], 0);

    let said = dev
        .run(&["infer", "digits", "--input", &request, "--prefer", "cloud"])
        .ok();
    for line in [
        "probabilities FP32 [1, 10]",
        "greatest: 0",
        "worker      spiffe://",
        "reason      ",
    ] {
        assert!(said.contains(line), "{line:?} is missing from {said}");
    }
    let said = dev.run(&["infer", "nothing", "--input", &request]).failed();
    assert!(said.contains("infer nothing: NOT_FOUND"), "{said}");
    let said = dev
        .run(&["infer", "digits", "--tensor", "input:FP32:[1,2]:1,2"])
        .failed();
    assert!(said.contains("INVALID_ARGUMENT"), "{said}");
    let usage = dev.run(&["infer", "digits", "--tensor", "input:FP32:[1,2]:1"]);
    assert_eq!(usage.code, Some(2), "{usage:?}");
    dev.process.stop();
}

#[test]
fn a_second_start_keeps_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let files = [
        "pki/ca.pem",
        "pki/dev/local/admin/cert.pem",
        "pki/dev/local/broker/key.pem",
        "policy.toml",
        "broker.toml",
        "mqtt-users.toml",
        "mqtt-password",
    ];
    let read = || files.map(|file| fs::read_to_string(folder.path().join(file)).unwrap());
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let first = read();
    let busy = run(selvedge(["dev", "--dir", &text(folder.path())])).failed();
    assert!(
        busy.contains("found another fabric running from it"),
        "{busy}"
    );
    dev.process.stop();

    let policy = folder.path().join("policy.toml");
    let edited = first[3].replace("the admin may do everything", "edited by a user");
    fs::write(&policy, &edited).unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let second = read();
    assert_eq!(second[3], edited);
    assert_eq!(second[..3], first[..3]);
    assert_eq!(second[4..], first[4..]);
    dev.run(&["pub", "x", "y", "--qos", "1"]).ok();
    dev.process.stop();
}

#[test]
fn a_port_that_is_taken_is_named_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_address = taken.local_addr().unwrap().to_string();
    let dir = text(folder.path());
    let args = [
        "dev",
        "--no-workers",
        "--dir",
        &dir,
        "--quic",
        "127.0.0.1:0",
    ];
    let mut args = args.to_vec();
    args.extend([
        "--mqtts",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--mqtt",
        &taken_address,
    ]);
    let said = run(selvedge(args)).failed();
    assert!(
        said.contains(&format!("cannot listen for MQTT on {taken_address}")),
        "{said}"
    );
    assert!(said.contains("hint: another port"), "{said}");
}

#[test]
fn another_configuration_can_be_given() {
    let folder = tempfile::tempdir().unwrap();
    let first = Dev::start(folder.path(), &["--no-workers"]);
    first.process.stop();
    let other = folder.path().join("other.toml");
    let config = fs::read_to_string(folder.path().join("broker.toml")).unwrap();
    fs::write(
        &other,
        config.replace("[limits]", "") + "\n[limits]\nmax_frame_bytes = 65536\n",
    )
    .unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers", "--config", &text(&other)]);
    let said = dev.run(&["pub", "x", &"y".repeat(70_000)]).failed();
    assert!(said.contains("over the broker's limit of"), "{said}");
    dev.process.stop();
}

#[test]
fn mosquitto_clients_get_in_by_every_door() {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let installed = || Command::new("mosquitto_pub").arg("--help").output().is_ok();
    if !FOUND.get_or_init(installed) {
        // An unmodified client of another make, where there is one; the suite has its own besides.
        return;
    }
    let folder: TempDir = tempfile::tempdir().unwrap();
    let dev = Dev::start(folder.path(), &["--no-workers"]);
    let pki = PathBuf::from(dev.value("pki"));
    let port = |name: &str| dev.value(name).rsplit_once(':').unwrap().1.to_owned();
    let (ca, admin) = (text(&pki.join("ca.pem")), pki.join("dev/local/admin"));
    let (cert, key) = (text(&admin.join("cert.pem")), text(&admin.join("key.pem")));
    let password = fs::read_to_string(folder.path().join("mqtt-password")).unwrap();
    let (mqtt, mqtts) = (port("mqtt"), port("mqtts"));
    let doors: [(&[&str], &str); 3] = [
        (&["-p", &mqtt], "dev/local/mqtt"),
        (
            &[
                "-p", &mqtts, "--cafile", &ca, "--cert", &cert, "--key", &key,
            ],
            "dev/local/admin",
        ),
        (
            &[
                "-p", &mqtts, "--cafile", &ca, "-u", "sensor", "-P", &password,
            ],
            "dev/local/sensor",
        ),
    ];
    for (door, identity) in doors {
        let topic = format!("demo/{identity}");
        let mosquitto = Command::new("mosquitto_pub")
            .args([
                "-h",
                "127.0.0.1",
                "-q",
                "1",
                "-r",
                "-t",
                &topic,
                "-m",
                "21.5",
            ])
            .args(door)
            .output()
            .unwrap();
        assert!(mosquitto.status.success(), "{identity}: {mosquitto:?}");
        let got = dev.run(&["sub", &topic, "--count", "1", "--timeout", "20s", "--json"]);
        let json = &got.json()[0];
        assert_eq!(json["payload"], "21.5");
        assert_eq!(
            json["publisher"],
            format!("spiffe://dev.example/{identity}")
        );
    }
    let wrong = Command::new("mosquitto_pub")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &mqtts,
            "--cafile",
            &ca,
            "-t",
            "x",
            "-m",
            "y",
        ])
        .args(["-u", "sensor", "-P", "wrong"])
        .output()
        .unwrap();
    assert!(!wrong.status.success(), "{wrong:?}");
    dev.process.stop();
}
