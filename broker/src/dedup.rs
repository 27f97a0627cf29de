//! The deduplication window: message ids that a publisher has used, so that the same message is
//! taken once.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;
use selvedge_certs::Identity;

use crate::store::{Change, Store};

/// Longest message id, in bytes.
pub const MAX_MESSAGE_ID: usize = 128;

/// The window of one tenant: bounded in time and in ids. Beyond the bound the oldest ids are
/// forgotten first.
#[derive(Debug)]
pub struct Dedup {
    tenant: Arc<str>,
    span: Duration,
    capacity: usize,
    store: Option<Store>,
    window: Mutex<Window>,
}

type Key = (Identity, Bytes);

#[derive(Debug)]
struct Seen {
    taken: Taken,
    /// It is in the store, too.
    stored: bool,
}

/// What became of the first message with an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Every receiver whose messages are kept got it, so its acknowledgement could claim the disk. That of
    /// a repetition may claim no more than that of the first.
    pub whole: bool,
}

#[derive(Debug, Default)]
struct Window {
    seen: HashMap<Key, Seen>,
    order: VecDeque<(Instant, Key)>,
}

impl Dedup {
    /// An empty window that remembers an id for `span`, and at most `capacity` of them.
    pub fn new(tenant: Arc<str>, span: Duration, capacity: usize, store: Option<Store>) -> Self {
        Self {
            tenant,
            span,
            capacity,
            store,
            window: Mutex::default(),
        }
    }

    /// What became of the message with which the publisher has used this id within the window, if it
    /// has.
    pub fn find(&self, publisher: &Identity, id: &Bytes, now: Instant) -> Option<Taken> {
        let mut window = self.window.lock();
        self.forget_old(&mut window, now);
        let seen = window.seen.get(&(publisher.clone(), id.clone()))?;
        Some(seen.taken)
    }

    /// Calls `take` if this is the first message of the publisher with this id; otherwise the answer is
    /// what became of the first. The id is remembered from then on, in the store too when `keep` says so
    /// and the message is whole: one that is not may be taken again after a crash.
    ///
    /// The id goes to the store after what `take` puts there, since an id that is there alone after a
    /// crash would pass the message, when it is sent again, for one that is kept. And nobody sees the
    /// id before `take` is done: whoever finds it may claim that the message is where it belongs.
    ///
    /// # Errors
    /// Those of `take`; the id is not remembered then.
    pub fn once<E>(
        &self,
        publisher: &Identity,
        id: &Bytes,
        keep: bool,
        now: Instant,
        take: impl FnOnce() -> Result<Taken, E>,
    ) -> Result<Option<Taken>, E> {
        let mut window = self.window.lock();
        self.forget_old(&mut window, now);
        // Not a slice of the message it came with, which would keep that alive.
        let key = (publisher.clone(), Bytes::copy_from_slice(id));
        if let Some(seen) = window.seen.get(&key) {
            return Ok(Some(seen.taken));
        }
        let taken = take()?;
        let store = self.store.as_ref().filter(|_| keep && taken.whole);
        if let Some(store) = store {
            store.put(Change::PutMessageId {
                tenant: Arc::clone(&self.tenant),
                publisher: publisher.uri().into(),
                id: key.1.clone(),
                until: SystemTime::now() + self.span,
            });
        }
        let stored = store.is_some();
        window.seen.insert(key.clone(), Seen { taken, stored });
        window.order.push_back((now, key));
        Ok(None)
    }

    /// Puts back an id that the store kept, `left` being the time it is still remembered. Cheap when
    /// those that are forgotten first come first.
    pub fn restore(&self, publisher: &Identity, id: &Bytes, left: Duration, now: Instant) {
        let mut window = self.window.lock();
        let key = (publisher.clone(), id.clone());
        let since = now
            .checked_sub(self.span.saturating_sub(left))
            .unwrap_or(now);
        if let Entry::Vacant(place) = window.seen.entry(key.clone()) {
            place.insert(Seen {
                taken: Taken { whole: true },
                stored: true,
            });
            let place = window.order.partition_point(|(held, _)| *held <= since);
            window.order.insert(place, (since, key));
        }
    }

    /// Forgets what is too old or too much.
    pub fn sweep(&self, now: Instant) {
        self.forget_old(&mut self.window.lock(), now);
    }

    /// Ids remembered.
    pub fn len(&self) -> usize {
        self.window.lock().seen.len()
    }

    /// Whether no id is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn forget_old(&self, window: &mut Window, now: Instant) {
        while let Some((since, _)) = window.order.front()
            && (now.saturating_duration_since(*since) >= self.span
                || window.order.len() >= self.capacity)
        {
            let Some((_, key)) = window.order.pop_front() else {
                break;
            };
            let stored = window.seen.remove(&key).is_some_and(|seen| seen.stored);
            if let Some(store) = self.store.as_ref().filter(|_| stored) {
                store.put(Change::RemoveMessageId {
                    tenant: Arc::clone(&self.tenant),
                    publisher: key.0.uri().into(),
                    id: key.1,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const WHOLE: Taken = Taken { whole: true };

    fn first(window: &Dedup, publisher: &Identity, id: &Bytes, now: Instant) -> bool {
        window
            .once(publisher, id, true, now, || Ok::<_, ()>(WHOLE))
            .unwrap()
            .is_none()
    }

    fn publisher(name: &str) -> Identity {
        Identity::new("example.org", "acme", "s", name).unwrap()
    }

    #[test]
    fn an_id_counts_once_for_each_publisher_and_only_for_a_while() {
        let span = Duration::from_secs(10);
        let window = Dedup::new("acme".into(), span, 100, None);
        let (now, id) = (Instant::now(), Bytes::from_static(b"1"));
        assert!(first(&window, &publisher("a"), &id, now));
        assert!(!first(&window, &publisher("a"), &id, now + span / 2));
        assert!(first(&window, &publisher("b"), &id, now));
        assert!(first(&window, &publisher("a"), &id, now + span));
    }

    #[test]
    fn the_id_of_a_message_that_was_refused_is_free() {
        let window = Dedup::new("acme".into(), Duration::from_secs(10), 100, None);
        let (now, id) = (Instant::now(), Bytes::from_static(b"1"));
        let refused = window.once(&publisher("a"), &id, true, now, || Err("full"));
        assert_eq!(refused, Err("full"));
        assert!(first(&window, &publisher("a"), &id, now));
    }

    #[test]
    fn a_repetition_learns_what_became_of_the_first() {
        let window = Dedup::new("acme".into(), Duration::from_secs(10), 100, None);
        let (now, id) = (Instant::now(), Bytes::from_static(b"1"));
        let given_up = Taken { whole: false };
        let publisher = publisher("a");
        let take = |taken| move || Ok::<_, ()>(taken);
        let first = window.once(&publisher, &id, true, now, take(given_up));
        assert_eq!(first, Ok(None));
        let again = window.once(&publisher, &id, true, now, take(WHOLE));
        assert_eq!(again, Ok(Some(given_up)));
        assert_eq!(window.find(&publisher, &id, now), Some(given_up));
    }

    #[test]
    fn the_window_is_bounded() {
        let window = Dedup::new("acme".into(), Duration::from_secs(10), 3, None);
        let now = Instant::now();
        for id in 0..10u8 {
            assert!(first(&window, &publisher("a"), &Bytes::from(vec![id]), now));
        }
        assert_eq!(window.len(), 3);
        assert!(!first(&window, &publisher("a"), &Bytes::from(vec![9]), now));
        assert!(first(&window, &publisher("a"), &Bytes::from(vec![0]), now));
    }

    #[test]
    fn a_restored_id_is_remembered_for_the_time_it_had_left() {
        let span = Duration::from_secs(10);
        let window = Dedup::new("acme".into(), span, 100, None);
        let (now, id) = (Instant::now() + span, Bytes::from_static(b"1"));
        window.restore(&publisher("a"), &id, span / 4, now);
        assert!(!first(&window, &publisher("a"), &id, now + span / 5));
        assert!(first(&window, &publisher("a"), &id, now + span / 3));
    }
}
