//! The ring: bounded in records and bytes, fair among identities, with repetitions counted.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use selvedge_certs::Identity;
use selvedge_proto::status::Status;

use crate::batch::Flow;
use crate::losses::Reason;
use crate::policy::Verb;
use crate::session::SessionKey;

#[cfg(test)]
mod tests;

/// Records that a tenant's ring holds: enough for the last minutes of a plant in trouble, and little
/// memory. When there is one more, the oldest goes.
pub const RECORDS: usize = 4096;

/// Bytes that a tenant's ring holds, which is about what so many records of usual size take. The
/// oldest records go until it is enough.
pub const BYTES: usize = 4 << 20;

/// One identity has at most this part of a ring, in records and in bytes, beyond which its own oldest
/// record goes. So one that floods the broker with messages that each have an id of their own does
/// not wash away what is known of the others.
const SHARE: usize = 4;

/// An event that happens again within this time is counted in the record it has; after that it is a
/// new one, so that two bursts can be told apart.
pub const MERGED_WITHIN: Duration = Duration::from_secs(60);

/// Longest id and message of a status that are remembered; the rest is cut off.
const LONGEST_ID: usize = 128;
const LONGEST_MESSAGE: usize = 1024;

/// What a record takes beyond its texts, in the ring and its indexes.
const OVERHEAD: usize = size_of::<Slot>() + size_of::<Fate>() + 128;

/// Recent events of one tenant.
#[derive(Debug)]
pub struct Ring {
    most_records: usize,
    most_bytes: usize,
    /// By serial number, so in the order in which they began.
    slots: BTreeMap<u64, Slot>,
    /// Records that may be counted up, by a hash of what they have in common with the event.
    index: HashMap<u64, u64>,
    shares: HashMap<Identity, Share>,
    hasher: RandomState,
    bytes: usize,
    serial: u64,
    /// When the latest of what has been forgotten happened.
    forgotten: Option<SystemTime>,
}

/// What one identity has in a ring.
#[derive(Debug, Default)]
struct Share {
    /// Serial numbers, oldest first.
    serials: VecDeque<u64>,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    record: Record,
    /// Its place in the index, if it may be counted up.
    key: Option<u64>,
    bytes: usize,
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
    pub fate: Arc<Fate>,
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
        message_id: Option<Box<[u8]>>,
    },
    /// A request or message was not taken from its sender.
    Refused {
        /// Whose it was.
        client: Identity,
        /// What the client wanted to do; none for a connection.
        verb: Option<Verb>,
        /// With what: topic, filter, service or model.
        subject: Option<Box<str>>,
        /// The message's id, if the publisher gave one.
        message_id: Option<Box<[u8]>>,
        /// What the sender was told.
        status: Status,
    },
}

/// A [`Fate`] that is about to be remembered, borrowed so that counting it up allocates nothing.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// See [`Fate::Dropped`].
    Dropped {
        /// See there.
        reason: Reason,
        /// See there.
        receiver: Option<&'a SessionKey>,
        /// See there.
        flow: &'a Arc<Flow>,
        /// See there.
        message_id: Option<&'a [u8]>,
    },
    /// See [`Fate::Refused`].
    Refused {
        /// See there.
        client: &'a Identity,
        /// See there.
        verb: Option<Verb>,
        /// See there.
        subject: Option<&'a str>,
        /// See there.
        message_id: Option<&'a [u8]>,
        /// See there.
        status: &'a Status,
    },
}

impl Default for Ring {
    fn default() -> Self {
        Self::new(RECORDS, BYTES)
    }
}

impl Ring {
    /// An empty ring of so many records and bytes.
    pub fn new(most_records: usize, most_bytes: usize) -> Self {
        Self {
            most_records,
            most_bytes,
            slots: BTreeMap::new(),
            index: HashMap::new(),
            shares: HashMap::new(),
            hasher: RandomState::new(),
            bytes: 0,
            serial: 0,
            forgotten: None,
        }
    }

    /// Remembers an event that concerned `count` messages or requests. One that is like an earlier one
    /// is added to it, unless it has a message id.
    pub fn push(&mut self, now: SystemTime, count: u64, event: &Event<'_>) {
        let key = event.message_id().is_none().then(|| self.key(event));
        if let Some(key) = &key
            && let Some(serial) = self.index.get(key)
            && let Some(slot) = self.slots.get_mut(serial)
            && slot.record.takes(now, event)
        {
            let record = &mut slot.record;
            record.count = record.count.saturating_add(count);
            record.last = record.last.max(now);
            return;
        }
        self.add(now, count, event, key);
    }

    /// The records in the order in which they began.
    pub fn records(&self) -> impl DoubleEndedIterator<Item = &Record> {
        self.slots.values().map(|slot| &slot.record)
    }

    /// Nothing that happened after this has been forgotten; none when nothing has been at all.
    pub fn complete_since(&self) -> Option<SystemTime> {
        self.forgotten
    }

    fn key(&self, event: &Event<'_>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        match event {
            Event::Dropped {
                reason,
                receiver,
                flow,
                ..
            } => {
                (0_u8, reason, flow.publisher.uri(), flow.topic.as_str()).hash(&mut hasher);
                if let Some(receiver) = receiver {
                    (receiver.identity.uri(), &receiver.name).hash(&mut hasher);
                }
            }
            Event::Refused {
                client,
                verb,
                subject,
                status,
                ..
            } => {
                (1_u8, client.uri(), verb, subject, status.code).hash(&mut hasher);
                status.message.hash(&mut hasher);
            }
        }
        hasher.finish()
    }

    #[cold]
    fn add(&mut self, now: SystemTime, count: u64, event: &Event<'_>, key: Option<u64>) {
        let fate = event.keep();
        let bytes = fate.bytes();
        let share = self.shares.entry(fate.sender().clone()).or_default();
        self.serial += 1;
        share.serials.push_back(self.serial);
        share.bytes += bytes;
        self.bytes += bytes;
        if let Some(key) = key {
            self.index.insert(key, self.serial);
        }
        let sender = fate.sender().clone();
        let record = Record {
            first: now,
            last: now,
            count,
            fate: Arc::new(fate),
        };
        self.slots.insert(self.serial, Slot { record, key, bytes });
        while let Some(oldest) = self.too_much_of(&sender) {
            self.forget(oldest);
        }
        while self.slots.len() > self.most_records || self.bytes > self.most_bytes {
            let Some((&oldest, _)) = self.slots.first_key_value() else {
                return;
            };
            self.forget(oldest);
        }
    }

    /// The oldest record of an identity that has more than its share.
    fn too_much_of(&self, sender: &Identity) -> Option<u64> {
        let share = self.shares.get(sender)?;
        let over = share.serials.len() > (self.most_records / SHARE).max(1)
            || share.bytes > self.most_bytes / SHARE;
        share.serials.front().copied().filter(|_| over)
    }

    /// Takes out a record that is the oldest of its sender.
    fn forget(&mut self, serial: u64) {
        let Some(slot) = self.slots.remove(&serial) else {
            return;
        };
        self.bytes -= slot.bytes;
        self.forgotten = self.forgotten.max(Some(slot.record.last));
        if let Some(key) = slot.key
            && self.index.get(&key) == Some(&serial)
        {
            self.index.remove(&key);
        }
        let sender = slot.record.fate.sender();
        if let Some(share) = self.shares.get_mut(sender) {
            share.serials.pop_front();
            share.bytes -= slot.bytes;
            if share.serials.is_empty() {
                self.shares.remove(sender);
            }
        }
    }
}

impl Record {
    /// Whether an event is the same once more.
    fn takes(&self, now: SystemTime, event: &Event<'_>) -> bool {
        let gap = now.duration_since(self.last).unwrap_or_default();
        gap <= MERGED_WITHIN && event.is_like(&self.fate)
    }
}

impl Event<'_> {
    fn message_id(&self) -> Option<&[u8]> {
        match self {
            Self::Dropped { message_id, .. } | Self::Refused { message_id, .. } => *message_id,
        }
    }

    fn is_like(&self, fate: &Fate) -> bool {
        match (self, fate) {
            (
                Event::Dropped {
                    reason,
                    receiver,
                    flow,
                    message_id: None,
                },
                Fate::Dropped {
                    reason: held_reason,
                    receiver: held_receiver,
                    flow: held,
                    message_id: None,
                },
            ) => {
                reason == held_reason
                    && (Arc::ptr_eq(flow, held)
                        || (flow.topic == held.topic && flow.publisher == held.publisher))
                    && match (receiver, held_receiver) {
                        (Some(receiver), Some(held)) => *receiver == held,
                        (None, None) => true,
                        _ => false,
                    }
            }
            (
                Event::Refused {
                    client,
                    verb,
                    subject,
                    message_id: None,
                    status,
                },
                Fate::Refused {
                    client: held_client,
                    verb: held_verb,
                    subject: held_subject,
                    message_id: None,
                    status: held,
                },
            ) => {
                *client == held_client
                    && verb == held_verb
                    && *subject == held_subject.as_deref()
                    && status.code == held.code
                    && status.denial == held.denial
                    && clip(&status.message, LONGEST_MESSAGE) == held.message
            }
            _ => false,
        }
    }

    fn keep(&self) -> Fate {
        let id = |id: &Option<&[u8]>| id.map(|id| Box::from(&id[..id.len().min(LONGEST_ID)]));
        match self {
            Event::Dropped {
                reason,
                receiver,
                flow,
                message_id,
            } => Fate::Dropped {
                reason: *reason,
                receiver: receiver.cloned(),
                flow: Arc::clone(flow),
                message_id: id(message_id),
            },
            Event::Refused {
                client,
                verb,
                subject,
                message_id,
                status,
            } => Fate::Refused {
                client: (*client).clone(),
                verb: *verb,
                subject: subject.map(Box::from),
                message_id: id(message_id),
                status: Status {
                    code: status.code,
                    message: clip(&status.message, LONGEST_MESSAGE).to_owned(),
                    denial: status.denial.clone(),
                    retry_after: status.retry_after,
                },
            },
        }
    }
}

impl Fate {
    /// Memory that it may keep alive.
    fn bytes(&self) -> usize {
        let texts = match self {
            Self::Dropped { receiver, flow, .. } => {
                // The announcement of a flow holds both once more.
                let flow = 2 * (flow.topic.as_str().len() + flow.publisher.uri().len());
                let receiver = receiver.as_ref();
                flow + receiver.map_or(0, |key| key.identity.uri().len() + key.name.len())
            }
            Self::Refused {
                client,
                subject,
                status,
                ..
            } => {
                let denial = status.denial.as_ref();
                client.uri().len()
                    + subject.as_ref().map_or(0, |subject| subject.len())
                    + status.message.len()
                    + denial.map_or(0, |denial| denial.subject.len() + denial.verb.len())
            }
        };
        OVERHEAD + texts + self.message_id().map_or(0, <[u8]>::len)
    }
}

/// The beginning of a text.
fn clip(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}
