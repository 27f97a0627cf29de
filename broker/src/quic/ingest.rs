//! Publish lanes: reads messages as they come, a read at a time, and acknowledges them.

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use quinn::{ReadError, RecvStream};
use selvedge_proto::frame::{self, FrameError, Head, Kind};
use selvedge_proto::lane::{self, MessageRef, Run};
use selvedge_proto::message::{Class, Durability, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

use super::connection::ControlSender;
use crate::publisher::{Incoming, LARGE, Outcome, Payload, Publisher, Topic};
use crate::store::StoreError;

/// Chunks taken from the stream at once; a chunk is about a packet.
const CHUNKS: usize = 64;

/// Messages are passed on where they were read, instead of copied, from this many bytes on.
const SHARED: usize = 1024;

/// One publish lane.
pub(super) struct Ingest {
    publisher: Publisher,
    control: ControlSender,
    limit: usize,
    max_aliases: u32,
    lane: Option<(u32, Class)>,
    /// Index is the alias.
    topics: Vec<Option<Topic>>,
    /// Aliases with messages taken since the last flush.
    dirty: Vec<u32>,
    /// QoS 1 messages received on this lane.
    number: u64,
    answers: Answers,
    /// Acknowledgements that wait for the disk.
    waiting: FuturesUnordered<BoxFuture<'static, Answered>>,
}

/// Whether messages are on disk, and which.
type Answered = (Result<(), Status>, Vec<(u64, u64)>);

/// Commits that a lane's acknowledgements may wait for at once; the lane is not read further while
/// there are more, which holds its publisher back.
const WAITING: usize = 64;

/// What to tell the publisher about the messages of one read.
#[derive(Default)]
struct Answers {
    /// Ranges taken, with the durability demanded.
    taken: Vec<(u64, u64, Durability)>,
    /// What became of them.
    outcome: Outcome,
    refused: Vec<wire::PublishRefused>,
    marks: Vec<u64>,
}

/// Why a lane ends the connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum IngestError {
    /// The publisher broke the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The lane was reset or the connection lost.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The connection's task is gone.
    #[error("connection closed")]
    Closed,
}

impl Ingest {
    pub(super) fn new(
        publisher: Publisher,
        control: ControlSender,
        limit: usize,
        max_aliases: u32,
    ) -> Self {
        Self {
            publisher,
            control,
            limit,
            max_aliases,
            lane: None,
            topics: Vec::new(),
            dirty: Vec::new(),
            number: 0,
            answers: Answers::default(),
            waiting: FuturesUnordered::new(),
        }
    }

    /// Reads the lane to its end.
    pub(super) async fn run(mut self, mut stream: RecvStream) -> Result<(), IngestError> {
        let mut chunks: [Bytes; CHUNKS] = [const { Bytes::new() }; CHUNKS];
        let mut buffer = BytesMut::new();
        loop {
            let count = tokio::select! {
                biased;
                Some((synced, ranges)) = self.waiting.next(), if !self.waiting.is_empty() => {
                    self.synced(synced, &ranges).await?;
                    continue;
                }
                count = stream.read_chunks(&mut chunks), if self.waiting.len() < WAITING => count?,
            };
            let Some(count) = count else {
                break;
            };
            let bytes = chunks[..count].iter().map(Bytes::len).sum();
            // Nothing is kept while the lane is idle: the buffer is as large as one read.
            buffer.reserve(bytes);
            for chunk in &mut chunks[..count] {
                buffer.extend_from_slice(chunk);
                *chunk = Bytes::new();
            }
            let taken = self.take(&mut buffer);
            self.flush();
            self.answer().await?;
            taken?;
            if buffer.is_empty() {
                buffer = BytesMut::new();
            }
        }
        while let Some((synced, ranges)) = self.waiting.next().await {
            self.synced(synced, &ranges).await?;
        }
        if buffer.is_empty() {
            Ok(())
        } else {
            Err(FrameError::Truncated { missing: 1 }.into())
        }
    }

    /// Takes every whole frame out of `buffer`.
    fn take(&mut self, buffer: &mut BytesMut) -> Result<(), FrameError> {
        let whole = buffer.len();
        let mut position = 0;
        loop {
            let rest = &buffer[position..];
            let Some(head) = frame::peek(rest, self.limit)? else {
                break;
            };
            if rest.len() < head.total() {
                let missing = head.total() - rest.len();
                buffer.advance(position);
                buffer.reserve(missing);
                return Ok(());
            }
            if head.kind == Kind::MESSAGE && head.body >= LARGE {
                buffer.advance(position);
                position = 0;
                let body = buffer.split_to(head.total()).freeze().slice(head.prefix..);
                let message = MessageRef::parse(&body)?;
                let payload = Payload::Shared(body.slice_ref(message.payload));
                self.message(message, payload)?;
                continue;
            }
            if let Some((alias, qos, run)) = self.run_at(&mut buffer[position..], head) {
                // What is shared keeps all of the read, so it has to be most of it.
                let frames = if run.bytes >= SHARED && run.bytes * 2 >= whole {
                    buffer.advance(position);
                    position = 0;
                    Payload::Shared(buffer.split_to(run.bytes).freeze())
                } else {
                    position += run.bytes;
                    Payload::Borrowed(&buffer[position - run.bytes..position])
                };
                self.take_run(alias, qos, run, frames);
                continue;
            }
            let body = &buffer[position..][head.prefix..head.total()];
            if head.kind == Kind::MESSAGE {
                let message = MessageRef::parse(body)?;
                self.message(message, Payload::Borrowed(message.payload))?;
            } else {
                let body = Bytes::copy_from_slice(body);
                self.other(head.kind, body)?;
            }
            position += head.total();
        }
        buffer.advance(position);
        Ok(())
    }

    /// Plain messages of one topic at the start of `buffer`, which begins with a whole frame: their
    /// alias and quality of service. They bear the topic's alias on delivery lanes now.
    #[inline]
    fn run_at(&mut self, buffer: &mut [u8], head: Head) -> Option<(u32, Qos, Run)> {
        if head.kind != Kind::MESSAGE {
            return None;
        }
        let message = MessageRef::parse(&buffer[head.prefix..head.total()]).ok()?;
        if !message.flags.is_plain() {
            return None;
        }
        let (alias, qos) = (message.alias, message.flags.qos().ok()?);
        let topic = self.topics.get_mut(alias as usize)?.as_mut()?;
        if !self.publisher.takes_runs(topic, qos) {
            return None;
        }
        let run = lane::realias(buffer, topic.alias(), self.limit, LARGE)?;
        Some((alias, qos, run))
    }

    fn take_run(&mut self, alias: u32, qos: Qos, run: Run, frames: Payload<'_>) {
        let Some(Some(topic)) = self.topics.get_mut(alias as usize) else {
            return;
        };
        self.publisher.publish_run(topic, qos, run.count, frames);
        mark_dirty(&mut self.dirty, alias);
        if qos != Qos::AtMostOnce {
            let first = self.number + 1;
            self.number += u64::from(run.count);
            let durability = topic.durability(Durability::Default);
            self.answers.acknowledge(first, self.number, durability);
        }
    }

    #[inline]
    fn message(&mut self, message: MessageRef<'_>, payload: Payload<'_>) -> Result<(), FrameError> {
        let qos = message.flags.qos()?;
        let topic = self
            .topics
            .get_mut(message.alias as usize)
            .and_then(Option::as_mut)
            .ok_or_else(|| {
                malformed(
                    "message",
                    format!("alias {} is not bound on this lane", message.alias),
                )
            })?;
        let incoming = Incoming {
            qos,
            retain: message.flags.retain(),
            durability: message.flags.durability(),
            duplicate: qos != Qos::AtMostOnce && message.flags.duplicate(),
            header: message.header,
            payload,
        };
        if qos == Qos::AtMostOnce {
            match self.publisher.publish(topic, &incoming) {
                Ok(()) => mark_dirty(&mut self.dirty, message.alias),
                Err(status) => {
                    refuse_unnumbered(&mut self.answers.refused, topic.name(), status);
                }
            }
            return Ok(());
        }
        if qos == Qos::ExactlyOnce {
            return Err(malformed(
                "message",
                "quality of service 2: expected 0 or 1".to_owned(),
            ));
        }
        self.number += 1;
        let outcome = self
            .publisher
            .check_durability(message.flags.durability())
            .inspect_err(|status| self.publisher.refused(topic, &incoming, status))
            .and_then(|()| self.publisher.publish(topic, &incoming));
        match outcome {
            Ok(()) => {
                mark_dirty(&mut self.dirty, message.alias);
                let durability = topic.durability(message.flags.durability());
                self.answers
                    .acknowledge(self.number, self.number, durability);
            }
            Err(status) => self.answers.refused.push(wire::PublishRefused {
                lane: 0,
                number: self.number,
                topic: topic.name().as_str().to_owned(),
                count: 1,
                status: Some(status.into()),
            }),
        }
        Ok(())
    }

    #[cold]
    fn other(&mut self, kind: Kind, body: Bytes) -> Result<(), FrameError> {
        match kind {
            Kind::LANE => {
                let header: wire::LaneHeader = frame::decode("lane header", body)?;
                if self.lane.is_some() {
                    return Err(malformed("lane header", "second on this lane".to_owned()));
                }
                self.lane = Some((header.lane, header.class().into()));
            }
            Kind::BIND => {
                let Some((_, class)) = self.lane else {
                    return Err(malformed("bind", "comes before the lane header".to_owned()));
                };
                let bind: wire::Bind = frame::decode("bind", body)?;
                if bind.alias == 0 || bind.alias > self.max_aliases {
                    return Err(malformed(
                        "bind",
                        format!("alias {}: expected 1 to {}", bind.alias, self.max_aliases),
                    ));
                }
                let topic = TopicName::parse(bind.topic)
                    .map_err(|error| malformed("bind", error.to_string()))?;
                self.flush();
                let index = bind.alias as usize;
                if self.topics.len() <= index {
                    self.topics.resize_with(index + 1, || None);
                }
                self.topics[index] = Some(self.publisher.open(topic, class));
            }
            Kind::UNBIND => {
                self.flush();
                self.topics.clear();
            }
            Kind::MARK => {
                let mark: wire::Ping = frame::decode("mark", body)?;
                self.answers.marks.push(mark.token);
            }
            _ => {}
        }
        Ok(())
    }

    fn flush(&mut self) {
        for alias in self.dirty.drain(..) {
            if let Some(Some(topic)) = self.topics.get_mut(alias as usize) {
                self.publisher.flush(topic);
                self.answers.outcome.merge(topic.take_outcome());
            }
        }
    }

    /// Tells the publisher what became of messages that waited for the disk.
    async fn synced(
        &mut self,
        synced: Result<(), Status>,
        ranges: &[(u64, u64)],
    ) -> Result<(), IngestError> {
        let lane = self.lane.map_or(0, |(lane, _)| lane);
        for &(first, last) in ranges {
            match &synced {
                Ok(()) => {
                    self.acknowledge(lane, first, last, Durability::Disk)
                        .await?;
                }
                Err(status) => {
                    self.publisher.not_kept(last - first + 1, status);
                    for number in first..=last {
                        let refused = wire::PublishRefused {
                            lane,
                            number,
                            topic: String::new(),
                            count: 1,
                            status: Some(status.clone().into()),
                        };
                        self.send(wire::control::Frame::PublishRefused(refused))
                            .await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn acknowledge(
        &mut self,
        lane: u32,
        first: u64,
        last: u64,
        durability: Durability,
    ) -> Result<(), IngestError> {
        self.publisher.count_acknowledged(last - first + 1);
        self.send(wire::control::Frame::PublishAck(wire::PublishAck {
            lane,
            first,
            last,
            durability: wire::Durability::from(durability) as i32,
        }))
        .await
    }

    async fn send(&mut self, frame: wire::control::Frame) -> Result<(), IngestError> {
        self.control
            .send(Box::new(frame))
            .await
            .map_err(|_| IngestError::Closed)
    }

    async fn answer(&mut self) -> Result<(), IngestError> {
        let answers = std::mem::take(&mut self.answers);
        let lane = self.lane.map_or(0, |(lane, _)| lane);
        let mut ranges = Vec::new();
        for (first, last, demanded) in answers.taken {
            match self.publisher.reached(demanded, answers.outcome) {
                Some(durability) => self.acknowledge(lane, first, last, durability).await?,
                None => ranges.push((first, last)),
            }
        }
        if !ranges.is_empty() {
            let synced = self.publisher.synced();
            self.waiting.push(Box::pin(async move {
                let synced = match synced {
                    Some(synced) => synced
                        .await
                        .unwrap_or_else(|_| Err(StoreError::Failed("it was closed".into()))),
                    None => Err(StoreError::Failed("there is none".into())),
                };
                let status =
                    synced.map_err(|error| Status::new(Code::ResourceExhausted, error.to_string()));
                (status, ranges)
            }));
        }
        for refused in answers.refused {
            let refused = wire::PublishRefused { lane, ..refused };
            self.send(wire::control::Frame::PublishRefused(refused))
                .await?;
        }
        for token in answers.marks {
            self.send(wire::control::Frame::Pong(wire::Pong { token }))
                .await?;
        }
        Ok(())
    }
}

impl Answers {
    fn acknowledge(&mut self, first: u64, last: u64, durability: Durability) {
        match self.taken.last_mut() {
            Some((_, held, demanded)) if *held + 1 == first && *demanded == durability => {
                *held = last;
            }
            _ => self.taken.push((first, last, durability)),
        }
    }
}

/// Adds a refused QoS 0 message: one answer for all of a topic.
#[cold]
pub(super) fn refuse_unnumbered(
    refusals: &mut Vec<wire::PublishRefused>,
    topic: &TopicName,
    status: Status,
) {
    let known = refusals
        .iter_mut()
        .find(|refused| refused.number == 0 && refused.topic == topic.as_str());
    if let Some(refused) = known {
        refused.count += 1;
        return;
    }
    refusals.push(wire::PublishRefused {
        lane: 0,
        number: 0,
        topic: topic.as_str().to_owned(),
        count: 1,
        status: Some(status.into()),
    });
}

#[inline]
fn mark_dirty(dirty: &mut Vec<u32>, alias: u32) {
    // Runs of one topic are the common case; a repeated flush of a clean topic costs nothing.
    if dirty.last() != Some(&alias) {
        dirty.push(alias);
    }
}

#[cold]
fn malformed(what: &'static str, reason: String) -> FrameError {
    FrameError::Malformed { what, reason }
}
