//! An authority that also signs what the real one never would.

use std::net::Ipv4Addr;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use selvedge_certs::{Credentials, TrustAnchors};
use time::OffsetDateTime;
use time::macros::datetime;

pub(crate) const CLIENT: &[ExtendedKeyUsagePurpose] = &[ExtendedKeyUsagePurpose::ClientAuth];
pub(crate) const SERVER: &[ExtendedKeyUsagePurpose] = &[ExtendedKeyUsagePurpose::ServerAuth];

pub(crate) struct Ca {
    pub(crate) pem: String,
    der: CertificateDer<'static>,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn anchors(&self) -> TrustAnchors {
        TrustAnchors::from_pem(self.pem.as_bytes()).unwrap()
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        roots
    }

    pub(crate) fn issue(&self, leaf: &Leaf) -> Issued {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name("somebody");
        params.serial_number = Some(SerialNumber::from_slice(&[0x1a, 0x2b]));
        params.not_before = leaf.not_before;
        params.not_after = leaf.not_after;
        params.extended_key_usages = leaf.purposes.to_vec();
        params.subject_alt_names = leaf
            .uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        if let Some(host) = leaf.host {
            let host = SanType::DnsName(host.try_into().unwrap());
            params.subject_alt_names.push(host);
        }
        params
            .subject_alt_names
            .push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            cert_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        }
    }
}

pub(crate) struct Leaf {
    pub(crate) uris: &'static [&'static str],
    pub(crate) purposes: &'static [ExtendedKeyUsagePurpose],
    pub(crate) host: Option<&'static str>,
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
}

impl Leaf {
    /// Valid in every way for `purposes`.
    pub(crate) fn good(purposes: &'static [ExtendedKeyUsagePurpose]) -> Self {
        Self {
            uris: &["spiffe://plant.example/acme/hall-1/press-7"],
            purposes,
            host: Some("localhost"),
            not_before: datetime!(2020-01-01 0:00 UTC),
            not_after: datetime!(2120-01-01 0:00 UTC),
        }
    }
}

pub(crate) struct Issued {
    pub(crate) cert_pem: String,
    pub(crate) key_pem: String,
}

impl Issued {
    pub(crate) fn credentials(&self) -> Credentials {
        Credentials::from_pem(self.cert_pem.as_bytes(), self.key_pem.as_bytes()).unwrap()
    }

    /// The pair as rustls takes it, for certificates that `Credentials` would not load.
    pub(crate) fn raw(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_slice(self.cert_pem.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).unwrap();
        (vec![certificate], key)
    }
}

fn common_name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}
