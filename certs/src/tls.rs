//! Finished rustls and quinn configurations: one provider, mutual TLS, post-quantum first.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};

use crate::credentials::{ReloadableCredentials, TrustAnchors};
use crate::identity::{IdentityError, TrustDomain};
use crate::verify::{ClientVerifier, ServerVerifier};

const TLS13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
/// MQTT devices in the field often stop at TLS 1.2.
const TLS12_AND_13: &[&SupportedProtocolVersion] =
    &[&rustls::version::TLS13, &rustls::version::TLS12];

/// Whether a TLS server asks clients for a certificate.
#[derive(Debug, Clone, Copy)]
pub enum ClientAuth<'a> {
    /// A client without a valid certificate is refused.
    Required(&'a TrustAnchors),
    /// A client may come without a certificate; one it does present must be valid.
    Optional(&'a TrustAnchors),
    /// Clients are not asked, and prove who they are in another way.
    None,
}

/// What a TLS client asks of the server's certificate beyond chain, purpose and host name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerIdentity {
    /// It must carry a SPIFFE identity, as every Selvedge broker's does.
    Spiffe,
    /// Any server certificate will do: for MQTT brokers that are not ours.
    Any,
}

/// Why a configuration could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The trust domain to demand from clients is not one.
    #[error("cannot demand this trust domain from clients: {0}")]
    TrustDomain(#[from] IdentityError),
    /// The TLS library refused the combination of settings.
    #[error("cannot configure TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The provider lacks the cipher suite that protects QUIC's first packets.
    #[error("cannot configure QUIC: the provider lacks TLS13_AES_128_GCM_SHA256")]
    InitialCipherSuite,
}

/// The one cryptography provider: aws-lc-rs, X25519MLKEM768 before X25519 before P-256.
///
/// It is passed explicitly everywhere; the process default is neither read nor set.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let provider = PROVIDER.get_or_init(|| {
        Arc::new(CryptoProvider {
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    Arc::clone(provider)
}

/// A QUIC server that demands a client certificate, of `trust_domain` if one is given.
pub fn quic_server_config(
    credentials: impl Into<ReloadableCredentials>,
    anchors: &TrustAnchors,
    trust_domain: Option<&str>,
    alpn: &[&[u8]],
) -> Result<QuicServerConfig, TlsError> {
    let config = server_config(
        credentials.into(),
        ClientAuth::Required(anchors),
        trust_domain,
        alpn,
        TLS13,
    )?;
    QuicServerConfig::try_from(config).map_err(|_| TlsError::InitialCipherSuite)
}

/// A QUIC client that presents `credentials` and demands a broker of the fabric as server.
pub fn quic_client_config(
    credentials: impl Into<ReloadableCredentials>,
    anchors: &TrustAnchors,
    alpn: &[&[u8]],
) -> Result<QuicClientConfig, TlsError> {
    let config = client_config(
        Some(credentials.into()),
        anchors,
        ServerIdentity::Spiffe,
        alpn,
        TLS13,
    )?;
    QuicClientConfig::try_from(config).map_err(|_| TlsError::InitialCipherSuite)
}

/// A TLS server over TCP. `trust_domain`, if given, is demanded of every client certificate.
pub fn tcp_server_config(
    credentials: impl Into<ReloadableCredentials>,
    client_auth: ClientAuth<'_>,
    trust_domain: Option<&str>,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    server_config(
        credentials.into(),
        client_auth,
        trust_domain,
        alpn,
        TLS12_AND_13,
    )
    .map(Arc::new)
}

/// A TLS client over TCP, with or without a certificate of its own.
pub fn tcp_client_config(
    credentials: Option<&crate::Credentials>,
    anchors: &TrustAnchors,
    server_identity: ServerIdentity,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    client_config(
        credentials.map(ReloadableCredentials::from),
        anchors,
        server_identity,
        alpn,
        TLS12_AND_13,
    )
    .map(Arc::new)
}

/// The key exchange group of an established connection, such as `X25519MLKEM768`.
///
/// Ask only once a connection is established: quinn's `Connecting::handshake_data` must not be
/// used in this workspace, as it panics while a peer is asked for another key share.
pub fn negotiated_group(connection: &quinn::Connection) -> Option<String> {
    let data = connection
        .handshake_data()?
        .downcast::<HandshakeData>()
        .ok()?;
    Some(format!("{:?}", data.negotiated_key_exchange_group))
}

fn server_config(
    credentials: ReloadableCredentials,
    client_auth: ClientAuth<'_>,
    trust_domain: Option<&str>,
    alpn: &[&[u8]],
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ServerConfig, TlsError> {
    let trust_domain = trust_domain.map(str::parse::<TrustDomain>).transpose()?;
    let builder =
        ServerConfig::builder_with_provider(provider()).with_protocol_versions(versions)?;
    let resolver: Arc<dyn ResolvesServerCert> = Arc::new(credentials);
    let mut config = match client_auth {
        ClientAuth::Required(anchors) => builder
            .with_client_cert_verifier(Arc::new(ClientVerifier::required(anchors, trust_domain)))
            .with_cert_resolver(resolver),
        ClientAuth::Optional(anchors) => builder
            .with_client_cert_verifier(Arc::new(ClientVerifier::optional(anchors, trust_domain)))
            .with_cert_resolver(resolver),
        ClientAuth::None => builder.with_no_client_auth().with_cert_resolver(resolver),
    };
    if !matches!(client_auth, ClientAuth::None) {
        // A resumed handshake does not ask the verifier, so a certificate that expired or lost
        // its authority since the first handshake would still be let in.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    config.max_early_data_size = 0;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

fn client_config(
    credentials: Option<ReloadableCredentials>,
    anchors: &TrustAnchors,
    server_identity: ServerIdentity,
    alpn: &[&[u8]],
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ClientConfig, TlsError> {
    let verifier: Arc<dyn ServerCertVerifier> =
        Arc::new(ServerVerifier::new(anchors, server_identity));
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match credentials {
        Some(credentials) => builder.with_client_cert_resolver(Arc::new(credentials)),
        None => builder.with_no_client_auth(),
    };
    // For the same reason as on the server: each handshake verifies.
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}
