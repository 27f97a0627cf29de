//! Lanes: unidirectional streams of messages, and the body of a message frame.
//!
//! The body is `flags alias [header-length header] payload`: one byte of [`Flags`], the alias that
//! a `Bind` frame gave to the topic (variable-length integer), then, if the flags say so, a
//! `MessageHeader` with its length before it, then the payload to the end of the frame.
//!
//! An alias is written in two bytes at least, so that who passes messages on can put its own alias in
//! its place ([`realias`]) instead of writing the messages again.

use bytes::{BufMut, Bytes, BytesMut};

use crate::frame::{self, FrameError, Kind};
use crate::message::{Durability, Qos};

#[cfg(test)]
mod tests;

/// The first byte of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(u8);

impl Flags {
    const QOS: u8 = 0b0000_0011;
    const RETAIN: u8 = 0b0000_0100;
    const HEADER: u8 = 0b0000_1000;
    const DUPLICATE: u8 = 0b0001_0000;
    const DURABILITY: u8 = 0b0110_0000;

    /// Flags of a plain message of this quality of service.
    pub fn new(qos: Qos) -> Self {
        Self(qos as u8)
    }

    /// Quality of service of this hop.
    ///
    /// # Errors
    /// The two bits hold 3, which is no quality of service.
    #[inline]
    pub fn qos(self) -> Result<Qos, FrameError> {
        Qos::try_from(self.0 & Self::QOS).map_err(|_| FrameError::Malformed {
            what: "message",
            reason: "quality of service 3: expected 0, 1 or 2".to_owned(),
        })
    }

    /// The same flags with another quality of service.
    #[must_use]
    pub fn with_qos(self, qos: Qos) -> Self {
        Self((self.0 & !Self::QOS) | qos as u8)
    }

    /// From a publisher: keep as the topic's retained message. From the broker: this was kept.
    pub fn retain(self) -> bool {
        self.0 & Self::RETAIN != 0
    }

    /// Sets or clears the retain flag.
    #[must_use]
    pub fn with_retain(self, on: bool) -> Self {
        self.with(Self::RETAIN, on)
    }

    /// A `MessageHeader` follows the alias.
    #[inline]
    pub fn has_header(self) -> bool {
        self.0 & Self::HEADER != 0
    }

    /// The message may have been delivered before.
    pub fn duplicate(self) -> bool {
        self.0 & Self::DUPLICATE != 0
    }

    /// Sets or clears the duplicate flag.
    #[must_use]
    pub fn with_duplicate(self, on: bool) -> Self {
        self.with(Self::DUPLICATE, on)
    }

    /// Durability that the publisher demands of the acknowledgement.
    pub fn durability(self) -> Durability {
        match (self.0 & Self::DURABILITY) >> 5 {
            1 => Durability::Memory,
            2 => Durability::Disk,
            3 => Durability::Replicated,
            _ => Durability::Default,
        }
    }

    /// Demands a durability.
    #[must_use]
    pub fn with_durability(self, durability: Durability) -> Self {
        let bits = match durability {
            Durability::Default => 0,
            Durability::Memory => 1,
            Durability::Disk => 2,
            Durability::Replicated => 3,
        };
        Self((self.0 & !Self::DURABILITY) | bits << 5)
    }

    pub(crate) fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Nothing but a quality of service of 0 or 1: such a message is passed on as it came.
    #[inline]
    pub fn is_plain(self) -> bool {
        self.0 <= Qos::AtLeastOnce as u8
    }

    /// The byte, with or without the sign that a header follows.
    pub(crate) fn bits(self, header: bool) -> u8 {
        self.with(Self::HEADER, header).0
    }

    fn with(self, bit: u8, on: bool) -> Self {
        Self(if on { self.0 | bit } else { self.0 & !bit })
    }
}

/// A message frame's body, borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageRef<'a> {
    /// Its flags.
    pub flags: Flags,
    /// The topic's alias on this lane.
    pub alias: u32,
    /// The encoded `MessageHeader`, if there is one.
    pub header: Option<&'a [u8]>,
    /// The application's payload.
    pub payload: &'a [u8],
}

impl<'a> MessageRef<'a> {
    /// Reads the body of a message frame. The header is not decoded.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] when the body ends too early.
    #[inline]
    pub fn parse(body: &'a [u8]) -> Result<Self, FrameError> {
        let (&flags, rest) = body.split_first().ok_or_else(|| short("flags"))?;
        let flags = Flags(flags);
        let (alias, width) = frame::varint(rest).ok_or_else(|| short("alias"))?;
        let mut rest = &rest[width..];
        let mut header = None;
        if flags.has_header() {
            let (length, width) = frame::varint(rest).ok_or_else(|| short("header length"))?;
            let end = width + length;
            header = Some(rest.get(width..end).ok_or_else(|| short("header"))?);
            rest = &rest[end..];
        }
        Ok(Self {
            flags,
            alias: alias as u32,
            header,
            payload: rest,
        })
    }

    /// Where the payload starts in the body this was parsed from.
    pub fn payload_offset(&self, body: &[u8]) -> usize {
        body.len() - self.payload.len()
    }
}

#[cold]
fn short(what: &str) -> FrameError {
    FrameError::Malformed {
        what: "message",
        reason: format!("ends before its {what}"),
    }
}

/// Appends all of a message frame but its payload of `payload` bytes, which must follow.
/// `header` is an encoded `MessageHeader`; the flag for it is set here.
#[inline]
pub fn put_message_head(
    buffer: &mut BytesMut,
    flags: Flags,
    alias: u32,
    header: Option<&[u8]>,
    payload: usize,
) {
    let (alias, width) = written(alias);
    let header_bytes = header.map_or(0, |header| frame::varint_len(header.len()) + header.len());
    let body = 1 + width + header_bytes + payload;
    frame::put_head(buffer, Kind::MESSAGE, body);
    buffer.put_u8(flags.with(Flags::HEADER, header.is_some()).0);
    buffer.extend_from_slice(&alias[..width]);
    if let Some(header) = header {
        frame::put_varint(buffer, header.len());
        buffer.extend_from_slice(header);
    }
}

/// Appends a whole message frame.
#[inline]
pub fn put_message(
    buffer: &mut BytesMut,
    flags: Flags,
    alias: u32,
    header: Option<&[u8]>,
    payload: &[u8],
) {
    put_message_head(buffer, flags, alias, header, payload.len());
    buffer.extend_from_slice(payload);
}

/// An alias as it is written, and how many bytes of that count.
#[inline]
fn written(alias: u32) -> ([u8; 4], usize) {
    if alias <= TWO_BYTES {
        let [high, low] = (alias as u16 | 0x4000).to_be_bytes();
        ([high, low, 0, 0], 2)
    } else {
        ((alias | 0x8000_0000).to_be_bytes(), 4)
    }
}

/// Largest alias that two bytes hold.
const TWO_BYTES: u32 = 0x3fff;

/// Whole messages in a row that are alike: flags, alias and how they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes of their frames.
    pub bytes: usize,
    /// How many there are.
    pub count: u32,
}

/// Puts `alias` in the place of that of the first message in `buffer`, and of all that follow it
/// without a gap and have the same flags and alias. `limit` is the largest frame; a message with a body
/// of `large` bytes or more ends the run, as does a frame that is not whole.
///
/// Returns `None`, with nothing changed, if there is no such message at the start, or `alias` needs more
/// bytes than it has.
#[inline]
pub fn realias(buffer: &mut [u8], alias: u32, limit: usize, large: usize) -> Option<Run> {
    let whole = |buffer: &[u8]| {
        let head = frame::peek(buffer, limit).ok().flatten()?;
        let fits = head.kind == Kind::MESSAGE && head.body < large && head.total() <= buffer.len();
        fits.then_some(head)
    };
    let mut head = whole(buffer)?;
    let body = &buffer[head.prefix..head.total()];
    let (_, width) = frame::varint(body.get(1..)?)?;
    // Flags and alias are compared, and written, as one.
    let mut old = [0; 5];
    old[..=width].copy_from_slice(&body[..=width]);
    let mut new = old;
    match width {
        2 if alias <= TWO_BYTES => {
            new[1..3].copy_from_slice(&(alias as u16 | 0x4000).to_be_bytes());
        }
        4 => new[1..].copy_from_slice(&(alias | 0x8000_0000).to_be_bytes()),
        _ => return None,
    }
    let mut run = Run { bytes: 0, count: 0 };
    loop {
        let start = run.bytes + head.prefix;
        buffer[start..=start + width].copy_from_slice(&new[..=width]);
        run.bytes += head.total();
        run.count += 1;
        match whole(&buffer[run.bytes..]) {
            Some(next)
                if buffer[run.bytes + next.prefix..][..next.body].starts_with(&old[..=width]) =>
            {
                head = next;
            }
            _ => return Some(run),
        }
    }
}

/// Most bytes that a message frame needs beyond header and payload.
pub const MESSAGE_OVERHEAD: usize = 4 + 1 + 1 + 4 + 4;

/// An owned message frame, for receivers that keep the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageFrame {
    /// Its flags.
    pub flags: Flags,
    /// The topic's alias on this lane.
    pub alias: u32,
    /// The encoded `MessageHeader`, if there is one.
    pub header: Option<Bytes>,
    /// The application's payload, sharing the memory of the received chunk.
    pub payload: Bytes,
}

impl MessageFrame {
    /// Reads the body of a message frame without copying.
    ///
    /// # Errors
    /// As [`MessageRef::parse`].
    pub fn parse(body: &Bytes) -> Result<Self, FrameError> {
        let message = MessageRef::parse(body)?;
        Ok(Self {
            flags: message.flags,
            alias: message.alias,
            header: message.header.map(|header| body.slice_ref(header)),
            payload: body.slice_ref(message.payload),
        })
    }
}
