//! Tests of the queue: order, bounds, and who is told when.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use selvedge_proto::message::{Durability, Properties, Qos};
use tokio::sync::oneshot;

use super::*;
use crate::forward::Packet;

struct Told(oneshot::Sender<()>);

impl Waiter for Told {
    fn released(self) {
        let _ = self.0.send(());
    }
}

fn told() -> (Told, oneshot::Receiver<()>) {
    let (sender, receiver) = oneshot::channel();
    (Told(sender), receiver)
}

fn stored(number: u64, bytes: usize) -> Stored {
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(bytes.max(8), 0);
    Stored {
        rule: 0,
        taken: SystemTime::UNIX_EPOCH + Duration::from_secs(number),
        expires: None,
        durability: Durability::Default,
        name: Bytes::new(),
        packet: Packet {
            topic: Bytes::from_static(b"a"),
            payload: payload.into(),
            qos: Qos::AtLeastOnce,
            retain: false,
            properties: Properties::default(),
        },
    }
}

fn open(folder: Option<&std::path::Path>, limit: usize) -> Spool<Told> {
    let mut held = Held::default();
    let journal = folder.map(|folder| {
        loop {
            held = Held::default();
            let opened = Journal::open(folder, &["r".into()], |_, space, number, value| {
                assert_eq!(space, Space::In);
                held.add(number, value).unwrap();
            });
            match opened {
                // The thread of the one before it is just ending.
                Err(crate::journal::JournalError::InUse { .. }) => std::thread::yield_now(),
                opened => break opened.unwrap(),
            }
        }
    });
    let place = Place {
        remote: "r".into(),
        space: Space::In,
        journal,
        limit,
    };
    Spool::new(place, held)
}

async fn append(spool: &Spool<Told>, number: u64, bytes: usize) -> oneshot::Receiver<()> {
    let (waiter, released) = told();
    spool
        .append(stored(number, bytes), waiter, |_| Vec::new())
        .await;
    released
}

fn number(stored: &Stored) -> u64 {
    u64::from_be_bytes(*stored.packet.payload.first_chunk().unwrap())
}

#[tokio::test]
async fn while_the_other_side_is_there_nobody_is_told_before_it_has_the_message() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(Some(folder.path()), 1 << 20);
    spool.set_away(false);
    let mut consumer = spool.consumer();
    let mut first = append(&spool, 1, 0).await;
    let (place, message) = consumer.next().await;
    assert_eq!(number(&message), 1);
    assert!(first.try_recv().is_err());
    assert_eq!(spool.rule_status(0).0, 1);
    spool.settle(place, Vec::new()).await;
    first.await.unwrap();
    assert_eq!((spool.status().messages, spool.status().kept), (0, 0));

    // It goes away: what is on disk is answered for, and so is what comes.
    let second = append(&spool, 2, 0).await;
    let (_, message) = consumer.next().await;
    assert_eq!(number(&message), 2);
    spool.set_away(true);
    second.await.unwrap();
    append(&spool, 3, 0).await.await.unwrap();
    assert_eq!((spool.status().messages, spool.status().kept), (2, 2));
}

#[tokio::test]
async fn without_a_journal_nobody_is_told_early_and_the_bound_is_told() {
    let spool = open(None, 1000);
    let mut early = append(&spool, 1, 600).await;
    assert!(spool.has_room());
    append(&spool, 2, 600).await;
    assert!(!spool.has_room());
    spool.set_away(true);
    assert!(early.try_recv().is_err());
    let mut consumer = spool.consumer();
    for expected in [1, 2] {
        let (place, message) = consumer.next().await;
        assert_eq!((number(&message), place), (expected, expected - 1));
        spool.settle(place, Vec::new()).await;
    }
    early.await.unwrap();
    spool.room().await;
}

#[tokio::test]
async fn a_backlog_larger_than_memory_comes_in_order_and_what_is_left_survives() {
    const MESSAGES: u64 = 3000;
    let folder = tempfile::tempdir().unwrap();
    let spool = open(Some(folder.path()), 1 << 30);
    let mut last = None;
    for number in 0..MESSAGES {
        last = Some(append(&spool, number, 4000).await);
    }
    last.unwrap().await.unwrap();
    assert!(spool.status().bytes > 4 * TAIL_BYTES);
    assert!(spool.state().tail_bytes < 2 * TAIL_BYTES);
    let mut consumer = spool.consumer();
    for expected in 0..1000 {
        let (place, message) = consumer.next().await;
        assert_eq!(number(&message), expected);
        // Every second is settled, the others were only taken.
        if expected % 2 == 0 {
            spool.settle(place, Vec::new()).await;
        }
    }
    let barrier = spool.place().journal.clone().unwrap();
    barrier.commit(Vec::new()).await.await;
    drop((consumer, spool, barrier));

    let spool = open(Some(folder.path()), 1 << 30);
    assert_eq!(spool.status().messages, 2500);
    let mut consumer = spool.consumer();
    let expected = (0..1000).filter(|number| number % 2 == 1);
    for expected in expected.chain(1000..MESSAGES) {
        let (place, message) = consumer.next().await;
        assert_eq!(number(&message), expected);
        spool.settle(place, Vec::new()).await;
    }
    assert_eq!(spool.status().messages, 0);
    // Numbers are not used again.
    let waiting = append(&spool, MESSAGES, 0).await;
    let (place, message) = consumer.next().await;
    assert_eq!((number(&message), place), (MESSAGES, MESSAGES));
    drop(waiting);
}

#[tokio::test]
async fn a_reader_that_is_always_interrupted_gets_on() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(Some(folder.path()), 1 << 30);
    for number in 0..10 {
        drop(append(&spool, number, 1 << 20).await);
    }
    let barrier = spool.place().journal.clone().unwrap();
    barrier.commit(Vec::new()).await.await;
    let mut consumer = spool.consumer();
    let mut seen = Vec::new();
    while seen.len() < 10 {
        // Polled once and given up, as a branch of a select is when another is ready.
        let next = futures_util::FutureExt::now_or_never(consumer.next());
        seen.extend(next.map(|(_, stored)| number(&stored)));
        tokio::task::yield_now().await;
    }
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
}
