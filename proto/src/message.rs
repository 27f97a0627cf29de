//! What a message carries besides topic and payload, as the rest of the program sees it.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use prost::Message as _;

use crate::frame::FrameError;
use crate::wire;

/// Quality of service of one hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum Qos {
    /// QoS 0: dropped under back-pressure by a stated policy.
    #[default]
    AtMostOnce = 0,
    /// QoS 1: acknowledged; may be delivered again.
    AtLeastOnce = 1,
    /// QoS 2: MQTT only.
    ExactlyOnce = 2,
}

impl TryFrom<u8> for Qos {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        match value {
            0 => Ok(Self::AtMostOnce),
            1 => Ok(Self::AtLeastOnce),
            2 => Ok(Self::ExactlyOnce),
            other => Err(other),
        }
    }
}

/// Delivery class: classes never delay a more urgent one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Class {
    /// Ahead of everything else.
    Alarm,
    /// The default.
    #[default]
    Normal,
    /// Behind everything else.
    Bulk,
}

impl Class {
    /// Every class, most urgent first.
    pub const ALL: [Self; 3] = [Self::Alarm, Self::Normal, Self::Bulk];

    /// Position in [`Self::ALL`].
    pub fn index(self) -> usize {
        match self {
            Self::Alarm => 0,
            Self::Normal => 1,
            Self::Bulk => 2,
        }
    }

    /// QUIC stream priority of the class's lanes; larger goes first.
    pub fn priority(self) -> i32 {
        match self {
            Self::Alarm => 20,
            Self::Normal => 10,
            Self::Bulk => 0,
        }
    }
}

impl From<Class> for wire::Class {
    fn from(class: Class) -> Self {
        match class {
            Class::Alarm => Self::Alarm,
            Class::Normal => Self::Normal,
            Class::Bulk => Self::Bulk,
        }
    }
}

impl From<wire::Class> for Class {
    fn from(class: wire::Class) -> Self {
        match class {
            wire::Class::Alarm => Self::Alarm,
            wire::Class::Normal => Self::Normal,
            wire::Class::Bulk => Self::Bulk,
        }
    }
}

/// How safe an acknowledged message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Durability {
    /// The broker's default for the topic.
    #[default]
    Default,
    /// In the broker's memory.
    Memory,
    /// On the broker's disk, fsynced.
    Disk,
    /// On the disks of a quorum.
    Replicated,
}

impl From<Durability> for wire::Durability {
    fn from(durability: Durability) -> Self {
        match durability {
            Durability::Default => Self::Default,
            Durability::Memory => Self::Memory,
            Durability::Disk => Self::Disk,
            Durability::Replicated => Self::Replicated,
        }
    }
}

impl From<wire::Durability> for Durability {
    fn from(durability: wire::Durability) -> Self {
        match durability {
            wire::Durability::Default => Self::Default,
            wire::Durability::Memory => Self::Memory,
            wire::Durability::Disk => Self::Disk,
            wire::Durability::Replicated => Self::Replicated,
        }
    }
}

/// The optional properties of a message. All empty for most messages, which then carry no header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties {
    /// Names the message together with its publisher; empty when not given.
    pub message_id: Bytes,
    /// Lifetime left.
    pub expiry: Option<Duration>,
    /// MIME type of the payload; empty when not given.
    pub content_type: String,
    /// Topic for an answer; empty when not given.
    pub response_topic: String,
    /// Returned with the answer; empty when not given.
    pub correlation_data: Bytes,
    /// Name and value pairs of the application.
    pub user: Vec<(String, String)>,
    /// W3C `traceparent`; empty when not given.
    pub traceparent: String,
    /// The payload is UTF-8 text.
    pub payload_is_utf8: bool,
    /// Brokers and bridges passed, nearest last.
    pub hops: Vec<String>,
    /// When the broker took the message, for one that is replayed from the history.
    pub published: Option<SystemTime>,
}

impl Properties {
    /// Whether nothing is set, so that no header is needed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The encoded `MessageHeader`, or `None` when nothing is set.
    pub fn encode(&self) -> Option<Bytes> {
        if self.is_empty() {
            return None;
        }
        Some(
            wire::MessageHeader::from(self.clone())
                .encode_to_vec()
                .into(),
        )
    }

    /// Reads an encoded `MessageHeader`.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] when it does not decode.
    pub fn decode(header: &[u8]) -> Result<Self, FrameError> {
        wire::MessageHeader::decode(header)
            .map(Self::from)
            .map_err(|error| FrameError::Malformed {
                what: "message header",
                reason: error.to_string(),
            })
    }
}

impl From<Properties> for wire::MessageHeader {
    fn from(properties: Properties) -> Self {
        Self {
            message_id: properties.message_id,
            expiry_ms: properties
                .expiry
                .map(|expiry| u64::try_from(expiry.as_millis()).unwrap_or(u64::MAX)),
            content_type: properties.content_type,
            response_topic: properties.response_topic,
            correlation_data: properties.correlation_data,
            properties: to_wire_properties(properties.user),
            traceparent: properties.traceparent,
            payload_is_utf8: properties.payload_is_utf8,
            hops: properties.hops,
            subscription_ids: Vec::new(),
            published_ms: properties.published.map(|time| {
                let since = time
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default();
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            }),
        }
    }
}

impl From<wire::MessageHeader> for Properties {
    fn from(header: wire::MessageHeader) -> Self {
        Self {
            message_id: header.message_id,
            expiry: header.expiry_ms.map(Duration::from_millis),
            content_type: header.content_type,
            response_topic: header.response_topic,
            correlation_data: header.correlation_data,
            user: from_wire_properties(header.properties),
            traceparent: header.traceparent,
            payload_is_utf8: header.payload_is_utf8,
            hops: header.hops,
            published: header
                .published_ms
                .and_then(|ms| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms))),
        }
    }
}

/// Name and value pairs as the wire has them.
pub fn to_wire_properties(pairs: Vec<(String, String)>) -> Vec<wire::Property> {
    pairs
        .into_iter()
        .map(|(name, value)| wire::Property { name, value })
        .collect()
}

/// Name and value pairs as the program has them.
pub fn from_wire_properties(properties: Vec<wire::Property>) -> Vec<(String, String)> {
    properties
        .into_iter()
        .map(|property| (property.name, property.value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_round_trip_and_empty_ones_cost_nothing() {
        assert_eq!(Properties::default().encode(), None);
        let properties = Properties {
            message_id: Bytes::from_static(b"id"),
            expiry: Some(Duration::from_secs(3)),
            content_type: "text/plain".into(),
            user: vec![("a".into(), "b".into()), ("a".into(), "c".into())],
            hops: vec!["x".into()],
            published: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(5)),
            ..Properties::default()
        };
        let encoded = properties.encode().expect("something is set");
        assert_eq!(Properties::decode(&encoded), Ok(properties));
        assert!(Properties::decode(&[0xff]).is_err());
    }
}
