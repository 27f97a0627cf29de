//! Frames read from a QUIC stream.

use quinn::{ReadError, RecvStream};
use selvedge_proto::frame::{Frame, FrameDecoder, FrameError};

/// A receive stream, cut into frames.
#[derive(Debug)]
pub(crate) struct FramedReader {
    stream: RecvStream,
    decoder: FrameDecoder,
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FramedError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl FramedReader {
    /// Accepts payload frames of up to `limit` bytes.
    pub(crate) fn new(stream: RecvStream, limit: usize) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::new(limit),
        }
    }

    /// The next frame, or `None` at the end of the stream. A call given up loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, FramedError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            match self.stream.read_chunk(usize::MAX, true).await? {
                Some(chunk) => self.decoder.push(chunk.bytes),
                None => {
                    self.decoder.finish()?;
                    return Ok(None);
                }
            }
        }
    }

    /// Tells the other side that no more will be read.
    pub(crate) fn stop(&mut self, code: quinn::VarInt) {
        // It fails when the stream is at its end already, which is as well.
        let _ = self.stream.stop(code);
    }

    /// The stream and what was read ahead of it.
    pub(crate) fn into_parts(self) -> (RecvStream, FrameDecoder) {
        (self.stream, self.decoder)
    }
}
