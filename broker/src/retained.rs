//! Retained messages: the last one of each topic that asked for it, bounded in number and bytes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::RwLock;
use selvedge_proto::topic::{TopicFilter, TopicName};

use crate::batch::Batch;
use crate::clock;

/// The retained messages of one tenant.
#[derive(Debug)]
pub struct Retained {
    max_messages: usize,
    max_bytes: usize,
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    messages: BTreeMap<TopicName, Arc<Batch>>,
    bytes: usize,
}

/// The store of retained messages is full.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("retained messages are full: {messages} messages, {bytes} bytes")]
pub struct RetainedFull {
    /// Messages held.
    pub messages: usize,
    /// Bytes held.
    pub bytes: usize,
}

impl Retained {
    /// An empty store of at most so many messages and bytes.
    pub fn new(max_messages: usize, max_bytes: usize) -> Self {
        Self {
            max_messages,
            max_bytes,
            inner: RwLock::default(),
        }
    }

    /// Keeps `message` for its topic, in place of the one before. Returns by how many the number
    /// of messages grew.
    ///
    /// # Errors
    /// There is no room; the message before stays.
    pub fn set(&self, message: Arc<Batch>) -> Result<i64, RetainedFull> {
        let mut inner = self.inner.write();
        let topic = message.flow.topic.clone();
        let before = inner.messages.get(&topic).map_or(0, |held| held.cost());
        let bytes = inner.bytes - before + message.cost();
        let grows = before == 0;
        if bytes > self.max_bytes || (grows && inner.messages.len() >= self.max_messages) {
            return Err(RetainedFull {
                messages: inner.messages.len(),
                bytes: inner.bytes,
            });
        }
        inner.bytes = bytes;
        inner.messages.insert(topic, message);
        Ok(i64::from(grows))
    }

    /// Forgets the message of a topic (MQTT 5.0 section 3.3.1.3: an empty payload says so).
    pub fn clear(&self, topic: &TopicName) -> bool {
        let mut inner = self.inner.write();
        let Some(held) = inner.messages.remove(topic) else {
            return false;
        };
        inner.bytes -= held.cost();
        true
    }

    /// Calls `f` with each message that matches and has not expired.
    pub fn for_each(&self, filter: &TopicFilter, mut f: impl FnMut(&Arc<Batch>)) {
        let now = clock::now();
        let inner = self.inner.read();
        if let Some(topic) = filter.as_topic() {
            if let Some(message) = inner
                .messages
                .get(&topic)
                .filter(|message| is_fresh(message, now))
            {
                f(message);
            }
            return;
        }
        for (topic, message) in &inner.messages {
            if filter.matches(topic) && is_fresh(message, now) {
                f(message);
            }
        }
    }

    /// Messages held.
    pub fn len(&self) -> usize {
        self.inner.read().messages.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn is_fresh(message: &Batch, now: Instant) -> bool {
    message.expires.is_none_or(|expires| expires > now)
}
