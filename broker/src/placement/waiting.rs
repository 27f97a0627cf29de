//! Who waits for a slot of a model: bounded, by class, and within a class by deadline. Pure.

use std::collections::BTreeMap;
use std::time::Instant;

use selvedge_proto::message::Class;

#[cfg(test)]
mod tests;

/// A place in the queue. The smaller is served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    class: Class,
    due: Instant,
    /// Of equals the first that came.
    number: u64,
}

/// Requests that wait, the most urgent first: classes strictly in their order, and within a class the
/// earliest deadline first. A class waits for as long as there is any of a more urgent one; what is not
/// served by its deadline ends with it.
#[derive(Debug)]
pub struct Queue<T> {
    entries: BTreeMap<Place, T>,
    next: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            next: 0,
        }
    }
}

/// What became of a request that wanted to wait.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined<T> {
    /// It waits.
    Waits(Place),
    /// It waits, and this one, which was the last, does not any more.
    InsteadOf(Place, T),
    /// There is no room, and nobody is less urgent.
    Full,
}

impl<T> Queue<T> {
    /// Puts a request where it belongs, of `limit` at most. In a full queue it takes the place of the last
    /// one when it goes before that.
    pub fn join(&mut self, class: Class, due: Instant, value: T, limit: usize) -> Joined<T> {
        let place = Place {
            class,
            due,
            number: self.next,
        };
        let displaced = if self.entries.len() < limit {
            None
        } else {
            match self.entries.last_entry() {
                // Of its own class only who came later yields: or a shorter deadline would buy a place.
                Some(last) if last.key().class > class => Some(last.remove()),
                _ => return Joined::Full,
            }
        };
        self.next += 1;
        self.entries.insert(place, value);
        match displaced {
            Some(value) => Joined::InsteadOf(place, value),
            None => Joined::Waits(place),
        }
    }

    /// Takes one out, if it is still there.
    pub fn leave(&mut self, place: Place) -> Option<T> {
        self.entries.remove(&place)
    }

    /// How many are served before a request of this class and deadline.
    pub fn ahead(&self, class: Class, due: Instant) -> usize {
        let place = Place {
            class,
            due,
            number: self.next,
        };
        self.entries.range(..place).count()
    }

    /// Those who wait, the most urgent first.
    pub fn iter(&self) -> impl Iterator<Item = (Place, &T)> {
        self.entries.iter().map(|(place, value)| (*place, value))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
