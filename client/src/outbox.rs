//! The QoS 1 messages of one publish lane that the broker has not answered yet.

use std::collections::VecDeque;

/// Unanswered messages in the order they were published, numbered as the lane numbers them.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    /// The number of the first slot.
    first: u64,
    /// `None` for a message that is answered while one before it is not.
    slots: VecDeque<Option<Slot<T>>>,
    /// Messages that are not answered.
    len: usize,
    /// Their bytes.
    bytes: usize,
}

#[derive(Debug)]
struct Slot<T> {
    item: T,
    bytes: usize,
    sent: bool,
}

/// Whether a message was sent on an earlier connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Never.
    No,
    /// It may have arrived.
    Before,
}

impl<T> Outbox<T> {
    pub(crate) fn new() -> Self {
        Self {
            first: 1,
            slots: VecDeque::new(),
            len: 0,
            bytes: 0,
        }
    }

    /// Messages that are not answered.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether `more` bytes fit under `limit`. One message always fits into an empty outbox, so
    /// that the bound cannot make a message impossible to send.
    pub(crate) fn has_room(&self, more: usize, limit: usize) -> bool {
        self.len == 0 || self.bytes.saturating_add(more) <= limit
    }

    /// Adds a message. `sent` says that it goes out on the current connection.
    pub(crate) fn push(&mut self, item: T, bytes: usize, sent: bool) {
        self.slots.push_back(Some(Slot { item, bytes, sent }));
        self.len += 1;
        self.bytes += bytes;
    }

    /// The broker has answered the numbers `first..=last`; each message among them that was not
    /// answered before is handed out, in order. Numbers never sent are ignored.
    pub(crate) fn answer(&mut self, first: u64, last: u64, mut out: impl FnMut(T)) {
        let end = self.first + self.slots.len() as u64;
        let from = first.max(self.first);
        let to = last.saturating_add(1).min(end);
        for number in from..to {
            let index = (number - self.first) as usize;
            if let Some(slot) = self.slots[index].take() {
                self.len -= 1;
                self.bytes -= slot.bytes;
                out(slot.item);
            }
        }
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
    }

    /// A new connection: numbers start at 1 again, with the unanswered messages in order. Each is
    /// shown to `send`; one that it returns `false` for is handed out instead of kept.
    pub(crate) fn restart(&mut self, mut send: impl FnMut(&T, Sent) -> bool) -> Vec<T> {
        let mut rejected = Vec::new();
        let slots = std::mem::take(&mut self.slots);
        self.first = 1;
        for mut slot in slots.into_iter().flatten() {
            let sent = if slot.sent { Sent::Before } else { Sent::No };
            if send(&slot.item, sent) {
                slot.sent = true;
                self.slots.push_back(Some(slot));
            } else {
                self.len -= 1;
                self.bytes -= slot.bytes;
                rejected.push(slot.item);
            }
        }
        rejected
    }

    /// Hands out everything that is left.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        std::mem::replace(self, Self::new())
            .slots
            .into_iter()
            .flatten()
            .map(|slot| slot.item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Publish { bytes: usize, sent: bool },
        Answer { first: u64, last: u64 },
        Reconnect,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..100, any::<bool>()).prop_map(|(bytes, sent)| Step::Publish { bytes, sent }),
            3 => (0u64..30, 0u64..30).prop_map(|(first, last)| Step::Answer { first, last }),
            1 => Just(Step::Reconnect),
        ]
    }

    /// What the outbox is to be: a list of every message with its number on this connection.
    #[derive(Default)]
    struct Model {
        messages: Vec<(u64, u32, usize, bool)>,
        next: u64,
    }

    proptest! {
        #[test]
        fn it_does_what_a_plain_list_does(steps in proptest::collection::vec(step(), 0..120)) {
            let mut outbox = Outbox::new();
            let mut model = Model { next: 1, ..Model::default() };
            for (name, step) in steps.into_iter().enumerate() {
                let name = name as u32;
                match step {
                    Step::Publish { bytes, sent } => {
                        outbox.push(name, bytes, sent);
                        model.messages.push((model.next, name, bytes, sent));
                        model.next += 1;
                    }
                    Step::Answer { first, last } => {
                        let mut answered = Vec::new();
                        outbox.answer(first, last, |item| answered.push(item));
                        let hit = |m: &(u64, u32, usize, bool)| (first..=last).contains(&m.0);
                        let expected: Vec<_> =
                            model.messages.iter().filter(|m| hit(m)).map(|m| m.1).collect();
                        model.messages.retain(|m| !hit(m));
                        prop_assert_eq!(answered, expected);
                    }
                    Step::Reconnect => {
                        let mut seen = Vec::new();
                        outbox.restart(|&item, sent| {
                            seen.push((item, sent == Sent::Before));
                            true
                        });
                        let expected: Vec<_> = model.messages.iter().map(|m| (m.1, m.3)).collect();
                        prop_assert_eq!(seen, expected);
                        for (index, message) in model.messages.iter_mut().enumerate() {
                            message.0 = index as u64 + 1;
                            message.3 = true;
                        }
                        model.next = model.messages.len() as u64 + 1;
                    }
                }
                prop_assert_eq!(outbox.len(), model.messages.len());
                let bytes: usize = model.messages.iter().map(|m| m.2).sum();
                prop_assert!(outbox.has_room(0, bytes));
                prop_assert_eq!(outbox.has_room(1, bytes), model.messages.is_empty());
            }
            let left: Vec<_> = outbox.drain().collect();
            let expected: Vec<_> = model.messages.iter().map(|m| m.1).collect();
            prop_assert_eq!(left, expected);
        }
    }

    #[test]
    fn a_message_that_cannot_be_sent_again_is_handed_out_and_takes_no_number() {
        let mut outbox = Outbox::new();
        for item in ["a", "b", "c"] {
            outbox.push(item, 1, true);
        }
        assert_eq!(outbox.restart(|item, _| *item != "b"), ["b"]);
        let mut answered = Vec::new();
        outbox.answer(2, 2, |item| answered.push(item));
        assert_eq!(answered, ["c"]);
        outbox.answer(0, u64::MAX, |item| answered.push(item));
        assert_eq!(answered, ["c", "a"]);
    }
}
