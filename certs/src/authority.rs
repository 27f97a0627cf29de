//! A certificate authority for one trust domain, kept in a directory: certificate, key and, once it
//! has withdrawn something, its revocation list.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::pki_types::ServerName;
use time::OffsetDateTime;

use crate::certificate::{self, calendar, date, printable};
use crate::credentials::{Credentials, LoadError, Origin, certificates};
use crate::identity::{Identity, IdentityError, TrustDomain};
use crate::tls::provider;

mod files;
mod revoke;

pub use revoke::RevocationFile;

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const REVOCATIONS: &str = "crl.pem";
const LEAF_CERT: &str = "cert.pem";
const LEAF_KEY: &str = "key.pem";

const DAY: Duration = Duration::from_secs(86_400);
const CA_VALIDITY: Duration = Duration::from_secs(3652 * 86_400);
const LEAF_VALIDITY: Duration = Duration::from_secs(90 * 86_400);
/// Certificates start a little in the past, for peers whose clock is slow.
const BACKDATED: Duration = Duration::from_secs(5 * 60);

/// Whether files that exist may be overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// An existing file is an error.
    #[default]
    No,
    /// Existing files are replaced.
    Yes,
}

/// What a certificate may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Dial brokers.
    Client,
    /// Accept connections, and dial other brokers.
    Server,
}

/// What to put into a new certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssueRequest {
    /// The tenant of the new identity.
    pub tenant: String,
    /// The site of the new identity.
    pub site: String,
    /// The name of the new identity within its site.
    pub name: String,
    /// What the certificate may be used for.
    pub purpose: Purpose,
    /// Host names a server is reached by.
    pub dns: Vec<String>,
    /// Addresses a server is reached by.
    pub ips: Vec<IpAddr>,
    /// How long it is valid; 90 days unless said otherwise.
    pub validity: Duration,
    /// When validity starts; five minutes ago unless said otherwise.
    pub not_before: Option<SystemTime>,
}

impl IssueRequest {
    /// A certificate for a device, service or worker that dials brokers.
    pub fn client(
        tenant: impl Into<String>,
        site: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self {
            tenant: tenant.into(),
            site: site.into(),
            name: name.into(),
            purpose: Purpose::Client,
            dns: Vec::new(),
            ips: Vec::new(),
            validity: LEAF_VALIDITY,
            not_before: None,
        }
    }

    /// A certificate for a broker, which accepts connections and dials other brokers.
    pub fn server(
        tenant: impl Into<String>,
        site: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self {
            purpose: Purpose::Server,
            ..Self::client(tenant, site, name)
        }
    }

    /// Adds a host name.
    #[must_use]
    pub fn dns(mut self, name: impl Into<String>) -> Self {
        self.dns.push(name.into());
        self
    }

    /// Adds an address.
    #[must_use]
    pub fn ip(mut self, address: impl Into<IpAddr>) -> Self {
        self.ips.push(address.into());
        self
    }

    /// Sets how long the certificate is valid, counted from now or from `not_before`.
    #[must_use]
    pub fn validity(mut self, validity: Duration) -> Self {
        self.validity = validity;
        self
    }

    /// Sets when validity starts.
    #[must_use]
    pub fn not_before(mut self, time: SystemTime) -> Self {
        self.not_before = Some(time);
        self
    }
}

/// A new certificate with its private key. `Debug` does not show the key.
#[derive(Clone)]
pub struct IssuedCertificate {
    /// The certificate in PEM, without the authority's.
    pub cert_pem: String,
    /// The private key in PEM (PKCS #8).
    pub key_pem: String,
    credentials: Credentials,
}

impl IssuedCertificate {
    /// The pair, ready for a TLS configuration.
    pub fn credentials(&self) -> Credentials {
        self.credentials.clone()
    }
}

impl fmt::Debug for IssuedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IssuedCertificate({})", self.credentials.description())
    }
}

/// Where an issued certificate was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedPaths {
    /// The certificate.
    pub cert: PathBuf,
    /// The private key, readable by its owner only.
    pub key: PathBuf,
}

/// A certificate authority. `Debug` does not show its key.
pub struct Authority {
    trust_domain: TrustDomain,
    ca_pem: String,
    not_after: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority in memory, valid for ten years.
    pub fn create(trust_domain: &str) -> Result<Self, AuthorityError> {
        Self::generate(trust_domain).map(|(authority, _)| authority)
    }

    /// A new authority whose certificate and key are written to `dir/ca.pem` and `dir/ca.key`.
    ///
    /// The directory is created if need be. Each file appears whole or not at all.
    pub fn init(
        dir: &Path,
        trust_domain: &str,
        overwrite: Overwrite,
    ) -> Result<Self, AuthorityError> {
        let (authority, key_pem) = Self::generate(trust_domain)?;
        files::write_pair(
            dir,
            (CA_CERT, &authority.ca_pem),
            (CA_KEY, &key_pem),
            overwrite,
        )?;
        if overwrite == Overwrite::Yes {
            // The list of the authority that was replaced: the new one has withdrawn nothing.
            files::remove(&dir.join(REVOCATIONS))?;
        }
        Ok(authority)
    }

    /// Reads an authority that [`Authority::init`] wrote.
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let ca_path = dir.join(CA_CERT);
        let ca_pem = files::read(&ca_path)?;
        let key_path = dir.join(CA_KEY);
        let key_pem = files::read(&key_path)?;
        let unusable = |path: &Path, reason: String| AuthorityError::Unusable {
            path: path.to_owned(),
            reason,
        };
        let origin = Origin(ca_path.display().to_string());
        let chain = certificates(&origin, ca_pem.as_bytes())?;
        let [der] = chain.as_slice() else {
            let reason = format!("expected one certificate, found {}", chain.len());
            return Err(unusable(&ca_path, reason));
        };
        let parsed =
            certificate::parse(der).map_err(|error| unusable(&ca_path, error.to_string()))?;
        if !parsed.is_ca() {
            let reason = "expected the certificate of an authority, found that of a peer".into();
            return Err(unusable(&ca_path, reason));
        }
        let trust_domain = certificate::authority_trust_domain(&parsed)
            .map_err(|error| unusable(&ca_path, error.to_string()))?;
        // The library's own texts may quote the input, which is a private key.
        let key = KeyPair::from_pem(&key_pem)
            .map_err(|_| unusable(&key_path, "expected a private key in PEM".into()))?;
        if key.public_key_raw() != parsed.public_key().subject_public_key.data.as_ref() {
            let reason = format!("expected the key of {}, found another", ca_path.display());
            return Err(unusable(&key_path, reason));
        }
        let not_after = certificate::system_time(parsed.validity().not_after);
        let issuer = Issuer::from_ca_cert_der(der, key)
            .map_err(|error| unusable(&ca_path, error.to_string()))?;
        Ok(Self {
            trust_domain,
            ca_pem,
            not_after,
            issuer,
        })
    }

    /// The trust domain it issues identities in.
    pub fn trust_domain(&self) -> &str {
        self.trust_domain.as_str()
    }

    /// Its certificate in PEM: the trust anchor of every peer.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Issues a certificate with a new key.
    pub fn issue(&self, request: &IssueRequest) -> Result<IssuedCertificate, AuthorityError> {
        let identity = Identity::new(
            self.trust_domain(),
            &request.tenant,
            &request.site,
            &request.name,
        )?;
        let (not_before, not_after) = self.validity(request)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(identity.name());
        params.serial_number = Some(random_serial()?);
        params.not_before = not_before;
        params.not_after = not_after;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match request.purpose {
            Purpose::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Purpose::Server => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        };
        params.subject_alt_names = vec![SanType::URI(identity.uri().try_into()?)];
        for name in &request.dns {
            check_dns(name)?;
            params
                .subject_alt_names
                .push(SanType::DnsName(name.as_str().try_into()?));
        }
        for ip in &request.ips {
            params.subject_alt_names.push(SanType::IpAddress(*ip));
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert_pem = params.signed_by(&key, &self.issuer)?.pem();
        let key_pem = key.serialize_pem();
        let credentials = Credentials::from_pem(cert_pem.as_bytes(), key_pem.as_bytes())?;
        Ok(IssuedCertificate {
            cert_pem,
            key_pem,
            credentials,
        })
    }

    /// Issues a certificate into `dir/<tenant>/<site>/<name>/{cert.pem,key.pem}`.
    pub fn issue_into(
        &self,
        dir: &Path,
        request: &IssueRequest,
        overwrite: Overwrite,
    ) -> Result<IssuedPaths, AuthorityError> {
        // Issuing checks the parts of the identity, so they are safe as names of directories.
        let issued = self.issue(request)?;
        let dir = dir
            .join(&request.tenant)
            .join(&request.site)
            .join(&request.name);
        files::write_pair(
            &dir,
            (LEAF_CERT, &issued.cert_pem),
            (LEAF_KEY, &issued.key_pem),
            overwrite,
        )?;
        Ok(IssuedPaths {
            cert: dir.join(LEAF_CERT),
            key: dir.join(LEAF_KEY),
        })
    }

    fn generate(trust_domain: &str) -> Result<(Self, String), AuthorityError> {
        let trust_domain: TrustDomain = trust_domain.parse()?;
        let now = SystemTime::now();
        let not_after = now + CA_VALIDITY;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("Selvedge authority of {trust_domain}"));
        params.serial_number = Some(random_serial()?);
        params.not_before = moment(now - BACKDATED)?;
        params.not_after = moment(not_after)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // The SPIFFE standard's place for the trust domain an authority signs for.
        let uri = format!("spiffe://{trust_domain}");
        params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let ca_pem = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        let authority = Self {
            trust_domain,
            ca_pem,
            not_after,
            issuer: Issuer::new(params, key),
        };
        Ok((authority, key_pem))
    }

    fn validity(
        &self,
        request: &IssueRequest,
    ) -> Result<(OffsetDateTime, OffsetDateTime), AuthorityError> {
        let now = SystemTime::now();
        let not_before = request.not_before.unwrap_or(now - BACKDATED);
        let not_after = request
            .not_before
            .unwrap_or(now)
            .checked_add(request.validity)
            .ok_or(AuthorityError::Validity {
                reason: "it ends outside the calendar".into(),
            })?;
        if request.validity.is_zero() {
            return Err(AuthorityError::Validity {
                reason: "it is zero".into(),
            });
        }
        if not_after > self.not_after {
            let days = self
                .not_after
                .duration_since(now)
                .unwrap_or_default()
                .as_secs()
                / DAY.as_secs();
            return Err(AuthorityError::Validity {
                reason: format!(
                    "it would end after the authority itself, which is valid until {}; ask for at most {days} days",
                    date(self.not_after)
                ),
            });
        }
        Ok((moment(not_before)?, moment(not_after)?))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.trust_domain)
    }
}

/// Why an authority could not be made, loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// A part of the identity or the trust domain is not allowed.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A host name is not one.
    #[error("expected a host name such as broker.example or *.broker.example, found `{found}`")]
    HostName {
        /// What was asked for.
        found: String,
    },
    /// The validity asked for is not possible.
    #[error("this validity cannot be issued: {reason}")]
    Validity {
        /// What is wrong with it.
        reason: String,
    },
    /// A file is there already.
    #[error("{} exists already; move it away or allow it to be overwritten", .path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", .path.display())]
    File {
        /// `read`, `write`, `create`, `remove`, `open` or `lock`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the authority does not hold what it should.
    #[error("{} cannot be used: {reason}", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate to be withdrawn is another authority's.
    #[error(
        "certificate {certificate} was issued by another authority ({issuer}); only the one that issued it can revoke it"
    )]
    NotIssuedHere {
        /// The certificate in a few words.
        certificate: String,
        /// The issuer it names.
        issuer: String,
    },
    /// A certificate just read or issued does not load.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The system gave no random bytes.
    #[error("the system gave no random bytes")]
    Random,
    /// The certificate could not be put together.
    #[error("cannot make the certificate: {0}")]
    Build(String),
}

impl From<rcgen::Error> for AuthorityError {
    fn from(error: rcgen::Error) -> Self {
        Self::Build(error.to_string())
    }
}

fn common_name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    // RFC 5280 bounds a common name to 64 characters; the identity itself is in the URI.
    name.push(
        DnType::CommonName,
        text.chars().take(64).collect::<String>(),
    );
    name
}

fn check_dns(name: &str) -> Result<(), AuthorityError> {
    let host = name.strip_prefix("*.").unwrap_or(name);
    match ServerName::try_from(host) {
        Ok(ServerName::DnsName(_)) => Ok(()),
        _ => Err(AuthorityError::HostName {
            found: printable(name),
        }),
    }
}

fn moment(time: SystemTime) -> Result<OffsetDateTime, AuthorityError> {
    // X.509 dates have four digits for the year.
    calendar(time)
        .filter(|date| (1950..=9999).contains(&date.year()))
        .ok_or(AuthorityError::Validity {
            reason: "a date is outside the years 1950 to 9999".into(),
        })
}

/// 127 random bits, positive and without a leading zero byte.
fn random_serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = random_bytes::<16>()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn random_bytes<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| AuthorityError::Random)?;
    Ok(bytes)
}
