//! Dynamic batching: requests that come at nearly the same time are computed as one.
//!
//! The first request opens a batch and waits for others, for the delay at most. Requests whose inputs differ
//! in no more than the first dimension join, until the batch is full. Each gets its own rows of the answer and
//! its own confidence.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use parking_lot::{Condvar, Mutex};

use crate::config::Batching;
use crate::model::{
    CancelFlag, ConfidenceRule, Dim, Inference, Model, ModelError, Signature, Tensor,
};

#[cfg(test)]
mod tests;

/// A model that is asked in batches.
pub struct Batched {
    model: Arc<dyn Model>,
    confidence: Option<ConfidenceRule>,
    most: usize,
    delay: Duration,
    open: Mutex<Option<Open>>,
    /// A batch has as many rows as it may.
    full: Condvar,
}

/// The model cannot be asked in batches.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "batch: expected every input and output to have the same variable first dimension, found `{tensor}` with {found}: \
     leave out `batch` for this model"
)]
pub struct NoBatches {
    /// An input or output.
    pub tensor: String,
    /// Its first dimension.
    pub found: String,
}

type Answer = Result<Inference, ModelError>;

/// A request in a batch.
struct Member {
    inputs: Vec<Tensor>,
    rows: usize,
    cancelled: CancelFlag,
    reply: SyncSender<Answer>,
}

/// A batch that others may join.
struct Open {
    members: Vec<Member>,
    rows: usize,
}

impl Batched {
    /// Asks `model` in batches of up to `batching.max` rows. `confidence` is how sure the answer to one request
    /// is; that of the model itself is over whole batches.
    ///
    /// # Errors
    /// An input or output has no variable first dimension, or another one than the others.
    pub fn new(
        model: Arc<dyn Model>,
        confidence: Option<ConfidenceRule>,
        batching: Batching,
    ) -> Result<Self, NoBatches> {
        let signature = model.signature();
        let mut batch: Option<&str> = None;
        for spec in signature.inputs.iter().chain(&signature.outputs) {
            let refuse = |found: String| NoBatches {
                tensor: spec.name.clone(),
                found,
            };
            match spec.shape.first() {
                Some(Dim::Any(name)) if batch.is_none_or(|batch| batch == name) => {
                    batch = Some(name);
                }
                Some(other) => return Err(refuse(other.to_string())),
                None => return Err(refuse("no dimension".to_owned())),
            }
        }
        Ok(Self {
            model,
            confidence,
            most: batching.max.get(),
            delay: batching.delay,
            open: Mutex::new(None),
            full: Condvar::new(),
        })
    }

    /// Joins the batch that is open. Without one, opens it, waits for others and computes it. A request that
    /// does not fit the one that is open is computed alone.
    fn enter(&self, member: Member) {
        let mut open = self.open.lock();
        match &mut *open {
            Some(batch) if batch.takes(&member, self.most) => {
                batch.rows += member.rows;
                batch.members.push(member);
                if batch.rows == self.most {
                    self.full.notify_all();
                }
                return;
            }
            None if member.rows < self.most => {}
            _ => {
                drop(open);
                return self.compute(vec![member]);
            }
        }
        *open = Some(Open {
            rows: member.rows,
            members: vec![member],
        });
        let until = Instant::now() + self.delay;
        while open.as_ref().is_some_and(|batch| batch.rows < self.most)
            && !self.full.wait_until(&mut open, until).timed_out()
        {}
        // Only who opened a batch takes it out.
        let batch = open.take();
        drop(open);
        self.compute(batch.map(|batch| batch.members).unwrap_or_default());
    }

    fn compute(&self, mut members: Vec<Member>) {
        members.retain(|member| {
            let gone = member.cancelled.is_cancelled();
            if gone {
                // Nobody may wait for it any more.
                let _ = member.reply.try_send(Err(ModelError::Cancelled));
            }
            !gone
        });
        if members.len() > 1
            && let Ok(answers) = self.together(&members)
        {
            for (member, answer) in members.iter().zip(answers) {
                let _ = member.reply.try_send(answer);
            }
            return;
        }
        // One that fails must not fail the others.
        for Member {
            inputs,
            cancelled,
            reply,
            ..
        } in members
        {
            let _ = reply.try_send(self.model.infer(inputs, &cancelled));
        }
    }

    /// The answers of a batch, or why it has to be computed one by one.
    fn together(&self, members: &[Member]) -> Result<Vec<Answer>, ModelError> {
        let rows: Vec<usize> = members.iter().map(|member| member.rows).collect();
        let parts: Vec<&[Tensor]> = members.iter().map(|member| &member.inputs[..]).collect();
        let inputs = concatenate(&parts)?;
        let whole = self.model.infer(inputs, &CancelFlag::new())?;
        let answers = split(&whole.outputs, &rows)?;
        Ok(answers
            .into_iter()
            .map(|outputs| {
                let confidence = match &self.confidence {
                    Some(rule) => rule.measure(&outputs)?,
                    None => None,
                };
                Ok(Inference {
                    outputs,
                    confidence,
                })
            })
            .collect())
    }
}

impl Model for Batched {
    fn signature(&self) -> &Signature {
        self.model.signature()
    }

    fn infer(&self, inputs: Vec<Tensor>, cancelled: &CancelFlag) -> Answer {
        // One that does not fit is refused before it is with others.
        let inputs = self.signature().arrange(inputs)?;
        let rows = inputs
            .first()
            .and_then(|input| input.shape().first().copied())
            .unwrap_or_default();
        if rows == 0 {
            return self.model.infer(inputs, cancelled);
        }
        let (reply, answer): (_, Receiver<Answer>) = sync_channel(1);
        let member = Member {
            inputs,
            rows,
            cancelled: cancelled.clone(),
            reply,
        };
        self.enter(member);
        // Whoever computes the batch answers every member, unless the model panics.
        answer
            .recv()
            .unwrap_or_else(|_| Err(ModelError::Failed("the model panicked".to_owned())))
    }
}

impl fmt::Debug for Batched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batched")
            .field("most", &self.most)
            .field("delay", &self.delay)
            .finish_non_exhaustive()
    }
}

impl Open {
    fn takes(&self, member: &Member, most: usize) -> bool {
        let fits = |a: &Tensor, b: &Tensor| {
            a.datatype() == b.datatype() && a.shape().get(1..) == b.shape().get(1..)
        };
        self.rows + member.rows <= most
            && self.members.first().is_some_and(|first| {
                let pairs = first.inputs.iter().zip(&member.inputs);
                pairs.into_iter().all(|(a, b)| fits(a, b))
            })
    }
}

/// Puts the inputs of several requests below each other, which have the same inputs in the same order, and
/// differ in the first dimension only.
fn concatenate(parts: &[&[Tensor]]) -> Result<Vec<Tensor>, ModelError> {
    let first = parts.first().copied().unwrap_or_default();
    let joined = first.iter().enumerate().map(|(place, input)| {
        let mut data = BytesMut::new();
        let mut shape = input.shape().to_vec();
        if let Some(rows) = shape.first_mut() {
            *rows = 0;
        }
        for tensor in parts.iter().filter_map(|part| part.get(place)) {
            data.extend_from_slice(tensor.data());
            if let (Some(rows), Some(more)) = (shape.first_mut(), tensor.shape().first()) {
                *rows += more;
            }
        }
        Tensor::new(input.name(), input.datatype(), shape, data.freeze())
            .map_err(|error| ModelError::Failed(error.to_string()))
    });
    joined.collect()
}

/// Gives each request its rows of the outputs.
fn split(outputs: &[Tensor], rows: &[usize]) -> Result<Vec<Vec<Tensor>>, ModelError> {
    let total: usize = rows.iter().sum();
    let mut answers: Vec<Vec<Tensor>> = rows.iter().map(|_| Vec::new()).collect();
    for output in outputs {
        if output.shape().first() != Some(&total) {
            return Err(ModelError::Failed(format!(
                "output `{}` was expected to have {total} rows for as many of the inputs, and has the shape {:?}",
                output.name(),
                output.shape()
            )));
        }
        let row = output.data().len() / total.max(1);
        let mut from = 0;
        for (answer, &rows) in answers.iter_mut().zip(rows) {
            let to = from + rows * row;
            let mut shape = output.shape().to_vec();
            shape[0] = rows;
            let part = Tensor::new(
                output.name(),
                output.datatype(),
                shape,
                output.data().slice(from..to),
            );
            answer.push(part.map_err(|error| ModelError::Failed(error.to_string()))?);
            from = to;
        }
    }
    Ok(answers)
}
