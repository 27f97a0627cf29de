//! PEM files of certificates, keys, authorities and revocation lists.
#![no_main]

use std::sync::LazyLock;
use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use selvedge_certs::{
    Authority, Credentials, IssueRequest, IssuedCertificate, TrustAnchors, explain,
};

static GOOD: LazyLock<IssuedCertificate> = LazyLock::new(|| {
    let authority = Authority::create("example.test").expect("a good trust domain");
    let request = IssueRequest::client("acme", "site", "device");
    authority.issue(&request).expect("a good request")
});

fuzz_target!(|data: &[u8]| {
    let Some((&selector, pem)) = data.split_first() else {
        return;
    };
    match selector % 4 {
        0 => drop(Credentials::from_pem(pem, GOOD.key_pem.as_bytes()).map_err(|e| e.to_string())),
        1 => drop(Credentials::from_pem(GOOD.cert_pem.as_bytes(), pem).map_err(|e| e.to_string())),
        2 => drop(TrustAnchors::from_pem(pem).map_err(|e| e.to_string())),
        _ => drop(explain(pem, SystemTime::UNIX_EPOCH).map_err(|e| e.to_string())),
    }
});
