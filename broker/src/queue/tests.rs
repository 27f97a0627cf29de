use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use proptest::prelude::*;
use selvedge_certs::Identity;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::topic::TopicName;

use super::*;
use crate::backlog::Replayed;
use crate::batch::Flow;
use crate::metrics::Metrics;

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

fn owner(metrics: &Arc<Metrics>) -> Arc<Owner> {
    Arc::new(Owner {
        key: SessionKey {
            identity: Identity::new("example.org", "acme", "s", "receiver").unwrap(),
            name: "s".into(),
        },
        outbox: Arc::default(),
        losses: Losses::new(Arc::clone(metrics), Arc::default()),
        usage: Arc::default(),
        store: None,
    })
}

fn counting(
    limit: usize,
    overflow: Overflow,
    class: Class,
    held: bool,
) -> (Arc<DeliveryQueue>, Arc<Metrics>) {
    let metrics = Arc::<Metrics>::default();
    let queue = DeliveryQueue::new(QueueOptions {
        class,
        subscription: 0,
        limit,
        overflow,
        owner: owner(&metrics),
        online: Some(0),
        durable: false,
        held,
    });
    (queue, metrics)
}

fn queue(limit: usize, overflow: Overflow) -> Arc<DeliveryQueue> {
    counting(limit, overflow, Class::Normal, false).0
}

const QUEUED: Pushed = Pushed::Queued { stored: false };
const LOST: Pushed = Pushed::Lost { kept: false };

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
fn qos_0_gives_up_the_oldest_and_counts_it() {
    let one = batch(Qos::AtMostOnce, b"1").cost();
    let (queue, metrics) = counting(one * 2, Overflow::Default, Class::Normal, false);
    for payload in [b"1", b"2", b"3"] {
        assert_eq!(queue.push(&batch(Qos::AtMostOnce, payload)), QUEUED);
    }
    assert_eq!(metrics.dropped_overflow.get(), 1);
    assert_eq!(
        payloads(&queue.take(0, usize::MAX, 0, Instant::now())),
        [b"2", b"3"]
    );
    assert_eq!(queue.bytes(), 0);
}

#[test]
fn each_policy_when_full() {
    let one = batch(Qos::AtLeastOnce, b"1").cost();
    for (overflow, qos, want) in [
        (Overflow::Default, Qos::AtLeastOnce, LOST),
        (Overflow::DropNewest, Qos::AtMostOnce, LOST),
        (Overflow::Disconnect, Qos::AtMostOnce, Pushed::Disconnect),
        // There is no QoS 0 to give up.
        (Overflow::DropOldest, Qos::AtMostOnce, LOST),
    ] {
        let queue = queue(one, overflow);
        queue.push(&batch(Qos::AtLeastOnce, b"1"));
        assert_eq!(queue.push(&batch(qos, b"2")), want, "{overflow:?} {qos:?}");
    }
}

#[test]
fn unacknowledged_messages_come_again_first_and_in_order() {
    let (queue, metrics) = counting(usize::MAX, Overflow::Default, Class::Normal, false);
    for payload in [b"1", b"2", b"3"] {
        queue.push(&batch(Qos::AtLeastOnce, payload));
    }
    let now = Instant::now();
    assert_eq!(queue.take(0, usize::MAX, 0, now).entries.len(), 3);
    assert_eq!(queue.acknowledge(0, 1), 1);
    queue.push(&batch(Qos::AtMostOnce, b"0"));
    queue.offline();
    assert_eq!(
        metrics.dropped_offline.get(),
        1,
        "the QoS 0 message is lost"
    );
    assert_eq!(queue.push(&batch(Qos::AtMostOnce, b"0")), LOST);
    queue.push(&batch(Qos::AtLeastOnce, b"4"));
    queue.online(0);
    let taken = queue.take(0, usize::MAX, 0, now);
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
    assert_eq!(queue.take(0, usize::MAX, 0, now).entries.len(), 1);
    queue.online(1);
    assert!(queue.take(0, usize::MAX, 0, now).entries.is_empty());
    assert_eq!(payloads(&queue.take(1, usize::MAX, 0, now)), [b"1"]);
    assert_eq!(
        queue.acknowledge(0, 1),
        0,
        "the old connection's acknowledgement is stale"
    );
    assert_eq!(queue.acknowledge(1, 1), 1);
}

#[test]
fn expired_messages_are_left_out_and_counted() {
    let (queue, metrics) = counting(usize::MAX, Overflow::Default, Class::Normal, false);
    let now = Instant::now();
    let mut stale = Arc::into_inner(batch(Qos::AtLeastOnce, b"old")).unwrap();
    stale.expires = Some(now);
    queue.push(&Arc::new(stale));
    queue.push(&batch(Qos::AtLeastOnce, b"new"));
    let taken = queue.take(0, usize::MAX, 0, now + Duration::from_millis(1));
    assert_eq!(
        (payloads(&taken), metrics.dropped_expired.get()),
        (vec![b"new".to_vec()], 1)
    );
}

#[tokio::test]
async fn a_burst_is_one_wake_up() {
    let (queue, _) = counting(usize::MAX, Overflow::Default, Class::Alarm, false);
    let outbox = Arc::clone(&queue.owner.outbox);
    for _ in 0..100 {
        queue.push(&batch(Qos::AtMostOnce, b"x"));
    }
    outbox.ready().await;
    assert_eq!(outbox.take(0).len(), 1);
    assert_eq!(
        queue.take(0, usize::MAX, 0, Instant::now()).entries.len(),
        100
    );
    assert!(
        queue
            .take(0, usize::MAX, 0, Instant::now())
            .entries
            .is_empty()
    );
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
                    let taken = queue.take(0, 300, 0, Instant::now());
                    sent += taken.entries.iter().filter(|e| e.batch.qos == Qos::AtLeastOnce).count() as u64;
                }
                4 => { acked = sent.min(acked + 1); queue.acknowledge(0, acked); }
                _ => { queue.offline(); queue.online(0); sent = 0; acked = 0; }
            }
            prop_assert!(queue.bytes() <= 1000);
        }
        while !queue.take(0, usize::MAX, 0, Instant::now()).entries.is_empty() {}
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
    assert!(queue.take(0, usize::MAX, 0, Instant::now()).stale);
    assert!((&mut new).now_or_never().is_some());
    assert_eq!(
        payloads(&queue.take(1, usize::MAX, 0, Instant::now())),
        [b"x"]
    );
}

#[test]
fn room_that_is_held_is_nobody_elses() {
    let message = batch(Qos::AtLeastOnce, b"1");
    let refusing = queue(message.cost() * 2, Overflow::Refuse);
    assert_eq!(refusing.reserve(&message, false), Reserved::Held);
    assert_eq!(refusing.reserve(&message, false), Reserved::Held);
    assert_eq!(refusing.reserve(&message, false), Reserved::Full);
    assert_eq!(refusing.push(&message), LOST, "it did not ask");
    refusing.release(&message);
    assert_eq!(refusing.push_reserved(&message), QUEUED);
    assert_eq!(refusing.push(&message), QUEUED);
    assert_eq!(refusing.push(&message), LOST);

    let kept = queue(message.cost(), Overflow::Default);
    assert_eq!(
        kept.reserve(&message, true),
        Reserved::NotNeeded,
        "it is not kept"
    );
    kept.set_durable(true);
    assert_eq!(
        kept.reserve(&message, false),
        Reserved::NotNeeded,
        "nobody demands the disk"
    );
    assert_eq!(kept.push(&message), QUEUED);
    assert_eq!(kept.reserve(&message, true), Reserved::Full);
    assert_eq!(kept.push(&message), Pushed::Lost { kept: true });
}

#[test]
fn a_replay_comes_before_what_is_published_and_survives_a_reconnect() {
    let (queue, _) = counting(usize::MAX, Overflow::Default, Class::Normal, true);
    let now = Instant::now();
    queue.push(&batch(Qos::AtLeastOnce, b"live"));
    let taken = queue.take(0, usize::MAX, usize::MAX, now);
    assert!(taken.entries.is_empty() && !taken.owes, "it is held");
    let history: Vec<_> = [b"h1", b"h2", b"h3"]
        .into_iter()
        .map(|payload| batch(Qos::AtLeastOnce, payload))
        .collect();
    let one = history[0].cost();
    let replay = Replayed::new(history.clone(), Qos::AtLeastOnce);
    queue.owe(1, Some(Box::new(replay)));
    // A subscription that is made anew is owed what it asks for then, and no more.
    let replay = Replayed::new(history, Qos::AtLeastOnce);
    queue.owe(1, Some(Box::new(replay)));

    assert!(
        queue.take(0, usize::MAX, 0, now).owes,
        "it waits for a grant"
    );
    let taken = queue.take(0, usize::MAX, one, now);
    assert_eq!((payloads(&taken), taken.owes), (vec![b"h1".to_vec()], true));
    queue.offline();
    queue.online(1);
    assert_eq!(
        payloads(&queue.take(1, usize::MAX, one, now)),
        [b"h1", b"h2"]
    );
    assert_eq!(payloads(&queue.take(1, usize::MAX, one, now)), [b"h3"]);
    let taken = queue.take(1, usize::MAX, 0, now);
    assert_eq!(
        (payloads(&taken), taken.owes),
        (vec![b"live".to_vec()], false)
    );
    assert_eq!(queue.acknowledge(1, 4), 4);
    assert_eq!(queue.bytes(), 0);
}
