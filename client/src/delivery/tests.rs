//! What comes in on a delivery lane, and which subscriptions get it.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::BytesMut;
use selvedge_proto::lane::{Flags, put_message};
use selvedge_proto::topic::SubscribeTarget;
use tokio::sync::Notify;

use super::*;
use crate::options::Options;
use crate::subscription::SubscribeOptions;

const PUBLISHER: &str = "spiffe://plant.example/acme/hall/sensor";

fn shared() -> Arc<Shared> {
    let options = Options::new("broker").unwrap();
    Arc::new(Shared::new(options, PUBLISHER.parse().unwrap()))
}

fn subscribe(shared: &Shared, filter: &str, options: &SubscribeOptions) -> Arc<Route> {
    let target = SubscribeTarget::parse(filter).unwrap();
    let route = |id| Arc::new(Route::new(id, &target, options));
    let (route, _) = shared
        .control
        .subscribe(options.to_wire(&target), route)
        .unwrap();
    route
}

fn reader(shared: &Arc<Shared>, owner: u32) -> (LaneReader, Arc<PendingAcks>) {
    let pending = Arc::new(PendingAcks::new(Arc::new(Notify::new())));
    let reader = LaneReader {
        owner,
        class: Class::Normal,
        acks: Arc::new(LaneAcks::new(1, pending.clone())),
        aliases: Aliases::default(),
        publisher: Arc::from(""),
        generation: 0,
        batches: Vec::new(),
        parked: VecDeque::new(),
        shared: shared.clone(),
        decoder: FrameDecoder::new(1 << 20),
    };
    (reader, pending)
}

fn bind(buffer: &mut BytesMut, alias: u32, topic: &str) {
    let bind = wire::Bind {
        alias,
        topic: topic.to_owned(),
        publisher: PUBLISHER.to_owned(),
    };
    frame::append(buffer, Kind::BIND, &bind);
}

fn message(buffer: &mut BytesMut, alias: u32, qos: Qos, payload: &[u8]) {
    put_message(buffer, Flags::new(qos), alias, None, payload);
}

/// Hands bytes to the reader as one chunk.
async fn feed(reader: &mut LaneReader, buffer: BytesMut) -> Result<(), DeliveryError> {
    let mut generation = reader.shared.control.generation();
    reader.refresh(&mut generation);
    reader.decoder.push(buffer.freeze());
    reader.decode()?;
    reader.deliver().await;
    Ok(())
}

/// What waits for a subscription, taken by the application.
async fn take(route: &Route) -> Vec<(String, Bytes)> {
    let mut ready = VecDeque::new();
    let taken = std::future::poll_fn(|context| route.poll_take(context, &mut ready));
    if tokio::time::timeout(Duration::ZERO, taken).await.is_err() {
        return Vec::new();
    }
    ready
        .into_iter()
        .map(|mut message| {
            message.ack();
            assert_eq!(&*message.publisher, PUBLISHER);
            (message.topic.to_string(), message.payload)
        })
        .collect()
}

fn acknowledged(pending: &PendingAcks) -> Option<u64> {
    let mut buffer = BytesMut::new();
    pending.drain_into(&mut buffer);
    let mut decoder = FrameDecoder::new(1 << 16);
    decoder.push(buffer.freeze());
    let frame = decoder.next_frame().unwrap()?;
    let control: wire::Control = frame::decode("control", frame.body).unwrap();
    match control.frame.unwrap() {
        wire::control::Frame::DeliveryAck(ack) => Some(ack.last),
        other => panic!("unexpected frame {other:?}"),
    }
}

#[tokio::test]
async fn each_subscription_gets_what_its_filter_matches() {
    let shared = shared();
    let options = SubscribeOptions::default();
    let wide = subscribe(&shared, "a/#", &options);
    let narrow = subscribe(&shared, "a/b", &options);
    let own = SubscribeOptions {
        own_lane: true,
        ..SubscribeOptions::default()
    };
    let own = subscribe(&shared, "a/+", &own);
    let (mut lane, _) = reader(&shared, 0);
    let mut buffer = BytesMut::new();
    bind(&mut buffer, 1, "a/b");
    bind(&mut buffer, 5000, "a/c");
    bind(&mut buffer, 3, "z");
    for alias in [1, 5000, 3] {
        message(&mut buffer, alias, Qos::AtMostOnce, &[alias as u8]);
    }
    feed(&mut lane, buffer).await.unwrap();
    let (ab, ac) = (
        ("a/b".to_owned(), Bytes::from_static(&[1])),
        "a/c".to_owned(),
    );
    assert_eq!(take(&narrow).await, std::slice::from_ref(&ab));
    assert_eq!(
        take(&wide).await,
        [ab.clone(), (ac, Bytes::from_static(&[5000u32 as u8]))]
    );
    assert_eq!(take(&own).await, []);
    assert_eq!(shared.counters.snapshot(0).unmatched, 1);

    let (mut lane, _) = reader(&shared, own.id());
    let mut buffer = BytesMut::new();
    bind(&mut buffer, 1, "a/b");
    message(&mut buffer, 1, Qos::AtMostOnce, &[1]);
    feed(&mut lane, buffer).await.unwrap();
    assert_eq!(take(&own).await, [ab]);
    assert_eq!(take(&wide).await, []);
}

#[tokio::test]
async fn a_new_subscription_gets_what_comes_under_an_alias_bound_before() {
    let shared = shared();
    let (mut lane, pending) = reader(&shared, 0);
    let mut buffer = BytesMut::new();
    bind(&mut buffer, 1, "a");
    message(&mut buffer, 1, Qos::AtLeastOnce, b"early");
    feed(&mut lane, buffer).await.unwrap();
    assert_eq!(acknowledged(&pending), Some(1), "nobody is to take it");
    let route = subscribe(&shared, "a", &SubscribeOptions::default());
    let mut buffer = BytesMut::new();
    message(&mut buffer, 1, Qos::AtLeastOnce, b"late");
    feed(&mut lane, buffer).await.unwrap();
    assert_eq!(acknowledged(&pending), None, "it is not taken yet");
    assert_eq!(
        take(&route).await,
        [("a".to_owned(), Bytes::from_static(b"late"))]
    );
    assert_eq!(acknowledged(&pending), Some(2));
}

#[tokio::test]
async fn messages_of_a_kept_session_wait_for_the_application_to_subscribe_again() {
    let shared = shared();
    shared
        .control
        .inherit(Instant::now() + Duration::from_secs(30));
    let (mut lane, pending) = reader(&shared, 0);
    let mut buffer = BytesMut::new();
    bind(&mut buffer, 1, "a");
    bind(&mut buffer, 2, "b");
    message(&mut buffer, 1, Qos::AtLeastOnce, b"1");
    message(&mut buffer, 2, Qos::AtLeastOnce, b"2");
    feed(&mut lane, buffer).await.unwrap();
    assert_eq!(acknowledged(&pending), None);
    let route = subscribe(&shared, "a", &SubscribeOptions::default());
    feed(&mut lane, BytesMut::new()).await.unwrap();
    assert_eq!(
        take(&route).await,
        [("a".to_owned(), Bytes::from_static(b"1"))]
    );
    assert_eq!(acknowledged(&pending), Some(1));
    assert_eq!(lane.parked.len(), 1);
    shared.control.inherit(Instant::now());
    lane.unpark();
    assert_eq!(acknowledged(&pending), Some(2), "nobody came for it");
    assert_eq!(shared.counters.snapshot(0).unmatched, 1);
}

#[tokio::test]
async fn a_full_queue_drops_qos_0_and_holds_the_lane_for_qos_1() {
    let shared = shared();
    let options = SubscribeOptions {
        queue: 2,
        ..SubscribeOptions::default()
    };
    let route = subscribe(&shared, "a", &options);
    let (mut lane, pending) = reader(&shared, 0);
    let mut buffer = BytesMut::new();
    bind(&mut buffer, 1, "a");
    for payload in [b"1", b"2", b"3"] {
        message(&mut buffer, 1, Qos::AtMostOnce, payload);
    }
    message(&mut buffer, 1, Qos::AtLeastOnce, b"4");
    let taking = async {
        let mut taken = Vec::new();
        while taken.len() < 3 {
            tokio::task::yield_now().await;
            taken.extend(take(&route).await.into_iter().map(|(_, payload)| payload));
        }
        taken
    };
    let (fed, taken) = tokio::join!(feed(&mut lane, buffer), taking);
    fed.unwrap();
    assert_eq!(taken, ["1", "2", "4"]);
    assert_eq!(acknowledged(&pending), Some(1));
    let stats = shared.counters.snapshot(0);
    assert_eq!((stats.delivered, stats.dropped_slow), (3, 1));
}

#[tokio::test]
async fn a_broker_that_breaks_the_protocol_is_found_out() {
    let shared = shared();
    let (mut lane, _) = reader(&shared, 0);
    let mut buffer = BytesMut::new();
    message(&mut buffer, 9, Qos::AtMostOnce, b"");
    let error = feed(&mut lane, buffer).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "message under alias 9, which is not bound"
    );
    let mut buffer = BytesMut::new();
    bind(&mut buffer, 1, "a/#");
    let error = feed(&mut lane, buffer).await.unwrap_err();
    assert!(matches!(error, DeliveryError::Topic(1, _)), "{error}");
}
