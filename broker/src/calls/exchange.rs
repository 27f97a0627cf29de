//! The two directions of a call: forwards the request while the response is read, and watches
//! deadline and cancellation meanwhile.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream};
use selvedge_proto::status::{Code, Status};
use tokio::time::Sleep;

use super::tracker::ResponseTracker;

/// Chunks forwarded at once.
const CHUNKS: usize = 8;

/// Where the bytes of a response go: to a peer, or to the front door of this broker.
pub(crate) trait Sink: Send {
    /// Resolves when nobody takes the response any more. The code says why: a caller whose time is up
    /// may be heard before the broker's own clock says so.
    fn stopped(&self) -> impl Future<Output = Code> + Send + 'static;

    /// Hands chunks over, no faster than they are taken. They are taken out of the slice.
    fn write(&mut self, chunks: &mut [Bytes]) -> impl Future<Output = Result<(), Gone>> + Send;

    /// The response is whole.
    fn finish(&mut self);

    /// The response is given up.
    fn reset(&mut self, code: Code);
}

/// Where the bytes of a request come from.
pub(crate) trait Source: Send {
    /// Fills chunks in from the first on; `None` at the end of the request.
    fn read(
        &mut self,
        chunks: &mut [Bytes],
    ) -> impl Future<Output = Result<Option<usize>, Gone>> + Send;

    /// Nothing more is read.
    fn stop(&mut self, code: Code);
}

/// The other side has given up, or is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

impl Sink for SendStream {
    fn stopped(&self) -> impl Future<Output = Code> + Send + 'static {
        let stopped = SendStream::stopped(self);
        async move {
            let late = u64::from(Code::DeadlineExceeded.to_quic());
            match stopped.await {
                Ok(Some(code)) if code.into_inner() == late => Code::DeadlineExceeded,
                _ => Code::Cancelled,
            }
        }
    }

    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), Gone> {
        self.write_all_chunks(chunks).await.map_err(|_| Gone)
    }

    fn finish(&mut self) {
        let _ = SendStream::finish(self);
    }

    fn reset(&mut self, code: Code) {
        let _ = SendStream::reset(self, code.to_quic().into());
    }
}

impl Source for RecvStream {
    async fn read(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, Gone> {
        self.read_chunks(chunks).await.map_err(|_| Gone)
    }

    fn stop(&mut self, code: Code) {
        let _ = RecvStream::stop(self, code.to_quic().into());
    }
}

/// One side of a call.
#[derive(Debug)]
pub(crate) struct Leg<S = SendStream, R = RecvStream> {
    /// Towards the peer.
    pub(crate) send: S,
    /// From the peer.
    pub(crate) recv: R,
}

impl Leg {
    /// Opens a stream and writes its header; `None` when the connection is lost.
    pub(crate) async fn open(connection: &quinn::Connection, header: Bytes) -> Option<Self> {
        let (mut send, recv) = connection.open_bi().await.ok()?;
        send.write_chunk(header).await.ok()?;
        Some(Self { send, recv })
    }
}

impl<S: Sink, R: Source> Leg<S, R> {
    /// Ends both directions at once.
    pub(crate) fn abandon(&mut self, code: Code) -> Code {
        self.send.reset(code);
        self.recv.stop(code);
        code
    }
}

/// Why an exchange ends before its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupted {
    /// The caller reset the request, stopped the response, or is gone.
    Cancelled,
    /// Time ran out.
    DeadlineExceeded,
}

/// How copying a response ended.
#[derive(Debug)]
pub(crate) enum ResponseEnd {
    /// All of it was passed on.
    Finished,
    /// The callee reset it.
    Reset(Code),
    /// The callee is gone.
    Lost,
    /// The caller takes no more of it.
    CallerGone,
    /// The callee sent what is no response.
    Malformed(String),
}

/// A request on its way, for as long as its response is awaited. Its parts are pinned by the
/// caller, so that a call allocates nothing for them.
pub(crate) struct Exchange<'a, S, R> {
    /// The caller stops the response.
    pub(crate) stopped: Pin<&'a mut S>,
    /// Forwards the request, see [`forward_request`].
    pub(crate) request: Pin<&'a mut R>,
    /// When the answer is due.
    pub(crate) deadline: Pin<&'a mut Sleep>,
    /// Whether `request` has more to do.
    pub(crate) forwarding: bool,
}

/// How forwarding a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestEnd {
    /// All of it was passed on.
    Finished,
    /// The caller reset it or is gone.
    CallerReset,
    /// The callee does not want the rest; its response says why.
    CalleeStopped,
}

impl<S: Future<Output = Code>, R: Future<Output = RequestEnd>> Exchange<'_, S, R> {
    /// Runs `work`, forwarding and watching meanwhile.
    pub(crate) async fn during<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> Result<T, Interrupted> {
        let mut work = std::pin::pin!(work);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(output) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            self.poll_interrupted(cx).map(Err)
        })
        .await
    }

    fn poll_interrupted(&mut self, cx: &mut Context<'_>) -> Poll<Interrupted> {
        if self.forwarding
            && let Poll::Ready(end) = self.request.as_mut().poll(cx)
        {
            self.forwarding = false;
            if end == RequestEnd::CallerReset {
                return Poll::Ready(Interrupted::Cancelled);
            }
        }
        if let Poll::Ready(code) = self.stopped.as_mut().poll(cx) {
            return Poll::Ready(match code {
                Code::DeadlineExceeded => Interrupted::DeadlineExceeded,
                _ => Interrupted::Cancelled,
            });
        }
        self.deadline
            .as_mut()
            .poll(cx)
            .map(|()| Interrupted::DeadlineExceeded)
    }
}

/// Forwards a request: `first`, then what comes from `from`, no faster than `to` takes it.
pub(crate) async fn forward_request(
    from: &mut impl Source,
    to: &mut SendStream,
    first: Bytes,
) -> RequestEnd {
    if !first.is_empty() && to.write_chunk(first).await.is_err() {
        return RequestEnd::CalleeStopped;
    }
    let mut chunks: [Bytes; CHUNKS] = [const { Bytes::new() }; CHUNKS];
    loop {
        match from.read(&mut chunks).await {
            Ok(Some(count)) => {
                if to.write_all_chunks(&mut chunks[..count]).await.is_err() {
                    return RequestEnd::CalleeStopped;
                }
            }
            Ok(None) => {
                let _ = to.finish();
                return RequestEnd::Finished;
            }
            Err(_) => return RequestEnd::CallerReset,
        }
    }
}

/// Passes a response on to its end, no faster than the caller takes it.
pub(crate) async fn copy_response(
    from: &mut RecvStream,
    to: &mut impl Sink,
    tracker: &mut ResponseTracker,
) -> ResponseEnd {
    let mut chunks: [Bytes; CHUNKS] = [const { Bytes::new() }; CHUNKS];
    loop {
        match from.read_chunks(&mut chunks).await {
            Ok(Some(count)) => {
                for chunk in &chunks[..count] {
                    if let Err(error) = tracker.feed(chunk) {
                        return ResponseEnd::Malformed(error.to_string());
                    }
                }
                if to.write(&mut chunks[..count]).await.is_err() {
                    return ResponseEnd::CallerGone;
                }
            }
            Ok(None) => return ResponseEnd::Finished,
            Err(ReadError::Reset(code)) => {
                return ResponseEnd::Reset(Code::from_quic(code.into_inner()));
            }
            Err(_) => return ResponseEnd::Lost,
        }
    }
}

/// Ends both legs as the outcome of copying demands, and says how the call ended.
pub(crate) async fn conclude(
    caller: &mut Leg<impl Sink, impl Source>,
    callee: &mut Leg,
    tracker: &ResponseTracker,
    outcome: Result<ResponseEnd, Interrupted>,
) -> Code {
    let status = match outcome {
        Ok(ResponseEnd::Finished) if tracker.is_at_boundary() && tracker.ended().is_some() => {
            caller.send.finish();
            // The callee may have answered before it had the whole request.
            caller.recv.stop(Code::Ok);
            Sink::reset(&mut callee.send, Code::Ok);
            return tracker.code().unwrap_or(Code::Unknown);
        }
        Ok(ResponseEnd::Finished) => {
            Status::new(Code::Internal, "the response ended without a status")
        }
        Ok(ResponseEnd::Reset(code)) => Status::new(code, "the responder reset its answer"),
        Ok(ResponseEnd::Lost) => Status::new(
            Code::Unavailable,
            "the responder was lost after it got the call",
        ),
        Ok(ResponseEnd::Malformed(why)) => Status::new(
            Code::Internal,
            format!("the responder broke the protocol: {why}"),
        ),
        Ok(ResponseEnd::CallerGone) | Err(Interrupted::Cancelled) => {
            callee.abandon(Code::Cancelled);
            return caller.abandon(Code::Cancelled);
        }
        Err(Interrupted::DeadlineExceeded) => {
            Status::new(Code::DeadlineExceeded, "the deadline has passed")
        }
    };
    let code = status.code;
    callee.abandon(code);
    if tracker.is_at_boundary() && tracker.ended().is_none() {
        super::end_with(&mut caller.send, status).await;
        caller.recv.stop(code);
    } else {
        // Inside a frame no status can be told apart from payload.
        caller.abandon(code);
    }
    code
}
