//! Slow and greedy peers: bounded, counted, and nobody else's problem.

use std::time::Duration;

use bytes::Bytes;
use selvedge_broker::StoreConfig;
use selvedge_broker::config::DurabilityRules;
use selvedge_client::{
    Client, Code, ConnectError, Durability, FlushError, Overflow, Publish, PublishError, Qos,
    Status, SubscribeOptions, Subscription,
};
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
pub(crate) fn longest_queue(status: &str) -> u64 {
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
        options.connect_timeout(Duration::from_secs(2))
    };
    let error = within("the refusal", Client::connect(hurry()))
        .await
        .unwrap_err();
    match error {
        ConnectError::Goodbye(status) => {
            assert_eq!(status.code, Code::ResourceExhausted);
            let sentence = "the broker has as many connections as it may: try again later";
            assert_eq!(status.message, sentence);
        }
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

/// Refuses publishers while it is full, and holds little in this process.
fn refusing() -> SubscribeOptions {
    SubscribeOptions {
        overflow: Overflow::Refuse,
        queue: 1,
        ..SubscribeOptions::default()
    }
}

/// Payloads of this size fill a queue soon.
const BLOCK: usize = 64 << 10;

/// A block that begins with its number.
fn block(number: u32) -> Bytes {
    let mut block = vec![0; BLOCK];
    block[..4].copy_from_slice(&number.to_be_bytes());
    block.into()
}

fn number_of(payload: &[u8]) -> u32 {
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

/// Publishes numbered blocks with QoS 1 until one is refused; their count and the refusal.
async fn fill(client: &Client, topic: &str) -> (u32, Status) {
    let mut number = 0;
    loop {
        let message = Publish::new(topic, block(number)).qos(Qos::AtLeastOnce);
        match within("an answer", client.publish_message(message)).await {
            Ok(_) => number += 1,
            Err(PublishError::Refused(status)) => return (number, status),
            Err(other) => panic!("{other:?}"),
        }
    }
}

async fn take_blocks(subscription: &mut Subscription, numbers: std::ops::Range<u32>) {
    for number in numbers {
        assert_eq!(number_of(&next(subscription).await.payload), number);
    }
}

#[tokio::test]
async fn a_subscriber_that_refuses_when_full_makes_publishers_wait_and_loses_nothing() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        config.limits.queue_bytes = QUEUE_BYTES;
        config.limits.inflight_bytes = QUEUE_BYTES;
    })
    .await;
    let press = broker.client("press-7").await;
    let slow = broker.client("archive").await;
    let witness = broker.client("panel-1").await;
    let mut archive = slow.subscribe_with("line", refusing()).await.unwrap();
    let mut seen = witness.subscribe("line").await.unwrap();

    let (accepted, status) = fill(&press, "line").await;
    assert!(accepted > 0);
    assert_eq!(status.code, Code::ResourceExhausted);
    assert!(status.retry_after.is_some(), "{status:?}");
    // Of QoS 0 a flush and the next publish to the topic say so.
    press.publish("line", block(u32::MAX)).await.unwrap();
    let Err(FlushError::Refused(status)) = within("a flush", press.flush()).await else {
        panic!("expected a refusal");
    };
    assert_eq!(status.code, Code::ResourceExhausted);
    let again = press.publish("line", block(u32::MAX)).await;
    assert!(matches!(again, Err(PublishError::Refused(_))), "{again:?}");

    // Nobody else gets what one receiver has no room for.
    take_blocks(&mut seen, 0..accepted).await;
    take_blocks(&mut archive, 0..accepted).await;
    // The acknowledgement of what was read makes room.
    eventually("room again", || async {
        let message = Publish::new("line", block(accepted)).qos(Qos::AtLeastOnce);
        press.publish_message(message).await.ok()
    })
    .await;
    take_blocks(&mut seen, accepted..accepted + 1).await;
    take_blocks(&mut archive, accepted..accepted + 1).await;
    assert_eq!(
        broker.metric("selvedge_dropped_messages_total", &[]).await,
        0
    );
}

#[tokio::test]
async fn a_full_queue_on_disk_lowers_what_is_acknowledged_and_refuses_who_demands_disk() {
    let folder = tempfile::tempdir().unwrap();
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        config.limits.queue_bytes = QUEUE_BYTES;
        config.store = Some(StoreConfig {
            folder: folder.path().to_owned(),
            durability: DurabilityRules::all(true),
        });
    })
    .await;
    let kept = || {
        let options = broker.options(broker.device("archive"));
        let hour = Duration::from_secs(3600);
        broker.connect(options.session("kept").session_expiry(hour))
    };
    let archive = kept().await;
    let subscription = archive.subscribe("line").await.unwrap();
    archive.close().await;
    drop(subscription);

    let press = broker.client("press-7").await;
    let mut on_disk = 0;
    let reached = loop {
        let message = Publish::new("line", block(on_disk)).qos(Qos::AtLeastOnce);
        let ack = within("an acknowledgement", press.publish_message(message)).await;
        match ack.unwrap().durability {
            Some(Durability::Disk) => on_disk += 1,
            other => break other,
        }
        assert!(on_disk < 100, "the queue has a bound");
    };
    assert_eq!(
        reached,
        Some(Durability::Memory),
        "the receiver did not get it"
    );
    let demanding = Publish::new("line", block(u32::MAX))
        .qos(Qos::AtLeastOnce)
        .durability(Durability::Disk);
    let refused = within("an answer", press.publish_message(demanding.clone())).await;
    let Err(PublishError::Refused(status)) = refused else {
        panic!("expected a refusal, found {refused:?}");
    };
    assert_eq!(
        status.to_string(),
        "RESOURCE_EXHAUSTED: the queue of a receiver is full: try again when it has caught up"
    );
    assert!(status.retry_after.is_some());

    let archive = kept().await;
    let mut line = archive.subscribe("line").await.unwrap();
    take_blocks(&mut line, 0..on_disk).await;
    let ack = eventually("room again", || async {
        press.publish_message(demanding.clone()).await.ok()
    })
    .await;
    assert_eq!(ack.durability, Some(Durability::Disk));
    assert_eq!(number_of(&next(&mut line).await.payload), u32::MAX);
}
