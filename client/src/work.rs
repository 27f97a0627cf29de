//! Answering inferences: a registered model and the requests that come to it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use selvedge_proto::inference::{Residency, TensorSpec, Tier};
use selvedge_proto::status::Status;
use tokio::time::Instant;

use crate::call::CallError;

/// A model that this client runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRegistration {
    /// Name of the model.
    pub model: String,
    /// Its version.
    pub version: String,
    /// Where this worker runs.
    pub tier: Tier,
    /// Requests taken at once, at least 1: the broker never exceeds it.
    pub slots: u32,
    /// What the model takes.
    pub inputs: Vec<TensorSpec>,
    /// What the model gives.
    pub outputs: Vec<TensorSpec>,
    /// The model is in memory and ready to answer.
    pub loaded: bool,
    /// Measured time of one request, if known.
    pub service_time: Option<Duration>,
}

/// What changed at a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadReport {
    /// Requests taken at once; zero takes the worker out of the choice.
    pub slots: u32,
    /// The model is in memory and ready to answer.
    pub loaded: bool,
    /// Measured time of one request, if known.
    pub service_time: Option<Duration>,
    /// Requests that wait at the worker.
    pub queue_depth: u32,
}

/// Why a model was not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError {
    /// The broker refused it.
    #[error("the broker refused the model: {0}")]
    Refused(Status),
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}

/// A registered model: a stream of requests. Dropping it withdraws the model.
#[derive(Debug)]
pub struct WorkerHandle {}

impl WorkerHandle {
    /// The next request, or `None` when the client is closed or the broker refused the model
    /// after a reconnect.
    pub async fn next(&mut self) -> Option<IncomingInference> {
        todo!()
    }

    /// Tells the broker what changed. Never waits; of several reports only the last may be sent.
    pub fn report(&self, _report: LoadReport) {
        todo!()
    }
}

impl Stream for WorkerHandle {
    type Item = IncomingInference;

    fn poll_next(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<IncomingInference>> {
        todo!()
    }
}

/// What a worker says about its answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AnswerInfo {
    /// How sure the model is, 0 to 1, if it says so.
    pub confidence: Option<f32>,
    /// Time the request waited at the worker.
    pub queue: Duration,
    /// Time the model took.
    pub compute: Duration,
    /// What the model says besides.
    pub parameters: Vec<(String, String)>,
}

/// An inference to answer. Dropping it without [`finish`](Self::finish), [`reply`](Self::reply) or
/// [`fail`](Self::fail) ends it with INTERNAL.
#[derive(Debug)]
pub struct IncomingInference {}

impl IncomingInference {
    /// The model asked for.
    pub fn model(&self) -> &str {
        todo!()
    }

    /// The version asked for; empty for any.
    pub fn version(&self) -> &str {
        todo!()
    }

    /// Names the request across escalation and repetition.
    pub fn request_id(&self) -> &str {
        todo!()
    }

    /// When the requester stops waiting.
    pub fn deadline(&self) -> Instant {
        todo!()
    }

    /// How far the payload may travel.
    pub fn residency(&self) -> Residency {
        todo!()
    }

    /// Identity URI of the requester as the broker verified it.
    pub fn caller(&self) -> &str {
        todo!()
    }

    /// Parameters that the requester set.
    pub fn parameters(&self) -> &[(String, String)] {
        todo!()
    }

    /// Confidence below which the requester wants a cloud worker asked.
    pub fn min_confidence(&self) -> Option<f32> {
        todo!()
    }

    /// W3C trace context of the requester; empty when not given.
    pub fn traceparent(&self) -> &str {
        todo!()
    }

    /// The next message of the request, or `None` at its end.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        todo!()
    }

    /// The payload of a request with exactly one message.
    ///
    /// # Errors
    /// The request has ended, or has no message or more than one.
    pub async fn request(&mut self) -> Result<Bytes, CallError> {
        todo!()
    }

    /// Says who answers and how sure it is; once, before the first message.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn answer(&mut self, _info: AnswerInfo) -> Result<(), CallError> {
        todo!()
    }

    /// Sends one message of the answer; an empty [`AnswerInfo`] goes first if none was sent.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn send(&mut self, _message: impl Into<Bytes>) -> Result<(), CallError> {
        todo!()
    }

    /// Ends the answer well.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn finish(self) -> Result<(), CallError> {
        todo!()
    }

    /// Answers with one message.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn reply(
        self,
        _info: AnswerInfo,
        _message: impl Into<Bytes>,
    ) -> Result<(), CallError> {
        todo!()
    }

    /// Ends the request with a status.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn fail(self, _status: Status) -> Result<(), CallError> {
        todo!()
    }

    /// Resolves when the requester gave up, the deadline passed or the connection was lost.
    pub async fn cancelled(&self) {
        todo!()
    }
}
