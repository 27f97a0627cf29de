//! The embedded engine: fjall, a log-structured store whose journal is fsynced once per commit.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use super::record::{decode_json, encode_batch, encode_json};
use super::{
    Change, Engine, Loaded, QueueKey, StoreError, StoredMessages, StoredSession,
    StoredSubscription, unix_ms,
};

#[cfg(test)]
mod tests;

/// Journals on disk beyond which memory tables are written out. A keyspace that is seldom written
/// otherwise keeps every journal since its last change.
const JOURNAL_BYTES: u64 = 64 << 20;

/// Size at which a keyspace's memory table is written out: less than the engine's default, so that
/// its journals can go sooner.
const MEMTABLE_BYTES: u64 = 16 << 20;

/// A store in a folder.
pub struct DiskEngine {
    database: Database,
    sessions: Keyspace,
    subscriptions: Keyspace,
    queues: Keyspace,
    retained: Keyspace,
}

impl std::fmt::Debug for DiskEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskEngine").finish_non_exhaustive()
    }
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError(error.to_string().into())
}

impl DiskEngine {
    /// Opens the store in `folder`. One that cannot be opened at all is renamed and a new one
    /// begun; the answer says so.
    ///
    /// # Errors
    /// The folder cannot be made, is another broker's, or a new store cannot be begun in it.
    pub fn open(folder: &Path) -> Result<(Self, Vec<String>), StoreError> {
        make_private(folder)
            .map_err(|error| failed(format!("cannot make {}: {error}", folder.display())))?;
        let why = match guarded(|| Ok(Self::open_at(folder))) {
            Ok(Ok(engine)) => return Ok((engine, Vec::new())),
            Ok(Err(fjall::Error::Locked)) => {
                return Err(failed(format!(
                    "{} is in use by another broker: stop it or give this one another folder",
                    folder.display()
                )));
            }
            Ok(Err(error)) => error.to_string(),
            Err(panicked) => panicked.to_string(),
        };
        let aside = set_aside(folder).map_err(failed)?;
        let report = format!(
            "the store could not be opened ({why}) and was set aside as {}",
            aside.display()
        );
        Ok((Self::open_at(folder).map_err(failed)?, vec![report]))
    }

    fn open_at(folder: &Path) -> fjall::Result<Self> {
        let database = Database::builder(folder)
            .max_journaling_size(JOURNAL_BYTES)
            .open()?;
        let keyspace = |name: &str| {
            database.keyspace(name, || {
                KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
            })
        };
        Ok(Self {
            sessions: keyspace("sessions")?,
            subscriptions: keyspace("subscriptions")?,
            queues: keyspace("queues")?,
            retained: keyspace("retained")?,
            database,
        })
    }

    fn write(&self, changes: &[Change]) -> fjall::Result<()> {
        let mut batch = self
            .database
            .batch()
            .durability(Some(PersistMode::SyncData));
        let (now, clock) = (Instant::now(), SystemTime::now());
        // A batch that came and went within one commit is never written.
        let gone: std::collections::HashSet<QueueKey> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Dequeue(key) => Some(*key),
                _ => None,
            })
            .collect();
        for change in changes {
            match change {
                Change::PutSession(session) => {
                    batch.insert(
                        &self.sessions,
                        session.id.to_be_bytes(),
                        encode_json(session),
                    );
                }
                Change::RemoveSession(id) => {
                    let id = id.to_be_bytes();
                    batch.remove(&self.sessions, id);
                    for space in [&self.subscriptions, &self.queues] {
                        for item in space.prefix(id) {
                            batch.remove(space, item.key()?);
                        }
                    }
                }
                Change::PutSubscription(session, subscription) => {
                    let key = subscription_key(*session, subscription.id);
                    batch.insert(&self.subscriptions, key, encode_json(subscription));
                }
                Change::RemoveSubscription(session, id) => {
                    let key = subscription_key(*session, *id);
                    batch.remove(&self.subscriptions, key);
                    if *id != 0 {
                        for item in self.queues.prefix(key) {
                            batch.remove(&self.queues, item.key()?);
                        }
                    }
                }
                Change::Enqueue(key, messages) => {
                    if !gone.contains(key) {
                        batch.insert(
                            &self.queues,
                            key.to_bytes(),
                            encode_batch(messages, now, clock),
                        );
                    }
                }
                Change::Dequeue(key) => batch.remove(&self.queues, key.to_bytes()),
                Change::PutRetained(tenant, message) => {
                    let key = retained_key(tenant, message.flow.topic.as_str());
                    batch.insert(&self.retained, key, encode_batch(message, now, clock));
                }
                Change::RemoveRetained(tenant, topic) => {
                    batch.remove(&self.retained, retained_key(tenant, topic));
                }
            }
        }
        batch.commit()
    }
}

impl Engine for DiskEngine {
    fn load(&mut self) -> Loaded {
        let mut loaded = Loaded::default();
        let mut left_out = Vec::new();
        let mut sessions: std::collections::BTreeMap<
            u64,
            (StoredSession, Vec<StoredSubscription>),
        > = std::collections::BTreeMap::new();
        scan(&self.sessions, "session", &mut left_out, |_, value| {
            let session: StoredSession = decode_json(value).map_err(|error| error.to_string())?;
            sessions.insert(session.id, (session, Vec::new()));
            Ok(())
        });
        scan(
            &self.subscriptions,
            "subscription",
            &mut left_out,
            |key, value| {
                let session = key.first_chunk().map(|id| u64::from_be_bytes(*id));
                let subscription: StoredSubscription =
                    decode_json(value).map_err(|error| error.to_string())?;
                let held = session.and_then(|id| sessions.get_mut(&id));
                held.ok_or("its session is not there")?.1.push(subscription);
                Ok(())
            },
        );
        scan(&self.queues, "queued batch", &mut left_out, |key, value| {
            let key = QueueKey::from_bytes(key).ok_or("its key is damaged")?;
            let messages = StoredMessages::from_bytes(value).map_err(|error| error.to_string())?;
            loaded.queues.insert(key, messages);
            Ok(())
        });
        scan(
            &self.retained,
            "retained message",
            &mut left_out,
            |key, value| {
                let tenant = key.split(|&byte| byte == 0).next().unwrap_or_default();
                let tenant = std::str::from_utf8(tenant).map_err(|_| "its key is damaged")?;
                let messages =
                    StoredMessages::from_bytes(value).map_err(|error| error.to_string())?;
                loaded.retained.push((tenant.to_owned(), messages));
                Ok(())
            },
        );
        loaded.sessions = sessions.into_values().collect();
        loaded.left_out = left_out;
        loaded
    }

    fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        guarded(|| self.write(changes).map_err(failed))
    }
}

/// Reads every item of a keyspace; one that cannot be read is left out and named. Past damage the
/// scan goes on from the other end, up to the damage: going on behind it could bring back what had
/// been deleted.
fn scan(
    space: &Keyspace,
    what: &str,
    left_out: &mut Vec<String>,
    mut read: impl FnMut(&[u8], &[u8]) -> Result<(), String>,
) {
    let mut take = |item: fjall::Guard, left_out: &mut Vec<String>| match item.into_inner() {
        Ok((key, value)) => {
            if let Err(why) = read(&key, &value) {
                left_out.push(format!("a {what}: {why}"));
            }
            true
        }
        Err(error) => {
            left_out.push(format!("a {what} and those stored with it: {error}"));
            false
        }
    };
    let scanned = guarded(|| {
        let whole = space.iter().all(|item| take(item, left_out));
        if !whole {
            let _ = space.iter().rev().all(|item| take(item, left_out));
        }
        Ok(())
    });
    if let Err(error) = scanned {
        left_out.push(format!("every further {what}: {error}"));
    }
}

/// Turns a panic of the engine, which damaged files can cause, into an error.
fn guarded<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(StoreError(Arc::from("the engine panicked"))))
}

fn set_aside(folder: &Path) -> std::io::Result<PathBuf> {
    let name = folder
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let aside = folder.with_file_name(format!("{name}.damaged-{}", unix_ms(SystemTime::now())));
    std::fs::rename(folder, &aside)?;
    make_private(folder)?;
    Ok(aside)
}

/// Makes the folder, for nobody else to read: it holds messages.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

fn subscription_key(session: u64, id: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&session.to_be_bytes());
    key[8..].copy_from_slice(&id.to_be_bytes());
    key
}

/// Neither part can hold a zero byte.
fn retained_key(tenant: &str, topic: &str) -> Vec<u8> {
    [tenant.as_bytes(), &[0], topic.as_bytes()].concat()
}
