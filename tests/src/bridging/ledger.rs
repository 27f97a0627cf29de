//! What was published on either side, what arrived on both, and whether that is what the quality of
//! service promises.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Lost or repeated numbers named in a violation.
const NAMED: usize = 8;

/// Longest time that is told exactly, in microseconds: an hour.
const LONGEST: u64 = 3_600_000_000;

/// Where a message was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// On the remote, for the fabric.
    In,
    /// In the fabric, for the remote.
    Out,
}

/// Where a message arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where it was published, without passing the bridge.
    Home,
    /// On the other side of the bridge.
    Across,
}

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Acknowledged and never delivered.
    #[error("lost: {count} messages {direction:?} that were acknowledged never arrived: {first:?}")]
    Lost {
        /// Which way.
        direction: Direction,
        /// How many.
        count: u64,
        /// The first of them.
        first: Vec<u64>,
    },
    /// Delivered more than once where that is not allowed.
    #[error("duplicates: {count} messages {direction:?} of QoS 2 arrived again: {first:?}")]
    Duplicates {
        /// Which way.
        direction: Direction,
        /// How many.
        count: u64,
        /// The first of them.
        first: Vec<u64>,
    },
    /// Came back to where it was published.
    #[error("loop: {count} messages {direction:?} came back over the bridge: {first:?}")]
    Loop {
        /// Which way.
        direction: Direction,
        /// How many.
        count: u64,
        /// The first of them.
        first: Vec<u64>,
    },
    /// Delivered again more often than connections were broken.
    #[error("{direction:?}: deliveries went back {times} times over {faults} faults")]
    Rewound {
        /// Which way.
        direction: Direction,
        /// How often a message did not come after the one before it.
        times: u64,
        /// How often something was broken.
        faults: u64,
    },
    /// Delivered for the first time after a later one.
    #[error(
        "{direction:?}: {count} messages arrived for the first time after a later one: {first:?}"
    )]
    Reordered {
        /// Which way.
        direction: Direction,
        /// How many.
        count: u64,
        /// The first of them.
        first: Vec<u64>,
    },
}

/// How messages went one way.
#[derive(Debug, Clone)]
pub struct Flow {
    /// Which way.
    pub direction: Direction,
    /// Messages handed to the publisher's client.
    pub published: u64,
    /// Of them acknowledged to it.
    pub acknowledged: u64,
    /// Of them delivered across the bridge, each counted once.
    pub delivered: u64,
    /// Further deliveries across the bridge.
    pub repeats: u64,
    /// How often a delivery did not come after the one before it.
    pub rewinds: u64,
    /// Deliveries where it was published, beyond the first.
    pub came_back: u64,
    /// Time from publishing to the first delivery across, in microseconds.
    pub latency: Histogram<u64>,
    sent: Vec<Sent>,
    last: Option<u64>,
    highest: Option<u64>,
    late: Numbers,
    repeated: Numbers,
    back: Numbers,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Duration,
    acknowledged: bool,
    across: bool,
    home: bool,
}

/// The first few numbers, and how many there were.
#[derive(Debug, Clone, Default)]
struct Numbers {
    count: u64,
    first: Vec<u64>,
}

impl Numbers {
    fn add(&mut self, number: u64) {
        self.count += 1;
        if self.first.len() < NAMED {
            self.first.push(number);
        }
    }
}

impl Flow {
    pub(crate) fn new(direction: Direction) -> Self {
        Self {
            direction,
            published: 0,
            acknowledged: 0,
            delivered: 0,
            repeats: 0,
            rewinds: 0,
            came_back: 0,
            latency: Histogram::new_with_max(LONGEST, 3).expect("three digits are allowed"),
            sent: Vec::new(),
            last: None,
            highest: None,
            late: Numbers::default(),
            repeated: Numbers::default(),
            back: Numbers::default(),
        }
    }

    /// The number of the message that is published now.
    pub(crate) fn publish(&mut self, at: Duration) -> u64 {
        self.sent.push(Sent {
            at,
            acknowledged: false,
            across: false,
            home: false,
        });
        self.published += 1;
        self.published - 1
    }

    pub(crate) fn acknowledge(&mut self, number: u64) {
        if let Some(sent) = self.sent.get_mut(place(number))
            && !sent.acknowledged
        {
            sent.acknowledged = true;
            self.acknowledged += 1;
        }
    }

    /// A message has arrived. `false` if it was never published.
    pub(crate) fn arrive(&mut self, number: u64, where_: Place, now: Duration) -> bool {
        let Some(sent) = self.sent.get_mut(place(number)) else {
            return false;
        };
        if where_ == Place::Home {
            if std::mem::replace(&mut sent.home, true) {
                self.came_back += 1;
                self.back.add(number);
            }
            return true;
        }
        if self.last.is_some_and(|last| number <= last) {
            self.rewinds += 1;
        }
        self.last = Some(number);
        if std::mem::replace(&mut sent.across, true) {
            self.repeats += 1;
            self.repeated.add(number);
            return true;
        }
        self.delivered += 1;
        let took = now.saturating_sub(sent.at).as_micros();
        self.latency
            .saturating_record(u64::try_from(took).unwrap_or(u64::MAX));
        match self.highest {
            Some(highest) if number < highest => self.late.add(number),
            _ => self.highest = Some(number),
        }
        true
    }

    /// Messages acknowledged to the publisher that have not arrived across.
    pub(crate) fn owed(&self) -> u64 {
        let owed = self.sent.iter();
        owed.filter(|sent| sent.acknowledged && !sent.across)
            .count() as u64
    }

    /// Every broken promise, with what is missing taken for lost.
    pub(crate) fn violations(&self, qos: u8, faults: u64) -> Vec<Violation> {
        let direction = self.direction;
        let mut violations = Vec::new();
        let mut lost = Numbers::default();
        for (number, sent) in (0..).zip(&self.sent) {
            if sent.acknowledged && !sent.across {
                lost.add(number);
            }
        }
        if lost.count > 0 {
            violations.push(Violation::Lost {
                direction,
                count: lost.count,
                first: lost.first,
            });
        }
        let exact = qos == 2;
        if exact && self.repeated.count > 0 {
            violations.push(Violation::Duplicates {
                direction,
                count: self.repeated.count,
                first: self.repeated.first.clone(),
            });
        }
        // With QoS 1 the broker at home may deliver again by itself, after a lost connection only.
        if exact && self.back.count > 0 || self.back.count > self.published / 2 {
            violations.push(Violation::Loop {
                direction,
                count: self.back.count,
                first: self.back.first.clone(),
            });
        }
        // Each fault breaks two connections, and each that breaks may lead to one repetition on
        // each hop between publisher and reader.
        if self.rewinds > 4 * faults {
            violations.push(Violation::Rewound {
                direction,
                times: self.rewinds,
                faults,
            });
        }
        if self.late.count > 0 {
            violations.push(Violation::Reordered {
                direction,
                count: self.late.count,
                first: self.late.first.clone(),
            });
        }
        violations
    }
}

/// Numbers index what is in memory. One that does not fit was not published.
fn place(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn flow() -> Flow {
        let mut flow = Flow::new(Direction::In);
        for number in 0..4 {
            assert_eq!(flow.publish(Duration::ZERO), number);
            flow.acknowledge(number);
        }
        flow
    }

    fn arrive(flow: &mut Flow, numbers: &[u64]) {
        for number in numbers {
            assert!(flow.arrive(*number, Place::Across, Duration::ZERO));
        }
    }

    #[test]
    fn each_broken_promise_is_told() {
        let mut good = flow();
        arrive(&mut good, &[0, 1, 2, 3]);
        assert!(good.arrive(0, Place::Home, Duration::ZERO));
        assert_eq!((good.violations(2, 0), good.owed()), (vec![], 0));
        assert!(!good.arrive(9, Place::Across, Duration::ZERO));

        let mut lost = flow();
        arrive(&mut lost, &[0, 2]);
        let first = vec![1, 3];
        let expected = Violation::Lost {
            direction: Direction::In,
            count: 2,
            first,
        };
        assert_eq!((lost.violations(1, 0), lost.owed()), (vec![expected], 2));

        let mut twice = flow();
        arrive(&mut twice, &[0, 1, 0, 1, 2, 3]);
        assert_eq!(twice.violations(1, 1), []);
        assert!(matches!(
            twice.violations(1, 0)[..],
            [Violation::Rewound { times: 1, .. }]
        ));
        assert!(matches!(
            twice.violations(2, 1)[..],
            [Violation::Duplicates { count: 2, .. }]
        ));

        let mut late = flow();
        arrive(&mut late, &[0, 2, 1, 3]);
        assert!(matches!(
            late.violations(2, 1)[..],
            [Violation::Reordered { count: 1, .. }]
        ));

        let mut looped = flow();
        arrive(&mut looped, &[0, 1, 2, 3]);
        for number in [0, 0, 1, 2, 3] {
            looped.arrive(number, Place::Home, Duration::ZERO);
        }
        assert!(matches!(
            looped.violations(2, 1)[..],
            [Violation::Loop { count: 1, .. }]
        ));
        assert_eq!(looped.violations(1, 1), []);
    }
}
