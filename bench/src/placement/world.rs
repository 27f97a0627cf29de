//! What the policies are tried on: workers, their faults, and requests, all from one seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use selvedge_proto::inference::Tier;

use super::Options;

/// Requests that a worker takes at once.
pub(super) const SLOTS: u32 = 2;
/// Sites that have edge workers.
const SITES: usize = 20;
/// Times of one worker vary by this, as the deviation of their logarithm.
const SPREAD: f64 = 0.3;
/// Shares of workers by the time that they usually take.
const CLASSES: [(f64, f64); 3] = [(0.3, 0.020), (0.5, 0.050), (0.2, 0.120)];
/// Requests for each routing key, on average.
const PER_KEY: usize = 20;
/// How much slower a worker becomes.
const SLOWER: f64 = 10.0;

/// What is wrong with a worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    Slow,
    Fails,
    Dies,
}

/// One worker, as it is.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) site: String,
    pub(super) tier: Tier,
    pub(super) rtt: Duration,
    /// Usual time of a request.
    pub(super) usual: Duration,
    /// What goes wrong, and from when until when.
    pub(super) fault: Option<(Fault, Duration, Duration)>,
}

/// A request, as it comes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    pub(super) at: Duration,
    pub(super) key: u64,
    /// Multiplies the usual time of whoever works on it.
    pub(super) weight: f64,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) machines: Vec<Machine>,
    pub(super) arrivals: Vec<Arrival>,
}

impl World {
    pub(super) fn new(options: &Options) -> Self {
        let mut random = StdRng::seed_from_u64(options.seed);
        let mut machines: Vec<Machine> =
            (0..options.workers).map(|_| machine(&mut random)).collect();
        let per_second: f64 = machines
            .iter()
            // A slot is taken from when the request is sent until the answer is there.
            .map(|machine| f64::from(SLOTS) / (machine.usual + machine.rtt).as_secs_f64())
            .sum();
        let rate = per_second * options.utilisation;
        let length = options.requests as f64 / rate;
        let mut at = 0.0;
        let keys = (options.requests / PER_KEY).max(1) as u64;
        let arrivals = (0..options.requests)
            .map(|_| {
                at -= random.random_range(f64::EPSILON..1.0).ln() / rate;
                Arrival {
                    at: Duration::from_secs_f64(at),
                    key: random.random_range(0..keys),
                    weight: log_normal(&mut random, SPREAD),
                }
            })
            .collect();
        if options.faults {
            for machine in &mut machines {
                let fault = match random.random_range(0.0..1.0) {
                    ..0.05 => Fault::Slow,
                    ..0.10 => Fault::Dies,
                    ..0.12 => Fault::Fails,
                    _ => continue,
                };
                let from = Duration::from_secs_f64(length * 0.25);
                let until = Duration::from_secs_f64(length * 0.75);
                machine.fault = Some((fault, from, until));
            }
        }
        Self { machines, arrivals }
    }
}

impl Machine {
    /// What is wrong with it at this time.
    pub(super) fn fault_at(&self, now: Duration) -> Option<Fault> {
        let (fault, from, until) = self.fault?;
        (from..until).contains(&now).then_some(fault)
    }

    /// How long it works on a request that it begins now.
    pub(super) fn time(&self, now: Duration, weight: f64) -> Duration {
        let slower = match self.fault_at(now) {
            Some(Fault::Slow) => SLOWER,
            _ => 1.0,
        };
        self.usual.mul_f64(weight * slower)
    }
}

fn machine(random: &mut StdRng) -> Machine {
    let mut share = random.random_range(0.0..1.0);
    let mut seconds = CLASSES[0].1;
    for (part, time) in CLASSES {
        seconds = time;
        if share < part {
            break;
        }
        share -= part;
    }
    let usual = Duration::from_secs_f64(seconds * log_normal(random, SPREAD));
    let (site, tier, rtt) = if random.random_bool(0.5) {
        ("cloud".to_owned(), Tier::Cloud, 1..4)
    } else {
        let site = random.random_range(0..SITES);
        (format!("site-{site}"), Tier::Edge, 20..60)
    };
    Machine {
        site,
        tier,
        rtt: Duration::from_millis(random.random_range(rtt)),
        usual,
        fault: None,
    }
}

/// A value around 1, whose logarithm has this deviation.
fn log_normal(random: &mut StdRng, deviation: f64) -> f64 {
    let (a, b): (f64, f64) = (
        random.random_range(f64::EPSILON..1.0),
        random.random_range(0.0..std::f64::consts::TAU),
    );
    // Box and Muller's way to a normal distribution.
    ((-2.0 * a.ln()).sqrt() * b.cos() * deviation).exp()
}
