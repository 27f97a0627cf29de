//! What is urgent does not wait for what is not: alarms pass bulk and telemetry where a link is
//! narrow, on either hop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use selvedge_client::{Class, Client, Publish, Qos, SubscribeOptions, Subscription};
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{TestBroker, UdpLink, Weather, broker};
use tokio_util::task::AbortOnDropHandle;

use super::pubsub::next;

/// A link of 8 Mbit/s.
const NARROW: Weather = Weather {
    delay: Duration::from_millis(5),
    rate: Some(1_000_000),
    ..Weather::FAIR
};
/// Bytes of an alarm, which has a picture with it: more than fits between other things.
const ALARM: usize = 600_000;
/// Bytes of a bulk message.
const BULK: usize = 1_000;
/// Bytes of a reading: many to a packet, so that they would leave no room in it.
const READING: usize = 100;
/// Bulk messages that an alarm passes, at least.
const PASSED: u32 = 1_000;
/// Bulk messages that arrive while an alarm is under way, at most: what was on the link already, and
/// half of what would come in that time if it had the same priority.
const MEANWHILE: u32 = 300;

async fn through(broker: &TestBroker, link: &UdpLink, name: &str) -> Client {
    let options = broker.options(broker.device(name));
    broker.connect(options.resolve(link.address())).await
}

/// Counts what comes.
fn counting(mut subscription: Subscription) -> (Arc<AtomicU32>, AbortOnDropHandle<()>) {
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    let task = tokio::spawn(async move {
        while subscription.next().await.is_some() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    (count, AbortOnDropHandle::new(task))
}

/// Publishes `most` messages, as fast as the client takes them.
fn flooding(
    client: &Client,
    most: u32,
    size: usize,
    message: impl Fn(Bytes) -> Publish + Send + 'static,
) -> (Arc<AtomicU32>, AbortOnDropHandle<()>) {
    let count = Arc::new(AtomicU32::new(0));
    let (counter, client) = (Arc::clone(&count), client.clone());
    let task = tokio::spawn(async move {
        let payload = Bytes::from(vec![7; size]);
        for _ in 0..most {
            let message = message(payload.clone());
            client.publish_message(message).await.unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    (count, AbortOnDropHandle::new(task))
}

fn alarm() -> Publish {
    Publish::new("alarms", vec![7; ALARM])
        .class(Class::Alarm)
        .qos(Qos::AtLeastOnce)
}

async fn reaches(what: &str, count: &AtomicU32, least: u32) {
    eventually(what, || async {
        (count.load(Ordering::SeqCst) >= least).then_some(())
    })
    .await;
}

/// Three alarms, each while megabytes of bulk published before it are still on their way.
async fn alarms_pass_bulk(press: Client, panel: Client) {
    let mut alarms = panel.subscribe("alarms").await.unwrap();
    let (arrived, _reading) = counting(panel.subscribe("bulk").await.unwrap());
    let (published, _publishing) = flooding(&press, 6_000, BULK, |payload| {
        Publish::new("bulk", payload).class(Class::Bulk)
    });
    for number in 1..=3 {
        reaches("bulk to be under way", &arrived, number * 300).await;
        reaches("bulk to wait", &published, number * 300 + 3 * PASSED / 2).await;
        let before = published.load(Ordering::SeqCst);
        let had = arrived.load(Ordering::SeqCst);
        within("the acknowledgement", press.publish_message(alarm()))
            .await
            .unwrap();
        assert_eq!(next(&mut alarms).await.payload.len(), ALARM);
        let has = arrived.load(Ordering::SeqCst);
        assert!(before.saturating_sub(has) > PASSED, "{has} of {before}");
        assert!(has - had < MEANWHILE, "{} meanwhile", has - had);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_pass_bulk_on_the_way_up() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 1).await.unwrap();
    let press = through(&broker, &link, "press-7").await;
    let panel = broker.client("panel-1").await;
    link.set(NARROW);
    alarms_pass_bulk(press, panel).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_pass_bulk_on_the_way_down() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 1).await.unwrap();
    let press = broker.client("press-7").await;
    let panel = through(&broker, &link, "panel-1").await;
    link.set(NARROW);
    alarms_pass_bulk(press, panel).await;
}

/// More telemetry in datagrams than the link carries, and alarms that come all the same.
async fn alarms_pass_telemetry(press: Client, panel: Client) {
    let mut alarms = panel.subscribe("alarms").await.unwrap();
    let wanted = SubscribeOptions {
        datagrams: true,
        ..SubscribeOptions::default()
    };
    let (arrived, _reading) = counting(panel.subscribe_with("temp", wanted).await.unwrap());
    let (_published, flood) = flooding(&press, u32::MAX, READING, |payload| {
        Publish::new("temp", payload).datagram(true)
    });
    for number in 1..=3 {
        reaches("telemetry to go on", &arrived, number * 1_000).await;
        let begun = std::time::Instant::now();
        within("the acknowledgement", press.publish_message(alarm()))
            .await
            .unwrap();
        assert_eq!(next(&mut alarms).await.payload.len(), ALARM);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    assert!(!flood.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_pass_a_flood_of_datagrams_on_the_way_up() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 1).await.unwrap();
    let press = through(&broker, &link, "press-7").await;
    let panel = broker.client("panel-1").await;
    link.set(NARROW);
    alarms_pass_telemetry(press.clone(), panel).await;
    assert!(press.stats().datagrams_dropped > 0, "{:?}", press.stats());
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_pass_a_flood_of_datagrams_on_the_way_down() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        // Filled in a moment, and room for two alarms.
        config.limits.queue_bytes = 4 << 20;
    })
    .await;
    let link = UdpLink::start(broker.quic(), 1).await.unwrap();
    let press = broker.client("press-7").await;
    let panel = through(&broker, &link, "panel-1").await;
    link.set(NARROW);
    alarms_pass_telemetry(press, panel).await;
    let full = [("reason", "queue_full")];
    broker
        .metric_reaches("selvedge_dropped_messages_total", &full, 1)
        .await;
}
