//! Bytes that no client sends: an error for the peer that sent them, a counter, and nothing for
//! anybody else.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::{ConnectionError, VarInt};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use selvedge_client::{Client, Code, Publish, PublishError, Subscription};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::lane::{Flags, put_message};
use selvedge_proto::message::Qos;
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use selvedge_tests::wait::within;
use selvedge_tests::{RawControl, RawQuic, TestBroker, broker, raw};

use super::pubsub::next;

const ERRORS: &str = "selvedge_protocol_errors_total";

/// A broker with a client that must notice nothing.
struct Scene {
    broker: TestBroker,
    bystander: Client,
    own: Subscription,
}

impl Scene {
    async fn set() -> Scene {
        let broker = TestBroker::with(broker::OPEN, |config, pki| {
            config.limits.handshake_timeout = Duration::from_secs(1);
            config.limits.max_frame_bytes = 1 << 20;
            config.mqtt.tls = Some(([127, 0, 0, 1], 0).into());
            let identity = pki.device("acme", "plant-1", "sensors").identity().clone();
            config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), identity));
        })
        .await;
        let bystander = broker.client("bystander").await;
        let own = bystander.subscribe("own").await.unwrap();
        Scene {
            broker,
            bystander,
            own,
        }
    }

    async fn peer(&self) -> RawQuic {
        let config = raw::quic_config(self.broker.device("hostile"), &self.broker.pki.anchors());
        RawQuic::connect(self.broker.quic(), config).await.unwrap()
    }

    async fn greeted(&self, session: &str) -> (RawQuic, RawControl) {
        let peer = self.peer().await;
        let control = peer.greet(session).await.unwrap();
        (peer, control)
    }

    /// The bystander is where it was, and no task of the broker has panicked.
    async fn unharmed(mut self) {
        self.bystander.publish("own", "still here").await.unwrap();
        assert_eq!(next(&mut self.own).await.payload, "still here");
        assert_eq!(self.bystander.stats().reconnects, 0);
        assert_eq!(self.broker.metric("selvedge_panics_total", &[]).await, 0);
    }
}

fn random_bytes(rng: &mut StdRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; rng.random_range(1..most)];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// The connection was ended by the broker as a violation, with a reason that names `what`.
async fn expect_violation(peer: &RawQuic, what: &str) {
    match peer.closed().await {
        ConnectionError::ApplicationClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason).into_owned();
            let code = VarInt::from(Code::InvalidArgument.to_quic());
            assert_eq!(close.error_code, code, "{reason}");
            assert!(reason.contains(what), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

/// A lane with one topic bound to alias 1.
fn lane() -> BytesMut {
    let mut lane = BytesMut::new();
    frame::append(
        &mut lane,
        Kind::LANE,
        &wire::LaneHeader {
            lane: 1,
            ..Default::default()
        },
    );
    let bind = wire::Bind {
        alias: 1,
        topic: "a/b".into(),
        publisher: String::new(),
    };
    frame::append(&mut lane, Kind::BIND, &bind);
    lane
}

async fn open_lane(peer: &RawQuic, bytes: &[u8]) {
    let mut stream = peer.connection.open_uni().await.unwrap();
    // The broker may have closed already, on an earlier lane of the same test.
    let _ = stream.write_all(bytes).await;
    let _ = stream.finish();
}

#[tokio::test]
async fn noise_instead_of_a_hello_ends_the_connection() {
    let scene = Scene::set().await;
    let mut rng = StdRng::seed_from_u64(1);
    let mut peers = Vec::new();
    for _ in 0..30 {
        let peer = scene.peer().await;
        let (mut send, _) = peer.connection.open_bi().await.unwrap();
        send.write_all(&random_bytes(&mut rng, 400)).await.unwrap();
        // Noise that begins as a longer frame ends here, or by the time limit for a Hello.
        if rng.random() {
            send.finish().unwrap();
            peers.push((peer, None));
        } else {
            peers.push((peer, Some(send)));
        }
    }
    for (peer, _send) in &peers {
        assert!(matches!(
            peer.closed().await,
            ConnectionError::ApplicationClosed(_)
        ));
    }
    assert!(scene.broker.metric(ERRORS, &[("listener", "quic")]).await > 0);
    scene.unharmed().await;
}

#[tokio::test]
async fn an_honest_frame_before_the_hello_ends_the_connection() {
    let scene = Scene::set().await;
    let peer = scene.peer().await;
    let (mut send, _receive) = peer.connection.open_bi().await.unwrap();
    let ping = raw::control_frame(Frame::Ping(wire::Ping { token: 1 }));
    send.write_all(&ping).await.unwrap();
    expect_violation(&peer, "expected Hello").await;
    scene
        .broker
        .metric_reaches(ERRORS, &[("reason", "hello")], 1)
        .await;
    scene.unharmed().await;
}

#[tokio::test]
async fn mutated_control_frames_are_answered_or_end_the_connection() {
    let scene = Scene::set().await;
    let mut rng = StdRng::seed_from_u64(2);
    let honest = [
        raw::control_frame(Frame::Subscribe(wire::Subscribe {
            request_id: 1,
            subscriptions: vec![wire::Subscription {
                id: 1,
                filter: "a/+/c".into(),
                ..Default::default()
            }],
        })),
        raw::control_frame(Frame::Serve(wire::Serve {
            request_id: 2,
            id: 1,
            service: "a/b".into(),
            max_in_flight: 1,
        })),
        raw::control_frame(Frame::Work(wire::Work {
            request_id: 3,
            id: 2,
            model: "digits".into(),
            slots: 1,
            ..Default::default()
        })),
        raw::control_frame(Frame::Ping(wire::Ping { token: 9 })),
        raw::control_frame(Frame::DeliveryAck(wire::DeliveryAck { lane: 1, last: 7 })),
    ];
    for round in 0..40 {
        let (peer, mut control) = scene.greeted(&format!("mutant-{round}")).await;
        let mut bytes = BytesMut::new();
        for _ in 0..5 {
            let mut frame = honest[rng.random_range(0..honest.len())].to_vec();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..frame.len());
                frame[at] ^= 1 << rng.random_range(0..8);
            }
            bytes.extend_from_slice(&frame);
        }
        control.write(&bytes).await.unwrap();
        control.send.finish().unwrap();
        peer.closed().await;
    }
    scene.unharmed().await;
}

#[tokio::test]
async fn a_frame_only_a_broker_sends_ends_the_connection() {
    let scene = Scene::set().await;
    let (peer, mut control) = scene.greeted("welcomer").await;
    let welcome = raw::control_frame(Frame::Welcome(wire::Welcome::default()));
    control.write(&welcome).await.unwrap();
    expect_violation(&peer, "only a broker sends").await;
    scene
        .broker
        .metric_reaches(ERRORS, &[("reason", "frame")], 1)
        .await;
    scene.unharmed().await;
}

#[tokio::test]
async fn an_unbound_alias_ends_the_connection_and_is_named() {
    let scene = Scene::set().await;
    let (peer, _control) = scene.greeted("unbound").await;
    let mut bytes = lane();
    put_message(&mut bytes, Flags::new(Qos::AtMostOnce), 2, None, b"x");
    open_lane(&peer, &bytes).await;
    expect_violation(&peer, "alias 2").await;
    scene
        .broker
        .metric_reaches(ERRORS, &[("reason", "frame")], 1)
        .await;
    scene.unharmed().await;
}

#[tokio::test]
async fn a_frame_over_the_limit_is_refused_before_it_is_sent() {
    let scene = Scene::set().await;
    let (peer, _control) = scene.greeted("large").await;
    let mut bytes = lane();
    // The head of a message of 2 MiB, and nothing of its body.
    bytes.extend_from_slice(&frame::head(Kind::MESSAGE, 2 << 20));
    let mut stream = peer.connection.open_uni().await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    expect_violation(&peer, "is over the limit of 1048576 bytes").await;
    scene.unharmed().await;
}

#[tokio::test]
async fn noise_on_lanes_ends_the_connection() {
    let scene = Scene::set().await;
    let mut rng = StdRng::seed_from_u64(3);
    for round in 0..30 {
        let (peer, _control) = scene.greeted(&format!("noise-{round}")).await;
        for _ in 0..4 {
            let mut bytes = if rng.random() {
                lane()
            } else {
                BytesMut::new()
            };
            // The length of an empty frame, so that each lane holds at least one error.
            bytes.put_slice(&random_bytes(&mut rng, 300));
            open_lane(&peer, &bytes).await;
        }
        open_lane(&peer, &[0]).await;
        assert!(matches!(
            peer.closed().await,
            ConnectionError::ApplicationClosed(_)
        ));
    }
    scene
        .broker
        .metric_reaches(ERRORS, &[("listener", "quic")], 30)
        .await;
    scene.unharmed().await;
}

#[tokio::test]
async fn noise_on_a_call_resets_that_call_only() {
    let scene = Scene::set().await;
    let mut rng = StdRng::seed_from_u64(4);
    let (peer, mut control) = scene.greeted("caller").await;
    for _ in 0..50 {
        let (mut send, mut receive) = peer.connection.open_bi().await.unwrap();
        send.write_all(&random_bytes(&mut rng, 300)).await.unwrap();
        let _ = send.finish();
        // An answer or a reset, but an end.
        let _ = within("the end of a call", receive.read_to_end(1 << 16)).await;
    }
    control
        .write(&raw::control_frame(Frame::Ping(wire::Ping { token: 5 })))
        .await
        .unwrap();
    assert_eq!(
        control.read().await.unwrap(),
        Frame::Pong(wire::Pong { token: 5 })
    );
    scene
        .broker
        .metric_reaches(ERRORS, &[("reason", "call")], 1)
        .await;
    scene.unharmed().await;
}

#[tokio::test]
async fn noise_on_every_tcp_port_is_answered_by_an_end() {
    let scene = Scene::set().await;
    let mut rng = StdRng::seed_from_u64(5);
    let mut exchanges = tokio::task::JoinSet::new();
    for port in [
        scene.broker.mqtt(),
        scene.broker.mqtts(),
        scene.broker.admin(),
    ] {
        for round in 0..30 {
            let mut bytes = random_bytes(&mut rng, 300);
            if round % 2 == 0 {
                // The start of an MQTT CONNECT, so that the noise is read as one.
                bytes.splice(0..0, *b"\x10\x30\x00\x04MQTT");
            }
            exchanges.spawn(async move { raw::tcp_exchange(port, &bytes).await });
        }
    }
    for exchange in exchanges.join_all().await {
        exchange.unwrap();
    }
    assert!(scene.broker.metric(ERRORS, &[("listener", "mqtt")]).await > 0);
    scene.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_topic_harms_nobody_who_receives_it_or_is_denied_it() {
    // Quotes and backslashes are the worst case of a denial, which escapes them.
    let secret = r##"
[[rule]]
name = "no secrets"
identities = ["*/*/*"]
deny = ["publish"]
subjects = ["secret/#"]
"##;
    let broker = TestBroker::governed(&format!("{}{secret}", broker::OPEN)).await;
    let reader = broker.client("reader").await;
    let writer = broker.client("writer").await;
    let mut all = reader.subscribe("#").await.unwrap();
    let long = |start: &str| format!("{start}/{}", "\"".repeat(65_535 - start.len() - 1));
    let publish = |topic: String| Publish::new(topic, "x").qos(Qos::AtLeastOnce);
    within("an answer", writer.publish_message(publish(long("open"))))
        .await
        .unwrap();
    assert_eq!(
        within("the message", all.next())
            .await
            .unwrap()
            .topic
            .as_str(),
        long("open")
    );
    let denied = within("an answer", writer.publish_message(publish(long("secret")))).await;
    let Err(PublishError::Refused(status)) = denied else {
        panic!("expected a denial, found {denied:?}");
    };
    assert_eq!(status.code, Code::PermissionDenied);
    assert_eq!(reader.stats().reconnects + writer.stats().reconnects, 0);
}
