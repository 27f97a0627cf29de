//! The messages on their way to a remote, in order, until the remote has acknowledged them.

use std::collections::VecDeque;

/// How far a message has come on the present connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Not given to the MQTT event loop.
    Waiting,
    /// Given to the event loop, which has not said yet under which packet id it sends it.
    Handed,
    /// Sent under this packet id.
    Sent(u16),
}

/// A queue of messages with the stage of each.
///
/// The event loop numbers packets by itself and says so afterwards, in the order it was given them,
/// so the oldest message that is handed over is the one a number belongs to. After a lost connection
/// every message starts again, in its old order: a remote has no memory of QoS 1 packet ids.
///
/// The caller bounds how much is pushed.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    entries: VecDeque<(Stage, T)>,
    under_way: usize,
}

impl<T> Outbox<T> {
    pub(crate) fn new() -> Self {
        Self {
            entries: VecDeque::new(),
            under_way: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is under way; messages may wait all the same.
    pub(crate) fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    pub(crate) fn push(&mut self, item: T) {
        self.entries.push_back((Stage::Waiting, item));
    }

    /// The next message to hand over, unless `window` messages are under way already.
    pub(crate) fn next(&mut self, window: usize) -> Option<&mut T> {
        if self.under_way >= window {
            return None;
        }
        // What waits comes after everything under way.
        self.entries.get_mut(self.under_way).map(|(_, item)| item)
    }

    /// The message [`Self::next`] gave was handed over.
    pub(crate) fn handed(&mut self) {
        if let Some((stage, _)) = self.entries.get_mut(self.under_way) {
            *stage = Stage::Handed;
            self.under_way += 1;
        }
    }

    /// The message [`Self::next`] gave cannot be sent at all: takes it out.
    pub(crate) fn discard(&mut self) -> Option<T> {
        self.entries.remove(self.under_way).map(|(_, item)| item)
    }

    /// The event loop has sent the oldest message that is handed over. With packet id 0, for QoS 0,
    /// nothing more is to come and the message is returned.
    pub(crate) fn sent(&mut self, packet_id: u16) -> Option<T> {
        let position = self.position(Stage::Handed)?;
        if packet_id == 0 {
            return self.take(position);
        }
        self.entries[position].0 = Stage::Sent(packet_id);
        None
    }

    /// The remote has answered for this packet id: takes the message out.
    pub(crate) fn answered(&mut self, packet_id: u16) -> Option<T> {
        let position = self.position(Stage::Sent(packet_id))?;
        self.take(position)
    }

    /// The connection is lost: everything waits again.
    pub(crate) fn restart(&mut self) {
        for (stage, _) in &mut self.entries {
            *stage = Stage::Waiting;
        }
        self.under_way = 0;
    }

    /// Takes out the messages that `unwanted` names; to be called when nothing is under way.
    pub(crate) fn extract(&mut self, unwanted: impl Fn(&T) -> bool) -> Vec<T> {
        let entries = std::mem::take(&mut self.entries);
        let (out, kept) = entries.into_iter().partition(|(_, item)| unwanted(item));
        self.entries = kept;
        let out: VecDeque<(Stage, T)> = out;
        out.into_iter().map(|(_, item)| item).collect()
    }

    fn position(&self, wanted: Stage) -> Option<usize> {
        let mut under_way = self.entries.iter().take(self.under_way);
        under_way.position(|(stage, _)| *stage == wanted)
    }

    fn take(&mut self, position: usize) -> Option<T> {
        self.under_way -= 1;
        self.entries.remove(position).map(|(_, item)| item)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn hand_over(outbox: &mut Outbox<u32>, window: usize) -> Vec<u32> {
        let mut handed = Vec::new();
        while let Some(item) = outbox.next(window).copied() {
            outbox.handed();
            handed.push(item);
        }
        handed
    }

    #[test]
    fn the_window_bounds_what_is_under_way_and_acks_come_in_any_order() {
        let mut outbox = Outbox::new();
        (1..=4).for_each(|item| outbox.push(item));
        assert_eq!(hand_over(&mut outbox, 3), [1, 2, 3]);
        for packet_id in [7, 8, 9] {
            assert_eq!(outbox.sent(packet_id), None);
        }
        assert_eq!(outbox.answered(5), None);
        assert_eq!(outbox.answered(8), Some(2));
        assert_eq!(hand_over(&mut outbox, 3), [4]);
        assert_eq!(outbox.answered(7), Some(1));
        // A packet id that is used again is the newer message's.
        assert_eq!(outbox.sent(7), None);
        assert_eq!(outbox.answered(7), Some(4));
        assert_eq!(outbox.answered(9), Some(3));
        assert_eq!(outbox.len(), 0);
    }

    #[test]
    fn a_lost_connection_starts_again_with_the_oldest() {
        let mut outbox = Outbox::new();
        (1..=4).for_each(|item| outbox.push(item));
        hand_over(&mut outbox, 3);
        outbox.sent(1);
        outbox.sent(2);
        assert_eq!(outbox.answered(2), Some(2));
        outbox.restart();
        assert_eq!(hand_over(&mut outbox, 2), [1, 3]);
        assert_eq!(
            outbox.answered(1),
            None,
            "ids of the old connection mean nothing"
        );
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push,
        Hand,
        Discard,
        Sent,
        Answer(usize),
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Push),
            4 => Just(Step::Hand),
            1 => Just(Step::Discard),
            4 => Just(Step::Sent),
            4 => (0..4_usize).prop_map(Step::Answer),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        /// Against an event loop that numbers packets: no message is lost, none is completed twice or
        /// for another's packet, and the window holds.
        #[test]
        fn every_message_is_completed_by_its_own_packet(
            steps in proptest::collection::vec(step(), 1..200),
        ) {
            const WINDOW: usize = 3;
            let mut outbox = Outbox::new();
            let mut pushed = 0;
            let mut next_id = 1;
            let (mut channel, mut wire) = (VecDeque::new(), Vec::<(u16, u32)>::new());
            let mut done = Vec::new();
            for step in steps {
                match step {
                    Step::Push => {
                        outbox.push(pushed);
                        pushed += 1;
                    }
                    Step::Hand => {
                        if let Some(item) = outbox.next(WINDOW).copied() {
                            outbox.handed();
                            channel.push_back(item);
                        }
                    }
                    Step::Discard => {
                        if let Some(item) = outbox.next(WINDOW).copied() {
                            prop_assert_eq!(outbox.discard(), Some(item));
                            done.push(item);
                        }
                    }
                    Step::Sent => {
                        if let Some(item) = channel.pop_front() {
                            // Every fourth is of QoS 0.
                            if item % 4 == 0 {
                                prop_assert_eq!(outbox.sent(0), Some(item));
                                done.push(item);
                            } else {
                                prop_assert_eq!(outbox.sent(next_id), None);
                                wire.push((next_id, item));
                                next_id += 1;
                            }
                        }
                    }
                    Step::Answer(index) => {
                        if index < wire.len() {
                            let (id, item) = wire.remove(index);
                            prop_assert_eq!(outbox.answered(id), Some(item));
                            done.push(item);
                        }
                    }
                    Step::Restart => {
                        outbox.restart();
                        channel.clear();
                        wire.clear();
                    }
                }
                prop_assert!(channel.len() + wire.len() <= WINDOW);
                prop_assert_eq!(done.len() + outbox.len(), usize::try_from(pushed).unwrap());
            }
            outbox.restart();
            let left = hand_over(&mut outbox, usize::MAX);
            prop_assert!(left.is_sorted(), "{:?}", left);
            done.extend(left);
            done.sort_unstable();
            prop_assert_eq!(done, (0..pushed).collect::<Vec<_>>());
        }
    }
}
