//! What outlives the broker's process: sessions, their QoS 1 queues, retained messages, the history
//! of topics and the ids of messages seen.
//!
//! Listeners put changes in a list and go on. One thread takes the whole list, writes it as one
//! commit with one fsync, and then tells everyone who waits: hundreds of publishers share an
//! fsync, and QoS 0 never comes here.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use selvedge_proto::message::Class;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::batch::Batch;
use crate::metrics::Metrics;

mod disk;
mod record;

pub use self::disk::DiskEngine;
pub(crate) use self::record::instant_of;
pub use self::record::{
    RecordError, StoredMessage, StoredMessageId, StoredMessages, StoredSession, StoredSubscription,
};

/// Bytes of changes that may wait for the disk. Beyond it QoS 1 publishers to kept sessions are
/// refused with RESOURCE_EXHAUSTED and told when to try again, so a slow disk never grows memory.
pub const PENDING_BYTES: usize = 64 << 20;

/// Where one batch of a queue is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueKey {
    /// Id of the session.
    pub session: u64,
    /// The subscription that owns the queue, or zero for the session's shared queues.
    pub subscription: u32,
    /// Class of the queue.
    pub class: Class,
    /// Place in the queue, rising.
    pub sequence: u64,
}

/// Where one batch of a topic's history is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HistoryKey {
    /// The tenant.
    pub tenant: Arc<str>,
    /// The topic.
    pub topic: Arc<str>,
    /// Place in the topic's history, rising.
    pub sequence: u64,
}

/// One change to what is kept.
#[derive(Debug, Clone)]
pub enum Change {
    /// A session is kept, or its record has changed.
    PutSession(StoredSession),
    /// A session has ended, with its subscriptions and queues.
    RemoveSession(u64),
    /// A subscription of a kept session.
    PutSubscription(u64, StoredSubscription),
    /// A subscription has ended, with its own queue if it has one.
    RemoveSubscription(u64, u32),
    /// A batch waits in a queue.
    Enqueue(QueueKey, Arc<Batch>),
    /// A batch was acknowledged or given up.
    Dequeue(QueueKey),
    /// The retained message of a tenant's topic.
    PutRetained(Arc<str>, Arc<Batch>),
    /// A tenant's topic has no retained message any more.
    RemoveRetained(Arc<str>, Arc<str>),
    /// A message with this id was taken, and the same again is a duplicate.
    PutMessageId {
        /// The tenant.
        tenant: Arc<str>,
        /// Identity of the publisher.
        publisher: Arc<str>,
        /// The publisher's id of the message.
        id: Bytes,
        /// Until when it is a duplicate.
        until: SystemTime,
    },
    /// The id is forgotten.
    RemoveMessageId {
        /// The tenant.
        tenant: Arc<str>,
        /// Identity of the publisher.
        publisher: Arc<str>,
        /// The publisher's id of the message.
        id: Bytes,
    },
    /// A batch of a topic's history, and when it was published.
    PutHistory(HistoryKey, Arc<Batch>, SystemTime),
    /// A batch of a topic's history was given up.
    RemoveHistory(HistoryKey),
}

impl Change {
    fn cost(&self) -> usize {
        match self {
            Self::Enqueue(_, batch) | Self::PutRetained(_, batch) => batch.cost() + 64,
            Self::PutHistory(_, batch, _) => batch.cost() + 128,
            Self::PutMessageId { id, .. } | Self::RemoveMessageId { id, .. } => id.len() + 128,
            _ => 128,
        }
    }
}

/// Everything that was kept.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Sessions with their subscriptions.
    pub sessions: Vec<(StoredSession, Vec<StoredSubscription>)>,
    /// Waiting batches, in order.
    pub queues: BTreeMap<QueueKey, StoredMessages>,
    /// Retained messages by tenant.
    pub retained: Vec<(String, StoredMessages)>,
    /// Ids of messages that are duplicates when they come again.
    pub message_ids: Vec<StoredMessageId>,
    /// The history of topics, in order of the keys, with the time each batch was published.
    pub history: Vec<(HistoryKey, SystemTime, StoredMessages)>,
    /// What could not be read, for a person.
    pub left_out: Vec<String>,
}

/// Why something was not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// [`PENDING_BYTES`] wait for the disk.
    #[error("the store is behind: too much waits to be written to disk")]
    Behind,
    /// The disk or the engine refuses; the broker tries again by itself.
    #[error("the store failed: {0}")]
    Failed(Arc<str>),
}

/// A storage engine. A commit that returned is there after a power loss, whole or not at all.
pub trait Engine: Send + 'static {
    /// Reads everything. What cannot be read is left out and named.
    fn load(&mut self) -> Loaded;

    /// Writes the changes in order, as one.
    ///
    /// # Errors
    /// None of them is certain to be kept.
    fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError>;
}

/// Resolves when everything put before is on disk.
pub type Synced = oneshot::Receiver<Result<(), StoreError>>;

/// A handle to the store's thread. Cheap to clone. The thread ends, with everything written, after
/// [`Store::close`] or when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Store(Arc<Handle>);

#[derive(Debug)]
struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.pending.lock().closed = true;
        self.0.wake.notify_one();
    }
}

#[derive(Debug)]
struct Inner {
    pending: Mutex<Pending>,
    /// Cost of the changes that are not on disk yet. Outside the lock, since every QoS 1 message asks.
    bytes: AtomicUsize,
    wake: Condvar,
    metrics: Arc<Metrics>,
    /// The engine has let go of its files.
    ended: CancellationToken,
}

#[derive(Debug, Default)]
struct Pending {
    changes: Vec<Change>,
    waiters: Vec<oneshot::Sender<Result<(), StoreError>>>,
    closed: bool,
}

impl Store {
    /// Opens the store in a folder, which is made if need be, and reads what it keeps. A store
    /// that cannot be opened at all is set aside, and a new one begun.
    ///
    /// # Errors
    /// The folder cannot be used.
    pub fn open(folder: &Path, metrics: Arc<Metrics>) -> Result<(Self, Loaded), StoreError> {
        let (mut engine, mut left_out) = DiskEngine::open(folder)?;
        let mut loaded = engine.load();
        left_out.append(&mut loaded.left_out);
        loaded.left_out = left_out;
        Ok((Self::start(engine, metrics), loaded))
    }

    /// Starts the thread of an engine.
    pub fn start(mut engine: impl Engine, metrics: Arc<Metrics>) -> Self {
        let inner = Arc::new(Inner {
            pending: Mutex::default(),
            bytes: AtomicUsize::new(0),
            wake: Condvar::new(),
            metrics,
            ended: CancellationToken::new(),
        });
        let shared = Arc::clone(&inner);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                run(&shared, &mut engine);
                drop(engine);
                shared.ended.cancel();
            })
            .expect("the system has room for one more thread");
        Self(Arc::new(Handle(inner)))
    }

    fn inner(&self) -> &Inner {
        &self.0.0
    }

    /// Puts a change, to be written with the next commit.
    pub fn put(&self, change: Change) {
        let inner = self.inner();
        inner.bytes.fetch_add(change.cost(), Ordering::Relaxed);
        let mut pending = inner.pending.lock();
        pending.changes.push(change);
        drop(pending);
        inner.wake.notify_one();
    }

    /// Whether the store can take what a publisher brings.
    ///
    /// # Errors
    /// It is failing, or behind.
    #[inline]
    pub fn check(&self) -> Result<(), StoreError> {
        if self.inner().bytes.load(Ordering::Relaxed) < PENDING_BYTES {
            Ok(())
        } else {
            Err(StoreError::Behind)
        }
    }

    /// A receipt for everything put so far.
    pub fn sync(&self) -> Synced {
        let (sender, receiver) = oneshot::channel();
        let mut pending = self.inner().pending.lock();
        if pending.closed {
            let _ = sender.send(Err(StoreError::Failed("it is closed".into())));
        } else {
            pending.waiters.push(sender);
        }
        drop(pending);
        self.inner().wake.notify_one();
        receiver
    }

    /// Writes what waits and ends the thread; the folder is free for another broker then.
    ///
    /// # Errors
    /// The last commit failed.
    pub async fn close(&self) -> Result<(), StoreError> {
        let synced = self.sync();
        self.inner().pending.lock().closed = true;
        self.inner().wake.notify_one();
        let synced = synced
            .await
            .unwrap_or_else(|_| Err(StoreError::Failed("it was closed before".into())));
        self.inner().ended.cancelled().await;
        synced
    }
}

fn run(inner: &Inner, engine: &mut impl Engine) {
    loop {
        let mut pending = inner.pending.lock();
        while pending.changes.is_empty() && pending.waiters.is_empty() && !pending.closed {
            inner.wake.wait(&mut pending);
        }
        let changes = std::mem::take(&mut pending.changes);
        let waiters = std::mem::take(&mut pending.waiters);
        let ending = pending.closed && changes.is_empty() && waiters.is_empty();
        drop(pending);
        if ending {
            return;
        }
        let result = if changes.is_empty() {
            Ok(())
        } else {
            inner.metrics.store_commits.inc();
            engine.commit(&changes)
        };
        if let Err(error) = &result {
            inner.metrics.store_errors.inc();
            tracing::error!(%error, changes = changes.len(), "a commit failed");
        }
        // What is being written counts as pending until it is.
        let cost: usize = changes.iter().map(Change::cost).sum();
        inner.bytes.fetch_sub(cost, Ordering::Relaxed);
        for waiter in waiters {
            // A publisher that is gone needs no answer.
            let _ = waiter.send(result.clone());
        }
    }
}

/// Milliseconds since 1970, for records.
pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The time of a record.
pub(crate) fn from_unix_ms(ms: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
}
