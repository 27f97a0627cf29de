//! Answering calls: a registered service and the calls that come to it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_core::Stream;
use selvedge_proto::message::from_wire_properties;
use selvedge_proto::status::Status;
use selvedge_proto::wire;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::call::CallError;
use crate::client::Client;
use crate::control::{Refusal, Registration, Sink};
use crate::exchange::Exchange;

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

impl From<Refusal> for ServeError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Status(status) => Self::Refused(status),
            Refusal::Closed(reason) => Self::Closed(reason),
        }
    }
}

/// Calls that wait to be taken when the broker chooses how many are in flight: as many as it may
/// have open to this client. Beyond it a call is answered with RESOURCE_EXHAUSTED.
const DEFAULT_WAITING: usize = crate::driver::MAX_INCOMING_CALLS as usize;
/// More waiting calls than this are not kept, whatever the application asks for.
const MOST_WAITING: usize = 65_536;

/// A registered service: a stream of calls. Dropping it withdraws the service.
#[derive(Debug)]
pub struct Responder {
    calls: mpsc::Receiver<IncomingCall>,
    id: u32,
    client: Client,
}

impl Responder {
    pub(crate) async fn register(
        client: &Client,
        service: &str,
        options: &ServeOptions,
    ) -> Result<Self, ServeError> {
        let (sender, calls) = mpsc::channel(waiting(options.max_in_flight));
        let serve = wire::Serve {
            request_id: 0,
            id: 0,
            service: service.to_owned(),
            max_in_flight: options.max_in_flight,
        };
        let control = &client.shared().control;
        let (id, answer) = control.register(Registration::Serve(serve), Sink::Calls(sender))?;
        // Withdraws the service if the wait is given up.
        let responder = Self {
            calls,
            id,
            client: client.clone(),
        };
        match answer.await {
            Ok(Ok(())) => Ok(responder),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(ServeError::Closed(client.shared().end_reason())),
        }
    }

    /// The next call, or `None` when the client is closed or the broker refused the service after
    /// a reconnect.
    pub async fn next(&mut self) -> Option<IncomingCall> {
        self.calls.recv().await
    }
}

impl Stream for Responder {
    type Item = IncomingCall;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<IncomingCall>> {
        self.get_mut().calls.poll_recv(context)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.client.shared().control.withdraw(self.id);
    }
}

/// How many requests may wait to be taken.
pub(crate) fn waiting(granted: u32) -> usize {
    match granted as usize {
        0 => DEFAULT_WAITING,
        granted => granted.min(MOST_WAITING),
    }
}

/// A call to answer. Dropping it without [`finish`](Self::finish), [`reply`](Self::reply) or
/// [`fail`](Self::fail) ends it with INTERNAL.
#[derive(Debug)]
pub struct IncomingCall {
    service: String,
    caller: String,
    properties: Vec<(String, String)>,
    traceparent: String,
    exchange: Exchange,
}

impl IncomingCall {
    pub(crate) fn new(header: wire::CallHeader, exchange: Exchange) -> Self {
        Self {
            service: header.service,
            caller: header.caller,
            properties: from_wire_properties(header.properties),
            traceparent: header.traceparent,
            exchange,
        }
    }

    /// The service that is called.
    pub fn service(&self) -> &str {
        &self.service
    }

    /// Identity URI of the caller as the broker verified it.
    pub fn caller(&self) -> &str {
        &self.caller
    }

    /// When the caller stops waiting.
    pub fn deadline(&self) -> Instant {
        self.exchange.deadline()
    }

    /// Properties that the caller set.
    pub fn properties(&self) -> &[(String, String)] {
        &self.properties
    }

    /// W3C trace context of the caller; empty when not given.
    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }

    /// The next message of the request, or `None` at its end.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        self.exchange.next().await
    }

    /// The request of a call with exactly one message.
    ///
    /// # Errors
    /// The call has ended, or the request has no message or more than one.
    pub async fn request(&mut self) -> Result<Bytes, CallError> {
        self.exchange.request().await
    }

    /// Sends one message of the response.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn send(&mut self, message: impl Into<Bytes>) -> Result<(), CallError> {
        self.exchange.send(message.into()).await
    }

    /// Ends the response well.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn finish(self) -> Result<(), CallError> {
        self.exchange.end(Status::ok()).await
    }

    /// Answers with one message.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn reply(mut self, message: impl Into<Bytes>) -> Result<(), CallError> {
        self.exchange.send(message.into()).await?;
        self.finish().await
    }

    /// Ends the call with a status.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn fail(self, status: Status) -> Result<(), CallError> {
        self.exchange.end(status).await
    }

    /// Resolves when the caller gave up, the deadline passed or the connection was lost.
    pub async fn cancelled(&self) {
        self.exchange.cancelled().await;
    }
}
