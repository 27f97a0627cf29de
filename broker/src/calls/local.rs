//! A requester within this process: the front door's end of an inference, in place of a QUIC stream.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use selvedge_proto::frame::{Frame, FrameDecoder};
use selvedge_proto::status::{Code, Status};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::exchange::{Gone, Leg, Sink, Source};

#[cfg(test)]
mod tests;

/// Writes that may wait to be taken, each of as many chunks as were read at once, up to 32 packets.
/// When there are more the worker waits, as it would for a slow peer.
const WRITES: usize = 8;

/// The bytes of a request that is here as a whole.
pub(crate) struct Request(VecDeque<Bytes>);

impl Source for Request {
    async fn read(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, Gone> {
        let count = self.0.len().min(chunks.len());
        for (place, chunk) in chunks.iter_mut().zip(self.0.drain(..count)) {
            *place = chunk;
        }
        Ok((count > 0).then_some(count))
    }

    fn stop(&mut self, _: Code) {
        self.0.clear();
    }
}

/// How the bytes of a response end.
#[derive(Debug, Clone, Copy)]
enum End {
    Finished,
    Reset(Code),
}

/// Where the response is written.
pub(crate) struct Writer {
    /// `None` once the response has ended.
    writes: Option<mpsc::Sender<Vec<Bytes>>>,
    end: Arc<OnceLock<End>>,
    gone: CancellationToken,
}

impl Writer {
    fn end(&mut self, end: End) {
        // The end first: the reader looks for it when there are no more writes.
        let _ = self.end.set(end);
        self.writes = None;
    }
}

impl Sink for Writer {
    fn stopped(&self) -> impl Future<Output = Code> + Send + 'static {
        let gone = self.gone.clone().cancelled_owned();
        async move {
            gone.await;
            Code::Cancelled
        }
    }

    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), Gone> {
        let chunks = chunks.iter_mut().map(std::mem::take);
        let chunks: Vec<Bytes> = chunks.filter(|chunk| !chunk.is_empty()).collect();
        match &self.writes {
            Some(writes) => writes.send(chunks).await.map_err(|_| Gone),
            None => Err(Gone),
        }
    }

    fn finish(&mut self) {
        self.end(End::Finished);
    }

    fn reset(&mut self, code: Code) {
        self.end(End::Reset(code));
    }
}

/// The frames of a response. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Response {
    writes: mpsc::Receiver<Vec<Bytes>>,
    chunks: VecDeque<Bytes>,
    decoder: FrameDecoder,
    end: Arc<OnceLock<End>>,
    _gone: DropGuard,
}

impl Response {
    /// The next frame, or `None` at the end.
    ///
    /// # Errors
    /// The response broke off.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, Status> {
        let malformed =
            |why: String| Status::new(Code::Internal, format!("the response is malformed: {why}"));
        loop {
            let frame = self.decoder.next_frame();
            if let Some(frame) = frame.map_err(|error| malformed(error.to_string()))? {
                return Ok(Some(frame));
            }
            if let Some(chunk) = self.chunks.pop_front() {
                self.decoder.push(chunk);
                continue;
            }
            if let Some(chunks) = self.writes.recv().await {
                self.chunks = chunks.into();
                continue;
            }
            return match self.end.get() {
                Some(End::Finished) => match self.decoder.finish() {
                    Ok(()) => Ok(None),
                    Err(error) => Err(malformed(error.to_string())),
                },
                Some(End::Reset(code)) => Err(Status::new(*code, "the answer was cut off")),
                None => Err(Status::new(
                    Code::Internal,
                    "the request ended without an answer",
                )),
            };
        }
    }
}

/// Both ends of a request whose bytes are `request`, and whose response has frames of at most
/// `limit` bytes.
pub(crate) fn pair(request: VecDeque<Bytes>, limit: usize) -> (Leg<Writer, Request>, Response) {
    let (writer, writes) = mpsc::channel(WRITES);
    let end = Arc::new(OnceLock::new());
    let gone = CancellationToken::new();
    let leg = Leg {
        send: Writer {
            writes: Some(writer),
            end: Arc::clone(&end),
            gone: gone.clone(),
        },
        recv: Request(request),
    };
    let response = Response {
        writes,
        chunks: VecDeque::new(),
        decoder: FrameDecoder::new(limit),
        end,
        _gone: gone.drop_guard(),
    };
    (leg, response)
}
