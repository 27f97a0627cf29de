//! When a request that may be made twice is given to a second worker, because the first does not answer. Pure.

use std::time::Duration;

#[cfg(test)]
mod tests;

/// Time after which something must have come back from a worker that is reachable: QUIC acknowledges what
/// it gets within some tens of milliseconds and a round trip.
const SILENCE: Duration = Duration::from_millis(400);

/// A worker gets this long at least, whatever is expected of it.
const LEAST: Duration = Duration::from_millis(250);

/// What is known of a request that a worker was given and has not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// Time since it was given.
    pub elapsed: Duration,
    /// Whether anything at all has come from the worker's host since then, if only an acknowledgement.
    pub heard: bool,
    /// Round trip to the worker, as measured before.
    pub rtt: Duration,
    /// When it was chosen, the answer was expected to take this long.
    pub estimate: Duration,
}

/// Why a second worker is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The first cannot be reached.
    Silent,
    /// The first takes three times as long as was expected.
    Late,
}

/// Whether a second worker is to be asked now.
pub fn is_due(watch: &Watch) -> Option<Why> {
    if !watch.heard && watch.elapsed >= SILENCE.max(watch.rtt.saturating_mul(3)) {
        return Some(Why::Silent);
    }
    let late = watch.elapsed >= LEAST.max(watch.estimate.saturating_mul(3));
    // Of one that was not heard the word is the other, and comes soon.
    (late && watch.heard).then_some(Why::Late)
}
