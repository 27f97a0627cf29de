use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use proptest::prelude::*;
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::topic::TopicName;

use super::*;
use crate::batch::Flow;

fn batch(qos: Qos, payload: &[u8]) -> Arc<Batch> {
    let flow = Arc::new(Flow::new(
        1,
        TopicName::parse("a").unwrap(),
        Identity::new("example.org", "acme", "s", "p").unwrap(),
        1,
    ));
    let mut frames = BytesMut::new();
    lane::put_message(&mut frames, Flags::new(qos), 1, None, payload);
    Arc::new(Batch {
        flow,
        class: Class::Normal,
        qos,
        retain: false,
        retain_as_published: false,
        count: 1,
        frames: frames.freeze(),
        payload: Bytes::new(),
        expires: None,
    })
}

fn queue(limit: usize, overflow: Overflow) -> Arc<DeliveryQueue> {
    DeliveryQueue::new(QueueOptions {
        class: Class::Normal,
        subscription: 0,
        limit,
        overflow,
        outbox: Arc::default(),
        store: None,
        online: Some(0),
        durable: false,
    })
}

fn payloads(taken: &Taken) -> Vec<Vec<u8>> {
    taken
        .entries
        .iter()
        .flat_map(|entry| {
            entry
                .batch
                .messages()
                .map(|message| message.payload.to_vec())
        })
        .collect()
}

#[test]
fn qos_0_gives_up_the_oldest_and_says_how_many() {
    let one = batch(Qos::AtMostOnce, b"1").cost();
    let queue = queue(one * 2, Overflow::Default);
    for payload in [b"1", b"2"] {
        assert_eq!(
            queue.push(&batch(Qos::AtMostOnce, payload)),
            Pushed::Queued {
                dropped: 0,
                stored: false
            }
        );
    }
    assert_eq!(
        queue.push(&batch(Qos::AtMostOnce, b"3")),
        Pushed::Queued {
            dropped: 1,
            stored: false
        }
    );
    assert_eq!(
        payloads(&queue.take(0, usize::MAX, Instant::now())),
        [b"2", b"3"]
    );
    assert_eq!(queue.bytes(), 0);
}

#[test]
fn each_policy_when_full() {
    let one = batch(Qos::AtLeastOnce, b"1").cost();
    for (overflow, qos, want) in [
        (Overflow::Default, Qos::AtLeastOnce, Pushed::Full),
        (Overflow::DropNewest, Qos::AtMostOnce, Pushed::Full),
        (Overflow::Disconnect, Qos::AtMostOnce, Pushed::Disconnect),
        // There is no QoS 0 to give up.
        (Overflow::DropOldest, Qos::AtMostOnce, Pushed::Full),
    ] {
        let queue = queue(one, overflow);
        queue.push(&batch(Qos::AtLeastOnce, b"1"));
        assert_eq!(queue.push(&batch(qos, b"2")), want, "{overflow:?} {qos:?}");
    }
}

#[test]
fn unacknowledged_messages_come_again_first_and_in_order() {
    let queue = queue(usize::MAX, Overflow::Default);
    for payload in [b"1", b"2", b"3"] {
        queue.push(&batch(Qos::AtLeastOnce, payload));
    }
    let now = Instant::now();
    assert_eq!(queue.take(0, usize::MAX, now).entries.len(), 3);
    assert_eq!(queue.acknowledge(0, 1), 1);
    queue.push(&batch(Qos::AtMostOnce, b"0"));
    assert_eq!(queue.offline(), 1, "the QoS 0 message is lost");
    assert_eq!(queue.push(&batch(Qos::AtMostOnce, b"0")), Pushed::Offline);
    queue.push(&batch(Qos::AtLeastOnce, b"4"));
    queue.online(0);
    let taken = queue.take(0, usize::MAX, now);
    assert_eq!(payloads(&taken), [b"2", b"3", b"4"]);
    let duplicates: Vec<bool> = taken.entries.iter().map(|entry| entry.duplicate).collect();
    assert_eq!(duplicates, [true, true, false]);
    assert_eq!(queue.acknowledge(0, 3), 3);
    assert_eq!(queue.bytes(), 0);
}

#[test]
fn a_connection_that_was_taken_over_moves_nothing() {
    let queue = queue(usize::MAX, Overflow::Default);
    queue.push(&batch(Qos::AtLeastOnce, b"1"));
    let now = Instant::now();
    assert_eq!(queue.take(0, usize::MAX, now).entries.len(), 1);
    queue.online(1);
    assert!(queue.take(0, usize::MAX, now).entries.is_empty());
    assert_eq!(payloads(&queue.take(1, usize::MAX, now)), [b"1"]);
    assert_eq!(
        queue.acknowledge(0, 1),
        0,
        "the old connection's acknowledgement is stale"
    );
    assert_eq!(queue.acknowledge(1, 1), 1);
}

#[test]
fn expired_messages_are_left_out_and_counted() {
    let queue = queue(usize::MAX, Overflow::Default);
    let now = Instant::now();
    let mut stale = Arc::into_inner(batch(Qos::AtLeastOnce, b"old")).unwrap();
    stale.expires = Some(now);
    queue.push(&Arc::new(stale));
    queue.push(&batch(Qos::AtLeastOnce, b"new"));
    let taken = queue.take(0, usize::MAX, now + Duration::from_millis(1));
    assert_eq!(
        (payloads(&taken), taken.expired),
        (vec![b"new".to_vec()], 1)
    );
}

#[tokio::test]
async fn a_burst_is_one_wake_up() {
    let outbox = Arc::new(Outbox::default());
    let queue = DeliveryQueue::new(QueueOptions {
        class: Class::Alarm,
        subscription: 0,
        limit: usize::MAX,
        overflow: Overflow::Default,
        outbox: Arc::clone(&outbox),
        store: None,
        online: Some(0),
        durable: false,
    });
    for _ in 0..100 {
        queue.push(&batch(Qos::AtMostOnce, b"x"));
    }
    outbox.ready().await;
    assert_eq!(outbox.take(0).len(), 1);
    assert_eq!(queue.take(0, usize::MAX, Instant::now()).entries.len(), 100);
    assert!(queue.take(0, usize::MAX, Instant::now()).entries.is_empty());
    queue.push(&batch(Qos::AtMostOnce, b"x"));
    outbox.ready().await;
    assert_eq!(outbox.take(0).len(), 1);
}

proptest! {
    #[test]
    fn bytes_are_always_accounted_for(
        steps in proptest::collection::vec((0u8..6, any::<bool>(), 0usize..100), 0..100)
    ) {
        let queue = queue(1000, Overflow::Default);
        let mut sent = 0u64;
        let mut acked = 0u64;
        for (step, reliable, size) in steps {
            let qos = if reliable { Qos::AtLeastOnce } else { Qos::AtMostOnce };
            match step {
                0..3 => { queue.push(&batch(qos, &vec![0; size])); }
                3 => {
                    let taken = queue.take(0, 300, Instant::now());
                    sent += taken.entries.iter().filter(|e| e.batch.qos == Qos::AtLeastOnce).count() as u64;
                }
                4 => { acked = sent.min(acked + 1); queue.acknowledge(0, acked); }
                _ => { queue.offline(); queue.online(0); sent = 0; acked = 0; }
            }
            prop_assert!(queue.bytes() <= 1000);
        }
        while !queue.take(0, usize::MAX, Instant::now()).entries.is_empty() {}
        queue.acknowledge(0, u64::MAX);
        prop_assert_eq!(queue.bytes(), 0);
    }
}

#[tokio::test]
async fn a_writer_that_was_taken_over_passes_its_wake_up_on() {
    let queue = queue(usize::MAX, Overflow::Default);
    let mut old = Box::pin(queue.woken());
    assert!((&mut old).now_or_never().is_none());
    queue.online(1);
    queue.set_writer(0);
    let mut new = Box::pin(queue.woken());
    assert!((&mut new).now_or_never().is_none());
    queue.push(&batch(Qos::AtMostOnce, b"x"));
    // The old one has waited for longer and so is woken first.
    assert!((&mut old).now_or_never().is_some());
    assert!(queue.take(0, usize::MAX, Instant::now()).stale);
    assert!((&mut new).now_or_never().is_some());
    assert_eq!(payloads(&queue.take(1, usize::MAX, Instant::now())), [b"x"]);
}
