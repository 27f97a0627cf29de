//! An authority made for one test, with the certificates of its devices and brokers, good and bad.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use selvedge_certs::{
    Authority, Credentials, IssueRequest, Overwrite, ServerIdentity, TrustAnchors,
    tcp_client_config,
};
use tempfile::TempDir;

/// The name every broker certificate of a test carries beside the loopback addresses.
pub const SERVER_NAME: &str = "localhost";

/// A day, in which no test takes long enough to matter.
const DAY: Duration = Duration::from_secs(86_400);

/// An authority in a directory of its own that goes with it.
#[derive(Debug)]
pub struct TestPki {
    authority: Authority,
    directory: TempDir,
}

/// A certificate and its key as rustls takes them, with whatever is wrong with them.
#[derive(Debug)]
pub struct RawCertificate {
    /// The chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key.
    pub key: PrivateKeyDer<'static>,
}

/// Where the files of one identity are, for programs.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    /// The certificate of the authority.
    pub ca: PathBuf,
    /// The identity's own certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl TestPki {
    /// An authority for the trust domain `test.example`.
    pub fn new() -> TestPki {
        let directory = tempfile::tempdir().expect("make a directory for an authority");
        let authority = Authority::init(directory.path(), "test.example", Overwrite::No)
            .expect("make an authority");
        TestPki {
            authority,
            directory,
        }
    }

    /// A device's certificate.
    pub fn device(&self, tenant: &str, site: &str, name: &str) -> Credentials {
        self.issue(&IssueRequest::client(tenant, site, name))
    }

    /// A device's certificate that was valid until yesterday.
    pub fn expired_device(&self, tenant: &str, site: &str, name: &str) -> Credentials {
        let request = IssueRequest::client(tenant, site, name)
            .not_before(SystemTime::now() - 2 * DAY)
            .validity(DAY);
        self.issue(&request)
    }

    /// A broker's certificate for every loopback name and address.
    pub fn server(&self) -> Credentials {
        self.issue(&Self::server_request())
    }

    /// The certificate of whatever is asked for.
    pub fn issue(&self, request: &IssueRequest) -> Credentials {
        let issued = self.authority.issue(request).expect("issue a certificate");
        issued.credentials()
    }

    /// The authority's certificate.
    pub fn anchors(&self) -> TrustAnchors {
        TrustAnchors::from_pem(self.authority.ca_pem().as_bytes()).expect("our own certificate")
    }

    /// TLS over TCP as an MQTT client uses it, with or without a certificate.
    pub fn tls_client(&self, credentials: Option<&Credentials>) -> Arc<rustls::ClientConfig> {
        tcp_client_config(
            credentials,
            &self.anchors(),
            ServerIdentity::Spiffe,
            &[b"mqtt"],
        )
        .expect("a TLS configuration of good parts")
    }

    /// TLS over TCP as a client of the front door uses it, for one protocol of HTTP.
    pub fn http_client(
        &self,
        credentials: Option<&Credentials>,
        alpn: &[u8],
    ) -> rustls::ClientConfig {
        let config = tcp_client_config(
            credentials,
            &self.anchors(),
            ServerIdentity::Spiffe,
            &[alpn],
        );
        let config = config.expect("a TLS configuration of good parts");
        Arc::unwrap_or_clone(config)
    }

    /// Writes a device's certificate and key.
    pub fn device_files(&self, tenant: &str, site: &str, name: &str) -> IdentityFiles {
        self.issue_files(&IssueRequest::client(tenant, site, name))
    }

    /// Writes a broker's certificate and key.
    pub fn server_files(&self) -> IdentityFiles {
        self.issue_files(&Self::server_request())
    }

    /// Writes the certificate and key of whatever is asked for, over those of the same identity.
    pub fn issue_files(&self, request: &IssueRequest) -> IdentityFiles {
        let paths = self
            .authority
            .issue_into(self.directory.path(), request, Overwrite::Yes)
            .expect("issue a certificate");
        IdentityFiles {
            ca: self.ca_file(),
            cert: paths.cert,
            key: paths.key,
        }
    }

    /// The file of the authority's certificate.
    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A client certificate of this authority that lacks what ours always have: a SPIFFE identity. Its
    /// common name looks like one.
    pub fn nameless(&self) -> RawCertificate {
        let mut params = CertificateParams::default();
        let name = &mut params.distinguished_name;
        name.push(rcgen::DnType::CommonName, "acme/plant-1/press-7");
        let dns = "press-7.example".try_into().expect("a host name");
        params.subject_alt_names = vec![SanType::DnsName(dns)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(&params)
    }

    /// A certificate of this authority for `identity` that may be used by servers only.
    pub fn server_only(&self, identity: &str) -> RawCertificate {
        let mut params = CertificateParams::default();
        let uri = identity.try_into().expect("a URI is ASCII");
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(&params)
    }

    fn sign(&self, params: &CertificateParams) -> RawCertificate {
        let read = |name| {
            std::fs::read_to_string(self.directory.path().join(name)).expect("read our own file")
        };
        let ca_key = KeyPair::from_pem(&read("ca.key")).expect("our own key");
        let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).expect("our own authority");
        let key = KeyPair::generate().expect("generate a key");
        let leaf = params.signed_by(&key, &issuer).expect("sign a certificate");
        RawCertificate {
            chain: vec![leaf.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        }
    }

    fn server_request() -> IssueRequest {
        IssueRequest::server("fabric", "cloud", "broker")
            .dns(SERVER_NAME)
            .ip(Ipv4Addr::LOCALHOST)
            .ip(Ipv6Addr::LOCALHOST)
    }
}

impl Default for TestPki {
    fn default() -> Self {
        Self::new()
    }
}
