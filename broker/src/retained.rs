//! Retained messages: the last one of each topic that asked for it, bounded in number and bytes.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::RwLock;
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::topic::{FilterLevel, TopicFilter, TopicName};

use crate::backlog::{Backlog, Chunk};
use crate::batch::Batch;
use crate::clock;

/// Topics that one piece of a [`RetainedBacklog`] looks at, so that a search for a few among many
/// holds nobody up.
const VISITS: usize = 2048;

/// The retained messages of one tenant.
#[derive(Debug)]
pub struct Retained {
    max_messages: usize,
    max_bytes: usize,
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// By class, so that the lane of a class visits its own only.
    messages: [BTreeMap<TopicName, Held>; 3],
    bytes: usize,
    /// Counts what was retained so far.
    serial: u64,
}

#[derive(Debug)]
struct Held {
    serial: u64,
    message: Arc<Batch>,
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
        let before = inner.find(&topic).map(|held| held.message.cost());
        let bytes = inner.bytes - before.unwrap_or_default() + message.cost();
        let grows = before.is_none();
        if bytes > self.max_bytes || (grows && inner.len() >= self.max_messages) {
            return Err(RetainedFull {
                messages: inner.len(),
                bytes: inner.bytes,
            });
        }
        inner.bytes = bytes;
        inner.serial += 1;
        let serial = inner.serial;
        let class = message.class.index();
        for (index, messages) in inner.messages.iter_mut().enumerate() {
            if index != class && !grows {
                messages.remove(&topic);
            }
        }
        inner.messages[class].insert(topic, Held { serial, message });
        Ok(i64::from(grows))
    }

    /// Forgets the message of a topic (MQTT 5.0 section 3.3.1.3: an empty payload says so).
    pub fn clear(&self, topic: &TopicName) -> bool {
        let mut inner = self.inner.write();
        let held = inner
            .messages
            .iter_mut()
            .find_map(|messages| messages.remove(topic));
        let Some(held) = held else {
            return false;
        };
        inner.bytes -= held.message.cost();
        true
    }

    /// The message of a topic, unless it has expired.
    pub fn get(&self, topic: &TopicName) -> Option<Arc<Batch>> {
        let inner = self.inner.read();
        let held = inner.find(topic)?;
        is_fresh(&held.message, clock::now()).then(|| Arc::clone(&held.message))
    }

    /// Forgets what has expired. Returns the topics.
    pub fn sweep(&self, now: Instant) -> Vec<TopicName> {
        let mut inner = self.inner.write();
        let Inner {
            messages, bytes, ..
        } = &mut *inner;
        let mut gone = Vec::new();
        for messages in messages {
            messages.retain(|topic, held| {
                let keep = is_fresh(&held.message, now);
                if !keep {
                    *bytes -= held.message.cost();
                    gone.push(topic.clone());
                }
                keep
            });
        }
        gone
    }

    /// Messages held.
    pub fn len(&self) -> usize {
        self.inner.read().len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn find(&self, topic: &TopicName) -> Option<&Held> {
        self.messages
            .iter()
            .find_map(|messages| messages.get(topic))
    }

    fn len(&self) -> usize {
        self.messages.iter().map(BTreeMap::len).sum()
    }
}

/// What was retained in one class when a subscription was made, as a walk through the topics that
/// takes no memory of its own. What is retained later reaches the subscription as it is published.
#[derive(Debug)]
pub struct RetainedBacklog {
    retained: Arc<Retained>,
    filter: TopicFilter,
    /// Topics that policy denies.
    residual: Arc<[TopicFilter]>,
    class: Class,
    max_qos: Qos,
    /// The last serial when the walk began.
    upto: u64,
    /// What every topic of the filter begins with.
    prefix: Box<str>,
    /// The topic visited last.
    after: Option<TopicName>,
}

impl RetainedBacklog {
    /// What `retained` holds now of a class and matches; `None` when it holds nothing of the class.
    pub fn new(
        retained: &Arc<Retained>,
        filter: &TopicFilter,
        residual: &Arc<[TopicFilter]>,
        class: Class,
        max_qos: Qos,
    ) -> Option<Self> {
        let inner = retained.inner.read();
        if inner.messages[class.index()].is_empty() {
            return None;
        }
        Some(Self {
            retained: Arc::clone(retained),
            filter: filter.clone(),
            residual: Arc::clone(residual),
            class,
            max_qos,
            upto: inner.serial,
            prefix: prefix_of(filter),
            after: None,
        })
    }

    fn wants(&self, topic: &TopicName, held: &Held, now: Instant) -> bool {
        held.serial <= self.upto
            && self.filter.matches(topic)
            && !self.residual.iter().any(|filter| filter.matches(topic))
            && is_fresh(&held.message, now)
    }
}

impl Backlog for RetainedBacklog {
    fn next(&mut self, budget: usize) -> Chunk {
        let now = clock::now();
        let mut chunk = Chunk::default();
        let mut bytes = 0;
        let inner = self.retained.inner.read();
        let start = match &self.after {
            Some(after) => Bound::Excluded(after.as_str()),
            None => Bound::Included(&*self.prefix),
        };
        let mut range =
            inner.messages[self.class.index()].range::<str, _>((start, Bound::Unbounded));
        let mut last = None;
        for _ in 0..VISITS {
            if bytes >= budget {
                break;
            }
            let Some((topic, held)) = range
                .next()
                .filter(|(topic, _)| topic.as_str().starts_with(&*self.prefix))
            else {
                chunk.done = true;
                break;
            };
            if self.wants(topic, held, now) {
                bytes += held.message.cost();
                chunk
                    .batches
                    .push(Arc::clone(&held.message).at_most(self.max_qos));
            }
            last = Some(topic);
        }
        if let Some(last) = last.cloned() {
            drop(inner);
            self.after = Some(last);
        }
        chunk
    }

    fn before_live(&self) -> bool {
        false
    }
}

/// What every topic that a filter matches begins with: its levels before the first wildcard, without
/// the separator, since `a/#` matches `a`, too.
pub(crate) fn prefix_of(filter: &TopicFilter) -> Box<str> {
    let mut prefix = String::new();
    for (index, level) in filter.levels().enumerate() {
        let FilterLevel::Literal(literal) = level else {
            break;
        };
        if index > 0 {
            prefix.push('/');
        }
        prefix.push_str(literal);
    }
    prefix.into()
}

fn is_fresh(message: &Batch, now: Instant) -> bool {
    message.expires.is_none_or(|expires| expires > now)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use bytes::{Bytes, BytesMut};
    use proptest::prelude::*;
    use selvedge_certs::Identity;
    use selvedge_proto::lane::{self, Flags};

    use super::*;
    use crate::batch::Flow;

    fn message(topic: &str, class: Class, payload: &[u8]) -> Arc<Batch> {
        let topic = TopicName::parse(topic).unwrap();
        let publisher = Identity::new("example.org", "acme", "s", "p").unwrap();
        let mut frames = BytesMut::new();
        lane::put_message(&mut frames, Flags::new(Qos::AtMostOnce), 1, None, payload);
        Arc::new(Batch {
            flow: Arc::new(Flow::new(1, topic, publisher, 1)),
            class,
            qos: Qos::AtMostOnce,
            retain: true,
            retain_as_published: true,
            count: 1,
            frames: frames.freeze(),
            payload: Bytes::new(),
            expires: None,
        })
    }

    fn backlog(retained: &Arc<Retained>, filter: &str, class: Class) -> Option<RetainedBacklog> {
        let filter = TopicFilter::parse(filter).unwrap();
        RetainedBacklog::new(retained, &filter, &Arc::default(), class, Qos::AtMostOnce)
    }

    fn drain(backlog: Option<RetainedBacklog>, budget: usize) -> Vec<String> {
        let mut topics = Vec::new();
        let Some(mut backlog) = backlog else {
            return topics;
        };
        loop {
            let chunk = backlog.next(budget);
            topics.extend(
                chunk
                    .batches
                    .iter()
                    .map(|m| m.flow.topic.as_str().to_owned()),
            );
            if chunk.done {
                return topics;
            }
        }
    }

    #[test]
    fn what_is_retained_during_the_walk_is_left_to_live_delivery() {
        let retained = Arc::new(Retained::new(100, 1 << 20));
        for topic in ["a", "b", "c"] {
            retained.set(message(topic, Class::Normal, b"1")).unwrap();
        }
        let mut walk = backlog(&retained, "#", Class::Normal).unwrap();
        assert_eq!(walk.next(1).batches.len(), 1);
        retained.set(message("b", Class::Normal, b"2")).unwrap();
        retained.set(message("d", Class::Normal, b"2")).unwrap();
        assert_eq!(drain(Some(walk), usize::MAX), ["c"]);
    }

    #[test]
    fn a_topic_that_changes_class_is_held_once() {
        let retained = Arc::new(Retained::new(100, 1 << 20));
        assert_eq!(retained.set(message("a", Class::Normal, b"1")), Ok(1));
        assert_eq!(retained.set(message("a", Class::Alarm, b"1")), Ok(0));
        assert_eq!(retained.len(), 1);
        assert!(backlog(&retained, "#", Class::Normal).is_none());
        assert!(retained.clear(&TopicName::parse("a").unwrap()));
        assert_eq!(retained.inner.read().bytes, 0);
    }

    proptest! {
        #[test]
        fn a_walk_finds_what_the_filter_matches(
            topics in proptest::collection::btree_set("[ab]{1,2}(/[ab]{1,2}){0,2}", 0..40),
            filter in "(\\+|[ab]{1,2})(/(\\+|[ab]{1,2})){0,2}(/#)?",
            budget in 1usize..400,
        ) {
            let retained = Arc::new(Retained::new(1000, 1 << 20));
            for topic in &topics {
                retained.set(message(topic, Class::Bulk, b"x")).unwrap();
            }
            let matcher = TopicFilter::parse(filter.as_str()).unwrap();
            let wanted: Vec<&String> = topics
                .iter()
                .filter(|topic| matcher.matches(&TopicName::parse(topic.as_str()).unwrap()))
                .collect();
            let found = drain(backlog(&retained, &filter, Class::Bulk), budget);
            prop_assert_eq!(found.iter().collect::<Vec<_>>(), wanted);
        }
    }
}
