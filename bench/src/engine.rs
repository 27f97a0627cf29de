//! The contenders behind one trait: fjall, redb, and a plain log as the floor.

mod fjall;
mod log;
mod redb;

use std::fmt;
use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use crate::workload::{Commit, Holding};

/// A store that can be measured.
pub trait Engine {
    /// Writes a group commit. It has survived a power failure once this returns.
    fn commit(&mut self, commit: &Commit) -> Result<()>;

    /// Reads every entry.
    fn scan(&self) -> Result<Holding>;
}

/// Which store, and how it is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// One append-only file and nothing else, without checksums: what the disk can do.
    Log,
    /// fjall with `PersistMode::SyncData` on each batch.
    Fjall,
    /// redb with `Durability::Immediate`, as it comes.
    Redb,
    /// redb with quick repair: dearer commits, no full scan after a crash.
    RedbQuick,
    /// redb that checks the whole file whenever it is opened.
    RedbChecked,
}

impl Contender {
    /// Opens the store in this directory, or makes it.
    pub fn open(self, directory: &Path) -> Result<Box<dyn Engine>> {
        Ok(match self {
            Self::Log => Box::new(log::Log::open(directory)?),
            Self::Fjall => Box::new(fjall::Fjall::open(directory)?),
            Self::Redb => Box::new(redb::Redb::open(directory, redb::Options::default())?),
            Self::RedbQuick => Box::new(redb::Redb::open(
                directory,
                redb::Options {
                    quick_repair: true,
                    ..redb::Options::default()
                },
            )?),
            Self::RedbChecked => Box::new(redb::Redb::open(
                directory,
                redb::Options {
                    check_on_open: true,
                    ..redb::Options::default()
                },
            )?),
        })
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Log => "log",
            Self::Fjall => "fjall",
            Self::Redb => "redb",
            Self::RedbQuick => "redb-quick",
            Self::RedbChecked => "redb-checked",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Workload;

    #[test]
    fn every_contender_holds_after_a_restart_what_was_not_acknowledged() {
        let workload = Workload::new(64, 32);
        for contender in Contender::value_variants() {
            let directory = tempfile::tempdir().unwrap();
            let mut engine = contender.open(directory.path()).unwrap();
            for commit in &workload.commits {
                engine.commit(commit).unwrap();
            }
            assert_eq!(engine.scan().unwrap(), workload.left, "{contender}, open");
            drop(engine);
            let engine = contender.open(directory.path()).unwrap();
            assert_eq!(engine.scan().unwrap(), workload.left, "{contender}, again");
        }
    }
}
