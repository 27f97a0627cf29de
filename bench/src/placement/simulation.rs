//! One policy, from the first request to the last, one event after the other.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use selvedge_broker::placement::affinity::fingerprint;
use selvedge_broker::placement::health::{Health, Standing};
use selvedge_broker::placement::{self, Candidate, Refusal, Request};
use selvedge_proto::inference::{Preference, Residency};

use super::world::{Fault, Machine, SLOTS, World};
use super::{Options, Outcome, Policy, histogram, micros};

/// Requests that wait in the fabric at most: the broker's default.
const WAITING: usize = 1_024;
/// What is sent to a worker that is dead is given up after this long without a word.
const SILENCE: Duration = Duration::from_millis(400);
/// Keys that a worker remembers.
const REMEMBERED: usize = 8;

/// A request's place among the arrivals.
type Number = usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A worker has done with a request, one way or the other.
    Ended { worker: usize, number: Number },
    /// A request comes.
    Comes(Number),
}

/// What is known and what is going on at one worker.
#[derive(Debug, Default)]
struct Worker {
    health: Health,
    /// Requests that wait here, under policies that know no credits.
    queue: VecDeque<Number>,
    running: u32,
    keys: VecDeque<u64>,
}

/// How a request that a worker has will end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Answered,
    Late,
    Failed,
}

pub(super) struct Simulation {
    policy: Policy,
    deadline: Duration,
    world: World,
    workers: Vec<Worker>,
    /// Who has failed of late, whose standing may change with time.
    suspects: Vec<usize>,
    /// Standing and load of each worker, as a broker sees them. Names are those of the machines.
    seen: Vec<Seen>,
    events: BinaryHeap<Reverse<(Duration, Event)>>,
    /// Requests that wait in the fabric, the earliest deadline first.
    waiting: BTreeSet<(Duration, Number)>,
    /// When a worker began with each request, and how that ends.
    begun: Vec<(Duration, Option<End>)>,
    random: StdRng,
    turn: usize,
    times: Histogram<u64>,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    fingerprint: u64,
    outstanding: u32,
    service_time: Duration,
    standing: Standing,
}

impl Simulation {
    pub(super) fn new(options: &Options, policy: Policy) -> Self {
        let world = World::new(options);
        let seen = |(place, _): (usize, &Machine)| Seen {
            fingerprint: fingerprint(&format!("worker-{place}")),
            outstanding: 0,
            service_time: Duration::ZERO,
            standing: Standing::Well,
        };
        Self {
            policy,
            deadline: Duration::from_millis(options.deadline_ms),
            workers: world.machines.iter().map(|_| Worker::default()).collect(),
            suspects: Vec::new(),
            seen: world.machines.iter().enumerate().map(seen).collect(),
            events: BinaryHeap::from([Reverse((world.arrivals[0].at, Event::Comes(0)))]),
            waiting: BTreeSet::new(),
            begun: vec![(Duration::ZERO, None); world.arrivals.len()],
            // Not that of the world, which is the same for all.
            random: StdRng::seed_from_u64(!options.seed),
            turn: 0,
            times: histogram(),
            outcome: Outcome {
                policy,
                in_time: 0,
                late: 0,
                failed: 0,
                refused: 0,
                p50_ms: 0.0,
                p99_ms: 0.0,
                p999_ms: 0.0,
                hits: 0,
            },
            world,
        }
    }

    pub(super) fn run(mut self) -> Outcome {
        // Times of the fabric's code are instants; only their differences matter.
        let zero = Instant::now();
        while let Some(Reverse((now, event))) = self.events.pop() {
            match event {
                Event::Comes(number) => {
                    if let Some(next) = self.world.arrivals.get(number + 1) {
                        let next = Reverse((next.at, Event::Comes(number + 1)));
                        self.events.push(next);
                    }
                    self.comes(number, now, zero);
                }
                Event::Ended { worker, number } => self.ended(worker, number, now, zero),
            }
        }
        // Whoever still waits has waited in vain.
        self.outcome.late += self.waiting.len();
        let quantile = |share| self.times.value_at_quantile(share) as f64 / 1e3;
        Outcome {
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            p999_ms: quantile(0.999),
            ..self.outcome
        }
    }

    fn comes(&mut self, number: Number, now: Duration, zero: Instant) {
        let count = self.workers.len();
        let worker = match self.policy {
            Policy::Random => self.random.random_range(0..count),
            Policy::RoundRobin => {
                self.turn += 1;
                self.turn % count
            }
            Policy::LeastOutstanding => {
                let first = self.random.random_range(0..count);
                (0..count)
                    .map(|step| (first + step) % count)
                    .min_by_key(|&worker| self.seen[worker].outstanding)
                    .unwrap_or_default()
            }
            Policy::Fabric | Policy::FabricKeyed => {
                if !self.waiting.is_empty() || !self.try_place(number, now, zero) {
                    self.wait(number);
                }
                return;
            }
        };
        self.seen[worker].outstanding += 1;
        self.workers[worker].queue.push_back(number);
        self.next_of(worker, now);
    }

    /// Joins the requests that wait in the fabric, unless there are too many.
    fn wait(&mut self, number: Number) {
        if self.waiting.len() >= WAITING {
            self.outcome.refused += 1;
            return;
        }
        let due = self.world.arrivals[number].at + self.deadline;
        self.waiting.insert((due, number));
    }

    /// Asks the fabric's code. True when the request has a worker or was refused.
    fn try_place(&mut self, number: Number, now: Duration, zero: Instant) -> bool {
        self.suspects.retain(|&worker| {
            let standing = self.workers[worker].health.standing(zero + now);
            self.seen[worker].standing = standing;
            standing != Standing::Well
        });
        let arrival = self.world.arrivals[number];
        let request = Request {
            site: "",
            version: "",
            residency: Residency::Tenant,
            preference: Preference::Fastest,
            tier: None,
            affinity: (self.policy == Policy::FabricKeyed).then_some(arrival.key),
            payload_bytes: 0,
            deadline: (arrival.at + self.deadline).saturating_sub(now),
        };
        let candidates: Vec<Candidate<'_>> = (self.world.machines.iter().zip(&self.seen))
            .map(|(machine, seen)| Candidate {
                site: &machine.site,
                fingerprint: seen.fingerprint,
                version: "1",
                tier: machine.tier,
                slots: SLOTS,
                outstanding: seen.outstanding,
                service_time: seen.service_time,
                rtt: machine.rtt,
                transfer: Duration::ZERO,
                standing: seen.standing,
                loaded: true,
            })
            .collect();
        let random = &mut self.random;
        match placement::place(&request, &candidates, |count| random.random_range(0..count)) {
            Ok(choice) => {
                let worker = choice.index;
                if self.seen[worker].standing == Standing::Probe {
                    self.workers[worker].health.begin(zero + now);
                }
                self.seen[worker].outstanding += 1;
                self.begin(worker, number, now);
                true
            }
            Err(Refusal::Busy { .. }) => false,
            Err(_) => {
                self.outcome.refused += 1;
                true
            }
        }
    }

    /// Begins with the next of the requests that wait at a worker.
    fn next_of(&mut self, worker: usize, now: Duration) {
        while self.workers[worker].running < SLOTS
            && let Some(number) = self.workers[worker].queue.pop_front()
        {
            if now >= self.world.arrivals[number].at + self.deadline {
                self.outcome.late += 1;
                self.seen[worker].outstanding -= 1;
                continue;
            }
            self.begin(worker, number, now);
        }
    }

    fn begin(&mut self, worker: usize, number: Number, now: Duration) {
        let arrival = self.world.arrivals[number];
        let machine = &self.world.machines[worker];
        let state = &mut self.workers[worker];
        state.running += 1;
        if state.keys.contains(&arrival.key) {
            self.outcome.hits += 1;
        } else {
            state.keys.push_back(arrival.key);
            if state.keys.len() > REMEMBERED {
                state.keys.pop_front();
            }
        }
        let (after, end) = match machine.fault_at(now) {
            Some(Fault::Dies) => (SILENCE, End::Failed),
            Some(Fault::Fails) => (machine.rtt, End::Failed),
            Some(Fault::Slow) | None => {
                let time = machine.rtt + machine.time(now, arrival.weight);
                (time, End::Answered)
            }
        };
        // Whoever asked gives up at the deadline, and the worker stops.
        let due = arrival.at + self.deadline;
        let (until, end) = if now + after > due {
            (due.max(now), End::Late)
        } else {
            (now + after, end)
        };
        self.begun[number] = (now, Some(end));
        let ended = Event::Ended { worker, number };
        self.events.push(Reverse((until, ended)));
    }

    fn ended(&mut self, worker: usize, number: Number, now: Duration, zero: Instant) {
        let (begun, end) = self.begun[number];
        self.workers[worker].running -= 1;
        self.seen[worker].outstanding -= 1;
        match end {
            Some(End::Answered) => {
                self.outcome.in_time += 1;
                let time = now - self.world.arrivals[number].at;
                self.times.saturating_record(micros(time).max(1));
                self.workers[worker].health.succeed();
                self.smooth(worker, now - begun);
            }
            Some(End::Late) => {
                self.outcome.late += 1;
                // That it takes at least so long is known.
                if now - begun > self.seen[worker].service_time {
                    self.smooth(worker, now - begun);
                }
            }
            Some(End::Failed) | None => {
                self.outcome.failed += 1;
                if self.workers[worker].health.fail(zero + now) {
                    self.suspects.push(worker);
                }
            }
        }
        self.next_of(worker, now);
        while let Some(&(due, number)) = self.waiting.first() {
            if due <= now {
                self.outcome.late += 1;
            } else if !self.try_place(number, now, zero) {
                break;
            }
            self.waiting.remove(&(due, number));
        }
    }

    /// As the broker does: an eighth of the new, seven of the old.
    fn smooth(&mut self, worker: usize, time: Duration) {
        let held = &mut self.seen[worker].service_time;
        *held = match held.is_zero() {
            true => time,
            false => *held - *held / 8 + time / 8,
        };
    }
}
