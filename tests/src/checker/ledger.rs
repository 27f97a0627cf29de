//! What was published, answered and delivered, and whether that keeps the delivery contract.

use std::fmt;
use std::sync::Arc;

use selvedge_client::Durability;

#[cfg(test)]
mod tests;

/// Violations kept in full. Those beyond it are counted only: the first ones tell the story.
const KEPT_VIOLATIONS: usize = 100;
/// Lost numbers named in a violation.
const NAMED_LOSSES: usize = 8;

/// One publisher's messages on one topic, numbered from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub usize);

/// A subscriber that wants every message of every stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReaderId(pub usize);

/// A message as a reader received it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery<'a> {
    /// The stream that the payload names.
    pub stream: StreamId,
    /// The number that the payload names.
    pub number: u64,
    /// Identity of the publisher as the broker stamped it.
    pub publisher: &'a str,
    /// The topic it came with.
    pub topic: &'a str,
    /// It may have been delivered before, says the broker.
    pub duplicate: bool,
}

/// A breach of the delivery contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Acknowledged at disk and never delivered.
    #[error(
        "lost: {count} messages of {stream} acknowledged at disk never reached {reader}: {first:?}, …"
    )]
    Lost {
        /// Who did not get them.
        reader: Arc<str>,
        /// Publisher and topic.
        stream: String,
        /// How many.
        count: u64,
        /// The first of them.
        first: Vec<u64>,
    },
    /// Delivered for the first time after a later message of the same publisher and topic.
    #[error("out of order: {reader} got {number} of {stream} for the first time after {after}")]
    Reordered {
        /// Who got it.
        reader: Arc<str>,
        /// Publisher and topic.
        stream: String,
        /// The late message.
        number: u64,
        /// The latest message delivered before it.
        after: u64,
    },
    /// Messages came again from further back more often than connections were made.
    #[error("{reader} was taken back {times} times in {stream}, over {connections} reconnects")]
    Rewound {
        /// Who got them.
        reader: Arc<str>,
        /// Publisher and topic.
        stream: String,
        /// How often a message did not follow those before it.
        times: u64,
        /// How often reader and publisher had reconnected, either of which may do that once.
        connections: u64,
    },
    /// Delivered although nobody published it.
    #[error("{reader} got {number} of {stream}, which was never published")]
    NeverPublished {
        /// Who got it.
        reader: Arc<str>,
        /// Publisher and topic, as far as they exist.
        stream: String,
        /// Its number.
        number: u64,
    },
    /// Delivered under another identity or topic than it was published with.
    #[error("{reader} got {number} of {stream} as from {publisher} on {topic}")]
    Misattributed {
        /// Who got it.
        reader: Arc<str>,
        /// Publisher and topic.
        stream: String,
        /// Its number.
        number: u64,
        /// The identity it came with.
        publisher: String,
        /// The topic it came with.
        topic: String,
    },
    /// A payload that nobody published.
    #[error("{reader} got a damaged payload from {publisher} on {topic}: {why}")]
    Damaged {
        /// Who got it.
        reader: Arc<str>,
        /// The identity it came with.
        publisher: String,
        /// The topic it came with.
        topic: String,
        /// What is wrong with it.
        why: String,
    },
    /// Answered without having been published, or twice.
    #[error("{number} of {stream} was answered {answer} and was {before} before")]
    Unasked {
        /// Publisher and topic.
        stream: String,
        /// Its number.
        number: u64,
        /// The answer.
        answer: &'static str,
        /// What it was then.
        before: &'static str,
    },
    /// Acknowledged at less than was demanded, or at more than one broker can reach.
    #[error("{number} of {stream} demanded {demanded:?} and was acknowledged at {reached:?}")]
    WrongDurability {
        /// Publisher and topic.
        stream: String,
        /// Its number.
        number: u64,
        /// What the publisher demanded.
        demanded: Durability,
        /// What the acknowledgement says.
        reached: Option<Durability>,
    },
    /// Neither acknowledged nor refused, long after everything works again.
    #[error("{count} messages of {stream} were never answered")]
    Unanswered {
        /// Publisher and topic.
        stream: String,
        /// How many.
        count: u64,
    },
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages published.
    pub published: u64,
    /// Of them acknowledged at disk.
    pub acked_disk: u64,
    /// Of them acknowledged at less.
    pub acked_memory: u64,
    /// Of them refused.
    pub refused: u64,
    /// Deliveries of a message to a reader that had not had it.
    pub delivered: u64,
    /// Further deliveries of it, marked as such.
    pub marked_repeats: u64,
    /// Further deliveries of it that bear no mark: the publisher had sent it again.
    pub unmarked_repeats: u64,
    /// Deliveries to come: messages acknowledged at disk, for each reader that has not had them.
    pub owed: u64,
    /// Violations seen so far; losses show in the verdict only.
    pub violations: u64,
}

impl Counts {
    /// Messages that wait for their answer.
    pub fn unanswered(&self) -> u64 {
        self.published - self.acked_disk - self.acked_memory - self.refused
    }
}

/// The end of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What happened.
    pub counts: Counts,
    /// Every breach of the contract, up to a bound; [`Counts::violations`] counts all.
    pub violations: Vec<Violation>,
}

/// The record of a check.
#[derive(Debug, Default)]
pub struct Ledger {
    streams: Vec<Stream>,
    readers: Vec<Reader>,
    counts: Counts,
    violations: Vec<Violation>,
}

#[derive(Debug)]
struct Stream {
    publisher: Arc<str>,
    topic: Arc<str>,
    reconnects: u64,
    /// By number.
    fates: Vec<Fate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Waiting(Durability),
    AckedDisk,
    AckedMemory,
    Refused,
}

#[derive(Debug)]
struct Reader {
    name: Arc<str>,
    reconnects: u64,
    /// By stream.
    seen: Vec<Seen>,
}

/// What one reader had of one stream.
#[derive(Debug, Default)]
struct Seen {
    /// By number.
    delivered: Vec<bool>,
    highest: Option<u64>,
    last: Option<u64>,
    rewinds: u64,
}

impl Seen {
    fn has(&self, number: u64) -> bool {
        self.delivered.get(place(number)).is_some_and(|had| *had)
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.publisher, self.topic)
    }
}

impl Fate {
    fn name(self) -> &'static str {
        match self {
            Self::Waiting(_) => "not answered",
            Self::AckedDisk | Self::AckedMemory => "acknowledged",
            Self::Refused => "refused",
        }
    }
}

impl Ledger {
    /// Adds a publisher's topic.
    pub fn stream(&mut self, publisher: &str, topic: &str) -> StreamId {
        self.streams.push(Stream {
            publisher: publisher.into(),
            topic: topic.into(),
            reconnects: 0,
            fates: Vec::new(),
        });
        for reader in &mut self.readers {
            reader.seen.push(Seen::default());
        }
        StreamId(self.streams.len() - 1)
    }

    /// Adds a reader, which wants everything that is published from now on.
    pub fn reader(&mut self, name: &str) -> ReaderId {
        self.readers.push(Reader {
            name: name.into(),
            reconnects: 0,
            seen: self.streams.iter().map(|_| Seen::default()).collect(),
        });
        ReaderId(self.readers.len() - 1)
    }

    /// The next message of a stream is about to be published: its number.
    pub fn published(&mut self, stream: StreamId, demanded: Durability) -> u64 {
        let fates = &mut self.streams[stream.0].fates;
        fates.push(Fate::Waiting(demanded));
        self.counts.published += 1;
        fates.len() as u64 - 1
    }

    /// The broker has acknowledged a message.
    pub fn acked(&mut self, stream: StreamId, number: u64, reached: Option<Durability>) {
        let record = &mut self.streams[stream.0];
        let fate = match record.fates.get_mut(place(number)) {
            Some(fate @ Fate::Waiting(_)) => fate,
            other => {
                let before = other.map_or("not published", |fate| fate.name());
                return self.unasked(stream, number, "with an acknowledgement", before);
            }
        };
        let Fate::Waiting(demanded) = *fate else {
            unreachable!("it was just matched")
        };
        if reached == Some(Durability::Disk) {
            *fate = Fate::AckedDisk;
            self.counts.acked_disk += 1;
            let lacking = self.readers.iter();
            let lacking = lacking.filter(|reader| !reader.seen[stream.0].has(number));
            self.counts.owed += lacking.count() as u64;
        } else {
            *fate = Fate::AckedMemory;
            self.counts.acked_memory += 1;
            let enough = reached == Some(Durability::Memory) && demanded != Durability::Disk;
            if !enough {
                let stream = self.streams[stream.0].to_string();
                self.violated(Violation::WrongDurability {
                    stream,
                    number,
                    demanded,
                    reached,
                });
            }
        }
    }

    /// The broker has refused a message, which may or may not be delivered then.
    pub fn refused(&mut self, stream: StreamId, number: u64) {
        match self.streams[stream.0].fates.get_mut(place(number)) {
            Some(fate @ Fate::Waiting(_)) => {
                *fate = Fate::Refused;
                self.counts.refused += 1;
            }
            other => {
                let before = other.map_or("not published", |fate| fate.name());
                self.unasked(stream, number, "with a refusal", before);
            }
        }
    }

    /// A reader has received a message.
    pub fn delivered(&mut self, reader: ReaderId, delivery: &Delivery<'_>) {
        let Delivery { stream, number, .. } = *delivery;
        let name = &self.readers[reader.0].name;
        let record = match self.streams.get(stream.0) {
            Some(record) if place(number) < record.fates.len() => record,
            other => {
                let violation = Violation::NeverPublished {
                    reader: Arc::clone(name),
                    stream: other.map_or_else(
                        || format!("{} on {}", delivery.publisher, delivery.topic),
                        Stream::to_string,
                    ),
                    number,
                };
                return self.violated(violation);
            }
        };
        if (&*record.publisher, &*record.topic) != (delivery.publisher, delivery.topic) {
            let violation = Violation::Misattributed {
                reader: Arc::clone(name),
                stream: record.to_string(),
                number,
                publisher: delivery.publisher.to_owned(),
                topic: delivery.topic.to_owned(),
            };
            return self.violated(violation);
        }
        let seen = &mut self.readers[reader.0].seen[stream.0];
        if seen.last.is_some_and(|last| number <= last) {
            seen.rewinds += 1;
        }
        seen.last = Some(number);
        if seen.has(number) {
            if delivery.duplicate {
                self.counts.marked_repeats += 1;
            } else {
                self.counts.unmarked_repeats += 1;
            }
            return;
        }
        if seen.delivered.len() < record.fates.len() {
            seen.delivered.resize(record.fates.len(), false);
        }
        seen.delivered[place(number)] = true;
        self.counts.delivered += 1;
        if record.fates[place(number)] == Fate::AckedDisk {
            self.counts.owed -= 1;
        }
        match seen.highest {
            Some(after) if number < after => {
                let violation = Violation::Reordered {
                    reader: Arc::clone(&self.readers[reader.0].name),
                    stream: record.to_string(),
                    number,
                    after,
                };
                self.violated(violation);
            }
            _ => seen.highest = Some(number),
        }
    }

    /// A reader has received something that no publisher here has sent.
    pub fn damaged(&mut self, reader: ReaderId, publisher: &str, topic: &str, why: &str) {
        let reader = Arc::clone(&self.readers[reader.0].name);
        self.violated(Violation::Damaged {
            reader,
            publisher: publisher.to_owned(),
            topic: topic.to_owned(),
            why: why.to_owned(),
        });
    }

    /// The publisher of a stream has reconnected so often, and may have sent messages again.
    pub fn publisher_reconnected(&mut self, stream: StreamId, times: u64) {
        self.streams[stream.0].reconnects += times;
    }

    /// A reader has reconnected so often, and may have been sent messages again.
    pub fn reader_reconnected(&mut self, reader: ReaderId, times: u64) {
        self.readers[reader.0].reconnects += times;
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many messages each stream has.
    pub fn lengths(&self) -> Vec<u64> {
        let lengths = self.streams.iter();
        lengths.map(|stream| stream.fates.len() as u64).collect()
    }

    /// Whether every reader has had something that was published after the streams had these
    /// lengths.
    pub fn all_read_beyond(&self, lengths: &[u64]) -> bool {
        self.readers.iter().all(|reader| {
            let mut seen = reader.seen.iter().zip(lengths);
            seen.any(|(seen, length)| seen.highest.is_some_and(|highest| highest >= *length))
        })
    }

    /// Whether every reader has had the last message of every stream. What it has not had by then
    /// can come out of order only.
    pub fn ends_delivered(&self) -> bool {
        self.streams.iter().enumerate().all(|(stream, record)| {
            let Some(last) = (record.fates.len() as u64).checked_sub(1) else {
                return true;
            };
            let mut readers = self.readers.iter();
            readers.all(|reader| reader.seen[stream].has(last))
        })
    }

    /// Every breach of the contract, with what is missing taken for lost.
    pub fn verdict(&self) -> Verdict {
        let mut ended = Ledger {
            counts: self.counts,
            violations: self.violations.clone(),
            ..Ledger::default()
        };
        for (index, stream) in self.streams.iter().enumerate() {
            let waiting = |fate: &&Fate| matches!(fate, Fate::Waiting(_));
            let count = stream.fates.iter().filter(waiting).count() as u64;
            if count > 0 {
                ended.violated(Violation::Unanswered {
                    stream: stream.to_string(),
                    count,
                });
            }
            for reader in &self.readers {
                let seen = &reader.seen[index];
                let mut missing = (0..)
                    .zip(&stream.fates)
                    .filter(|(number, fate)| **fate == Fate::AckedDisk && !seen.has(*number))
                    .map(|(number, _)| number);
                let first: Vec<u64> = missing.by_ref().take(NAMED_LOSSES).collect();
                let count = (first.len() + missing.count()) as u64;
                if count > 0 {
                    ended.violated(Violation::Lost {
                        reader: Arc::clone(&reader.name),
                        stream: stream.to_string(),
                        count,
                        first,
                    });
                }
                let connections = reader.reconnects + stream.reconnects;
                if seen.rewinds > connections {
                    ended.violated(Violation::Rewound {
                        reader: Arc::clone(&reader.name),
                        stream: stream.to_string(),
                        times: seen.rewinds,
                        connections,
                    });
                }
            }
        }
        Verdict {
            counts: ended.counts,
            violations: ended.violations,
        }
    }

    fn unasked(
        &mut self,
        stream: StreamId,
        number: u64,
        answer: &'static str,
        before: &'static str,
    ) {
        let stream = self.streams[stream.0].to_string();
        self.violated(Violation::Unasked {
            stream,
            number,
            answer,
            before,
        });
    }

    fn violated(&mut self, violation: Violation) {
        self.counts.violations += 1;
        if self.violations.len() < KEPT_VIOLATIONS {
            self.violations.push(violation);
        }
    }
}

/// Numbers index what is in memory. One that does not fit was not published.
fn place(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
