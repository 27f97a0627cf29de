//! What the bridge has on its own disk: messages it has taken and not yet handed over, the packet ids
//! of QoS 2, and the names of what was carried. The engine is the broker's, fjall; one thread owns it,
//! and changes that come while it commits share the next commit.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use tokio::sync::{mpsc, oneshot};

/// Changes and reads that may wait for the thread; beyond it whoever asks waits.
const WAITING: usize = 4096;
/// Changes put in one commit.
const GROUP: usize = 1024;
/// Journals on disk beyond which memory tables are written out.
const JOURNAL_BYTES: u64 = 64 << 20;
/// Size at which a memory table is written out.
const MEMTABLE_BYTES: u64 = 8 << 20;
/// How long after a failed commit the engine is opened again.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Space {
    /// Messages of a remote for the fabric, by number.
    In,
    /// Numbers of QoS 2 messages of a remote that it has not released, by packet id.
    InIds,
    /// Messages of the fabric for a remote, by number.
    Out,
    /// Packet ids of QoS 2 messages for a remote, and whether it has received them, by number.
    OutIds,
    /// Names of QoS 2 messages for a remote, by number.
    Names,
}

impl Space {
    const ALL: [Self; 5] = [Self::In, Self::InIds, Self::Out, Self::OutIds, Self::Names];

    fn name(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::InIds => "in-ids",
            Self::Out => "out",
            Self::OutIds => "out-ids",
            Self::Names => "names",
        }
    }
}

/// A key: the remote's name and a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) space: Space,
    pub(crate) remote: Arc<str>,
    pub(crate) number: u64,
}

impl Key {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = prefix(&self.remote);
        bytes.extend_from_slice(&self.number.to_be_bytes());
        bytes
    }
}

/// Names of remotes have no zero byte, so no prefix is another's.
fn prefix(remote: &str) -> Vec<u8> {
    let mut bytes = remote.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// One change.
#[derive(Debug)]
pub(crate) enum Op {
    Put(Key, Vec<u8>),
    Remove(Key),
}

/// Records with their numbers, to come.
pub(crate) type Records = oneshot::Receiver<Vec<(u64, Vec<u8>)>>;

/// Called by the thread when the changes are on disk; must not wait for anything.
type Committed = Box<dyn FnOnce() + Send>;

enum Request {
    Commit(Vec<Op>, Option<Committed>),
    Read {
        from: Key,
        below: u64,
        bytes: usize,
        answer: oneshot::Sender<Vec<(u64, Vec<u8>)>>,
    },
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another bridge uses the folder.
    #[error(
        "{} is in use by another bridge: stop it or give this one another [store] folder",
        folder.display()
    )]
    InUse {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder cannot be used.
    #[error("cannot use {}: {reason}", folder.display())]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// A handle to the journal. Cheap to clone; the thread ends with the last one.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    requests: mpsc::Sender<Request>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Request")
    }
}

/// The engine, open.
struct Tables {
    database: Database,
    spaces: [Keyspace; 5],
}

impl Journal {
    /// Opens the journal in `folder` and reads what it holds of each remote. A folder that the engine
    /// cannot read is put aside, and a new one is begun.
    pub(crate) fn open(
        folder: &Path,
        remotes: &[Arc<str>],
        mut read: impl FnMut(usize, Space, u64, &[u8]),
    ) -> Result<Self, JournalError> {
        let unusable = |reason: String| JournalError::Unusable {
            folder: folder.to_owned(),
            reason,
        };
        make_private(folder).map_err(|error| unusable(error.to_string()))?;
        let tables = match Tables::open(folder) {
            Ok(tables) => tables,
            Err(fjall::Error::Locked) => {
                return Err(JournalError::InUse {
                    folder: folder.to_owned(),
                });
            }
            Err(fjall::Error::Io(error)) => return Err(unusable(error.to_string())),
            Err(error) => {
                let aside = put_aside(folder).map_err(|error| unusable(error.to_string()))?;
                tracing::error!(
                    %error,
                    aside = %aside.display(),
                    "the bridge's store cannot be read: it is put aside and a new one is begun"
                );
                make_private(folder).map_err(|error| unusable(error.to_string()))?;
                Tables::open(folder).map_err(|error| unusable(error.to_string()))?
            }
        };
        for (index, remote) in remotes.iter().enumerate() {
            for space in Space::ALL {
                for item in tables.space(space).prefix(prefix(remote)) {
                    let (key, value) = match item.into_inner() {
                        Ok(item) => item,
                        Err(error) => {
                            tracing::error!(%error, %remote, "a part of the store is left out");
                            break;
                        }
                    };
                    if let Some(number) = key.last_chunk() {
                        read(index, space, u64::from_be_bytes(*number), &value);
                    }
                }
            }
        }
        let (requests, receiver) = mpsc::channel(WAITING);
        let trouble = Arc::new(Mutex::new(None));
        let keeper = Keeper {
            folder: folder.to_owned(),
            tables: Some(tables),
            requests: receiver,
            trouble: Arc::clone(&trouble),
        };
        std::thread::Builder::new()
            .name("bridge-store".to_owned())
            .spawn(move || keeper.run())
            .map_err(|error| unusable(error.to_string()))?;
        Ok(Self { requests, trouble })
    }

    /// Puts changes down, in the order of the calls; `committed` is called when they are on disk.
    /// While the disk fails, nothing is lost and nothing is called.
    pub(crate) async fn put(&self, ops: Vec<Op>, committed: Option<Committed>) {
        // The thread lives as long as there is a handle, unless the engine has panicked: then
        // nothing is ever on disk, and nothing is acknowledged.
        let _ = self.requests.send(Request::Commit(ops, committed)).await;
    }

    /// Puts changes down and returns something to wait for them with.
    pub(crate) async fn commit(&self, ops: Vec<Op>) -> impl Future<Output = ()> + Send + use<> {
        let (done, committed) = oneshot::channel::<()>();
        let call: Committed = Box::new(move || {
            let _ = done.send(());
        });
        self.put(ops, Some(call)).await;
        async move {
            if committed.await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Asks for the records from `from` on with numbers below `below`: at least one if there is any, and
    /// further ones up to about `bytes`. What answers must be kept until it has: a read that is given
    /// up and begun again under load never ends.
    pub(crate) async fn read(&self, from: Key, below: u64, bytes: usize) -> Records {
        let (answer, records) = oneshot::channel();
        let request = Request::Read {
            from,
            below,
            bytes,
            answer,
        };
        let _ = self.requests.send(request).await;
        records
    }

    /// What is wrong with the disk, while something is.
    pub(crate) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread.
struct Keeper {
    folder: PathBuf,
    /// Absent when a commit failed and the engine could not be opened since.
    tables: Option<Tables>,
    requests: mpsc::Receiver<Request>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl Keeper {
    fn run(mut self) {
        let mut next = None;
        while let Some(request) = next.take().or_else(|| self.requests.blocking_recv()) {
            let (ops, committed) = match request {
                Request::Commit(ops, committed) => (ops, committed),
                Request::Read {
                    from,
                    below,
                    bytes,
                    answer,
                } => {
                    let _ = answer.send(self.read(&from, below, bytes));
                    continue;
                }
            };
            let mut group = vec![ops];
            let mut calls: Vec<Committed> = committed.into_iter().collect();
            while group.len() < GROUP {
                match self.requests.try_recv() {
                    Ok(Request::Commit(ops, committed)) => {
                        group.push(ops);
                        calls.extend(committed);
                    }
                    Ok(read) => {
                        next = Some(read);
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.write(&group);
            for call in calls {
                call();
            }
        }
    }

    /// Tries until it works: what waits for it is not acknowledged meanwhile.
    fn write(&mut self, group: &[Vec<Op>]) {
        loop {
            let written = match &self.tables {
                Some(tables) => tables.write(group).map_err(|error| error.to_string()),
                None => Err("the engine is not open".to_owned()),
            };
            let Err(error) = written else {
                *lock(&self.trouble) = None;
                return;
            };
            tracing::error!(%error, "the bridge's store takes nothing");
            *lock(&self.trouble) = Some(error);
            std::thread::sleep(AFTER_FAILURE);
            // After an error the engine takes nothing more until it is opened anew, and its files
            // are free only when it is gone.
            self.tables = None;
            match Tables::open(&self.folder) {
                Ok(tables) => self.tables = Some(tables),
                Err(error) => tracing::error!(%error, "the bridge's store cannot be opened"),
            }
        }
    }

    fn read(&mut self, from: &Key, below: u64, bytes: usize) -> Vec<(u64, Vec<u8>)> {
        let end = Key {
            number: below,
            ..from.clone()
        };
        let mut records = Vec::new();
        let mut taken = 0;
        let Some(tables) = &self.tables else {
            return records;
        };
        for item in tables.space(from.space).range(from.bytes()..end.bytes()) {
            let (key, value) = match item.into_inner() {
                Ok(item) => item,
                Err(error) => {
                    tracing::error!(%error, "a part of the store is left out");
                    break;
                }
            };
            taken += value.len();
            if let Some(number) = key.last_chunk() {
                records.push((u64::from_be_bytes(*number), value.to_vec()));
            }
            if taken >= bytes {
                break;
            }
        }
        records
    }
}

impl Tables {
    fn open(folder: &Path) -> fjall::Result<Self> {
        let database = Database::builder(folder)
            .max_journaling_size(JOURNAL_BYTES)
            .open()?;
        let space = |space: Space| {
            database.keyspace(space.name(), || {
                KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
            })
        };
        let [a, b, c, d, e] = Space::ALL.map(space);
        Ok(Self {
            spaces: [a?, b?, c?, d?, e?],
            database,
        })
    }

    fn space(&self, space: Space) -> &Keyspace {
        &self.spaces[space as usize]
    }

    fn write(&self, group: &[Vec<Op>]) -> fjall::Result<()> {
        let mut batch = self
            .database
            .batch()
            .durability(Some(PersistMode::SyncData));
        for op in group.iter().flatten() {
            match op {
                Op::Put(key, value) => batch.insert(self.space(key.space), key.bytes(), &**value),
                Op::Remove(key) => batch.remove(self.space(key.space), key.bytes()),
            }
        }
        batch.commit()
    }
}

/// Makes the folder, for its owner only: messages are in it.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

fn put_aside(folder: &Path) -> std::io::Result<PathBuf> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.unwrap_or_default().as_secs();
    let mut name = folder.as_os_str().to_owned();
    name.push(format!(".damaged-{seconds}"));
    let aside = PathBuf::from(name);
    std::fs::rename(folder, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn key(remote: &str, number: u64) -> Key {
        Key {
            space: Space::Out,
            remote: remote.into(),
            number,
        }
    }

    /// Remote, number and record.
    type Held = Vec<(usize, u64, Vec<u8>)>;

    fn open(folder: &Path) -> Result<(Journal, Held), JournalError> {
        let mut held = Vec::new();
        let remotes = ["a".into(), "ab".into()];
        let journal = Journal::open(folder, &remotes, |remote, space, number, value| {
            assert_eq!(space, Space::Out);
            held.push((remote, number, value.to_vec()));
        })?;
        Ok((journal, held))
    }

    #[tokio::test]
    async fn what_is_committed_is_there_when_it_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, held) = open(folder.path()).unwrap();
        assert_eq!(held, []);
        let puts = [("a", 1), ("a", 300), ("ab", 2)];
        let puts = puts.map(|(remote, number)| Op::Put(key(remote, number), vec![number as u8]));
        journal.commit(puts.into()).await.await;
        journal.commit(vec![Op::Remove(key("a", 1))]).await.await;
        let read = journal
            .read(key("a", 0), u64::MAX, 1000)
            .await
            .await
            .unwrap();
        assert_eq!(read, [(300, vec![44])]);
        let read = journal.read(key("a", 0), 300, 1000).await.await;
        assert!(read.unwrap().is_empty());
        assert!(matches!(
            open(folder.path()),
            Err(JournalError::InUse { .. })
        ));
        drop(journal);
        // The thread lets go of the folder after the last handle.
        let (_journal, held) = loop {
            match open(folder.path()) {
                Err(JournalError::InUse { .. }) => tokio::task::yield_now().await,
                opened => break opened.unwrap(),
            }
        };
        assert_eq!(held, [(0, 300, vec![44]), (1, 2, vec![2])]);
    }
}
