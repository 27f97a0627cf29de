//! Many retained messages for many subscribers at once: each gets each once, and live traffic goes on.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use selvedge_client::{Client, Publish, Qos, State, SubscribeOptions};
use selvedge_tests::broker::{OPEN, TestBroker};
use selvedge_tests::wait::{wait_for, within};
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, UdpLink};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

const RETAINED: usize = 3_000;
const HOUR: Duration = Duration::from_secs(3600);

async fn broker() -> TestBroker {
    TestBroker::with(OPEN, |config, pki| {
        let anybody = pki.device("acme", "plant-1", "mqtt").identity().clone();
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.mqtt.danger_plaintext = Some((loopback, anybody));
    })
    .await
}

/// Retains a message on each of [`RETAINED`] topics.
async fn fill(broker: &TestBroker) {
    let writer = broker.client("writer").await;
    let mut writing = JoinSet::new();
    for line in 0..50 {
        let writer = writer.clone();
        writing.spawn(async move {
            for number in (line..RETAINED).step_by(50) {
                let topic = format!("plant/{line}/{number}");
                let message = Publish::new(topic, number.to_string());
                let message = message.qos(Qos::AtLeastOnce).retain(true);
                writer.publish_message(message).await.unwrap();
            }
        });
    }
    within("the messages to be retained", writing.join_all()).await;
    writer.close().await;
}

/// A pair for which each message is published when the one before it has arrived. Returns how many
/// have.
async fn live_pair(broker: &TestBroker) -> (Arc<AtomicU64>, AbortOnDropHandle<()>) {
    let (publisher, subscriber) = (broker.client("live-1").await, broker.client("live-2").await);
    let mut subscription = subscriber.subscribe("live").await.unwrap();
    let arrived = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&arrived);
    let pair = tokio::spawn(async move {
        loop {
            publisher.publish("live", "x").await.unwrap();
            subscription.next().await.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    (arrived, AbortOnDropHandle::new(pair))
}

#[tokio::test(flavor = "multi_thread")]
async fn everyone_gets_everything_once_while_live_messages_go_on() {
    let broker = broker().await;
    fill(&broker).await;
    let (arrived, _pair) = live_pair(&broker).await;
    let mut readers = JoinSet::new();
    for number in 0..20 {
        let client = broker.client(&format!("reader-{number}")).await;
        readers.spawn(async move {
            let mut subscription = client.subscribe("plant/#").await.unwrap();
            let mut topics = HashSet::new();
            for _ in 0..RETAINED {
                let message = subscription.next().await.unwrap();
                assert!(message.retain && !message.duplicate);
                assert!(
                    topics.insert(message.topic.to_string()),
                    "{}",
                    message.topic
                );
            }
            client.close().await;
        });
    }
    for number in 0..5 {
        let version = [MqttVersion::V311, MqttVersion::V5][number % 2];
        let options = MqttOptions::new(version, broker.mqtt(), &format!("peer-{number}"));
        let mut peer = MqttPeer::connect(options).await.unwrap();
        readers.spawn(async move {
            peer.subscribe("plant/#", 1).await;
            let mut topics = HashSet::new();
            for _ in 0..RETAINED {
                let message = peer.message().await;
                assert!(message.retain && !message.duplicate);
                assert!(
                    topics.insert(message.topic.to_string()),
                    "{}",
                    message.topic
                );
            }
        });
    }
    let before = arrived.load(Ordering::Relaxed);
    let mut during = before;
    while let Some(ended) = within("a reader to have everything", readers.join_next()).await {
        ended.unwrap();
        during = arrived.load(Ordering::Relaxed);
    }
    assert!(during >= before + 10, "{} live messages", during - before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_owed_to_a_kept_session_is_complete_after_a_loss_in_the_middle() {
    let broker = TestBroker::with(OPEN, |config, _| {
        // So that little of it is under way at once.
        config.limits.inflight_bytes = 16 * 1024;
    })
    .await;
    fill(&broker).await;
    let link = UdpLink::start(broker.quic(), 7).await.unwrap();
    let options = broker
        .options(broker.device("reader"))
        .resolve(link.address())
        .session("kept")
        .session_expiry(HOUR);
    let reader: Client = broker.connect(options).await;
    let options = SubscribeOptions {
        queue: 64,
        ..SubscribeOptions::default()
    };
    let mut subscription = reader.subscribe_with("plant/#", options).await.unwrap();
    let (mut topics, mut is_cut) = (HashSet::new(), false);
    let mut state = reader.state();
    while topics.len() < RETAINED {
        let message = within("a retained message", subscription.next())
            .await
            .unwrap();
        assert!(message.retain && message.qos == Qos::AtLeastOnce);
        if !topics.insert(message.topic.to_string()) {
            assert!(message.duplicate, "{} came again", message.topic);
        }
        if topics.len() == 100 && !is_cut {
            is_cut = true;
            link.cut();
            wait_for("the loss to be noticed", &mut state, |state| {
                !state.is_connected()
            })
            .await;
            link.heal();
            wait_for("the client to be back", &mut state, State::is_connected).await;
        }
    }
    assert!(reader.stats().reconnects >= 1);
    // All is acknowledged: a message that is published now is the only one that waits.
    let writer = broker.client("writer-2").await;
    let last = Publish::new("plant/last", "x").qos(Qos::AtLeastOnce);
    writer.publish_message(last).await.unwrap();
    loop {
        let message = within("the last message", subscription.next())
            .await
            .unwrap();
        if message.topic.as_str() == "plant/last" {
            break;
        }
        assert!(message.duplicate, "{} came again", message.topic);
    }
}
