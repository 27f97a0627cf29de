//! The answering side of a call or an inference, and the dispatch of those that come in.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::call::{
    CallError, DEFAULT_DEADLINE, check_size, deadline_in, late, quic_code, status_of, write_data,
    write_error,
};
use crate::client::Shared;
use crate::control::Sink;
use crate::framed::FramedReader;
use crate::serve::IncomingCall;
use crate::work::IncomingInference;

/// How long the broker may take to write the header of a call that it has opened.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// Both directions of one request, as its responder has them.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// `None` once the response has ended.
    response: Option<SendStream>,
    request: FramedReader,
    request_ended: bool,
    /// A frame is begun; if the send is given up, the stream cannot be continued.
    writing: bool,
    deadline: Instant,
    max_frame: usize,
}

impl Exchange {
    fn new(response: SendStream, request: FramedReader, max_frame: usize) -> Self {
        Self {
            response: Some(response),
            request,
            request_ended: false,
            writing: false,
            deadline: deadline_in(DEFAULT_DEADLINE),
            max_frame,
        }
    }

    /// `deadline_ms` is the time left as the header has it; zero leaves the default.
    fn with_deadline(mut self, deadline_ms: u32) -> Self {
        if deadline_ms > 0 {
            self.deadline = deadline_in(Duration::from_millis(deadline_ms.into()));
        }
        self
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The next message of the request.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        if self.request_ended {
            return Ok(None);
        }
        loop {
            match timeout_at(self.deadline, self.request.next()).await {
                Ok(Ok(Some(frame))) if frame.kind == Kind::DATA => return Ok(Some(frame.body)),
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => {
                    self.request_ended = true;
                    return Ok(None);
                }
                Ok(Err(error)) => return Err(CallError::Status(status_of(error))),
                Err(_) => return Err(CallError::Status(late())),
            }
        }
    }

    /// The only message of the request.
    pub(crate) async fn request(&mut self) -> Result<Bytes, CallError> {
        let first = self.next().await?;
        let more = self.next().await?;
        match (first, more) {
            (Some(request), None) => Ok(request),
            (None, _) => Err(CallError::Status(Status::new(
                Code::InvalidArgument,
                "expected one message in the request, found none",
            ))),
            (Some(_), Some(_)) => Err(CallError::Status(Status::new(
                Code::InvalidArgument,
                "expected one message in the request, found more",
            ))),
        }
    }

    /// Sends one message of the response.
    pub(crate) async fn send(&mut self, message: Bytes) -> Result<(), CallError> {
        check_size(message.len(), self.max_frame)?;
        let deadline = self.deadline;
        let response = self.begin()?;
        write_data(response, message, deadline).await?;
        self.writing = false;
        Ok(())
    }

    /// Sends a frame of the response that is no message.
    pub(crate) async fn send_header(&mut self, frame: Bytes) -> Result<(), CallError> {
        let deadline = self.deadline;
        let response = self.begin()?;
        timeout_at(deadline, response.write_chunk(frame))
            .await
            .map_err(|_| CallError::Status(late()))?
            .map_err(write_error)?;
        self.writing = false;
        Ok(())
    }

    fn begin(&mut self) -> Result<&mut SendStream, CallError> {
        match &mut self.response {
            Some(response) if !self.writing => {
                self.writing = true;
                Ok(response)
            }
            _ => Err(CallError::Ended),
        }
    }

    /// Ends the response.
    pub(crate) async fn end(mut self, status: Status) -> Result<(), CallError> {
        let Some(response) = self.response.take() else {
            return Err(CallError::Ended);
        };
        if !self.request_ended {
            self.request.stop(quic_code(status.code));
        }
        write_status(response, status, self.writing, self.deadline).await
    }

    /// Resolves when nobody waits for the response any more.
    pub(crate) async fn cancelled(&self) {
        if let Some(response) = &self.response {
            // Either way out, stopped or lost, the response goes nowhere.
            let _ = timeout_at(self.deadline, response.stopped()).await;
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let Some(mut response) = self.response.take() else {
            return;
        };
        let status = if Instant::now() >= self.deadline {
            late()
        } else {
            Status::new(Code::Internal, "the responder dropped the call")
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                let (writing, deadline) = (self.writing, self.deadline);
                runtime.spawn(async move {
                    // Nobody is left to hear of a failure.
                    let _ = write_status(response, status, writing, deadline).await;
                });
            }
            Err(_) => {
                let _ = response.reset(quic_code(status.code));
            }
        }
    }
}

/// Writes the last frame of a response, or resets it when that is not possible.
async fn write_status(
    mut response: SendStream,
    status: Status,
    writing: bool,
    deadline: Instant,
) -> Result<(), CallError> {
    let code = status.code;
    let written = if writing {
        Err(CallError::Ended)
    } else {
        let frame = frame::encode(Kind::STATUS, &wire::Status::from(status));
        match timeout_at(deadline, response.write_chunk(frame)).await {
            Ok(Ok(())) => response.finish().map_err(|_| CallError::Ended),
            Ok(Err(error)) => Err(write_error(error)),
            Err(_) => Err(CallError::Status(late())),
        }
    };
    if written.is_err() {
        // It fails when the stream is at its end already, which is as well.
        let _ = response.reset(quic_code(code));
    }
    written
}

/// Accepts what the broker forwards on one connection, and hands it to its registration.
pub(crate) async fn accept(
    shared: Arc<Shared>,
    connection: quinn::Connection,
    max_frame: usize,
) -> Result<(), String> {
    // Aborted together with this task. Bounded by the streams that the broker may open.
    let mut heads = JoinSet::new();
    loop {
        tokio::select! {
            streams = connection.accept_bi() => {
                let (response, request) = streams.map_err(|error| error.to_string())?;
                let shared = shared.clone();
                heads.spawn(async move {
                    let dispatched = dispatch(&shared, response, request, max_frame);
                    if timeout(HEADER_TIME, dispatched).await.is_err() {
                        tracing::debug!("a call came without its header in time");
                    }
                });
            }
            Some(_) = heads.join_next() => {}
        }
    }
}

async fn dispatch(shared: &Shared, response: SendStream, request: RecvStream, max_frame: usize) {
    let mut frames = FramedReader::new(request, shared.settings.max_frame_bytes);
    let first = frames.next().await;
    let exchange = Exchange::new(response, frames, max_frame);
    let refused = match first {
        Ok(Some(first)) if first.kind == Kind::CALL => {
            match frame::decode::<wire::CallHeader>("call header", first.body) {
                Ok(header) => {
                    let exchange = exchange.with_deadline(header.deadline_ms);
                    let sink = shared.control.sink(header.registration);
                    let call = IncomingCall::new(header, exchange);
                    match sink {
                        Some(Sink::Calls(sink)) => match sink.try_send(call) {
                            Ok(()) => return,
                            Err(TrySendError::Full(call)) => call.fail(full()).await,
                            Err(TrySendError::Closed(call)) => call.fail(gone()).await,
                        },
                        _ => call.fail(gone()).await,
                    }
                }
                Err(error) => exchange.end(malformed(&error.to_string())).await,
            }
        }
        Ok(Some(first)) if first.kind == Kind::INFER => {
            match frame::decode::<wire::InferHeader>("inference header", first.body) {
                Ok(header) => {
                    let exchange = exchange.with_deadline(header.deadline_ms);
                    let sink = shared.control.sink(header.registration);
                    let inference = IncomingInference::new(header, exchange);
                    match sink {
                        Some(Sink::Inferences(sink)) => match sink.try_send(inference) {
                            Ok(()) => return,
                            Err(TrySendError::Full(inference)) => inference.fail(full()).await,
                            Err(TrySendError::Closed(inference)) => inference.fail(gone()).await,
                        },
                        _ => inference.fail(gone()).await,
                    }
                }
                Err(error) => exchange.end(malformed(&error.to_string())).await,
            }
        }
        Ok(_) => {
            exchange
                .end(malformed("expected CALL or INFER first"))
                .await
        }
        Err(error) => exchange.end(malformed(&error.to_string())).await,
    };
    if let Err(error) = refused {
        tracing::debug!(%error, "could not refuse a call");
    }
}

fn full() -> Status {
    Status::new(Code::ResourceExhausted, "the responder's queue is full")
}

fn gone() -> Status {
    Status::new(Code::Unavailable, "the responder has withdrawn")
}

fn malformed(reason: &str) -> Status {
    Status::new(Code::InvalidArgument, reason)
}
