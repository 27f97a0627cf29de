//! QoS 2 over the ends of connections and of the broker.

use selvedge_tests::TestBroker;
use selvedge_tests::mqtt::wire::{Hello, Level, Wire};

use super::start;

const BOTH: [Level; 2] = [Level::V311, Level::V5];

fn hello(level: Level, name: &str) -> Hello {
    Hello::new(level, name).kept(3600)
}

/// With and without a store, over a new connection and, with a store, over a new broker.
async fn again(broker: &mut TestBroker, restart: bool, wire: Wire) {
    wire.drop_dead();
    if restart {
        broker.stop().await;
        broker.start().await;
    }
}

#[tokio::test]
async fn a_message_whose_pubrec_was_lost_is_taken_once() {
    for (level, restart) in BOTH.into_iter().flat_map(|v| [(v, false), (v, true)]) {
        let mut broker = start(restart).await;
        let mut reader = Wire::connect(broker.mqtt(), &hello(level, "reader")).await;
        assert_eq!(reader.subscribe(&[("plant/#", 2)]).await, [2]);
        let mut sender = Wire::connect(broker.mqtt(), &hello(level, "sender")).await;
        sender.publish(0x04, "plant/a", 9, "once").await;
        let received = sender.next().await;
        assert_eq!((received.first, received.id()), (0x50, 9));
        assert_eq!(reader.take().await.text(), "once");
        reader.quiet().await;
        again(&mut broker, restart, sender).await;

        let (mut sender, answer) = Wire::greet(broker.mqtt(), &hello(level, "sender")).await;
        assert_eq!(answer.body[0], 1, "the session is present");
        sender.publish(0x0c, "plant/a", 9, "once").await;
        assert_eq!(sender.next().await.first, 0x50);
        sender.ack(0x62, 9).await;
        assert_eq!(sender.next().await.first, 0x70);
        // The id is free again, and means another message.
        sender.publish_and_wait(2, "plant/a", 9, "second").await;
        let mut reader = if restart {
            Wire::connect(broker.mqtt(), &hello(level, "reader")).await
        } else {
            reader
        };
        assert_eq!(reader.take().await.text(), "second");
        reader.quiet().await;
    }
}

#[tokio::test]
async fn an_id_that_was_released_is_free_after_a_restart() {
    let mut broker = start(true).await;
    let mut reader = Wire::connect(broker.mqtt(), &hello(Level::V5, "reader")).await;
    reader.subscribe(&[("plant/#", 2)]).await;
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V5, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 1, "first").await;
    again(&mut broker, true, sender).await;
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V5, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 1, "second").await;
    let mut reader = Wire::connect(broker.mqtt(), &hello(Level::V5, "reader")).await;
    assert_eq!(reader.take().await.text(), "first");
    assert_eq!(reader.take().await.text(), "second");
    reader.quiet().await;
}

#[tokio::test]
async fn a_message_without_pubrec_is_sent_again_with_its_id() {
    for (level, restart) in BOTH.into_iter().flat_map(|v| [(v, false), (v, true)]) {
        let mut broker = start(restart).await;
        let mut reader = Wire::connect(broker.mqtt(), &hello(level, "reader")).await;
        reader.subscribe(&[("plant/#", 2)]).await;
        let mut sender = Wire::connect(broker.mqtt(), &hello(level, "sender")).await;
        for (id, payload) in [(1, "one"), (2, "two"), (3, "three")] {
            sender.publish_and_wait(2, "plant/a", id, payload).await;
        }
        let first = [
            reader.delivery().await,
            reader.delivery().await,
            reader.delivery().await,
        ];
        // Of the second the client says that it has it, and does not hear the answer.
        reader.ack(0x50, first[1].id).await;
        assert_eq!(reader.next().await.first, 0x62);
        again(&mut broker, restart, reader).await;

        let mut reader = Wire::connect(broker.mqtt(), &hello(level, "reader")).await;
        let released = reader.next().await;
        assert_eq!(
            (released.first, released.id()),
            (0x62, first[1].id),
            "{level:?} {restart}"
        );
        for before in [&first[0], &first[2]] {
            let again = reader.delivery().await;
            assert!(again.duplicate);
            assert_eq!((again.id, &again.payload), (before.id, &before.payload));
            reader.ack(0x50, again.id).await;
            reader.answer(0x62, again.id).await;
            reader.ack(0x70, again.id).await;
        }
        reader.ack(0x70, first[1].id).await;
        reader.quiet().await;
        reader.drop_dead();
        let mut reader = Wire::connect(broker.mqtt(), &hello(level, "reader")).await;
        reader.quiet().await;
    }
}

#[tokio::test]
async fn a_new_message_gets_no_id_that_the_client_may_still_hold() {
    let mut broker = start(true).await;
    let mut reader = Wire::connect(broker.mqtt(), &hello(Level::V5, "reader")).await;
    reader.subscribe(&[("plant/#", 2)]).await;
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V5, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 1, "held").await;
    let held = reader.delivery().await;
    reader.ack(0x50, held.id).await;
    assert_eq!(reader.next().await.first, 0x62);
    again(&mut broker, true, reader).await;
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V5, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 2, "new").await;
    let mut reader = Wire::connect(broker.mqtt(), &hello(Level::V5, "reader")).await;
    let owed = reader.next().await;
    assert_eq!((owed.first, owed.id()), (0x62, held.id));
    let new = reader.delivery().await;
    assert_eq!(new.text(), "new");
    assert_ne!(new.id, held.id);
}

#[tokio::test]
async fn a_takeover_goes_on_with_the_ids_of_the_connection_before() {
    let broker = start(false).await;
    let mut reader = Wire::connect(broker.mqtt(), &hello(Level::V5, "reader")).await;
    reader.subscribe(&[("plant/#", 2)]).await;
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V5, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 1, "two").await;
    sender.publish_and_wait(1, "plant/a", 2, "one").await;
    let before = [reader.delivery().await, reader.delivery().await];
    let mut taken_over = Wire::connect(broker.mqtt(), &hello(Level::V5, "reader")).await;
    assert_eq!(reader.end().await, Some(0x8e));
    for before in &before {
        let again = taken_over.delivery().await;
        assert!(again.duplicate);
        assert_eq!((again.id, again.qos), (before.id, before.qos));
        assert_eq!(again.payload, before.payload);
    }
}

#[tokio::test]
async fn a_member_of_a_share_group_gets_what_it_was_sent_at_qos_2_and_nobody_else() {
    let broker = start(false).await;
    let mut first = Wire::connect(broker.mqtt(), &hello(Level::V5, "first")).await;
    first.subscribe(&[("$share/g/plant/#", 2)]).await;
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V5, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 1, "bound").await;
    let sent = first.delivery().await;
    first.drop_dead();
    let mut second = Wire::connect(broker.mqtt(), &hello(Level::V5, "second")).await;
    second.subscribe(&[("$share/g/plant/#", 2)]).await;
    sender.publish_and_wait(2, "plant/a", 2, "free").await;
    assert_eq!(second.take().await.text(), "free");
    second.quiet().await;
    let mut first = Wire::connect(broker.mqtt(), &hello(Level::V5, "first")).await;
    let again = first.take().await;
    assert_eq!((again.id, again.text()), (sent.id, "bound"));
}

#[tokio::test]
async fn native_clients_take_qos_2_as_qos_1() {
    let broker = start(false).await;
    let panel = broker.client("panel").await;
    let mut messages = panel.subscribe("plant/#").await.unwrap();
    let mut sender = Wire::connect(broker.mqtt(), &hello(Level::V311, "sender")).await;
    sender.publish_and_wait(2, "plant/a", 1, "two").await;
    let message = messages.next().await.unwrap();
    assert_eq!((message.qos as u8, &message.payload[..]), (1, &b"two"[..]));
}
