//! Subscriptions: the stream of messages that match a filter.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_core::Stream;
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::status::Status;
use selvedge_proto::topic::{TopicError, TopicName};

/// What the broker does when this subscriber is too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// The broker's default for the quality of service.
    #[default]
    Default,
    /// The oldest queued message is dropped.
    DropOldest,
    /// The message that does not fit is dropped.
    DropNewest,
    /// The publisher is refused.
    Refuse,
    /// The subscriber is disconnected.
    Disconnect,
}

/// Whether retained messages are sent at the start of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetainHandling {
    /// Always.
    #[default]
    Send,
    /// Only when the subscription is new to the session.
    SendIfNew,
    /// Never.
    DoNotSend,
}

/// How to subscribe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubscribeOptions {
    /// Highest quality of service to deliver with, 0 or 1. Default: 1.
    pub max_qos: Qos,
    /// Leave out messages that this client published. Default: false.
    pub no_local: bool,
    /// Whether retained messages are sent at the start.
    pub retain_handling: RetainHandling,
    /// Deliver on a lane of its own, so that a slow reader of this subscription delays no other.
    /// Implied by a share group. Default: false.
    pub own_lane: bool,
    /// What the broker does when this subscriber is too slow.
    pub overflow: Overflow,
    /// Messages that may wait in this process, at least 1; 16 MiB bound them as well. QoS 0
    /// messages beyond it are dropped and counted; QoS 1 messages make the lane wait. Default: 4096.
    pub queue: usize,
    /// Acknowledge QoS 1 messages by [`Message::ack`] instead of when they are taken. Default:
    /// false.
    pub manual_ack: bool,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            max_qos: Qos::AtLeastOnce,
            no_local: false,
            retain_handling: RetainHandling::Send,
            own_lane: false,
            overflow: Overflow::Default,
            queue: 4096,
            manual_ack: false,
        }
    }
}

/// Why a subscription was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The filter is neither a topic filter nor `$share/<group>/<filter>`.
    #[error(transparent)]
    InvalidFilter(#[from] TopicError),
    /// The broker refused it.
    #[error("the broker refused the subscription: {0}")]
    Refused(Status),
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// The topic it was published to.
    pub topic: TopicName,
    /// Identity URI of the publisher as the broker verified it.
    pub publisher: Arc<str>,
    /// What the publisher said.
    pub payload: Bytes,
    /// Quality of service of the delivery.
    pub qos: Qos,
    /// It was kept as the topic's retained message from before the subscription.
    pub retain: bool,
    /// It may have been delivered before.
    pub duplicate: bool,
    /// Urgency.
    pub class: Class,
    properties: Option<Box<Properties>>,
}

impl Message {
    /// What it carries besides the payload; everything is empty for most messages.
    pub fn properties(&self) -> &Properties {
        static NONE: std::sync::LazyLock<Properties> =
            std::sync::LazyLock::new(Properties::default);
        self.properties.as_deref().unwrap_or(&NONE)
    }

    /// Acknowledges a QoS 1 message of a subscription with
    /// [`manual_ack`](SubscribeOptions::manual_ack); otherwise nothing happens.
    ///
    /// Acknowledgements are cumulative: a message that is dropped without it, and those after it
    /// on the same lane, are delivered again after a reconnect of a kept session.
    pub fn ack(&mut self) {
        todo!()
    }
}

/// A stream of messages. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription {}

impl Subscription {
    /// The next message, or `None` when the subscription has ended: see [`Self::end`].
    pub async fn next(&mut self) -> Option<Message> {
        todo!()
    }

    /// Why the subscription ended, if the broker refused to restore it after a reconnect.
    pub fn end(&self) -> Option<Status> {
        todo!()
    }

    /// Unsubscribes and waits until the broker has done it.
    ///
    /// # Errors
    /// As [`SubscribeError`].
    pub async fn unsubscribe(self) -> Result<(), SubscribeError> {
        todo!()
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Option<Message>> {
        todo!()
    }
}
