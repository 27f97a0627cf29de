//! Real quinn endpoints on loopback: who gets in, and what both ends are told when nobody does.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, ServerConfig};
use selvedge_certs::{
    Authority, IdentityError, IssueRequest, TrustAnchors, explain_connection_error,
    negotiated_group, peer_identity_of_quinn, provider, quic_client_config, quic_server_config,
};
use time::macros::datetime;

use crate::pki::{CLIENT, Ca, Issued, Leaf, SERVER};

/// Any protocol will do: these tests are about certificates.
pub(crate) const ALPN: &[u8] = b"test/1";

pub(crate) type Outcome = Result<Connection, ConnectionError>;

/// Both ends of one attempt to connect. The endpoints live as long as the caller looks.
pub(crate) struct Attempt {
    pub(crate) server: Outcome,
    pub(crate) client: Outcome,
    _endpoints: [Endpoint; 2],
}

pub(crate) async fn attempt(server: QuicServerConfig, client: QuicClientConfig) -> Attempt {
    let any_port: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let listener = Endpoint::server(ServerConfig::with_crypto(Arc::new(server)), any_port).unwrap();
    let mut dialler = Endpoint::client(any_port).unwrap();
    dialler.set_default_client_config(ClientConfig::new(Arc::new(client)));
    let connecting = dialler
        .connect(listener.local_addr().unwrap(), "localhost")
        .unwrap();
    let (server, client) =
        tokio::join!(async { listener.accept().await.unwrap().await }, connecting);
    Attempt {
        server,
        client,
        _endpoints: [listener, dialler],
    }
}

/// Why an end was turned away. In TLS 1.3 a client is done before the server has read its
/// certificate, so its refusal may come as the end of a connection that seemed open.
pub(crate) async fn turned_away(outcome: Outcome) -> ConnectionError {
    match outcome {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    }
}

fn good_server(ca: &Ca) -> QuicServerConfig {
    let credentials = ca.issue(&Leaf::good(SERVER)).credentials();
    quic_server_config(&credentials, &ca.anchors(), Some("plant.example"), &[ALPN]).unwrap()
}

fn good_client(ca: &Ca) -> QuicClientConfig {
    let credentials = ca.issue(&Leaf::good(CLIENT)).credentials();
    quic_client_config(&credentials, &ca.anchors(), &[ALPN]).unwrap()
}

/// A client that presents whatever it has, as somebody else's software would.
fn any_client(ca: &Ca, presented: &Issued) -> QuicClientConfig {
    let (chain, key) = presented.raw();
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(ca.roots())
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.try_into().unwrap()
}

/// A server that presents whatever it has and lets everybody in.
fn any_server(presented: &Issued) -> QuicServerConfig {
    let (chain, key) = presented.raw();
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.try_into().unwrap()
}

const NAME: &str = "spiffe://plant.example/acme/hall-1/press-7 (serial 1a2b)";
const NAMELESS: &str = "with subject CN=somebody (serial 1a2b)";
const EXPECTED_URI: &str = "expected one URI spiffe://<trust-domain>/<tenant>/<site>/<name> \
                            in the subject alternative name";

#[tokio::test]
async fn peers_of_one_authority_meet_over_a_post_quantum_key_exchange() {
    let authority = Authority::create("plant.example").unwrap();
    let anchors = TrustAnchors::from_pem(authority.ca_pem().as_bytes()).unwrap();
    let broker = authority
        .issue(&IssueRequest::server("acme", "cloud", "broker-1").dns("localhost"))
        .unwrap();
    let device = authority
        .issue(&IssueRequest::client("acme", "hall-1", "press-7"))
        .unwrap();
    let server = quic_server_config(
        broker.credentials(),
        &anchors,
        Some("plant.example"),
        &[ALPN],
    )
    .unwrap();
    let client = quic_client_config(device.credentials(), &anchors, &[ALPN]).unwrap();

    let attempt = attempt(server, client).await;
    let (server, client) = (attempt.server.unwrap(), attempt.client.unwrap());

    assert_eq!(
        peer_identity_of_quinn(&server).unwrap().uri(),
        "spiffe://plant.example/acme/hall-1/press-7"
    );
    assert_eq!(
        peer_identity_of_quinn(&client).unwrap().uri(),
        "spiffe://plant.example/acme/cloud/broker-1"
    );
    for end in [&server, &client] {
        assert_eq!(negotiated_group(end).as_deref(), Some("X25519MLKEM768"));
    }
}

#[tokio::test]
async fn a_broker_dials_another_broker_with_its_server_certificate() {
    let authority = Authority::create("plant.example").unwrap();
    let anchors = TrustAnchors::from_pem(authority.ca_pem().as_bytes()).unwrap();
    let broker = authority
        .issue(&IssueRequest::server("acme", "cloud", "broker-1").dns("localhost"))
        .unwrap()
        .credentials();
    let server = quic_server_config(&broker, &anchors, None, &[ALPN]).unwrap();
    let client = quic_client_config(&broker, &anchors, &[ALPN]).unwrap();
    assert!(attempt(server, client).await.server.is_ok());
}

#[tokio::test]
async fn an_anonymous_peer_has_no_identity() {
    let ca = Ca::new("authority");
    let server = any_server(&ca.issue(&Leaf::good(SERVER)));
    let attempt = attempt(server, good_client(&ca)).await;
    assert_eq!(
        peer_identity_of_quinn(&attempt.server.unwrap()),
        Err(IdentityError::NoCertificate)
    );
}

#[tokio::test]
async fn a_refused_client_and_the_server_that_refused_it_read_the_same_sentence() {
    let ca = Ca::new("authority");
    let stranger = Ca::new("strangers");
    let namesake = Ca::new("authority");
    let good = || Leaf::good(CLIENT);
    let table: Vec<(&Ca, Leaf, String)> = vec![
        (
            &ca,
            Leaf { not_after: datetime!(2021-01-31 12:30 UTC), ..good() },
            format!("certificate {NAME} refused: expired on 2021-01-31 12:30 UTC; issue a new one"),
        ),
        (
            &ca,
            Leaf { not_before: datetime!(2119-01-01 0:00 UTC), ..good() },
            format!("certificate {NAME} refused: not valid before 2119-01-01 00:00 UTC; check the clocks of both machines"),
        ),
        (
            &stranger,
            good(),
            format!("certificate {NAME} refused: signed by an authority that is not trusted here (issuer CN=strangers); issue one from a trusted authority or add that authority to the trust anchors"),
        ),
        (
            &namesake,
            good(),
            format!("certificate {NAME} refused: signed by an authority that is not trusted here (issuer CN=authority); issue one from a trusted authority or add that authority to the trust anchors"),
        ),
        (
            &ca,
            Leaf::good(SERVER),
            format!("certificate {NAME} refused: not issued for client authentication (its purposes: server authentication); issue one for that purpose"),
        ),
        (
            &ca,
            Leaf { uris: &[], ..good() },
            format!("certificate {NAMELESS} refused: has no SPIFFE identity: {EXPECTED_URI}, found none; issue one that has it"),
        ),
        (
            &ca,
            Leaf {
                uris: &["spiffe://plant.example/acme/hall-1/press-7", "spiffe://plant.example/other/hall-1/press-7"],
                ..good()
            },
            format!("certificate {NAMELESS} refused: has no SPIFFE identity: {EXPECTED_URI}, found 2; issue one that has it"),
        ),
        (
            &ca,
            Leaf { uris: &["https://plant.example/acme/hall-1/press-7"], ..good() },
            format!("certificate {NAMELESS} refused: has no SPIFFE identity: expected a URI spiffe://<trust-domain>/<tenant>/<site>/<name>, found `https://plant.example/acme/hall-1/press-7`; issue one that has it"),
        ),
        (
            &ca,
            Leaf { uris: &["spiffe://plant.example/acme/../press-7"], ..good() },
            format!("certificate {NAMELESS} refused: has no SPIFFE identity: expected a site of 1 to 128 characters from A-Z a-z 0-9 . - _, other than `.` and `..`, found `..`; issue one that has it"),
        ),
        (
            &ca,
            Leaf { uris: &["spiffe://other.example/acme/hall-1/press-7"], ..good() },
            "certificate spiffe://other.example/acme/hall-1/press-7 (serial 1a2b) refused: belongs to trust domain other.example, expected plant.example; issue one in that trust domain".into(),
        ),
    ];
    for (issuer, leaf, sentence) in table {
        let client = any_client(&ca, &issuer.issue(&leaf));
        let attempt = attempt(good_server(&ca), client).await;
        let at_server = turned_away(attempt.server).await;
        let at_client = turned_away(attempt.client).await;
        assert_eq!(explain_connection_error(&at_server), sentence);
        assert_eq!(
            explain_connection_error(&at_client),
            format!("the peer refused us: {sentence}")
        );
        assert_blames_the_certificate(&at_client, &sentence);
    }
}

#[tokio::test]
async fn a_refused_server_and_the_client_that_refused_it_read_the_same_sentence() {
    let ca = Ca::new("authority");
    let stranger = Ca::new("strangers");
    let good = || Leaf::good(SERVER);
    let table: Vec<(&Ca, Leaf, String)> = vec![
        (
            &ca,
            Leaf {
                not_after: datetime!(2021-01-31 12:30 UTC),
                ..good()
            },
            format!("certificate {NAME} refused: expired on 2021-01-31 12:30 UTC; issue a new one"),
        ),
        (
            &stranger,
            good(),
            format!(
                "certificate {NAME} refused: signed by an authority that is not trusted here (issuer CN=strangers); issue one from a trusted authority or add that authority to the trust anchors"
            ),
        ),
        (
            &ca,
            Leaf::good(CLIENT),
            format!(
                "certificate {NAME} refused: not issued for server authentication (its purposes: client authentication); issue one for that purpose"
            ),
        ),
        (
            &ca,
            Leaf {
                host: Some("broker.example"),
                ..good()
            },
            format!(
                "certificate {NAME} refused: does not name the host localhost (it names: broker.example, 127.0.0.1); connect to a host it names or issue one that names this host"
            ),
        ),
        (
            &ca,
            Leaf {
                uris: &[],
                ..good()
            },
            format!(
                "certificate {NAMELESS} refused: has no SPIFFE identity: {EXPECTED_URI}, found none; issue one that has it"
            ),
        ),
    ];
    for (issuer, leaf, sentence) in table {
        let server = any_server(&issuer.issue(&leaf));
        let attempt = attempt(server, good_client(&ca)).await;
        let at_client = attempt.client.unwrap_err();
        let at_server = turned_away(attempt.server).await;
        assert_eq!(explain_connection_error(&at_client), sentence);
        assert_eq!(
            explain_connection_error(&at_server),
            format!("the peer refused us: {sentence}")
        );
        assert_blames_the_certificate(&at_server, &sentence);
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new("authority");
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(ca.roots())
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let attempt = attempt(good_server(&ca), config.try_into().unwrap()).await;
    for end in [attempt.server, attempt.client] {
        let message = explain_connection_error(&turned_away(end).await);
        assert!(message.contains("peer sent no certificates"), "{message}");
    }
}

#[tokio::test]
async fn replaced_credentials_and_anchors_hold_from_the_next_handshake() {
    let old = Authority::create("plant.example").unwrap();
    let new = Authority::create("plant.example").unwrap();
    let anchors_of =
        |authority: &Authority| TrustAnchors::from_pem(authority.ca_pem().as_bytes()).unwrap();
    let broker_of = |authority: &Authority| {
        let request = IssueRequest::server("acme", "cloud", "broker-1").dns("localhost");
        authority.issue(&request).unwrap().credentials()
    };
    let device = old
        .issue(&IssueRequest::client("acme", "hall-1", "press-7"))
        .unwrap()
        .credentials();

    let presented = selvedge_certs::ReloadableCredentials::new(broker_of(&old));
    let trusted = anchors_of(&old);
    let server = || quic_server_config(&presented, &trusted, None, &[ALPN]).unwrap();
    let client =
        |anchors: &Authority| quic_client_config(&device, &anchors_of(anchors), &[ALPN]).unwrap();
    // Made before anything is replaced, so that it is the configuration itself that follows.
    let (first, second, third) = (server(), server(), server());

    assert!(attempt(first, client(&old)).await.server.is_ok());

    presented.replace(broker_of(&new));
    let unaware = attempt(second, client(&old)).await;
    let message = explain_connection_error(&unaware.client.unwrap_err());
    assert!(message.contains("not trusted here"), "{message}");

    trusted.replace(&anchors_of(&new));
    let late = attempt(third, client(&new)).await;
    let message = explain_connection_error(&turned_away(late.server).await);
    assert!(message.contains("not trusted here"), "{message}");
}

/// The close frame itself, as another implementation reads it: the alert certificate_unknown
/// (46), with the sentence in its reason.
fn assert_blames_the_certificate(error: &ConnectionError, sentence: &str) {
    let ConnectionError::ConnectionClosed(close) = error else {
        panic!("expected a close by the peer, found {error:?}");
    };
    assert_eq!(u64::from(close.error_code), 0x100 + 46);
    let reason = std::str::from_utf8(&close.reason).unwrap();
    assert!(reason.contains(sentence), "{reason}");
}
