//! Message ids: what is published twice or delivered twice under one id counts once.

use std::time::Duration;

use selvedge_broker::StoreConfig;
use selvedge_broker::config::DurabilityRules;
use selvedge_client::{Client, Durability, Publish, Qos, State, SubscribeOptions, Subscription};
use selvedge_tests::wait::{eventually, wait_for, within};
use selvedge_tests::{TestBroker, UdpLink, broker};

use super::overload::longest_queue;
use super::pubsub::next;

const HOUR: Duration = Duration::from_secs(3600);

async fn publish(client: &Client, id: &str, payload: &str) -> Option<Durability> {
    let message = Publish::new("orders", payload.to_owned())
        .qos(Qos::AtLeastOnce)
        .message_id(id.to_owned());
    within("an acknowledgement", client.publish_message(message))
        .await
        .expect("the broker takes it")
        .durability
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_published_again_is_acknowledged_again_and_delivered_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = TestBroker::with(broker::OPEN, |config, _| {
        config.store = Some(StoreConfig {
            folder: folder.path().to_owned(),
            durability: DurabilityRules::all(true),
        });
    })
    .await;
    let kept = |broker: &TestBroker| {
        let options = broker.options(broker.device("archive"));
        Client::connect(options.session("kept").session_expiry(HOUR))
    };
    let archive = kept(&broker).await.unwrap();
    let subscription = archive.subscribe("orders").await.unwrap();
    archive.close().await;
    drop(subscription);

    let first = broker.client("press-7").await;
    let second = broker.client("press-7").await;
    for client in [&first, &first, &second] {
        let reached = publish(client, "4711", "from press 7").await;
        assert_eq!(reached, Some(Durability::Disk));
    }
    let other = broker.client("press-8").await;
    publish(&other, "4711", "from press 8").await;
    for client in [first, second, other] {
        client.close().await;
    }
    broker.restart().await;
    let third = broker.client("press-7").await;
    let reached = publish(&third, "4711", "from press 7").await;
    assert_eq!(reached, Some(Durability::Disk));
    publish(&third, "4712", "the end").await;

    let archive = kept(&broker).await.unwrap();
    let mut orders = archive.subscribe("orders").await.unwrap();
    for payload in ["from press 7", "from press 8", "the end"] {
        assert_eq!(next(&mut orders).await.payload, payload);
    }
}

/// A client behind a link, with a session that outlives its connections.
async fn panel(broker: &TestBroker) -> (Client, UdpLink) {
    let link = UdpLink::start(broker.quic(), 3).await.unwrap();
    let options = broker.options(broker.device("panel-1"));
    let options = options.session("kept").session_expiry(HOUR);
    (broker.connect(options.resolve(link.address())).await, link)
}

/// Takes two messages that were delivered, so late that no acknowledgement passes, and reconnects.
async fn take_two_unacknowledged(client: &Client, link: &UdpLink, orders: &mut Subscription) {
    eventually("both to be here", || async {
        (client.stats().delivered == 2).then_some(())
    })
    .await;
    link.cut();
    for payload in ["named", "nameless"] {
        let message = next(orders).await;
        assert_eq!(
            (&message.payload[..], message.duplicate),
            (payload.as_bytes(), false)
        );
    }
    let mut state = client.state();
    wait_for("the loss", &mut state, |state| !state.is_connected()).await;
    link.heal();
    wait_for("the connection", &mut state, State::is_connected).await;
}

#[tokio::test]
async fn a_message_with_an_id_is_taken_once_although_its_acknowledgement_was_lost() {
    let broker = TestBroker::open().await;
    let (panel, link) = panel(&broker).await;
    let mut orders = panel.subscribe("orders").await.unwrap();
    let press = broker.client("press-7").await;
    publish(&press, "1", "named").await;
    publish(&press, "", "nameless").await;
    take_two_unacknowledged(&panel, &link, &mut orders).await;

    publish(&press, "2", "the end").await;
    let again = next(&mut orders).await;
    assert_eq!(
        (&again.payload[..], again.duplicate),
        (&b"nameless"[..], true)
    );
    assert_eq!(next(&mut orders).await.payload, "the end");
    assert_eq!(panel.stats().duplicates, 1);

    eventually("the broker to know that all of it was taken", || async {
        (longest_queue(&broker.get("/api/status").await) == 0).then_some(())
    })
    .await;
    link.cut();
    let mut state = panel.state();
    wait_for("the loss", &mut state, |state| !state.is_connected()).await;
    link.heal();
    publish(&press, "3", "after it").await;
    assert_eq!(next(&mut orders).await.payload, "after it");
    assert_eq!(panel.stats().duplicates, 1);
}

#[tokio::test]
async fn a_message_that_the_application_did_not_acknowledge_comes_again_in_spite_of_its_id() {
    let broker = TestBroker::open().await;
    let (panel, link) = panel(&broker).await;
    let manual = SubscribeOptions {
        manual_ack: true,
        ..SubscribeOptions::default()
    };
    let mut orders = panel.subscribe_with("orders", manual).await.unwrap();
    let press = broker.client("press-7").await;
    publish(&press, "1", "named").await;
    publish(&press, "", "nameless").await;
    take_two_unacknowledged(&panel, &link, &mut orders).await;
    let mut again = next(&mut orders).await;
    assert_eq!((&again.payload[..], again.duplicate), (&b"named"[..], true));
    again.ack();
    assert_eq!(panel.stats().duplicates, 0);
}

#[tokio::test]
async fn a_publisher_that_starts_again_says_so_and_the_receiver_knows_the_message() {
    let broker = TestBroker::with(broker::OPEN, |config, _| config.limits.dedup_ids = 1).await;
    let panel = broker.client("panel-1").await;
    let mut orders = panel.subscribe("orders").await.unwrap();
    let press = broker.client("press-7").await;
    publish(&press, "1", "first").await;
    // With this the broker forgets the first.
    publish(&press, "2", "second").await;
    let again = Publish::new("orders", "first")
        .qos(Qos::AtLeastOnce)
        .message_id("1")
        .duplicate(true);
    within("an acknowledgement", press.publish_message(again))
        .await
        .unwrap();
    publish(&press, "3", "the end").await;
    for payload in ["first", "second", "the end"] {
        assert_eq!(next(&mut orders).await.payload, payload);
    }
    assert_eq!(panel.stats().duplicates, 1);
}
