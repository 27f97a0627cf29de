//! Certificate revocation lists: read, held to the authority that signed them, and asked.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::pem::SectionKind;
use rustls::pki_types::{AlgorithmIdentifier, CertificateDer, CertificateRevocationListDer};
use rustls::server::WebPkiClientVerifier;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::{CertificateRevocationList, RevokedCertificate};
use x509_parser::x509::AlgorithmIdentifier as Algorithm;

use crate::certificate::{self, date, hex, printable};
use crate::credentials::{LoadError, Origin, describe, sections};
use crate::tls::provider;

/// RFC 5280 allows serial numbers of 20 bytes; one more is the zero byte of a positive number.
const MAX_SERIAL: usize = 21;

/// The serial number of a certificate, unique within its authority.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial(Box<[u8]>);

impl Serial {
    /// A serial number as it is encoded; leading zero bytes do not count.
    pub(crate) fn from_raw(raw: &[u8]) -> Self {
        Self(significant(raw).into())
    }

    /// The bytes of the number, the most significant first.
    #[cfg(feature = "authority")]
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// A text is no serial number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a serial number of 1 to 20 bytes in hex, such as 4f1a2b or 4f:1a:2b, found `{0}`"
)]
pub struct SerialError(String);

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        let error = || SerialError(printable(text));
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        if digits.is_empty() || digits.len() > 2 * MAX_SERIAL || !digits.is_ascii() {
            return Err(error());
        }
        // People leave out a leading zero.
        let digits = format!("{}{digits}", if digits.len() % 2 == 1 { "0" } else { "" });
        let bytes: Option<Vec<u8>> = (0..digits.len())
            .step_by(2)
            .map(|at| {
                let pair = &digits[at..at + 2];
                // A sign is no digit, though the standard library takes one.
                let hex = pair.bytes().all(|byte| byte.is_ascii_hexdigit());
                hex.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
            })
            .collect();
        Ok(Self::from_raw(&bytes.ok_or_else(error)?))
    }
}

fn significant(raw: &[u8]) -> &[u8] {
    let zeros = raw.iter().take_while(|byte| **byte == 0).count();
    &raw[zeros.min(raw.len().saturating_sub(1))..]
}

/// What there is to know about one revocation list. Displays as a few aligned lines.
///
/// Reading one does not say that its signature is good: [`crate::TrustAnchors`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationList {
    /// The subject of the authority it names.
    pub issuer: String,
    /// Its number, which rises with each list of the authority.
    pub number: Option<String>,
    /// When it was made.
    pub this_update: SystemTime,
    /// When there should be a newer one.
    pub next_update: Option<SystemTime>,
    /// What it withdraws.
    pub revoked: Vec<Revoked>,
}

/// A certificate that was withdrawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revoked {
    /// Its serial number.
    pub serial: Serial,
    /// Since when.
    pub since: SystemTime,
}

impl RevocationList {
    /// Every revocation list of a PEM text; none is an error.
    ///
    /// # Errors
    /// The text is not PEM, or a list in it cannot be read.
    pub fn all_from_pem(pem: &[u8]) -> Result<Vec<Self>, LoadError> {
        let origin = Origin("revocation list".into());
        lists(&origin, pem)?
            .iter()
            .map(|der| Ok(Self::of(&parse(&origin, der)?)))
            .collect()
    }

    /// Whether there should be a newer one by `now`.
    pub fn is_overdue(&self, now: SystemTime) -> bool {
        self.next_update.is_some_and(|next| next < now)
    }

    pub(crate) fn of(list: &CertificateRevocationList<'_>) -> Self {
        Self {
            issuer: certificate::subject(list.issuer()),
            number: list.crl_number().map(ToString::to_string),
            this_update: certificate::system_time(list.last_update()),
            next_update: list.next_update().map(certificate::system_time),
            revoked: list
                .iter_revoked_certificates()
                .map(|entry| Revoked {
                    serial: Serial::from_raw(entry.raw_serial()),
                    since: certificate::system_time(entry.revocation_date),
                })
                .collect(),
        }
    }
}

impl fmt::Display for RevocationList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "revocation list")?;
        writeln!(f, "issuer       {}", self.issuer)?;
        let number = self.number.as_deref().unwrap_or("none");
        writeln!(f, "number       {number}")?;
        writeln!(f, "made         {}", date(self.this_update))?;
        match self.next_update {
            Some(next) => writeln!(f, "next update  {}", date(next))?,
            None => writeln!(f, "next update  not said")?,
        }
        write!(f, "revoked      {}", self.revoked.len())?;
        for Revoked { serial, since } in &self.revoked {
            write!(f, "\n  serial {serial} since {}", date(*since))?;
        }
        Ok(())
    }
}

/// What trusted authorities have withdrawn: serial numbers by the encoded name of the authority. And
/// when the first of their lists should be renewed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Revocations {
    withdrawn: HashMap<Vec<u8>, HashSet<Serial>>,
    next_update: Option<SystemTime>,
}

impl Revocations {
    /// Reads every list of a PEM text; each must be signed by one of the `authorities`.
    ///
    /// One that is overdue is taken with a warning in the log: to refuse it would let everybody in
    /// or nobody, and what it withdraws is withdrawn for good.
    pub(crate) fn read(
        origin: &Origin,
        pem: &[u8],
        authorities: &[CertificateDer<'_>],
        roots: &RootCertStore,
        now: SystemTime,
    ) -> Result<Self, LoadError> {
        let lists = lists(origin, pem)?;
        if lists.is_empty() {
            return Err(LoadError::NoRevocationList {
                origin: origin.0.clone(),
                found: describe(&sections(origin, pem)?, pem),
            });
        }
        let mut revocations = Self::default();
        for der in &lists {
            let list = parse(origin, der)?;
            strictly(origin, der, roots)?;
            check_signer(origin, &list, authorities)?;
            let summary = RevocationList::of(&list);
            if summary.is_overdue(now) {
                tracing::warn!(
                    issuer = %summary.issuer,
                    next_update = %summary.next_update.map(date).unwrap_or_default(),
                    "the revocation list in {} is past its next update; it stays in force, make a new one",
                    origin.0
                );
            }
            revocations.next_update = match (revocations.next_update, summary.next_update) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
            let withdrawn = summary.revoked.into_iter().map(|revoked| revoked.serial);
            revocations
                .withdrawn
                .entry(list.issuer().as_raw().to_vec())
                .or_default()
                .extend(withdrawn);
        }
        Ok(revocations)
    }

    /// How many certificates are withdrawn.
    pub(crate) fn len(&self) -> usize {
        self.withdrawn.values().map(HashSet::len).sum()
    }

    /// When the first of the lists should be renewed.
    pub(crate) fn next_update(&self) -> Option<SystemTime> {
        self.next_update
    }

    /// Whether nothing is withdrawn.
    pub(crate) fn is_empty(&self) -> bool {
        self.withdrawn.values().all(HashSet::is_empty)
    }

    /// Whether the authority that issued a certificate has withdrawn it.
    ///
    /// The authority is known by its name alone. Two of one name and with one serial number would
    /// be taken for each other, which can only refuse a certificate too many.
    pub(crate) fn withdraw(&self, certificate: &X509Certificate<'_>) -> bool {
        self.withdrawn
            .get(certificate.issuer().as_raw())
            .is_some_and(|serials| serials.contains(&Serial::from_raw(certificate.raw_serial())))
    }
}

/// Parses one list; trailing bytes are an error.
pub(crate) fn parse<'a>(
    origin: &Origin,
    der: &'a [u8],
) -> Result<CertificateRevocationList<'a>, LoadError> {
    match CertificateRevocationList::from_der(der) {
        // X.690, 8.3.1: a number has one byte at least. The parser takes none.
        Ok(([], list)) if list.iter_revoked_certificates().any(is_nameless) => Err(unusable(
            origin,
            "an entry has a serial number of no bytes; expected 1 to 20, make the list again"
                .into(),
        )),
        Ok(([], list)) => Ok(list),
        Ok((rest, _)) => Err(unusable(
            origin,
            format!("{} bytes after its end", rest.len()),
        )),
        Err(error) => Err(unusable(origin, printable(&error.to_string()))),
    }
}

/// Whether no certificate can be meant.
fn is_nameless(entry: &RevokedCertificate<'_>) -> bool {
    entry.raw_serial().is_empty()
}

/// The encoded lists of a PEM text.
pub(crate) fn lists(origin: &Origin, pem: &[u8]) -> Result<Vec<Vec<u8>>, LoadError> {
    Ok(sections(origin, pem)?
        .into_iter()
        .filter(|(kind, _)| *kind == SectionKind::Crl)
        .map(|(_, der)| der)
        .collect())
}

/// Whether a certificate's key made a signature.
pub(crate) fn is_signed_by(
    signer: &X509Certificate<'_>,
    algorithm: &Algorithm<'_>,
    message: &[u8],
    signature: &[u8],
) -> bool {
    let key = signer.public_key();
    let provider = provider();
    provider
        .signature_verification_algorithms
        .all
        .iter()
        .filter(|known| {
            names(known.public_key_alg_id(), &key.algorithm.algorithm)
                && names(known.signature_alg_id(), &algorithm.algorithm)
        })
        // Those left differ in curve or hash alone, which a signature made with another fails.
        .any(|known| {
            known
                .verify_signature(&key.subject_public_key.data, message, signature)
                .is_ok()
        })
}

/// Whether an encoded algorithm begins with this object identifier.
fn names(encoded: AlgorithmIdentifier, oid: &Oid<'_>) -> bool {
    const OBJECT_IDENTIFIER: u8 = 6;
    let oid = oid.as_bytes();
    match encoded.as_ref() {
        [OBJECT_IDENTIFIER, length, rest @ ..] => {
            usize::from(*length) == oid.len() && rest.starts_with(oid)
        }
        _ => false,
    }
}

/// The TLS library's own reader, which refuses what this module would have to understand to be
/// right: lists that are partial, and critical extensions it does not know.
fn strictly(origin: &Origin, der: &[u8], roots: &RootCertStore) -> Result<(), LoadError> {
    let list = CertificateRevocationListDer::from(der.to_vec());
    WebPkiClientVerifier::builder_with_provider(roots.clone().into(), provider())
        .with_crls([list])
        .build()
        .map(drop)
        .map_err(|error| unusable(origin, error.to_string()))
}

fn check_signer(
    origin: &Origin,
    list: &CertificateRevocationList<'_>,
    authorities: &[CertificateDer<'_>],
) -> Result<(), LoadError> {
    let signed = authorities
        .iter()
        .filter_map(|der| certificate::parse(der).ok())
        .filter(|authority| authority.subject().as_raw() == list.issuer().as_raw())
        .find(|authority| {
            is_signed_by(
                authority,
                &list.signature_algorithm,
                list.tbs_cert_list.as_ref(),
                &list.signature_value.data,
            )
        });
    let issuer = certificate::subject(list.issuer());
    match signed.as_ref().map(|authority| authority.key_usage()) {
        None => Err(unusable(
            origin,
            format!(
                "it is signed by nobody who is trusted here (issuer {issuer}); expected a list of one of the trust anchors"
            ),
        )),
        Some(Ok(Some(usage))) if !usage.value.crl_sign() => Err(unusable(
            origin,
            format!("its issuer {issuer} may not sign revocation lists"),
        )),
        Some(Err(error)) => Err(unusable(origin, printable(&error.to_string()))),
        Some(Ok(_)) => Ok(()),
    }
}

fn unusable(origin: &Origin, reason: String) -> LoadError {
    LoadError::UnusableRevocationList {
        origin: origin.0.clone(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_serial_number_is_refused() {
        let long = "1".repeat(43);
        for text in ["", ":", "x", "+1", "1 2", "é1", &long] {
            let error = text.parse::<Serial>().unwrap_err();
            assert_eq!(error, SerialError(printable(text)));
        }
    }

    #[test]
    fn a_list_that_withdraws_a_number_of_no_bytes_is_refused() {
        // Found by the fuzzer: a list of two, where the first number has lost its only byte.
        let der = include_bytes!("../../fuzz/seeds/revocation_list/nameless.der");
        let error = parse(&Origin("site.crl".into()), der).unwrap_err();
        assert_eq!(
            error.to_string(),
            "site.crl cannot be used as revocation list: an entry has a serial number of no bytes; expected 1 to 20, make the list again"
        );
    }

    proptest! {
        #[test]
        fn a_serial_number_is_read_as_it_is_shown(raw in prop::collection::vec(any::<u8>(), 1..20)) {
            let serial = Serial::from_raw(&raw);
            prop_assert_eq!(serial.to_string().parse::<Serial>().unwrap(), serial.clone());
            let zeros = [&[0, 0][..], &raw].concat();
            prop_assert_eq!(Serial::from_raw(&zeros), serial.clone());
            let colons: Vec<String> = raw.iter().map(|byte| format!("{byte:02X}")).collect();
            prop_assert_eq!(colons.join(":").parse::<Serial>().unwrap(), serial);
        }

        #[test]
        fn text_of_any_kind_is_read_without_a_panic(text in ".{0,60}") {
            let _ = text.parse::<Serial>();
        }
    }
}
