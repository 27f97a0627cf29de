//! The floor: an append-only file that is only ever replayed, never compacted.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Engine;
use crate::workload::{Commit, Holding};

const APPENDED: u8 = 0;
const ACKNOWLEDGED: u8 = 1;

pub(super) struct Log {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
}

impl Log {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("queues.log");
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self {
            path,
            file,
            buffer: Vec::new(),
        })
    }
}

impl Engine for Log {
    fn commit(&mut self, commit: &Commit) -> Result<()> {
        self.buffer.clear();
        for (key, value) in &commit.appended {
            self.buffer.push(APPENDED);
            self.buffer.extend_from_slice(key);
            self.buffer
                .extend_from_slice(&u32::try_from(value.len())?.to_be_bytes());
            self.buffer.extend_from_slice(value);
        }
        for acknowledged in &commit.acknowledged {
            let (from, to) = acknowledged.bounds();
            self.buffer.push(ACKNOWLEDGED);
            self.buffer.extend_from_slice(&from);
            self.buffer.extend_from_slice(&to);
        }
        self.file.write_all(&self.buffer)?;
        Ok(self.file.sync_data()?)
    }

    fn scan(&self) -> Result<Holding> {
        let log = fs::read(&self.path)?;
        let mut rest = log.as_slice();
        let mut entries: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
        while let Some(tag) = rest.split_off_first() {
            let key = take(&mut rest, 17)?;
            if *tag == APPENDED {
                let length = take(&mut rest, 4)?;
                let length = u32::from_be_bytes(length.try_into().expect("four bytes were taken"));
                entries.insert(key, take(&mut rest, length as usize)?);
            } else {
                let to = take(&mut rest, 17)?;
                let gone: Vec<&[u8]> = entries.range(key..to).map(|(key, _)| *key).collect();
                for key in gone {
                    entries.remove(key);
                }
            }
        }
        let mut holding = Holding::default();
        for (key, value) in entries {
            holding.add(key, value);
        }
        Ok(holding)
    }
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8]> {
    rest.split_off(..length)
        .context("the log ends inside a record")
}
