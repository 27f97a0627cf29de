//! Telemetry that is worthless when late: in datagrams on both hops, on lanes where it must be.

use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, TransportConfig, VarInt};
use selvedge_client::{
    Class, Client, Code, Options, Properties, Publish, PublishError, Qos, SubscribeOptions,
    Subscription,
};
use selvedge_proto::datagram::DatagramRef;
use selvedge_proto::frame::{FrameDecoder, Kind};
use selvedge_proto::lane::{Flags, MessageFrame};
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{RawControl, RawQuic, TestBroker, UdpLink, Weather, broker, raw};

use super::pubsub::next;

const LOSSY: Weather = Weather {
    loss: 0.3,
    delay: Duration::from_millis(2),
    ..Weather::FAIR
};

fn telemetry(topic: &str, payload: impl Into<Bytes>) -> Publish {
    Publish::new(topic, payload).datagram(true)
}

fn wanted() -> SubscribeOptions {
    SubscribeOptions {
        datagrams: true,
        ..SubscribeOptions::default()
    }
}

async fn subscribe(client: &Client, filter: &str) -> Subscription {
    let subscribed = client.subscribe_with(filter, wanted());
    within("a subscription", subscribed).await.unwrap()
}

/// A client whose way to the broker is the link.
async fn behind(broker: &TestBroker, link: &UdpLink, name: &str) -> Client {
    let options: Options = broker.options(broker.device(name));
    broker.connect(options.resolve(link.address())).await
}

/// The same without the loss; a shorter way would let what comes later overtake.
const CLEAR: Weather = Weather { loss: 0.0, ..LOSSY };

/// A press publishes telemetry in datagrams and jobs with QoS 1 while a third of the packets is lost.
async fn telemetry_keeps_its_pace(press: Client, panel: Client, set: impl Fn(Weather)) {
    const READINGS: u32 = 400;
    const JOBS: u32 = 40;
    let mut readings = subscribe(&panel, "press/+/temp").await;
    let mut jobs = panel.subscribe("jobs").await.unwrap();
    set(LOSSY);
    let publishing = {
        let press = press.clone();
        tokio::spawn(async move {
            // The rate of a sensor, and no wait for anything.
            let mut tick = tokio::time::interval(Duration::from_millis(2));
            for number in 0..READINGS {
                tick.tick().await;
                let message = telemetry("press/7/temp", number.to_string());
                press.publish_message(message).await.unwrap();
            }
        })
    };
    for number in 0..JOBS {
        let job = Publish::new("jobs", number.to_string()).qos(Qos::AtLeastOnce);
        within("an acknowledgement", press.publish_message(job))
            .await
            .unwrap();
    }
    for number in 0..JOBS {
        assert_eq!(next(&mut jobs).await.payload, number.to_string());
    }
    within("the last reading", publishing).await.unwrap();
    set(CLEAR);
    // What still waits behind the loss may be dropped for these, of which one arrives.
    let mut last = tokio::time::interval(Duration::from_millis(50));
    let mut seen = Vec::new();
    within("a reading after the loss", async {
        loop {
            tokio::select! {
                _ = last.tick() => {
                    let message = telemetry("press/7/temp", READINGS.to_string());
                    press.publish_message(message).await.unwrap();
                }
                message = readings.next() => {
                    let message = message.unwrap();
                    assert_eq!(message.qos, Qos::AtMostOnce);
                    let number = std::str::from_utf8(&message.payload).unwrap();
                    seen.push(number.parse::<u32>().unwrap());
                    if seen.last() == Some(&READINGS) {
                        break;
                    }
                }
            }
        }
    })
    .await;
    assert!(
        seen.windows(2).all(|pair| pair[0] < pair[1]),
        "in rising order, and none twice: {seen:?}"
    );
    let lost = (READINGS as usize + 1).saturating_sub(seen.len());
    assert!(lost > 0, "a lossy link loses some for good");
    assert!(
        seen.len() > READINGS as usize / 4,
        "later readings arrive although earlier ones are lost: {seen:?}"
    );
    assert_eq!(press.stats().datagram_fallbacks, 0);
    assert_eq!((press.stats().reconnects, panel.stats().reconnects), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn telemetry_keeps_its_pace_on_the_way_up_and_nothing_else_is_lost() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 5).await.unwrap();
    let press = behind(&broker, &link, "press-7").await;
    let panel = broker.client("panel-1").await;
    telemetry_keeps_its_pace(press, panel, |up| link.set_each(up, CLEAR)).await;
    assert!(link.counts().lost > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn telemetry_keeps_its_pace_on_the_way_down_and_nothing_else_is_lost() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 6).await.unwrap();
    let press = broker.client("press-7").await;
    let panel = behind(&broker, &link, "panel-1").await;
    telemetry_keeps_its_pace(press, panel, |down| link.set_each(CLEAR, down)).await;
    assert!(link.counts().lost > 0);
}

#[tokio::test]
async fn what_does_not_belong_in_a_datagram_goes_its_usual_way_and_comes_once() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let panel = broker.client("panel-1").await;
    let kept = Publish::new("line/old", "kept")
        .qos(Qos::AtLeastOnce)
        .retain(true);
    press.publish_message(kept).await.unwrap();
    let mut line = subscribe(&panel, "line/#").await;
    let old = next(&mut line).await;
    assert_eq!((&old.payload[..], old.retain), (&b"kept"[..], true));

    let sent = [
        telemetry("line/small", "x"),
        // No path has packets as large.
        telemetry("line/large", vec![7; 8000]),
        telemetry("line/last", "x").retain(true),
        telemetry("line/alarm", "x").class(Class::Alarm),
        telemetry("line/sure", "x").qos(Qos::AtLeastOnce),
    ];
    for message in sent {
        press.publish_message(message).await.unwrap();
    }
    let stats = press.stats();
    assert_eq!((stats.datagrams, stats.datagram_fallbacks), (1, 1));
    assert_eq!(stats.published, 6);
    // Nothing orders a datagram with lanes, nor lanes with each other.
    let mut seen = Vec::new();
    for _ in 0..5 {
        let message = next(&mut line).await;
        let topic = message.topic.to_string();
        seen.push((topic, message.payload.len(), message.class, message.qos));
    }
    seen.sort();
    let row = |topic: &str, length, class, qos| (topic.to_owned(), length, class, qos);
    let want = [
        row("line/alarm", 1, Class::Alarm, Qos::AtMostOnce),
        row("line/large", 8000, Class::Normal, Qos::AtMostOnce),
        row("line/last", 1, Class::Normal, Qos::AtMostOnce),
        row("line/small", 1, Class::Normal, Qos::AtMostOnce),
        row("line/sure", 1, Class::Normal, Qos::AtLeastOnce),
    ];
    assert_eq!(seen, want);
    // Nothing of it comes twice.
    press.publish("line/end", "x").await.unwrap();
    assert_eq!(next(&mut line).await.topic.as_str(), "line/end");
}

#[tokio::test]
async fn properties_travel_and_overlapping_subscriptions_get_one_each() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let panel = broker.client("panel-1").await;
    let mut narrow = subscribe(&panel, "press/7/temp").await;
    let mut wide = subscribe(&panel, "press/#").await;
    let mut on_lanes = panel.subscribe("press/+/temp").await.unwrap();
    let properties = Properties {
        content_type: "text/plain".into(),
        ..Properties::default()
    };
    for payload in ["1", "2"] {
        let message = telemetry("press/7/temp", payload).properties(properties.clone());
        press.publish_message(message).await.unwrap();
    }
    for subscription in [&mut narrow, &mut wide, &mut on_lanes] {
        for payload in ["1", "2"] {
            let message = next(subscription).await;
            assert_eq!(message.payload, payload);
            assert_eq!(message.properties().content_type, "text/plain");
            assert_eq!(
                &*message.publisher,
                "spiffe://test.example/acme/plant-1/press-7"
            );
        }
    }
    assert_eq!(panel.stats().delivered, 6);
}

#[tokio::test]
async fn datagrams_sent_right_before_a_goodbye_are_taken() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line").await.unwrap();
    for number in 0..20 {
        let press = broker.client("press-7").await;
        let message = telemetry("line", number.to_string());
        press.publish_message(message).await.unwrap();
        press.close().await;
        assert_eq!(next(&mut line).await.payload, number.to_string());
    }
}

#[tokio::test]
async fn a_datagram_is_not_kept_for_the_next_connection() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 1).await.unwrap();
    let press = behind(&broker, &link, "press-7").await;
    link.cut();
    let refused = eventually("the client to notice", || async {
        let published = press.publish_message(telemetry("line", "x")).await;
        published.err()
    })
    .await;
    assert_eq!(refused, PublishError::Disconnected);
    let stats = press.stats();
    assert_eq!(stats.dropped_disconnected, 1);
    assert!(stats.datagrams_dropped <= stats.datagrams, "{stats:?}");
}

async fn peer(
    broker: &TestBroker,
    name: &str,
    change: impl FnOnce(&mut TransportConfig),
) -> RawQuic {
    let mut config = raw::quic_config(broker.device(name), &broker.pki.anchors());
    let mut transport = TransportConfig::default();
    change(&mut transport);
    config.transport_config(std::sync::Arc::new(transport));
    RawQuic::connect(broker.quic(), config).await.unwrap()
}

/// Subscribes with `datagrams`, under id 9.
async fn subscribe_raw(control: &mut RawControl, filter: &str) {
    let subscription = wire::Subscription {
        id: 9,
        filter: filter.into(),
        datagrams: true,
        ..Default::default()
    };
    let subscribe = wire::Subscribe {
        request_id: 1,
        subscriptions: vec![subscription],
    };
    let frame = raw::control_frame(Frame::Subscribe(subscribe));
    control.write(&frame).await.unwrap();
    let Frame::Reply(reply) = control.read().await.unwrap() else {
        panic!("expected a reply");
    };
    assert_eq!(reply.statuses[0].code, 0);
}

#[tokio::test]
async fn a_delivered_datagram_names_subscription_topic_and_publisher() {
    let broker = TestBroker::open().await;
    let deaf = peer(&broker, "panel-1", |_| {}).await;
    let mut control = deaf.greet("panel").await.unwrap();
    subscribe_raw(&mut control, "line/#").await;
    // Published on a lane: each hop decides for itself.
    let press = broker.client("press-7").await;
    press.publish("line/1", "21.5").await.unwrap();
    let datagram = within("a datagram", deaf.connection.read_datagram())
        .await
        .unwrap();
    let want = DatagramRef {
        flags: Flags::new(Qos::AtMostOnce),
        subscription: 9,
        topic: "line/1",
        publisher: "spiffe://test.example/acme/plant-1/press-7",
        header: None,
        payload: b"21.5",
    };
    assert_eq!(DatagramRef::parse(&datagram).unwrap(), Some(want));
}

#[tokio::test]
async fn a_client_that_takes_no_datagrams_gets_its_messages_on_a_lane() {
    let broker = TestBroker::open().await;
    let without = |transport: &mut TransportConfig| {
        transport.datagram_receive_buffer_size(None);
    };
    let deaf = peer(&broker, "panel-1", without).await;
    let mut control = deaf.greet("panel").await.unwrap();
    subscribe_raw(&mut control, "line/#").await;
    let press = broker.client("press-7").await;
    press
        .publish_message(telemetry("line/1", "21.5"))
        .await
        .unwrap();
    let mut lane = within("a lane", deaf.connection.accept_uni())
        .await
        .unwrap();
    let mut decoder = FrameDecoder::new(1 << 20);
    let message = within("a message", async {
        loop {
            while let Some(frame) = decoder.next_frame().unwrap() {
                if frame.kind == Kind::MESSAGE {
                    return MessageFrame::parse(&frame.body).unwrap();
                }
            }
            let chunk = lane.read_chunk(1 << 16, true).await.unwrap().unwrap();
            decoder.push(chunk.bytes);
        }
    })
    .await;
    assert_eq!(message.payload, "21.5");
}

fn datagram<'a>(topic: &'a str, publisher: &'a str, payload: &'a [u8]) -> DatagramRef<'a> {
    DatagramRef {
        flags: Flags::new(Qos::AtMostOnce),
        subscription: 3,
        topic,
        publisher,
        header: None,
        payload,
    }
}

#[tokio::test]
async fn a_forged_publisher_is_ignored_and_so_is_a_kind_of_the_future() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line").await.unwrap();
    let liar = peer(&broker, "liar", |_| {}).await;
    let _control = liar.greet("liar").await.unwrap();
    liar.connection
        .send_datagram(Bytes::from_static(&[200, 1, 2, 3]))
        .unwrap();
    let forged = datagram("line", "spiffe://test.example/acme/plant-1/press-7", b"x");
    liar.connection.send_datagram(forged.encode()).unwrap();
    let message = next(&mut line).await;
    assert_eq!(
        &*message.publisher,
        "spiffe://test.example/acme/plant-1/liar"
    );
    assert!(liar.connection.close_reason().is_none());
}

#[tokio::test]
async fn malformed_datagrams_end_the_connection_that_sent_them_and_no_other() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line").await.unwrap();
    let honest = datagram("a/b", "", b"x").encode();
    let with = |at: usize, byte: u8| {
        let mut bytes = honest.to_vec();
        bytes[at] = byte;
        Bytes::from(bytes)
    };
    let cases = [
        (Bytes::new(), "ends before its kind"),
        (honest.slice(..1), "ends before its flags"),
        (honest.slice(..4), "ends before its subscription"),
        (honest.slice(..8), "ends before its topic"),
        (with(1, 1), "quality of service 1: expected 0"),
        (with(1, 3), "quality of service 3: expected 0, 1 or 2"),
        (with(7, 0xff), "its topic is not UTF-8"),
        (with(6, 0xff), "ends before its topic length"),
        (with(1, 8), "ends before its header"),
        (datagram("a/#", "", b"x").encode(), "wildcard"),
        (datagram("", "", b"x").encode(), "malformed datagram"),
    ];
    let violations = cases.len() as u64;
    for (bytes, reason) in cases {
        let hostile = peer(&broker, "hostile", |_| {}).await;
        let _control = hostile.greet("hostile").await.unwrap();
        hostile.connection.send_datagram(bytes).unwrap();
        let ConnectionError::ApplicationClosed(close) = hostile.closed().await else {
            panic!("expected a violation: {reason}");
        };
        let said = String::from_utf8_lossy(&close.reason).into_owned();
        assert!(said.contains(reason), "{said}");
        let code = VarInt::from(Code::InvalidArgument.to_quic());
        assert_eq!(close.error_code, code, "{said}");
    }
    broker
        .metric_reaches("selvedge_protocol_errors_total", &[], violations)
        .await;
    let press = broker.client("press-7").await;
    press.publish_message(telemetry("line", "x")).await.unwrap();
    assert_eq!(next(&mut line).await.payload, "x");
    assert_eq!(panel.stats().reconnects, 0);
    assert_eq!(broker.metric("selvedge_panics_total", &[]).await, 0);
}

#[tokio::test]
async fn a_denied_datagram_is_answered() {
    let secret = r##"
[[rule]]
name = "no secrets"
identities = ["*/*/*"]
deny = ["publish"]
subjects = ["secret"]
"##;
    let broker = TestBroker::governed(&format!("{}{secret}", broker::OPEN)).await;
    let press = peer(&broker, "press-7", |_| {}).await;
    let mut control = press.greet("press").await.unwrap();
    let denied = datagram("secret", "", b"x").encode();
    press.connection.send_datagram(denied).unwrap();
    let Frame::PublishRefused(refused) = control.read().await.unwrap() else {
        panic!("expected a refusal");
    };
    assert_eq!((refused.lane, refused.number, refused.count), (0, 0, 1));
    assert_eq!(refused.topic, "secret");
    let status = refused.status.unwrap();
    assert_eq!(status.code, Code::PermissionDenied as i32);

    let press = broker.client("press-8").await;
    press
        .publish_message(telemetry("secret", "x"))
        .await
        .unwrap();
    let error = eventually("the refusal to be known", || async {
        let again = press.publish_message(telemetry("secret", "x")).await;
        again.err()
    })
    .await;
    let PublishError::Refused(status) = error else {
        panic!("expected a refusal, found {error:?}");
    };
    assert_eq!(
        status.to_string(),
        "PERMISSION_DENIED: publish on \"secret\" denied by rule \"no secrets\""
    );
    assert!(press.stats().refused >= 1);
}
