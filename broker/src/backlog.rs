//! What a subscription is owed besides what is published: retained messages, or a part of the history.

#[cfg(test)]
use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;

#[cfg(test)]
use selvedge_proto::message::Qos;

use crate::batch::Batch;

/// Messages owed to one queue, in order, a piece at a time.
pub trait Backlog: Debug + Send {
    /// The next messages, about `budget` bytes of them, and fewer rather than a long search.
    fn next(&mut self, budget: usize) -> Chunk;

    /// Whether all of it comes before what is published from now on, as a replay must.
    fn before_live(&self) -> bool;
}

/// A piece of a backlog.
#[derive(Debug, Default)]
pub struct Chunk {
    /// The messages; may be none although there are more.
    pub batches: Vec<Arc<Batch>>,
    /// Nothing comes after this.
    pub done: bool,
}

/// Messages that are already found, for the tests of who sends them.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Replayed {
    batches: VecDeque<Arc<Batch>>,
    max_qos: Qos,
}

#[cfg(test)]
impl Replayed {
    /// These messages, at no more than `max_qos`.
    pub(crate) fn new(batches: impl IntoIterator<Item = Arc<Batch>>, max_qos: Qos) -> Self {
        Self {
            batches: batches.into_iter().collect(),
            max_qos,
        }
    }
}

#[cfg(test)]
impl Backlog for Replayed {
    fn next(&mut self, budget: usize) -> Chunk {
        let mut chunk = Chunk::default();
        let mut bytes = 0;
        while bytes < budget
            && let Some(batch) = self.batches.pop_front()
        {
            bytes += batch.cost();
            chunk.batches.push(batch.at_most(self.max_qos));
        }
        chunk.done = self.batches.is_empty();
        chunk
    }

    fn before_live(&self) -> bool {
        true
    }
}
