//! Calls to a service: one message or a stream of them each way.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{ReadError, SendStream, VarInt, WriteError};
use selvedge_proto::frame::{self, Frame, Kind};
use selvedge_proto::message::to_wire_properties;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;
use tokio::time::{Instant, timeout_at};

use crate::client::{Client, Link};
use crate::framed::{FramedError, FramedReader};

/// Deadline of a call or an inference when none is given.
pub(crate) const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);

/// How often an idempotent call is repeated because its responder was lost.
const REPEATS: u32 = 2;
/// Longest pause before that; the pause itself is random.
const REPEAT_PAUSE: Duration = Duration::from_millis(100);

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

    /// The call may be made again when its responder or the connection is lost, which
    /// [`Client::request`] then does by itself. Default: false.
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
pub struct CallSender {
    stream: SendStream,
    deadline: Instant,
    max_frame: usize,
    /// A frame is begun; if the send is given up, the stream cannot be continued.
    writing: bool,
    finished: bool,
}

impl CallSender {
    /// Sends one message of the request.
    ///
    /// # Errors
    /// The call has ended.
    pub async fn send(&mut self, message: impl Into<Bytes>) -> Result<(), CallError> {
        let message = message.into();
        if self.finished || self.writing {
            return Err(CallError::Ended);
        }
        check_size(message.len(), self.max_frame)?;
        self.writing = true;
        write_data(&mut self.stream, message, self.deadline).await?;
        self.writing = false;
        Ok(())
    }

    /// Says that the request is complete.
    ///
    /// # Errors
    /// The call has ended.
    pub fn finish(&mut self) -> Result<(), CallError> {
        if self.finished || self.writing {
            return Err(CallError::Ended);
        }
        self.finished = true;
        self.stream.finish().map_err(|_| CallError::Ended)
    }
}

impl Drop for CallSender {
    fn drop(&mut self) {
        if !self.finished {
            // It fails when the stream is at its end already, which is as well.
            let _ = self.stream.reset(quic_code(Code::Cancelled));
        }
    }
}

/// The response of a [`CallStream`]. Dropping it before the end cancels the call.
#[derive(Debug)]
pub struct CallReceiver {
    frames: FramedReader,
    deadline: Instant,
    connection: quinn::Connection,
    end: Option<Result<(), Status>>,
    /// Keeps the connection open.
    _client: Client,
}

impl CallReceiver {
    /// The next message of the response, or `None` when it ended well.
    ///
    /// # Errors
    /// The call failed.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        loop {
            match self.next_frame().await? {
                None => return Ok(None),
                Some(frame) if frame.kind == Kind::DATA => return Ok(Some(frame.body)),
                // ANSWER is read before, and kinds of a later revision are skipped.
                Some(_) => {}
            }
        }
    }

    /// The next frame that is not the status.
    pub(crate) async fn next_frame(&mut self) -> Result<Option<Frame>, CallError> {
        match &self.end {
            None => {}
            Some(Ok(())) => return Ok(None),
            Some(Err(status)) => return Err(CallError::Status(status.clone())),
        }
        let end = match timeout_at(self.deadline, self.frames.next()).await {
            Ok(Ok(Some(frame))) if frame.kind == Kind::STATUS => {
                match frame::decode::<wire::Status>("status", frame.body) {
                    Ok(status) => Status::from(status).into_result(),
                    Err(error) => Err(Status::new(Code::Internal, error.to_string())),
                }
            }
            Ok(Ok(Some(frame))) => return Ok(Some(frame)),
            Ok(Ok(None)) => Err(Status::new(
                Code::Internal,
                "the response ended without a status",
            )),
            Ok(Err(error)) => {
                self.frames.stop(quic_code(Code::Internal));
                Err(status_of(error))
            }
            Err(_) => {
                self.frames.stop(quic_code(Code::DeadlineExceeded));
                Err(late())
            }
        };
        self.end = Some(end.clone());
        end.map(|()| None).map_err(CallError::Status)
    }

    /// Whether the connection that the call was made on is lost.
    pub(crate) fn connection_lost(&self) -> bool {
        self.connection.close_reason().is_some()
    }
}

impl Drop for CallReceiver {
    fn drop(&mut self) {
        if self.end.is_none() {
            self.frames.stop(quic_code(Code::Cancelled));
        }
    }
}

impl CallStream {
    /// Opens a call on the connection of now, or the next one. `header` makes the first frame from
    /// the time left.
    pub(crate) async fn open(
        client: &Client,
        deadline: Instant,
        header: impl Fn(u32) -> Bytes,
    ) -> Result<Self, CallError> {
        let shared = client.shared();
        let mut links = shared.link.subscribe();
        let open = async {
            loop {
                let up = |link: &Option<Link>| {
                    link.as_ref()
                        .is_some_and(|link| link.connection.close_reason().is_none())
                };
                let link = match links.wait_for(up).await {
                    Ok(link) => link.clone(),
                    Err(_) => None,
                };
                let Some(link) = link else {
                    return std::future::pending().await;
                };
                // Nothing is sent before the stream is open: another connection will do as well.
                if let Ok((send, receive)) = link.connection.open_bi().await {
                    return (link, send, receive);
                }
            }
        };
        let (link, stream, receive) = tokio::select! {
            opened = timeout_at(deadline, open) => opened.map_err(|_| {
                CallError::Status(Status::new(
                    Code::DeadlineExceeded,
                    "no connection to the broker before the deadline",
                ))
            })?,
            () = shared.ended.cancelled() => return Err(CallError::Closed(shared.end_reason())),
        };
        let mut call = Self {
            sender: CallSender {
                stream,
                deadline,
                max_frame: link.max_frame,
                writing: true,
                finished: false,
            },
            receiver: CallReceiver {
                frames: FramedReader::new(receive, shared.settings.max_frame_bytes),
                deadline,
                connection: link.connection,
                end: None,
                _client: client.clone(),
            },
        };
        let header = header(millis_left(deadline));
        if header.len() > selvedge_proto::MAX_HEADER_FRAME {
            return Err(CallError::TooLarge {
                found: header.len(),
                limit: selvedge_proto::MAX_HEADER_FRAME,
            });
        }
        timeout_at(deadline, call.sender.stream.write_chunk(header))
            .await
            .map_err(|_| CallError::Status(late()))?
            .map_err(write_error)?;
        call.sender.writing = false;
        Ok(call)
    }

    /// Sends a whole request. That the other side has ended early is found in the response.
    pub(crate) async fn send_all(&mut self, payload: Bytes) -> Result<(), CallError> {
        match self.sender.send(payload).await {
            Ok(()) => self.sender.finish(),
            Err(error) => Err(error),
        }
        .or_else(|error| match error {
            CallError::Ended => Ok(()),
            other => Err(other),
        })
    }

    pub(crate) fn receiver(&mut self) -> &mut CallReceiver {
        &mut self.receiver
    }

    /// Makes a streaming call.
    pub(crate) async fn call(client: &Client, call: &Call) -> Result<Self, CallError> {
        Self::call_until(client, call, deadline_in(call.deadline)).await
    }

    async fn call_until(client: &Client, call: &Call, until: Instant) -> Result<Self, CallError> {
        let header = |deadline_ms| {
            let header = wire::CallHeader {
                service: call.service.clone(),
                deadline_ms,
                idempotent: call.idempotent,
                properties: to_wire_properties(call.properties.clone()),
                traceparent: call.traceparent.clone(),
                caller: String::new(),
                registration: 0,
            };
            frame::encode(Kind::CALL, &header)
        };
        let mut stream = Self::open(client, until, header).await?;
        if let Some(payload) = &call.payload {
            stream.send_all(payload.clone()).await?;
        }
        Ok(stream)
    }

    /// Makes a call with one message each way.
    pub(crate) async fn unary(client: &Client, call: &Call) -> Result<Bytes, CallError> {
        let until = deadline_in(call.deadline);
        let mut repeats = 0;
        loop {
            let mut stream = Self::call_until(client, call, until).await?;
            if call.payload.is_none() {
                stream.finish_requests()?;
            }
            let result = stream.receiver.only().await;
            match result {
                Err(CallError::Status(status))
                    if call.idempotent && status.code == Code::Unavailable =>
                {
                    // After a lost connection the next one decides when to go on.
                    if stream.receiver.connection_lost() {
                        continue;
                    }
                    let pause = status
                        .retry_after
                        .unwrap_or_else(|| REPEAT_PAUSE.mul_f64(rand::random()));
                    if repeats == REPEATS || Instant::now() + pause >= until {
                        return Err(CallError::Status(status));
                    }
                    repeats += 1;
                    tokio::time::sleep(pause).await;
                }
                result => return result,
            }
        }
    }
}

impl CallReceiver {
    /// The response of a call with one message.
    async fn only(&mut self) -> Result<Bytes, CallError> {
        let first = self.next().await?.unwrap_or_default();
        match self.next().await? {
            None => Ok(first),
            Some(_) => Err(CallError::Status(Status::new(
                Code::Internal,
                "expected one message in the response, found more; make a streaming call",
            ))),
        }
    }
}

/// Writes one DATA frame; the payload is not copied.
pub(crate) async fn write_data(
    stream: &mut SendStream,
    message: Bytes,
    deadline: Instant,
) -> Result<(), CallError> {
    let mut pieces = [frame::head(Kind::DATA, message.len()), message];
    timeout_at(deadline, stream.write_all_chunks(&mut pieces))
        .await
        .map_err(|_| CallError::Status(late()))?
        .map_err(write_error)
}

pub(crate) fn check_size(found: usize, limit: usize) -> Result<(), CallError> {
    // The frame's kind counts as well.
    if found >= limit {
        return Err(CallError::TooLarge {
            found,
            limit: limit - 1,
        });
    }
    Ok(())
}

pub(crate) fn write_error(error: WriteError) -> CallError {
    match error {
        WriteError::Stopped(_) | WriteError::ClosedStream => CallError::Ended,
        lost => CallError::Status(Status::new(Code::Unavailable, lost.to_string())),
    }
}

pub(crate) fn status_of(error: FramedError) -> Status {
    match error {
        FramedError::Read(ReadError::Reset(code)) => {
            let code = Code::from_quic(code.into_inner());
            Status::new(code, "the other side broke the call off")
        }
        FramedError::Read(lost) => Status::new(Code::Unavailable, lost.to_string()),
        FramedError::Frame(error) => Status::new(Code::Internal, error.to_string()),
    }
}

pub(crate) fn late() -> Status {
    Status::new(Code::DeadlineExceeded, "the deadline has passed")
}

pub(crate) fn quic_code(code: Code) -> VarInt {
    VarInt::from_u32(code.to_quic())
}

/// A time from now; one beyond the reach of the clock is as good as never.
pub(crate) fn deadline_in(after: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
    Instant::now() + after.min(NEVER)
}

fn millis_left(deadline: Instant) -> u32 {
    let left = deadline.saturating_duration_since(Instant::now());
    u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1)
}
