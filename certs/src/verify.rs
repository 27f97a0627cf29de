//! Who may connect: chain, purpose and SPIFFE identity; each refusal names certificate and reason.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
};
use x509_parser::certificate::X509Certificate;

use crate::certificate::{self, date, printable};
use crate::credentials::{Anchors, TrustAnchors};
use crate::identity::{Identity, IdentityError, TrustDomain};
use crate::inspect;
use crate::tls::{ServerIdentity, provider};

/// How rustls 0.23 prints a refusal of a custom verifier, around the verifier's own text. QUIC
/// sends this print to the peer; a test holds it to what rustls does.
const WRAPPED: (&str, &str) = ("invalid peer certificate: Other(OtherError(", "))");

/// The identity a peer proved with its certificate chain, leaf first.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Result<Identity, IdentityError> {
    let leaf = certs.first().ok_or(IdentityError::NoCertificate)?;
    certificate::identity(&certificate::parse(leaf)?)
}

/// The identity the peer of an established QUIC connection proved.
pub fn peer_identity_of_quinn(connection: &quinn::Connection) -> Result<Identity, IdentityError> {
    peer_identity(&peer_certificates(connection)?)
}

/// Identity, serial and end of validity of a peer's leaf certificate in one line, for logs.
pub fn peer_certificate_description(certs: &[CertificateDer<'_>]) -> String {
    let Some(leaf) = certs.first() else {
        return "no certificate".into();
    };
    match certificate::parse(leaf) {
        Ok(parsed) => {
            let until = date(certificate::system_time(parsed.validity().not_after));
            let title = certificate::title(&parsed);
            let title = title.strip_suffix(')').unwrap_or(&title);
            format!("{title}, valid until {until})")
        }
        Err(_) => "a certificate that cannot be read".into(),
    }
}

/// The chain that the peer of an established QUIC connection presented, leaf first.
pub fn peer_certificates(
    connection: &quinn::Connection,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .map(|certificates| *certificates)
        .ok_or(IdentityError::NoCertificate)
}

/// A certificate was refused. Displays as one sentence that names it, the reason and a remedy.
///
/// `Debug` prints the same sentence: rustls shows errors of verifiers by their `Debug`, and over
/// QUIC that text is what the refused peer gets to read.
#[derive(Clone, PartialEq, Eq)]
pub struct CertificateRefused {
    certificate: String,
    reason: RefusalReason,
}

impl CertificateRefused {
    /// The refused certificate in a few words: identity (or subject) and serial.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Why it was refused.
    pub fn reason(&self) -> &RefusalReason {
        &self.reason
    }
}

impl fmt::Display for CertificateRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "certificate {} refused: {}",
            self.certificate, self.reason
        )
    }
}

impl fmt::Debug for CertificateRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl StdError for CertificateRefused {}

/// Why a certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    /// Its validity is over.
    #[error("expired on {}; issue a new one", date(*.not_after))]
    Expired {
        /// The end of its validity.
        not_after: SystemTime,
    },
    /// Its validity has not begun.
    #[error("not valid before {}; check the clocks of both machines", date(*.not_before))]
    NotYetValid {
        /// The start of its validity.
        not_before: SystemTime,
    },
    /// A certificate between it and the authority is not valid now.
    #[error(
        "an intermediate certificate of its chain has expired or is not yet valid; renew the chain"
    )]
    ChainNotValidNow,
    /// No trust anchor vouches for it.
    #[error(
        "signed by an authority that is not trusted here (issuer {issuer}); issue one from a trusted authority or add that authority to the trust anchors"
    )]
    UntrustedAuthority {
        /// The issuer it names.
        issuer: String,
    },
    /// Its extended key usage does not allow this use.
    #[error("not issued for {required} (its purposes: {allowed}); issue one for that purpose")]
    WrongPurpose {
        /// What it was presented for.
        required: &'static str,
        /// What it may be used for.
        allowed: String,
    },
    /// It has no usable SPIFFE identity.
    #[error("has no SPIFFE identity: {0}; issue one that has it")]
    NoIdentity(IdentityError),
    /// It belongs to another organisation.
    #[error("belongs to trust domain {found}, expected {expected}; issue one in that trust domain")]
    OtherTrustDomain {
        /// The trust domain served here.
        expected: TrustDomain,
        /// The one in the certificate.
        found: String,
    },
    /// It is not a certificate for the host that was dialled.
    #[error(
        "does not name the host {expected} (it names: {presented}); connect to a host it names or issue one that names this host"
    )]
    WrongHost {
        /// The host name or address that was dialled.
        expected: String,
        /// The hosts it is valid for.
        presented: String,
    },
    /// It was withdrawn by its authority.
    #[error("was revoked by its authority; issue a new one")]
    Revoked,
    /// A certificate between it and the authority was withdrawn.
    #[error(
        "an intermediate certificate of its chain was revoked by its authority; issue a new one under another"
    )]
    ChainRevoked,
    /// It cannot be decoded.
    #[error("cannot be read as X.509; issue a new one")]
    Malformed,
    /// Any other verdict of the TLS library.
    #[error("failed verification ({0})")]
    Other(String),
}

/// The refusal inside a TLS error, if it is one of this crate's verifiers.
pub fn refusal_of_tls(error: &rustls::Error) -> Option<&CertificateRefused> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => other.0.downcast_ref(),
        _ => None,
    }
}

/// The refusal inside an I/O error, as TLS streams over TCP report it.
pub fn refusal_of_io(error: &io::Error) -> Option<&CertificateRefused> {
    refusal_of_tls(error.get_ref()?.downcast_ref()?)
}

/// Whether a QUIC handshake ended because this end found a certificate of the peer revoked.
pub fn was_revoked(error: &quinn::ConnectionError) -> bool {
    // All that quinn keeps of a verifier's error is its text.
    let quinn::ConnectionError::TransportError(ours) = error else {
        return false;
    };
    unwrap(&ours.reason).is_some_and(|sentence| {
        [RefusalReason::Revoked, RefusalReason::ChainRevoked]
            .iter()
            .any(|reason| sentence.ends_with(&reason.to_string()))
    })
}

/// Judges a client's chain, leaf first, as a handshake at `now` would.
pub(crate) fn check_client(
    anchors: &Anchors,
    chain: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<(), CertificateRefused> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(unreadable());
    };
    let now = now.duration_since(SystemTime::UNIX_EPOCH);
    let now = UnixTime::since_unix_epoch(now.unwrap_or_default());
    let parsed = certificate::parse(leaf).map_err(|_| unreadable())?;
    let verdict = anchors.clients.verify_client_cert(leaf, intermediates, now);
    verdict.map_err(|error| CertificateRefused {
        certificate: certificate::title(&parsed),
        reason: reason_of(&parsed, error, "client authentication", now),
    })?;
    check_revoked(anchors, chain)
}

/// Looks for certificates that were withdrawn in a chain, leaf first.
///
/// Every certificate presented counts, whether or not the path to an authority leads over it.
pub(crate) fn check_revoked(
    anchors: &Anchors,
    chain: &[CertificateDer<'_>],
) -> Result<(), CertificateRefused> {
    if anchors.revocations.is_empty() {
        return Ok(());
    }
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(unreadable());
    };
    let leaf = certificate::parse(leaf).map_err(|_| unreadable())?;
    let refused = |reason| CertificateRefused {
        certificate: certificate::title(&leaf),
        reason,
    };
    if anchors.revocations.withdraw(&leaf) {
        return Err(refused(RefusalReason::Revoked));
    }
    for intermediate in intermediates {
        match certificate::parse(intermediate) {
            Ok(parsed) if anchors.revocations.withdraw(&parsed) => {
                return Err(refused(RefusalReason::ChainRevoked));
            }
            Ok(_) => {}
            // What cannot be read cannot be looked up, and may be what was withdrawn.
            Err(_) => return Err(refused(RefusalReason::Malformed)),
        }
    }
    Ok(())
}

/// Why a QUIC connection ended, for people at either end of it.
///
/// A refused certificate becomes the one sentence that [`CertificateRefused`] displays, with
/// "the peer refused us: " before it when the peer wrote it.
pub fn explain_connection_error(error: &quinn::ConnectionError) -> String {
    match error {
        quinn::ConnectionError::TransportError(ours) => {
            unwrap(&ours.reason).unwrap_or_else(|| error.to_string())
        }
        quinn::ConnectionError::ConnectionClosed(theirs) => {
            match unwrap(&String::from_utf8_lossy(&theirs.reason)) {
                Some(sentence) => format!("the peer refused us: {sentence}"),
                None => printable(&error.to_string()),
            }
        }
        other => other.to_string(),
    }
}

/// The verifier's sentence without rustls's wrapping. The end may be cut off by the packet size.
fn unwrap(text: &str) -> Option<String> {
    let inner = text.strip_prefix(WRAPPED.0)?;
    let inner = inner.strip_suffix(WRAPPED.1).unwrap_or(inner);
    // The longest sentence holds a handful of texts, each bounded by `printable`.
    Some(
        inner
            .chars()
            .filter(|c| !c.is_control())
            .take(2048)
            .collect(),
    )
}

/// Checks the certificates of clients.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    anchors: TrustAnchors,
    trust_domain: Option<TrustDomain>,
    mandatory: bool,
}

impl ClientVerifier {
    /// A client must present a certificate.
    pub(crate) fn required(anchors: &TrustAnchors, trust_domain: Option<TrustDomain>) -> Self {
        Self {
            anchors: anchors.clone(),
            trust_domain,
            mandatory: true,
        }
    }

    /// A client may stay anonymous.
    pub(crate) fn optional(anchors: &TrustAnchors, trust_domain: Option<TrustDomain>) -> Self {
        Self {
            mandatory: false,
            ..Self::required(anchors, trust_domain)
        }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would be fixed while the anchors can be replaced, and would tell whoever asks
        // which authorities are trusted here. A client has one certificate to send anyway.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        // Once, so that authorities and revocations are of one moment.
        let anchors = self.anchors.current();
        let verdict = anchors
            .clients
            .verify_client_cert(end_entity, intermediates, now);
        let leaf = read_leaf(end_entity)?;
        let verified = verdict.map_err(|error| {
            refuse(&leaf, reason_of(&leaf, error, "client authentication", now))
        })?;
        check_revoked(&anchors, &chain(end_entity, intermediates)).map_err(refusal)?;
        let identity = certificate::identity(&leaf)
            .map_err(|error| refuse(&leaf, RefusalReason::NoIdentity(error)))?;
        match &self.trust_domain {
            Some(expected) if expected.as_str() != identity.trust_domain() => Err(refuse(
                &leaf,
                RefusalReason::OtherTrustDomain {
                    expected: expected.clone(),
                    found: identity.trust_domain().into(),
                },
            )),
            _ => Ok(verified),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Checks the certificates of servers.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    anchors: TrustAnchors,
    identity: ServerIdentity,
}

impl ServerVerifier {
    pub(crate) fn new(anchors: &TrustAnchors, identity: ServerIdentity) -> Self {
        Self {
            anchors: anchors.clone(),
            identity,
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let anchors = self.anchors.current();
        let verdict = anchors.servers.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        let leaf = read_leaf(end_entity)?;
        let verified = verdict.map_err(|error| {
            refuse(&leaf, reason_of(&leaf, error, "server authentication", now))
        })?;
        check_revoked(&anchors, &chain(end_entity, intermediates)).map_err(refusal)?;
        if self.identity == ServerIdentity::Spiffe {
            certificate::identity(&leaf)
                .map_err(|error| refuse(&leaf, RefusalReason::NoIdentity(error)))?;
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn read_leaf<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, rustls::Error> {
    certificate::parse(der).map_err(|_| refusal(unreadable()))
}

fn unreadable() -> CertificateRefused {
    CertificateRefused {
        certificate: "of the peer".into(),
        reason: RefusalReason::Malformed,
    }
}

/// What a peer presented as one list. Borrows the bytes.
fn chain<'a>(
    leaf: &'a CertificateDer<'_>,
    intermediates: &'a [CertificateDer<'_>],
) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf)
        .chain(intermediates)
        .map(|der| CertificateDer::from(der.as_ref()))
        .collect()
}

fn refuse(leaf: &X509Certificate<'_>, reason: RefusalReason) -> rustls::Error {
    refusal(CertificateRefused {
        certificate: certificate::title(leaf),
        reason,
    })
}

/// The form in which a sentence survives: rustls has no certificate error with a text of its own
/// but this one. It sends the alert certificate_unknown, which blames the certificate, where
/// `rustls::Error::General` would send the mute handshake_failure.
fn refusal(refused: CertificateRefused) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refused))))
}

fn reason_of(
    leaf: &X509Certificate<'_>,
    error: rustls::Error,
    required: &'static str,
    now: UnixTime,
) -> RefusalReason {
    let error = match error {
        rustls::Error::InvalidCertificate(error) => error,
        other => return RefusalReason::Other(other.to_string()),
    };
    let now = SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(now.as_secs()))
        .unwrap_or(SystemTime::UNIX_EPOCH);
    match error {
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            let not_after = certificate::system_time(leaf.validity().not_after);
            let not_before = certificate::system_time(leaf.validity().not_before);
            if now > not_after {
                RefusalReason::Expired { not_after }
            } else if now < not_before {
                RefusalReason::NotYetValid { not_before }
            } else {
                RefusalReason::ChainNotValidNow
            }
        }
        // A bad signature means that an anchor has the issuer's name, but not its key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            RefusalReason::UntrustedAuthority {
                issuer: certificate::subject(leaf.issuer()),
            }
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            RefusalReason::WrongPurpose {
                required,
                allowed: inspect::purposes(leaf).join(", "),
            }
        }
        CertificateError::NotValidForNameContext { expected, .. } => {
            let (mut presented, addresses) = inspect::hosts(leaf);
            presented.extend(addresses.iter().map(ToString::to_string));
            RefusalReason::WrongHost {
                expected: printable(&expected.to_str()),
                presented: if presented.is_empty() {
                    "none".into()
                } else {
                    printable(&presented.join(", "))
                },
            }
        }
        CertificateError::Revoked => RefusalReason::Revoked,
        CertificateError::BadEncoding => RefusalReason::Malformed,
        CertificateError::Other(other) => RefusalReason::Other(printable(&other.to_string())),
        other => RefusalReason::Other(printable(&other.to_string())),
    }
}
