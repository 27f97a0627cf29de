//! Slow and greedy peers: bounded, counted, and nobody else's problem.

use std::time::Duration;

use selvedge_client::{Client, ConnectError, Publish, Qos, SubscribeOptions};
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{RawQuic, TestBroker, broker, raw};

use super::pubsub::next;

const QUEUE_BYTES: usize = 1 << 20;

#[tokio::test]
async fn a_subscriber_that_reads_nothing_delays_nobody_and_its_queue_stays_bounded() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        config.limits.queue_bytes = QUEUE_BYTES;
    })
    .await;
    let config = raw::quic_config(broker.device("deaf"), &broker.pki.anchors());
    let deaf = RawQuic::connect(broker.quic(), config).await.unwrap();
    let mut control = deaf.greet("deaf").await.unwrap();
    let subscription = wire::Subscription {
        id: 1,
        filter: "line/#".into(),
        ..Default::default()
    };
    let subscribe = wire::Subscribe {
        request_id: 1,
        subscriptions: vec![subscription],
    };
    control
        .write(&raw::control_frame(Frame::Subscribe(subscribe)))
        .await
        .unwrap();
    assert!(matches!(control.read().await.unwrap(), Frame::Reply(_)));

    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut line = panel.subscribe("line/#").await.unwrap();
    // Far more than a connection's flow control and a queue hold together.
    let image = bytes::Bytes::from(vec![7; 256 << 10]);
    for number in 0..64 {
        let topic = format!("line/{number}");
        let message = Publish::new(&topic, image.clone()).qos(Qos::AtLeastOnce);
        within("the acknowledgement", press.publish_message(message))
            .await
            .unwrap();
        assert_eq!(next(&mut line).await.topic.as_str(), topic);
    }
    let dropped = [("reason", "queue_full")];
    broker
        .metric_reaches("selvedge_dropped_messages_total", &dropped, 1)
        .await;
    let status = broker.get("/api/status").await;
    let queued = longest_queue(&status);
    assert!((1..=QUEUE_BYTES as u64).contains(&queued), "{status}");
}

/// The largest `queued_bytes` in the status of a broker.
fn longest_queue(status: &str) -> u64 {
    let numbers = status.split("\"queued_bytes\":").skip(1).map(|rest| {
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap();
        digits.parse().unwrap()
    });
    numbers.max().unwrap()
}

#[tokio::test]
async fn a_subscription_with_a_lane_of_its_own_does_not_hold_up_the_others() {
    let broker = TestBroker::open().await;
    let (camera, panel) = (
        broker.client("camera-3").await,
        broker.client("panel-1").await,
    );
    let own = SubscribeOptions {
        own_lane: true,
        queue: 1,
        ..Default::default()
    };
    let mut images = panel.subscribe_with("images", own).await.unwrap();
    let mut alarms = panel.subscribe("alarms").await.unwrap();
    let image = bytes::Bytes::from(vec![7; 256 << 10]);
    for _ in 0..40 {
        let message = Publish::new("images", image.clone()).qos(Qos::AtLeastOnce);
        camera.publish_message(message).await.unwrap();
    }
    // Nobody has taken an image, and the alarm is behind all of them.
    camera.publish("alarms", "door open").await.unwrap();
    assert_eq!(next(&mut alarms).await.payload, "door open");
    for _ in 0..40 {
        assert_eq!(next(&mut images).await.payload.len(), image.len());
    }
}

#[tokio::test]
async fn a_broker_that_is_full_says_so_and_takes_clients_again_when_there_is_room() {
    let broker = TestBroker::with(broker::OPEN, |config, _| config.limits.connections = 2).await;
    let first = broker.client("press-1").await;
    let _second = broker.client("press-2").await;
    let hurry = || {
        let options = broker.options(broker.device("press-3"));
        options.connect_timeout(Duration::from_millis(500))
    };
    let error = within("the refusal", Client::connect(hurry()))
        .await
        .unwrap_err();
    match error {
        ConnectError::Timeout { last, .. } => assert!(
            last.contains("the server refused to accept a new connection"),
            "{last}"
        ),
        other => panic!("{other:?}"),
    }
    let limit = [("reason", "connection_limit")];
    broker
        .metric_reaches("selvedge_refused_connections_total", &limit, 1)
        .await;
    first.close().await;
    eventually("a client to be let in", || async {
        Client::connect(hurry()).await.ok()
    })
    .await;
}
