//! TLS as it runs over TCP, with both ends in memory: versions, anonymous clients, alerts.

use std::io;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Error, HandshakeKind, ProtocolVersion,
    ServerConfig, ServerConnection,
};
use selvedge_certs::{
    ClientAuth, RefusalReason, ServerIdentity, TlsError, peer_identity, provider, refusal_of_io,
    refusal_of_tls, tcp_client_config, tcp_server_config,
};

use crate::pki::{CLIENT, Ca, Leaf, SERVER};

struct Ends {
    client: ClientConnection,
    server: ServerConnection,
}

/// What the client and what the server objected to.
type Objections = Box<(Option<Error>, Option<Error>)>;

/// Carries bytes to and fro until both ends are content or one objects.
fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Result<Ends, Objections> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut ends = Ends {
        client: ClientConnection::new(client.clone(), name).unwrap(),
        server: ServerConnection::new(server.clone()).unwrap(),
    };
    let (mut at_client, mut at_server) = (None, None);
    loop {
        let mut idle = true;
        while ends.client.wants_write() {
            idle = false;
            let mut bytes = Vec::new();
            ends.client.write_tls(&mut bytes).unwrap();
            feed(&mut bytes.as_slice(), |rd| ends.server.read_tls(rd));
            if let Err(error) = ends.server.process_new_packets() {
                at_server.get_or_insert(error);
            }
        }
        while ends.server.wants_write() {
            idle = false;
            let mut bytes = Vec::new();
            ends.server.write_tls(&mut bytes).unwrap();
            feed(&mut bytes.as_slice(), |rd| ends.client.read_tls(rd));
            if let Err(error) = ends.client.process_new_packets() {
                at_client.get_or_insert(error);
            }
        }
        if idle {
            break;
        }
    }
    match (at_client, at_server) {
        (None, None) => Ok(ends),
        (client, server) => Err(Box::new((client, server))),
    }
}

fn feed(bytes: &mut &[u8], mut read: impl FnMut(&mut dyn io::Read) -> io::Result<usize>) {
    while !bytes.is_empty() && read(bytes).is_ok_and(|count| count > 0) {}
}

fn server(ca: &Ca, client_auth: ClientAuth<'_>) -> Arc<ServerConfig> {
    let credentials = ca.issue(&Leaf::good(SERVER)).credentials();
    tcp_server_config(&credentials, client_auth, Some("plant.example"), &[]).unwrap()
}

fn client(ca: &Ca, leaf: &Leaf) -> Arc<ClientConfig> {
    let credentials = ca.issue(leaf).credentials();
    tcp_client_config(
        Some(&credentials),
        &ca.anchors(),
        ServerIdentity::Spiffe,
        &[],
    )
    .unwrap()
}

fn anonymous(ca: &Ca) -> Arc<ClientConfig> {
    tcp_client_config(None, &ca.anchors(), ServerIdentity::Spiffe, &[]).unwrap()
}

#[test]
fn a_certificate_proves_who_the_client_is() {
    let ca = Ca::new("authority");
    let ends = handshake(
        &client(&ca, &Leaf::good(CLIENT)),
        &server(&ca, ClientAuth::Required(&ca.anchors())),
    )
    .unwrap();
    assert_eq!(
        ends.client.protocol_version(),
        Some(ProtocolVersion::TLSv1_3)
    );
    let identity = peer_identity(ends.server.peer_certificates().unwrap()).unwrap();
    assert_eq!(identity.name(), "press-7");
}

#[test]
fn devices_that_stop_at_tls_1_2_are_served_and_proven_too() {
    let ca = Ca::new("authority");
    let (chain, key) = ca.issue(&Leaf::good(CLIENT)).raw();
    let old = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(ca.roots())
        .with_client_auth_cert(chain, key)
        .unwrap();
    let ends = handshake(
        &Arc::new(old),
        &server(&ca, ClientAuth::Required(&ca.anchors())),
    )
    .unwrap();
    assert_eq!(
        ends.server.protocol_version(),
        Some(ProtocolVersion::TLSv1_2)
    );
    assert!(peer_identity(ends.server.peer_certificates().unwrap()).is_ok());
}

#[test]
fn the_refusing_end_has_the_sentence_and_the_refused_one_the_alert() {
    let ca = Ca::new("authority");
    let leaf = Leaf {
        uris: &["spiffe://other.example/acme/hall-1/press-7"],
        ..Leaf::good(CLIENT)
    };
    let anchors = ca.anchors();
    for client_auth in [
        ClientAuth::Required(&anchors),
        ClientAuth::Optional(&anchors),
    ] {
        let (at_client, at_server) = *handshake(&client(&ca, &leaf), &server(&ca, client_auth))
            .map(|_| ())
            .unwrap_err();
        let at_server = at_server.unwrap();
        let refusal = refusal_of_tls(&at_server).unwrap();
        assert_eq!(
            refusal.certificate(),
            "spiffe://other.example/acme/hall-1/press-7 (serial 1a2b)"
        );
        assert_eq!(
            refusal.reason(),
            &RefusalReason::OtherTrustDomain {
                expected: "plant.example".parse().unwrap(),
                found: "other.example".into(),
            }
        );
        // As tokio-rustls hands it on.
        let wrapped = io::Error::new(io::ErrorKind::InvalidData, at_server.clone());
        assert_eq!(refusal_of_io(&wrapped), Some(refusal));
        assert_eq!(
            at_client,
            Some(Error::AlertReceived(AlertDescription::CertificateUnknown))
        );
    }
}

#[test]
fn a_certificate_may_be_required_or_optional() {
    let ca = Ca::new("authority");
    let anchors = ca.anchors();
    let (_, at_server) = *handshake(
        &anonymous(&ca),
        &server(&ca, ClientAuth::Required(&anchors)),
    )
    .map(|_| ())
    .unwrap_err();
    assert_eq!(at_server, Some(Error::NoCertificatesPresented));
    for client_auth in [ClientAuth::Optional(&anchors), ClientAuth::None] {
        let ends = handshake(&anonymous(&ca), &server(&ca, client_auth)).unwrap();
        assert!(ends.server.peer_certificates().is_none());
    }
}

#[test]
fn a_foreign_server_passes_only_where_its_identity_does_not_matter() {
    let ca = Ca::new("authority");
    let (chain, key) = ca
        .issue(&Leaf {
            uris: &[],
            ..Leaf::good(SERVER)
        })
        .raw();
    let foreign = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let foreign = Arc::new(foreign);
    let any = tcp_client_config(None, &ca.anchors(), ServerIdentity::Any, &[]).unwrap();
    assert!(handshake(&any, &foreign).is_ok());
    let (at_client, _) = *handshake(&anonymous(&ca), &foreign)
        .map(|_| ())
        .unwrap_err();
    let at_client = at_client.unwrap();
    assert!(matches!(
        refusal_of_tls(&at_client).unwrap().reason(),
        RefusalReason::NoIdentity(_)
    ));
}

#[test]
fn no_handshake_that_proves_an_identity_is_cut_short_by_resumption() {
    let ca = Ca::new("authority");
    let (chain, key) = ca.issue(&Leaf::good(CLIENT)).raw();
    // A client of rustls's defaults, which would resume if it could.
    let eager = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(ca.roots())
        .with_client_auth_cert(chain, key)
        .unwrap();
    let eager = Arc::new(eager);
    let anchors = ca.anchors();
    let table = [
        (ClientAuth::Required(&anchors), HandshakeKind::Full),
        (ClientAuth::Optional(&anchors), HandshakeKind::Full),
        (ClientAuth::None, HandshakeKind::Resumed),
    ];
    for (client_auth, expected) in table {
        let server = server(&ca, client_auth);
        assert_eq!(server.max_early_data_size, 0);
        handshake(&eager, &server).unwrap();
        let again = handshake(&eager, &server).unwrap();
        assert_eq!(again.server.handshake_kind(), Some(expected));
    }
}

#[test]
fn a_trust_domain_that_is_none_is_refused_before_anybody_connects() {
    let ca = Ca::new("authority");
    let credentials = ca.issue(&Leaf::good(SERVER)).credentials();
    let refused = tcp_server_config(
        &credentials,
        ClientAuth::Required(&ca.anchors()),
        Some("Plant.example"),
        &[],
    );
    assert!(matches!(refused, Err(TlsError::TrustDomain(_))));
}
