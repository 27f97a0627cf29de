//! The embedded engine: fjall, a log-structured store whose journal is fsynced once per commit.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use super::record::{
    decode_history, decode_json, decode_message_id, decode_packet, decode_will, encode_batch,
    encode_history, encode_json, encode_message_id, encode_packet, encode_will, packet_key,
};
use super::{
    Change, Engine, HistoryKey, Loaded, QueueKey, StoreError, StoredMessages, StoredSession,
    StoredSubscription, salvage,
};

#[cfg(test)]
mod tests;

/// Journals on disk beyond which memory tables are written out. A keyspace that is seldom written
/// otherwise keeps every journal since its last change.
const JOURNAL_BYTES: u64 = 64 << 20;

/// Size at which a keyspace's memory table is written out: less than the engine's default, so that
/// its journals can go sooner.
const MEMTABLE_BYTES: u64 = 16 << 20;

/// Longest key of the engine, less room for what [`bounded`] puts in place of the rest.
const KEY_BYTES: usize = 60_000;

/// Bytes of one commit to a new store.
const FILL_BYTES: usize = 4 << 20;

/// A store in a folder.
pub struct DiskEngine {
    folder: PathBuf,
    /// Absent when a commit failed and the engine could not be opened since.
    tables: Option<Tables>,
}

/// The engine, open.
struct Tables {
    database: Database,
    sessions: Keyspace,
    subscriptions: Keyspace,
    queues: Keyspace,
    retained: Keyspace,
    message_ids: Keyspace,
    history: Keyspace,
    packets: Keyspace,
    wills: Keyspace,
}

impl std::fmt::Debug for DiskEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskEngine").finish_non_exhaustive()
    }
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(error.to_string().into())
}

/// An error of the engine in words.
fn explain(error: &fjall::Error) -> String {
    match (io_error(error), error) {
        (Some(io), _) => io.to_string(),
        (None, fjall::Error::Poisoned) => {
            "the engine stopped when writing in the background failed, as on a full disk".to_owned()
        }
        (None, error) => error.to_string(),
    }
}

/// The system's error behind an error of the engine.
fn io_error(error: &fjall::Error) -> Option<&std::io::Error> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        source = error.source();
    }
    None
}

/// Whether the files may well be whole, and the system refuses to let them be used.
pub(super) fn is_of_the_system(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::OutOfMemory
    ) || error
        .raw_os_error()
        .is_some_and(|code| code == EMFILE || code == ENFILE)
}

/// Too many files are open, in the process and in the system.
const EMFILE: i32 = 24;
const ENFILE: i32 = 23;

/// Keyspaces in the order they are made in.
const SPACES: [&str; 8] = [
    "sessions",
    "subscriptions",
    "queues",
    "retained",
    "message-ids",
    "history",
    "packets",
    "wills",
];

impl DiskEngine {
    /// Opens the store in `folder`. Of one that is damaged, what can be read is put in a new one,
    /// and the old is kept; the answer says so.
    ///
    /// # Errors
    /// The folder cannot be made, is another broker's, or a new store cannot be begun in it.
    pub fn open(folder: &Path) -> Result<(Self, Vec<String>), StoreError> {
        let cannot = |what: &str, error: &dyn std::fmt::Display| {
            failed(format!("cannot {what} {}: {error}", folder.display()))
        };
        make_private(folder).map_err(|error| cannot("make", &error))?;
        let lock = match salvage::lock(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(in_use(folder));
            }
            locked => locked.map_err(|error| cannot("lock", &error))?,
        };
        salvage::resume(folder).map_err(|error| cannot("use", &error))?;
        let mut findings = salvage::inspect(folder).map_err(|error| cannot("read", &error))?;
        let mut left_out = Vec::new();
        if let Some(torn) = &findings.torn {
            tracing::warn!(
                %torn,
                "the broker was stopped during a commit; nothing in it was acknowledged"
            );
        }
        if !findings.damage.is_empty() {
            left_out = salvage_into_new(folder, &mut findings, None)?;
        }
        salvage::begin(folder).map_err(|error| cannot("use", &error))?;
        // The engine takes it now.
        drop(lock);
        let why = match guarded(|| Ok(Tables::open(folder))) {
            Ok(Ok(tables)) => return Ok((Self::new(folder, tables), left_out)),
            Ok(Err(fjall::Error::Locked)) => return Err(in_use(folder)),
            Ok(Err(error)) if io_error(&error).is_some_and(is_of_the_system) => {
                return Err(cannot("use", &explain(&error)));
            }
            Ok(Err(error)) => explain(&error),
            Err(panicked) => panicked.to_string(),
        };
        let lock = salvage::lock(folder).map_err(|error| cannot("lock", &error))?;
        left_out.append(&mut salvage_into_new(folder, &mut findings, Some(&why))?);
        drop(lock);
        let tables = Tables::open(folder).map_err(|error| failed(explain(&error)))?;
        Ok((Self::new(folder, tables), left_out))
    }

    fn new(folder: &Path, tables: Tables) -> Self {
        Self {
            folder: folder.to_owned(),
            tables: Some(tables),
        }
    }

    #[cfg(test)]
    fn tables(&self) -> &Tables {
        self.tables.as_ref().expect("it was just opened")
    }
}

fn in_use(folder: &Path) -> StoreError {
    failed(format!(
        "{} is in use by another broker: stop it or give this one another folder",
        folder.display()
    ))
}

/// Puts what can be read of a damaged store in a new one. The answer says what was found, and where
/// the damaged files are.
fn salvage_into_new(
    folder: &Path,
    findings: &mut salvage::Findings,
    refused: Option<&str>,
) -> Result<Vec<String>, StoreError> {
    let cannot = |error: &dyn std::fmt::Display| {
        failed(format!(
            "{} is damaged, and what can be read of it could not be saved: {error}",
            folder.display()
        ))
    };
    let records = salvage::read(folder, &SPACES, findings).map_err(|error| cannot(&error))?;
    let mut left_out = std::mem::take(&mut findings.damage);
    if let Some(why) = refused {
        left_out.push(format!("the engine could not open the store: {why}"));
    }
    let count: usize = records.values().map(std::collections::BTreeMap::len).sum();
    let place = salvage::new_store(folder).map_err(|error| cannot(&error))?;
    make_private(&place).map_err(|error| cannot(&error))?;
    guarded(|| {
        let tables = Tables::open(&place).map_err(|error| cannot(&explain(&error)))?;
        tables
            .fill(&records)
            .map_err(|error| cannot(&explain(&error)))
    })?;
    let aside = salvage::replace(folder).map_err(|error| cannot(&error))?;
    left_out.push(format!(
        "the store was damaged: {count} records were carried over, and the damaged files are kept \
         in {}",
        aside.display()
    ));
    Ok(left_out)
}

/// Notes how the store is left, so that a journal cut short can be told from one that is whole.
impl Drop for DiskEngine {
    fn drop(&mut self) {
        let Some(tables) = self.tables.take() else {
            return;
        };
        let ended = guarded(|| {
            drop(tables);
            salvage::end(&self.folder).map_err(failed)
        });
        if let Err(error) = ended {
            tracing::warn!(%error, "how the store was left could not be noted");
        }
    }
}

impl Tables {
    fn open(folder: &Path) -> fjall::Result<Self> {
        let database = Database::builder(folder)
            .max_journaling_size(JOURNAL_BYTES)
            .open()?;
        let keyspace = |name: &str| {
            database.keyspace(name, || {
                KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
            })
        };
        let [
            sessions,
            subscriptions,
            queues,
            retained,
            message_ids,
            history,
            packets,
            wills,
        ] = SPACES.map(keyspace);
        Ok(Self {
            sessions: sessions?,
            subscriptions: subscriptions?,
            queues: queues?,
            retained: retained?,
            message_ids: message_ids?,
            history: history?,
            packets: packets?,
            wills: wills?,
            database,
        })
    }

    fn write(&self, changes: &[Change]) -> fjall::Result<()> {
        let mut batch = self
            .database
            .batch()
            .durability(Some(PersistMode::SyncData));
        let (now, clock) = (Instant::now(), SystemTime::now());
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
                    for space in [&self.subscriptions, &self.queues, &self.packets] {
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
                    let record = encode_batch(messages, now, clock);
                    batch.insert(&self.queues, key.to_bytes(), record);
                }
                Change::Dequeue(key) => batch.remove(&self.queues, key.to_bytes()),
                Change::PutRetained(tenant, message) => {
                    let key = retained_key(tenant, message.flow.topic.as_str());
                    batch.insert(&self.retained, key, encode_batch(message, now, clock));
                }
                Change::RemoveRetained(tenant, topic) => {
                    batch.remove(&self.retained, retained_key(tenant, topic));
                }
                Change::PutMessageId {
                    tenant,
                    publisher,
                    id,
                    until,
                } => {
                    let key = message_id_key(tenant, publisher, id);
                    let record = encode_message_id(tenant, publisher, id, *until);
                    batch.insert(&self.message_ids, key, record);
                }
                Change::RemoveMessageId {
                    tenant,
                    publisher,
                    id,
                } => {
                    let key = message_id_key(tenant, publisher, id);
                    batch.remove(&self.message_ids, key);
                }
                Change::PutHistory(key, messages, published) => {
                    let record = encode_history(*published, &encode_batch(messages, now, clock));
                    batch.insert(&self.history, history_key(key), record);
                }
                Change::RemoveHistory(key) => batch.remove(&self.history, history_key(key)),
                Change::PutPacket(session, packet) => {
                    let key = packet_key(*session, packet.key());
                    batch.insert(&self.packets, key, encode_packet(packet));
                }
                Change::RemovePacket(session, key) => {
                    batch.remove(&self.packets, packet_key(*session, *key));
                }
                Change::PutWill(will) => {
                    batch.insert(&self.wills, will.session.to_be_bytes(), encode_will(will));
                }
                Change::RemoveWill(session) => batch.remove(&self.wills, session.to_be_bytes()),
            }
        }
        batch.commit()
    }

    /// Puts what was salvaged in a new store.
    fn fill(&self, records: &salvage::Records) -> fjall::Result<()> {
        let spaces = [
            &self.sessions,
            &self.subscriptions,
            &self.queues,
            &self.retained,
            &self.message_ids,
            &self.history,
            &self.packets,
            &self.wills,
        ];
        for (name, space) in SPACES.iter().zip(spaces) {
            let Some(records) = records.get(*name) else {
                continue;
            };
            let mut batch = self.database.batch();
            let mut bytes = 0;
            for (key, value) in records {
                bytes += key.len() + value.len();
                batch.insert(space, key.as_slice(), value.as_slice());
                if bytes >= FILL_BYTES {
                    std::mem::replace(&mut batch, self.database.batch()).commit()?;
                    bytes = 0;
                }
            }
            batch.commit()?;
        }
        self.database.persist(PersistMode::SyncAll)
    }

    /// Removes message ids.
    fn forget(&self, keys: &[Vec<u8>]) -> fjall::Result<()> {
        let mut batch = self.database.batch();
        for key in keys {
            batch.remove(&self.message_ids, key.as_slice());
        }
        batch.commit()
    }
}

impl Engine for DiskEngine {
    fn load(&mut self) -> Loaded {
        self.tables.as_ref().map(Tables::load).unwrap_or_default()
    }

    fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let tables = self.tables.as_ref();
        let tables = tables.ok_or_else(|| failed("the engine is not open"))?;
        guarded(|| {
            tables
                .write(changes)
                .map_err(|error| failed(explain(&error)))
        })
    }

    /// After an error the engine takes nothing more, so it is opened anew. That also cuts off what
    /// it had half written.
    fn reopen(&mut self) -> Result<(), StoreError> {
        // The files are free only when the engine is gone.
        if let Some(tables) = self.tables.take() {
            guarded(|| {
                drop(tables);
                Ok(())
            })?;
        }
        let tables =
            guarded(|| Tables::open(&self.folder).map_err(|error| failed(explain(&error))))?;
        self.tables = Some(tables);
        Ok(())
    }
}

impl Tables {
    fn load(&self) -> Loaded {
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
        let clock = SystemTime::now();
        let mut past = Vec::new();
        scan(
            &self.message_ids,
            "message id",
            &mut left_out,
            |key, value| {
                let id = decode_message_id(value).map_err(|error| error.to_string())?;
                if id.until > clock {
                    loaded.message_ids.push(id);
                } else {
                    past.push(key.to_vec());
                }
                Ok(())
            },
        );
        if let Err(error) = guarded(|| self.forget(&past).map_err(failed)) {
            // They are found past again at the next start.
            tracing::warn!(%error, "message ids that are past could not be removed");
        }
        scan(
            &self.history,
            "batch of a topic's history",
            &mut left_out,
            |key, value| {
                let (tenant, sequence) = split_history_key(key).ok_or("its key is damaged")?;
                let (published, messages) =
                    decode_history(value).map_err(|error| error.to_string())?;
                let key = HistoryKey {
                    tenant: tenant.into(),
                    topic: messages.topic.as_str().into(),
                    sequence,
                };
                loaded.history.push((key, published, messages));
                Ok(())
            },
        );
        scan(&self.packets, "packet id", &mut left_out, |key, value| {
            let packet = decode_packet(key, value).map_err(|error| error.to_string())?;
            loaded.packets.push(packet);
            Ok(())
        });
        scan(&self.wills, "will", &mut left_out, |_, value| {
            let will = decode_will(value).map_err(|error| error.to_string())?;
            loaded.wills.push(will);
            Ok(())
        });
        // Past damage the scan goes backwards.
        loaded.history.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        loaded.sessions = sessions.into_values().collect();
        loaded.left_out = left_out;
        loaded
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
        .unwrap_or_else(|_| Err(failed("the engine panicked")))
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
    bounded([tenant.as_bytes(), &[0], topic.as_bytes()].concat())
}

/// Only the id can hold a zero byte.
fn message_id_key(tenant: &str, publisher: &str, id: &[u8]) -> Vec<u8> {
    bounded([tenant.as_bytes(), &[0], publisher.as_bytes(), &[0], id].concat())
}

/// Bytes that sort as the keys do, but for topics that are too long to be keys. Neither tenant nor
/// topic can hold a zero byte.
fn history_key(key: &HistoryKey) -> Vec<u8> {
    let mut bytes = bounded([key.tenant.as_bytes(), &[0], key.topic.as_bytes()].concat());
    bytes.push(0);
    bytes.extend_from_slice(&key.sequence.to_be_bytes());
    bytes
}

/// The tenant and the sequence of a key; the topic is in the record.
fn split_history_key(key: &[u8]) -> Option<(&str, u64)> {
    let (rest, sequence) = key.split_last_chunk()?;
    let tenant = rest.split(|&byte| byte == 0).next()?;
    Some((
        std::str::from_utf8(tenant).ok()?,
        u64::from_be_bytes(*sequence),
    ))
}

/// A key that the engine takes. Of one that is too long, a hash stands for the end: the record
/// holds all of it, and no two that a peer would use have the same.
fn bounded(mut key: Vec<u8>) -> Vec<u8> {
    if key.len() > KEY_BYTES {
        let hash = key[KEY_BYTES..].iter().fold(
            0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128,
            |hash, &byte| {
                (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
            },
        );
        key.truncate(KEY_BYTES);
        key.extend_from_slice(&hash.to_be_bytes());
    }
    key
}
