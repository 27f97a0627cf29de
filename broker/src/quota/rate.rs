//! How often something may be done: so many times a second, with a burst of one second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SECOND: u64 = 1_000_000_000;

/// Highest rate. Intervals are whole nanoseconds, rounded up, so that up to here what is granted is
/// at most one percent less than what was asked for, and never more.
pub(crate) const FASTEST: usize = 10_000_000;

/// When the next one is due, in nanoseconds since a beginning, and how far ahead of that somebody
/// may be.
///
/// Each one that is admitted moves the time at which everything is paid for on by one interval, from
/// now at the least. It may lie ahead by the burst, which is as many intervals as fit one second.
#[derive(Debug)]
pub(super) struct Rate {
    per_second: usize,
    beginning: Instant,
    interval: u64,
    /// Everything so far is paid for from then on.
    paid: AtomicU64,
}

/// What one admission has moved, so that it can be taken back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Admitted {
    before: u64,
    after: u64,
}

impl Rate {
    /// At most `per_second`, from 1 to [`FASTEST`].
    pub(super) fn new(per_second: usize, beginning: Instant) -> Self {
        let per_second = per_second.clamp(1, FASTEST);
        Self {
            per_second,
            beginning,
            interval: SECOND.div_ceil(per_second as u64),
            paid: AtomicU64::new(0),
        }
    }

    pub(super) fn per_second(&self) -> usize {
        self.per_second
    }

    /// Admits one more.
    ///
    /// # Errors
    /// How long to wait, in whole milliseconds: what is sent sooner is refused again.
    pub(super) fn admit(&self, now: Instant) -> Result<Admitted, Duration> {
        let now = self.since_beginning(now);
        let burst = self.interval * self.per_second as u64;
        let mut before = self.paid.load(Ordering::Relaxed);
        loop {
            let after = step(before, now, self.interval, burst)
                .map_err(|nanos| Duration::from_millis(nanos.div_ceil(SECOND / 1000)))?;
            let swapped = self.paid.compare_exchange_weak(
                before,
                after,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => return Ok(Admitted { before, after }),
                Err(found) => before = found,
            }
        }
    }

    /// Takes an admission back, unless there was another one since: it may have counted on this one.
    pub(super) fn take_back(&self, admitted: Admitted) {
        let Admitted { before, after } = admitted;
        let _ = self
            .paid
            .compare_exchange(after, before, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether it is as if nothing had ever been admitted.
    pub(super) fn is_rested(&self, now: Instant) -> bool {
        self.paid.load(Ordering::Relaxed) <= self.since_beginning(now)
    }

    fn since_beginning(&self, now: Instant) -> u64 {
        let nanos = now.saturating_duration_since(self.beginning).as_nanos();
        // 500 years.
        u64::try_from(nanos).unwrap_or(u64::MAX / 2)
    }
}

/// From when on everything is paid for with one more, or how long it has to wait.
pub(super) fn step(paid: u64, now: u64, interval: u64, burst: u64) -> Result<u64, u64> {
    let after = paid.max(now) + interval;
    match after - now {
        ahead if ahead <= burst => Ok(after),
        ahead => Err(ahead - burst),
    }
}
