//! What goes out to an MQTT client: packets encoded for its version, large payloads not copied.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use selvedge_proto::message::{Properties, Qos};

use crate::mqtt::packet::Version;
use crate::mqtt::properties;
use crate::mqtt::reason::Reason;
use crate::publisher::LARGE;

/// Reason strings are cut to this many bytes; a topic may make them longer than MQTT can say.
const MAX_REASON_STRING: usize = 1024;

/// Encoded packets waiting for the socket, in order. Their number is bounded by whoever fills it.
///
/// It is a [`Buf`], so that the socket can take as many of its parts at once as it likes.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// Complete parts before `tail`.
    parts: VecDeque<Bytes>,
    tail: BytesMut,
    /// Bytes in `parts` and `tail`.
    len: usize,
}

/// A PUBLISH on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) topic: &'a str,
    pub(crate) alias: Alias,
    /// Given for QoS 1 and 2, zero for QoS 0.
    pub(crate) packet_id: u16,
    pub(crate) qos: Qos,
    pub(crate) duplicate: bool,
    pub(crate) retain: bool,
    /// Encoded `MessageHeader`, if any.
    pub(crate) header: Option<&'a [u8]>,
    /// Lifetime left; stands in for the one in the header.
    pub(crate) expiry: Option<Duration>,
    pub(crate) subscription_ids: &'a [u32],
    pub(crate) payload: &'a Bytes,
}

/// What a PUBLISH says of its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Alias {
    /// Its name.
    #[default]
    None,
    /// Its name, and the number that stands for it from now on.
    Set(u16),
    /// The number that stands for it.
    Use(u16),
}

/// CONNACK.
#[derive(Debug, Default)]
pub(crate) struct ConnAck<'a> {
    pub(crate) session_present: bool,
    /// Given when it is not what the client asked for.
    pub(crate) session_expiry: Option<Duration>,
    pub(crate) assigned_client_id: Option<&'a str>,
    pub(crate) maximum_packet_size: usize,
    pub(crate) receive_maximum: u16,
    pub(crate) topic_alias_maximum: u16,
    /// Given when it is not what the client asked for.
    pub(crate) keep_alive: Option<Duration>,
    pub(crate) response_information: Option<&'a str>,
}

/// The packet is larger than the client takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLarge;

impl Output {
    /// Adds what another output holds.
    pub(crate) fn append(&mut self, mut other: Self) {
        if self.len == 0 {
            *self = other;
            return;
        }
        if !self.tail.is_empty() {
            self.parts.push_back(self.tail.split().freeze());
        }
        self.parts.append(&mut other.parts);
        self.tail = other.tail;
        self.len += other.len;
    }

    /// Accepts a connection.
    pub(crate) fn connack(&mut self, version: Version, ack: &ConnAck<'_>) {
        let mut body = BytesMut::new();
        body.put_u8(u8::from(ack.session_present));
        body.put_u8(Reason::SUCCESS.0);
        if version == Version::V5 {
            let mut properties = BytesMut::new();
            if let Some(expiry) = ack.session_expiry {
                properties.put_u8(0x11);
                properties.put_u32(properties::whole_seconds(expiry));
            }
            if let Some(id) = ack.assigned_client_id {
                properties.put_u8(0x12);
                put_binary(&mut properties, id.as_bytes());
            }
            properties.put_u8(0x21);
            properties.put_u16(ack.receive_maximum);
            if ack.topic_alias_maximum > 0 {
                properties.put_u8(0x22);
                properties.put_u16(ack.topic_alias_maximum);
            }
            if let Some(keep_alive) = ack.keep_alive {
                properties.put_u8(0x13);
                let seconds = u16::try_from(keep_alive.as_secs()).unwrap_or(u16::MAX);
                properties.put_u16(seconds);
            }
            if let Some(information) = ack.response_information {
                properties.put_u8(0x1A);
                put_binary(&mut properties, information.as_bytes());
            }
            properties.put_u8(0x27);
            properties.put_u32(u32::try_from(ack.maximum_packet_size).unwrap_or(u32::MAX));
            put_block(&mut body, &properties);
        }
        self.packet(0x20, &body);
    }

    /// Refuses a connection. 3.1.1 has no word for some reasons and is sent nothing then.
    pub(crate) fn connack_refusal(
        &mut self,
        version: Version,
        reason: Reason,
        text: &str,
        reference: Option<&str>,
    ) {
        match version {
            Version::V5 => {
                let text = Some(text);
                self.with_reason(0x20, &[0, reason.0], text, reference, &[], usize::MAX);
            }
            Version::V3 => {
                if let Some(code) = reason.connack_v3() {
                    self.packet(0x20, &[0, code]);
                }
            }
        }
    }

    /// PUBACK for success: the same four bytes in every version.
    #[inline]
    pub(crate) fn puback(&mut self, packet_id: u16) {
        self.short(0x40, packet_id);
    }

    /// PUBREC for success.
    pub(crate) fn pubrec(&mut self, packet_id: u16) {
        self.short(0x50, packet_id);
    }

    /// PUBREL.
    pub(crate) fn pubrel(&mut self, packet_id: u16) {
        self.short(0x62, packet_id);
    }

    /// PUBCOMP for success.
    pub(crate) fn pubcomp(&mut self, packet_id: u16) {
        self.short(0x70, packet_id);
    }

    /// PUBACK, PUBREC, PUBREL or PUBCOMP of 5.0 with a reason.
    pub(crate) fn refusal(
        &mut self,
        kind: Answer,
        packet_id: u16,
        reason: Reason,
        text: Option<&str>,
        limit: usize,
    ) {
        let [high, low] = packet_id.to_be_bytes();
        self.with_reason(kind as u8, &[high, low, reason.0], text, None, &[], limit);
    }

    /// SUBACK with one reason for each filter.
    pub(crate) fn suback(
        &mut self,
        version: Version,
        packet_id: u16,
        reasons: &[Reason],
        text: Option<&str>,
        limit: usize,
    ) {
        let codes: Vec<u8> = reasons
            .iter()
            .map(|reason| match version {
                Version::V3 if reason.is_failure() => 0x80,
                _ => reason.0,
            })
            .collect();
        let id = packet_id.to_be_bytes();
        match version {
            Version::V3 => self.packet(0x90, &[&id[..], &codes].concat()),
            Version::V5 => self.with_reason(0x90, &id, text, None, &codes, limit),
        }
    }

    /// UNSUBACK with one reason for each filter, which 3.1.1 is not told.
    pub(crate) fn unsuback(&mut self, version: Version, packet_id: u16, reasons: &[Reason]) {
        match version {
            Version::V3 => self.short(0xB0, packet_id),
            Version::V5 => {
                let codes: Vec<u8> = reasons.iter().map(|reason| reason.0).collect();
                let id = packet_id.to_be_bytes();
                self.with_reason(0xB0, &id, None, None, &codes, usize::MAX);
            }
        }
    }

    /// PINGRESP.
    pub(crate) fn pong(&mut self) {
        self.packet(0xD0, &[]);
    }

    /// DISCONNECT, which only 5.0 lets a server send.
    pub(crate) fn disconnect(
        &mut self,
        version: Version,
        reason: Reason,
        text: &str,
        reference: Option<&str>,
        limit: usize,
    ) {
        if version == Version::V5 {
            self.with_reason(0xE0, &[reason.0], Some(text), reference, &[], limit);
        }
    }

    /// PUBLISH.
    ///
    /// # Errors
    /// It has more than `limit` bytes; nothing is written.
    pub(crate) fn publish(
        &mut self,
        version: Version,
        message: &Outgoing<'_>,
        limit: usize,
    ) -> Result<(), TooLarge> {
        // Most messages have no properties: their block is then the one byte of its length.
        let mut block = BytesMut::new();
        let topic = match message.alias {
            Alias::Use(_) => "",
            Alias::Set(_) | Alias::None => message.topic,
        };
        if version == Version::V5 {
            if let Alias::Set(alias) | Alias::Use(alias) = message.alias {
                block.put_u8(0x23);
                block.put_u16(alias);
            }
            let decoded = message
                .header
                .and_then(|header| Properties::decode(header).ok());
            if let Some(decoded) = decoded {
                properties::put_publish(&mut block, &decoded);
            }
            if let Some(expiry) = message.expiry {
                block.put_u8(0x02);
                block.put_u32(properties::whole_seconds(expiry).max(1));
            }
            for id in message.subscription_ids {
                block.put_u8(0x0B);
                put_varint(&mut block, *id as usize);
            }
        }
        let id = if message.qos == Qos::AtMostOnce { 0 } else { 2 };
        let properties = match version {
            Version::V3 => 0,
            Version::V5 => varint_len(block.len()) + block.len(),
        };
        let remaining = 2 + topic.len() + id + properties + message.payload.len();
        // 268,435,455 is the most that the length of a packet can say.
        if 1 + varint_len(remaining) + remaining > limit || remaining > 0x0FFF_FFFF {
            return Err(TooLarge);
        }
        let before = self.tail.len();
        self.tail.reserve(5 + remaining.min(LARGE + 256));
        let qos = message.qos as u8;
        self.tail
            .put_u8(0x30 | u8::from(message.duplicate) << 3 | qos << 1 | u8::from(message.retain));
        put_varint(&mut self.tail, remaining);
        put_binary(&mut self.tail, topic.as_bytes());
        if id > 0 {
            self.tail.put_u16(message.packet_id);
        }
        if version == Version::V5 {
            put_block(&mut self.tail, &block);
        }
        if message.payload.len() < LARGE {
            self.tail.put_slice(message.payload);
            self.len += self.tail.len() - before;
        } else {
            self.len += self.tail.len() - before + message.payload.len();
            self.parts.push_back(self.tail.split().freeze());
            self.parts.push_back(message.payload.clone());
        }
        Ok(())
    }

    fn short(&mut self, kind: u8, packet_id: u16) {
        let [high, low] = packet_id.to_be_bytes();
        self.tail.extend_from_slice(&[kind, 2, high, low]);
        self.len += 4;
    }

    fn packet(&mut self, kind: u8, body: &[u8]) {
        let before = self.tail.len();
        self.tail.put_u8(kind);
        put_varint(&mut self.tail, body.len());
        self.tail.put_slice(body);
        self.len += self.tail.len() - before;
    }

    /// A packet of 5.0 whose properties are a reason string and a server reference at most, which are
    /// left out when the packet would be larger than `limit` with them (MQTT 5.0 section 3.1.2.11.4).
    fn with_reason(
        &mut self,
        kind: u8,
        head: &[u8],
        text: Option<&str>,
        reference: Option<&str>,
        tail: &[u8],
        limit: usize,
    ) {
        let mut block = BytesMut::new();
        if let Some(reference) = reference {
            block.put_u8(0x1C);
            put_binary(&mut block, reference.as_bytes());
        }
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            let cut = text.floor_char_boundary(MAX_REASON_STRING);
            block.put_u8(0x1F);
            // U+0000 may not be in a string of MQTT.
            put_binary(&mut block, text[..cut].replace('\0', "\u{fffd}").as_bytes());
        }
        if head.len() + tail.len() + block.len() + 10 > limit {
            block.clear();
        }
        let mut body = BytesMut::with_capacity(head.len() + tail.len() + block.len() + 4);
        body.put_slice(head);
        put_block(&mut body, &block);
        body.put_slice(tail);
        self.packet(kind, &body);
    }
}

/// Which packet carries a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Answer {
    /// PUBACK, to a QoS 1 PUBLISH.
    Publish = 0x40,
    /// PUBREC, to a QoS 2 PUBLISH.
    PublishQos2 = 0x50,
    /// PUBREL, to a PUBREC.
    Received = 0x62,
    /// PUBCOMP, to PUBREL.
    Release = 0x70,
}

impl Buf for Output {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&self.tail[..], |part| part)
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.len, "cannot advance past the end");
        self.len -= count;
        while let Some(front) = self.parts.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.parts.pop_front();
        }
        self.tail.advance(count);
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let parts = self.parts.iter().map(|part| &part[..]);
        let tail = std::iter::once(&self.tail[..]);
        let mut filled = 0;
        for (slice, part) in slices
            .iter_mut()
            .zip(parts.chain(tail).filter(|part| !part.is_empty()))
        {
            *slice = IoSlice::new(part);
            filled += 1;
        }
        filled
    }
}

/// A text or binary with its length before it, cut to what the length can say.
pub(crate) fn put_binary(out: &mut BytesMut, bytes: &[u8]) {
    let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    out.put_u16(len);
    out.put_slice(&bytes[..len.into()]);
}

/// A block of properties with its length before it.
fn put_block(out: &mut BytesMut, block: &[u8]) {
    put_varint(out, block.len());
    out.put_slice(block);
}

fn put_varint(out: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        out.put_u8((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn varint_len(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests;
