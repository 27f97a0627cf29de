//! What one identity or one tenant may use: over it there is an answer, and nobody else notices.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use quinn::{ConnectionError, VarInt};
use selvedge_broker::config::{IdentityLimits, LimitOverride, Limits};
use selvedge_broker::policy::IdentityPattern;
use selvedge_client::{
    Client, Code, ConnectError, FlushError, Publish, PublishError, Qos, Status, SubscribeError,
};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::wire;
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, RawQuic, TestBroker, broker, raw};

use super::pubsub::next;

const REACHED: &str = "selvedge_limit_reached_total";

/// A broker with these limits and a plaintext listener on which everyone is `sensors`.
async fn limited(change: impl FnOnce(&mut Limits)) -> TestBroker {
    TestBroker::with(broker::OPEN, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
        change(&mut config.limits);
    })
    .await
}

fn exhausted(message: &str) -> Status {
    Status::new(Code::ResourceExhausted, message)
}

/// What a client is told that gives up soon.
async fn refused(broker: &TestBroker, device: &str, session: &str) -> Status {
    let options = broker.options(broker.device(device)).session(session);
    let hurry = options.connect_timeout(Duration::from_millis(500));
    match within("the refusal", Client::connect(hurry)).await {
        Err(ConnectError::Goodbye(status)) => status,
        other => panic!("expected a goodbye, found {other:?}"),
    }
}

#[tokio::test]
async fn one_connection_too_many_is_told_so_and_a_takeover_is_not_one() {
    let broker = limited(|limits| limits.identity.connections = Some(1)).await;
    let options = || broker.options(broker.device("press-7")).session("main");
    let first = broker.connect(options()).await;
    let sentence =
        "identity spiffe://test.example/acme/plant-1/press-7 has as many connections as it may: 1";
    assert_eq!(
        refused(&broker, "press-7", "other").await,
        exhausted(sentence)
    );
    let limit = [("limit", "identity.connections")];
    broker.metric_reaches(REACHED, &limit, 1).await;
    let neighbour = broker.client("press-8").await;

    // The broker has not noticed yet that the first is gone, or it is not: the place is the same.
    let second = broker.connect(options()).await;
    let third = broker.connect(options().clean_start(true)).await;
    assert_eq!(
        refused(&broker, "press-7", "other").await,
        exhausted(sentence)
    );
    third.close().await;
    let fourth = broker
        .connect(broker.options(broker.device("press-7")).session("other"))
        .await;
    fourth.publish("a", "b").await.unwrap();
    neighbour.publish("a", "b").await.unwrap();
    drop((first, second));
}

#[tokio::test]
async fn an_mqtt_client_too_many_is_told_so_and_a_takeover_is_not_one() {
    let broker = limited(|limits| limits.tenant.connections = Some(1)).await;
    for (version, word) in [
        (MqttVersion::V5, "QuotaExceeded"),
        (MqttVersion::V311, "ServiceUnavailable"),
    ] {
        let options = |id: &str| MqttOptions::new(version, broker.mqtt(), id);
        let mut first = MqttPeer::connect(options("a")).await.unwrap();
        let refusal = MqttPeer::connect(options("b")).await.unwrap_err();
        assert!(refusal.contains(word), "{refusal}");
        let second = MqttPeer::connect(options("a")).await.unwrap();
        first.closed().await;
        // Another tenant has its own.
        broker.client("other/plant-1/press-1").await.close().await;
        second.disconnect().await;
        eventually("the place to be free", || async {
            let peer = MqttPeer::connect(options("b")).await.ok()?;
            peer.disconnect().await;
            Some(())
        })
        .await;
    }
}

#[tokio::test]
async fn one_subscription_too_many_is_told_so() {
    let broker = limited(|limits| limits.tenant.subscriptions = Some(2)).await;
    let (one, two) = (
        broker.client("panel-1").await,
        broker.client("panel-2").await,
    );
    let held = one.subscribe("a").await.unwrap();
    let _other = two.subscribe("b").await.unwrap();
    let sentence = "tenant acme has as many subscriptions as it may: 2";
    match two.subscribe("c").await {
        Err(SubscribeError::Refused(status)) => assert_eq!(status, exhausted(sentence)),
        other => panic!("{other:?}"),
    }
    for (version, word) in [
        (MqttVersion::V5, "QuotaExceeded"),
        (MqttVersion::V311, "Failure"),
    ] {
        let options = MqttOptions::new(version, broker.mqtt(), "sensor-1");
        let mut sensor = MqttPeer::connect(options).await.unwrap();
        assert_eq!(sensor.subscribe("c", 1).await.reason, word);
    }
    let limit = [("limit", "tenant.subscriptions")];
    assert_eq!(broker.metric(REACHED, &limit).await, 3);
    let stranger = broker.client("other/plant-1/panel-1").await;
    stranger.subscribe("a").await.unwrap();
    drop(held);
    eventually("a subscription to be free", || async {
        two.subscribe("c").await.ok()
    })
    .await;
}

#[tokio::test]
async fn who_publishes_too_fast_is_told_when_to_come_again() {
    let broker = limited(|limits| {
        limits.overrides.push(LimitOverride {
            identities: vec![IdentityPattern::parse("acme/*/press-*").unwrap()],
            limits: IdentityLimits {
                publish_rate: Some(1),
                ..IdentityLimits::default()
            },
        });
    })
    .await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut seen = panel.subscribe("a").await.unwrap();
    let sentence =
        "identity spiffe://test.example/acme/plant-1/press-7 may publish 1 messages a second";
    let check = |status: Status| {
        let wait = status.retry_after.unwrap();
        assert!(
            wait > Duration::ZERO && wait <= Duration::from_secs(1),
            "{wait:?}"
        );
        assert_eq!(status, exhausted(sentence).retry_after(wait));
    };
    let message = || Publish::new("a", "b").qos(Qos::AtLeastOnce);
    let answers = join_all((0..20).map(|_| press.publish_message(message()))).await;
    let mut taken = 0;
    for answer in answers {
        match answer {
            Ok(_) => taken += 1,
            Err(PublishError::Refused(status)) => check(status),
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!((1..20).contains(&taken), "{taken} of 20");
    for _ in 0..taken {
        next(&mut seen).await;
    }
    // QoS 0 hears of it with the next flush.
    for _ in 0..20 {
        let _ = press.publish("c", "d").await;
    }
    match press.flush().await {
        Err(FlushError::Refused(status)) => check(status),
        other => panic!("{other:?}"),
    }
    let limit = [("limit", "identity.publish_rate")];
    assert!(broker.metric(REACHED, &limit).await > 0);
    // Nobody else is held to it.
    for _ in 0..20 {
        panel.publish_message(message()).await.unwrap();
    }
}

#[tokio::test]
async fn mqtt_5_is_told_of_the_rate_and_mqtt_3_is_slowed_down() {
    const RATE: usize = 2;
    let broker = limited(|limits| limits.tenant.publish_rate = Some(RATE)).await;
    let options = |version| MqttOptions::new(version, broker.mqtt(), "sensor-1");
    let mut modern = MqttPeer::connect(options(MqttVersion::V5)).await.unwrap();
    let refusal = loop {
        let answer = modern.publish("a", 1, "b").await;
        if answer.reason != "Success" {
            break answer;
        }
    };
    assert_eq!(refusal.reason, "QuotaExceeded");
    let sentence = "tenant acme may publish 2 messages a second";
    assert_eq!(refusal.text.as_deref(), Some(sentence));
    modern.disconnect().await;

    let panel = broker.client("panel-1").await;
    let mut seen = panel.subscribe("a").await.unwrap();
    let mut old = MqttPeer::connect(options(MqttVersion::V311)).await.unwrap();
    let begun = Instant::now();
    for number in 0..5 {
        let answer = old.publish("a", 1, number.to_string()).await;
        assert_eq!(answer.reason, "Success");
        assert_eq!(next(&mut seen).await.payload, number.to_string());
    }
    // Two at once, then one every half second.
    assert!(
        begun.elapsed() >= Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    // The tenant next door has its own rate.
    let stranger = broker.client("other/plant-1/press-1").await;
    stranger
        .publish_message(Publish::new("a", "b").qos(Qos::AtLeastOnce))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_message_too_large_for_its_identity_is_refused_before_it_is_sent() {
    let broker = limited(|limits| limits.identity.message_bytes = Some(64 << 10)).await;
    let press = broker.client("press-7").await;
    let message =
        |bytes: usize| Publish::new("a", Bytes::from(vec![7; bytes])).qos(Qos::AtLeastOnce);
    press.publish_message(message(60 << 10)).await.unwrap();
    match press.publish_message(message(70 << 10)).await {
        Err(PublishError::TooLarge { limit, .. }) => assert_eq!(limit, 64 << 10),
        other => panic!("{other:?}"),
    }

    // A client that does not mind is sent away before the broker has read more than the head.
    let config = raw::quic_config(broker.device("press-8"), &broker.pki.anchors());
    let rude = RawQuic::connect(broker.quic(), config).await.unwrap();
    let _control = rude.greet("main").await.unwrap();
    let header = wire::LaneHeader {
        lane: 1,
        ..Default::default()
    };
    let mut bytes = BytesMut::from(&frame::encode(Kind::LANE, &header)[..]);
    frame::put_head(&mut bytes, Kind::MESSAGE, 70 << 10);
    let mut lane = rude.connection.open_uni().await.unwrap();
    lane.write_all(&bytes).await.unwrap();
    match rude.closed().await {
        ConnectionError::ApplicationClosed(close) => {
            let code = VarInt::from(Code::InvalidArgument.to_quic());
            assert_eq!(close.error_code, code);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_queues_of_an_identity_hold_no_more_than_they_may() {
    let broker = limited(|limits| limits.identity.queue_bytes = Some(64 << 10)).await;
    let options = || {
        let options = broker.options(broker.device("panel-1"));
        options.session_expiry(Duration::from_secs(600))
    };
    let panel = broker.connect(options()).await;
    let held = panel.subscribe("a/#").await.unwrap();
    panel.close().await;
    drop(held);
    let other = broker.client("panel-2").await;
    let mut seen = other.subscribe("a/#").await.unwrap();
    let press = broker.client("press-7").await;
    let payload = Bytes::from(vec![7; 15 << 10]);
    for number in 0..8 {
        let topic = format!("a/{number}");
        let message = Publish::new(&topic, payload.clone()).qos(Qos::AtLeastOnce);
        press.publish_message(message).await.unwrap();
        assert_eq!(next(&mut seen).await.topic.as_str(), topic);
    }
    // Four fit; the rest was given up and counted.
    let full = [("reason", "queue_full")];
    assert_eq!(
        broker
            .metric("selvedge_dropped_messages_total", &full)
            .await,
        4
    );
    let limit = [("limit", "identity.queue_bytes")];
    assert_eq!(broker.metric(REACHED, &limit).await, 4);
}
