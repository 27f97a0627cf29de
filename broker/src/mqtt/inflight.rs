//! QoS 1 messages on their way to one client: packet ids out, acknowledgements in any order.

use std::collections::VecDeque;

/// Packet ids in use, each with what it stands for. Ids are small numbers that are used again in
/// the order they became free.
#[derive(Debug)]
pub(crate) struct PacketIds<T> {
    /// What the id `index + 1` stands for. Grows up to `limit`.
    slots: Vec<Option<T>>,
    free: VecDeque<u16>,
    limit: u16,
}

impl<T> PacketIds<T> {
    /// At most `limit` ids in use at once.
    pub(crate) fn new(limit: u16) -> Self {
        Self {
            slots: Vec::new(),
            free: VecDeque::new(),
            limit,
        }
    }

    /// Whether every id is in use.
    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= self.limit.into()
    }

    /// An id for `value`, or `None` when every id is in use.
    pub(crate) fn insert(&mut self, value: T) -> Option<u16> {
        if self.is_full() {
            return None;
        }
        let id = match self.free.pop_front() {
            Some(id) => id,
            None => {
                self.slots.push(None);
                u16::try_from(self.slots.len()).ok()?
            }
        };
        self.slots[usize::from(id) - 1] = Some(value);
        Some(id)
    }

    /// Frees an id; `None` when it is not in use.
    pub(crate) fn remove(&mut self, id: u16) -> Option<T> {
        let slot = self.slots.get_mut(usize::from(id).checked_sub(1)?)?;
        let value = slot.take()?;
        self.free.push_back(id);
        Some(value)
    }
}

/// The numbered messages of one queue. A queue wants to know up to which number everything has
/// arrived; clients acknowledge each message, in any order.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    /// Everything up to here has been acknowledged.
    done: u64,
    /// For each number after `done`, whether it has been acknowledged. As long as what is in flight.
    later: VecDeque<bool>,
}

impl Numbers {
    /// The number of the next message.
    pub(crate) fn issue(&mut self) -> u64 {
        self.later.push_back(false);
        self.done + self.later.len() as u64
    }

    /// Notes an acknowledgement. The answer is how far everything has arrived, if it grew.
    pub(crate) fn acknowledge(&mut self, number: u64) -> Option<u64> {
        let index = usize::try_from(number.checked_sub(self.done + 1)?).ok()?;
        *self.later.get_mut(index)? = true;
        let before = self.done;
        while self.later.front() == Some(&true) {
            self.later.pop_front();
            self.done += 1;
        }
        (self.done > before).then_some(self.done)
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.later.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_bounded_and_come_round_in_order() {
        let mut ids = PacketIds::new(2);
        assert_eq!(ids.insert('a'), Some(1));
        assert_eq!(ids.insert('b'), Some(2));
        assert_eq!((ids.insert('c'), ids.is_full()), (None, true));
        assert_eq!((ids.remove(0), ids.remove(3)), (None, None));
        assert_eq!(ids.remove(2), Some('b'));
        assert_eq!(ids.remove(2), None);
        assert_eq!(ids.remove(1), Some('a'));
        assert_eq!(ids.insert('d'), Some(2));
        assert_eq!(ids.insert('e'), Some(1));
    }

    proptest! {
        #[test]
        fn whatever_the_order_the_last_acknowledgement_completes_everything(
            order in Just((1..=40u64).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let mut numbers = Numbers::default();
            for expected in 1..=40 {
                prop_assert_eq!(numbers.issue(), expected);
            }
            let mut seen = std::collections::BTreeSet::new();
            let mut done = 0;
            for number in order {
                seen.insert(number);
                if let Some(upto) = numbers.acknowledge(number) {
                    done = upto;
                }
                let contiguous = (1..=40).take_while(|n| seen.contains(n)).count() as u64;
                prop_assert_eq!(done, contiguous);
            }
            prop_assert!(numbers.is_idle());
            prop_assert_eq!(numbers.acknowledge(40), None);
            prop_assert_eq!(numbers.acknowledge(41), None);
        }
    }
}
