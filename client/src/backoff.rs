//! When to try again: full jitter under a ceiling that doubles.

use std::time::{Duration, Instant};

use crate::options::Reconnect;

/// Delays between attempts to reconnect: full jitter under a ceiling that doubles, and falls back
/// only after a connection that lasted. Opens no socket and reads no clock; for applications that keep
/// other connections besides, as the bridge does.
#[derive(Debug)]
pub struct Backoff {
    bounds: Reconnect,
    ceiling: Duration,
    up_since: Option<Instant>,
}

impl Backoff {
    /// A back-off that has seen no attempt yet.
    pub fn new(bounds: Reconnect) -> Self {
        let mut backoff = Self {
            bounds,
            ceiling: bounds.min,
            up_since: None,
        };
        backoff.advise(bounds);
        backoff
    }

    /// Takes over the broker's bounds. Bounds of zero are not accepted: they would make a loop
    /// without any pause.
    pub fn advise(&mut self, bounds: Reconnect) {
        let min = bounds.min.max(Duration::from_millis(1));
        let max = bounds.max.max(min);
        self.bounds = Reconnect { min, max };
        self.ceiling = self.ceiling.clamp(min, max);
    }

    /// The delay before the next attempt; `unit` is random, from 0 to 1.
    pub fn delay(&mut self, unit: f64) -> Duration {
        let delay = self.ceiling.mul_f64(unit.clamp(0.0, 1.0));
        self.ceiling = self.ceiling.saturating_mul(2).min(self.bounds.max);
        delay
    }

    /// A connection is up.
    pub fn connected(&mut self, now: Instant) {
        self.up_since = Some(now);
    }

    /// The connection is lost. Only one that lasted as long as the ceiling starts the back-off
    /// anew: a broker that accepts and drops its clients is not to be stormed.
    pub fn lost(&mut self, now: Instant) {
        let Some(since) = self.up_since.take() else {
            return;
        };
        if now.saturating_duration_since(since) >= self.ceiling {
            self.ceiling = self.bounds.min;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bounds(min: u64, max: u64) -> Reconnect {
        Reconnect {
            min: Duration::from_millis(min),
            max: Duration::from_millis(max),
        }
    }

    #[test]
    fn the_ceiling_doubles_up_to_the_maximum() {
        let mut backoff = Backoff::new(bounds(100, 500));
        let delays: Vec<_> = (0..5).map(|_| backoff.delay(1.0).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 500, 500]);
    }

    #[test]
    fn only_a_stable_connection_starts_anew() {
        let start = Instant::now();
        let mut backoff = Backoff::new(bounds(100, 10_000));
        backoff.delay(1.0);
        backoff.delay(1.0);
        backoff.connected(start);
        backoff.lost(start + Duration::from_millis(399));
        assert_eq!(backoff.delay(1.0), Duration::from_millis(400));
        backoff.connected(start);
        backoff.lost(start + Duration::from_millis(800));
        assert_eq!(backoff.delay(1.0), Duration::from_millis(100));
    }

    #[test]
    fn useless_advice_is_made_useful() {
        let mut backoff = Backoff::new(bounds(100, 10_000));
        backoff.advise(bounds(0, 0));
        assert_eq!(backoff.delay(1.0), Duration::from_millis(1));
        backoff.advise(bounds(2_000, 1));
        assert_eq!(backoff.delay(1.0), Duration::from_millis(2_000));
    }

    proptest! {
        #[test]
        fn a_delay_never_passes_its_ceiling(
            min in 0u64..1_000,
            max in 0u64..100_000,
            units in proptest::collection::vec(0.0f64..=1.0, 1..40),
        ) {
            let mut backoff = Backoff::new(bounds(min, max));
            let mut ceiling = min.max(1);
            let top = max.max(ceiling);
            for unit in units {
                let delay = backoff.delay(unit);
                prop_assert!(delay <= Duration::from_millis(ceiling));
                ceiling = (ceiling * 2).min(top);
            }
        }
    }
}
