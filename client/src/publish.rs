//! Publishing: what an application says about a message, and what comes of it.

use std::sync::Arc;

use bytes::Bytes;
use selvedge_proto::message::{Class, Durability, Properties, Qos};
use selvedge_proto::status::Status;
use selvedge_proto::topic::{TopicError, TopicName};

/// Something that names a topic. Text is checked when it is first used.
pub trait IntoTopic {
    /// The topic's text.
    fn text(&self) -> &str;

    /// The checked topic.
    ///
    /// # Errors
    /// The text is no topic name.
    fn into_topic(self) -> Result<TopicName, TopicError>;
}

impl IntoTopic for &str {
    fn text(&self) -> &str {
        self
    }

    fn into_topic(self) -> Result<TopicName, TopicError> {
        TopicName::parse(self)
    }
}

impl IntoTopic for String {
    fn text(&self) -> &str {
        self
    }

    fn into_topic(self) -> Result<TopicName, TopicError> {
        TopicName::parse(self)
    }
}

impl IntoTopic for &String {
    fn text(&self) -> &str {
        self
    }

    fn into_topic(self) -> Result<TopicName, TopicError> {
        TopicName::parse(self.as_str())
    }
}

impl IntoTopic for TopicName {
    fn text(&self) -> &str {
        self.as_str()
    }

    fn into_topic(self) -> Result<TopicName, TopicError> {
        Ok(self)
    }
}

impl IntoTopic for &TopicName {
    fn text(&self) -> &str {
        self.as_str()
    }

    fn into_topic(self) -> Result<TopicName, TopicError> {
        Ok(self.clone())
    }
}

/// A message to publish, with everything that may be said about it.
#[derive(Debug, Clone)]
pub struct Publish {
    pub(crate) topic: Result<TopicName, TopicError>,
    pub(crate) payload: Bytes,
    pub(crate) qos: Qos,
    pub(crate) retain: bool,
    pub(crate) class: Class,
    pub(crate) durability: Durability,
    pub(crate) properties: Properties,
    pub(crate) datagram: bool,
    pub(crate) duplicate: bool,
}

impl Publish {
    /// A message of QoS 0, class normal, not retained, without properties. A text that is no topic
    /// name is reported when the message is published.
    pub fn new(topic: impl IntoTopic, payload: impl Into<Bytes>) -> Self {
        Self {
            topic: topic.into_topic(),
            payload: payload.into(),
            qos: Qos::AtMostOnce,
            retain: false,
            class: Class::Normal,
            durability: Durability::Default,
            properties: Properties::default(),
            datagram: false,
            duplicate: false,
        }
    }

    /// Quality of service, 0 or 1. Default: 0.
    #[must_use]
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }

    /// Keep as the topic's retained message. Default: false.
    #[must_use]
    pub fn retain(mut self, retain: bool) -> Self {
        self.retain = retain;
        self
    }

    /// Urgency. Default: normal.
    #[must_use]
    pub fn class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    /// How safe a QoS 1 message must be before it is acknowledged. Default: the broker's choice.
    #[must_use]
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// What the message carries besides the payload.
    #[must_use]
    pub fn properties(mut self, properties: Properties) -> Self {
        self.properties = properties;
        self
    }

    /// Names the message, up to 128 bytes: the broker takes a message with the same id from the same
    /// identity only once, and a subscriber's client gives it to the application only once.
    #[must_use]
    pub fn message_id(mut self, id: impl Into<Bytes>) -> Self {
        self.properties.message_id = id.into();
        self
    }

    /// Says that an earlier process may have published this QoS 1 message already, under the same
    /// [message id](Self::message_id), and did not live to see the acknowledgement. Receivers are told,
    /// and a subscriber's client that has given it to the application does not do so again. A client says
    /// so by itself of what it sends again. Default: false.
    #[must_use]
    pub fn duplicate(mut self, duplicate: bool) -> Self {
        self.duplicate = duplicate;
        self
    }

    /// Send a QoS 0 message that is worthless when late as a datagram: it is not sent again when
    /// lost, waits for nothing lost before it, and is dropped for newer ones when the network is
    /// too slow, or while disconnected. A message that does not fit a datagram (about 1200 bytes with its topic
    /// and properties), that is to be retained, that is not of class normal or has QoS 1 goes its
    /// usual way, as do all when the broker takes no datagrams; [`ClientStats`] counts which went
    /// where. Default: false.
    ///
    /// [`ClientStats`]: crate::ClientStats
    #[must_use]
    pub fn datagram(mut self, datagram: bool) -> Self {
        self.datagram = datagram;
        self
    }
}

/// What became of a published message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishAck {
    /// How safe the broker has it; `None` for QoS 0, which is not acknowledged.
    pub durability: Option<Durability>,
}

/// Why a message was not published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The topic is no topic name.
    #[error(transparent)]
    InvalidTopic(#[from] TopicError),
    /// The message is larger than the broker accepts.
    #[error("message of {found} bytes is over the broker's limit of {limit} bytes")]
    TooLarge {
        /// Bytes of the message with its properties.
        found: usize,
        /// Most bytes the broker accepts.
        limit: usize,
    },
    /// QoS 2 was asked for, which is for MQTT clients only.
    #[error("quality of service 2 is for MQTT only: publish with QoS 1 and a message id")]
    Qos,
    /// The broker refused it. For QoS 0 this reports the refusal of an earlier message on the same
    /// topic, and is forgotten after a second.
    #[error("the broker refused the message: {0}")]
    Refused(Status),
    /// The client is disconnected, and the message cannot wait: the buffer for QoS 0 messages is
    /// full, or it was to be a datagram.
    #[error("disconnected, and the message cannot wait: it is dropped")]
    Disconnected,
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}

/// Why a flush could not say that everything was processed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FlushError {
    /// Everything was processed, and the broker refused at least one QoS 0 message.
    #[error("the broker refused a message: {0}")]
    Refused(Status),
    /// The connection was lost meanwhile; QoS 0 messages may be lost with it.
    #[error("the connection was lost before everything was processed")]
    Disconnected,
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}
