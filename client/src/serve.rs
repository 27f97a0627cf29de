//! Answering calls: a registered service and the calls that come to it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_core::Stream;
use selvedge_proto::status::Status;
use tokio::time::Instant;

use crate::call::CallError;

/// How to serve.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServeOptions {
    /// Calls taken at once; zero leaves it to the broker.
    pub max_in_flight: u32,
}

/// Why a service was not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The broker refused it.
    #[error("the broker refused the service: {0}")]
    Refused(Status),
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}

/// A registered service: a stream of calls. Dropping it withdraws the service.
#[derive(Debug)]
pub struct Responder {}

impl Responder {
    /// The next call, or `None` when the client is closed or the broker refused the service after
    /// a reconnect.
    pub async fn next(&mut self) -> Option<IncomingCall> {
        todo!()
    }
}

impl Stream for Responder {
    type Item = IncomingCall;

    fn poll_next(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Option<IncomingCall>> {
        todo!()
    }
}

/// A call to answer. Dropping it without [`finish`](Self::finish), [`reply`](Self::reply) or
/// [`fail`](Self::fail) ends it with INTERNAL.
#[derive(Debug)]
pub struct IncomingCall {}

impl IncomingCall {
    /// The service that is called.
    pub fn service(&self) -> &str {
        todo!()
    }

    /// Identity URI of the caller as the broker verified it.
    pub fn caller(&self) -> &str {
        todo!()
    }

    /// When the caller stops waiting.
    pub fn deadline(&self) -> Instant {
        todo!()
    }

    /// Properties that the caller set.
    pub fn properties(&self) -> &[(String, String)] {
        todo!()
    }

    /// W3C trace context of the caller; empty when not given.
    pub fn traceparent(&self) -> &str {
        todo!()
    }

    /// The next message of the request, or `None` at its end.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        todo!()
    }

    /// The request of a call with exactly one message.
    ///
    /// # Errors
    /// The call has ended, or the request has no message or more than one.
    pub async fn request(&mut self) -> Result<Bytes, CallError> {
        todo!()
    }

    /// Sends one message of the response.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn send(&mut self, _message: impl Into<Bytes>) -> Result<(), CallError> {
        todo!()
    }

    /// Ends the response well.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn finish(self) -> Result<(), CallError> {
        todo!()
    }

    /// Answers with one message.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn reply(self, _message: impl Into<Bytes>) -> Result<(), CallError> {
        todo!()
    }

    /// Ends the call with a status.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn fail(self, _status: Status) -> Result<(), CallError> {
        todo!()
    }

    /// Resolves when the caller gave up, the deadline passed or the connection was lost.
    pub async fn cancelled(&self) {
        todo!()
    }
}
