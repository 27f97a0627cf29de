//! What is broken, in which order and how badly: the same seed breaks the same things.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::power::Loss;

/// One of the two bad links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The broker is killed (SIGKILL) and started again.
    Kill,
    /// The broker is stopped in good order (SIGTERM) and started again.
    Restart,
    /// The broker stands still (SIGSTOP) for a time.
    Pause(Duration),
    /// A link loses everything for a time.
    Cut(Side, Duration),
    /// A link loses, delays and reorders for a time.
    Storm(Side, Duration),
    /// The clients of a link come from other addresses.
    Rebind(Side),
    /// The power goes under the store; the broker is killed with it and started again.
    PowerCut(Loss),
    /// The last reader goes away and leaves its session.
    Leave,
    /// The last reader comes back.
    Return,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill => f.write_str("kill"),
            Self::Restart => f.write_str("restart"),
            Self::Pause(time) => write!(f, "pause for {time:?}"),
            Self::Cut(side, time) => write!(f, "cut of link {side:?} for {time:?}"),
            Self::Storm(side, time) => write!(f, "storm on link {side:?} for {time:?}"),
            Self::Rebind(side) => write!(f, "rebind of link {side:?}"),
            Self::PowerCut(Loss::Everything) => f.write_str("power cut, unsynced writes forgotten"),
            Self::PowerCut(Loss::Torn) => f.write_str("power cut, last write torn"),
            Self::PowerCut(Loss::Scattered) => f.write_str("power cut, sectors scattered"),
            Self::Leave => f.write_str("a reader leaves"),
            Self::Return => f.write_str("the reader returns"),
        }
    }
}

impl Fault {
    /// What it is called in a summary.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Restart => "restart",
            Self::Pause(_) => "pause",
            Self::Cut(..) => "cut",
            Self::Storm(..) => "storm",
            Self::Rebind(_) => "rebind",
            Self::PowerCut(_) => "power_cut",
            Self::Leave => "leave",
            Self::Return => "return",
        }
    }
}

/// Rounds of faults without end. Each round has every kind, in an order of its own.
#[derive(Debug)]
pub struct Plan {
    random: StdRng,
    /// Messages acknowledged between two faults.
    spacing: RangeInclusive<u64>,
    /// How long a pause, cut or storm lasts, in milliseconds.
    outage: RangeInclusive<u64>,
    /// Rest of the round, the next one last.
    round: Vec<Fault>,
    rounds: u64,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64, spacing: RangeInclusive<u64>, outage: RangeInclusive<u64>) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            spacing,
            outage,
            round: Vec::new(),
            rounds: 0,
        }
    }

    /// Rounds begun so far.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Whether the next fault begins another round.
    pub fn at_end_of_round(&self) -> bool {
        self.round.is_empty()
    }

    fn begin_round(&mut self) {
        self.rounds += 1;
        let mut round = vec![
            Fault::Kill,
            Fault::Kill,
            Fault::Restart,
            Fault::Pause(self.time()),
            Fault::Cut(self.side(), self.time()),
            Fault::Storm(self.side(), self.time()),
            Fault::Rebind(self.side()),
            Fault::PowerCut(Loss::Everything),
            Fault::PowerCut(Loss::Torn),
            Fault::PowerCut(Loss::Scattered),
        ];
        round.shuffle(&mut self.random);
        // The reader is away while something breaks: what it is owed is in the store alone.
        let away_from = self.random.random_range(0..round.len());
        let away_to = self.random.random_range(away_from + 1..=round.len());
        round.insert(away_to, Fault::Leave);
        round.insert(away_from, Fault::Return);
        self.round = round;
    }

    fn time(&mut self) -> Duration {
        Duration::from_millis(self.random.random_range(self.outage.clone()))
    }

    fn side(&mut self) -> Side {
        if self.random.random() {
            Side::A
        } else {
            Side::B
        }
    }
}

/// Gives the messages to be acknowledged before a fault, and the fault.
impl Iterator for Plan {
    type Item = (u64, Fault);

    fn next(&mut self) -> Option<(u64, Fault)> {
        if self.round.is_empty() {
            self.begin_round();
        }
        let fault = self.round.pop()?;
        Some((self.random.random_range(self.spacing.clone()), fault))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_round_has_every_kind_and_the_reader_is_away_during_one(seed: u64) {
            let mut plan = Plan::new(seed, 10..=20, 5..=6);
            let mut again = Plan::new(seed, 10..=20, 5..=6);
            for round in 1..4 {
                let mut kinds = Vec::new();
                loop {
                    let next = plan.next();
                    prop_assert_eq!(&next, &again.next());
                    let (acks, fault) = next.expect("it has no end");
                    prop_assert!((10..=20).contains(&acks));
                    kinds.push(fault.kind());
                    if plan.at_end_of_round() {
                        break;
                    }
                }
                prop_assert_eq!(plan.rounds(), round);
                let place = |kind| kinds.iter().position(|found| *found == kind);
                prop_assert!(place("leave") < place("return"));
                prop_assert!(place("return").expect("it returns") - place("leave").expect("it leaves") > 1);
                for kind in ["kill", "restart", "pause", "cut", "storm", "rebind", "power_cut"] {
                    prop_assert!(kinds.contains(&kind), "{kind} is missing from {kinds:?}");
                }
            }
        }
    }
}
