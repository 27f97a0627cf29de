//! Flows and batches: messages of one topic from one publisher, encoded once for all receivers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use selvedge_certs::Identity;
use selvedge_proto::frame::{self, FrameError, Kind};
use selvedge_proto::lane::{self, Flags, MessageRef};
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

#[cfg(test)]
mod tests;

/// One topic as one publisher's session uses it. Its id is the alias on every delivery lane of the
/// tenant, so that an encoded message is the same for every receiver. A flow that is dropped leaves its
/// id to another: who remembers a flow by its id keeps the flow, too.
#[derive(Debug)]
pub struct Flow {
    /// Unique within the tenant.
    pub id: u32,
    /// The topic.
    pub topic: TopicName,
    /// Who publishes, as verified.
    pub publisher: Identity,
    /// The publisher's session, for subscriptions that want no messages of their own.
    pub session: u64,
    /// The encoded BIND frame that announces the flow on a delivery lane.
    pub bind: Bytes,
    /// Where the id came from.
    ids: Option<Arc<FlowIds>>,
}

impl Flow {
    /// A flow with its announcement.
    pub fn new(id: u32, topic: TopicName, publisher: Identity, session: u64) -> Self {
        let bind = frame::encode(
            Kind::BIND,
            &wire::Bind {
                alias: id,
                topic: topic.as_str().to_owned(),
                publisher: publisher.uri().to_owned(),
            },
        );
        Self {
            id,
            topic,
            publisher,
            session,
            bind,
            ids: None,
        }
    }

    /// A flow with the smallest id that is free.
    pub(crate) fn numbered(
        ids: &Arc<FlowIds>,
        topic: TopicName,
        publisher: Identity,
        session: u64,
    ) -> Self {
        let mut flow = Self::new(ids.take(), topic, publisher, session);
        flow.ids = Some(Arc::clone(ids));
        flow
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(ids) = &self.ids {
            ids.give_back(self.id);
        }
    }
}

/// The ids of a tenant's flows, from 1. Small ones are used first, since a message has two bytes for its
/// alias unless the id needs four. There are as many free ones, at most, as flows have been open at once.
#[derive(Debug, Default)]
pub(crate) struct FlowIds {
    free: Mutex<(u32, BinaryHeap<Reverse<u32>>)>,
}

impl FlowIds {
    fn take(&self) -> u32 {
        let (highest, free) = &mut *self.free.lock();
        free.pop().map_or_else(
            || {
                // 2^30 flows do not fit in memory.
                *highest += 1;
                *highest
            },
            |Reverse(id)| id,
        )
    }

    fn give_back(&self, id: u32) {
        self.free.lock().1.push(Reverse(id));
    }
}

/// Whole message frames of one flow, shared by every queue they wait in.
///
/// Small messages are packed into `frames`. A large message is alone: `frames` is then its head
/// and `payload` the payload as it was received.
#[derive(Debug)]
pub struct Batch {
    /// Topic and publisher.
    pub flow: Arc<Flow>,
    /// Class of the lanes that carry it.
    pub class: Class,
    /// Quality of service of every frame in it.
    pub qos: Qos,
    /// It is delivered because it was retained, and its frame says so; such a message is alone.
    pub retain: bool,
    /// The publisher asked for the message to be retained; such a message is alone.
    pub retain_as_published: bool,
    /// Messages in it.
    pub count: u32,
    /// Encoded frames.
    pub frames: Bytes,
    /// Payload of the single message, unless it is in `frames`.
    pub payload: Bytes,
    /// When the message loses its worth; such a message is alone.
    pub expires: Option<Instant>,
}

impl Batch {
    /// The id that the publisher gave the message, if it is alone and has one.
    pub fn message_id(&self) -> Option<Bytes> {
        if self.count != 1 {
            return None;
        }
        let message = self.messages().next()?;
        let properties = Properties::decode(message.header.as_deref()?).ok()?;
        (!properties.message_id.is_empty()).then_some(properties.message_id)
    }

    /// The batch at no more than this quality of service.
    #[must_use]
    pub fn at_most(self: Arc<Self>, max: Qos) -> Arc<Self> {
        if max >= self.qos {
            self
        } else {
            Arc::new(self.with_flags(max, self.retain))
        }
    }

    /// Bytes it counts for in a queue: what it sends and what keeping it costs.
    pub fn cost(&self) -> usize {
        self.frames.len() + self.payload.len() + Self::OVERHEAD
    }

    /// Memory of a queue entry beyond the encoded bytes.
    pub const OVERHEAD: usize = 64;

    /// Writes the messages again, with these flags.
    pub fn put(&self, buffer: &mut BytesMut, flags: Flags) {
        for message in self.messages() {
            lane::put_message(
                buffer,
                flags,
                self.flow.id,
                message.header.as_deref(),
                &message.payload,
            );
        }
    }

    /// The same messages with another quality of service and retain flag.
    #[must_use]
    pub fn with_flags(&self, qos: Qos, retain: bool) -> Self {
        let mut frames = BytesMut::with_capacity(self.frames.len() + self.payload.len());
        self.put(&mut frames, Flags::new(qos).with_retain(retain));
        Self {
            flow: Arc::clone(&self.flow),
            qos,
            retain,
            frames: frames.freeze(),
            payload: Bytes::new(),
            ..*self
        }
    }

    /// The messages as batches of one each.
    pub fn singles(&self) -> impl Iterator<Item = Self> + '_ {
        self.messages().map(|message| {
            let mut frames = BytesMut::new();
            lane::put_message(
                &mut frames,
                Flags::new(self.qos).with_retain(self.retain),
                self.flow.id,
                message.header.as_deref(),
                &message.payload,
            );
            Self {
                flow: Arc::clone(&self.flow),
                count: 1,
                frames: frames.freeze(),
                payload: Bytes::new(),
                ..*self
            }
        })
    }

    /// The messages, one after the other, with the payload as shared bytes.
    pub fn messages(&self) -> impl Iterator<Item = BatchMessage> + '_ {
        let mut rest = self.frames.clone();
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            // The broker wrote these frames itself, so they parse.
            let head = frame::peek(&rest, frame::MAX_FRAME).ok().flatten()?;
            let present = head.total().min(rest.len());
            let body = rest.split_to(present).slice(head.prefix..);
            let message = MessageRef::parse(&body).ok()?;
            let payload = if self.payload.is_empty() {
                body.slice_ref(message.payload)
            } else {
                self.payload.clone()
            };
            Some(BatchMessage {
                header: message.header.map(|header| body.slice_ref(header)),
                payload,
            })
        })
    }
}

/// One message of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchMessage {
    /// The encoded `MessageHeader`, if there is one.
    pub header: Option<Bytes>,
    /// The application's payload.
    pub payload: Bytes,
}

/// What the broker itself reads of a message's header.
#[derive(Debug, Default)]
pub(crate) struct HeaderFacts {
    /// When the message loses its worth.
    pub(crate) expires: Option<Instant>,
    /// Its name in the deduplication window; empty for none.
    pub(crate) message_id: Bytes,
    /// It says when a broker took the message, as only a broker may.
    pub(crate) is_dated: bool,
}

impl HeaderFacts {
    /// Reads an encoded `MessageHeader`.
    ///
    /// # Errors
    /// The header does not decode.
    pub(crate) fn read(header: Option<&[u8]>, now: Instant) -> Result<Self, FrameError> {
        let Some(header) = header else {
            return Ok(Self::default());
        };
        let properties = Properties::decode(header)?;
        Ok(Self {
            expires: properties.expiry.and_then(|expiry| now.checked_add(expiry)),
            message_id: properties.message_id,
            is_dated: properties.published.is_some(),
        })
    }
}
