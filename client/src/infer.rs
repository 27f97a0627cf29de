//! Asking for an inference: the fabric chooses the worker.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use selvedge_proto::frame::{self, FrameError, Kind};
use selvedge_proto::inference::{
    Preference, Residency, Tensor, Tier, decode_tensors, encode_tensors,
};

use selvedge_proto::message::{Class, from_wire_properties, to_wire_properties};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;
use tokio::time::Instant;

use crate::call::{CallError, CallStream, DEFAULT_DEADLINE, deadline_in};
use crate::client::Client;

/// An inference to ask for.
#[derive(Debug, Clone)]
pub struct Infer {
    pub(crate) model: String,
    pub(crate) version: String,
    pub(crate) payload: Bytes,
    pub(crate) deadline: Duration,
    pub(crate) residency: Residency,
    pub(crate) preference: Preference,
    pub(crate) min_confidence: Option<f32>,
    pub(crate) idempotent: bool,
    pub(crate) parameters: Vec<(String, String)>,
    pub(crate) request_id: String,
    pub(crate) traceparent: String,
    pub(crate) class: Class,
    pub(crate) routing_key: String,
}

impl Infer {
    /// A request to any version of a model, with an empty payload, a deadline of 30 s, residency
    /// tenant and preference fastest.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            version: String::new(),
            payload: Bytes::new(),
            deadline: DEFAULT_DEADLINE,
            residency: Residency::Tenant,
            preference: Preference::Fastest,
            min_confidence: None,
            idempotent: false,
            parameters: Vec::new(),
            request_id: String::new(),
            traceparent: String::new(),
            class: Class::Normal,
            routing_key: String::new(),
        }
    }

    /// Who goes first when requests wait for a worker: those of a more urgent class, and within a class those
    /// with the earlier deadline. Default: normal.
    #[must_use]
    pub fn class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    /// The payload is these tensors.
    #[must_use]
    pub fn tensors(mut self, tensors: Vec<Tensor>) -> Self {
        self.payload = encode_tensors(tensors);
        self
    }

    /// The payload is these bytes.
    #[must_use]
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.payload = payload.into();
        self
    }

    /// Only this version of the model will do.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// How long the answer may take. Default: 30 s.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How far the payload may travel. Default: within the tenant.
    #[must_use]
    pub fn residency(mut self, residency: Residency) -> Self {
        self.residency = residency;
        self
    }

    /// Requests with the same key, of up to 128 bytes, go to the same worker while it has room, for what it keeps
    /// from one to the next. Default: any worker.
    #[must_use]
    pub fn routing_key(mut self, key: impl Into<String>) -> Self {
        self.routing_key = key.into();
        self
    }

    /// Which worker to favour. Default: the fastest.
    #[must_use]
    pub fn preference(mut self, preference: Preference) -> Self {
        self.preference = preference;
        self
    }

    /// Ask a cloud worker when an edge worker is less confident than this, 0 to 1.
    #[must_use]
    pub fn min_confidence(mut self, confidence: f32) -> Self {
        self.min_confidence = Some(confidence);
        self
    }

    /// The request may be made again when a worker or the connection is lost. Default: false.
    #[must_use]
    pub fn idempotent(mut self, idempotent: bool) -> Self {
        self.idempotent = idempotent;
        self
    }

    /// Adds a parameter for the model.
    #[must_use]
    pub fn parameter(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.parameters.push((name.into(), value.into()));
        self
    }

    /// Names the request in the answer and in logs. Default: the broker chooses.
    #[must_use]
    pub fn request_id(mut self, id: impl Into<String>) -> Self {
        self.request_id = id.into();
        self
    }

    /// W3C trace context, the value of `traceparent`.
    #[must_use]
    pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
        self.traceparent = traceparent.into();
        self
    }
}

/// Who answered, how sure it is, and why it was asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The model.
    pub model: String,
    /// Its version.
    pub version: String,
    /// How sure the model is, 0 to 1, if it says so.
    pub confidence: Option<f32>,
    /// Time the request waited at the worker.
    pub queue: Duration,
    /// Time the model took.
    pub compute: Duration,
    /// Time the broker took to read the request and choose the worker.
    pub placement: Duration,
    /// What the model says besides.
    pub parameters: Vec<(String, String)>,
    /// Names the request.
    pub request_id: String,
    /// Identity URI of the worker.
    pub worker: Arc<str>,
    /// Where the worker runs, if the broker knows.
    pub tier: Option<Tier>,
    /// Why this worker, in words.
    pub reason: String,
    /// An edge answer was given up for this one.
    pub escalated: bool,
    /// Confidence of that edge answer.
    pub edge_confidence: Option<f32>,
    /// How long the answer was expected to take when the worker was chosen.
    pub estimate: Duration,
    /// This is a second worker's answer: the first did not answer in time.
    pub hedged: bool,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Inference {
    /// Who answered, and how.
    pub answer: Answer,
    /// What the model said.
    pub payload: Bytes,
}

impl Inference {
    /// The payload as tensors.
    ///
    /// # Errors
    /// The payload is something else.
    pub fn tensors(&self) -> Result<Vec<Tensor>, FrameError> {
        decode_tensors(self.payload.clone())
    }
}

/// An answer that comes in chunks. Dropping it before the end cancels the request.
#[derive(Debug)]
pub struct InferStream {
    /// Who answers, and how.
    pub answer: Answer,
    stream: CallStream,
}

impl InferStream {
    /// The next chunk of the payload, or `None` when the answer ended well.
    ///
    /// # Errors
    /// The inference failed.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        self.stream.next().await
    }

    /// Gives the answer up; the worker is told.
    pub fn cancel(self) {
        drop(self);
    }

    /// Asks, and waits for the answer to begin. An idempotent request is made again when the
    /// connection is lost before that.
    pub(crate) async fn open(client: &Client, request: &Infer) -> Result<Self, CallError> {
        let until = deadline_in(request.deadline);
        loop {
            match Self::open_until(client, request, until).await {
                Err((_, true)) => {}
                Err((error, false)) => return Err(error),
                Ok(stream) => return Ok(stream),
            }
        }
    }

    /// The error comes with whether to try again.
    async fn open_until(
        client: &Client,
        request: &Infer,
        until: Instant,
    ) -> Result<Self, (CallError, bool)> {
        let header = |deadline_ms| frame::encode(Kind::INFER, &request.to_wire(deadline_ms));
        let opened = CallStream::open(client, until, header).await;
        let mut stream = opened.map_err(|error| (error, false))?;
        let result = match stream.send_all(request.payload.clone()).await {
            Ok(()) => first_answer(&mut stream).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(answer) => Ok(Self { answer, stream }),
            Err(error) => {
                let lost = stream.receiver().connection_lost();
                let again = lost && request.idempotent && error.code() == Code::Unavailable;
                Err((error, again))
            }
        }
    }
}

impl Inference {
    /// Asks, and collects the whole answer, of up to `limit` bytes.
    pub(crate) async fn collect(
        client: &Client,
        request: &Infer,
        limit: usize,
    ) -> Result<Self, CallError> {
        let until = deadline_in(request.deadline);
        loop {
            let mut stream = match InferStream::open_until(client, request, until).await {
                Ok(stream) => stream,
                Err((_, true)) => continue,
                Err((error, false)) => return Err(error),
            };
            match stream.payload(limit).await {
                Ok(payload) => {
                    return Ok(Self {
                        answer: stream.answer,
                        payload,
                    });
                }
                Err(error) => {
                    let lost = stream.stream.receiver().connection_lost();
                    let again = lost && request.idempotent && error.code() == Code::Unavailable;
                    if !again {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl InferStream {
    async fn payload(&mut self, limit: usize) -> Result<Bytes, CallError> {
        let first = self.next().await?.unwrap_or_default();
        let Some(second) = self.next().await? else {
            return Ok(first);
        };
        let mut all = BytesMut::from(first);
        let mut next = Some(second);
        while let Some(chunk) = next {
            if all.len() + chunk.len() > limit {
                return Err(CallError::Status(Status::new(
                    Code::ResourceExhausted,
                    format!("the answer is over {limit} bytes: read it as a stream"),
                )));
            }
            all.extend_from_slice(&chunk);
            next = self.next().await?;
        }
        Ok(all.freeze())
    }
}

impl Infer {
    fn to_wire(&self, deadline_ms: u32) -> wire::InferHeader {
        wire::InferHeader {
            model: self.model.clone(),
            version: self.version.clone(),
            request_id: self.request_id.clone(),
            deadline_ms,
            residency: self.residency.to_wire(),
            preference: self.preference.to_wire(),
            min_confidence: self.min_confidence,
            idempotent: self.idempotent,
            parameters: to_wire_properties(self.parameters.clone()),
            traceparent: self.traceparent.clone(),
            payload_bytes: self.payload.len() as u64,
            caller: String::new(),
            registration: 0,
            class: wire::Class::from(self.class).into(),
            routing_key: self.routing_key.clone(),
            resume_from: 0,
        }
    }
}

impl From<wire::InferAnswer> for Answer {
    fn from(answer: wire::InferAnswer) -> Self {
        Self {
            model: answer.model,
            version: answer.version,
            confidence: answer.confidence,
            queue: Duration::from_micros(answer.queue_us),
            compute: Duration::from_micros(answer.compute_us),
            placement: Duration::from_micros(answer.placement_us),
            parameters: from_wire_properties(answer.parameters),
            request_id: answer.request_id,
            worker: answer.worker.into(),
            tier: Tier::from_wire(answer.tier).ok(),
            reason: answer.reason,
            escalated: answer.escalated,
            edge_confidence: answer.edge_confidence,
            estimate: Duration::from_micros(answer.estimate_us),
            hedged: answer.hedged,
        }
    }
}

async fn first_answer(stream: &mut CallStream) -> Result<Answer, CallError> {
    let wrong = |reason: String| CallError::Status(Status::new(Code::Internal, reason));
    loop {
        match stream.receiver().next_frame().await? {
            Some(frame) if frame.kind == Kind::ANSWER => {
                let answer: wire::InferAnswer = frame::decode("answer", frame.body)
                    .map_err(|error| wrong(error.to_string()))?;
                return Ok(answer.into());
            }
            Some(frame) if frame.kind == Kind::DATA => {
                return Err(wrong(
                    "expected an answer header before the payload".to_owned(),
                ));
            }
            Some(_) => {}
            None => return Err(wrong("the response ended without an answer".to_owned())),
        }
    }
}
