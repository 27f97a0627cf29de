//! How much backlog may be sent: a rate that rises while the runtime is prompt and falls when it is not.

use std::time::{Duration, Instant};

/// Lag up to which the rate rises, and above which it falls.
pub(super) const PROMPT: Duration = Duration::from_micros(400);

/// Measurements whose median is compared with [`PROMPT`]. Whatever else runs on the machine makes one or
/// the other late; what the backlogs do to the runtime, most of them.
const WINDOW: usize = 9;

/// Bytes a second at the start and after a pause: more than one lane can take, so that a single
/// subscriber waits for nothing.
pub(super) const START: f64 = 128.0 * MIB;

/// The lowest rate, so that everyone is served in the end whatever else the broker and its machine do:
/// some tenth of what one processor can send.
pub(super) const FLOOR: f64 = 16.0 * MIB;

/// The highest rate.
pub(super) const CEILING: f64 = 1024.0 * MIB;

/// By how much the rate rises in a second of prompt answers.
const RISE: f64 = 32.0 * MIB;

/// What is left of the rate after a late answer.
const FALL: f64 = 0.5;

/// Turns that nobody took add up to so much time.
const BURST: f64 = 0.004;

/// After a pause this long the rate is what it was at the start.
const PAUSE: Duration = Duration::from_secs(1);

/// Bytes of one turn: a millisecond of the rate, within these bounds. The largest costs the processor
/// about as long as a wake-up of whatever is live may be late.
pub(super) const GRANT: (usize, usize) = (16 * 1024, 32 * 1024);

const MIB: f64 = 1024.0 * 1024.0;

/// The rate of backlog, a leaky bucket at that rate, and what moves it. Additive increase and
/// multiplicative decrease, as congestion control does it and for the same reason: nobody tells how
/// much is too much, one can only notice.
#[derive(Debug)]
pub(super) struct Control {
    rate: f64,
    /// Bytes that may be granted now; below zero after a grant that was larger.
    bucket: f64,
    /// When the bucket was filled last.
    filled: Option<Instant>,
    /// What was measured since the rate was changed last.
    lags: Vec<Duration>,
    /// When the rate was changed last.
    changed: Option<Instant>,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            rate: START,
            bucket: START * BURST,
            filled: None,
            lags: Vec::new(),
            changed: None,
        }
    }
}

impl Control {
    /// Bytes of one turn, if there may be one now.
    pub(super) fn take(&mut self, now: Instant) -> Option<usize> {
        self.fill(now);
        if self.bucket <= 0.0 {
            return None;
        }
        let grant = ((self.rate * 0.001) as usize).clamp(GRANT.0, GRANT.1);
        self.bucket -= grant as f64;
        Some(grant)
    }

    /// Takes back what was granted and not used.
    pub(super) fn give_back(&mut self, bytes: usize) {
        self.bucket = (self.bucket + bytes as f64).min(self.rate * BURST);
    }

    /// Takes note of how long the runtime took to get to a task that was ready.
    pub(super) fn observe(&mut self, lag: Duration, now: Instant) {
        self.fill(now);
        self.lags.push(lag);
        if self.lags.len() < WINDOW {
            return;
        }
        let since = self
            .changed
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.changed = Some(now);
        self.lags.sort_unstable();
        let median = self.lags[WINDOW / 2];
        self.lags.clear();
        self.rate = if median <= PROMPT {
            (self.rate + RISE * since.as_secs_f64()).min(CEILING)
        } else {
            (self.rate * FALL).max(FLOOR)
        };
        self.bucket = self.bucket.min(self.rate * BURST);
    }

    /// As if so many bytes had just been granted.
    #[cfg(test)]
    pub(super) fn charge(&mut self, bytes: usize, now: Instant) {
        self.fill(now);
        self.bucket -= bytes as f64;
    }

    /// Bytes a second.
    #[cfg(test)]
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    fn fill(&mut self, now: Instant) {
        let passed = self
            .filled
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.filled = Some(self.filled.map_or(now, |last| last.max(now)));
        if passed >= PAUSE {
            *self = Self {
                filled: self.filled,
                ..Self::default()
            };
            return;
        }
        let most = self.rate * BURST;
        self.bucket = (self.bucket + self.rate * passed.as_secs_f64()).min(most);
    }
}
