//! The messages on their way to a remote, in order, until the remote has answered for them.

use std::collections::{HashSet, VecDeque};

/// The highest packet id given to a message. The ids above it are for subscriptions.
const LAST_ID: u16 = 60_000;

/// How far a message has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// To be sent; `again` when the remote may have it from an earlier connection of its session.
    Waiting { again: bool },
    /// Sent, and neither acknowledged nor received.
    Sent,
    /// QoS 2: the remote has received it, and that is being put down.
    Releasing,
    /// QoS 2: the remote has received it for good; what is left is to forget the packet id.
    Released,
}

#[derive(Debug)]
struct Entry<T> {
    item: T,
    /// 0 when it has none yet, or needs none.
    packet_id: u16,
    stage: Stage,
}

/// What PUBREC means for the message it names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received<'a, T> {
    /// Put down that it was received, call [`Outbox::released`] then, and send PUBREL.
    PutDown(&'a T),
    /// PUBREL again.
    Release,
    /// It is being put down, or the id is nobody's.
    Nothing,
}

/// The message to send next.
#[derive(Debug)]
pub(crate) struct Next<'a, T> {
    pub(crate) item: &'a mut T,
    /// The packet id it must be sent under, if it is to be answered for.
    pub(crate) packet_id: u16,
    /// The remote may have it already.
    pub(crate) again: bool,
}

/// A queue of messages with the stage of each, and their packet ids.
///
/// A message keeps its packet id until the remote has answered for it, across connections: a resumed
/// session tells by the id that it has the message. The caller bounds how much is pushed.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    entries: VecDeque<Entry<T>>,
    under_way: usize,
    taken: HashSet<u16>,
    last_id: u16,
}

impl<T> Outbox<T> {
    pub(crate) fn new() -> Self {
        Self {
            entries: VecDeque::new(),
            under_way: 0,
            taken: HashSet::new(),
            last_id: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is under way; messages may wait all the same.
    pub(crate) fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    /// A packet id of its own for a message, until [`Self::give_back`] or until it is taken out.
    pub(crate) fn allocate(&mut self) -> u16 {
        loop {
            self.last_id = self.last_id % LAST_ID + 1;
            // Far fewer messages are in the outbox than there are ids.
            if self.taken.insert(self.last_id) {
                return self.last_id;
            }
        }
    }

    /// This id belongs to a message that will be pushed with it.
    pub(crate) fn reserve(&mut self, packet_id: u16) {
        self.taken.insert(packet_id);
    }

    /// The id is free again.
    pub(crate) fn give_back(&mut self, packet_id: u16) {
        self.taken.remove(&packet_id);
    }

    /// A message to send; with an id that was allocated for it, or 0 for one chosen when it is sent.
    pub(crate) fn push(&mut self, item: T, packet_id: u16, again: bool) {
        self.entries.push_back(Entry {
            item,
            packet_id,
            stage: Stage::Waiting { again },
        });
    }

    /// A message that the remote has received under this id in an earlier life of the bridge.
    pub(crate) fn push_released(&mut self, item: T, packet_id: u16) {
        self.taken.insert(packet_id);
        self.under_way += 1;
        self.entries.push_back(Entry {
            item,
            packet_id,
            stage: Stage::Released,
        });
    }

    /// The next message to send, unless `window` messages are under way already.
    pub(crate) fn next(&mut self, window: usize) -> Option<Next<'_, T>> {
        if self.under_way >= window {
            return None;
        }
        let position = self.first_waiting()?;
        if self.entries[position].packet_id == 0 {
            self.entries[position].packet_id = self.allocate();
        }
        let entry = &mut self.entries[position];
        let Stage::Waiting { again } = entry.stage else {
            return None;
        };
        Some(Next {
            item: &mut entry.item,
            packet_id: entry.packet_id,
            again,
        })
    }

    /// The message [`Self::next`] gave was sent, and the remote will answer for it.
    pub(crate) fn sent(&mut self) {
        if let Some(position) = self.first_waiting() {
            self.entries[position].stage = Stage::Sent;
            self.under_way += 1;
        }
    }

    /// The message [`Self::next`] gave was sent and needs no answer, or cannot be sent at all.
    pub(crate) fn take_next(&mut self) -> Option<T> {
        let position = self.first_waiting()?;
        self.take(position)
    }

    /// The remote has answered for this packet id for good: takes the message out.
    pub(crate) fn answered(&mut self, packet_id: u16) -> Option<T> {
        let position = self.position(packet_id, |stage| stage == Stage::Sent)?;
        self.take(position)
    }

    /// The remote has received the QoS 2 message of this packet id.
    pub(crate) fn received(&mut self, packet_id: u16) -> Received<'_, T> {
        let under_way = |stage| !matches!(stage, Stage::Waiting { .. });
        let Some(position) = self.position(packet_id, under_way) else {
            return Received::Nothing;
        };
        let entry = &mut self.entries[position];
        match entry.stage {
            Stage::Sent => {
                entry.stage = Stage::Releasing;
                Received::PutDown(&entry.item)
            }
            Stage::Released => Received::Release,
            Stage::Releasing | Stage::Waiting { .. } => Received::Nothing,
        }
    }

    /// It is put down that the message was received. `false` when it is gone.
    pub(crate) fn released(&mut self, packet_id: u16) -> bool {
        let position = self.position(packet_id, |stage| stage == Stage::Releasing);
        if let Some(position) = position {
            self.entries[position].stage = Stage::Released;
        }
        position.is_some()
    }

    /// The remote has forgotten this packet id: takes the message out.
    pub(crate) fn completed(&mut self, packet_id: u16) -> Option<T> {
        let position = self.position(packet_id, |stage| stage == Stage::Released)?;
        self.take(position)
    }

    /// A new connection. With the session of the last one, what is unanswered is sent again under
    /// its old id, and the answer is empty. Without it the remote knows no ids: what it had received
    /// is delivered and handed back, and the rest starts afresh.
    pub(crate) fn restart(&mut self, session_present: bool) -> Vec<T> {
        let mut delivered = Vec::new();
        for mut entry in std::mem::take(&mut self.entries) {
            match entry.stage {
                Stage::Releasing | Stage::Released if !session_present => {
                    self.taken.remove(&entry.packet_id);
                    self.under_way -= 1;
                    delivered.push(entry.item);
                    continue;
                }
                Stage::Sent => {
                    self.under_way -= 1;
                    entry.stage = Stage::Waiting {
                        again: session_present,
                    };
                }
                Stage::Waiting { again } => {
                    entry.stage = Stage::Waiting {
                        again: again && session_present,
                    };
                }
                Stage::Releasing | Stage::Released => {}
            }
            self.entries.push_back(entry);
        }
        delivered
    }

    /// The packet ids that PUBREL is owed for.
    pub(crate) fn owed_releases(&self) -> Vec<u16> {
        let released = self.entries.iter();
        released
            .filter(|entry| entry.stage == Stage::Released)
            .map(|entry| entry.packet_id)
            .collect()
    }

    /// Takes out the waiting messages that `unwanted` names.
    pub(crate) fn extract(&mut self, unwanted: impl Fn(&T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for entry in std::mem::take(&mut self.entries) {
            if matches!(entry.stage, Stage::Waiting { .. }) && unwanted(&entry.item) {
                self.taken.remove(&entry.packet_id);
                out.push(entry.item);
            } else {
                self.entries.push_back(entry);
            }
        }
        out
    }

    fn first_waiting(&self) -> Option<usize> {
        let mut entries = self.entries.iter();
        entries.position(|entry| matches!(entry.stage, Stage::Waiting { .. }))
    }

    fn position(&self, packet_id: u16, wanted: impl Fn(Stage) -> bool) -> Option<usize> {
        let mut entries = self.entries.iter();
        entries.position(|entry| entry.packet_id == packet_id && wanted(entry.stage))
    }

    fn take(&mut self, position: usize) -> Option<T> {
        let entry = self.entries.remove(position)?;
        self.taken.remove(&entry.packet_id);
        if !matches!(entry.stage, Stage::Waiting { .. }) {
            self.under_way -= 1;
        }
        Some(entry.item)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn send(outbox: &mut Outbox<u32>, window: usize) -> Vec<(u32, u16, bool)> {
        let mut sent = Vec::new();
        while let Some(next) = outbox.next(window) {
            sent.push((*next.item, next.packet_id, next.again));
            outbox.sent();
        }
        sent
    }

    fn pushed(items: impl IntoIterator<Item = u32>) -> Outbox<u32> {
        let mut outbox = Outbox::new();
        items
            .into_iter()
            .for_each(|item| outbox.push(item, 0, false));
        outbox
    }

    #[test]
    fn the_window_bounds_what_is_under_way_and_acks_come_in_any_order() {
        let mut outbox = pushed(1..=4);
        let sent = send(&mut outbox, 3);
        assert_eq!(sent, [(1, 1, false), (2, 2, false), (3, 3, false)]);
        assert_eq!(outbox.answered(9), None);
        assert_eq!(outbox.answered(2), Some(2));
        assert_eq!(send(&mut outbox, 3), [(4, 4, false)]);
        for (id, item) in [(1, 1), (4, 4), (3, 3)] {
            assert_eq!(outbox.answered(id), Some(item));
        }
        assert!(outbox.len() == 0 && outbox.is_idle());
    }

    #[test]
    fn a_resumed_session_gets_the_same_ids_again_and_a_new_one_starts_afresh() {
        let mut outbox = pushed(1..=3);
        send(&mut outbox, 2);
        assert!(outbox.restart(true).is_empty());
        assert_eq!(
            send(&mut outbox, 3),
            [(1, 1, true), (2, 2, true), (3, 3, false)]
        );
        assert!(outbox.restart(false).is_empty());
        let sent = send(&mut outbox, 3);
        assert_eq!(sent, [(1, 1, false), (2, 2, false), (3, 3, false)]);
    }

    #[test]
    fn what_was_received_is_released_and_never_sent_again() {
        let mut outbox = pushed(1..=2);
        send(&mut outbox, 2);
        assert_eq!(outbox.received(1), Received::PutDown(&1));
        assert_eq!(outbox.received(1), Received::Nothing);
        assert_eq!(outbox.completed(1), None, "it is not put down");
        assert!(outbox.released(1));
        assert_eq!(outbox.received(1), Received::Release);
        assert!(outbox.restart(true).is_empty());
        assert_eq!(outbox.owed_releases(), [1]);
        assert_eq!(send(&mut outbox, 2), [(2, 2, true)]);
        assert_eq!(outbox.answered(1), None);
        assert_eq!(outbox.completed(1), Some(1));
        assert_eq!(outbox.received(2), Received::PutDown(&2));
        // The session is gone, and it had received the message.
        assert_eq!(outbox.restart(false), [2]);
        assert!(outbox.len() == 0 && outbox.is_idle());
        assert!(!outbox.released(2));
    }

    /// A remote that keeps its session: what it received by id, and what it has delivered.
    #[derive(Default)]
    struct Remote {
        held: Vec<(u16, u32)>,
        delivered: Vec<u32>,
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push,
        Send,
        Receive(usize),
        PutDown,
        Release(usize),
        Lose,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Push),
            4 => Just(Step::Send),
            4 => (0..4_usize).prop_map(Step::Receive),
            3 => Just(Step::PutDown),
            3 => (0..4_usize).prop_map(Step::Release),
            1 => Just(Step::Lose),
        ]
    }

    proptest! {
        /// However connections are lost, a remote with a session gets each QoS 2 message once.
        #[test]
        fn qos_2_is_exactly_once_over_any_losses(
            steps in proptest::collection::vec(step(), 1..300),
        ) {
            const WINDOW: usize = 3;
            let mut outbox = Outbox::new();
            let mut next = 0;
            let mut remote = Remote::default();
            let mut wire: Vec<(u32, u16, bool)> = Vec::new();
            let mut releases: Vec<u16> = Vec::new();
            let mut being_put_down: Vec<u16> = Vec::new();
            let finish = [Step::Send, Step::Receive(0), Step::PutDown, Step::Release(0)];
            let steps = steps.into_iter().chain(finish.into_iter().cycle().take(4_000));
            for step in steps {
                match step {
                    Step::Push => {
                        let id = outbox.allocate();
                        outbox.push(next, id, false);
                        next += 1;
                    }
                    Step::Send => wire.extend(send(&mut outbox, WINDOW)),
                    Step::Receive(index) if index < wire.len() => {
                        let (item, id, again) = wire.remove(index);
                        let known = remote.held.iter().any(|(held, _)| *held == id);
                        prop_assert!(!known || again, "an id in use for a new message");
                        if !known {
                            remote.held.push((id, item));
                            remote.delivered.push(item);
                        }
                        match outbox.received(id) {
                            Received::PutDown(_) => being_put_down.push(id),
                            Received::Release => releases.push(id),
                            Received::Nothing => {}
                        }
                    }
                    Step::PutDown => {
                        for id in std::mem::take(&mut being_put_down) {
                            if outbox.released(id) {
                                releases.push(id);
                            }
                        }
                    }
                    Step::Release(index) if index < releases.len() => {
                        let id = releases.remove(index);
                        remote.held.retain(|(held, _)| *held != id);
                        outbox.completed(id);
                    }
                    Step::Receive(_) | Step::Release(_) => {}
                    Step::Lose => {
                        wire.clear();
                        prop_assert!(outbox.restart(true).is_empty());
                        releases = outbox.owed_releases();
                    }
                }
                prop_assert!(wire.len() <= WINDOW);
            }
            remote.delivered.sort_unstable();
            prop_assert_eq!(remote.delivered, (0..next).collect::<Vec<_>>());
            prop_assert_eq!(outbox.len(), 0);
        }
    }
}
