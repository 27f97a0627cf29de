//! Acknowledging deliveries: which QoS 1 messages of a lane the application has taken.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::BytesMut;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::wire;
use tokio::sync::Notify;

use crate::sync::lock;

/// Numbers the QoS 1 messages of one lane and finds the highest number up to which all are taken.
#[derive(Debug, Default)]
pub(crate) struct AckTracker {
    /// Every number up to this one is taken.
    taken: u64,
    /// Whether the numbers after `taken` are taken.
    open: VecDeque<bool>,
}

impl AckTracker {
    /// The number of a message just received.
    pub(crate) fn receive(&mut self) -> u64 {
        self.open.push_back(false);
        self.taken + self.open.len() as u64
    }

    /// The application has taken this number. Returns the number to acknowledge if it rose.
    pub(crate) fn take(&mut self, number: u64) -> Option<u64> {
        let index = usize::try_from(number.checked_sub(self.taken + 1)?).ok()?;
        *self.open.get_mut(index)? = true;
        let before = self.taken;
        while self.open.front() == Some(&true) {
            self.open.pop_front();
            self.taken += 1;
        }
        (self.taken > before).then_some(self.taken)
    }
}

/// Acknowledgements of one connection that have yet to be sent: at most one for each lane, since
/// they are cumulative.
#[derive(Debug)]
pub(crate) struct PendingAcks {
    lanes: Mutex<BTreeMap<u32, u64>>,
    wake: Arc<Notify>,
}

impl PendingAcks {
    /// `wake` is told when there is something to send.
    pub(crate) fn new(wake: Arc<Notify>) -> Self {
        Self {
            lanes: Mutex::default(),
            wake,
        }
    }

    fn add(&self, lane: u32, last: u64) {
        let first = {
            let mut lanes = lock(&self.lanes);
            let first = lanes.is_empty();
            let entry = lanes.entry(lane).or_default();
            *entry = last.max(*entry);
            first
        };
        if first {
            self.wake.notify_one();
        }
    }

    /// Appends what is to be sent.
    pub(crate) fn drain_into(&self, buffer: &mut BytesMut) {
        let lanes = std::mem::take(&mut *lock(&self.lanes));
        for (lane, last) in lanes {
            let ack = wire::control::Frame::DeliveryAck(wire::DeliveryAck { lane, last });
            frame::append(buffer, Kind::CONTROL, &wire::Control { frame: Some(ack) });
        }
    }
}

/// The acknowledgements of one delivery lane.
#[derive(Debug)]
pub(crate) struct LaneAcks {
    lane: u32,
    tracker: Mutex<AckTracker>,
    pending: Arc<PendingAcks>,
}

impl LaneAcks {
    pub(crate) fn new(lane: u32, pending: Arc<PendingAcks>) -> Self {
        Self {
            lane,
            tracker: Mutex::default(),
            pending,
        }
    }

    /// A QoS 1 message has arrived; `copies` subscriptions are to take it. With none of them it
    /// counts as taken.
    pub(crate) fn receive(self: &Arc<Self>, copies: usize) -> Option<Ticket> {
        let number = lock(&self.tracker).receive();
        let ticket = Ticket {
            acks: Arc::clone(self),
            number,
            copies: (copies > 1).then(|| Arc::new(AtomicUsize::new(copies))),
        };
        if copies == 0 {
            ticket.redeem();
            return None;
        }
        Some(ticket)
    }
}

/// One copy of a QoS 1 message that the application has not taken yet.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    acks: Arc<LaneAcks>,
    number: u64,
    /// Copies not taken yet, when there are several.
    copies: Option<Arc<AtomicUsize>>,
}

impl Ticket {
    /// The application has taken this copy.
    pub(crate) fn redeem(self) {
        if let Some(copies) = &self.copies
            && copies.fetch_sub(1, Ordering::AcqRel) > 1
        {
            return;
        }
        let last = lock(&self.acks.tracker).take(self.number);
        if let Some(last) = last {
            self.acks.pending.add(self.acks.lane, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_acknowledged_number_is_the_longest_run_from_one(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60), 0..200),
        ) {
            let mut tracker = AckTracker::default();
            let mut received = 0u64;
            let mut taken = BTreeSet::new();
            let mut acknowledged = 0u64;
            for (receive, number) in steps {
                if receive {
                    received += 1;
                    prop_assert_eq!(tracker.receive(), received);
                    continue;
                }
                let result = tracker.take(number);
                if (1..=received).contains(&number) {
                    taken.insert(number);
                }
                let run = (1..).take_while(|n| taken.contains(n)).count() as u64;
                prop_assert_eq!(result, (run > acknowledged).then_some(run));
                acknowledged = run;
            }
        }
    }

    #[test]
    fn a_message_for_two_is_taken_when_both_have_taken_it() {
        let pending = Arc::new(PendingAcks::new(Arc::new(Notify::new())));
        let lane = Arc::new(LaneAcks::new(7, pending.clone()));
        let first = lane.receive(2).unwrap();
        let second = first.clone();
        assert!(
            lane.receive(0).is_none(),
            "nobody wants it, so it counts as taken"
        );
        first.redeem();
        let mut sent = BytesMut::new();
        pending.drain_into(&mut sent);
        assert!(sent.is_empty());
        second.redeem();
        pending.drain_into(&mut sent);
        let ack = wire::control::Frame::DeliveryAck(wire::DeliveryAck { lane: 7, last: 2 });
        assert_eq!(
            sent,
            frame::encode(Kind::CONTROL, &wire::Control { frame: Some(ack) })
        );
    }
}
