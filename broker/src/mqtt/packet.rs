//! What MQTT clients send: bytes in, one packet type for every protocol version out.
//!
//! The codec crate and its types for each version stop here, but for [`Publish`], which it has
//! only once.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rmqtt_codec::error::DecodeError;
use rmqtt_codec::{types, v3, v5};
use selvedge_proto::message::Qos;
use tokio_util::codec::Decoder as _;

use crate::mqtt::reason::Reason;
use crate::tenant::RetainDelivery;

pub(crate) use rmqtt_codec::types::Publish;
pub(crate) use rmqtt_codec::v5::PublishProperties;

/// Largest CONNECT, in bytes: its five strings and binaries of at most 64 KiB each, and properties.
/// Before it is read the peer is nobody, so it gets no larger buffer.
pub(crate) const MAX_CONNECT: usize = 512 * 1024;

/// A version of the protocol, as CONNECT names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// 3.1 (`MQIsdp`, level 3) or 3.1.1 (level 4): the same packets.
    V3,
    /// 5.0.
    V5,
}

/// A packet from a client.
#[derive(Debug)]
pub(crate) enum Packet {
    Connect(Box<Connect>),
    Publish(Box<Publish>),
    /// The receiver's answer to a QoS 1 PUBLISH, whatever its reason code.
    PubAck(u16),
    /// The receiver's first answer to a QoS 2 PUBLISH.
    PubRec {
        packet_id: u16,
        /// It does not take the message.
        refused: bool,
    },
    PubRel(u16),
    PubComp(u16),
    Subscribe(Subscribe),
    Unsubscribe(Unsubscribe),
    Ping,
    Disconnect(Disconnect),
    Auth,
}

/// CONNECT.
#[derive(Debug)]
pub(crate) struct Connect {
    pub(crate) version: Version,
    pub(crate) client_id: String,
    pub(crate) clean_start: bool,
    /// Zero for none.
    pub(crate) keep_alive: Duration,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Bytes>,
    pub(crate) will: Option<Will>,
    /// As asked for; `Duration::MAX` for ever. 3.1.1 without clean session means for ever.
    pub(crate) session_expiry: Duration,
    pub(crate) receive_maximum: u16,
    /// Largest packet the client takes.
    pub(crate) maximum_packet_size: usize,
    /// Enhanced authentication is asked for.
    pub(crate) wants_auth: bool,
    /// The client wants reason strings beyond CONNACK and DISCONNECT.
    pub(crate) wants_reasons: bool,
    /// The client wants to know where its responses go.
    pub(crate) wants_response_information: bool,
    /// Topic aliases that the client takes.
    pub(crate) topic_alias_maximum: u16,
}

/// The will in a CONNECT.
#[derive(Debug)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: Bytes,
    pub(crate) qos: Qos,
    pub(crate) retain: bool,
    pub(crate) delay: Duration,
    pub(crate) properties: PublishProperties,
}

/// SUBSCRIBE.
#[derive(Debug)]
pub(crate) struct Subscribe {
    pub(crate) packet_id: u16,
    pub(crate) identifier: Option<u32>,
    pub(crate) filters: Vec<SubscribeFilter>,
}

/// One filter of a SUBSCRIBE.
#[derive(Debug)]
pub(crate) struct SubscribeFilter {
    pub(crate) filter: String,
    pub(crate) max_qos: Qos,
    pub(crate) no_local: bool,
    pub(crate) retain_as_published: bool,
    pub(crate) retain: RetainDelivery,
}

/// UNSUBSCRIBE.
#[derive(Debug)]
pub(crate) struct Unsubscribe {
    pub(crate) packet_id: u16,
    pub(crate) filters: Vec<String>,
}

/// DISCONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Disconnect {
    /// The will is to be published all the same.
    pub(crate) with_will: bool,
    /// A new session expiry.
    pub(crate) session_expiry: Option<Duration>,
}

/// The peer broke the protocol; its connection ends with `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client sent {what}")]
pub(crate) struct ProtocolError {
    pub(crate) reason: Reason,
    /// Label of the counter and words of the log.
    pub(crate) what: &'static str,
}

impl ProtocolError {
    pub(crate) const fn new(reason: Reason, what: &'static str) -> Self {
        Self { reason, what }
    }
}

/// Cuts the packets out of a stream of bytes.
#[derive(Debug)]
pub(crate) struct Reader {
    codec: Codec,
    max_packet: u32,
    /// What follows the length of the next packet may have so many bytes.
    most: u32,
}

#[derive(Debug)]
enum Codec {
    /// CONNECT has not been seen.
    Unknown,
    V3(v3::Codec),
    V5(v5::Codec),
}

impl Reader {
    /// A reader that takes packets of up to `max_packet` bytes after CONNECT.
    pub(crate) fn new(max_packet: usize) -> Self {
        // 268,435,455 is the most that MQTT can say.
        let max_packet = u32::try_from(max_packet)
            .unwrap_or(u32::MAX)
            .min(0x0FFF_FFFF);
        Self {
            codec: Codec::Unknown,
            max_packet,
            most: max_packet,
        }
    }

    /// The next packet that is complete in `buffer`. Packets and payloads share its memory.
    ///
    /// # Errors
    /// The bytes are no packet that a client may send now. Nothing after them can be read.
    pub(crate) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Packet>, ProtocolError> {
        if let Codec::Unknown = self.codec {
            let connect_max = self.max_packet.min(MAX_CONNECT as u32);
            let Some(version) = detect(buffer)? else {
                return Ok(None);
            };
            self.codec = match version {
                Version::V3 => Codec::V3(v3::Codec::new(connect_max)),
                Version::V5 => Codec::V5(v5::Codec::new(connect_max, 0)),
            };
            self.most = connect_max;
        }
        let Some((head, length)) = head(buffer)? else {
            return Ok(None);
        };
        let first = buffer[0];
        if length > self.most as usize {
            return Err(TOO_LARGE);
        }
        let Some(body) = buffer.get_mut(head..head + length) else {
            // So much is coming, and is allowed.
            buffer.reserve(head + length - buffer.len());
            return Ok(None);
        };
        let is_connect = first >> 4 == 1;
        let packet = match &mut self.codec {
            Codec::Unknown => return Ok(None),
            Codec::V3(codec) => {
                strict::check(Version::V3, first, body)?;
                let decoded = codec
                    .decode(buffer)
                    .map_err(|error| protocol_error(&error))?;
                if is_connect {
                    codec.set_max_size(self.max_packet);
                }
                decoded.map(|(packet, _)| from_v3(packet)).transpose()?
            }
            Codec::V5(codec) => {
                strict::check(Version::V5, first, body)?;
                let decoded = codec
                    .decode(buffer)
                    .map_err(|error| protocol_error(&error))?;
                if is_connect {
                    codec.set_max_inbound_size(self.max_packet);
                }
                decoded.map(|(packet, _)| from_v5(packet)).transpose()?
            }
        };
        if is_connect {
            self.most = self.max_packet;
        }
        Ok(packet)
    }

    /// Takes packets of up to `max_packet` bytes from now on.
    pub(crate) fn set_max_packet(&mut self, max_packet: usize) {
        self.max_packet = Self::new(max_packet).max_packet;
        self.most = self.max_packet;
        match &mut self.codec {
            Codec::Unknown => {}
            Codec::V3(codec) => codec.set_max_size(self.max_packet),
            Codec::V5(codec) => codec.set_max_inbound_size(self.max_packet),
        }
    }

    /// The version, once CONNECT has named one.
    pub(crate) fn version(&self) -> Option<Version> {
        match self.codec {
            Codec::Unknown => None,
            Codec::V3(_) => Some(Version::V3),
            Codec::V5(_) => Some(Version::V5),
        }
    }
}

const TOO_LARGE: ProtocolError =
    ProtocolError::new(Reason::PACKET_TOO_LARGE, "a packet that is too large");

/// How many bytes come before the body of the first packet, and how many it has, once that is known.
#[inline]
fn head(bytes: &[u8]) -> Result<Option<(usize, usize)>, ProtocolError> {
    let mut length = 0;
    for (index, byte) in bytes.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((index + 2, length)));
        }
    }
    if bytes.len() > 4 {
        return Err(ProtocolError::new(
            Reason::MALFORMED_PACKET,
            "a length of more than four bytes",
        ));
    }
    Ok(None)
}

/// The version that the CONNECT at the start of `bytes` names, once enough of it is there.
fn detect(bytes: &[u8]) -> Result<Option<Version>, ProtocolError> {
    const NOT_MQTT: ProtocolError =
        ProtocolError::new(Reason::PROTOCOL_ERROR, "something other than CONNECT first");
    let Some((&kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    if kind != 0x10 {
        return Err(NOT_MQTT);
    }
    let length = rest
        .iter()
        .take(4)
        .take_while(|byte| **byte & 0x80 != 0)
        .count();
    if length == 4 {
        return Err(NOT_MQTT);
    }
    let Some(body) = rest.get(length + 1..) else {
        return Ok(None);
    };
    for (name, levels) in [(&b"\0\x04MQTT"[..], &[4, 5][..]), (b"\0\x06MQIsdp", &[3])] {
        let common = body.len().min(name.len());
        if body[..common] != name[..common] {
            continue;
        }
        return match body.get(name.len()) {
            None => Ok(None),
            Some(5) if levels.contains(&5) => Ok(Some(Version::V5)),
            Some(level) if levels.contains(level) => Ok(Some(Version::V3)),
            Some(_) => Err(ProtocolError::new(
                Reason::UNSUPPORTED_VERSION,
                "an unknown protocol version",
            )),
        };
    }
    Err(NOT_MQTT)
}

fn protocol_error(error: &DecodeError) -> ProtocolError {
    let (reason, what) = match error {
        DecodeError::MaxSizeExceeded { .. } => return TOO_LARGE,
        DecodeError::InvalidClientId => (
            Reason::CLIENT_ID_NOT_VALID,
            "no client id without asking for a clean start",
        ),
        DecodeError::UnsupportedProtocolLevel => {
            (Reason::UNSUPPORTED_VERSION, "an unknown protocol version")
        }
        DecodeError::Utf8Error => (Reason::MALFORMED_PACKET, "text that is not UTF-8"),
        DecodeError::UnsupportedPacketType => {
            (Reason::MALFORMED_PACKET, "an unknown packet type or flag")
        }
        _ => (Reason::MALFORMED_PACKET, "a malformed packet"),
    };
    ProtocolError::new(reason, what)
}

const FROM_SERVER: ProtocolError = ProtocolError::new(
    Reason::PROTOCOL_ERROR,
    "a packet that only servers may send",
);

fn from_v3(packet: v3::Packet) -> Result<Packet, ProtocolError> {
    Ok(match packet {
        v3::Packet::Connect(connect) => Packet::Connect(Box::new(Connect {
            version: Version::V3,
            client_id: connect.client_id.to_string(),
            clean_start: connect.clean_session,
            keep_alive: Duration::from_secs(connect.keep_alive.into()),
            user: connect.username.map(|user| user.to_string()),
            password: connect.password,
            will: connect.last_will.map(|will| Will {
                topic: will.topic.to_string(),
                payload: will.message,
                qos: qos(will.qos),
                retain: will.retain,
                delay: Duration::ZERO,
                properties: PublishProperties::default(),
            }),
            session_expiry: if connect.clean_session {
                Duration::ZERO
            } else {
                Duration::MAX
            },
            receive_maximum: u16::MAX,
            maximum_packet_size: usize::MAX,
            wants_auth: false,
            wants_reasons: false,
            wants_response_information: false,
            topic_alias_maximum: 0,
        })),
        v3::Packet::Publish(publish) => Packet::Publish(publish),
        v3::Packet::PublishAck { packet_id } => Packet::PubAck(packet_id.get()),
        v3::Packet::PublishReceived { packet_id } => Packet::PubRec {
            packet_id: packet_id.get(),
            refused: false,
        },
        v3::Packet::PublishComplete { packet_id } => Packet::PubComp(packet_id.get()),
        v3::Packet::PublishRelease { packet_id } => Packet::PubRel(packet_id.get()),
        v3::Packet::Subscribe {
            packet_id,
            topic_filters,
        } => Packet::Subscribe(Subscribe {
            packet_id: packet_id.get(),
            identifier: None,
            filters: topic_filters
                .into_iter()
                .map(|(filter, max_qos)| SubscribeFilter {
                    filter: filter.to_string(),
                    max_qos: qos(max_qos),
                    no_local: false,
                    retain_as_published: false,
                    retain: RetainDelivery::Send,
                })
                .collect(),
        }),
        v3::Packet::Unsubscribe {
            packet_id,
            topic_filters,
        } => Packet::Unsubscribe(Unsubscribe {
            packet_id: packet_id.get(),
            filters: topic_filters.iter().map(ToString::to_string).collect(),
        }),
        v3::Packet::PingRequest => Packet::Ping,
        v3::Packet::Disconnect => Packet::Disconnect(Disconnect {
            with_will: false,
            session_expiry: None,
        }),
        v3::Packet::ConnectAck(_)
        | v3::Packet::SubscribeAck { .. }
        | v3::Packet::UnsubscribeAck { .. }
        | v3::Packet::PingResponse => return Err(FROM_SERVER),
    })
}

fn from_v5(packet: v5::Packet) -> Result<Packet, ProtocolError> {
    Ok(match packet {
        v5::Packet::Connect(connect) => Packet::Connect(Box::new(Connect {
            version: Version::V5,
            client_id: connect.client_id.to_string(),
            clean_start: connect.clean_start,
            keep_alive: Duration::from_secs(connect.keep_alive.into()),
            user: connect.username.map(|user| user.to_string()),
            password: connect.password,
            will: connect.last_will.map(|will| Will {
                topic: will.topic.to_string(),
                payload: will.message,
                qos: qos(will.qos),
                retain: will.retain,
                delay: Duration::from_secs(will.will_delay_interval_sec.unwrap_or(0).into()),
                properties: PublishProperties {
                    correlation_data: will.correlation_data,
                    message_expiry_interval: will.message_expiry_interval,
                    content_type: will.content_type,
                    user_properties: will.user_properties,
                    is_utf8_payload: will.is_utf8_payload.unwrap_or(false),
                    response_topic: will.response_topic,
                    ..PublishProperties::default()
                },
            }),
            session_expiry: session_expiry(connect.session_expiry_interval_secs),
            receive_maximum: connect.receive_max.map_or(u16::MAX, std::num::NonZero::get),
            maximum_packet_size: connect
                .max_packet_size
                .map_or(usize::MAX, |size| size.get() as usize),
            wants_auth: connect.auth_method.is_some(),
            wants_reasons: connect.request_problem_info,
            wants_response_information: connect.request_response_info,
            topic_alias_maximum: connect.topic_alias_max,
        })),
        v5::Packet::Publish(publish) => Packet::Publish(publish),
        v5::Packet::PublishAck(ack) => Packet::PubAck(ack.packet_id.get()),
        v5::Packet::PublishReceived(ack) => Packet::PubRec {
            packet_id: ack.packet_id.get(),
            refused: ack.reason_code as u8 >= 0x80,
        },
        v5::Packet::PublishComplete(ack) => Packet::PubComp(ack.packet_id.get()),
        v5::Packet::PublishRelease(ack) => Packet::PubRel(ack.packet_id.get()),
        v5::Packet::Subscribe(subscribe) => Packet::Subscribe(Subscribe {
            packet_id: subscribe.packet_id.get(),
            identifier: subscribe.id.map(std::num::NonZero::get),
            filters: subscribe
                .topic_filters
                .into_iter()
                .map(|(filter, options)| SubscribeFilter {
                    filter: filter.to_string(),
                    max_qos: qos(options.qos),
                    no_local: options.no_local,
                    retain_as_published: options.retain_as_published,
                    retain: match options.retain_handling {
                        v5::RetainHandling::AtSubscribe => RetainDelivery::Send,
                        v5::RetainHandling::AtSubscribeNew => RetainDelivery::IfNew,
                        v5::RetainHandling::NoAtSubscribe => RetainDelivery::Never,
                    },
                })
                .collect(),
        }),
        v5::Packet::Unsubscribe(unsubscribe) => Packet::Unsubscribe(Unsubscribe {
            packet_id: unsubscribe.packet_id.get(),
            filters: unsubscribe
                .topic_filters
                .iter()
                .map(ToString::to_string)
                .collect(),
        }),
        v5::Packet::PingRequest => Packet::Ping,
        v5::Packet::Disconnect(disconnect) => Packet::Disconnect(Disconnect {
            with_will: disconnect.reason_code != v5::DisconnectReasonCode::NormalDisconnection,
            session_expiry: disconnect.session_expiry_interval_secs.map(session_expiry),
        }),
        v5::Packet::Auth(_) => Packet::Auth,
        v5::Packet::ConnectAck(_)
        | v5::Packet::SubscribeAck(_)
        | v5::Packet::UnsubscribeAck(_)
        | v5::Packet::PingResponse => return Err(FROM_SERVER),
    })
}

/// MQTT 5.0 section 3.1.2.11.2: the largest number means for ever.
fn session_expiry(seconds: u32) -> Duration {
    match seconds {
        u32::MAX => Duration::MAX,
        seconds => Duration::from_secs(seconds.into()),
    }
}

/// The fabric's name for a quality of service of the codec.
pub(crate) fn qos(qos: types::QoS) -> Qos {
    match qos {
        types::QoS::AtMostOnce => Qos::AtMostOnce,
        types::QoS::AtLeastOnce => Qos::AtLeastOnce,
        types::QoS::ExactlyOnce => Qos::ExactlyOnce,
    }
}

mod strict;
#[cfg(test)]
mod tests;
