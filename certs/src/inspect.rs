//! Explaining certificates to people: what one is, who issued it and what it may be used for.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime};

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::public_key::PublicKey;

use crate::certificate::{self, date, hex, printable};
use crate::credentials::{LoadError, Origin, certificates};
use crate::identity::{Identity, IdentityError};

/// Reads every certificate of a PEM text and says what it is, as seen at `now`.
pub fn explain(pem: &[u8], now: SystemTime) -> Result<Vec<CertificateSummary>, LoadError> {
    let origin = Origin("certificate".into());
    certificates(&origin, pem)?
        .iter()
        .map(|der| {
            let parsed = certificate::parse(der).map_err(|source| LoadError::Identity {
                origin: origin.0.clone(),
                source,
            })?;
            Ok(CertificateSummary::new(&parsed, der, now))
        })
        .collect()
}

/// What there is to know about one certificate. Displays as a few aligned lines.
#[derive(Debug, Clone)]
pub struct CertificateSummary {
    /// The SPIFFE identity, or why there is none.
    pub identity: Result<Identity, IdentityError>,
    /// The subject, for people only: nothing is decided by it.
    pub subject: String,
    /// The subject of the authority that signed it.
    pub issuer: String,
    /// The serial number in hex.
    pub serial: String,
    /// The start of its validity.
    pub not_before: SystemTime,
    /// The end of its validity.
    pub not_after: SystemTime,
    /// Its validity in words, such as `expires in 89 days`.
    pub validity: String,
    /// Whether it is valid at the time asked for.
    pub valid_now: bool,
    /// URIs in the subject alternative name.
    pub uris: Vec<String>,
    /// Host names in the subject alternative name.
    pub dns_names: Vec<String>,
    /// Addresses in the subject alternative name.
    pub ip_addresses: Vec<IpAddr>,
    /// The kind of its key, such as `ECDSA P-256`.
    pub key_type: String,
    /// Whether it is an authority's certificate.
    pub is_authority: bool,
    /// What it may be used for, such as `client authentication`.
    pub purposes: Vec<String>,
    /// SHA-256 of the whole certificate in hex.
    pub fingerprint: String,
}

impl CertificateSummary {
    fn new(parsed: &X509Certificate<'_>, der: &[u8], now: SystemTime) -> Self {
        let not_before = certificate::system_time(parsed.validity().not_before);
        let not_after = certificate::system_time(parsed.validity().not_after);
        let (dns_names, ip_addresses) = hosts(parsed);
        Self {
            identity: certificate::identity(parsed),
            subject: certificate::subject(parsed.subject()),
            issuer: certificate::subject(parsed.issuer()),
            serial: certificate::serial(parsed),
            not_before,
            not_after,
            validity: validity(not_before, not_after, now),
            valid_now: not_before <= now && now <= not_after,
            uris: uris(parsed),
            dns_names,
            ip_addresses,
            key_type: key_type(parsed),
            is_authority: parsed.is_ca(),
            purposes: purposes(parsed),
            fingerprint: sha256(der),
        }
    }
}

impl fmt::Display for CertificateSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            Ok(identity) => writeln!(f, "identity     {identity}")?,
            Err(_) if self.is_authority => {
                writeln!(f, "identity     none (an authority, not a peer)")?;
            }
            Err(error) => writeln!(f, "identity     none: {error}")?,
        }
        writeln!(f, "subject      {}", self.subject)?;
        writeln!(f, "issuer       {}", self.issuer)?;
        writeln!(f, "serial       {}", self.serial)?;
        writeln!(
            f,
            "validity     {} to {}, {}",
            date(self.not_before),
            date(self.not_after),
            self.validity
        )?;
        let names: Vec<String> = (self.uris.iter().map(|uri| format!("URI {uri}")))
            .chain(self.dns_names.iter().map(|name| format!("DNS {name}")))
            .chain(self.ip_addresses.iter().map(|ip| format!("IP {ip}")))
            .collect();
        let names = if names.is_empty() {
            "none".into()
        } else {
            names.join(", ")
        };
        writeln!(f, "names        {names}")?;
        writeln!(f, "key          {}", self.key_type)?;
        if self.is_authority {
            writeln!(f, "authority:   signs certificates")?;
        } else {
            writeln!(f, "may be used for: {}", self.purposes.join(", "))?;
        }
        write!(f, "fingerprint  SHA-256 {}", self.fingerprint)
    }
}

/// The host names and addresses in the subject alternative name.
pub(crate) fn hosts(parsed: &X509Certificate<'_>) -> (Vec<String>, Vec<IpAddr>) {
    let (mut names, mut addresses) = (Vec::new(), Vec::new());
    for name in alternative_names(parsed) {
        match name {
            GeneralName::DNSName(name) => names.push(printable(name)),
            GeneralName::IPAddress(bytes) => addresses.extend(address(bytes)),
            _ => {}
        }
    }
    (names, addresses)
}

/// What the extended key usage allows; a certificate without that extension may do anything.
pub(crate) fn purposes(parsed: &X509Certificate<'_>) -> Vec<String> {
    let usage = match parsed.extended_key_usage() {
        Ok(Some(usage)) => usage.value,
        Ok(None) if parsed.is_ca() => return vec!["signing certificates".into()],
        Ok(None) => return vec!["any purpose".into()],
        Err(_) => return vec!["unreadable".into()],
    };
    let known = [
        (usage.any, "any purpose"),
        (usage.client_auth, "client authentication"),
        (usage.server_auth, "server authentication"),
        (usage.code_signing, "code signing"),
        (usage.email_protection, "e-mail protection"),
        (usage.time_stamping, "time stamping"),
        (usage.ocsp_signing, "OCSP signing"),
        (!usage.other.is_empty(), "something else"),
    ];
    known
        .iter()
        .filter(|(allowed, _)| *allowed)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

fn uris(parsed: &X509Certificate<'_>) -> Vec<String> {
    alternative_names(parsed)
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(printable(uri)),
            _ => None,
        })
        .collect()
}

fn alternative_names<'a>(parsed: &'a X509Certificate<'_>) -> &'a [GeneralName<'a>] {
    match parsed.subject_alternative_name() {
        Ok(Some(names)) => &names.value.general_names,
        _ => &[],
    }
}

fn validity(not_before: SystemTime, not_after: SystemTime, now: SystemTime) -> String {
    if let Ok(ago) = now.duration_since(not_after)
        && !ago.is_zero()
    {
        return format!("expired {} ago", span(ago));
    }
    if let Ok(ahead) = not_before.duration_since(now)
        && !ahead.is_zero()
    {
        return format!("valid only in {}", span(ahead));
    }
    let left = not_after.duration_since(now).unwrap_or_default();
    format!("expires in {}", span(left))
}

/// A length of time in its largest fitting unit.
fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural}")
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(v6).into())
}

fn key_type(parsed: &X509Certificate<'_>) -> String {
    let key = parsed.public_key();
    let algorithm = key.algorithm.algorithm.to_id_string();
    let curve = key
        .algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok())
        .map(|curve| curve.to_id_string());
    match (algorithm.as_str(), curve.as_deref()) {
        ("1.3.101.112", _) => "Ed25519".into(),
        ("1.2.840.10045.2.1", Some("1.2.840.10045.3.1.7")) => "ECDSA P-256".into(),
        ("1.2.840.10045.2.1", Some("1.3.132.0.34")) => "ECDSA P-384".into(),
        ("1.2.840.10045.2.1", Some("1.3.132.0.35")) => "ECDSA P-521".into(),
        ("1.2.840.10045.2.1", _) => "ECDSA over an unknown curve".into(),
        _ => match key.parsed() {
            Ok(PublicKey::RSA(rsa)) => format!("RSA {}", rsa.key_size()),
            _ => format!("unknown ({})", printable(&algorithm)),
        },
    }
}

/// The provider's own SHA-256, by way of a cipher suite that uses it.
fn sha256(bytes: &[u8]) -> String {
    match TLS13_AES_128_GCM_SHA256.tls13() {
        Some(suite) => hex(suite.common.hash_provider.hash(bytes).as_ref()),
        None => String::new(),
    }
}
