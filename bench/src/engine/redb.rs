//! redb: a copy-on-write B-tree in one file.

use std::path::Path;

use anyhow::Result;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use super::Engine;
use crate::workload::{Commit, Holding};

const QUEUES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("queues");
const CACHE: usize = 64 << 20;

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Options {
    pub(super) quick_repair: bool,
    pub(super) check_on_open: bool,
}

pub(super) struct Redb {
    database: Database,
    options: Options,
}

impl Redb {
    pub(super) fn open(directory: &Path, options: Options) -> Result<Self> {
        let database = Database::builder()
            .set_cache_size(CACHE)
            .set_check_integrity_on_open(options.check_on_open)
            .create(directory.join("queues.redb"))?;
        Ok(Self { database, options })
    }
}

impl Engine for Redb {
    fn commit(&mut self, commit: &Commit) -> Result<()> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(self.options.quick_repair);
        let mut queues = transaction.open_table(QUEUES)?;
        for (key, value) in &commit.appended {
            queues.insert(key.as_slice(), value.as_slice())?;
        }
        for acknowledged in &commit.acknowledged {
            let (from, to) = acknowledged.bounds();
            queues.retain_in::<&[u8], _>(from.as_slice()..to.as_slice(), |_, _| false)?;
        }
        drop(queues);
        Ok(transaction.commit()?)
    }

    fn scan(&self) -> Result<Holding> {
        let mut holding = Holding::default();
        let queues = match self.database.begin_read()?.open_table(QUEUES) {
            Ok(queues) => queues,
            Err(TableError::TableDoesNotExist(_)) => return Ok(holding),
            Err(error) => return Err(error.into()),
        };
        for entry in queues.iter()? {
            let (key, value) = entry?;
            holding.add(key.value(), value.value());
        }
        Ok(holding)
    }
}
