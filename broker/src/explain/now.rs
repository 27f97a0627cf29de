//! What the broker knows at this moment of a client, a topic or a message.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use selvedge_certs::Identity;
use selvedge_proto::message::{Class, Properties};
use selvedge_proto::topic::TopicName;
use serde::Serialize;

use super::query::{Kind, Query, printable};
use super::ring::Record;
use crate::batch::Batch;
use crate::clock;
use crate::queue::DeliveryQueue;
use crate::session::{Session, Subscriber};
use crate::store::unix_ms;
use crate::tenant::Tenant;

/// Batches that a search for a message id looks at, all queues of the tenant together. It takes a few
/// milliseconds at most; the answer says when there was more.
const SCANNED: usize = 20_000;

/// Publishers whose window of message ids is asked.
const ASKED: usize = 10_000;

/// What the broker knows now.
#[derive(Debug, Serialize)]
pub(super) struct Now {
    /// Sessions of the client.
    sessions: Vec<SessionNow>,
    /// How many sessions there are in all.
    session_count: usize,
    topic: Option<TopicNow>,
    message: Option<MessageNow>,
}

#[derive(Debug, Serialize)]
struct SessionNow {
    identity: String,
    session: String,
    online: bool,
    /// When the connection came, or was lost.
    since_ms: u64,
    /// What all subscriptions without lanes of their own share.
    queues: Vec<QueueNow>,
    subscriptions: Vec<SubscriptionNow>,
    subscription_count: usize,
}

#[derive(Debug, Serialize)]
struct QueueNow {
    class: &'static str,
    /// Bytes that wait to be sent.
    waiting_bytes: usize,
    /// Bytes sent and not acknowledged.
    in_flight_bytes: usize,
}

#[derive(Debug, Serialize)]
struct SubscriptionNow {
    filter: String,
    qos: u8,
    own_lane: bool,
    overflow: &'static str,
    /// Topics of the filter that policy leaves out.
    denied: Vec<String>,
    /// The queues that are its own.
    queues: Vec<QueueNow>,
}

#[derive(Debug, Serialize)]
struct TopicNow {
    topic: String,
    receivers: Vec<ReceiverNow>,
    receiver_count: usize,
    retained: Option<RetainedNow>,
    /// Whether the topic keeps history.
    history: bool,
    /// Responders of the service of this name.
    responders: usize,
}

#[derive(Debug, Serialize)]
struct ReceiverNow {
    identity: String,
    session: String,
    online: bool,
    since_ms: u64,
    filter: String,
    qos: u8,
    /// Policy leaves this topic out of the subscription.
    denied: bool,
    queues: Vec<QueueNow>,
}

#[derive(Debug, Serialize)]
struct RetainedNow {
    publisher: String,
    message_id: Option<String>,
    /// When it was published, if its header says so.
    published_ms: Option<u64>,
    bytes: usize,
}

#[derive(Debug, Serialize)]
struct MessageNow {
    /// Queues in which it is.
    waiting: Vec<WaitingNow>,
    /// Publishers whose message of this id was taken not long ago: one more is a duplicate.
    taken_from: Vec<String>,
    /// Whether every queue and every publisher was looked at.
    complete: bool,
}

#[derive(Debug, Serialize)]
struct WaitingNow {
    identity: String,
    session: String,
    online: bool,
    class: &'static str,
    /// Sent and not acknowledged.
    in_flight: bool,
    topic: String,
    publisher: String,
}

impl Now {
    /// Looks. Lists have up to `limit` entries each.
    pub(super) fn look(tenant: &Tenant, query: &Query, records: &[Record], limit: usize) -> Self {
        let sessions = tenant.sessions();
        let mut named: Vec<_> = sessions
            .iter()
            .filter(|session| query.names_session(&session.key))
            .collect();
        named.sort_by(|a, b| {
            let name = |session: &Session| (session.key.identity.clone(), session.key.name.clone());
            name(a).cmp(&name(b))
        });
        let shown = named.iter().take(limit);
        let message = query.message_id().and_then(|id| {
            let found = MessageNow::look(tenant, &sessions, records, id, limit);
            let wanted = query.kind() == Some(Kind::Message) || !found.is_empty();
            wanted.then_some(found)
        });
        let topic = query.filter().and_then(|filter| {
            let found = TopicNow::look(tenant, &filter.as_topic()?, limit);
            let wanted = query.kind() == Some(Kind::Topic) || !found.is_empty();
            wanted.then_some(found)
        });
        Self {
            sessions: shown.map(|held| SessionNow::of(held, limit)).collect(),
            session_count: named.len(),
            topic,
            message,
        }
    }

    /// Whether nothing is known.
    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
            && self.topic.as_ref().is_none_or(TopicNow::is_empty)
            && self.message.as_ref().is_none_or(MessageNow::is_empty)
    }
}

impl SessionNow {
    fn of(session: &Session, limit: usize) -> Self {
        let (online, since) = session.presence();
        let mut subscriptions = session.subscriptions();
        subscriptions.sort_by_key(|subscriber| subscriber.id);
        Self {
            identity: session.key.identity.uri().to_owned(),
            session: session.key.name.to_string(),
            online,
            since_ms: wall_ms(since),
            queues: queues(&session.shared),
            subscription_count: subscriptions.len(),
            subscriptions: subscriptions
                .iter()
                .take(limit)
                .map(|subscriber| SubscriptionNow::of(subscriber))
                .collect(),
        }
    }
}

impl SubscriptionNow {
    fn of(subscriber: &Subscriber) -> Self {
        Self {
            filter: subscriber.target.to_string(),
            qos: subscriber.max_qos as u8,
            own_lane: subscriber.own_lane,
            overflow: subscriber.overflow.as_str(),
            denied: (subscriber.residual.iter())
                .map(|filter| filter.as_str().to_owned())
                .collect(),
            queues: if subscriber.own_lane {
                queues(&subscriber.queues)
            } else {
                Vec::new()
            },
        }
    }
}

impl TopicNow {
    fn look(tenant: &Tenant, topic: &TopicName, limit: usize) -> Self {
        let matching = tenant.router.matching(topic);
        let services = tenant.services.list();
        Self {
            receiver_count: matching.len(),
            receivers: matching
                .iter()
                .filter_map(|subscriber| ReceiverNow::of(subscriber, topic))
                .take(limit)
                .collect(),
            retained: (tenant.retained.get(topic)).map(|batch| RetainedNow::of(&batch)),
            history: tenant.history.overlaps(&topic.clone().into()),
            responders: (services.iter().find(|(name, _)| name == topic))
                .map_or(0, |(_, responders)| *responders),
            topic: topic.as_str().to_owned(),
        }
    }

    fn is_empty(&self) -> bool {
        self.receivers.is_empty() && self.retained.is_none() && self.responders == 0
    }
}

impl ReceiverNow {
    fn of(subscriber: &Subscriber, topic: &TopicName) -> Option<Self> {
        let session = subscriber.session.upgrade()?;
        let (online, since) = session.presence();
        Some(Self {
            identity: session.key.identity.uri().to_owned(),
            session: session.key.name.to_string(),
            online,
            since_ms: wall_ms(since),
            filter: subscriber.target.to_string(),
            qos: subscriber.max_qos as u8,
            denied: (subscriber.residual.iter()).any(|filter| filter.matches(topic)),
            queues: queues(&subscriber.queues),
        })
    }
}

impl RetainedNow {
    fn of(batch: &Batch) -> Self {
        let message = batch.messages().next();
        let header = message.and_then(|message| message.header);
        let properties = header.and_then(|header| Properties::decode(&header).ok());
        Self {
            publisher: batch.flow.publisher.uri().to_owned(),
            message_id: batch.message_id().map(|id| printable(&id).into_owned()),
            published_ms: properties
                .and_then(|properties| properties.published)
                .map(unix_ms),
            bytes: batch.frames.len() + batch.payload.len(),
        }
    }
}

impl MessageNow {
    fn look(
        tenant: &Tenant,
        sessions: &[Arc<Session>],
        records: &[Record],
        id: &[u8],
        limit: usize,
    ) -> Self {
        let mut waiting = Vec::new();
        let mut left = SCANNED;
        let mut publishers: HashSet<Identity> = records
            .iter()
            .map(|record| record.fate.sender().clone())
            .take(ASKED)
            .collect();
        let mut complete = true;
        for session in sessions {
            if publishers.len() < ASKED {
                publishers.insert(session.key.identity.clone());
            } else {
                complete = false;
            }
            let own = session.subscriptions();
            let own = own.iter().filter(|subscriber| subscriber.own_lane);
            let queues = own.flat_map(|subscriber| &subscriber.queues);
            for queue in session.shared.iter().chain(queues) {
                let batches = queue.peek(left + 1);
                complete &= batches.len() <= left;
                left = left.saturating_sub(batches.len());
                for (batch, in_flight) in batches {
                    if batch.message_id().is_none_or(|held| held != id) {
                        continue;
                    }
                    publishers.insert(batch.flow.publisher.clone());
                    waiting.push(WaitingNow {
                        identity: session.key.identity.uri().to_owned(),
                        session: session.key.name.to_string(),
                        online: session.is_online(),
                        class: class(queue),
                        in_flight,
                        topic: batch.flow.topic.as_str().to_owned(),
                        publisher: batch.flow.publisher.uri().to_owned(),
                    });
                }
            }
        }
        complete &= waiting.len() <= limit;
        waiting.truncate(limit);
        let (id, now) = (Bytes::copy_from_slice(id), clock::now());
        let mut taken_from: Vec<String> = publishers
            .iter()
            .filter(|publisher| tenant.dedup.find(publisher, &id, now).is_some())
            .map(|publisher| publisher.uri().to_owned())
            .collect();
        taken_from.sort();
        complete &= taken_from.len() <= limit;
        taken_from.truncate(limit);
        Self {
            waiting,
            taken_from,
            complete,
        }
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.taken_from.is_empty()
    }
}

/// The queues that hold something.
fn queues(queues: &[Arc<DeliveryQueue>; 3]) -> Vec<QueueNow> {
    let depths = queues.iter().map(|queue| (class(queue), queue.depth()));
    depths
        .filter(|(_, depth)| *depth != (0, 0))
        .map(|(class, (waiting_bytes, in_flight_bytes))| QueueNow {
            class,
            waiting_bytes,
            in_flight_bytes,
        })
        .collect()
}

fn class(queue: &DeliveryQueue) -> &'static str {
    match queue.class {
        Class::Alarm => "alarm",
        Class::Normal => "normal",
        Class::Bulk => "bulk",
    }
}

/// A moment of the runtime's clock as people's clocks have it.
fn wall_ms(moment: Instant) -> u64 {
    let ago = clock::now().saturating_duration_since(moment);
    unix_ms(
        SystemTime::now()
            .checked_sub(ago)
            .unwrap_or(SystemTime::UNIX_EPOCH),
    )
}
