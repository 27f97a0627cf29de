//! The broker's configuration file, next to certificates and a policy that it may name.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use selvedge_broker::Config;
use selvedge_certs::{Authority, IssueRequest};
use tempfile::TempDir;

static FILES: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().expect("a temporary folder");
    let authority = Authority::create("example.test").expect("a good trust domain");
    let request = IssueRequest::server("acme", "site", "broker");
    let issued = authority.issue(&request).expect("a good request");
    for (name, text) in [
        ("ca.pem", authority.ca_pem()),
        ("broker.pem", &issued.cert_pem),
        ("broker.key", &issued.key_pem),
        ("policy.toml", ""),
    ] {
        fs::write(dir.path().join(name), text).expect("room in the temporary folder");
    }
    dir
});

fuzz_target!(|text: &str| {
    match Config::parse(text, FILES.path()) {
        Ok(config) => {
            let mqtt = config
                .mqtt
                .tls
                .or(config.mqtt.danger_plaintext.map(|(addr, _)| addr));
            assert!(config.quic.or(mqtt).is_some(), "no listener");
        }
        Err(errors) => {
            assert!(!errors.0.is_empty());
            drop(errors.to_string());
        }
    }
});
