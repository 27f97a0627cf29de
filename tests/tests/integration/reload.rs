//! Policy and certificates change while the broker runs, and no connection is dropped.

use selvedge_client::{Code, Publish, PublishError, Qos, SubscribeError};
use selvedge_tests::broker::OPEN;
use selvedge_tests::wait::within;
use selvedge_tests::{RawQuic, TestBroker, raw};

use super::pubsub::next;

/// As [`OPEN`], but nobody has anything to do with what is secret.
const SECRETIVE: &str = r##"
[[rule]]
name = "everyone"
identities = ["*/*/*"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["#"]

[[rule]]
name = "secrets stay where they are"
identities = ["*/*/*"]
deny = ["publish", "subscribe", "call", "serve"]
subjects = ["secret/#"]
"##;

fn message(topic: &str) -> Publish {
    Publish::new(topic, "x").qos(Qos::AtLeastOnce)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_policy_holds_for_connections_that_are_there() {
    let mut broker = TestBroker::open().await;
    let reader = broker.client("reader").await;
    let writer = broker.client("writer").await;
    let mut all = reader.subscribe("#").await.unwrap();
    let mut secret = reader.subscribe("secret/+").await.unwrap();
    writer.publish_message(message("secret/a")).await.unwrap();
    assert_eq!(next(&mut all).await.topic.as_str(), "secret/a");
    assert_eq!(next(&mut secret).await.topic.as_str(), "secret/a");

    broker.reload(SECRETIVE);
    // The topic is open on the writer's lane, and denied all the same.
    let denied = within("an answer", writer.publish_message(message("secret/a"))).await;
    let Err(PublishError::Refused(status)) = denied else {
        panic!("expected a denial, found {denied:?}");
    };
    let rule = status.denial.and_then(|denial| denial.rule);
    assert_eq!(rule.as_deref(), Some("secrets stay where they are"));
    let denied = reader.subscribe("secret/b").await.unwrap_err();
    assert!(
        matches!(denied, SubscribeError::Refused(status) if status.code == Code::PermissionDenied)
    );
    writer.publish_message(message("open")).await.unwrap();
    assert_eq!(next(&mut all).await.topic.as_str(), "open");

    broker.reload(OPEN);
    writer.publish_message(message("secret/c")).await.unwrap();
    assert_eq!(next(&mut all).await.topic.as_str(), "secret/c");
    let reconnects = reader.stats().reconnects + writer.stats().reconnects;
    assert_eq!(reconnects, 0, "nobody was disconnected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_subscription_no_longer_sees_what_the_new_policy_denies() {
    let mut broker = TestBroker::open().await;
    let reader = broker.client("reader").await;
    let mut all = reader.subscribe("#").await.unwrap();
    // It may still be published there, so that there is something not to see.
    let publisher_allowed = SECRETIVE.replace(
        r#"deny = ["publish", "subscribe""#,
        r#"deny = ["subscribe""#,
    );
    broker.reload(&publisher_allowed);
    let writer = broker.client("writer").await;
    writer.publish_message(message("secret/a")).await.unwrap();
    writer.publish_message(message("open")).await.unwrap();
    assert_eq!(next(&mut all).await.topic.as_str(), "open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_the_new_policy_denies_is_withdrawn() {
    let mut broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let caller = broker.client("caller").await;
    let mut calls = press.serve("secret/speed").await.unwrap();
    let asker = caller.clone();
    let asked = tokio::spawn(async move { asker.call("secret/speed", "1").await });
    let mut call = within("a call", calls.next()).await.unwrap();
    let request = call.request().await.unwrap();
    call.reply(request).await.unwrap();
    assert_eq!(asked.await.unwrap().unwrap(), "1");
    // Calls are allowed there, so what is missing is the responder.
    broker.reload(&SECRETIVE.replace(r#""call", "serve"]"#, r#""serve"]"#));
    let error = within("an answer", caller.call("secret/speed", "2"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_used_for_new_connections_and_drops_none() {
    let mut broker = TestBroker::open().await;
    let early = broker.client("early").await;
    let mut subscription = early.subscribe("a").await.unwrap();
    let before = broker.config.credentials.description();
    broker.config.credentials = broker.pki.server();
    assert_ne!(before, broker.config.credentials.description());
    broker.reload_config();
    let device = broker.device("late");
    let config = raw::quic_config(device, &broker.pki.anchors());
    let peer = RawQuic::connect(broker.quic(), config).await.unwrap();
    let chain = peer.connection.peer_identity().unwrap();
    let chain: Box<Vec<rustls::pki_types::CertificateDer<'static>>> = chain.downcast().unwrap();
    let seen = selvedge_certs::peer_certificate_description(&chain);
    let new = broker.config.credentials.description();
    // Both begin with identity and serial number.
    assert_eq!(seen.split(',').next(), new.split(',').next());
    let late = broker.client("late").await;
    late.publish_message(message("a")).await.unwrap();
    assert_eq!(next(&mut subscription).await.topic.as_str(), "a");
    assert_eq!(early.stats().reconnects, 0);
}
