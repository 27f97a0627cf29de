//! The closed loop: how far a publisher may be ahead of the slowest of its subscribers.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Epochs that may be on their way at once.
const DEPTH: u64 = 4;
/// Places for counts: more than epochs on their way, so that none is used twice.
const PLACES: usize = 8;

/// What one publisher and its subscribers share. Messages are counted in epochs, so that it costs
/// a subscriber one atomic addition for many messages, and the publisher one wake-up.
#[derive(Debug)]
pub(super) struct Window {
    /// Messages of an epoch.
    epoch: u64,
    subscribers: u64,
    /// Subscribers that have all of an epoch.
    done: [AtomicU64; PLACES],
    /// Epochs that all subscribers have.
    completed: AtomicU64,
    moved: Notify,
}

impl Window {
    /// At most `messages` ahead of the slowest subscriber, and at least four.
    pub(super) fn new(messages: usize, subscribers: usize) -> Self {
        Self {
            epoch: (messages as u64 / DEPTH).max(1),
            subscribers: subscribers as u64,
            done: Default::default(),
            completed: AtomicU64::new(0),
            moved: Notify::new(),
        }
    }

    /// Messages that may be on their way at once.
    pub(super) fn messages(&self) -> u64 {
        self.epoch * DEPTH
    }

    /// How many more a publisher may send that has sent this many.
    pub(super) fn allowance(&self, sent: u64) -> u64 {
        let completed = self.completed.load(Ordering::Acquire);
        ((completed + DEPTH) * self.epoch).saturating_sub(sent)
    }

    /// Waits until the allowance may be larger.
    pub(super) async fn moved(&self) {
        self.moved.notified().await;
    }

    /// Wakes the publisher, as it has something else to look at.
    pub(super) fn wake(&self) {
        self.moved.notify_one();
    }

    /// One subscriber had `before` messages and now has `after`.
    pub(super) fn received(&self, before: u64, after: u64) {
        for epoch in before / self.epoch..after / self.epoch {
            let done = &self.done[epoch as usize % PLACES];
            // The last one may use the place again: the publisher cannot be there before it is told.
            if done.fetch_add(1, Ordering::AcqRel) + 1 == self.subscribers {
                done.store(0, Ordering::Relaxed);
                self.completed.store(epoch + 1, Ordering::Release);
                self.moved.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_subscriber_decides() {
        let window = Window::new(40, 2);
        assert_eq!(window.messages(), 40);
        assert_eq!(window.allowance(0), 40);
        assert_eq!(window.allowance(40), 0);
        window.received(0, 40);
        assert_eq!(window.allowance(40), 0);
        window.received(0, 9);
        assert_eq!(window.allowance(40), 0);
        window.received(9, 25);
        assert_eq!(window.allowance(40), 20);
        window.received(25, 40);
        assert_eq!(window.allowance(40), 40);
    }

    #[test]
    fn places_are_used_again() {
        let window = Window::new(4, 3);
        for sent in 0..100 {
            assert_eq!(window.allowance(sent), 4);
            for _ in 0..3 {
                window.received(sent, sent + 1);
            }
        }
    }
}
