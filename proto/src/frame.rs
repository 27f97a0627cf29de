//! Frames: the length-delimited unit of every stream.
//!
//! A frame is `length kind body`: `length` is a variable-length integer (RFC 9000 section 16, at
//! most four bytes) that counts `kind` and `body`; `kind` is one byte; `body` is what the kind says.

use bytes::{Buf, BufMut, Bytes, BytesMut};

#[cfg(test)]
mod tests;

/// Largest length a four-byte variable-length integer can carry.
pub const MAX_FRAME: usize = (1 << 30) - 1;

/// What a frame holds. Kinds that a receiver does not know are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind(pub u8);

impl Kind {
    /// A `Control` message, on the control stream.
    pub const CONTROL: Self = Self(1);
    /// A `LaneHeader`, first on a lane.
    pub const LANE: Self = Self(2);
    /// A `Bind`, on a lane.
    pub const BIND: Self = Self(3);
    /// A message, on a lane; its body is described in [`crate::lane`].
    pub const MESSAGE: Self = Self(4);
    /// A `CallHeader`, first on a call stream.
    pub const CALL: Self = Self(5);
    /// An `InferHeader`, first on an inference stream.
    pub const INFER: Self = Self(6);
    /// Payload of a call or an inference.
    pub const DATA: Self = Self(7);
    /// An `InferAnswer`, before the first payload of an inference's response.
    pub const ANSWER: Self = Self(8);
    /// A `Status`, last in a response.
    pub const STATUS: Self = Self(9);
    /// All aliases bound so far on this lane are void; empty body.
    pub const UNBIND: Self = Self(10);
    /// A `Ping` on a publish lane, answered by `Pong` on the control stream.
    pub const MARK: Self = Self(11);

    /// Whether frames of this kind carry application payload and may be as large as the
    /// negotiated limit; all others are limited to [`crate::MAX_HEADER_FRAME`].
    pub fn is_payload(self) -> bool {
        self == Self::MESSAGE || self == Self::DATA
    }
}

/// One whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What `body` holds.
    pub kind: Kind,
    /// The bytes after the kind.
    pub body: Bytes,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced length is above the limit; nothing of the body was buffered.
    #[error("frame of {found} bytes is over the limit of {limit} bytes for its kind ({kind})")]
    TooLarge {
        /// Announced length.
        found: usize,
        /// Largest length accepted.
        limit: usize,
        /// Number of the frame's kind.
        kind: u8,
    },
    /// A frame must at least hold its kind.
    #[error("frame of length 0: expected at least the kind byte")]
    Empty,
    /// The length is written in eight bytes; four are the most.
    #[error("frame length uses an 8-byte integer: expected at most 4 bytes")]
    LongLength,
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame: {missing} more bytes were announced")]
    Truncated {
        /// Bytes that were announced and never came, at least.
        missing: usize,
    },
    /// The body does not decode as its kind says.
    #[error("malformed {what} frame: {reason}")]
    Malformed {
        /// What the frame should have held.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A frame found at the start of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The frame's kind.
    pub kind: Kind,
    /// Bytes before the body: length and kind.
    pub prefix: usize,
    /// Bytes of the body.
    pub body: usize,
}

impl Head {
    /// Bytes of the whole frame.
    pub fn total(&self) -> usize {
        self.prefix + self.body
    }
}

/// Reads the frame head at the start of `buffer`, or `None` when more bytes are needed. The body
/// itself need not be there yet, so an oversize frame is refused before it is buffered.
///
/// # Errors
/// The length is malformed, or above `limit` (payload kinds) or [`crate::MAX_HEADER_FRAME`] (others).
#[inline]
pub fn peek(buffer: &[u8], limit: usize) -> Result<Option<Head>, FrameError> {
    let Some(&first) = buffer.first() else {
        return Ok(None);
    };
    let width = 1usize << (first >> 6);
    if width == 8 {
        return Err(FrameError::LongLength);
    }
    if buffer.len() <= width {
        return Ok(None);
    }
    let length = match width {
        1 => usize::from(first),
        2 => usize::from(u16::from_be_bytes([first & 0x3f, buffer[1]])),
        _ => u32::from_be_bytes([first & 0x3f, buffer[1], buffer[2], buffer[3]]) as usize,
    };
    if length == 0 {
        return Err(FrameError::Empty);
    }
    let kind = Kind(buffer[width]);
    let limit = if kind.is_payload() {
        limit
    } else {
        crate::MAX_HEADER_FRAME
    };
    if length > limit {
        return Err(FrameError::TooLarge {
            found: length,
            limit,
            kind: kind.0,
        });
    }
    Ok(Some(Head {
        kind,
        prefix: width + 1,
        body: length - 1,
    }))
}

/// Appends a variable-length integer of at most four bytes.
///
/// # Panics
/// `value` is above [`MAX_FRAME`]; callers check sizes against the negotiated limit first.
#[inline]
pub fn put_varint(buffer: &mut BytesMut, value: usize) {
    match value {
        0..=0x3f => buffer.put_u8(value as u8),
        0x40..=0x3fff => buffer.put_u16(value as u16 | 0x4000),
        0x4000..=MAX_FRAME => buffer.put_u32(value as u32 | 0x8000_0000),
        _ => panic!("{value} does not fit a 4-byte variable-length integer"),
    }
}

/// Reads a variable-length integer of at most four bytes: the value and its width.
#[inline]
pub fn varint(buffer: &[u8]) -> Option<(usize, usize)> {
    let first = *buffer.first()?;
    match first >> 6 {
        0 => Some((usize::from(first), 1)),
        1 => Some((
            usize::from(u16::from_be_bytes([first & 0x3f, *buffer.get(1)?])),
            2,
        )),
        2 => {
            let rest = buffer.get(1..4)?;
            Some((
                u32::from_be_bytes([first & 0x3f, rest[0], rest[1], rest[2]]) as usize,
                4,
            ))
        }
        _ => None,
    }
}

/// Bytes a variable-length integer takes.
#[inline]
pub fn varint_len(value: usize) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        _ => 4,
    }
}

/// Appends the head of a frame whose body of `body` bytes follows.
#[inline]
pub fn put_head(buffer: &mut BytesMut, kind: Kind, body: usize) {
    put_varint(buffer, body + 1);
    buffer.put_u8(kind.0);
}

/// Encodes a prost message as one frame.
pub fn encode<M: prost::Message>(kind: Kind, message: &M) -> Bytes {
    let mut buffer = BytesMut::with_capacity(message.encoded_len() + 5);
    append(&mut buffer, kind, message);
    buffer.freeze()
}

/// Appends a prost message as one frame.
pub fn append<M: prost::Message>(buffer: &mut BytesMut, kind: Kind, message: &M) {
    put_head(buffer, kind, message.encoded_len());
    message.encode_raw(buffer);
}

/// The head of a frame whose payload is sent after it, without copying the payload.
pub fn head(kind: Kind, body: usize) -> Bytes {
    let mut buffer = BytesMut::with_capacity(5);
    put_head(&mut buffer, kind, body);
    buffer.freeze()
}

/// Decodes the body of a frame as a prost message.
///
/// # Errors
/// [`FrameError::Malformed`] naming `what`.
pub fn decode<M: prost::Message + Default>(
    what: &'static str,
    body: Bytes,
) -> Result<M, FrameError> {
    M::decode(body).map_err(|error| FrameError::Malformed {
        what,
        reason: error.to_string(),
    })
}

/// Cuts a stream of chunks into frames. A frame that lies within one chunk is not copied; one that
/// spans chunks is copied once.
#[derive(Debug)]
pub struct FrameDecoder {
    limit: usize,
    /// Bytes of an incomplete frame.
    partial: BytesMut,
    /// Bytes after the incomplete frame, or all bytes while there is none.
    chunk: Bytes,
}

impl FrameDecoder {
    /// A decoder that accepts payload frames of up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit: limit.min(MAX_FRAME),
            partial: BytesMut::new(),
            chunk: Bytes::new(),
        }
    }

    /// Adds received bytes. Call [`Self::next_frame`] until it returns `None` before the next push.
    pub fn push(&mut self, chunk: Bytes) {
        if self.chunk.is_empty() {
            self.chunk = chunk;
        } else {
            self.partial.extend_from_slice(&self.chunk);
            self.chunk = chunk;
        }
    }

    /// The next whole frame, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// The bytes are not a frame or the frame is too large; the stream cannot be read further.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.partial.is_empty() {
            let Some(head) = peek(&self.chunk, self.limit)? else {
                self.set_aside();
                return Ok(None);
            };
            if self.chunk.len() < head.total() {
                self.partial.reserve(head.total());
                self.set_aside();
                return Ok(None);
            }
            self.chunk.advance(head.prefix);
            return Ok(Some(Frame {
                kind: head.kind,
                body: self.chunk.split_to(head.body),
            }));
        }
        loop {
            match peek(&self.partial, self.limit)? {
                Some(head) => {
                    let missing = head.total().saturating_sub(self.partial.len());
                    let take = missing.min(self.chunk.len());
                    self.partial.extend_from_slice(&self.chunk[..take]);
                    self.chunk.advance(take);
                    if take < missing {
                        return Ok(None);
                    }
                    let mut frame = self.partial.split_to(head.total()).freeze();
                    // More than one frame can only have been set aside by pushing early.
                    frame.advance(head.prefix);
                    return Ok(Some(Frame {
                        kind: head.kind,
                        body: frame,
                    }));
                }
                None => {
                    if self.chunk.is_empty() {
                        return Ok(None);
                    }
                    self.partial.put_u8(self.chunk.get_u8());
                }
            }
        }
    }

    /// What was received after the last whole frame, to be passed on as it is.
    pub fn into_rest(mut self) -> Bytes {
        if self.partial.is_empty() {
            return self.chunk;
        }
        self.partial.extend_from_slice(&self.chunk);
        self.partial.freeze()
    }

    /// Whether no bytes of an unfinished frame are held.
    pub fn is_empty(&self) -> bool {
        self.partial.is_empty() && self.chunk.is_empty()
    }

    /// Says whether the stream may end here.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] when a frame was begun.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.is_empty() {
            return Ok(());
        }
        let held = self.partial.len() + self.chunk.len();
        let missing = match peek(&self.partial, self.limit) {
            Ok(Some(head)) => head.total().saturating_sub(held),
            _ => 1,
        };
        Err(FrameError::Truncated { missing })
    }

    fn set_aside(&mut self) {
        self.partial.extend_from_slice(&self.chunk);
        self.chunk = Bytes::new();
    }
}
