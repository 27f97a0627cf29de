//! Who may connect, what a refused peer gets to read, and what identities cannot see or forge.

use selvedge_certs::explain_connection_error;
use selvedge_client::{Client, Code, ConnectError, Credentials};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::lane::{Flags, put_message};
use selvedge_proto::{message::Qos, wire};
use selvedge_tests::wait::within;
use selvedge_tests::{RawQuic, TestBroker, TestPki, raw};

const REFUSED: &str = "selvedge_refused_connections_total";

/// The broker's sentence about a refused certificate from its reason on; before it comes the
/// certificate's name with a random serial number.
async fn refusal(broker: &TestBroker, credentials: Credentials) -> String {
    let connecting = Client::connect(broker.options(credentials));
    match within("the refusal", connecting).await.unwrap_err() {
        ConnectError::Refused { reason } => {
            let (certificate, reason) = reason.split_once(" refused: ").unwrap();
            assert!(
                certificate.starts_with("certificate spiffe://test.example/acme/plant-1/press-7 "),
                "{certificate}"
            );
            reason.to_owned()
        }
        other => panic!("{other:?}"),
    }
}

async fn refused_here(broker: &TestBroker) {
    let labels = [("listener", "quic"), ("reason", "certificate_refused_here")];
    broker.metric_reaches(REFUSED, &labels, 1).await;
    assert_eq!(
        broker
            .metric("selvedge_accepted_connections_total", &[])
            .await,
        0
    );
}

#[tokio::test]
async fn a_device_of_another_authority_is_refused_and_told_so() {
    let broker = TestBroker::open().await;
    let stranger = TestPki::new().device("acme", "plant-1", "press-7");
    assert_eq!(
        refusal(&broker, stranger).await,
        "signed by an authority that is not trusted here (issuer CN=Selvedge authority of \
         test.example); issue one from a trusted authority or add that authority to the trust anchors"
    );
    refused_here(&broker).await;
}

#[tokio::test]
async fn an_expired_device_is_refused_and_told_when_it_expired() {
    let broker = TestBroker::open().await;
    let expired = broker.pki.expired_device("acme", "plant-1", "press-7");
    let reason = refusal(&broker, expired).await;
    assert!(reason.starts_with("expired on 20"), "{reason}");
    assert!(reason.ends_with(" UTC; issue a new one"), "{reason}");
    refused_here(&broker).await;
}

#[tokio::test]
async fn a_certificate_without_a_spiffe_identity_is_refused_whatever_its_common_name() {
    let broker = TestBroker::open().await;
    let config = raw::quic_config_with(broker.pki.nameless(), &broker.pki.ca_file());
    let peer = RawQuic::connect(broker.quic(), config).await.unwrap();
    let reason = explain_connection_error(&peer.closed().await);
    let (_, reason) = reason.split_once(" refused: ").unwrap();
    assert_eq!(
        reason,
        "has no SPIFFE identity: expected one URI spiffe://<trust-domain>/<tenant>/<site>/<name> in \
         the subject alternative name, found none; issue one that has it"
    );
    refused_here(&broker).await;
}

#[tokio::test]
async fn a_certificate_for_servers_cannot_be_a_client() {
    let broker = TestBroker::open().await;
    let identity = "spiffe://test.example/acme/plant-1/press-7";
    let certificate = broker.pki.server_only(identity);
    let config = raw::quic_config_with(certificate, &broker.pki.ca_file());
    let peer = RawQuic::connect(broker.quic(), config).await.unwrap();
    let reason = explain_connection_error(&peer.closed().await);
    let (_, reason) = reason.split_once(" refused: ").unwrap();
    assert!(reason.starts_with("not issued for "), "{reason}");
    assert!(reason.ends_with("; issue one for that purpose"), "{reason}");
    refused_here(&broker).await;
}

#[tokio::test]
async fn a_client_refuses_a_broker_of_another_authority_and_says_so() {
    let broker = TestBroker::open().await;
    let options = broker
        .options(broker.device("press-7"))
        .trust(TestPki::new().anchors());
    match within("the refusal", Client::connect(options))
        .await
        .unwrap_err()
    {
        ConnectError::Tls { reason } => {
            assert!(
                reason.contains("signed by an authority that is not trusted here"),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
    let labels = [("listener", "quic"), ("reason", "refused_by_peer")];
    broker.metric_reaches(REFUSED, &labels, 1).await;
}

#[tokio::test]
async fn the_broker_welcomes_a_device_with_its_identity_over_post_quantum_key_exchange() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let state = press.state().borrow().clone();
    match state {
        selvedge_client::State::Connected {
            session_present,
            identity,
            key_exchange,
            ..
        } => {
            assert!(!session_present);
            assert_eq!(identity.uri(), "spiffe://test.example/acme/plant-1/press-7");
            assert_eq!(&*key_exchange, "X25519MLKEM768");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_tenant_sees_neither_messages_nor_services_of_another() {
    let broker = TestBroker::open().await;
    let press = broker.client("acme/plant-1/press-7").await;
    let spy = broker.client("globex/plant-1/press-7").await;
    let mut everything = spy.subscribe("#").await.unwrap();
    let mut own = press.subscribe("press/7/temp").await.unwrap();
    let _service = press.serve("press-7/stop").await.unwrap();

    press.publish("press/7/temp", "71.3").await.unwrap();
    assert_eq!(own.next().await.unwrap().payload, "71.3");
    let error = spy.call("press-7/stop", "now").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);

    // What the spy receives first is its own: nothing of the other tenant came before.
    spy.publish("press/7/temp", "mine").await.unwrap();
    assert_eq!(everything.next().await.unwrap().payload, "mine");
    assert_eq!(spy.stats().delivered, 1);
}

#[tokio::test]
async fn a_publisher_cannot_forge_the_identity_on_its_messages() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut seen = panel.subscribe("press/#").await.unwrap();
    let config = raw::quic_config(broker.device("press-7"), &broker.pki.anchors());
    let forger = RawQuic::connect(broker.quic(), config).await.unwrap();
    let _control = forger.greet("forger").await.unwrap();

    let mut lane = bytes::BytesMut::new();
    let header = wire::LaneHeader {
        lane: 1,
        ..Default::default()
    };
    frame::append(&mut lane, Kind::LANE, &header);
    let bind = wire::Bind {
        alias: 1,
        topic: "press/7/temp".into(),
        publisher: "spiffe://test.example/acme/plant-1/manager".into(),
    };
    frame::append(&mut lane, Kind::BIND, &bind);
    put_message(&mut lane, Flags::new(Qos::AtMostOnce), 1, None, b"71.3");
    let mut stream = forger.connection.open_uni().await.unwrap();
    stream.write_all(&lane).await.unwrap();

    let message = within("the message", seen.next()).await.unwrap();
    assert_eq!(
        &*message.publisher,
        "spiffe://test.example/acme/plant-1/press-7"
    );
}
