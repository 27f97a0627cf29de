//! Answering inferences: a registered model and the requests that come to it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::inference::{Residency, TensorSpec, Tier};
use selvedge_proto::message::{from_wire_properties, to_wire_properties};
use selvedge_proto::status::Status;
use selvedge_proto::wire;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::call::CallError;
use crate::client::Client;
use crate::control::{Refusal, Registration, Sink, micros};
use crate::exchange::Exchange;
use crate::serve::waiting;

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
    /// Every worker that says so answers the same request to this version with the same messages, those of
    /// a stream too: with the same request id, what is drawn by lot is the same. When one is lost midway,
    /// another goes on with an idempotent request's answer.
    pub continues: bool,
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

impl From<Refusal> for WorkError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Status(status) => Self::Refused(status),
            Refusal::Closed(reason) => Self::Closed(reason),
        }
    }
}

impl ModelRegistration {
    fn into_wire(self) -> wire::Work {
        wire::Work {
            request_id: 0,
            id: 0,
            model: self.model,
            version: self.version,
            tier: self.tier.to_wire(),
            slots: self.slots.max(1),
            inputs: self.inputs.into_iter().map(Into::into).collect(),
            outputs: self.outputs.into_iter().map(Into::into).collect(),
            loaded: self.loaded,
            service_time_us: self.service_time.map_or(0, micros),
            continues: self.continues,
        }
    }
}

/// A registered model: a stream of requests. Dropping it withdraws the model.
#[derive(Debug)]
pub struct WorkerHandle {
    requests: mpsc::Receiver<IncomingInference>,
    id: u32,
    client: Client,
}

impl WorkerHandle {
    pub(crate) async fn register(
        client: &Client,
        registration: ModelRegistration,
    ) -> Result<Self, WorkError> {
        // The broker never has more outstanding than the slots granted last, which may grow.
        let (sender, requests) = mpsc::channel(waiting(registration.slots).max(SLOTS_TO_GROW));
        let kind = Registration::Work(registration.into_wire(), 0);
        let control = &client.shared().control;
        let (id, answer) = control.register(kind, Sink::Inferences(sender))?;
        // Withdraws the model if the wait is given up.
        let handle = Self {
            requests,
            id,
            client: client.clone(),
        };
        match answer.await {
            Ok(Ok(())) => Ok(handle),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(WorkError::Closed(client.shared().end_reason())),
        }
    }

    /// The next request, or `None` when the client is closed or the broker refused the model
    /// after a reconnect.
    pub async fn next(&mut self) -> Option<IncomingInference> {
        self.requests.recv().await
    }

    /// Tells the broker what changed. Never waits; of several reports only the last may be sent.
    pub fn report(&self, report: LoadReport) {
        self.client.shared().control.report(self.id, report);
    }
}

/// Requests that may wait to be taken at least, for when more slots are granted later. Beyond the
/// bound a request is answered with RESOURCE_EXHAUSTED.
const SLOTS_TO_GROW: usize = 64;

impl Stream for WorkerHandle {
    type Item = IncomingInference;

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<IncomingInference>> {
        self.get_mut().requests.poll_recv(context)
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.client.shared().control.withdraw(self.id);
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
pub struct IncomingInference {
    header: wire::InferHeader,
    parameters: Vec<(String, String)>,
    residency: Residency,
    answered: bool,
    /// Messages that the requester has already.
    left_out: u64,
    exchange: Exchange,
}

impl IncomingInference {
    pub(crate) fn new(mut header: wire::InferHeader, exchange: Exchange) -> Self {
        Self {
            parameters: from_wire_properties(std::mem::take(&mut header.parameters)),
            // A residency that this revision does not know is taken as the narrowest.
            residency: Residency::from_wire(header.residency).unwrap_or(Residency::Site),
            answered: false,
            left_out: header.resume_from,
            header,
            exchange,
        }
    }

    /// The model asked for.
    pub fn model(&self) -> &str {
        &self.header.model
    }

    /// The version asked for; empty for any.
    pub fn version(&self) -> &str {
        &self.header.version
    }

    /// Names the request across escalation and repetition.
    pub fn request_id(&self) -> &str {
        &self.header.request_id
    }

    /// Messages of the answer that the requester has from a worker that was lost; zero for a request from
    /// its beginning. The answer is given from its beginning all the same, and [`Self::send`] leaves them out.
    pub fn resume_from(&self) -> u64 {
        self.header.resume_from
    }

    /// When the requester stops waiting.
    pub fn deadline(&self) -> Instant {
        self.exchange.deadline()
    }

    /// How far the payload may travel.
    pub fn residency(&self) -> Residency {
        self.residency
    }

    /// Identity URI of the requester as the broker verified it.
    pub fn caller(&self) -> &str {
        &self.header.caller
    }

    /// Parameters that the requester set.
    pub fn parameters(&self) -> &[(String, String)] {
        &self.parameters
    }

    /// Confidence below which the requester wants a cloud worker asked.
    pub fn min_confidence(&self) -> Option<f32> {
        self.header.min_confidence
    }

    /// W3C trace context of the requester; empty when not given.
    pub fn traceparent(&self) -> &str {
        &self.header.traceparent
    }

    /// The next message of the request, or `None` at its end.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        self.exchange.next().await
    }

    /// The payload of a request with exactly one message.
    ///
    /// # Errors
    /// The request has ended, or has no message or more than one.
    pub async fn request(&mut self) -> Result<Bytes, CallError> {
        self.exchange.request().await
    }

    /// Says how sure the model is and how long it took; once, before the first message. Said
    /// again, it changes nothing.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn answer(&mut self, info: AnswerInfo) -> Result<(), CallError> {
        if self.answered {
            return Ok(());
        }
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let answer = wire::InferAnswer {
            model: self.header.model.clone(),
            version: self.header.version.clone(),
            confidence: info.confidence,
            queue_us: micros(info.queue),
            compute_us: micros(info.compute),
            parameters: to_wire_properties(info.parameters),
            ..wire::InferAnswer::default()
        };
        let frame = frame::encode(Kind::ANSWER, &answer);
        self.exchange.send_header(frame).await?;
        self.answered = true;
        Ok(())
    }

    /// Sends one message of the answer; an empty [`AnswerInfo`] goes first if none was sent.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn send(&mut self, message: impl Into<Bytes>) -> Result<(), CallError> {
        self.answer(AnswerInfo::default()).await?;
        if self.left_out > 0 {
            self.left_out -= 1;
            return Ok(());
        }
        self.exchange.send(message.into()).await
    }

    /// Ends the answer well.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn finish(mut self) -> Result<(), CallError> {
        self.answer(AnswerInfo::default()).await?;
        self.exchange.end(Status::ok()).await
    }

    /// Answers with one message.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn reply(
        mut self,
        info: AnswerInfo,
        message: impl Into<Bytes>,
    ) -> Result<(), CallError> {
        self.answer(info).await?;
        self.send(message).await?;
        self.finish().await
    }

    /// Ends the request with a status.
    ///
    /// # Errors
    /// The request has ended.
    pub async fn fail(self, status: Status) -> Result<(), CallError> {
        self.exchange.end(status).await
    }

    /// Resolves when the requester gave up, the deadline passed or the connection was lost.
    pub async fn cancelled(&self) {
        self.exchange.cancelled().await;
    }
}
