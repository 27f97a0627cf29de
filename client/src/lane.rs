//! Publish lanes: one per class, from the application's call to the QUIC stream.
//!
//! Publishing appends the encoded frame to the lane's buffer under a lock; a writer task swaps the
//! whole buffer out and hands it to QUIC. So the cost of waking a task is paid once for all the
//! messages that gather while the one before is being written.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::lane::{Flags, MESSAGE_OVERHEAD, put_message_head};
use selvedge_proto::message::{Class, Durability};
use selvedge_proto::status::Status;
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;
use tokio::sync::{Notify, oneshot};

use crate::outbox::{Outbox, Sent};
use crate::publish::{IntoTopic, PublishAck, PublishError};
use crate::stats::{Counters, count};
use crate::sync::lock;

/// Unsent bytes that one lane may hold while it is connected: enough to keep QUIC busy, little
/// enough that a message does not grow old in it. A publish waits beyond it.
const UNSENT_LIMIT: usize = 1024 * 1024;
/// Payloads from this size on are not copied into the buffer.
const SHARE_FROM: usize = 4096;
/// A piece of buffer of this size is closed, so that it need not be copied to grow.
const PIECE: usize = 64 * 1024;
/// How long the refusal of a topic is remembered before the broker is asked again, unless the broker
/// says that it may be sooner.
const REFUSAL_MEMORY: Duration = Duration::from_secs(1);
/// Refused topics remembered at once; all are forgotten when there are more.
const REFUSED_TOPICS: usize = 1024;

/// One publish lane, across connections.
#[derive(Debug)]
pub(crate) struct Lane {
    class: Class,
    /// Bound on the bytes of unanswered QoS 1 messages, and on those of QoS 0 while disconnected.
    limit: usize,
    state: Mutex<LaneState>,
    /// Told when the buffer becomes non-empty.
    wake: Notify,
    /// Told when there may be room.
    room: Notify,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct LaneState {
    connected: bool,
    closed: Option<Arc<str>>,
    /// Something was sent on this connection.
    used: bool,
    max_frame: usize,
    aliases: Aliases,
    buffer: SendBuffer,
    outbox: Outbox<Pending>,
    refused: HashMap<TopicName, (Status, Instant)>,
    published: u64,
}

/// A QoS 1 message that waits for its answer.
#[derive(Debug)]
struct Pending {
    topic: TopicName,
    flags: Flags,
    header: Option<Bytes>,
    payload: Bytes,
    reply: oneshot::Sender<Result<PublishAck, PublishError>>,
}

/// A message on its way into a lane.
pub(crate) struct Outgoing<T> {
    pub(crate) topic: T,
    pub(crate) flags: Flags,
    pub(crate) header: Option<Bytes>,
    pub(crate) payload: Bytes,
}

/// What became of a message on its way into a lane.
pub(crate) enum Push<T, R> {
    Done(R),
    /// There is no room; the message comes back.
    Full(Outgoing<T>),
}

impl<T: IntoTopic> Outgoing<T> {
    fn bytes(&self) -> usize {
        let header = self.header.as_ref().map_or(0, Bytes::len);
        MESSAGE_OVERHEAD + header + self.payload.len()
    }
}

impl Lane {
    pub(crate) fn new(class: Class, limit: usize, counters: Arc<Counters>) -> Self {
        Self {
            class,
            limit,
            state: Mutex::new(LaneState {
                connected: false,
                closed: None,
                used: false,
                max_frame: selvedge_proto::DEFAULT_MAX_FRAME,
                aliases: Aliases::new(1),
                buffer: SendBuffer::default(),
                outbox: Outbox::new(),
                refused: HashMap::new(),
                published: 0,
            }),
            wake: Notify::new(),
            room: Notify::new(),
            counters,
        }
    }

    /// The lane's number on every connection.
    pub(crate) fn number(class: Class) -> u32 {
        class.index() as u32 + 1
    }

    /// Messages taken so far.
    pub(crate) fn published(&self) -> u64 {
        lock(&self.state).published
    }

    /// Publishes with QoS 0, waiting for room.
    pub(crate) async fn publish<T: IntoTopic>(
        &self,
        message: Outgoing<T>,
    ) -> Result<(), PublishError> {
        let mut message = match self.push_plain(message)? {
            Push::Done(()) => return Ok(()),
            Push::Full(message) => message,
        };
        loop {
            let room = self.room.notified();
            message = match self.push_plain(message)? {
                Push::Done(()) => return Ok(()),
                Push::Full(message) => message,
            };
            room.await;
        }
    }

    /// Whether a message of this lane's class may be published at all, for one that goes another way.
    pub(crate) fn admits(&self, message: &Outgoing<TopicName>) -> Result<(), PublishError> {
        lock(&self.state).admit(message.topic.as_str(), message.bytes())
    }

    /// Publishes with QoS 1, waiting for room and then for the answer.
    pub(crate) async fn publish_acknowledged(
        &self,
        mut message: Outgoing<TopicName>,
    ) -> Result<PublishAck, PublishError> {
        let answer = loop {
            let room = self.room.notified();
            message = match self.push_acknowledged(message)? {
                Push::Done(answer) => break answer,
                Push::Full(message) => message,
            };
            room.await;
        };
        // The sender is dropped only together with the client.
        answer
            .await
            .unwrap_or_else(|_| Err(PublishError::Closed("the client has ended".into())))
    }

    #[inline]
    fn push_plain<T: IntoTopic>(&self, message: Outgoing<T>) -> Result<Push<T, ()>, PublishError> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let bytes = message.bytes();
        state.admit(message.topic.text(), bytes)?;
        if !state.buffer.has_room(bytes, state.unsent_limit(self.limit)) {
            if state.connected {
                return Ok(Push::Full(message));
            }
            count(&self.counters.dropped_disconnected, 1);
            return Err(PublishError::Disconnected);
        }
        let wake = state.connected && state.buffer.is_empty();
        let alias = match state.aliases.find(message.topic.text()) {
            Some(alias) => alias,
            None => {
                let topic = message.topic.into_topic()?;
                state.aliases.bind(topic, &mut state.buffer)
            }
        };
        state.buffer.message(
            message.flags,
            alias,
            message.header.as_deref(),
            &message.payload,
        );
        state.published += 1;
        drop(guard);
        if wake {
            self.wake.notify_one();
        }
        Ok(Push::Done(()))
    }

    #[allow(clippy::type_complexity)]
    fn push_acknowledged(
        &self,
        message: Outgoing<TopicName>,
    ) -> Result<Push<TopicName, oneshot::Receiver<Result<PublishAck, PublishError>>>, PublishError>
    {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let bytes = message.bytes();
        state.admit(message.topic.as_str(), bytes)?;
        let unsent =
            !state.connected || state.buffer.has_room(bytes, state.unsent_limit(self.limit));
        if !unsent || !state.outbox.has_room(bytes, self.limit) {
            return Ok(Push::Full(message));
        }
        let (reply, answer) = oneshot::channel();
        let pending = Pending {
            topic: message.topic,
            flags: message.flags,
            header: message.header,
            payload: message.payload,
            reply,
        };
        let wake = state.connected && state.buffer.is_empty();
        if state.connected {
            pending.encode(pending.flags, &mut state.aliases, &mut state.buffer);
        }
        state.outbox.push(pending, bytes, state.connected);
        state.published += 1;
        drop(guard);
        if wake {
            self.wake.notify_one();
        }
        Ok(Push::Done(answer))
    }

    /// Puts a mark behind everything published so far. `false` when there is nothing to mark.
    pub(crate) fn mark(&self, token: u64) -> Result<bool, Arc<str>> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some(reason) = &state.closed {
            return Err(reason.clone());
        }
        if !state.used && state.buffer.is_empty() && state.outbox.len() == 0 {
            return Ok(false);
        }
        let wake = state.connected && state.buffer.is_empty();
        let mark = wire::Ping { token };
        state
            .buffer
            .put(|tail| frame::append(tail, Kind::MARK, &mark));
        drop(guard);
        if wake {
            self.wake.notify_one();
        }
        Ok(true)
    }

    /// The broker has kept the messages `first..=last`.
    pub(crate) fn acknowledged(&self, first: u64, last: u64, durability: Durability) {
        let mut answered = 0;
        lock(&self.state).outbox.answer(first, last, |pending| {
            answered += 1;
            let durability = Some(durability);
            // Nobody waits when the publisher gave up the wait; the message was kept all the same.
            let _ = pending.reply.send(Ok(PublishAck { durability }));
        });
        count(&self.counters.acknowledged, answered);
        self.room.notify_waiters();
    }

    /// The broker has refused a QoS 1 message.
    pub(crate) fn refused(&self, number: u64, status: &Status) {
        lock(&self.state).outbox.answer(number, number, |pending| {
            let _ = pending
                .reply
                .send(Err(PublishError::Refused(status.clone())));
        });
        count(&self.counters.refused, 1);
        self.room.notify_waiters();
    }

    /// The broker has refused QoS 0 messages of a topic. Returns whether that is news.
    pub(crate) fn refused_topic(&self, topic: TopicName, status: Status, now: Instant) -> bool {
        let mut state = lock(&self.state);
        if state.refused.len() >= REFUSED_TOPICS {
            state.refused.clear();
        }
        state.refused.insert(topic, (status, now)).is_none()
    }

    /// A connection is up: what is unanswered is sent again, then what was queued meanwhile.
    /// Returns `false` when that had to be discarded.
    pub(crate) fn connected(&self, max_aliases: u32, max_frame: usize) -> bool {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        state.max_frame = max_frame;
        let max_aliases = max_aliases.max(1);
        let keep = state.aliases.highest <= max_aliases;
        if !keep {
            count(&self.counters.discarded_bytes, state.buffer.bytes as u64);
            state.buffer = SendBuffer::default();
        }
        state.aliases.max = max_aliases;
        let mut aliases = Aliases::new(max_aliases);
        let mut again = SendBuffer::default();
        let too_large = state.outbox.restart(|pending, sent| {
            let bytes = pending.bytes();
            if bytes > max_frame {
                return false;
            }
            let repeated = pending.flags.duplicate() || sent == Sent::Before;
            let flags = pending.flags.with_duplicate(repeated);
            pending.encode(flags, &mut aliases, &mut again);
            true
        });
        for pending in too_large {
            let found = pending.bytes();
            let limit = max_frame;
            let _ = pending
                .reply
                .send(Err(PublishError::TooLarge { found, limit }));
        }
        if state.buffer.is_empty() {
            state.aliases = aliases;
            state.buffer = again;
        } else if !again.is_empty() {
            // What was queued while disconnected binds aliases of its own.
            again.unbind();
            again.append(std::mem::take(&mut state.buffer));
            state.buffer = again;
        }
        state.connected = true;
        drop(guard);
        self.wake.notify_one();
        self.room.notify_waiters();
        keep
    }

    /// The connection is gone, and its writer with it.
    pub(crate) fn disconnected(&self) {
        let mut state = lock(&self.state);
        count(&self.counters.discarded_bytes, state.buffer.bytes as u64);
        state.buffer = SendBuffer::default();
        state.aliases = Aliases::new(state.aliases.max);
        state.connected = false;
        state.used = false;
        drop(state);
        self.room.notify_waiters();
    }

    /// The client has ended: everyone who waits is told so.
    pub(crate) fn close(&self, reason: &Arc<str>) {
        let mut state = lock(&self.state);
        state.closed = Some(reason.clone());
        state.connected = false;
        state.buffer = SendBuffer::default();
        let unanswered = state.outbox.drain();
        drop(state);
        for pending in unanswered {
            let _ = pending
                .reply
                .send(Err(PublishError::Closed(reason.clone())));
        }
        self.room.notify_waiters();
    }

    /// Writes the lane's buffer to a stream of this connection, whenever there is something.
    pub(crate) async fn write(&self, connection: &quinn::Connection) -> Result<(), String> {
        let mut pieces = self.take().await;
        let mut stream = connection
            .open_uni()
            .await
            .map_err(|error| error.to_string())?;
        // It fails only on a stream that is closed, and then so does the write.
        let _ = stream.set_priority(self.class.priority());
        let header = wire::LaneHeader {
            lane: Self::number(self.class),
            class: wire::Class::from(self.class).into(),
            subscription: 0,
        };
        pieces.insert(0, frame::encode(Kind::LANE, &header));
        loop {
            stream
                .write_all_chunks(&mut pieces)
                .await
                .map_err(|error| format!("publish lane: {error}"))?;
            pieces = self.take().await;
        }
    }

    async fn take(&self) -> Vec<Bytes> {
        loop {
            {
                let mut state = lock(&self.state);
                if state.connected && !state.buffer.is_empty() {
                    state.used = true;
                    let pieces = state.buffer.take();
                    drop(state);
                    self.room.notify_waiters();
                    return pieces;
                }
            }
            self.wake.notified().await;
        }
    }
}

impl LaneState {
    /// Whether a message may be published at all.
    #[inline]
    fn admit(&mut self, topic: &str, bytes: usize) -> Result<(), PublishError> {
        if let Some(reason) = &self.closed {
            return Err(PublishError::Closed(reason.clone()));
        }
        if bytes > self.max_frame {
            return Err(PublishError::TooLarge {
                found: bytes,
                limit: self.max_frame,
            });
        }
        if !self.refused.is_empty()
            && let Some((status, since)) = self.refused.get(topic)
        {
            let memory = status.retry_after.unwrap_or(REFUSAL_MEMORY);
            if since.elapsed() < memory.min(REFUSAL_MEMORY) {
                return Err(PublishError::Refused(status.clone()));
            }
            self.refused.remove(topic);
        }
        Ok(())
    }

    fn unsent_limit(&self, limit: usize) -> usize {
        if self.connected {
            limit.min(UNSENT_LIMIT)
        } else {
            limit
        }
    }
}

impl Pending {
    fn bytes(&self) -> usize {
        MESSAGE_OVERHEAD + self.header.as_ref().map_or(0, Bytes::len) + self.payload.len()
    }

    fn encode(&self, flags: Flags, aliases: &mut Aliases, buffer: &mut SendBuffer) {
        let alias = match aliases.find(self.topic.as_str()) {
            Some(alias) => alias,
            None => aliases.bind(self.topic.clone(), buffer),
        };
        buffer.message(flags, alias, self.header.as_deref(), &self.payload);
    }
}

/// The aliases that this side has bound on a lane.
#[derive(Debug)]
struct Aliases {
    bound: HashMap<TopicName, u32>,
    /// The alias used last: most publishers repeat themselves.
    last: Option<(TopicName, u32)>,
    max: u32,
    /// The highest alias ever bound.
    highest: u32,
}

impl Aliases {
    fn new(max: u32) -> Self {
        Self {
            bound: HashMap::new(),
            last: None,
            max,
            highest: 0,
        }
    }

    #[inline]
    fn find(&mut self, topic: &str) -> Option<u32> {
        if let Some((last, alias)) = &self.last
            && last.as_str() == topic
        {
            return Some(*alias);
        }
        let (name, &alias) = self.bound.get_key_value(topic)?;
        self.last = Some((name.clone(), alias));
        Some(alias)
    }

    /// Binds the next alias. When there is none left, all are given up first.
    fn bind(&mut self, topic: TopicName, buffer: &mut SendBuffer) -> u32 {
        if self.bound.len() as u64 >= u64::from(self.max) {
            self.bound.clear();
            buffer.unbind();
        }
        let alias = self.bound.len() as u32 + 1;
        self.highest = self.highest.max(alias);
        let bind = wire::Bind {
            alias,
            topic: topic.to_string(),
            publisher: String::new(),
        };
        buffer.put(|tail| frame::append(tail, Kind::BIND, &bind));
        self.bound.insert(topic.clone(), alias);
        self.last = Some((topic, alias));
        alias
    }
}

/// Encoded frames that have yet to be written.
#[derive(Debug, Default)]
struct SendBuffer {
    pieces: Vec<Bytes>,
    tail: BytesMut,
    bytes: usize,
}

impl SendBuffer {
    fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn has_room(&self, more: usize, limit: usize) -> bool {
        self.bytes == 0 || self.bytes.saturating_add(more) <= limit
    }

    fn put(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let before = self.tail.len();
        write(&mut self.tail);
        self.bytes += self.tail.len() - before;
    }

    fn unbind(&mut self) {
        self.put(|tail| frame::put_head(tail, Kind::UNBIND, 0));
    }

    #[inline]
    fn message(&mut self, flags: Flags, alias: u32, header: Option<&[u8]>, payload: &Bytes) {
        let before = self.tail.len();
        put_message_head(&mut self.tail, flags, alias, header, payload.len());
        self.bytes += self.tail.len() - before + payload.len();
        if payload.len() >= SHARE_FROM {
            self.close_piece();
            self.pieces.push(payload.clone());
        } else {
            self.tail.extend_from_slice(payload);
            if self.tail.len() >= PIECE {
                self.close_piece();
            }
        }
    }

    fn append(&mut self, mut later: Self) {
        self.close_piece();
        self.bytes += later.bytes;
        self.pieces.append(&mut later.pieces);
        self.tail = later.tail;
    }

    fn close_piece(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push(self.tail.split().freeze());
        }
    }

    fn take(&mut self) -> Vec<Bytes> {
        self.close_piece();
        self.bytes = 0;
        std::mem::take(&mut self.pieces)
    }
}

#[cfg(test)]
mod tests;
