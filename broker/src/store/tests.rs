use std::sync::mpsc;

use selvedge_proto::topic::TopicName;

use super::*;
use crate::batch::Flow;

const FULL: &str = "No space left on device (os error 28)";

fn full() -> StoreError {
    StoreError::Failed(FULL.into())
}

/// An engine that does as it is told. What it committed, and when it failed, can be seen.
struct Obedient {
    /// Whether the next commit succeeds; when nobody says so any more, it does.
    orders: mpsc::Receiver<bool>,
    committed: Arc<Mutex<Vec<Change>>>,
    seen: mpsc::SyncSender<bool>,
    needs_reopening: bool,
}

struct Orders {
    orders: mpsc::SyncSender<bool>,
    seen: mpsc::Receiver<bool>,
    committed: Arc<Mutex<Vec<Change>>>,
}

impl Obedient {
    fn new() -> (Self, Orders) {
        let (orders, receiver) = mpsc::sync_channel(100);
        let (seen, seen_receiver) = mpsc::sync_channel(10_000);
        let committed = Arc::<Mutex<Vec<Change>>>::default();
        let engine = Self {
            orders: receiver,
            committed: Arc::clone(&committed),
            seen,
            needs_reopening: false,
        };
        let orders = Orders {
            orders,
            seen: seen_receiver,
            committed,
        };
        (engine, orders)
    }
}

impl Engine for Obedient {
    fn load(&mut self) -> Loaded {
        Loaded::default()
    }

    fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        assert!(!self.needs_reopening);
        let succeeds = self.orders.recv().unwrap_or(true);
        if succeeds {
            self.committed.lock().extend_from_slice(changes);
        }
        self.needs_reopening = !succeeds;
        let _ = self.seen.send(succeeds);
        if succeeds { Ok(()) } else { Err(full()) }
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        self.needs_reopening = false;
        Ok(())
    }
}

impl Orders {
    fn next_is(&self, succeeds: bool) {
        self.orders.send(succeeds).unwrap();
        let seen = self.seen.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(seen, succeeds);
    }

    fn committed(&self) -> Vec<u64> {
        let sequence = |change: &Change| match change {
            Change::Enqueue(key, _) => key.sequence,
            other => panic!("{other:?}"),
        };
        self.committed.lock().iter().map(sequence).collect()
    }
}

fn key(sequence: u64) -> QueueKey {
    QueueKey {
        session: 1,
        subscription: 0,
        class: Class::Normal,
        sequence,
    }
}

pub(super) fn batch(bytes: usize) -> Arc<Batch> {
    let topic = TopicName::parse("line/1").unwrap();
    let publisher = "spiffe://example.org/acme/s/p".parse().unwrap();
    Arc::new(Batch {
        flow: Arc::new(Flow::new(1, topic, publisher, 1)),
        class: Class::Normal,
        qos: selvedge_proto::message::Qos::AtLeastOnce,
        retain: false,
        retain_as_published: false,
        count: 1,
        frames: Bytes::from(vec![0; bytes]),
        payload: Bytes::new(),
        expires: None,
    })
}

fn enqueue(sequence: u64) -> Change {
    Change::Enqueue(key(sequence), batch(100))
}

pub(super) fn session(id: u64) -> StoredSession {
    StoredSession {
        id,
        identity: "spiffe://example.org/acme/s/p".into(),
        name: String::new(),
        expiry_ms: 1000,
        detached_ms: None,
    }
}

#[tokio::test]
async fn a_failed_commit_is_refused_and_tried_again_before_what_came_later() {
    let (engine, orders) = Obedient::new();
    let metrics = Arc::new(Metrics::default());
    let store = Store::start(engine, Arc::clone(&metrics));
    store.put(enqueue(1));
    let first = store.sync();
    orders.next_is(false);
    assert_eq!(first.await.unwrap(), Err(full()));
    assert_eq!(store.check(), Err(full()));
    assert_eq!(metrics.store_failing.get(), 1);

    // While it fails nobody is held, and order is kept.
    store.put(enqueue(2));
    assert_eq!(store.sync().await.unwrap(), Err(full()));
    orders.next_is(false);
    store.put(enqueue(3));
    assert_eq!(store.sync().await.unwrap(), Err(full()));
    orders.next_is(true);
    orders.next_is(true);
    // One more, to see that it serves on and everyone is told so.
    store.put(enqueue(4));
    let last = store.sync();
    orders.next_is(true);
    assert_eq!(last.await.unwrap(), Ok(()));
    assert_eq!(store.check(), Ok(()));
    assert_eq!(metrics.store_failing.get(), 0);
    assert_eq!(metrics.store_errors.get(), 2);
    assert_eq!(orders.committed(), [1, 2, 3, 4]);
    assert_eq!(store.close().await, Ok(()));
    assert_eq!(store.inner().bytes.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_failing_store_counts_what_waits_and_its_memory_is_bounded() {
    let (engine, orders) = Obedient::new();
    let store = Store::start(engine, Arc::default());
    store.put(enqueue(1));
    orders.next_is(false);
    assert_eq!(store.sync().await.unwrap(), Err(full()));
    let large = batch(1 << 20);
    for sequence in 2..=70 {
        store.put(Change::Enqueue(key(sequence), Arc::clone(&large)));
    }
    assert!(store.inner().bytes.load(Ordering::Relaxed) > PENDING_BYTES);
    // What comes and goes meanwhile, such as sessions that change, does not pile up.
    for sequence in 2..=70 {
        store.put(Change::Dequeue(key(sequence)));
    }
    for round in 0..100_000 {
        store.put(Change::PutSession(session(round % 10)));
        store.put(Change::RemoveSubscription(3, 0));
    }
    let waiting = store.inner().pending.lock().changes.len();
    assert!(waiting <= 2 * COMPACT_AT, "{waiting}");
    assert!(store.inner().bytes.load(Ordering::Relaxed) < 2 * COMPACT_AT * 128);
    drop(orders);
    assert_eq!(store.close().await, Ok(()));
}

#[tokio::test]
async fn a_store_that_is_behind_says_so() {
    let (engine, orders) = Obedient::new();
    let store = Store::start(engine, Arc::default());
    store.put(Change::Enqueue(key(1), batch(PENDING_BYTES)));
    assert_eq!(store.check(), Err(StoreError::Behind));
    orders.next_is(true);
    store.close().await.unwrap();
    assert_eq!(store.check(), Ok(()));
}

#[tokio::test]
async fn closing_a_store_that_fails_ends_and_says_what_is_lost() {
    let (engine, orders) = Obedient::new();
    let store = Store::start(engine, Arc::default());
    store.put(enqueue(1));
    orders.next_is(false);
    assert_eq!(store.sync().await.unwrap(), Err(full()));
    store.put(enqueue(2));
    for _ in 0..10 {
        orders.orders.send(false).unwrap();
    }
    let error = store.close().await.unwrap_err();
    let want = format!("2 changes were not written: {FULL}");
    assert_eq!(error, StoreError::Failed(want.into()));
    // It stays ended, and nothing more is taken.
    store.put(enqueue(3));
    assert!(store.inner().pending.lock().changes.is_empty());
    assert_eq!(store.close().await, Err(error));
}

#[tokio::test]
async fn a_store_that_recovers_while_it_is_closed_loses_nothing() {
    let (engine, orders) = Obedient::new();
    let store = Store::start(engine, Arc::default());
    store.put(enqueue(1));
    orders.next_is(false);
    assert_eq!(store.sync().await.unwrap(), Err(full()));
    store.put(enqueue(2));
    for succeeds in [false, true, true] {
        orders.orders.send(succeeds).unwrap();
    }
    assert_eq!(store.close().await, Ok(()));
    assert_eq!(orders.committed(), [1, 2]);
}
