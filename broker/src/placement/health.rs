//! Whether a worker is trusted with requests: a circuit breaker that probes, and the ejection of those
//! that fail more than they answer. Pure.

use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// Failures in a row that open the circuit.
const IN_A_ROW: u32 = 5;

/// Outcomes among which a share of failures means something.
const ENOUGH: u32 = 20;

/// Outcomes after which all are counted half, so that old ones fade.
const REMEMBERED: u32 = 64;

/// First time without requests. It doubles with every probe that fails.
const PAUSE: Duration = Duration::from_secs(1);

/// Longest time without requests.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What a worker may be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Anything.
    Well,
    /// One request, to see how it does.
    Probe,
    /// Nothing for now.
    Ejected,
}

/// What is remembered of one worker's outcomes for one model.
#[derive(Debug, Clone, Default)]
pub struct Health {
    circuit: Circuit,
    failed_in_a_row: u32,
    failures: u32,
    outcomes: u32,
}

#[derive(Debug, Clone, Copy, Default)]
enum Circuit {
    #[default]
    Closed,
    /// Nothing is sent until then, and then a probe.
    Open { until: Instant, pause: Duration },
    /// A probe is out. One that is not heard of again must not keep a worker out for ever, so another may
    /// follow after the pause.
    HalfOpen { since: Instant, pause: Duration },
}

impl Health {
    /// What the worker may be given at this time.
    pub fn standing(&self, now: Instant) -> Standing {
        match self.circuit {
            Circuit::Closed => Standing::Well,
            Circuit::Open { until, .. } if now >= until => Standing::Probe,
            Circuit::HalfOpen { since, pause } if now >= since + pause => Standing::Probe,
            Circuit::Open { .. } | Circuit::HalfOpen { .. } => Standing::Ejected,
        }
    }

    /// Takes note that a request is sent. False when it was to be a probe and another is out.
    pub fn begin(&mut self, now: Instant) -> bool {
        match (self.standing(now), self.circuit) {
            (Standing::Probe, Circuit::Open { pause, .. } | Circuit::HalfOpen { pause, .. }) => {
                self.circuit = Circuit::HalfOpen { since: now, pause };
                true
            }
            (standing, _) => standing == Standing::Well,
        }
    }

    /// A request was answered. Closes the circuit.
    pub fn succeed(&mut self) {
        if !matches!(self.circuit, Circuit::Closed) {
            *self = Self::default();
        }
        self.failed_in_a_row = 0;
        self.count(0);
    }

    /// A request failed for a reason that is the worker's. True when this ejects it.
    pub fn fail(&mut self, now: Instant) -> bool {
        self.failed_in_a_row = self.failed_in_a_row.saturating_add(1);
        self.count(1);
        let pause = match self.circuit {
            Circuit::Closed => {
                let too_many = self.outcomes >= ENOUGH && self.failures * 2 > self.outcomes;
                if self.failed_in_a_row < IN_A_ROW && !too_many {
                    return false;
                }
                PAUSE
            }
            // Requests that were out before fail later: they say nothing new.
            Circuit::Open { .. } => return false,
            Circuit::HalfOpen { pause, .. } => (pause * 2).min(LONGEST_PAUSE),
        };
        self.circuit = Circuit::Open {
            until: now + pause,
            pause,
        };
        true
    }

    fn count(&mut self, failures: u32) {
        if self.outcomes >= REMEMBERED {
            self.outcomes /= 2;
            self.failures /= 2;
        }
        self.outcomes += 1;
        self.failures += failures;
    }
}
