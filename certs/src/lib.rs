//! Identity and TLS for Selvedge: who a peer is, how certificates are issued and read, and how
//! connections are encrypted.
//!
//! A certificate *is* the identity: one SPIFFE URI in its subject alternative name. Nothing in
//! this crate ever reads the common name to decide anything. X.509 libraries stop here; the
//! public interface speaks of [`Identity`], [`Credentials`], [`TrustAnchors`] and finished
//! rustls or quinn configurations.

#[cfg(feature = "authority")]
pub mod authority;
mod certificate;
pub mod credentials;
pub mod identity;
pub mod inspect;
pub mod revocation;
pub mod tls;
pub mod verify;

#[cfg(feature = "authority")]
pub use authority::{
    Authority, AuthorityError, IssueRequest, IssuedCertificate, IssuedPaths, Overwrite, Purpose,
    RevocationFile,
};
pub use credentials::{Credentials, LoadError, ReloadableCredentials, TrustAnchors};
pub use identity::{Identity, IdentityError, Segment, TrustDomain};
pub use inspect::{CertificateSummary, explain};
pub use revocation::{RevocationList, Revoked, Serial, SerialError};
pub use tls::{
    ClientAuth, ServerIdentity, TlsError, negotiated_group, provider, quic_client_config,
    quic_server_config, tcp_client_config, tcp_server_config,
};
pub use verify::{
    CertificateRefused, RefusalReason, explain_connection_error, peer_certificate_description,
    peer_certificates, peer_identity, peer_identity_of_quinn, refusal_of_io, refusal_of_tls,
    was_revoked,
};
