//! Reads whole frames from a QUIC stream.

use std::borrow::BorrowMut;

use bytes::Bytes;
use quinn::{ReadError, RecvStream};
use selvedge_proto::frame::{Frame, FrameDecoder, FrameError};

/// A stream read frame by frame.
#[derive(Debug)]
pub(crate) struct FrameReader<S = RecvStream> {
    stream: S,
    decoder: FrameDecoder,
}

/// Why there is no next frame.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadFrameError {
    /// The peer reset the stream or is gone.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes are not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl<S: BorrowMut<RecvStream>> FrameReader<S> {
    /// Reads from `stream`, accepting payload frames of up to `limit` bytes.
    pub(crate) fn new(stream: S, limit: usize) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::new(limit),
        }
    }

    /// As [`Self::new`], where `rest` was read of the stream before.
    pub(crate) fn with(stream: S, limit: usize, rest: Bytes) -> Self {
        let mut reader = Self::new(stream, limit);
        reader.decoder.push(rest);
        reader
    }

    /// The next frame, or `None` at the end of the stream. May be cancelled without loss.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, ReadFrameError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            match self
                .stream
                .borrow_mut()
                .read_chunk(usize::MAX, true)
                .await?
            {
                Some(chunk) => self.decoder.push(chunk.bytes),
                None => {
                    self.decoder.finish()?;
                    return Ok(None);
                }
            }
        }
    }

    /// The stream, and what was read of it after the last frame.
    pub(crate) fn into_parts(self) -> (S, Bytes) {
        (self.stream, self.decoder.into_rest())
    }
}
