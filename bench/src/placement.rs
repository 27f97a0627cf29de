//! Ways of choosing a worker, side by side in a simulation: `selvedge bench placement`.
//!
//! Thousands of workers of different speed, some of which become slow, fail at once or die, get the same
//! requests from the same seed under each policy. The fabric's own policy is the code that the broker runs:
//! [`selvedge_broker::placement::place`] and its [`Health`](selvedge_broker::placement::health::Health).

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::ensure;
use hdrhistogram::Histogram;
use serde::Serialize;

use self::simulation::Simulation;

mod simulation;
mod world;

#[cfg(test)]
mod tests;

/// What to simulate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Options {
    /// Workers of the model.
    pub workers: usize,
    /// Requests under each policy.
    pub requests: usize,
    /// Share of what all workers could do that is asked of them while all are well, above 0 and up to 2.
    pub utilisation: f64,
    /// Deadline of every request, in milliseconds.
    pub deadline_ms: u64,
    /// Whether workers become slow, fail and die.
    pub faults: bool,
    /// Decides everything: the same seed gives the same report.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            workers: 2_000,
            requests: 200_000,
            utilisation: 0.7,
            deadline_ms: 500,
            faults: true,
            seed: 1,
        }
    }
}

/// How a worker is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Any.
    Random,
    /// One after the other.
    RoundRobin,
    /// The one with the fewest requests.
    LeastOutstanding,
    /// The fabric's, with credits, early refusal and ejection.
    Fabric,
    /// The same, and requests with the same key go to the same worker while it has room.
    FabricKeyed,
}

/// In the order of the report.
pub const POLICIES: [Policy; 5] = [
    Policy::Random,
    Policy::RoundRobin,
    Policy::LeastOutstanding,
    Policy::Fabric,
    Policy::FabricKeyed,
];

impl Policy {
    /// As it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round robin",
            Self::LeastOutstanding => "least outstanding",
            Self::Fabric => "fabric",
            Self::FabricKeyed => "fabric, by routing key",
        }
    }
}

/// What became of the requests under one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// How workers were chosen.
    pub policy: Policy,
    /// Answered within the deadline.
    pub in_time: usize,
    /// Not answered when the deadline passed.
    pub late: usize,
    /// Given to a worker that failed or died.
    pub failed: usize,
    /// Refused at once or while waiting, since nobody could answer in time or too many waited.
    pub refused: usize,
    /// Half of those answered took at most this, in milliseconds.
    pub p50_ms: f64,
    /// All but one in a hundred.
    pub p99_ms: f64,
    /// All but one in a thousand.
    pub p999_ms: f64,
    /// Requests whose key their worker had had among its last few.
    pub hits: usize,
}

impl Outcome {
    /// Requests that had no answer in time, in percent; a refusal at once counts.
    pub fn missed_percent(&self) -> f64 {
        let missed = self.late + self.failed + self.refused;
        100.0 * missed as f64 / (self.in_time + missed).max(1) as f64
    }
}

/// Every policy's outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What was simulated.
    pub options: Options,
    /// One for each policy.
    pub outcomes: Vec<Outcome>,
}

/// Simulates every policy. `progress` is told when one is done.
///
/// # Errors
/// An option is out of its bounds.
pub fn run(options: &Options, progress: impl Fn(&Outcome)) -> anyhow::Result<Report> {
    ensure!(
        (1..=100_000).contains(&options.workers),
        "{} workers: expected 1 to 100000",
        options.workers
    );
    ensure!(
        (1..=10_000_000).contains(&options.requests),
        "{} requests: expected 1 to 10000000",
        options.requests
    );
    ensure!(
        options.utilisation > 0.0 && options.utilisation <= 2.0,
        "utilisation {}: expected more than 0 and up to 2",
        options.utilisation
    );
    ensure!(
        (1..=3_600_000).contains(&options.deadline_ms),
        "a deadline of {} ms: expected 1 to 3600000",
        options.deadline_ms
    );
    let mut outcomes = Vec::new();
    for policy in POLICIES {
        let outcome = Simulation::new(options, policy).run();
        progress(&outcome);
        outcomes.push(outcome);
    }
    Ok(Report {
        options: *options,
        outcomes,
    })
}

impl Report {
    /// A table in Markdown.
    pub fn table(&self) -> String {
        let Options {
            workers,
            requests,
            utilisation,
            deadline_ms,
            faults,
            seed,
        } = self.options;
        let faults = if faults {
            "5 % become ten times slower, 5 % die, 2 % fail at once"
        } else {
            "no faults"
        };
        let mut text = format!(
            "{workers} workers, {requests} requests, utilisation {utilisation}, deadline {deadline_ms} ms, {faults}; \
             seed {seed}.\n\n\
             | | no answer in time | late | failed | refused early | p50 | p99 | p99.9 | key hits |\n\
             |---|---|---|---|---|---|---|---|---|\n"
        );
        for outcome in &self.outcomes {
            let percent = |count: usize| 100.0 * count as f64 / requests.max(1) as f64;
            let _ = writeln!(
                text,
                "| {} | {:.2} % | {:.2} % | {:.2} % | {:.2} % | {:.0} ms | {:.0} ms | {:.0} ms | {:.0} % |",
                outcome.policy.name(),
                outcome.missed_percent(),
                percent(outcome.late),
                percent(outcome.failed),
                percent(outcome.refused),
                outcome.p50_ms,
                outcome.p99_ms,
                outcome.p999_ms,
                percent(outcome.hits),
            );
        }
        text
    }
}

/// Times up to an hour, in microseconds.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("these bounds are allowed")
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
