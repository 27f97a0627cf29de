//! Paces what is delivered from a backlog (retained messages, history), so that live traffic never waits
//! for it.
//!
//! Lanes ask for a turn before each piece of a backlog. Turns are granted in the order in which they are
//! asked for, one after the other, as fast as a rate allows. How fast that is follows from how long the runtime takes to
//! get to a task that is ready, since whatever is live waits as long: see `pacer/control.rs`. The probe that
//! measures it runs only while somebody is owed something.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::control::Control;

mod control;
#[cfg(test)]
mod tests;

/// How often the lag is measured and turns are granted to those who wait.
const TICK: Duration = Duration::from_millis(2);

/// By how much a timer that has not been held up may be late: its resolution.
const RESOLUTION: Duration = Duration::from_millis(1);

/// How long nobody asks before the probe ends.
const IDLE: Duration = Duration::from_millis(100);

/// Grants bytes of backlog to the lanes that ask. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Pacer(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    control: Control,
    /// Who waits, first come first: at most once for each [`Turn`], so bounded by the number of
    /// lanes. Those that are gone are skipped.
    waiting: VecDeque<Weak<Place>>,
    /// A turn is granted and not over. There is one at a time: several that begin together would be felt
    /// by whatever is live, and all that is ready between two goes first.
    busy: bool,
    probing: bool,
    asked: Option<Instant>,
}

/// A lane's turns.
#[derive(Debug)]
pub struct Turn {
    pacer: Pacer,
    place: Arc<Place>,
    waits: bool,
    /// A turn was taken up and is not over.
    works: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.done();
    }
}

#[derive(Debug)]
struct Place {
    /// Granted and not yet taken up.
    granted: AtomicUsize,
    wake: Notify,
    pacer: Weak<Inner>,
}

impl Pacer {
    /// The turns of one lane.
    pub fn turn(&self) -> Turn {
        Turn {
            pacer: self.clone(),
            place: Arc::new(Place {
                granted: AtomicUsize::new(0),
                wake: Notify::new(),
                pacer: Arc::downgrade(&self.0),
            }),
            waits: false,
            works: false,
        }
    }

    /// Grants a turn at once, or puts the lane in the queue.
    fn ask(&self, place: &Arc<Place>) -> Option<usize> {
        let now = Instant::now();
        let mut state = self.0.state.lock();
        state.asked = Some(now);
        let first = state.waiting.is_empty();
        let granted = first.then(|| state.take(now)).flatten();
        if granted.is_none() {
            state.waiting.push_back(Arc::downgrade(place));
        }
        let begins = !std::mem::replace(&mut state.probing, true);
        drop(state);
        if begins {
            // Ends by itself, soon after the last lane that asks.
            tokio::spawn(probe(Arc::clone(&self.0)));
        }
        granted
    }
}

impl State {
    /// Begins a turn, if one may begin.
    fn take(&mut self, now: Instant) -> Option<usize> {
        if self.busy {
            return None;
        }
        let bytes = self.control.take(now.into_std())?;
        self.busy = true;
        Some(bytes)
    }
}

impl Turn {
    /// Says that the turn is used, so that another lane may have one.
    pub fn done(&mut self) {
        if std::mem::take(&mut self.works) {
            self.pacer.0.end();
        }
    }

    /// Waits for the next turn, and ends the one before; the answer is how many bytes of backlog may be sent in it. A wait that
    /// is given up keeps its place for the next call.
    pub async fn granted(&mut self) -> usize {
        self.done();
        if !self.waits {
            self.waits = true;
            if let Some(bytes) = self.pacer.ask(&self.place) {
                self.place.granted.store(bytes, Ordering::Release);
            }
            // What became ready meanwhile goes first.
            tokio::task::yield_now().await;
        }
        loop {
            let granted = self.place.granted.swap(0, Ordering::AcqRel);
            if granted > 0 {
                self.waits = false;
                self.works = true;
                return granted;
            }
            self.place.wake.notified().await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let granted = *self.granted.get_mut();
        if granted > 0
            && let Some(pacer) = self.pacer.upgrade()
        {
            pacer.state.lock().control.give_back(granted);
            pacer.end();
        }
    }
}

impl Inner {
    /// Takes note of a lag and grants what may be granted now. `false` when nobody asks any more.
    fn tick(&self, lag: Duration) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.control.observe(lag, now.into_std());
        // A lane that does not use its turn, as it waits for its receiver, holds nobody else up.
        state.busy = false;
        let gone = state.grant(now);
        let idle = state.waiting.is_empty()
            && state
                .asked
                .is_none_or(|asked| now.duration_since(asked) > IDLE);
        if idle {
            state.probing = false;
        }
        drop(state);
        // The last hold on a place gives back what was granted to it, which takes the lock.
        drop(gone);
        !idle
    }

    /// Takes note that a turn is over, and grants what may be granted now.
    fn end(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.busy = false;
        let gone = state.grant(now);
        drop(state);
        drop(gone);
    }
}

impl State {
    /// Grants turns to those who wait. The answer must be dropped without the lock.
    fn grant(&mut self, now: Instant) -> Vec<Arc<Place>> {
        let mut gone = Vec::new();
        while let Some(place) = self.waiting.front() {
            let Some(place) = place.upgrade() else {
                self.waiting.pop_front();
                continue;
            };
            let Some(bytes) = self.take(now) else {
                gone.push(place);
                break;
            };
            self.waiting.pop_front();
            place.granted.store(bytes, Ordering::Release);
            place.wake.notify_one();
            gone.push(place);
        }
        gone
    }
}

/// Measures how late the runtime gets to what is ready: a timer, and then a task behind all others.
async fn probe(inner: Arc<Inner>) {
    loop {
        let asleep = Instant::now();
        tokio::time::sleep(TICK).await;
        let awake = Instant::now();
        tokio::task::yield_now().await;
        let late = (awake - asleep).saturating_sub(TICK + RESOLUTION);
        if !inner.tick(late + awake.elapsed()) {
            return;
        }
    }
}
