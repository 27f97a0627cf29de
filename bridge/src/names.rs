//! The names of messages that were carried out exactly once, so that what the fabric delivers again is
//! known.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::journal::{Op, Space};
use crate::spool::Place;

/// Names remembered for one remote; the oldest are forgotten first. As many as a client of the fabric
/// remembers, and more than the fabric delivers again.
const WINDOW: usize = 65_536;

/// The names of one remote. A cheap handle.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    numbers: HashMap<Bytes, u64>,
    order: BTreeMap<u64, Bytes>,
}

impl Names {
    /// The number under which a message of this name was taken.
    pub(crate) fn number(&self, name: &Bytes) -> Option<u64> {
        self.with(|state| state.numbers.get(name).copied())
    }

    /// A name from the journal.
    pub(crate) fn restore(&self, number: u64, name: &[u8]) {
        let name = Bytes::copy_from_slice(name);
        self.with(|state| {
            state.numbers.insert(name.clone(), number);
            state.order.insert(number, name);
        });
    }

    /// Remembers a message; the answer is what the journal is to be told.
    pub(crate) fn add(&self, place: &Place, number: u64, name: &Bytes) -> Vec<Op> {
        let oldest = self.with(|state| {
            state.numbers.insert(name.clone(), number);
            state.order.insert(number, name.clone());
            let (oldest, name) = match state.order.len() > WINDOW {
                true => state.order.pop_first()?,
                false => return None,
            };
            if state.numbers.get(&name) == Some(&oldest) {
                state.numbers.remove(&name);
            }
            Some(oldest)
        });
        let put = Op::Put(place.key(Space::Names, number), name.to_vec());
        let forget = oldest.map(|oldest| Op::Remove(place.key(Space::Names, oldest)));
        std::iter::once(put).chain(forget).collect()
    }

    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_oldest_names_are_forgotten_in_memory_and_in_the_journal() {
        let place = Place {
            remote: "r".into(),
            space: Space::Out,
            journal: None,
            limit: 0,
        };
        let names = Names::default();
        names.restore(0, b"0");
        let name = |number: u64| Bytes::from(number.to_string());
        for number in 1..WINDOW as u64 {
            assert_eq!(names.add(&place, number, &name(number)).len(), 1);
        }
        assert_eq!(names.number(&name(0)), Some(0));
        let last = WINDOW as u64;
        let ops = names.add(&place, last, &name(last));
        assert!(
            matches!(&ops[..], [Op::Put(put, _), Op::Remove(gone)]
                if put.number == last && gone.number == 0),
            "{ops:?}"
        );
        assert_eq!(names.number(&name(0)), None);
        assert_eq!(names.number(&name(last)), Some(last));
    }
}
