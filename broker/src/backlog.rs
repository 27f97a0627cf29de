//! What a subscription is owed besides what is published: retained messages, or a part of the history.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;

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

/// Messages of the history, already found.
#[derive(Debug)]
pub struct Replayed {
    batches: VecDeque<Arc<Batch>>,
    max_qos: Qos,
}

impl Replayed {
    /// These messages, at no more than `max_qos`.
    pub fn new(batches: impl IntoIterator<Item = Arc<Batch>>, max_qos: Qos) -> Self {
        Self {
            batches: batches.into_iter().collect(),
            max_qos,
        }
    }
}

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
