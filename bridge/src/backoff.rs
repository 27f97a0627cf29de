//! How long to wait before the next attempt to reach a remote.

use std::time::{Duration, Instant};

/// Full jitter under a ceiling that doubles, and falls back only after a connection that lasted.
///
/// A remote that accepts connections and drops them at once would otherwise reset the back-off each
/// time and be hammered.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    ceiling: Duration,
    connected_at: Option<Instant>,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        let max = max.max(min);
        Self {
            min,
            max,
            ceiling: min,
            connected_at: None,
        }
    }

    pub(crate) fn connected(&mut self, now: Instant) {
        self.connected_at = Some(now);
    }

    /// The delay after a failed attempt or a lost connection; `fraction` is random, 0 to 1.
    pub(crate) fn next(&mut self, now: Instant, fraction: f64) -> Duration {
        let stable = self
            .connected_at
            .take()
            .is_some_and(|since| now.saturating_duration_since(since) >= self.ceiling);
        if stable {
            self.ceiling = self.min;
        }
        let delay = self.ceiling.mul_f64(fraction.clamp(0.0, 1.0));
        self.ceiling = self.ceiling.saturating_mul(2).min(self.max);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(1);

    #[test]
    fn the_ceiling_doubles_up_to_the_maximum_and_the_delay_is_a_part_of_it() {
        let mut backoff = Backoff::new(MIN, MAX);
        let now = Instant::now();
        let delays: Vec<u128> = (0..6).map(|_| backoff.next(now, 1.0).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.next(now, 0.0), Duration::ZERO);
        assert_eq!(backoff.next(now, 0.5), MAX / 2);
    }

    #[test]
    fn only_a_connection_that_lasted_resets_it() {
        let mut backoff = Backoff::new(MIN, MAX);
        let start = Instant::now();
        for _ in 0..5 {
            backoff.next(start, 1.0);
        }
        backoff.connected(start);
        assert_eq!(backoff.next(start + MAX / 2, 1.0), MAX);
        backoff.connected(start);
        assert_eq!(backoff.next(start + MAX, 1.0), MIN);
    }
}
