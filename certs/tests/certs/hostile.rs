//! Bytes that a stranger sent: nothing here may panic, whatever they are.

use std::sync::OnceLock;
use std::time::SystemTime;

use proptest::prelude::*;
use rustls::pki_types::CertificateDer;
use selvedge_certs::{
    Authority, Credentials, IssueRequest, TrustAnchors, explain, peer_certificate_description,
    peer_identity,
};

/// A certificate with every extension we know, and its key, made once.
fn specimen() -> &'static (Vec<u8>, String) {
    static SPECIMEN: OnceLock<(Vec<u8>, String)> = OnceLock::new();
    SPECIMEN.get_or_init(|| {
        use rustls::pki_types::pem::PemObject;
        let authority = Authority::create("plant.example").unwrap();
        let request = IssueRequest::server("acme", "cloud", "broker-1")
            .dns("broker.example")
            .ip([127, 0, 0, 1]);
        let issued = authority.issue(&request).unwrap();
        let der = CertificateDer::from_pem_slice(issued.cert_pem.as_bytes()).unwrap();
        (der.to_vec(), issued.key_pem)
    })
}

/// Everything that reads a certificate of unknown origin.
fn read_in_every_way(der: &[u8]) -> Result<(), TestCaseError> {
    let certificates = [CertificateDer::from(der)];
    let _ = peer_identity(&certificates);
    let description = peer_certificate_description(&certificates);
    prop_assert!(!description.contains(char::is_control), "{description:?}");
    let pem = pem_of("CERTIFICATE", der);
    match explain(pem.as_bytes(), SystemTime::now()) {
        Ok(summaries) => {
            for summary in summaries {
                let text = summary.to_string();
                let hostile = |c: char| c.is_control() && c != '\n';
                prop_assert!(!text.contains(hostile), "{text:?}");
                prop_assert_eq!(text.lines().count(), 9);
            }
        }
        Err(error) => {
            let text = error.to_string();
            prop_assert!(!text.contains(char::is_control), "{text:?}");
        }
    }
    let _ = TrustAnchors::from_pem(pem.as_bytes());
    let _ = Credentials::from_pem(pem.as_bytes(), specimen().1.as_bytes());
    Ok(())
}

pub(crate) fn pem_of(kind: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {kind}-----\n");
    for chunk in der.chunks(3) {
        let word = chunk
            .iter()
            .fold(0_u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            if digit > chunk.len() {
                text.push('=');
            } else {
                let index = word >> (18 - 6 * digit) & 0x3f;
                text.push(char::from(DIGITS[index as usize]));
            }
        }
    }
    format!("{text}\n-----END {kind}-----\n")
}

#[test]
fn the_specimen_itself_reads_well() {
    let (der, key) = specimen();
    assert_eq!(
        peer_identity(&[CertificateDer::from(der.as_slice())])
            .unwrap()
            .name(),
        "broker-1"
    );
    assert!(Credentials::from_pem(pem_of("CERTIFICATE", der).as_bytes(), key.as_bytes()).is_ok());
    assert!(peer_identity(&[]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn random_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        read_in_every_way(&bytes)?;
        let _ = explain(&bytes, SystemTime::now());
        let _ = Credentials::from_pem(&bytes, &bytes);
    }

    #[test]
    fn mutated_certificates_do_not_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut der = specimen().0.clone();
        for (position, value) in edits {
            let position = position.index(der.len());
            der[position] = value;
        }
        if let Some(cut) = cut {
            der.truncate(cut.index(der.len()));
        }
        read_in_every_way(&der)?;
    }

    #[test]
    fn mutated_pem_does_not_panic_and_is_never_quoted(
        position in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let key = &specimen().1;
        let mut bytes = key.clone().into_bytes();
        let position = position.index(bytes.len());
        bytes[position] = value;
        let secret = key.lines().nth(1).unwrap();
        let cert = pem_of("CERTIFICATE", &specimen().0);
        for (cert, key) in [(cert.as_bytes(), bytes.as_slice()), (bytes.as_slice(), bytes.as_slice())] {
            if let Err(error) = Credentials::from_pem(cert, key) {
                let shown = format!("{error} {error:?}");
                for window in secret.as_bytes().windows(16) {
                    let window = std::str::from_utf8(window).unwrap();
                    prop_assert!(!shown.contains(window), "{shown}");
                }
            }
        }
    }
}
