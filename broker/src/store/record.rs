//! Records of the store and their bytes. Each begins with the version of its form.

use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use selvedge_proto::message::{Class, Qos};
use serde::{Deserialize, Serialize};

use super::{QueueKey, from_unix_ms, unix_ms};
use crate::batch::Batch;

#[cfg(test)]
mod tests;

/// Version that records are written in.
const VERSION: u8 = 1;

/// Version and CRC-32 of what follows them.
const PREFIX: usize = 5;

/// A kept session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSession {
    /// Unique within the broker, never reused.
    pub id: u64,
    /// Whose, as a SPIFFE URI.
    pub identity: String,
    /// Its name within the identity.
    pub name: String,
    /// How long it is kept without a connection.
    pub expiry_ms: u64,
    /// Since when it is without one, in milliseconds since 1970; absent while connected.
    pub detached_ms: Option<u64>,
}

/// A subscription of a kept session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSubscription {
    /// Unique within the session.
    pub id: u32,
    /// Filter and share group, as MQTT writes them.
    pub target: String,
    /// 0 to 2.
    pub max_qos: u8,
    /// See [`crate::session::Subscriber::no_local`].
    pub no_local: bool,
    /// See [`crate::session::Subscriber::retain_as_published`].
    pub retain_as_published: bool,
    /// See [`crate::session::Subscriber::identifier`].
    pub identifier: Option<u32>,
    /// Whether its lanes are its own.
    pub own_lane: bool,
    /// `default`, `drop_oldest`, `drop_newest` or `disconnect`.
    pub overflow: String,
    /// Whether retained messages or a replay are still to be sent.
    #[serde(default)]
    pub owed: bool,
    /// Whether QoS 0 messages go in datagrams.
    #[serde(default)]
    pub datagrams: bool,
}

/// An id of a message that is a duplicate when it comes again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMessageId {
    /// The tenant.
    pub tenant: String,
    /// Identity of the publisher.
    pub publisher: String,
    /// The publisher's id of the message.
    pub id: Bytes,
    /// Until when it is a duplicate.
    pub until: SystemTime,
}

/// A QoS 2 packet id of a kept session that is in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredPacket {
    /// The client has published with this id, and has not released it.
    Received(u16),
    /// The batch of this place, which is one message, was sent with this id; [`QueueKey::session`] is
    /// the session's.
    Sent(u16, QueueKey),
    /// The client has the message of this id, and is owed the PUBREL, or has not answered it.
    Released(u16),
}

/// The id that a kept packet id is: it can be in use in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PacketKey {
    /// Chosen by the client.
    Received(u16),
    /// Chosen by the broker.
    Sent(u16),
}

/// The will of a connected session, or one whose delay is running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWill {
    /// Id of the session.
    pub session: u64,
    /// Whose, as a SPIFFE URI.
    pub identity: String,
    /// Name of the session within the identity.
    pub name: String,
    /// Where.
    pub topic: String,
    /// What.
    pub payload: Bytes,
    /// Encoded `MessageHeader`, if any.
    pub header: Option<Bytes>,
    /// Quality of service.
    pub qos: Qos,
    /// Keep as the topic's retained message.
    pub retain: bool,
    /// Wait this long, from the loss of the connection on.
    pub delay_ms: u64,
    /// When the connection was lost, in milliseconds since 1970; absent while connected.
    pub lost_ms: Option<u64>,
}

/// One batch as it is kept: nothing in it refers to the process that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMessages {
    /// Topic of all of them.
    pub topic: String,
    /// Identity of the publisher.
    pub publisher: String,
    /// Class of the lanes that carried them.
    pub class: Class,
    /// Their quality of service.
    pub qos: Qos,
    /// Kept because it was retained.
    pub retain: bool,
    /// See [`Batch::retain_as_published`].
    pub retain_as_published: bool,
    /// When they lose their worth.
    pub expires: Option<SystemTime>,
    /// The messages.
    pub messages: Vec<StoredMessage>,
}

/// One kept message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMessage {
    /// Encoded `MessageHeader`, if any.
    pub header: Option<Bytes>,
    /// The payload.
    pub payload: Bytes,
}

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a later version of the broker.
    #[error("record version {found}: expected {VERSION}")]
    Version {
        /// Version found.
        found: u8,
    },
    /// The bytes end too early or hold what cannot be.
    #[error("damaged record: {0}")]
    Damaged(String),
}

fn damaged(what: &str) -> RecordError {
    RecordError::Damaged(what.to_owned())
}

/// A session or subscription as bytes.
pub(crate) fn encode_json<T: Serialize>(record: &T) -> Vec<u8> {
    let mut bytes = vec![0; PREFIX];
    serde_json::to_writer(&mut bytes, record).expect("a record of plain fields is JSON");
    seal(&mut bytes);
    bytes
}

/// Fills in the prefix of a record.
fn seal(record: &mut [u8]) {
    let sum = crc32fast::hash(&record[PREFIX..]);
    record[0] = VERSION;
    record[1..PREFIX].copy_from_slice(&sum.to_be_bytes());
}

/// A session or subscription from bytes.
pub(crate) fn decode_json<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, RecordError> {
    let body = versioned(bytes)?;
    serde_json::from_slice(body).map_err(|error| RecordError::Damaged(error.to_string()))
}

/// What follows the prefix, if it is as it was written.
fn versioned(bytes: &[u8]) -> Result<&[u8], RecordError> {
    match bytes.first() {
        None => return Err(damaged("it is empty")),
        Some(&VERSION) => {}
        Some(&found) => return Err(RecordError::Version { found }),
    }
    let (prefix, body) = bytes
        .split_at_checked(PREFIX)
        .ok_or_else(|| damaged("it ends early"))?;
    if prefix[1..] != crc32fast::hash(body).to_be_bytes() {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(body)
}

/// An id of a message as bytes.
pub(crate) fn encode_message_id(
    tenant: &str,
    publisher: &str,
    id: &[u8],
    until: SystemTime,
) -> Vec<u8> {
    let mut out = BytesMut::with_capacity(tenant.len() + publisher.len() + id.len() + 32);
    out.put_bytes(0, PREFIX);
    out.put_u64(unix_ms(until));
    for part in [tenant.as_bytes(), publisher.as_bytes(), id] {
        put_bytes(&mut out, part);
    }
    let mut record = out.to_vec();
    seal(&mut record);
    record
}

/// An id of a message from bytes.
pub(crate) fn decode_message_id(bytes: &[u8]) -> Result<StoredMessageId, RecordError> {
    let mut body = Bytes::copy_from_slice(versioned(bytes)?);
    let until = body.try_get_u64().map_err(|_| damaged("it ends early"))?;
    Ok(StoredMessageId {
        tenant: take_text(&mut body)?,
        publisher: take_text(&mut body)?,
        id: take_bytes(&mut body)?,
        until: from_unix_ms(until),
    })
}

impl StoredPacket {
    /// Which id it is about.
    pub fn key(&self) -> PacketKey {
        match *self {
            Self::Received(id) => PacketKey::Received(id),
            Self::Sent(id, _) | Self::Released(id) => PacketKey::Sent(id),
        }
    }
}

/// The key of a packet id: sorts by session.
pub(crate) fn packet_key(session: u64, packet: PacketKey) -> [u8; 11] {
    let (direction, id) = match packet {
        PacketKey::Received(id) => (0, id),
        PacketKey::Sent(id) => (1, id),
    };
    let mut key = [0; 11];
    key[..8].copy_from_slice(&session.to_be_bytes());
    key[8] = direction;
    key[9..].copy_from_slice(&u16::to_be_bytes(id));
    key
}

/// A packet id as bytes.
pub(crate) fn encode_packet(packet: &StoredPacket) -> Vec<u8> {
    let mut record = vec![0; PREFIX];
    if let StoredPacket::Sent(_, place) = packet {
        record.extend_from_slice(&place.to_bytes());
    }
    seal(&mut record);
    record
}

/// A packet id and its session from the key and the bytes.
pub(crate) fn decode_packet(key: &[u8], bytes: &[u8]) -> Result<(u64, StoredPacket), RecordError> {
    let body = versioned(bytes)?;
    let (session, rest) = key
        .split_first_chunk()
        .ok_or_else(|| damaged("its key is short"))?;
    let &[direction, high, low] = rest else {
        return Err(damaged("its key is no packet id"));
    };
    let id = u16::from_be_bytes([high, low]);
    let packet = match (direction, body) {
        (0, []) => StoredPacket::Received(id),
        (1, []) => StoredPacket::Released(id),
        (1, place) => StoredPacket::Sent(
            id,
            QueueKey::from_bytes(place).ok_or_else(|| damaged("its place in a queue"))?,
        ),
        _ => return Err(damaged("its direction")),
    };
    Ok((u64::from_be_bytes(*session), packet))
}

/// A will as bytes.
pub(crate) fn encode_will(will: &StoredWill) -> Vec<u8> {
    let mut out = BytesMut::with_capacity(will.payload.len() + will.topic.len() + 256);
    out.put_bytes(0, PREFIX);
    out.put_u64(will.session);
    out.put_u64(will.delay_ms);
    out.put_u64(will.lost_ms.map_or(0, |lost| lost.max(1)));
    out.put_u8(will.qos as u8);
    out.put_u8(u8::from(will.retain) | u8::from(will.header.is_some()) << 1);
    for part in [
        will.identity.as_bytes(),
        will.name.as_bytes(),
        will.topic.as_bytes(),
        will.header.as_deref().unwrap_or_default(),
        &will.payload,
    ] {
        put_bytes(&mut out, part);
    }
    let mut record = out.to_vec();
    seal(&mut record);
    record
}

/// A will from bytes.
pub(crate) fn decode_will(bytes: &[u8]) -> Result<StoredWill, RecordError> {
    let mut body = Bytes::copy_from_slice(versioned(bytes)?);
    if body.len() < 26 {
        return Err(damaged("it ends early"));
    }
    let session = body.get_u64();
    let delay_ms = body.get_u64();
    let lost_ms = body.get_u64();
    let qos = Qos::try_from(body.get_u8()).map_err(|_| damaged("unknown quality of service"))?;
    let flags = body.get_u8();
    let identity = take_text(&mut body)?;
    let name = take_text(&mut body)?;
    let topic = take_text(&mut body)?;
    let header = take_bytes(&mut body)?;
    Ok(StoredWill {
        session,
        identity,
        name,
        topic,
        payload: take_bytes(&mut body)?,
        header: (flags & 2 != 0).then_some(header),
        qos,
        retain: flags & 1 != 0,
        delay_ms,
        lost_ms: (lost_ms > 0).then_some(lost_ms),
    })
}

/// A batch of a topic's history as bytes: the record of the batch behind the time it was published.
pub(crate) fn encode_history(published: SystemTime, batch: &[u8]) -> Vec<u8> {
    let mut record = vec![0; PREFIX];
    record.extend_from_slice(&unix_ms(published).to_be_bytes());
    record.extend_from_slice(batch);
    seal(&mut record);
    record
}

/// A batch of a topic's history from bytes.
pub(crate) fn decode_history(bytes: &[u8]) -> Result<(SystemTime, StoredMessages), RecordError> {
    let (published, batch) = versioned(bytes)?
        .split_first_chunk()
        .ok_or_else(|| damaged("it ends early"))?;
    Ok((
        from_unix_ms(u64::from_be_bytes(*published)),
        decode_batch(batch)?,
    ))
}

/// A batch as bytes; `now` and `clock` are the same moment, to turn its expiry into a date.
pub(crate) fn encode_batch(batch: &Batch, now: Instant, clock: SystemTime) -> Vec<u8> {
    let mut out = BytesMut::with_capacity(batch.cost() + 128);
    out.put_bytes(0, PREFIX);
    out.put_u8(batch.class.index() as u8);
    out.put_u8(batch.qos as u8);
    out.put_u8(u8::from(batch.retain) | u8::from(batch.retain_as_published) << 1);
    let expires = batch.expires.map_or(0, |expires| {
        unix_ms(clock + expires.saturating_duration_since(now)).max(1)
    });
    out.put_u64(expires);
    put_bytes(&mut out, batch.flow.topic.as_str().as_bytes());
    put_bytes(&mut out, batch.flow.publisher.uri().as_bytes());
    out.put_u32(batch.count);
    for message in batch.messages() {
        out.put_u8(u8::from(message.header.is_some()));
        if let Some(header) = &message.header {
            put_bytes(&mut out, header);
        }
        put_bytes(&mut out, &message.payload);
    }
    let mut record = out.to_vec();
    seal(&mut record);
    record
}

impl StoredMessages {
    /// A batch from bytes.
    ///
    /// # Errors
    /// They are of a later version, or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        decode_batch(bytes)
    }
}

fn decode_batch(bytes: &[u8]) -> Result<StoredMessages, RecordError> {
    let mut body = Bytes::copy_from_slice(versioned(bytes)?);
    if body.len() < 11 {
        return Err(damaged("it ends early"));
    }
    let class = *Class::ALL
        .get(usize::from(body.get_u8()))
        .ok_or_else(|| damaged("unknown class"))?;
    let qos = Qos::try_from(body.get_u8()).map_err(|_| damaged("unknown quality of service"))?;
    let flags = body.get_u8();
    let expires = body.get_u64();
    let topic = take_text(&mut body)?;
    let publisher = take_text(&mut body)?;
    let count = body.try_get_u32().map_err(|_| damaged("it ends early"))?;
    let mut messages = Vec::new();
    for _ in 0..count {
        let header = match body.try_get_u8().map_err(|_| damaged("it ends early"))? {
            0 => None,
            1 => Some(take_bytes(&mut body)?),
            _ => return Err(damaged("unknown flag")),
        };
        let payload = take_bytes(&mut body)?;
        messages.push(StoredMessage { header, payload });
    }
    if body.has_remaining() {
        return Err(damaged("bytes after its end"));
    }
    Ok(StoredMessages {
        topic,
        publisher,
        class,
        qos,
        retain: flags & 1 != 0,
        retain_as_published: flags & 2 != 0,
        expires: (expires > 0).then(|| from_unix_ms(expires)),
        messages,
    })
}

/// Longest time a record's date is believed to be ahead.
const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The moment of a date, `now` and `clock` being the same moment; `None` when it has passed.
pub(crate) fn instant_of(date: SystemTime, now: Instant, clock: SystemTime) -> Option<Instant> {
    let ahead = date.duration_since(clock).ok()?;
    now.checked_add(ahead.min(FAR))
}

fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(bytes);
}

fn take_bytes(body: &mut Bytes) -> Result<Bytes, RecordError> {
    let length = body.try_get_u32().map_err(|_| damaged("it ends early"))? as usize;
    if length > body.len() {
        return Err(damaged("it ends early"));
    }
    Ok(body.split_to(length))
}

fn take_text(body: &mut Bytes) -> Result<String, RecordError> {
    String::from_utf8(take_bytes(body)?.to_vec()).map_err(|_| damaged("text that is not UTF-8"))
}

impl QueueKey {
    /// Bytes that sort as the queue does.
    pub(crate) fn to_bytes(self) -> [u8; 21] {
        let mut key = [0; 21];
        key[..8].copy_from_slice(&self.session.to_be_bytes());
        key[8..12].copy_from_slice(&self.subscription.to_be_bytes());
        key[12] = self.class.index() as u8;
        key[13..].copy_from_slice(&self.sequence.to_be_bytes());
        key
    }

    /// The key of these bytes, if they are one.
    pub(crate) fn from_bytes(key: &[u8]) -> Option<Self> {
        if key.len() != 21 {
            return None;
        }
        Some(Self {
            session: u64::from_be_bytes(key[..8].try_into().ok()?),
            subscription: u32::from_be_bytes(key[8..12].try_into().ok()?),
            class: *Class::ALL.get(usize::from(key[12]))?,
            sequence: u64::from_be_bytes(key[13..].try_into().ok()?),
        })
    }
}
