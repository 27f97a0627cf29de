//! A revocation list, in DER: read and explained, and held to the authority it says it is of.
#![no_main]

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use libfuzzer_sys::fuzz_target;
use selvedge_certs::{Authority, RevocationList, Serial, TrustAnchors};

/// Of the name that the lists among the seeds have, and of another key.
static TRUSTED: LazyLock<TrustAnchors> = LazyLock::new(|| {
    let authority = Authority::create("example.test").expect("a good trust domain");
    TrustAnchors::from_pem(authority.ca_pem().as_bytes()).expect("our own certificate")
});

fuzz_target!(|der: &[u8]| {
    let body = BASE64_STANDARD.encode(der);
    let pem = format!("-----BEGIN X509 CRL-----\n{body}\n-----END X509 CRL-----\n");
    let forged = TRUSTED.with_revocations_of_pem(pem.as_bytes());
    printable(
        &forged
            .expect_err("nobody can sign for the authority")
            .to_string(),
    );

    let Ok(lists) = RevocationList::all_from_pem(pem.as_bytes()) else {
        return;
    };
    let [list] = lists.as_slice() else {
        panic!("one list in, {} out", lists.len());
    };
    list.is_overdue(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    for revoked in &list.revoked {
        let shown = revoked.serial.to_string();
        // Those longer than any standard allows are shown, too, but nobody can type them.
        if shown.len() <= 40 {
            assert_eq!(shown.parse::<Serial>().as_ref(), Ok(&revoked.serial));
        }
    }
    for line in list.to_string().lines() {
        printable(line);
    }
});

/// Text of a stranger's list goes to logs and terminals, so no control character may be left.
fn printable(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
