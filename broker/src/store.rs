//! What outlives the broker's process: sessions, their QoS 1 queues, retained messages, the history
//! of topics and the ids of messages seen.
//!
//! Listeners put changes in a list and go on. One thread takes the whole list, writes it as one
//! commit with one fsync, and then tells everyone who waits: hundreds of publishers share an
//! fsync, and QoS 0 never comes here.
//!
//! A commit that fails, as on a full disk, is tried again until it succeeds, before anything that
//! came later. Until then whoever waits is refused, so nobody is told that something is kept that
//! is not.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use selvedge_proto::message::Class;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::batch::Batch;
use crate::metrics::Metrics;

mod compact;
mod disk;
mod record;
mod salvage;
#[cfg(test)]
mod tests;

pub use self::disk::DiskEngine;
pub(crate) use self::record::instant_of;
pub use self::record::{
    PacketKey, RecordError, StoredMessage, StoredMessageId, StoredMessages, StoredPacket,
    StoredSession, StoredSubscription, StoredWill,
};

/// Bytes of changes that may wait for the disk. Beyond it QoS 1 publishers to kept sessions are
/// refused with RESOURCE_EXHAUSTED and told when to try again, so a slow disk never grows memory.
pub const PENDING_BYTES: usize = 64 << 20;

/// Wait before the first retry of a failed commit; it doubles with each.
const RETRY_FIRST: Duration = Duration::from_millis(100);

/// Longest wait between retries: what a person who has freed space has to wait.
const RETRY_LONGEST: Duration = Duration::from_secs(5);

/// Retries of a store that fails while it is being closed, [`RETRY_FIRST`] apart.
const RETRIES_AT_CLOSE: u32 = 3;

/// Changes that may wait behind a failed commit before those that undo each other are taken out.
/// QoS 1 publishers are refused then, so what is left is bounded by what the broker holds.
const COMPACT_AT: usize = 4096;

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
    /// A QoS 2 packet id of a kept session is in progress.
    PutPacket(u64, StoredPacket),
    /// It is not any more.
    RemovePacket(u64, PacketKey),
    /// A session has a will. It stays when the session ends, since it is to be published then.
    PutWill(Arc<StoredWill>),
    /// The will of this session was published or taken back.
    RemoveWill(u64),
}

impl Change {
    fn cost(&self) -> usize {
        match self {
            Self::Enqueue(_, batch) | Self::PutRetained(_, batch) => batch.cost() + 64,
            Self::PutHistory(_, batch, _) => batch.cost() + 128,
            Self::PutMessageId { id, .. } | Self::RemoveMessageId { id, .. } => id.len() + 128,
            Self::PutWill(will) => will.payload.len() + 512,
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
    /// QoS 2 packet ids in progress, by session.
    pub packets: Vec<(u64, StoredPacket)>,
    /// Wills that were not published.
    pub wills: Vec<StoredWill>,
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
    /// None of them is certain to be kept. The same may be committed again after
    /// [`Engine::reopen`].
    fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError>;

    /// Makes the engine ready to commit again after a commit failed. What was committed before is
    /// still there.
    ///
    /// # Errors
    /// It is still not ready. It may be asked again.
    fn reopen(&mut self) -> Result<(), StoreError>;
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
    /// Whether `Pending::failing` says why. Outside the lock, as `bytes`.
    failing: AtomicBool,
    /// Held for writing while a commit is begun, and for reading by who puts several changes of which
    /// none is to be written without the others.
    together: RwLock<()>,
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
    /// Why the last commit failed, while it has not succeeded since.
    failing: Option<StoreError>,
    /// Changes beyond which those that undo each other are taken out.
    compact_at: usize,
    /// What was not written when the thread gave up.
    lost: Option<StoreError>,
}

impl Store {
    /// Opens the store in a folder, which is made if need be, and reads what it keeps. Of a
    /// store that is damaged, what can be read is put in a new one, and the old is kept.
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
            failing: AtomicBool::new(false),
            together: RwLock::new(()),
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
        let mut pending = inner.pending.lock();
        if pending.lost.is_some() {
            // Nobody is there to write it.
            return;
        }
        inner.bytes.fetch_add(change.cost(), Ordering::Relaxed);
        pending.changes.push(change);
        if pending.failing.is_some() && pending.changes.len() >= pending.compact_at {
            let before: usize = pending.changes.iter().map(Change::cost).sum();
            pending.changes = compact::compact(std::mem::take(&mut pending.changes));
            let after: usize = pending.changes.iter().map(Change::cost).sum();
            inner.bytes.fetch_sub(before - after, Ordering::Relaxed);
            pending.compact_at = COMPACT_AT.max(2 * pending.changes.len());
        }
        drop(pending);
        inner.wake.notify_one();
    }

    /// What is put while the answer is held is in one commit.
    pub(crate) fn together(&self) -> RwLockReadGuard<'_, ()> {
        self.inner().together.read()
    }

    /// Whether the store can take what a publisher brings.
    ///
    /// # Errors
    /// It is failing, or behind.
    #[inline]
    pub fn check(&self) -> Result<(), StoreError> {
        let inner = self.inner();
        if inner.failing.load(Ordering::Relaxed)
            && let Some(error) = inner.pending.lock().failing.clone()
        {
            return Err(error);
        }
        if inner.bytes.load(Ordering::Relaxed) < PENDING_BYTES {
            Ok(())
        } else {
            Err(StoreError::Behind)
        }
    }

    /// A receipt for everything put so far. While the store fails it says so at once.
    pub fn sync(&self) -> Synced {
        let (sender, receiver) = oneshot::channel();
        let mut pending = self.inner().pending.lock();
        if pending.closed {
            let _ = sender.send(Err(StoreError::Failed("it is closed".into())));
        } else if let Some(error) = &pending.failing {
            let _ = sender.send(Err(error.clone()));
        } else {
            pending.waiters.push(sender);
        }
        drop(pending);
        self.inner().wake.notify_one();
        receiver
    }

    /// Writes what waits and ends the thread; the folder is free for another broker then. A store
    /// that fails is tried a few times more.
    ///
    /// # Errors
    /// Not everything was written.
    pub async fn close(&self) -> Result<(), StoreError> {
        let inner = self.inner();
        inner.pending.lock().closed = true;
        inner.wake.notify_one();
        inner.ended.cancelled().await;
        let lost = inner.pending.lock().lost.clone();
        lost.map_or(Ok(()), Err)
    }
}

fn run(inner: &Inner, engine: &mut impl Engine) {
    loop {
        let mut pending = inner.pending.lock();
        while pending.changes.is_empty() && pending.waiters.is_empty() && !pending.closed {
            inner.wake.wait(&mut pending);
        }
        // In this order, as those who hold it put changes.
        drop(pending);
        let together = inner.together.write();
        let mut pending = inner.pending.lock();
        drop(together);
        let changes = std::mem::take(&mut pending.changes);
        let waiters = std::mem::take(&mut pending.waiters);
        let ending = pending.closed && changes.is_empty() && waiters.is_empty();
        drop(pending);
        if ending {
            return;
        }
        // What is being written counts as pending until it is.
        let cost: usize = changes.iter().map(Change::cost).sum();
        let changes = compact::compact(changes);
        let written = if changes.is_empty() {
            Ok(())
        } else {
            inner.metrics.store_commits.inc();
            engine.commit(&changes)
        };
        if let Err(error) = &written {
            tracing::error!(
                %error,
                changes = changes.len(),
                "a commit failed and will be tried again; QoS 1 is refused until it succeeds"
            );
            inner.fail(error);
        }
        for waiter in waiters {
            // A publisher that is gone needs no answer.
            let _ = waiter.send(written.clone());
        }
        if written.is_err() && !retry(inner, engine, &changes) {
            return;
        }
        inner.bytes.fetch_sub(cost, Ordering::Relaxed);
    }
}

/// Tries a failed commit again until it succeeds, or the store is closed and still fails.
fn retry(inner: &Inner, engine: &mut impl Engine, changes: &[Change]) -> bool {
    let since = Instant::now();
    let mut delay = RETRY_FIRST;
    let mut retries_at_close = 0;
    loop {
        let closed = inner.wait_to_retry(delay);
        let error = match engine.reopen().and_then(|()| engine.commit(changes)) {
            Ok(()) => {
                inner.recovered();
                let (changes, seconds) = (changes.len(), since.elapsed().as_secs());
                tracing::warn!(changes, seconds, "the store works again; nothing was lost");
                return true;
            }
            Err(error) => error,
        };
        tracing::debug!(%error, "the store still fails");
        inner.fail(&error);
        delay = (delay * 2).min(RETRY_LONGEST);
        if closed {
            delay = RETRY_FIRST;
            retries_at_close += 1;
        }
        if retries_at_close == RETRIES_AT_CLOSE {
            let mut pending = inner.pending.lock();
            let lost = changes.len() + std::mem::take(&mut pending.changes).len();
            tracing::error!(
                %error,
                changes = lost,
                "the store failed until the end: these changes are lost, none of them acknowledged"
            );
            let why = match &error {
                StoreError::Failed(why) => why,
                StoreError::Behind => "too much waits",
            };
            let why = format!("{lost} changes were not written: {why}");
            pending.lost = Some(StoreError::Failed(why.into()));
            return false;
        }
    }
}

impl Inner {
    /// Tells everyone that the store fails, and those who wait now.
    fn fail(&self, error: &StoreError) {
        self.metrics.store_errors.inc();
        self.metrics.store_failing.set(1);
        let mut pending = self.pending.lock();
        if pending.failing.is_none() {
            pending.compact_at = COMPACT_AT;
        }
        pending.failing = Some(error.clone());
        self.failing.store(true, Ordering::Relaxed);
        let waiters = std::mem::take(&mut pending.waiters);
        drop(pending);
        for waiter in waiters {
            let _ = waiter.send(Err(error.clone()));
        }
    }

    fn recovered(&self) {
        self.pending.lock().failing = None;
        self.failing.store(false, Ordering::Relaxed);
        self.metrics.store_failing.set(0);
    }

    /// Waits before a retry, no longer than until the store is closed. Says whether it is.
    fn wait_to_retry(&self, delay: Duration) -> bool {
        let deadline = Instant::now() + delay;
        let mut pending = self.pending.lock();
        let closed_before = pending.closed;
        // A change that is put wakes it, too.
        while pending.closed == closed_before
            && !self.wake.wait_until(&mut pending, deadline).timed_out()
        {}
        pending.closed
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
