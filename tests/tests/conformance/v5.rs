//! MQTT 5.0, by the number of the statement.

use selvedge_tests::mqtt::wire::{Fields, Hello, Level, Wire};

use super::{ALIASES, MAX_PACKET, RECEIVE_MAXIMUM, breach, client, kept, refused, shared};

const V5: Level = Level::V5;

fn fields() -> Fields {
    Fields::new()
}

fn none() -> Fields {
    Fields::new()
}

/// A SUBSCRIBE for one filter.
fn subscribe(filter: &str, options: u8) -> Fields {
    fields().two(1).block(&none()).text(filter).byte(options)
}

/// The fields of a CONNECT before its client id.
fn greeting(flags: u8) -> Fields {
    fields()
        .text("MQTT")
        .byte(5)
        .byte(flags)
        .two(0)
        .block(&none())
}

/// What a connected client may not send, and the reason that it is told.
macro_rules! breaches {
    ($($(#[doc = $says:literal])* $name:ident: $packet:expr => $reason:literal;)*) => {$(
        #[tokio::test]
        async fn $name() {
            breach(V5, stringify!($name), $packet, $reason).await;
        }
    )*};
}

/// What cannot be a CONNECT, and the answer.
macro_rules! refusals {
    ($($(#[doc = $says:literal])* $name:ident: $packet:expr => $code:literal;)*) => {$(
        #[tokio::test]
        async fn $name() {
            refused($packet, $code).await;
        }
    )*};
}

breaches! {
    /// A topic that is not UTF-8 is malformed
    mqtt_1_5_4_1: fields().text([0xff, 0xfe]).block(&none()).packet(0x30) => 0x81;
    /// A filter that is not UTF-8 is malformed
    mqtt_1_5_4_1_filter: fields().two(1).block(&none()).text([0xc0, 0x80]).byte(0).packet(0x82) => 0x81;
    /// A surrogate in a user property is malformed
    mqtt_1_5_4_1_property: fields().text("a").block(&fields().byte(0x26).text([0xed, 0xa0, 0x80]).text("v")).packet(0x30) => 0x81;
    /// A topic with U+0000 is malformed
    mqtt_1_5_4_2: fields().text("a\0b").block(&none()).packet(0x30) => 0x81;
    /// A filter with U+0000 is malformed
    mqtt_1_5_4_2_filter: subscribe("a\0b", 0).packet(0x82) => 0x81;
    /// A length of more than four bytes is malformed
    mqtt_1_5_5_1: [0x30, 0xff, 0xff, 0xff, 0xff, 0x7f] => 0x81;
    /// Reserved flags of PUBACK that are set are malformed
    mqtt_2_1_3_1_puback: fields().two(1).packet(0x41) => 0x81;
    /// Reserved flags of PUBREC that are set are malformed
    mqtt_2_1_3_1_pubrec: fields().two(1).packet(0x52) => 0x81;
    /// Reserved flags of PUBCOMP that are set are malformed
    mqtt_2_1_3_1_pubcomp: fields().two(1).packet(0x74) => 0x81;
    /// Reserved flags of PINGREQ that are set are malformed
    mqtt_2_1_3_1_pingreq: [0xc1, 0] => 0x81;
    /// The packet type zero is malformed
    mqtt_2_1_2_1: [0x00, 0x00] => 0x81;
    /// A PUBLISH with packet id zero is a protocol error
    mqtt_2_2_1_3_publish: fields().text("a").two(0).block(&none()).packet(0x32) => 0x82;
    /// A SUBSCRIBE with packet id zero is a protocol error
    mqtt_2_2_1_3_subscribe: fields().two(0).block(&none()).text("a").byte(0).packet(0x82) => 0x82;
    /// An UNSUBSCRIBE with packet id zero is a protocol error
    mqtt_2_2_1_3_unsubscribe: fields().two(0).block(&none()).text("a").packet(0xa2) => 0x82;
    /// A property that is not of its packet is malformed
    mqtt_2_2_2_2: fields().text("a").block(&fields().byte(0x11).four(1)).packet(0x30) => 0x81;
    /// A property that is there twice is a protocol error
    mqtt_2_2_2_2_twice: fields().text("a").block(&fields().byte(0x02).four(1).byte(0x02).four(1)).packet(0x30) => 0x82;
    /// A second CONNECT is a protocol error
    mqtt_3_1_0_2: Hello::new(V5, "second").packet() => 0x82;
    /// A CONNACK from a client is a protocol error
    mqtt_3_2_0_2_from_a_client: [0x20, 0x03, 0, 0, 0] => 0x82;
    /// A PUBLISH of QoS 3 is malformed
    mqtt_3_3_1_4: fields().text("a").two(1).block(&none()).packet(0x36) => 0x81;
    /// A PUBLISH of QoS 0 that claims to be a duplicate is malformed
    mqtt_3_3_1_2: fields().text("a").block(&none()).packet(0x38) => 0x81;
    /// A PUBLISH without a topic and without an alias is a protocol error
    mqtt_3_3_2_1: fields().text("").block(&none()).packet(0x30) => 0x82;
    /// A topic with `#` is not a valid topic name
    mqtt_3_3_2_2: fields().text("a/#").block(&none()).packet(0x30) => 0x90;
    /// A topic with `+` is not a valid topic name
    mqtt_3_3_2_2_plus: fields().text("a/+/b").block(&none()).packet(0x30) => 0x90;
    /// A topic alias of zero is invalid
    mqtt_3_3_2_8: fields().text("a").block(&fields().byte(0x23).two(0)).packet(0x30) => 0x94;
    /// A topic alias above the maximum is invalid
    mqtt_3_3_2_9: fields().text("a").block(&fields().byte(0x23).two(ALIASES + 1)).packet(0x30) => 0x94;
    /// A response topic with a wildcard is a protocol error
    mqtt_3_3_2_14: fields().text("a").block(&fields().byte(0x08).text("r/#")).packet(0x30) => 0x82;
    /// A response topic that is not UTF-8 is malformed
    mqtt_3_3_2_13: fields().text("a").block(&fields().byte(0x08).text([0xff])).packet(0x30) => 0x81;
    /// A content type that is not UTF-8 is malformed
    mqtt_3_3_2_19: fields().text("a").block(&fields().byte(0x03).text([0xff])).packet(0x30) => 0x81;
    /// A payload format indicator of 2 is a protocol error
    mqtt_3_3_2_4_indicator: fields().text("a").block(&fields().byte(0x01).byte(2)).packet(0x30) => 0x82;
    /// A subscription identifier in a PUBLISH of a client is a protocol error
    mqtt_3_3_4_6: fields().text("a").block(&fields().byte(0x0b).varint(5)).packet(0x30) => 0x82;
    /// A PUBREL without its flags is malformed
    mqtt_3_6_1_1: fields().two(1).packet(0x60) => 0x81;
    /// A SUBSCRIBE without its flags is malformed
    mqtt_3_8_1_1: subscribe("a", 0).packet(0x80) => 0x81;
    /// A SUBSCRIBE without filters is a protocol error
    mqtt_3_8_3_2: fields().two(1).block(&none()).packet(0x82) => 0x82;
    /// No local on a shared subscription is a protocol error
    mqtt_3_8_3_4: subscribe("$share/g/a", 0x04).packet(0x82) => 0x82;
    /// Reserved bits of subscription options are malformed
    mqtt_3_8_3_5: subscribe("a", 0x40).packet(0x82) => 0x81;
    /// A maximum QoS of 3 is a protocol error
    mqtt_3_8_3_5_qos: subscribe("a", 0x03).packet(0x82) => 0x82;
    /// A retain handling of 3 is a protocol error
    mqtt_3_8_3_5_retain: subscribe("a", 0x30).packet(0x82) => 0x82;
    /// A subscription identifier of zero is a protocol error
    mqtt_3_8_2_1: fields().two(1).block(&fields().byte(0x0b).varint(0)).text("a").byte(0).packet(0x82) => 0x82;
    /// A SUBACK from a client is a protocol error
    mqtt_3_9_0_1: fields().two(1).block(&none()).byte(0).packet(0x90) => 0x82;
    /// An UNSUBSCRIBE without its flags is malformed
    mqtt_3_10_1_1: fields().two(1).block(&none()).text("a").packet(0xa0) => 0x81;
    /// An UNSUBSCRIBE without filters is a protocol error
    mqtt_3_10_3_2: fields().two(1).block(&none()).packet(0xa2) => 0x82;
    /// A filter of an UNSUBSCRIBE that is not UTF-8 is malformed
    mqtt_3_10_3_1: fields().two(1).block(&none()).text([0xff]).packet(0xa2) => 0x81;
    /// A PINGREQ with a body is malformed
    mqtt_3_12_1_1: [0xc0, 1, 0] => 0x81;
    /// A PINGRESP from a client is a protocol error
    mqtt_3_13_0_1: [0xd0, 0] => 0x82;
    /// A DISCONNECT with flags is malformed
    mqtt_3_14_1_1: [0xe1, 0] => 0x81;
    /// A DISCONNECT with a reason that only servers have is a protocol error
    mqtt_3_14_2_1: [0xe0, 1, 0x8b] => 0x82;
    /// A session expiry in DISCONNECT after none in CONNECT is a protocol error
    mqtt_3_14_2_2: fields().byte(0).block(&fields().byte(0x11).four(5)).packet(0xe0) => 0x82;
    /// An AUTH with flags is malformed
    mqtt_3_15_1_1: [0xf1, 0] => 0x81;
    /// An AUTH without an authentication method in CONNECT is a protocol error
    mqtt_4_12_0_6: fields().byte(0x18).block(&fields().byte(0x15).text("m")).packet(0xf0) => 0x82;
    /// A packet that ends early is malformed
    mqtt_4_13_1_1: fields().text("a").byte(0).packet(0x32) => 0x81;
    /// Bytes after the end of a PUBACK are malformed
    mqtt_4_13_1_1_long: fields().two(1).byte(0).block(&none()).raw("x").packet(0x40) => 0x81;
    /// A PUBREC for a message that was not sent at QoS 2 is not answered by the end, a PUBCOMP without its message neither; a packet too large is
    mqtt_4_13_2_1: fields().text("a").block(&none()).raw(vec![0; MAX_PACKET]).packet(0x30) => 0x95;
}

refusals! {
    /// Something other than CONNECT first ends the connection without a word
    mqtt_3_1_0_1: [0xc0, 0] => 0;
    /// Another protocol name ends the connection without a word
    mqtt_3_1_2_1: fields().text("MQXX").byte(5).byte(2).two(0).block(&none()).text("x").packet(0x10) => 0;
    /// An unknown version is told so
    mqtt_3_1_2_2: fields().text("MQTT").byte(6).byte(2).two(0).block(&none()).text("x").packet(0x10) => 0x84;
    /// The reserved flag of CONNECT is malformed
    mqtt_3_1_2_3: greeting(0x03).text("x").packet(0x10) => 0x81;
    /// A CONNECT that names a will and has none is malformed
    mqtt_3_1_2_9: greeting(0x06).text("x").packet(0x10) => 0x81;
    /// A QoS for a will without a will is malformed
    mqtt_3_1_2_11: greeting(0x0a).text("x").packet(0x10) => 0x81;
    /// A will of QoS 3 is malformed
    mqtt_3_1_2_12: greeting(0x1e).text("x").block(&none()).text("t").text("p").packet(0x10) => 0x81;
    /// Retain for a will without a will is malformed
    mqtt_3_1_2_13: greeting(0x22).text("x").packet(0x10) => 0x81;
    /// A user name without its flag is malformed
    mqtt_3_1_2_16: greeting(0x02).text("x").text("user").packet(0x10) => 0x81;
    /// A flag for a user name without one is malformed
    mqtt_3_1_2_17: greeting(0x82).text("x").packet(0x10) => 0x81;
    /// A password without its flag is malformed
    mqtt_3_1_2_18: greeting(0x82).text("x").text("user").text("password").packet(0x10) => 0x81;
    /// A flag for a password without one is malformed
    mqtt_3_1_2_19: greeting(0xc2).text("x").text("user").packet(0x10) => 0x81;
    /// A CONNECT without a client id field is malformed
    mqtt_3_1_3_3: greeting(0x02).packet(0x10) => 0x81;
    /// A client id that is not UTF-8 is malformed
    mqtt_3_1_3_4: greeting(0x02).text([0xff]).packet(0x10) => 0x81;
    /// A will topic that is not UTF-8 is malformed
    mqtt_3_1_3_11: greeting(0x06).text("x").block(&none()).text([0xff]).text("p").packet(0x10) => 0x81;
    /// A user name that is not UTF-8 is malformed
    mqtt_3_1_3_12: greeting(0x82).text("x").text([0xff]).packet(0x10) => 0x81;
    /// A CONNECT of a wrong form is refused and the connection closed
    mqtt_3_1_4_1: greeting(0x02).text("x").raw([1, 2, 3]).packet(0x10) => 0x81;
    /// A receive maximum of zero is a protocol error
    mqtt_3_1_2_24_receive_maximum: Hello::new(V5, "x").with(fields().byte(0x21).two(0)).packet() => 0x82;
    /// A maximum packet size of zero is a protocol error
    mqtt_3_1_2_24_zero: Hello::new(V5, "x").with(fields().byte(0x27).four(0)).packet() => 0x82;
    /// A request for response information that is neither 0 nor 1 is a protocol error
    mqtt_3_1_2_28_value: Hello::new(V5, "x").with(fields().byte(0x19).byte(2)).packet() => 0x82;
    /// Authentication data without a method is a protocol error
    mqtt_4_12_0_7: Hello::new(V5, "x").with(fields().byte(0x16).text("d")).packet() => 0x82;
    /// An authentication method that the broker does not have is refused as such
    mqtt_4_12_0_1: Hello::new(V5, "x").with(fields().byte(0x15).text("SCRAM-SHA-1")).packet() => 0x8c;
    /// A will that policy denies is refused before the session begins
    mqtt_3_1_4_2: Hello::new(V5, "x").will(0, none(), "secret/will", "p").packet() => 0x87;
    /// A will topic with a wildcard is not a valid topic name
    mqtt_3_1_3_11_wildcard: Hello::new(V5, "x").will(0, none(), "a/#", "p").packet() => 0x90;
}

/// A byte order mark is part of a topic
#[tokio::test]
async fn mqtt_1_5_4_3() {
    let mut wire = client(V5, "bom").await;
    wire.subscribe(&[("bom/#", 0)]).await;
    wire.publish(0, "bom/\u{feff}", 0, "x").await;
    assert_eq!(wire.delivery().await.topic, "bom/\u{feff}");
}

/// A PUBLISH of QoS 0 has no packet id
#[tokio::test]
async fn mqtt_2_2_1_2() {
    let mut wire = client(V5, "no-id").await;
    wire.subscribe(&[("no-id", 0)]).await;
    wire.publish(0, "no-id", 0, "x").await;
    let packet = wire.next().await;
    assert_eq!(
        packet.body,
        fields().text("no-id").block(&none()).raw("x").0
    );
}

/// The broker's packet ids are not zero and not in use
#[tokio::test]
async fn mqtt_2_2_1_4() {
    let mut wire = client(V5, "ids").await;
    wire.subscribe(&[("ids", 1)]).await;
    for id in 1..=5 {
        wire.publish(0x02, "ids", id, "x").await;
    }
    let mut ids = Vec::new();
    while ids.len() < 5 {
        let packet = wire.next().await;
        if packet.first >> 4 == 3 {
            ids.push(packet.delivered(V5).id);
        }
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 5);
    assert!(!ids.contains(&0));
}

/// PUBACK, PUBREC, PUBREL and PUBCOMP have the id of their PUBLISH
#[tokio::test]
async fn mqtt_2_2_1_5() {
    let mut wire = client(V5, "same-id").await;
    wire.subscribe(&[("same-id", 2)]).await;
    wire.publish_and_wait(1, "same-id", 4711, "x").await;
    wire.publish_and_wait(2, "same-id", 4712, "x").await;
    assert_eq!(wire.take().await.qos, 1);
    assert_eq!(wire.take().await.qos, 2);
}

/// SUBACK and UNSUBACK have the id of what they answer
#[tokio::test]
async fn mqtt_2_2_1_6() {
    let mut wire = client(V5, "suback-id").await;
    wire.subscribe(&[("suback-id", 0)]).await;
    wire.unsubscribe(&["suback-id"]).await;
}

/// A packet without properties has a length of zero for them
#[tokio::test]
async fn mqtt_2_2_2_1() {
    let mut wire = client(V5, "no-properties").await;
    wire.send(subscribe("no-properties", 0).packet(0x82)).await;
    assert_eq!(wire.next().await.body, [0, 1, 0, 0]);
}

/// A clean start ends the session that was there
#[tokio::test]
async fn mqtt_3_1_2_4() {
    let mut wire = kept(V5, "clean").await;
    wire.subscribe(&[("clean", 1)]).await;
    wire.leave().await;
    let (wire, answer) = Wire::greet(shared(), &Hello::new(V5, "clean")).await;
    assert_eq!(answer.body[0], 0);
    wire.leave().await;
    let (mut wire, answer) = Wire::greet(shared(), &Hello::new(V5, "clean").kept(600)).await;
    assert_eq!(answer.body[0], 0);
    wire.publish_and_wait(1, "clean", 1, "x").await;
    wire.quiet().await;
}

/// Without a clean start the session goes on
#[tokio::test]
async fn mqtt_3_1_2_5() {
    let mut wire = kept(V5, "resumed").await;
    wire.subscribe(&[("resumed", 1)]).await;
    wire.leave().await;
    let mut other = client(V5, "resumed-by").await;
    other.publish_and_wait(1, "resumed", 1, "x").await;
    let (mut wire, answer) = Wire::greet(shared(), &Hello::new(V5, "resumed").kept(600)).await;
    assert_eq!(answer.body[0], 1);
    assert_eq!(wire.take().await.text(), "x");
}

/// Without a clean start and without a session a new one begins
#[tokio::test]
async fn mqtt_3_1_2_6() {
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "none-yet").kept(600)).await;
    assert_eq!(answer.body[..2], [0, 0]);
}

/// A will is published when the connection is lost
#[tokio::test]
async fn mqtt_3_1_2_8() {
    let mut reader = client(V5, "will-reader").await;
    reader.subscribe(&[("will-8", 0)]).await;
    let hello = Hello::new(V5, "will-8").will(0, none(), "will-8", "gone");
    Wire::connect(shared(), &hello).await.drop_dead();
    assert_eq!(reader.delivery().await.text(), "gone");
}

/// A will is forgotten with a DISCONNECT of reason 0
#[tokio::test]
async fn mqtt_3_1_2_10() {
    let mut reader = client(V5, "will-10-reader").await;
    reader.subscribe(&[("will-10", 0)]).await;
    let hello = Hello::new(V5, "will-10").will(0, none(), "will-10", "gone");
    Wire::connect(shared(), &hello).await.leave().await;
    reader.quiet().await;
}

/// A will without retain is not retained
#[tokio::test]
async fn mqtt_3_1_2_14() {
    let mut reader = client(V5, "will-14-reader").await;
    reader.subscribe(&[("will-14", 0)]).await;
    let hello = Hello::new(V5, "will-14").will(0, none(), "will-14", "gone");
    Wire::connect(shared(), &hello).await.drop_dead();
    assert!(!reader.delivery().await.retain);
    let mut later = client(V5, "will-14-later").await;
    later.subscribe(&[("will-14", 0)]).await;
    later.quiet().await;
}

/// A will with retain is retained
#[tokio::test]
async fn mqtt_3_1_2_15() {
    let mut reader = client(V5, "will-15-reader").await;
    reader.subscribe(&[("will-15", 0)]).await;
    let hello = Hello::new(V5, "will-15").will(0x20, none(), "will-15", "gone");
    Wire::connect(shared(), &hello).await.drop_dead();
    reader.delivery().await;
    let mut later = client(V5, "will-15-later").await;
    later.subscribe(&[("will-15", 0)]).await;
    assert!(later.delivery().await.retain);
}

/// A client that is silent for one and a half times its keep alive is told and dropped
#[tokio::test]
async fn mqtt_3_1_2_22() {
    let mut hello = Hello::new(V5, "silent");
    hello.keep_alive = 1;
    let mut wire = Wire::connect(shared(), &hello).await;
    assert_eq!(wire.end().await, Some(0x8d));
}

/// A session with an expiry is kept after its connection
#[tokio::test]
async fn mqtt_3_1_2_23() {
    kept(V5, "kept-23").await.drop_dead();
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "kept-23").kept(600)).await;
    assert_eq!(answer.body[0], 1);
}

/// No packet is larger than the client's maximum
#[tokio::test]
async fn mqtt_3_1_2_24() {
    let hello = Hello::new(V5, "small").with(fields().byte(0x27).four(60));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.subscribe(&[("small", 0)]).await;
    // The refusal names its rule, which has no room in the packet.
    wire.publish(0x02, "secret/a-topic-with-a-long-name", 1, "x")
        .await;
    let refusal = wire.next().await;
    assert_eq!((refusal.reason(), refusal.property(0x1f)), (0x87, None));
}

/// A message that is too large for a client is dropped as if it had been delivered
#[tokio::test]
async fn mqtt_3_1_2_25() {
    let hello = Hello::new(V5, "small-25").with(fields().byte(0x27).four(60));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.subscribe(&[("small-25", 2)]).await;
    let mut sender = client(V5, "small-25-sender").await;
    for (qos, id) in [(1, 1), (2, 2)] {
        sender
            .publish_and_wait(qos, "small-25", id, &"x".repeat(100))
            .await;
    }
    sender.publish_and_wait(1, "small-25", 3, "fits").await;
    assert_eq!(wire.take().await.text(), "fits");
}

/// The broker sets no more topic aliases than the client takes
#[tokio::test]
async fn mqtt_3_1_2_26() {
    let hello = Hello::new(V5, "aliases").with(fields().byte(0x22).two(2));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.subscribe(&[("aliases/+", 0)]).await;
    for topic in ["aliases/a", "aliases/b", "aliases/c"] {
        for _ in 0..2 {
            wire.publish(0, topic, 0, topic).await;
        }
    }
    let mut seen = Vec::new();
    for _ in 0..6 {
        let message = wire.delivery().await;
        seen.push((message.topic.clone(), message.property(0x23)));
    }
    let alias = |number: u8| vec![vec![0, number]];
    let expected = [
        ("aliases/a", alias(1)),
        ("", alias(1)),
        ("aliases/b", alias(2)),
        ("", alias(2)),
        ("aliases/c", vec![]),
        ("aliases/c", vec![]),
    ];
    assert_eq!(
        seen,
        expected.map(|(topic, alias)| (topic.to_owned(), alias))
    );
}

/// The broker sets no topic alias when the client takes none
#[tokio::test]
async fn mqtt_3_1_2_27() {
    let mut wire = client(V5, "no-aliases").await;
    wire.subscribe(&[("no-aliases", 0)]).await;
    for _ in 0..2 {
        wire.publish(0, "no-aliases", 0, "x").await;
        let message = wire.delivery().await;
        assert_eq!(
            (message.topic.as_str(), message.property(0x23)),
            ("no-aliases", vec![])
        );
    }
}

/// Response information is for those who ask for it only
#[tokio::test]
async fn mqtt_3_1_2_28() {
    let (_a, answer) = Wire::greet(shared(), &Hello::new(V5, "not-asking")).await;
    assert_eq!(answer.property(0x1a), None);
    let hello = Hello::new(V5, "asking").with(fields().byte(0x19).byte(1));
    let (_b, answer) = Wire::greet(shared(), &hello).await;
    assert_eq!(answer.property(0x1a).unwrap(), b"replies/sensors/");
}

/// A client that wants no problem information gets no reason strings but in CONNACK and DISCONNECT
#[tokio::test]
async fn mqtt_3_1_2_29() {
    let hello = Hello::new(V5, "no-reasons").with(fields().byte(0x17).byte(0));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.publish(0x02, "secret/x", 1, "x").await;
    let refusal = wire.next().await;
    assert_eq!((refusal.reason(), refusal.property(0x1f)), (0x87, None));
    let mut wire = client(V5, "reasons").await;
    wire.publish(0x02, "secret/x", 1, "x").await;
    let text = String::from_utf8(wire.next().await.property(0x1f).unwrap()).unwrap();
    assert!(
        text.contains("\"nobody\"") || text.contains("nobody"),
        "{text}"
    );
}

/// A client id of 23 letters and digits is taken, and longer ones with other characters
#[tokio::test]
async fn mqtt_3_1_3_5() {
    for id in [
        "0123456789abcdefghijABC",
        "a name with spaces, ü and / and more of it",
    ] {
        client(V5, id).await.quiet().await;
    }
}

/// An empty client id is taken, also without a clean start
#[tokio::test]
async fn mqtt_3_1_3_6() {
    client(V5, "").await.quiet().await;
    let mut hello = Hello::new(V5, "");
    hello.clean = false;
    Wire::connect(shared(), &hello).await.quiet().await;
}

/// A client without an id is given one, which is its session's
#[tokio::test]
async fn mqtt_3_1_3_7() {
    let (wire, answer) = Wire::greet(shared(), &Hello::new(V5, "").kept(600)).await;
    let assigned = String::from_utf8(answer.property(0x12).unwrap()).unwrap();
    wire.leave().await;
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, &assigned).kept(600)).await;
    assert_eq!(answer.body[0], 1);
}

/// A will with a delay is not published when its client comes back in time
#[tokio::test]
async fn mqtt_3_1_3_9() {
    let mut reader = client(V5, "delay-reader").await;
    reader.subscribe(&[("delayed", 0)]).await;
    let delay = fields().byte(0x18).four(1);
    let hello = Hello::new(V5, "delay")
        .kept(600)
        .will(0, delay, "delayed", "gone");
    Wire::connect(shared(), &hello).await.drop_dead();
    let _back = Wire::connect(shared(), &Hello::new(V5, "delay").kept(600)).await;
    tokio::time::sleep(std::time::Duration::from_millis(1300)).await;
    reader.quiet().await;
}

/// A second connection of a client ends the first with 0x8E
#[tokio::test]
async fn mqtt_3_1_4_3() {
    let mut first = client(V5, "taken-over").await;
    let mut second = client(V5, "taken-over").await;
    assert_eq!(first.end().await, Some(0x8e));
    second.quiet().await;
}

/// A CONNECT that is right is answered with reason 0
#[tokio::test]
async fn mqtt_3_1_4_5() {
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "right")).await;
    assert_eq!(answer.reason(), 0);
}

/// What comes after a CONNECT that is refused is not looked at
#[tokio::test]
async fn mqtt_3_1_4_6() {
    let mut reader = client(V5, "after-refusal-reader").await;
    reader.subscribe(&[("after-refusal", 0)]).await;
    let mut wire = Wire::open(shared(), V5).await;
    let hello = Hello::new(V5, "x").will(0, none(), "secret/will", "p");
    let publish = fields()
        .text("after-refusal")
        .block(&none())
        .raw("x")
        .packet(0x30);
    wire.send([hello.packet(), publish].concat()).await;
    assert_eq!(wire.next().await.body[1], 0x87);
    assert_eq!(wire.try_next().await, None);
    reader.quiet().await;
}

/// CONNACK comes before everything else
#[tokio::test]
async fn mqtt_3_2_0_1() {
    let mut wire = Wire::open(shared(), V5).await;
    let hello = Hello::new(V5, "first-answer").packet();
    wire.send(
        [
            hello,
            vec![0xc0, 0],
            subscribe("first-answer", 0).packet(0x82),
        ]
        .concat(),
    )
    .await;
    assert_eq!(wire.next().await.first, 0x20);
    assert_eq!(wire.next().await.first, 0xd0);
    assert_eq!(wire.next().await.first, 0x90);
}

/// CONNACK comes once
#[tokio::test]
async fn mqtt_3_2_0_2() {
    client(V5, "one-connack").await.quiet().await;
}

/// Session present is not claimed after a clean start
#[tokio::test]
async fn mqtt_3_2_2_2() {
    kept(V5, "present-2").await.leave().await;
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "present-2")).await;
    assert_eq!(answer.body[0], 0);
}

/// Session present is claimed when there is one, and no other flag
#[tokio::test]
async fn mqtt_3_2_2_3() {
    kept(V5, "present-3").await.leave().await;
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "present-3").kept(600)).await;
    assert_eq!(answer.body[0], 1);
}

/// An assigned client id is nobody else's
#[tokio::test]
async fn mqtt_3_2_2_16() {
    let mut ids = Vec::new();
    for _ in 0..3 {
        let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "")).await;
        ids.push(answer.property(0x12).unwrap());
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3);
}

/// CONNACK names the receive maximum, the topic alias maximum and the maximum packet size
#[tokio::test]
async fn mqtt_3_2_2_8() {
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "limits")).await;
    assert_eq!(
        answer.property(0x21).unwrap(),
        RECEIVE_MAXIMUM.to_be_bytes()
    );
    assert_eq!(answer.property(0x22).unwrap(), ALIASES.to_be_bytes());
    assert_eq!(
        answer.property(0x27).unwrap(),
        (MAX_PACKET as u32).to_be_bytes()
    );
}

/// A message that is sent again says so, and one that is not does not
#[tokio::test]
async fn mqtt_3_3_1_1() {
    let mut wire = kept(V5, "again").await;
    wire.subscribe(&[("again", 1)]).await;
    let mut sender = client(V5, "again-sender").await;
    sender.publish_and_wait(1, "again", 1, "x").await;
    assert!(!wire.delivery().await.duplicate);
    wire.drop_dead();
    let mut wire = kept(V5, "again").await;
    assert!(wire.take().await.duplicate);
}

/// The duplicate flag of a publisher is not passed on
#[tokio::test]
async fn mqtt_3_3_1_3() {
    let mut wire = client(V5, "dup").await;
    wire.subscribe(&[("dup", 1)]).await;
    wire.publish(0x0a, "dup", 1, "x").await;
    loop {
        let packet = wire.next().await;
        if packet.first >> 4 == 3 {
            assert!(!packet.delivered(V5).duplicate);
            return;
        }
    }
}

/// A retained message takes the place of the one before
#[tokio::test]
async fn mqtt_3_3_1_5() {
    let mut wire = client(V5, "retained-5").await;
    wire.publish_and_wait(1, "retained-5", 1, "ignored").await;
    for payload in ["first", "second"] {
        wire.publish(0x03, "retained-5", 2, payload).await;
        wire.answer(0x40, 2).await;
    }
    wire.subscribe(&[("retained-5", 1)]).await;
    let message = wire.take().await;
    assert_eq!((message.text(), message.retain), ("second", true));
    wire.quiet().await;
}

/// An empty retained message takes the one before away
#[tokio::test]
async fn mqtt_3_3_1_6() {
    let mut wire = client(V5, "retained-6").await;
    for payload in ["kept", ""] {
        wire.publish(0x03, "retained-6", 1, payload).await;
        wire.answer(0x40, 1).await;
    }
    wire.subscribe(&[("retained-6", 1)]).await;
    wire.quiet().await;
}

/// An empty retained message is itself not retained, and delivered as any other
#[tokio::test]
async fn mqtt_3_3_1_7() {
    let mut wire = client(V5, "retained-7").await;
    wire.subscribe(&[("retained-7", 0)]).await;
    wire.publish(0x01, "retained-7", 0, "").await;
    let message = wire.delivery().await;
    assert_eq!((message.text(), message.retain), ("", false));
}

/// A message without retain leaves the retained one as it is
#[tokio::test]
async fn mqtt_3_3_1_8() {
    let mut wire = client(V5, "retained-8").await;
    wire.publish(0x03, "retained-8", 1, "kept").await;
    wire.answer(0x40, 1).await;
    wire.publish_and_wait(1, "retained-8", 2, "passing").await;
    wire.subscribe(&[("retained-8", 0)]).await;
    assert_eq!(wire.delivery().await.text(), "kept");
}

/// Retain handling 0: retained messages are sent with each subscription
#[tokio::test]
async fn mqtt_3_3_1_9() {
    let mut wire = client(V5, "handling-0").await;
    wire.publish(0x01, "handling-0", 0, "x").await;
    for _ in 0..2 {
        wire.subscribe(&[("handling-0", 0)]).await;
        assert!(wire.delivery().await.retain);
    }
}

/// Retain handling 1: retained messages are sent with a new subscription only
#[tokio::test]
async fn mqtt_3_3_1_10() {
    let mut wire = client(V5, "handling-1").await;
    wire.publish(0x01, "handling-1", 0, "x").await;
    wire.subscribe(&[("handling-1", 0x10)]).await;
    assert!(wire.delivery().await.retain);
    wire.subscribe(&[("handling-1", 0x10)]).await;
    wire.quiet().await;
}

/// Retain handling 2: retained messages are not sent
#[tokio::test]
async fn mqtt_3_3_1_11() {
    let mut wire = client(V5, "handling-2").await;
    wire.publish(0x01, "handling-2", 0, "x").await;
    wire.subscribe(&[("handling-2", 0x20)]).await;
    wire.quiet().await;
}

/// Without retain as published the flag is not passed on
#[tokio::test]
async fn mqtt_3_3_1_12() {
    let mut wire = client(V5, "as-published-0").await;
    wire.subscribe(&[("as-published-0", 0)]).await;
    wire.publish(0x01, "as-published-0", 0, "x").await;
    assert!(!wire.delivery().await.retain);
}

/// With retain as published the flag is as it was
#[tokio::test]
async fn mqtt_3_3_1_13() {
    let mut wire = client(V5, "as-published-1").await;
    wire.subscribe(&[("as-published-1", 0x08)]).await;
    for flags in [0, 1] {
        wire.publish(flags, "as-published-1", 0, "x").await;
        assert_eq!(wire.delivery().await.retain, flags == 1);
    }
}

/// The topic of a message matches the subscription
#[tokio::test]
async fn mqtt_3_3_2_3() {
    let mut wire = client(V5, "matches").await;
    wire.subscribe(&[("matches/+/c", 0)]).await;
    for topic in ["matches/a/b", "matches/a/c/d", "matches/c", "matches/a/c"] {
        wire.publish(0, topic, 0, "x").await;
    }
    assert_eq!(wire.delivery().await.topic, "matches/a/c");
    wire.quiet().await;
}

/// A message with these properties comes as it was sent.
async fn passes_on(name: &str, properties: Fields) {
    let mut wire = client(V5, name).await;
    wire.subscribe(&[(name, 0)]).await;
    wire.publish_with(0, name, 0, &properties, "x").await;
    assert_eq!(wire.delivery().await.properties, properties.0);
}

/// The payload format indicator is passed on
#[tokio::test]
async fn mqtt_3_3_2_4() {
    passes_on("format", fields().byte(0x01).byte(1)).await;
}

/// A message that has expired is not delivered
#[tokio::test]
async fn mqtt_3_3_2_5() {
    let wire = kept(V5, "expiry-5").await;
    let mut wire = wire;
    wire.subscribe(&[("expiry-5", 1)]).await;
    wire.leave().await;
    let mut sender = client(V5, "expiry-5-sender").await;
    let expiry = fields().byte(0x02).four(1);
    sender
        .publish_with(0x02, "expiry-5", 1, &expiry, "late")
        .await;
    sender.answer(0x40, 1).await;
    sender.publish_and_wait(1, "expiry-5", 2, "kept").await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let mut wire = kept(V5, "expiry-5").await;
    assert_eq!(wire.take().await.text(), "kept");
}

/// The expiry that is left is passed on
#[tokio::test]
async fn mqtt_3_3_2_6() {
    let mut wire = kept(V5, "expiry-6").await;
    wire.subscribe(&[("expiry-6", 1)]).await;
    wire.leave().await;
    let mut sender = client(V5, "expiry-6-sender").await;
    let expiry = fields().byte(0x02).four(100);
    sender.publish_with(0x02, "expiry-6", 1, &expiry, "x").await;
    sender.answer(0x40, 1).await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let mut wire = kept(V5, "expiry-6").await;
    let left = wire.take().await.property(0x02);
    let left = u32::from_be_bytes(left[0][..].try_into().unwrap());
    assert!((90..=99).contains(&left), "{left}");
}

/// An alias ends with its connection
#[tokio::test]
async fn mqtt_3_3_2_7() {
    let alias = fields().byte(0x23).two(1);
    let mut wire = kept(V5, "alias-7").await;
    wire.publish_with(0, "alias-7", 0, &alias, "x").await;
    wire.quiet().await;
    wire.leave().await;
    let mut wire = kept(V5, "alias-7").await;
    wire.publish_with(0, "", 0, &alias, "x").await;
    assert_eq!(wire.end().await, Some(0x82));
}

/// Aliases up to the maximum are taken, set anew, and not passed on
#[tokio::test]
async fn mqtt_3_3_2_10() {
    let mut wire = client(V5, "alias-10").await;
    wire.subscribe(&[("alias-10/#", 0)]).await;
    let alias = fields().byte(0x23).two(ALIASES);
    for (topic, expected) in [
        ("alias-10/a", "a"),
        ("", "a"),
        ("alias-10/b", "b"),
        ("", "b"),
    ] {
        wire.publish_with(0, topic, 0, &alias, "x").await;
        let message = wire.delivery().await;
        assert_eq!(message.topic, format!("alias-10/{expected}"));
        assert!(message.properties.is_empty());
    }
}

/// The response topic is passed on
#[tokio::test]
async fn mqtt_3_3_2_15() {
    passes_on("response", fields().byte(0x08).text("replies/here")).await;
}

/// Correlation data are passed on
#[tokio::test]
async fn mqtt_3_3_2_16() {
    passes_on("correlation", fields().byte(0x09).text([0, 1, 0xff])).await;
}

/// User properties are passed on
#[tokio::test]
async fn mqtt_3_3_2_17() {
    passes_on("user", fields().byte(0x26).text("name").text("value")).await;
}

/// User properties keep their order, and one may come twice
#[tokio::test]
async fn mqtt_3_3_2_18() {
    let property =
        |fields: Fields, name: &str, value: &str| fields.byte(0x26).text(name).text(value);
    let properties = property(fields(), "b", "1");
    let properties = property(properties, "a", "2");
    passes_on("order", property(properties, "b", "1")).await;
}

/// The content type is passed on
#[tokio::test]
async fn mqtt_3_3_2_20() {
    passes_on("content", fields().byte(0x03).text("text/plain")).await;
}

/// Each QoS has its answer
#[tokio::test]
async fn mqtt_3_3_4_1() {
    let mut wire = client(V5, "answers").await;
    wire.publish(0, "answers", 0, "x").await;
    wire.quiet().await;
    wire.publish(0x02, "answers", 1, "x").await;
    assert_eq!(wire.next().await.first, 0x40);
    wire.publish(0x04, "answers", 2, "x").await;
    assert_eq!(wire.next().await.first, 0x50);
}

/// Overlapping subscriptions give one message of the highest QoS
#[tokio::test]
async fn mqtt_3_3_4_2() {
    let mut wire = client(V5, "overlap").await;
    wire.subscribe(&[("overlap/#", 0), ("overlap/+", 2), ("overlap/a", 1)])
        .await;
    let mut sender = client(V5, "overlap-sender").await;
    sender.publish_and_wait(2, "overlap/a", 1, "x").await;
    assert_eq!(wire.take().await.qos, 2);
    wire.quiet().await;
}

/// The subscription identifier comes with the message
#[tokio::test]
async fn mqtt_3_3_4_3() {
    let mut wire = client(V5, "identifier").await;
    let identifier = fields().byte(0x0b).varint(268_435_455);
    wire.subscribe_with(&identifier, &[("identifier", 0)]).await;
    wire.publish(0, "identifier", 0, "x").await;
    assert_eq!(
        wire.delivery().await.property(0x0b),
        [268_435_455u32.to_be_bytes()]
    );
}

/// One message has the identifiers of all subscriptions
#[tokio::test]
async fn mqtt_3_3_4_4() {
    let mut wire = client(V5, "identifiers").await;
    for (number, filter) in [(2, "identifiers/a"), (3, "identifiers/#")] {
        let identifier = fields().byte(0x0b).varint(number);
        wire.subscribe_with(&identifier, &[(filter, 0)]).await;
    }
    wire.publish(0, "identifiers/a", 0, "x").await;
    let found = wire.delivery().await.property(0x0b);
    assert_eq!(found, [2u32.to_be_bytes(), 3u32.to_be_bytes()]);
    wire.quiet().await;
}

/// One more QoS 2 message than the receive maximum ends the connection with 0x93
#[tokio::test]
async fn mqtt_3_3_4_7() {
    let mut wire = client(V5, "too-many").await;
    for id in 1..=RECEIVE_MAXIMUM + 1 {
        wire.publish(0x04, "too-many", id, "x").await;
    }
    assert_eq!(wire.end().await, Some(0x93));
}

/// No more messages are on their way than the client takes at once
#[tokio::test]
async fn mqtt_3_3_4_9() {
    for qos in [1, 2] {
        let name = format!("window-{qos}");
        let hello = Hello::new(V5, &name).with(fields().byte(0x21).two(2));
        let mut wire = Wire::connect(shared(), &hello).await;
        wire.subscribe(&[(&name, qos)]).await;
        let mut sender = client(V5, &format!("{name}-sender")).await;
        for id in 1..=4 {
            sender.publish_and_wait(qos, &name, id, "x").await;
        }
        let first = wire.delivery().await;
        wire.delivery().await;
        wire.quiet().await;
        if qos == 1 {
            wire.ack(0x40, first.id).await;
        } else {
            wire.ack(0x50, first.id).await;
            wire.answer(0x62, first.id).await;
            wire.quiet().await;
            wire.ack(0x70, first.id).await;
        }
        wire.delivery().await;
        wire.quiet().await;
    }
}

/// A full window delays no other packet
#[tokio::test]
async fn mqtt_3_3_4_10() {
    let hello = Hello::new(V5, "window-10").with(fields().byte(0x21).two(1));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.subscribe(&[("window-10/#", 1)]).await;
    let mut sender = client(V5, "window-10-sender").await;
    for id in 1..=3 {
        sender.publish_and_wait(1, "window-10/a", id, "x").await;
    }
    wire.delivery().await;
    wire.publish_and_wait(1, "window-10-other", 1, "x").await;
    wire.quiet().await;
}

/// A denied publish is answered with its reason in PUBACK and PUBREC
#[tokio::test]
async fn mqtt_3_4_2_1() {
    let mut wire = client(V5, "denied").await;
    wire.publish(0x02, "secret/a", 1, "x").await;
    let answer = wire.next().await;
    assert_eq!((answer.first, answer.reason()), (0x40, 0x87));
    wire.publish(0x04, "secret/a", 2, "x").await;
    let answer = wire.next().await;
    assert_eq!((answer.first, answer.reason()), (0x50, 0x87));
    // The id of a message that was refused is free.
    wire.publish(0x04, "denied", 2, "x").await;
    let answer = wire.next().await;
    assert_eq!((answer.first, answer.reason()), (0x50, 0));
}

/// A PUBREL for an id that is not in use is answered with 0x92
#[tokio::test]
async fn mqtt_3_7_2_1() {
    let mut wire = client(V5, "unknown-release").await;
    wire.ack(0x62, 99).await;
    let answer = wire.next().await;
    assert_eq!((answer.first, answer.reason()), (0x70, 0x92));
}

/// A PUBREC for an id that is not in use is answered with 0x92
#[tokio::test]
async fn mqtt_3_6_2_1() {
    let mut wire = client(V5, "unknown-received").await;
    wire.ack(0x50, 99).await;
    let answer = wire.next().await;
    assert_eq!((answer.first, answer.reason()), (0x62, 0x92));
}

/// No local: a client does not get what it published
#[tokio::test]
async fn mqtt_3_8_3_3() {
    let mut wire = client(V5, "no-local").await;
    wire.subscribe(&[("no-local", 0x04)]).await;
    wire.publish(0, "no-local", 0, "own").await;
    wire.quiet().await;
    let mut other = client(V5, "no-local-other").await;
    other.publish(0, "no-local", 0, "other").await;
    assert_eq!(wire.delivery().await.text(), "other");
}

/// A subscription to the same filter takes the place of the one before
#[tokio::test]
async fn mqtt_3_8_4_3() {
    let mut wire = client(V5, "replaced").await;
    assert_eq!(wire.subscribe(&[("replaced", 0)]).await, [0]);
    assert_eq!(wire.subscribe(&[("replaced", 2)]).await, [2]);
    let mut sender = client(V5, "replaced-sender").await;
    sender.publish_and_wait(2, "replaced", 1, "x").await;
    assert_eq!(wire.take().await.qos, 2);
    wire.quiet().await;
    wire.unsubscribe(&["replaced"]).await;
    sender.publish_and_wait(2, "replaced", 2, "x").await;
    wire.quiet().await;
}

/// Several filters are as several SUBSCRIBE packets, in one SUBACK
#[tokio::test]
async fn mqtt_3_8_4_5() {
    let mut wire = client(V5, "several").await;
    assert_eq!(
        wire.subscribe(&[("several/a", 0), ("several/b", 1)]).await,
        [0, 1]
    );
    for topic in ["several/a", "several/b"] {
        wire.publish(0, topic, 0, "x").await;
        assert_eq!(wire.delivery().await.topic, topic);
    }
}

/// SUBACK has one code for each filter: the QoS granted, or why not
#[tokio::test]
async fn mqtt_3_8_4_6() {
    let mut wire = client(V5, "codes").await;
    let codes = wire
        .subscribe(&[
            ("codes", 2),
            ("secret/a", 1),
            ("a/#/b", 0),
            ("codes/1", 1),
            ("$share//a", 0),
        ])
        .await;
    assert_eq!(codes, [2, 0x87, 0x8f, 1, 0x8f]);
}

/// A message comes at the lower QoS of publisher and subscription
#[tokio::test]
async fn mqtt_3_8_4_8() {
    let mut sender = client(V5, "lower-sender").await;
    for granted in 0..=2 {
        let name = format!("lower-{granted}");
        let mut wire = client(V5, &name).await;
        wire.subscribe(&[(&name, granted)]).await;
        sender.publish(0, &name, 0, "x").await;
        for qos in 1..=2 {
            sender.publish_and_wait(qos, &name, 1, "x").await;
        }
        for qos in 0..=2 {
            assert_eq!(wire.take().await.qos, granted.min(qos));
        }
    }
}

/// UNSUBSCRIBE ends exactly the subscription with this filter
#[tokio::test]
async fn mqtt_3_10_4_1() {
    let mut wire = client(V5, "exact").await;
    wire.subscribe(&[("exact/#", 0), ("exact/a", 0)]).await;
    let answer = wire.unsubscribe(&["exact/+", "exact/a"]).await;
    assert_eq!(answer.codes(V5), [0x11, 0]);
    wire.publish(0, "exact/a", 0, "x").await;
    assert_eq!(wire.delivery().await.topic, "exact/a");
}

/// After UNSUBSCRIBE nothing more comes
#[tokio::test]
async fn mqtt_3_10_4_2() {
    let mut wire = client(V5, "stopped").await;
    wire.subscribe(&[("stopped", 0)]).await;
    wire.unsubscribe(&["stopped"]).await;
    wire.publish(0, "stopped", 0, "x").await;
    wire.quiet().await;
}

/// What is under way at UNSUBSCRIBE is brought to its end
#[tokio::test]
async fn mqtt_3_10_4_3() {
    let mut wire = client(V5, "under-way").await;
    wire.subscribe(&[("under-way", 2)]).await;
    let mut sender = client(V5, "under-way-sender").await;
    sender.publish_and_wait(2, "under-way", 1, "x").await;
    let message = wire.delivery().await;
    wire.unsubscribe(&["under-way"]).await;
    wire.ack(0x50, message.id).await;
    wire.answer(0x62, message.id).await;
    wire.ack(0x70, message.id).await;
    wire.quiet().await;
}

/// UNSUBACK comes also when there was no such subscription
#[tokio::test]
async fn mqtt_3_10_4_5() {
    let mut wire = client(V5, "nothing-there").await;
    let answer = wire.unsubscribe(&["nothing-there"]).await;
    assert_eq!(answer.codes(V5), [0x11]);
}

/// Codes of UNSUBACK are in the order of the filters
#[tokio::test]
async fn mqtt_3_11_3_1() {
    let mut wire = client(V5, "in-order").await;
    wire.subscribe(&[("in-order/b", 0)]).await;
    let answer = wire
        .unsubscribe(&["in-order/a", "in-order/b", "a/#/b"])
        .await;
    assert_eq!(answer.codes(V5), [0x11, 0, 0x8f]);
}

/// PINGREQ is answered
#[tokio::test]
async fn mqtt_3_12_4_1() {
    let mut wire = client(V5, "ping").await;
    wire.send([0xc0, 0, 0xc0, 0]).await;
    for _ in 0..2 {
        let answer = wire.next().await;
        assert_eq!((answer.first, answer.body.len()), (0xd0, 0));
    }
}

/// A client that is not let in gets no DISCONNECT
#[tokio::test]
async fn mqtt_3_14_0_1() {
    let mut wire = Wire::open(shared(), V5).await;
    wire.send(greeting(0x03).text("x").packet(0x10)).await;
    assert_eq!(wire.next().await.first, 0x20);
    assert_eq!(wire.try_next().await, None);
}

/// After a DISCONNECT of the client the broker closes the connection
#[tokio::test]
async fn mqtt_3_14_4_1() {
    client(V5, "goodbye").await.leave().await;
}

/// DISCONNECT with 0x04 has the will published
#[tokio::test]
async fn mqtt_3_14_4_3() {
    let mut reader = client(V5, "with-will-reader").await;
    reader.subscribe(&[("with-will", 0)]).await;
    let hello = Hello::new(V5, "with-will").will(0, none(), "with-will", "gone");
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.send([0xe0, 1, 0x04]).await;
    assert_eq!(reader.delivery().await.text(), "gone");
}

/// The session stays while its connection is open
#[tokio::test]
async fn mqtt_4_1_0_1() {
    let mut wire = client(V5, "open").await;
    wire.subscribe(&[("open", 0)]).await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    wire.publish(0, "open", 0, "x").await;
    assert_eq!(wire.delivery().await.text(), "x");
}

/// The session ends when its time without a connection has passed
#[tokio::test]
async fn mqtt_4_1_0_2() {
    Wire::connect(shared(), &Hello::new(V5, "expires").kept(1))
        .await
        .leave()
        .await;
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    let (_wire, answer) = Wire::greet(shared(), &Hello::new(V5, "expires").kept(1)).await;
    assert_eq!(answer.body[0], 0);
}

/// A QoS 1 message is sent until it is acknowledged
#[tokio::test]
async fn mqtt_4_3_2_3() {
    let mut wire = kept(V5, "until-acked").await;
    wire.subscribe(&[("until-acked", 1)]).await;
    let mut sender = client(V5, "until-acked-sender").await;
    sender.publish_and_wait(1, "until-acked", 1, "x").await;
    let first = wire.delivery().await;
    wire.drop_dead();
    let mut wire = kept(V5, "until-acked").await;
    let second = wire.take().await;
    assert_eq!((second.id, second.duplicate), (first.id, true));
    wire.quiet().await;
    wire.drop_dead();
    kept(V5, "until-acked").await.quiet().await;
}

/// A message of QoS 1 with the id of one that was acknowledged is a new one
#[tokio::test]
async fn mqtt_4_3_2_5() {
    let mut wire = client(V5, "new-one").await;
    wire.subscribe(&[("new-one", 0)]).await;
    for payload in ["a", "b"] {
        wire.publish_and_wait(1, "new-one", 1, payload).await;
        assert_eq!(wire.delivery().await.text(), payload);
    }
}

/// PUBREL follows PUBREC, and PUBLISH is not sent again after it
#[tokio::test]
async fn mqtt_4_3_3_6() {
    let mut wire = kept(V5, "released").await;
    wire.subscribe(&[("released", 2)]).await;
    let mut sender = client(V5, "released-sender").await;
    sender.publish_and_wait(2, "released", 1, "x").await;
    let message = wire.delivery().await;
    wire.ack(0x50, message.id).await;
    wire.answer(0x62, message.id).await;
    wire.drop_dead();
    let mut wire = kept(V5, "released").await;
    let answer = wire.next().await;
    assert_eq!((answer.first, answer.id()), (0x62, message.id));
    wire.ack(0x70, message.id).await;
    wire.quiet().await;
}

/// A QoS 2 message is handed on once, however often it is sent before PUBREL
#[tokio::test]
async fn mqtt_4_3_3_10() {
    let mut wire = client(V5, "once").await;
    wire.subscribe(&[("once", 0)]).await;
    for flags in [0x04, 0x0c, 0x0c] {
        wire.publish(flags, "once", 1, "x").await;
        wire.answer(0x50, 1).await;
    }
    assert_eq!(wire.delivery().await.text(), "x");
    wire.ack(0x62, 1).await;
    wire.answer(0x70, 1).await;
    wire.quiet().await;
}

/// After PUBCOMP the id means another message
#[tokio::test]
async fn mqtt_4_3_3_12() {
    let mut wire = client(V5, "twice").await;
    wire.subscribe(&[("twice", 0)]).await;
    for payload in ["a", "b"] {
        wire.publish_and_wait(2, "twice", 1, payload).await;
        assert_eq!(wire.delivery().await.text(), payload);
    }
}

/// Messages are sent again in their order and with their ids
#[tokio::test]
async fn mqtt_4_4_0_1() {
    let mut wire = kept(V5, "original-ids").await;
    wire.subscribe(&[("original-ids", 2)]).await;
    let mut sender = client(V5, "original-ids-sender").await;
    for id in 1..=6 {
        sender
            .publish_and_wait(
                1 + u8::from(id % 2 == 0),
                "original-ids",
                id,
                &id.to_string(),
            )
            .await;
    }
    let mut first = Vec::new();
    for _ in 0..6 {
        let message = wire.delivery().await;
        first.push((message.id, message.payload));
    }
    wire.drop_dead();
    let mut wire = kept(V5, "original-ids").await;
    let mut second = Vec::new();
    for _ in 0..6 {
        let message = wire.delivery().await;
        assert!(message.duplicate);
        second.push((message.id, message.payload));
    }
    assert_eq!(first, second);
}

/// A message that the client refused with PUBREC is not sent again
#[tokio::test]
async fn mqtt_4_4_0_2() {
    let mut wire = kept(V5, "refused-by-client").await;
    wire.subscribe(&[("refused-by-client", 2)]).await;
    let mut sender = client(V5, "refused-by-client-sender").await;
    sender
        .publish_and_wait(2, "refused-by-client", 1, "x")
        .await;
    let message = wire.delivery().await;
    wire.send(fields().two(message.id).byte(0x83).packet(0x50))
        .await;
    wire.quiet().await;
    wire.drop_dead();
    kept(V5, "refused-by-client").await.quiet().await;
}

/// What is published goes to every session that matches
#[tokio::test]
async fn mqtt_4_5_0_1() {
    let mut readers = [client(V5, "every-a").await, client(V5, "every-b").await];
    for reader in &mut readers {
        reader.subscribe(&[("every/#", 0)]).await;
    }
    let mut sender = client(V5, "every-sender").await;
    sender.publish(0, "every/one", 0, "x").await;
    for reader in &mut readers {
        assert_eq!(reader.delivery().await.text(), "x");
    }
}

/// PUBACKs are in the order of the messages
#[tokio::test]
async fn mqtt_4_6_0_2() {
    let mut wire = client(V5, "acks-in-order").await;
    for id in 1..=20 {
        wire.publish(0x02, "acks-in-order", id, "x").await;
    }
    for id in 1..=20 {
        assert_eq!(wire.next().await.id(), id);
    }
}

/// PUBRECs are in the order of the messages
#[tokio::test]
async fn mqtt_4_6_0_3() {
    let mut wire = client(V5, "recs-in-order").await;
    for id in 1..=10 {
        wire.publish(0x04, "recs-in-order", id, "x").await;
    }
    for id in 1..=10 {
        let answer = wire.next().await;
        assert_eq!((answer.first, answer.id()), (0x50, id));
    }
}

/// PUBRELs are in the order of the PUBRECs
#[tokio::test]
async fn mqtt_4_6_0_4() {
    let mut wire = client(V5, "rels-in-order").await;
    wire.subscribe(&[("rels-in-order", 2)]).await;
    let mut sender = client(V5, "rels-in-order-sender").await;
    for id in 1..=3 {
        sender.publish_and_wait(2, "rels-in-order", id, "x").await;
    }
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(wire.delivery().await.id);
    }
    ids.reverse();
    for id in &ids {
        wire.ack(0x50, *id).await;
    }
    for id in ids {
        assert_eq!(wire.next().await.id(), id);
    }
}

/// Messages of one publisher and topic come in their order, at each QoS
#[tokio::test]
async fn mqtt_4_6_0_5() {
    for qos in 0..=2 {
        let name = format!("ordered-{qos}");
        let mut wire = client(V5, &name).await;
        wire.subscribe(&[(&name, qos)]).await;
        let mut sender = client(V5, &format!("{name}-sender")).await;
        for number in 1..=15 {
            if qos == 0 {
                sender.publish(0, &name, 0, &number.to_string()).await;
            } else {
                sender
                    .publish_and_wait(qos, &name, number, &number.to_string())
                    .await;
            }
        }
        for number in 1..=15 {
            assert_eq!(wire.take().await.text(), number.to_string());
        }
    }
}

/// `#` is the last character of a filter and a level of its own
#[tokio::test]
async fn mqtt_4_7_1_1() {
    let mut wire = client(V5, "rest-wildcard").await;
    assert_eq!(
        wire.subscribe(&[("a/#/b", 0), ("a#", 0), ("a/b#", 0)])
            .await,
        [0x8f; 3]
    );
    assert_eq!(wire.subscribe(&[("rest-wildcard/#", 0)]).await, [0]);
    for topic in ["rest-wildcard", "rest-wildcard/a", "rest-wildcard/a/b"] {
        wire.publish(0, topic, 0, "x").await;
        assert_eq!(wire.delivery().await.topic, topic);
    }
}

/// `+` is a whole level
#[tokio::test]
async fn mqtt_4_7_1_2() {
    let mut wire = client(V5, "level-wildcard").await;
    assert_eq!(wire.subscribe(&[("a+", 0), ("a/+b", 0)]).await, [0x8f; 2]);
    assert_eq!(wire.subscribe(&[("level-wildcard/+", 0)]).await, [0]);
    for topic in [
        "level-wildcard",
        "level-wildcard/a/b",
        "level-wildcard/",
        "level-wildcard/a",
    ] {
        wire.publish(0, topic, 0, "x").await;
    }
    assert_eq!(wire.delivery().await.topic, "level-wildcard/");
    assert_eq!(wire.delivery().await.topic, "level-wildcard/a");
    wire.quiet().await;
}

/// A wildcard at the beginning of a filter does not match a topic with a dollar sign
#[tokio::test]
async fn mqtt_4_7_2_1() {
    let mut wire = client(V5, "dollar").await;
    wire.subscribe(&[("+/dollar", 0), ("$other/#", 0)]).await;
    wire.publish(0, "$other/dollar", 0, "x").await;
    assert_eq!(wire.delivery().await.topic, "$other/dollar");
    wire.quiet().await;
}

/// An empty filter is not valid
#[tokio::test]
async fn mqtt_4_7_3_1() {
    let mut wire = client(V5, "empty-filter").await;
    assert_eq!(wire.subscribe(&[("", 0)]).await, [0x8f]);
}

/// Topics that differ in case, or look alike, are different
#[tokio::test]
async fn mqtt_4_7_3_4() {
    let mut wire = client(V5, "alike").await;
    wire.subscribe(&[("alike/\u{e9}", 0)]).await;
    for topic in [
        "alike/e\u{301}",
        "alike/\u{c9}",
        "/alike/\u{e9}",
        "alike/\u{e9}",
    ] {
        wire.publish(0, topic, 0, topic).await;
    }
    assert_eq!(wire.delivery().await.topic, "alike/\u{e9}");
    wire.quiet().await;
}

/// A share name has at least one character
#[tokio::test]
async fn mqtt_4_8_2_1() {
    let mut wire = client(V5, "share-name").await;
    assert_eq!(
        wire.subscribe(&[("$share//a", 0), ("$share/g", 0)]).await,
        [0x8f; 2]
    );
}

/// A share name has no wildcards, and a filter follows it
#[tokio::test]
async fn mqtt_4_8_2_2() {
    let mut wire = client(V5, "share-wildcard").await;
    assert_eq!(
        wire.subscribe(&[("$share/g+/a", 0), ("$share/#/a", 0)])
            .await,
        [0x8f; 2]
    );
}

/// A member of a share group gets messages at the QoS that it was granted
#[tokio::test]
async fn mqtt_4_8_2_3() {
    let mut wire = client(V5, "share-qos").await;
    wire.subscribe(&[("$share/g/share-qos", 1)]).await;
    let mut sender = client(V5, "share-qos-sender").await;
    sender.publish_and_wait(2, "share-qos", 1, "x").await;
    assert_eq!(wire.take().await.qos, 1);
}

/// A QoS 2 message that was sent to one member of a share group is that member's
#[tokio::test]
async fn mqtt_4_8_2_4() {
    let mut wire = kept(V5, "bound").await;
    wire.subscribe(&[("$share/g/bound", 2)]).await;
    let mut sender = client(V5, "bound-sender").await;
    sender.publish_and_wait(2, "bound", 1, "x").await;
    let first = wire.delivery().await;
    wire.drop_dead();
    let mut other = client(V5, "bound-other").await;
    other.subscribe(&[("$share/g/bound", 2)]).await;
    other.quiet().await;
    let mut wire = kept(V5, "bound").await;
    assert_eq!(wire.take().await.id, first.id);
}

/// The window begins anew with each connection
#[tokio::test]
async fn mqtt_4_9_0_1() {
    let hello = Hello::new(V5, "quota")
        .kept(600)
        .with(fields().byte(0x21).two(1));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.subscribe(&[("quota", 1)]).await;
    let mut sender = client(V5, "quota-sender").await;
    for id in 1..=2 {
        sender.publish_and_wait(1, "quota", id, "x").await;
    }
    wire.delivery().await;
    wire.quiet().await;
    wire.drop_dead();
    let hello = Hello::new(V5, "quota")
        .kept(600)
        .with(fields().byte(0x21).two(2));
    let mut wire = Wire::connect(shared(), &hello).await;
    wire.delivery().await;
    wire.delivery().await;
}

/// A PUBACK for a QoS 2 message is a protocol error
#[tokio::test]
async fn mqtt_4_3_3_4_puback() {
    out_of_order("puback-for-2", 2, 0x40).await;
}

/// A PUBCOMP before PUBREC is a protocol error
#[tokio::test]
async fn mqtt_4_3_3_4_pubcomp() {
    out_of_order("pubcomp-for-2", 2, 0x70).await;
}

/// A PUBREC for a QoS 1 message is a protocol error
#[tokio::test]
async fn mqtt_4_3_2_3_pubrec() {
    out_of_order("pubrec-for-1", 1, 0x50).await;
}

async fn out_of_order(name: &str, qos: u8, answer: u8) {
    let mut wire = client(V5, name).await;
    wire.subscribe(&[(name, qos)]).await;
    let mut sender = client(V5, &format!("{name}-sender")).await;
    sender.publish_and_wait(qos, name, 1, "x").await;
    let message = wire.delivery().await;
    wire.ack(answer, message.id).await;
    assert_eq!(wire.end().await, Some(0x82));
    sender.quiet().await;
}
