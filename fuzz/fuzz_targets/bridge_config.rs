//! The bridge's configuration file, next to certificates and a password that it may name.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use selvedge_bridge::BridgeConfig;
use selvedge_certs::{Authority, IssueRequest};
use tempfile::TempDir;

static FILES: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().expect("a temporary folder");
    let authority = Authority::create("example.test").expect("a good trust domain");
    let request = IssueRequest::client("acme", "site", "bridge");
    let issued = authority.issue(&request).expect("a good request");
    for (name, text) in [
        ("ca.pem", authority.ca_pem()),
        ("bridge.pem", &issued.cert_pem),
        ("bridge.key", &issued.key_pem),
        ("password", "secret\n"),
    ] {
        fs::write(dir.path().join(name), text).expect("room in the temporary folder");
    }
    dir
});

fuzz_target!(|text: &str| {
    if let Err(error) = BridgeConfig::parse(text, FILES.path()) {
        drop(error.to_string());
    }
});
