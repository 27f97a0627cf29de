//! The ledger as publishers, readers and the conductor share it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::ledger::{Counts, Ledger};

/// A handle to the ledger, and news of it. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Book(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ledger: Mutex<Ledger>,
    counts: watch::Sender<Counts>,
}

impl Book {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            ledger: Mutex::default(),
            counts: watch::Sender::default(),
        }))
    }

    /// Reads something.
    pub(crate) fn read<T>(&self, work: impl FnOnce(&Ledger) -> T) -> T {
        work(&self.0.ledger.lock().expect("no panic while it is held"))
    }

    /// Enters something, which is news.
    pub(crate) fn enter<T>(&self, work: impl FnOnce(&mut Ledger) -> T) -> T {
        let mut ledger = self.0.ledger.lock().expect("no panic while it is held");
        let result = work(&mut ledger);
        // Sent under the lock, so that the last counts sent are the latest.
        self.0.counts.send_replace(ledger.counts());
        result
    }

    /// What has happened so far.
    pub(crate) fn counts(&self) -> Counts {
        self.read(Ledger::counts)
    }

    /// Waits until `done`. `false` if nothing at all happened for as long as `patience`.
    pub(crate) async fn until(&self, patience: Duration, done: impl Fn(&Self) -> bool) -> bool {
        let mut news = self.0.counts.subscribe();
        loop {
            news.mark_unchanged();
            if done(self) {
                return true;
            }
            // The sender lives as long as `self`.
            if tokio::time::timeout(patience, news.changed())
                .await
                .is_err()
            {
                return false;
            }
        }
    }
}
