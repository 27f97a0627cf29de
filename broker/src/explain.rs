//! What became of messages that went no further: recent drops, refusals and denials of one tenant,
//! and the answer to who asks where a message is.

use std::time::SystemTime;

use parking_lot::Mutex;
use selvedge_certs::Identity;
use selvedge_proto::status::Status;
use selvedge_proto::topic::TopicName;

use crate::batch::Batch;
use crate::losses::Reason;
use crate::policy::Verb;
use crate::session::SessionKey;

pub(crate) mod answer;
mod now;
mod query;
mod ring;

pub use self::query::{Kind, Match, Query, QueryError};
pub use self::ring::{BYTES, Event, Fate, MERGED_WITHIN, RECORDS, Record, Ring};

/// The ring of one tenant, shared by everything that gives something up.
#[derive(Debug, Default)]
pub struct Explain {
    ring: Mutex<Ring>,
}

/// What a ring holds at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The records, oldest first.
    pub records: Vec<Record>,
    /// Nothing that happened after this has been forgotten; none when nothing has been at all.
    pub complete_since: Option<SystemTime>,
}

impl Explain {
    /// Remembers that `count` messages of a batch did not reach `receiver`.
    pub fn dropped(
        &self,
        reason: Reason,
        receiver: Option<&SessionKey>,
        batch: &Batch,
        count: u32,
    ) {
        let id = batch.message_id();
        self.push(
            u64::from(count),
            &Event::Dropped {
                reason,
                receiver,
                flow: &batch.flow,
                message_id: id.as_deref(),
            },
        );
    }

    /// Remembers that a message, or something that has no subject, was refused.
    pub fn refused(
        &self,
        client: &Identity,
        topic: Option<&TopicName>,
        message_id: Option<&[u8]>,
        status: &Status,
    ) {
        self.push(
            1,
            &Event::Refused {
                client,
                verb: topic.map(|_| Verb::Publish),
                subject: topic.map(TopicName::as_str),
                message_id,
                status,
            },
        );
    }

    /// Remembers that a request was refused.
    pub fn request_refused(&self, client: &Identity, verb: Verb, subject: &str, status: &Status) {
        self.push(
            1,
            &Event::Refused {
                client,
                verb: Some(verb),
                subject: Some(subject),
                message_id: None,
                status,
            },
        );
    }

    /// Remembers that the store could not keep `count` messages of a publisher.
    pub fn not_kept(&self, client: &Identity, count: u64, status: &Status) {
        self.push(
            count,
            &Event::Refused {
                client,
                verb: Some(Verb::Publish),
                subject: None,
                message_id: None,
                status,
            },
        );
    }

    /// What is remembered now.
    pub fn snapshot(&self) -> Snapshot {
        let ring = self.ring.lock();
        Snapshot {
            records: ring.records().cloned().collect(),
            complete_since: ring.complete_since(),
        }
    }

    fn push(&self, count: u64, event: &Event<'_>) {
        let now = SystemTime::now();
        self.ring.lock().push(now, count, event);
    }
}

impl Fate {
    /// Who published the message or made the request.
    pub fn sender(&self) -> &Identity {
        match self {
            Self::Dropped { flow, .. } => &flow.publisher,
            Self::Refused { client, .. } => client,
        }
    }

    /// The session that did not get the message.
    pub fn receiver(&self) -> Option<&SessionKey> {
        match self {
            Self::Dropped { receiver, .. } => receiver.as_ref(),
            Self::Refused { .. } => None,
        }
    }

    /// What it was about: a topic, a filter, a service or a model.
    pub fn subject(&self) -> Option<&str> {
        match self {
            Self::Dropped { flow, .. } => Some(flow.topic.as_str()),
            Self::Refused {
                subject, status, ..
            } => subject
                .as_deref()
                .or_else(|| Some(&status.denial.as_ref()?.subject)),
        }
    }

    /// What the sender wanted to do, if that is known.
    pub fn verb(&self) -> Option<Verb> {
        match self {
            Self::Dropped { .. } => None,
            Self::Refused { verb, status, .. } => {
                verb.or_else(|| status.denial.as_ref()?.verb.parse().ok())
            }
        }
    }

    /// The id that the publisher gave the message.
    pub fn message_id(&self) -> Option<&[u8]> {
        match self {
            Self::Dropped { message_id, .. } | Self::Refused { message_id, .. } => {
                message_id.as_deref()
            }
        }
    }

    /// `dropped`, `refused` or, by policy, `denied`.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Dropped { .. } => "dropped",
            Self::Refused { status, .. } if status.denial.is_some() => "denied",
            Self::Refused { .. } => "refused",
        }
    }
}
