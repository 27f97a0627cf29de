//! A certificate a peer presents: read for its identity, described for logs, explained to people.
#![no_main]

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use selvedge_certs::{explain, peer_certificate_description, peer_identity};

fuzz_target!(|der: &[u8]| {
    let chain = [CertificateDer::from(der)];
    let identity = peer_identity(&chain);
    printable(&peer_certificate_description(&chain));

    let body = BASE64_STANDARD.encode(der);
    let pem = format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let Ok(summaries) = explain(pem.as_bytes(), now) else {
        return;
    };
    let [summary] = summaries.as_slice() else {
        panic!("one certificate in, {} out", summaries.len());
    };
    assert_eq!(summary.identity, identity);
    for line in summary.to_string().lines() {
        printable(line);
    }
});

/// Text of a stranger's certificate goes to logs and terminals, so no control character may be left.
fn printable(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
