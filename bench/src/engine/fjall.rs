//! fjall: a log-structured merge tree with a journal.

use std::path::Path;

use anyhow::Result;
use fjall::config::CompressionPolicy;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use super::Engine;
use crate::workload::{Commit, Holding};

/// Small enough that a run flushes and compacts, as a broker does that stays up for long.
const MEMTABLE: u64 = 16 << 20;
const CACHE: u64 = 64 << 20;

pub(super) struct Fjall {
    database: Database,
    queues: Keyspace,
}

impl Fjall {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let database = Database::builder(directory)
            .cache_size(CACHE)
            .worker_threads(1)
            .manual_journal_persist(true)
            .open()?;
        let queues = database.keyspace("queues", || {
            KeyspaceCreateOptions::default()
                .max_memtable_size(MEMTABLE)
                .data_block_compression_policy(CompressionPolicy::disabled())
        })?;
        Ok(Self { database, queues })
    }
}

impl Engine for Fjall {
    fn commit(&mut self, commit: &Commit) -> Result<()> {
        let mut batch = self
            .database
            .batch()
            .durability(Some(PersistMode::SyncData));
        for (key, value) in &commit.appended {
            batch.insert(&self.queues, key.as_slice(), value.as_slice());
        }
        // There is no tombstone for a range.
        for acknowledged in &commit.acknowledged {
            for key in acknowledged.keys() {
                batch.remove(&self.queues, key.as_slice());
            }
        }
        Ok(batch.commit()?)
    }

    fn scan(&self) -> Result<Holding> {
        let mut holding = Holding::default();
        for entry in self.queues.iter() {
            let (key, value) = entry.into_inner()?;
            holding.add(&key, &value);
        }
        Ok(holding)
    }
}
