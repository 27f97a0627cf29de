//! What a peer holds and whom it trusts: certificate chain with private key, and trust anchors.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{InconsistentKeys, SignatureScheme};

use crate::certificate;
use crate::identity::{Identity, IdentityError};
use crate::revocation::Revocations;
use crate::tls::provider;
use crate::verify::{self, CertificateRefused};

/// A certificate chain, its private key and the identity it proves. Cheap to clone.
///
/// The private key is never shown: not by `Debug`, not in any message.
#[derive(Clone)]
pub struct Credentials {
    key: Arc<CertifiedKey>,
    identity: Identity,
    serial: String,
    not_after: SystemTime,
}

impl Credentials {
    /// Reads a chain (leaf first) and its private key from two PEM files.
    ///
    /// A key file that group or others can read is accepted with a warning in the log.
    pub fn from_files(cert: &Path, key: &Path) -> Result<Self, LoadError> {
        let cert_pem = read(cert)?;
        let key_pem = read(key)?;
        warn_if_readable_by_others(key);
        Self::read(&Origin::file(cert), &cert_pem, &Origin::file(key), &key_pem)
    }

    /// Reads a chain (leaf first) and its private key from PEM in memory.
    pub fn from_pem(cert: &[u8], key: &[u8]) -> Result<Self, LoadError> {
        Self::read(
            &Origin("certificate".into()),
            cert,
            &Origin("private key".into()),
            key,
        )
    }

    /// The identity in the certificate.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// When the certificate expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Identity, serial and end of validity in one line, for logs.
    pub fn description(&self) -> String {
        format!(
            "{} (serial {}, valid until {})",
            self.identity,
            self.serial,
            certificate::date(self.not_after)
        )
    }

    fn read(
        cert_origin: &Origin,
        cert_pem: &[u8],
        key_origin: &Origin,
        key_pem: &[u8],
    ) -> Result<Self, LoadError> {
        let chain = certificates(cert_origin, cert_pem)?;
        let key = private_key(key_origin, key_pem)?;
        let leaf = chain.first().ok_or_else(|| LoadError::NoCertificate {
            origin: cert_origin.0.clone(),
            found: "nothing".into(),
        })?;
        let in_leaf = |source| LoadError::Identity {
            origin: cert_origin.0.clone(),
            source,
        };
        let parsed = certificate::parse(leaf).map_err(in_leaf)?;
        let identity = certificate::identity(&parsed).map_err(in_leaf)?;
        let serial = certificate::serial(&parsed);
        let not_after = certificate::system_time(parsed.validity().not_after);
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                LoadError::KeyMismatch {
                    cert: cert_origin.0.clone(),
                    key: key_origin.0.clone(),
                }
            }
            other => LoadError::UnsupportedKey {
                origin: key_origin.0.clone(),
                reason: other.to_string(),
            },
        })?;
        Ok(Self {
            key: Arc::new(key),
            identity,
            serial,
            not_after,
        })
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.description())
    }
}

/// Credentials that can be replaced while connections are served. Clones share the slot.
///
/// A configuration made from this handle presents the new certificate from the next handshake on;
/// connections already open are not touched.
#[derive(Clone)]
pub struct ReloadableCredentials(Arc<RwLock<Credentials>>);

impl ReloadableCredentials {
    /// A slot that holds these credentials for now.
    pub fn new(credentials: Credentials) -> Self {
        Self(Arc::new(RwLock::new(credentials)))
    }

    /// Presents `credentials` from the next handshake on.
    pub fn replace(&self, credentials: Credentials) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = credentials;
    }

    /// The credentials presented now.
    pub fn current(&self) -> Credentials {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl From<Credentials> for ReloadableCredentials {
    fn from(credentials: Credentials) -> Self {
        Self::new(credentials)
    }
}

impl From<&Credentials> for ReloadableCredentials {
    fn from(credentials: &Credentials) -> Self {
        Self::new(credentials.clone())
    }
}

impl From<&ReloadableCredentials> for ReloadableCredentials {
    fn from(credentials: &ReloadableCredentials) -> Self {
        credentials.clone()
    }
}

impl fmt::Debug for ReloadableCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reloadable{:?}", self.current())
    }
}

impl ResolvesServerCert for ReloadableCredentials {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().key)
    }
}

impl ResolvesClientCert for ReloadableCredentials {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().key)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The authorities whose certificates are accepted, and what they have withdrawn. Clones share one
/// replaceable list.
#[derive(Clone)]
pub struct TrustAnchors(Arc<RwLock<Arc<Anchors>>>);

impl TrustAnchors {
    /// Reads every certificate of a PEM file.
    pub fn from_file(path: &Path) -> Result<Self, LoadError> {
        Self::read(&Origin::file(path), &read(path)?)
    }

    /// Reads every certificate of a PEM text.
    pub fn from_pem(pem: &[u8]) -> Result<Self, LoadError> {
        Self::read(&Origin("trust anchors".into()), pem)
    }

    /// The same authorities without what the revocation lists of a PEM file withdraw. What was
    /// withdrawn by other lists before is no longer.
    ///
    /// An authority without a list withdraws nothing. A list past its next update is taken with a
    /// warning in the log. The result shares nothing with `self`.
    ///
    /// # Errors
    /// There is no list, one is damaged, or one is signed by none of these authorities.
    pub fn with_revocations_of_file(&self, path: &Path) -> Result<Self, LoadError> {
        self.with_revocations(&Origin::file(path), &read(path)?)
    }

    /// As [`Self::with_revocations_of_file`], from a PEM text.
    ///
    /// # Errors
    /// As [`Self::with_revocations_of_file`].
    pub fn with_revocations_of_pem(&self, pem: &[u8]) -> Result<Self, LoadError> {
        self.with_revocations(&Origin("revocation list".into()), pem)
    }

    /// How many certificates are withdrawn.
    pub fn revoked(&self) -> usize {
        self.current().revocations.len()
    }

    /// When the first of the revocation lists should be renewed.
    pub fn next_update(&self) -> Option<SystemTime> {
        self.current().revocations.next_update()
    }

    /// Whether every authority that `other` trusts now is trusted here, too.
    pub fn includes(&self, other: &TrustAnchors) -> bool {
        let here = self.current();
        let there = other.current();
        there
            .certificates
            .iter()
            .all(|authority| here.certificates.contains(authority))
    }

    /// Judges a client's chain, leaf first, as a handshake at `now` would.
    ///
    /// # Errors
    /// What the handshake would end with.
    pub fn check_client(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), CertificateRefused> {
        verify::check_client(&self.current(), chain, now)
    }

    /// Looks only for what has been withdrawn in a chain that was let in before. Cheap.
    ///
    /// # Errors
    /// The leaf or a certificate above it is withdrawn.
    pub fn check_revoked(&self, chain: &[CertificateDer<'_>]) -> Result<(), CertificateRefused> {
        verify::check_revoked(&self.current(), chain)
    }

    /// Trusts what `other` trusts now, and nothing else, from the next handshake on. Every
    /// configuration made from this value or a clone of it follows.
    pub fn replace(&self, other: &TrustAnchors) {
        let anchors = other.current();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = anchors;
    }

    /// The subjects of the authorities trusted now.
    pub fn subjects(&self) -> Vec<String> {
        self.current().subjects.clone()
    }

    pub(crate) fn current(&self) -> Arc<Anchors> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn read(origin: &Origin, pem: &[u8]) -> Result<Self, LoadError> {
        let mut roots = RootCertStore::empty();
        let mut subjects = Vec::new();
        let certificates = certificates(origin, pem)?;
        for der in &certificates {
            let parsed = certificate::parse(der).map_err(|source| LoadError::Identity {
                origin: origin.0.clone(),
                source,
            })?;
            let subject = certificate::subject(parsed.subject());
            if !parsed.is_ca() {
                tracing::warn!(
                    %subject,
                    "trust anchor in {} is not a certificate authority; it vouches for itself only",
                    origin.0
                );
            }
            subjects.push(subject);
            roots
                .add(der.clone())
                .map_err(|error| LoadError::UnusableAnchor {
                    origin: origin.0.clone(),
                    reason: error.to_string(),
                })?;
        }
        let anchors = Anchors::new(Arc::new(roots), certificates, subjects).map_err(|reason| {
            LoadError::UnusableAnchor {
                origin: origin.0.clone(),
                reason,
            }
        })?;
        Ok(Self(Arc::new(RwLock::new(Arc::new(anchors)))))
    }

    fn with_revocations(&self, origin: &Origin, pem: &[u8]) -> Result<Self, LoadError> {
        let current = self.current();
        let revocations = Revocations::read(
            origin,
            pem,
            &current.certificates,
            &current.roots,
            SystemTime::now(),
        )?;
        let anchors = Anchors {
            revocations: Arc::new(revocations),
            ..Anchors::clone(&current)
        };
        Ok(Self(Arc::new(RwLock::new(Arc::new(anchors)))))
    }
}

impl From<&TrustAnchors> for TrustAnchors {
    fn from(anchors: &TrustAnchors) -> Self {
        anchors.clone()
    }
}

impl fmt::Debug for TrustAnchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TrustAnchors")
            .field(&self.subjects())
            .finish()
    }
}

/// One list of authorities with the chain verifiers built from it, and what they have withdrawn.
///
/// The verifiers do not know of the revocations. Theirs would take the first list of an
/// authority's name, and so refuse everybody while two keys of one name are trusted, and they do
/// not judge connections that are open.
#[derive(Clone)]
pub(crate) struct Anchors {
    subjects: Vec<String>,
    certificates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    pub(crate) revocations: Arc<Revocations>,
    pub(crate) clients: Arc<dyn ClientCertVerifier>,
    pub(crate) servers: Arc<WebPkiServerVerifier>,
}

impl Anchors {
    fn new(
        roots: Arc<RootCertStore>,
        certificates: Vec<CertificateDer<'static>>,
        subjects: Vec<String>,
    ) -> Result<Self, String> {
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| error.to_string())?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self {
            subjects,
            certificates,
            roots,
            revocations: Arc::default(),
            clients,
            servers,
        })
    }
}

/// Why certificates, a key or trust anchors could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The text has PEM markers but cannot be decoded.
    #[error("{origin} is not valid PEM: {reason}; export it again")]
    Pem {
        /// Where it came from.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No certificate where one should be.
    #[error("{origin} holds no certificate: expected a PEM section CERTIFICATE, found {found}")]
    NoCertificate {
        /// Where it came from.
        origin: String,
        /// The PEM sections that are there instead.
        found: String,
    },
    /// No single private key where one should be.
    #[error(
        "{origin} holds no usable private key: expected one PEM section PRIVATE KEY, found {found}"
    )]
    NoKey {
        /// Where it came from.
        origin: String,
        /// The PEM sections that are there instead.
        found: String,
    },
    /// The private key is protected by a pass phrase.
    #[error(
        "{origin} is encrypted with a pass phrase: decrypt it with `openssl pkey -in <file> -out <file>` and protect the file by its mode"
    )]
    EncryptedKey {
        /// Where it came from.
        origin: String,
    },
    /// The private key is of a kind that cannot be used.
    #[error(
        "{origin} cannot be used: expected an ECDSA P-256, P-384, Ed25519 or RSA private key that fits the certificate ({reason})"
    )]
    UnsupportedKey {
        /// Where it came from.
        origin: String,
        /// What the TLS library said.
        reason: String,
    },
    /// Certificate and private key are not a pair.
    #[error(
        "{key} does not belong to {cert}: the public keys differ; load the pair that was issued together"
    )]
    KeyMismatch {
        /// Where the certificate came from.
        cert: String,
        /// Where the private key came from.
        key: String,
    },
    /// The certificate cannot be read or has no identity.
    #[error("{origin}: {source}")]
    Identity {
        /// Where it came from.
        origin: String,
        /// What is wrong with it.
        source: IdentityError,
    },
    /// A certificate that cannot serve as trust anchor.
    #[error("{origin} cannot be used as trust anchor: {reason}")]
    UnusableAnchor {
        /// Where it came from.
        origin: String,
        /// What the TLS library said.
        reason: String,
    },
    /// No revocation list where one should be.
    #[error("{origin} holds no revocation list: expected a PEM section X509 CRL, found {found}")]
    NoRevocationList {
        /// Where it came from.
        origin: String,
        /// The PEM sections that are there instead.
        found: String,
    },
    /// A revocation list that is damaged, not understood or not signed by a trusted authority.
    #[error("{origin} cannot be used as revocation list: {reason}")]
    UnusableRevocationList {
        /// Where it came from.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// How messages call the place some PEM came from.
pub(crate) struct Origin(pub(crate) String);

impl Origin {
    fn file(path: &Path) -> Self {
        Self(path.display().to_string())
    }
}

/// Every certificate of a PEM text, in order; at least one.
pub(crate) fn certificates(
    origin: &Origin,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let sections = sections(origin, pem)?;
    let found = describe(&sections, pem);
    let certificates: Vec<_> = sections
        .into_iter()
        .filter(|(kind, _)| *kind == SectionKind::Certificate)
        .map(|(_, der)| CertificateDer::from(der))
        .collect();
    if certificates.is_empty() {
        return Err(LoadError::NoCertificate {
            origin: origin.0.clone(),
            found,
        });
    }
    Ok(certificates)
}

fn private_key(origin: &Origin, pem: &[u8]) -> Result<PrivateKeyDer<'static>, LoadError> {
    let sections = sections(origin, pem)?;
    let found = describe(&sections, pem);
    let mut keys = sections
        .into_iter()
        .filter_map(|(kind, der)| PrivateKeyDer::from_pem(kind, der));
    match (keys.next(), keys.next()) {
        (Some(key), None) => Ok(key),
        (None, _) if is_encrypted(pem) => Err(LoadError::EncryptedKey {
            origin: origin.0.clone(),
        }),
        _ => Err(LoadError::NoKey {
            origin: origin.0.clone(),
            found,
        }),
    }
}

pub(crate) fn sections(
    origin: &Origin,
    pem: &[u8],
) -> Result<Vec<(SectionKind, Vec<u8>)>, LoadError> {
    <(SectionKind, Vec<u8>)>::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| {
            use rustls::pki_types::pem::Error;
            // The library's own texts may quote the input, which can be a key in the wrong place.
            let reason = match error {
                Error::MissingSectionEnd { .. } => "a section has no END line",
                Error::IllegalSectionStart { .. } => "a BEGIN line is malformed",
                Error::Base64Decode(_) => "a section is not base64",
                _ => "it cannot be decoded",
            };
            LoadError::Pem {
                origin: origin.0.clone(),
                reason: reason.into(),
            }
        })
}

/// The kinds of the sections for a message; never their contents.
pub(crate) fn describe(sections: &[(SectionKind, Vec<u8>)], pem: &[u8]) -> String {
    if sections.is_empty() {
        return if pem.is_empty() {
            "an empty text".into()
        } else if is_encrypted(pem) {
            "ENCRYPTED PRIVATE KEY".into()
        } else {
            "no PEM section".into()
        };
    }
    let names: Vec<&str> = sections
        .iter()
        .map(|(kind, _)| match kind {
            SectionKind::Certificate => "CERTIFICATE",
            SectionKind::PublicKey => "PUBLIC KEY",
            SectionKind::RsaPrivateKey => "RSA PRIVATE KEY",
            SectionKind::PrivateKey => "PRIVATE KEY",
            SectionKind::EcPrivateKey => "EC PRIVATE KEY",
            SectionKind::Crl => "X509 CRL",
            SectionKind::Csr => "CERTIFICATE REQUEST",
            _ => "another section",
        })
        .take(8)
        .collect();
    names.join(", ")
}

fn is_encrypted(pem: &[u8]) -> bool {
    let marker = b"BEGIN ENCRYPTED PRIVATE KEY";
    pem.windows(marker.len()).any(|window| window == marker)
}

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Read {
        path: path.display().to_string(),
        source,
    })
}

#[cfg(unix)]
fn warn_if_readable_by_others(key: &Path) {
    use std::os::unix::fs::PermissionsExt;
    if let Ok(metadata) = std::fs::metadata(key) {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            tracing::warn!(
                path = %key.display(),
                mode = format_args!("{mode:04o}"),
                "private key is open to group or others; run chmod 600 on it"
            );
        }
    }
}

#[cfg(not(unix))]
fn warn_if_readable_by_others(_key: &Path) {}
