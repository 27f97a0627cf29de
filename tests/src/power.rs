//! A disk that can lose power: a file system that keeps in memory what was not fsynced, and forgets
//! or tears it when the power goes.

mod disk;
mod layer;
mod unsynced;

pub use disk::FragileDisk;
pub use unsynced::{Loss, Unsynced, Write};

/// Whether the disk does what fsync asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fsync {
    /// What was fsynced survives.
    #[default]
    Honest,
    /// It says so and does nothing, as some drives do. To see that a check can fail.
    Lying,
}
