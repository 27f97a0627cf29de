//! Asking for an inference: the fabric chooses the worker.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use selvedge_proto::frame::FrameError;
use selvedge_proto::inference::{
    Preference, Residency, Tensor, Tier, decode_tensors, encode_tensors,
};

use crate::call::{CallError, DEFAULT_DEADLINE};

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
        }
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
}

impl InferStream {
    /// The next chunk of the payload, or `None` when the answer ended well.
    ///
    /// # Errors
    /// The inference failed.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        todo!()
    }

    /// Gives the answer up; the worker is told.
    pub fn cancel(self) {
        drop(self);
    }
}
