//! Datagrams: one QoS 0 message each, whole in itself.
//!
//! A datagram may be lost, and may overtake every stream, so it relies on nothing that was sent
//! before: topic and publisher are spelled out. It is `kind flags subscription topic-length topic
//! publisher-length publisher [header-length header] payload`: kind and flags are those of a
//! message frame, the subscription is four bytes, big-endian, and the lengths are variable-length
//! integers.

use bytes::{BufMut, Bytes, BytesMut};

use crate::frame::{self, FrameError, Kind};
use crate::lane::Flags;
use crate::message::Qos;

#[cfg(test)]
mod tests;

/// A message in a datagram, borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramRef<'a> {
    /// Its flags; their quality of service is 0.
    pub flags: Flags,
    /// From the broker: the subscription that the message is for. From a client: 0.
    pub subscription: u32,
    /// The topic, not checked yet.
    pub topic: &'a str,
    /// From the broker: the publisher's identity as verified. From a client it means nothing.
    pub publisher: &'a str,
    /// The encoded `MessageHeader`, if there is one.
    pub header: Option<&'a [u8]>,
    /// The application's payload.
    pub payload: &'a [u8],
}

impl<'a> DatagramRef<'a> {
    /// Reads a datagram; `None` is one of a kind that this revision does not know.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] when it ends too early, is not text where it must be, or has a
    /// quality of service other than 0.
    pub fn parse(datagram: &'a [u8]) -> Result<Option<Self>, FrameError> {
        let (&kind, rest) = datagram.split_first().ok_or_else(|| short("kind"))?;
        if Kind(kind) != Kind::MESSAGE {
            return Ok(None);
        }
        let (&flags, rest) = rest.split_first().ok_or_else(|| short("flags"))?;
        let flags = Flags::from_bits(flags);
        let qos = flags.qos()?;
        if qos != Qos::AtMostOnce {
            return Err(malformed(format!(
                "quality of service {}: expected 0",
                qos as u8
            )));
        }
        let (subscription, rest) = rest
            .split_first_chunk()
            .ok_or_else(|| short("subscription"))?;
        let (topic, rest) = text(rest, "topic")?;
        let (publisher, rest) = text(rest, "publisher")?;
        let (header, payload) = if flags.has_header() {
            let (header, rest) = sized(rest, "header")?;
            (Some(header), rest)
        } else {
            (None, rest)
        };
        Ok(Some(Self {
            flags,
            subscription: u32::from_be_bytes(*subscription),
            topic,
            publisher,
            header,
            payload,
        }))
    }

    /// Bytes of the datagram.
    pub fn encoded_len(&self) -> usize {
        let sized = |length: usize| frame::varint_len(length) + length;
        let header = self.header.map_or(0, |header| sized(header.len()));
        let fixed = 2 + size_of::<u32>();
        fixed + sized(self.topic.len()) + sized(self.publisher.len()) + header + self.payload.len()
    }

    /// The datagram's bytes. The flag for a header is set here.
    pub fn encode(&self) -> Bytes {
        let mut buffer = BytesMut::with_capacity(self.encoded_len());
        buffer.put_u8(Kind::MESSAGE.0);
        buffer.put_u8(self.flags.bits(self.header.is_some()));
        buffer.put_u32(self.subscription);
        for field in [self.topic, self.publisher] {
            frame::put_varint(&mut buffer, field.len());
            buffer.extend_from_slice(field.as_bytes());
        }
        if let Some(header) = self.header {
            frame::put_varint(&mut buffer, header.len());
            buffer.extend_from_slice(header);
        }
        buffer.extend_from_slice(self.payload);
        buffer.freeze()
    }
}

fn sized<'a>(rest: &'a [u8], what: &str) -> Result<(&'a [u8], &'a [u8]), FrameError> {
    let (length, width) =
        frame::varint(rest).ok_or_else(|| malformed(format!("ends before its {what} length")))?;
    rest[width..]
        .split_at_checked(length)
        .ok_or_else(|| short(what))
}

fn text<'a>(rest: &'a [u8], what: &str) -> Result<(&'a str, &'a [u8]), FrameError> {
    let (bytes, rest) = sized(rest, what)?;
    let text =
        std::str::from_utf8(bytes).map_err(|_| malformed(format!("its {what} is not UTF-8")))?;
    Ok((text, rest))
}

#[cold]
fn short(what: &str) -> FrameError {
    malformed(format!("ends before its {what}"))
}

#[cold]
fn malformed(reason: String) -> FrameError {
    FrameError::Malformed {
        what: "datagram",
        reason,
    }
}
