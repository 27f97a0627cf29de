//! MQTT 3.1.1 (and 3.1, which has the same packets), by the number of the statement.

use selvedge_tests::mqtt::wire::{Fields, Hello, Level, Wire};

use super::{breach, client, kept, refused_at, shared};

const V3: Level = Level::V311;

fn fields() -> Fields {
    Fields::new()
}

fn greeting(flags: u8) -> Fields {
    fields().text("MQTT").byte(4).byte(flags).two(0)
}

/// What ends the connection, which is all that 3.1.1 can say.
macro_rules! breaches {
    ($($(#[doc = $says:literal])* $name:ident: $packet:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            breach(V3, concat!("v3-", stringify!($name)), $packet, 0).await;
        }
    )*};
}

/// What cannot be a CONNECT, and the return code, or zero for none.
macro_rules! refusals {
    ($($(#[doc = $says:literal])* $name:ident: $packet:expr => $code:literal;)*) => {$(
        #[tokio::test]
        async fn $name() {
            refused_at(V3, $packet, $code).await;
        }
    )*};
}

breaches! {
    /// A topic that is not UTF-8 ends the connection
    mqtt_1_5_3_1: fields().text([0xff, 0xfe]).packet(0x30);
    /// A topic with U+0000 ends the connection
    mqtt_1_5_3_2: fields().text("a\0b").packet(0x30);
    /// Reserved flags that are not as they should be end the connection
    mqtt_2_2_2_2: fields().two(1).packet(0x43);
    /// A packet id of zero ends the connection
    mqtt_2_3_1_1: fields().text("a").two(0).packet(0x32);
    /// A second CONNECT ends the connection
    mqtt_3_1_0_2: Hello::new(V3, "second").packet();
    /// A PUBLISH of QoS 0 that claims to be a duplicate ends the connection
    mqtt_3_3_1_2: fields().text("a").packet(0x38);
    /// A PUBLISH of QoS 3 ends the connection
    mqtt_3_3_1_4: fields().text("a").two(1).packet(0x36);
    /// A topic with a wildcard ends the connection
    mqtt_3_3_2_2: fields().text("a/#").packet(0x30);
    /// An empty topic ends the connection
    mqtt_3_3_2_1: fields().text("").packet(0x30);
    /// A PUBREL without its flags ends the connection
    mqtt_3_6_1_1: fields().two(1).packet(0x60);
    /// A SUBSCRIBE without its flags ends the connection
    mqtt_3_8_1_1: fields().two(1).text("a").byte(0).packet(0x80);
    /// A filter that is not UTF-8 ends the connection
    mqtt_3_8_3_1: fields().two(1).text([0xff]).byte(0).packet(0x82);
    /// A SUBSCRIBE without filters ends the connection
    mqtt_3_8_3_3: fields().two(1).packet(0x82);
    /// Reserved bits beside the QoS of a filter end the connection
    mqtt_3_8_3_4: fields().two(1).text("a").byte(0x04).packet(0x82);
    /// A QoS of 3 for a filter ends the connection
    mqtt_3_8_3_4_qos: fields().two(1).text("a").byte(3).packet(0x82);
    /// An UNSUBSCRIBE without its flags ends the connection
    mqtt_3_10_1_1: fields().two(1).text("a").packet(0xa0);
    /// An UNSUBSCRIBE without filters ends the connection
    mqtt_3_10_3_2: fields().two(1).packet(0xa2);
    /// A DISCONNECT with flags ends the connection
    mqtt_3_14_1_1: [0xe1, 0];
    /// A packet type that 3.1.1 does not have ends the connection
    mqtt_4_8_0_1: [0xf0, 0];
}

refusals! {
    /// Something other than CONNECT first ends the connection
    mqtt_3_1_0_1: [0xc0, 0] => 0;
    /// Another protocol name ends the connection
    mqtt_3_1_2_1: fields().text("MQXX").byte(4).byte(2).two(0).text("x").packet(0x10) => 0;
    /// The reserved flag of CONNECT ends the connection
    mqtt_3_1_2_3: greeting(0x03).text("x").packet(0x10) => 0;
    /// A CONNECT that names a will and has none ends the connection
    mqtt_3_1_2_9: greeting(0x06).text("x").packet(0x10) => 0;
    /// A QoS for a will without a will ends the connection
    mqtt_3_1_2_13: greeting(0x0a).text("x").packet(0x10) => 0;
    /// A will of QoS 3 ends the connection
    mqtt_3_1_2_14: greeting(0x1e).text("x").text("t").text("p").packet(0x10) => 0;
    /// Retain for a will without a will ends the connection
    mqtt_3_1_2_15: greeting(0x22).text("x").packet(0x10) => 0;
    /// A user name without its flag ends the connection
    mqtt_3_1_2_18: greeting(0x02).text("x").text("user").packet(0x10) => 0;
    /// A password without a user name ends the connection
    mqtt_3_1_2_22: greeting(0x42).text("x").text("password").packet(0x10) => 0;
    /// An empty client id without a clean session is refused with code 2
    mqtt_3_1_3_8: greeting(0x00).text("").packet(0x10) => 2;
    /// A client id that is not UTF-8 ends the connection
    mqtt_3_1_3_4: greeting(0x02).text([0xff]).packet(0x10) => 0;
    /// A will that policy denies is refused with code 5
    mqtt_3_2_2_5: Hello::new(V3, "x").will(0, fields(), "secret/will", "p").packet() => 5;
}

/// An unknown version is refused, and the connection closed
#[tokio::test]
async fn mqtt_3_1_2_2() {
    let mut wire = Wire::open(shared(), V3).await;
    wire.send(
        fields()
            .text("MQTT")
            .byte(7)
            .byte(2)
            .two(0)
            .text("x")
            .packet(0x10),
    )
    .await;
    let answer = wire.next().await;
    assert_eq!(answer.first, 0x20);
    assert_eq!(wire.try_next().await, None);
}

/// A kept session has its subscriptions and messages when its client is back
#[tokio::test]
async fn mqtt_3_1_2_4() {
    let mut wire = kept(V3, "v3-kept").await;
    wire.subscribe(&[("v3-kept", 2)]).await;
    wire.leave().await;
    let mut sender = client(V3, "v3-kept-sender").await;
    for qos in 1..=2 {
        sender.publish_and_wait(qos, "v3-kept", 1, "x").await;
    }
    let (mut wire, answer) = Wire::greet(shared(), &Hello::new(V3, "v3-kept").kept(0)).await;
    assert_eq!(answer.body, [1, 0]);
    for qos in 1..=2 {
        assert_eq!(wire.take().await.qos, qos);
    }
}

/// A clean session ends the one before, and ends with its connection
#[tokio::test]
async fn mqtt_3_1_2_6() {
    kept(V3, "v3-clean").await.leave().await;
    for _ in 0..2 {
        let (wire, answer) = Wire::greet(shared(), &Hello::new(V3, "v3-clean")).await;
        assert_eq!(answer.body, [0, 0]);
        wire.leave().await;
    }
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V3, "v3-clean").kept(0)).await;
    assert_eq!(answer.body, [0, 0]);
}

/// A will is published when the connection is lost
#[tokio::test]
async fn mqtt_3_1_2_8() {
    let mut reader = client(V3, "v3-will-reader").await;
    reader.subscribe(&[("v3-will", 2)]).await;
    let hello = Hello::new(V3, "v3-will").will(0x10, fields(), "v3-will", "gone");
    Wire::connect(shared(), &hello).await.drop_dead();
    let message = reader.take().await;
    assert_eq!((message.text(), message.qos), ("gone", 2));
}

/// A will is forgotten with DISCONNECT
#[tokio::test]
async fn mqtt_3_1_2_10() {
    let mut reader = client(V3, "v3-no-will-reader").await;
    reader.subscribe(&[("v3-no-will", 0)]).await;
    let hello = Hello::new(V3, "v3-no-will").will(0, fields(), "v3-no-will", "gone");
    Wire::connect(shared(), &hello).await.leave().await;
    reader.quiet().await;
}

/// A client that is silent for one and a half times its keep alive is dropped
#[tokio::test]
async fn mqtt_3_1_2_24() {
    let mut hello = Hello::new(V3, "v3-silent");
    hello.keep_alive = 1;
    let mut wire = Wire::connect(shared(), &hello).await;
    assert_eq!(wire.end().await, None);
}

/// An empty client id is taken with a clean session
#[tokio::test]
async fn mqtt_3_1_3_6() {
    client(V3, "").await.quiet().await;
}

/// A second connection of a client ends the first
#[tokio::test]
async fn mqtt_3_1_4_2() {
    let mut first = client(V3, "v3-taken-over").await;
    let mut second = client(V3, "v3-taken-over").await;
    assert_eq!(first.end().await, None);
    second.quiet().await;
}

/// A message that is sent again says so and has its id
#[tokio::test]
async fn mqtt_4_4_0_1() {
    let mut wire = kept(V3, "v3-again").await;
    wire.subscribe(&[("v3-again", 2)]).await;
    let mut sender = client(V3, "v3-again-sender").await;
    for qos in 1..=2 {
        sender.publish_and_wait(qos, "v3-again", 1, "x").await;
    }
    let first = [wire.delivery().await.id, wire.delivery().await.id];
    wire.drop_dead();
    let mut wire = kept(V3, "v3-again").await;
    for id in first {
        let again = wire.delivery().await;
        assert_eq!((again.id, again.duplicate), (id, true));
    }
}

/// A retained message meets new subscribers until an empty one takes it away
#[tokio::test]
async fn mqtt_3_3_1_6() {
    let mut wire = client(V3, "v3-retained").await;
    wire.publish(0x01, "v3-retained", 0, "kept").await;
    wire.subscribe(&[("v3-retained", 0)]).await;
    assert!(wire.delivery().await.retain);
    // Of what comes meanwhile the flag is not set.
    wire.publish(0x01, "v3-retained", 0, "").await;
    assert!(!wire.delivery().await.retain);
    wire.subscribe(&[("v3-retained", 0)]).await;
    wire.quiet().await;
}

/// A denied publish is acknowledged as any other, and goes nowhere
#[tokio::test]
async fn mqtt_3_3_5_2() {
    let mut wire = client(V3, "v3-denied").await;
    wire.publish_and_wait(1, "secret/a", 1, "x").await;
    wire.publish_and_wait(2, "secret/a", 2, "x").await;
    wire.quiet().await;
}

/// SUBACK has one code for each filter, 0x80 for one that is denied
#[tokio::test]
async fn mqtt_3_8_4_5() {
    let mut wire = client(V3, "v3-codes").await;
    let codes = wire
        .subscribe(&[("v3-codes", 2), ("secret/a", 1), ("v3-codes/1", 0)])
        .await;
    assert_eq!(codes, [2, 0x80, 0]);
}

/// A subscription to the same filter takes the place of the one before, and retained messages come again
#[tokio::test]
async fn mqtt_3_8_4_3() {
    let mut wire = client(V3, "v3-replaced").await;
    wire.publish(0x01, "v3-replaced", 0, "kept").await;
    for qos in [1, 0] {
        assert_eq!(wire.subscribe(&[("v3-replaced", qos)]).await, [qos]);
        assert!(wire.take().await.retain);
    }
    wire.publish(0, "v3-replaced", 0, "live").await;
    assert_eq!(wire.delivery().await.qos, 0);
    wire.quiet().await;
}

/// UNSUBACK comes also when there was no such subscription
#[tokio::test]
async fn mqtt_3_10_4_5() {
    let mut wire = client(V3, "v3-nothing").await;
    assert_eq!(wire.unsubscribe(&["v3-nothing"]).await.body, [0, 78]);
}

/// PINGREQ is answered
#[tokio::test]
async fn mqtt_3_12_4_1() {
    client(V3, "v3-ping").await.quiet().await;
}

/// A QoS 2 message is handed on once, however often it is sent before PUBREL
#[tokio::test]
async fn mqtt_4_3_3_2() {
    let mut wire = client(V3, "v3-once").await;
    wire.subscribe(&[("v3-once", 0)]).await;
    for flags in [0x04, 0x0c] {
        wire.publish(flags, "v3-once", 1, "x").await;
        wire.answer(0x50, 1).await;
    }
    assert_eq!(wire.delivery().await.text(), "x");
    wire.ack(0x62, 1).await;
    wire.answer(0x70, 1).await;
    wire.quiet().await;
}

/// Topics with a dollar sign are not matched by a wildcard at the beginning
#[tokio::test]
async fn mqtt_4_7_2_1() {
    let mut wire = client(V3, "v3-dollar").await;
    wire.subscribe(&[("+/v3-dollar", 0)]).await;
    wire.publish(0, "$other/v3-dollar", 0, "x").await;
    wire.quiet().await;
}

/// 3.1 clients are served as 3.1.1 ones
#[tokio::test]
async fn mqtt_3_1_2_1_older() {
    let mut wire = client(Level::V31, "v31").await;
    wire.subscribe(&[("v31", 2)]).await;
    let mut sender = client(Level::V31, "v31-sender").await;
    for qos in 1..=2 {
        sender.publish_and_wait(qos, "v31", 1, "x").await;
        assert_eq!(wire.take().await.qos, qos);
    }
}
