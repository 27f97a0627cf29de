//! QoS 1 and 2 messages on their way to one client: acknowledgements in any order.

use std::collections::VecDeque;

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
