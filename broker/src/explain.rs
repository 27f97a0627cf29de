//! What became of messages that went no further: a ring of recent drops, refusals and denials.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;
use selvedge_certs::Identity;
use selvedge_proto::status::Status;
use selvedge_proto::topic::TopicName;

use crate::batch::{Batch, Flow};
use crate::losses::Reason;
use crate::session::SessionKey;

/// Records that a tenant's ring holds; the oldest goes first.
pub const RECORDS: usize = 4096;

/// The ring of one tenant.
#[derive(Debug, Default)]
pub struct Explain {
    ring: Mutex<VecDeque<Record>>,
}

/// One thing that happened, or one that happened several times in a row.
#[derive(Debug, Clone)]
pub struct Record {
    /// When it happened first.
    pub first: SystemTime,
    /// When it happened last.
    pub last: SystemTime,
    /// How many messages or requests.
    pub count: u64,
    /// What happened.
    pub fate: Fate,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Fate {
    /// A message did not reach a receiver.
    Dropped {
        /// Why.
        reason: Reason,
        /// Who did not get it; none when it was for nobody in particular.
        receiver: Option<SessionKey>,
        /// Topic and publisher.
        flow: Arc<Flow>,
        /// Its id, if the publisher gave one.
        message_id: Option<Bytes>,
    },
    /// A request or message was not taken from its sender.
    Refused {
        /// Whose it was.
        client: Identity,
        /// What it was for, if it was a message.
        topic: Option<TopicName>,
        /// Its id, if the publisher gave one.
        message_id: Option<Bytes>,
        /// What the sender was told.
        status: Status,
    },
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
        self.push(
            u64::from(count),
            Fate::Dropped {
                reason,
                receiver: receiver.cloned(),
                flow: Arc::clone(&batch.flow),
                message_id: batch.message_id(),
            },
        );
    }

    /// Remembers that a message or request was refused.
    pub fn refused(
        &self,
        client: &Identity,
        topic: Option<&TopicName>,
        message_id: Option<Bytes>,
        status: &Status,
    ) {
        self.push(
            1,
            Fate::Refused {
                client: client.clone(),
                topic: topic.cloned(),
                message_id,
                status: status.clone(),
            },
        );
    }

    fn push(&self, count: u64, fate: Fate) {
        let now = SystemTime::now();
        let mut ring = self.ring.lock();
        if ring.len() >= RECORDS {
            ring.pop_front();
        }
        ring.push_back(Record {
            first: now,
            last: now,
            count,
            fate,
        });
    }
}
