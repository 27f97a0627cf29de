//! Calls to a service: one message or a stream of them each way.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use selvedge_proto::status::{Code, Status};

/// Deadline of a call or an inference when none is given.
pub(crate) const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);

/// A call to make.
#[derive(Debug, Clone)]
pub struct Call {
    pub(crate) service: String,
    pub(crate) deadline: Duration,
    pub(crate) idempotent: bool,
    pub(crate) properties: Vec<(String, String)>,
    pub(crate) traceparent: String,
    pub(crate) payload: Option<Bytes>,
}

impl Call {
    /// A call to a service with a deadline of 30 s.
    pub fn new(service: impl Into<String>) -> Self {
        Self {
            service: service.into(),
            deadline: DEFAULT_DEADLINE,
            idempotent: false,
            properties: Vec::new(),
            traceparent: String::new(),
            payload: None,
        }
    }

    /// How long the call may take. Default: 30 s.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The call may be made again when a responder or the connection is lost. Default: false.
    #[must_use]
    pub fn idempotent(mut self, idempotent: bool) -> Self {
        self.idempotent = idempotent;
        self
    }

    /// Adds a property that the responder can read.
    #[must_use]
    pub fn property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.push((name.into(), value.into()));
        self
    }

    /// W3C trace context, the value of `traceparent`.
    #[must_use]
    pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
        self.traceparent = traceparent.into();
        self
    }

    /// The whole request: it is sent and the request ended when the call is made.
    #[must_use]
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.payload = Some(payload.into());
        self
    }
}

/// Why a call or an inference failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// It ended with this status, whether the responder, the broker or this client found so.
    #[error("{0}")]
    Status(Status),
    /// The other side has ended the call and reads no more: the status is in what it sent.
    #[error("the other side has ended the call: read on for its status")]
    Ended,
    /// The message is larger than the broker accepts.
    #[error("message of {found} bytes is over the broker's limit of {limit} bytes")]
    TooLarge {
        /// Bytes of the message.
        found: usize,
        /// Most bytes the broker accepts.
        limit: usize,
    },
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}

impl CallError {
    /// The code to act on.
    pub fn code(&self) -> Code {
        match self {
            Self::Status(status) => status.code,
            Self::Ended => Code::Aborted,
            Self::TooLarge { .. } => Code::InvalidArgument,
            Self::Closed(_) => Code::Cancelled,
        }
    }
}

/// A call under way. Dropping it before its end cancels the call.
#[derive(Debug)]
pub struct CallStream {
    sender: CallSender,
    receiver: CallReceiver,
}

impl CallStream {
    /// Sends one message of the request.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn send(&mut self, message: impl Into<Bytes>) -> Result<(), CallError> {
        self.sender.send(message).await
    }

    /// Says that the request is complete.
    ///
    /// # Errors
    /// The call has ended.
    pub fn finish_requests(&mut self) -> Result<(), CallError> {
        self.sender.finish()
    }

    /// The next message of the response, or `None` when it ended well.
    ///
    /// # Errors
    /// The call failed.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        self.receiver.next().await
    }

    /// The two directions, for use by two tasks.
    pub fn split(self) -> (CallSender, CallReceiver) {
        (self.sender, self.receiver)
    }

    /// Gives the call up; the responder is told.
    pub fn cancel(self) {
        drop(self);
    }
}

/// The request of a [`CallStream`]. Dropping it before [`finish`](Self::finish) cancels the call.
#[derive(Debug)]
pub struct CallSender {}

impl CallSender {
    /// Sends one message of the request.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn send(&mut self, _message: impl Into<Bytes>) -> Result<(), CallError> {
        todo!()
    }

    /// Says that the request is complete.
    ///
    /// # Errors
    /// The call has ended.
    pub fn finish(&mut self) -> Result<(), CallError> {
        todo!()
    }
}

/// The response of a [`CallStream`]. Dropping it before the end cancels the call.
#[derive(Debug)]
pub struct CallReceiver {}

impl CallReceiver {
    /// The next message of the response, or `None` when it ended well.
    ///
    /// # Errors
    /// The call failed.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        todo!()
    }
}
