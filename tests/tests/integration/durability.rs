//! What a kept session and a retained message survive: a stop, a crash, damage to the store.

use std::path::Path;
use std::time::Duration;

use selvedge_broker::config::DurabilityRules;
use selvedge_broker::{Config, StoreConfig};
use selvedge_client::{
    Client, Durability, Publish, PublishError, Qos, SubscribeOptions, Subscription,
};
use selvedge_proto::topic::TopicFilter;
use selvedge_tests::broker::{OPEN, TestBroker};
use selvedge_tests::wait::{eventually, within};

const HOUR: Duration = Duration::from_secs(3600);

async fn broker(folder: &Path) -> TestBroker {
    TestBroker::with(OPEN, |config, _| keep(config, folder)).await
}

fn keep(config: &mut Config, folder: &Path) {
    config.store = Some(StoreConfig {
        folder: folder.to_owned(),
        durability: DurabilityRules::all(true),
    });
}

/// A client whose session outlives it.
async fn kept(broker: &TestBroker, name: &str) -> Client {
    let options = broker.options(broker.device(name));
    broker
        .connect(options.session("kept").session_expiry(HOUR))
        .await
}

async fn subscribe(client: &Client, filter: &str) -> Subscription {
    let options = SubscribeOptions::default();
    within("a subscription", client.subscribe_with(filter, options))
        .await
        .expect("policy allows it")
}

async fn publish(client: &Client, topic: &str, payload: &str) -> Option<Durability> {
    let message = Publish::new(topic, payload.to_owned()).qos(Qos::AtLeastOnce);
    within("an acknowledgement", client.publish_message(message))
        .await
        .expect("the broker keeps the message")
        .durability
}

async fn take(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut payloads = Vec::new();
    while payloads.len() < count {
        let message = within("a message", subscription.next())
            .await
            .expect("the subscription goes on");
        payloads.push(String::from_utf8_lossy(&message.payload).into_owned());
    }
    payloads
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_at_disk_is_delivered_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(folder.path()).await;
    let reader = kept(&broker, "reader").await;
    let subscription = subscribe(&reader, "line/+").await;
    reader.close().await;
    drop(subscription);

    let writer = broker.client("writer").await;
    for number in 0..20 {
        let reached = publish(&writer, "line/1", &number.to_string()).await;
        assert_eq!(reached, Some(Durability::Disk));
    }
    broker.restart().await;

    // The kept session is routable before its client is back.
    let late = broker.client("writer-2").await;
    assert_eq!(publish(&late, "line/2", "20").await, Some(Durability::Disk));
    let reader = kept(&broker, "reader").await;
    let mut subscription = subscribe(&reader, "line/+").await;
    let want: Vec<String> = (0..=20).map(|number| number.to_string()).collect();
    assert_eq!(take(&mut subscription, 21).await, want);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_does_not_come_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(folder.path()).await;
    let reader = kept(&broker, "reader").await;
    let mut subscription = subscribe(&reader, "line/1").await;
    let writer = broker.client("writer").await;
    publish(&writer, "line/1", "first").await;
    assert_eq!(take(&mut subscription, 1).await, ["first"]);
    reader.close().await;
    drop(subscription);
    broker.restart().await;

    let writer = broker.client("writer-2").await;
    publish(&writer, "line/1", "second").await;
    let reader = kept(&broker, "reader").await;
    let mut subscription = subscribe(&reader, "line/1").await;
    assert_eq!(take(&mut subscription, 1).await, ["second"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_not_kept_is_gone_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(folder.path()).await;
    let reader = broker.client("reader").await;
    let _subscription = subscribe(&reader, "line/1").await;
    let writer = broker.client("writer").await;
    // Nothing of it needs the disk.
    assert_eq!(
        publish(&writer, "line/1", "x").await,
        Some(Durability::Memory)
    );
    reader.close().await;
    writer.close().await;
    broker.restart().await;
    assert_eq!(broker.metric("selvedge_sessions", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retained_messages_survive_a_restart_and_a_clearing_does_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(folder.path()).await;
    let writer = broker.client("writer").await;
    for (topic, payload) in [("state/a", "on"), ("state/b", "off"), ("state/b", "")] {
        let message = Publish::new(topic, payload)
            .qos(Qos::AtLeastOnce)
            .retain(true);
        let ack = within("an acknowledgement", writer.publish_message(message))
            .await
            .unwrap();
        assert_eq!(ack.durability, Some(Durability::Disk));
    }
    writer.close().await;
    broker.restart().await;
    assert_eq!(broker.metric("selvedge_retained_messages", &[]).await, 1);
    let reader = broker.client("reader").await;
    let mut subscription = subscribe(&reader, "state/#").await;
    let message = within("the retained message", subscription.next())
        .await
        .unwrap();
    assert_eq!(
        (message.topic.as_str(), &message.payload[..], message.retain),
        ("state/a", &b"on"[..], true)
    );
    assert!(message.publisher.ends_with("/acme/plant-1/writer"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_publishers_share_an_fsync() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path()).await;
    let reader = kept(&broker, "reader").await;
    let _subscription = subscribe(&reader, "load/#").await;
    reader.close().await;
    let writer = broker.client("writer").await;
    let before = broker.metric("selvedge_store_commits_total", &[]).await;
    let publishing: Vec<_> = (0..500)
        .map(|number| {
            let writer = writer.clone();
            tokio::spawn(async move { publish(&writer, "load/1", &number.to_string()).await })
        })
        .collect();
    for one in publishing {
        assert_eq!(one.await.unwrap(), Some(Durability::Disk));
    }
    let commits = broker.metric("selvedge_store_commits_total", &[]).await - before;
    assert!(commits < 250, "500 messages took {commits} commits");
}

#[tokio::test(flavor = "multi_thread")]
async fn durability_that_is_not_there_is_refused() {
    let broker = TestBroker::open().await;
    let writer = broker.client("writer").await;
    let message = Publish::new("a", "x")
        .qos(Qos::AtLeastOnce)
        .durability(Durability::Disk);
    let refused = within("an answer", writer.publish_message(message)).await;
    let Err(PublishError::Refused(status)) = refused else {
        panic!("expected a refusal, found {refused:?}");
    };
    assert_eq!(
        status.to_string(),
        "FAILED_PRECONDITION: this broker has no store: demand memory or nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_may_have_another_durability_than_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let broker = TestBroker::with(OPEN, |config, _| {
        keep(config, folder.path());
        let store = config.store.as_mut().unwrap();
        let telemetry = TopicFilter::parse("telemetry/#").unwrap();
        store.durability.rules.push((telemetry, false));
    })
    .await;
    let reader = kept(&broker, "reader").await;
    let _subscription = subscribe(&reader, "#").await;
    let writer = broker.client("writer").await;
    let (memory, disk) = (Some(Durability::Memory), Some(Durability::Disk));
    assert_eq!(publish(&writer, "telemetry/1", "x").await, memory);
    assert_eq!(publish(&writer, "orders/1", "x").await, disk);
    let message = Publish::new("telemetry/1", "x")
        .qos(Qos::AtLeastOnce)
        .durability(Durability::Disk);
    let ack = within("an answer", writer.publish_message(message)).await;
    assert_eq!(ack.unwrap().durability, disk, "the publisher decides");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_group_gives_what_an_absent_member_had_to_the_one_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(folder.path()).await;
    let filter = "$share/pickers/orders/#";
    let first = kept(&broker, "picker-1").await;
    let second = kept(&broker, "picker-2").await;
    let subscriptions = (
        subscribe(&first, filter).await,
        subscribe(&second, filter).await,
    );
    first.close().await;
    second.close().await;
    drop(subscriptions);
    let writer = broker.client("writer").await;
    let numbers: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    for number in &numbers[..10] {
        let ack = publish(&writer, "orders/1", number).await;
        assert_eq!(
            ack,
            Some(Durability::Disk),
            "nobody is there, but it is kept"
        );
    }
    // Whoever had them when the broker stopped, the one that comes back gets them all.
    broker.restart().await;
    let second = kept(&broker, "picker-2").await;
    let mut subscription = subscribe(&second, filter).await;
    let writer = broker.client("writer").await;
    for number in &numbers[10..] {
        publish(&writer, "orders/1", number).await;
    }
    assert_eq!(take(&mut subscription, 20).await, numbers);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_is_set_aside_and_the_broker_starts() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    let mut broker = broker(&place).await;
    let reader = kept(&broker, "reader").await;
    let _subscription = subscribe(&reader, "line/1").await;
    reader.close().await;
    broker.stop().await;
    let mut damaged = 0;
    for file in walk(&place) {
        let length = std::fs::metadata(&file).unwrap().len();
        if length > 0 {
            std::fs::write(&file, vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0, "the store has files");
    broker.start().await;
    let left_out = eventually("the broker to say what it left out", || async {
        let count = broker.metric("selvedge_store_left_out_total", &[]).await;
        (count > 0).then_some(count)
    })
    .await;
    assert!(left_out >= 1);
    let writer = broker.client("writer").await;
    publish(&writer, "line/1", "served all the same").await;
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}
