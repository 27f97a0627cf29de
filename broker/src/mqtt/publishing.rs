//! The publishing side of one MQTT connection: its open topics, and QoS 2 on the way in.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Buf as _;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use selvedge_proto::message::{Class, Durability, Properties, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::mqtt::exchange::{self, Exchange};
use crate::mqtt::output::{Answer, Output};
use crate::mqtt::packet::{self, ProtocolError, Publish, PublishProperties, Version};
use crate::mqtt::properties;
use crate::mqtt::reason::Reason;
use crate::mqtt::settings::Settings;
use crate::publisher::{Incoming, Outcome, Payload, Publisher, Topic};
use crate::session::Session;
use crate::session::packets::Receipt;
use crate::store::{PacketKey, Store, StoreError, StoredPacket};

/// Topics kept open. Beyond it all are closed, and those still in use open again: a client that
/// goes through more topics than this pays for each once in a while.
const MAX_TOPICS: usize = 1024;

/// What a client publishes.
#[derive(Debug)]
pub(crate) struct Publishing {
    version: Version,
    publisher: Publisher,
    session: Arc<Session>,
    /// Number of the connection within its session.
    epoch: u64,
    /// QoS 2 messages that the client may have sent and not released, as CONNACK tells it. QoS 1
    /// messages do not count here: how many wait for the disk is bounded by itself.
    receive_maximum: u16,
    /// Topic aliases that the client may set, as CONNACK tells it.
    topic_alias_maximum: u16,
    /// Positions in `topics`, by class and name.
    index: [HashMap<TopicName, usize>; 3],
    topics: Vec<Topic>,
    /// Positions of topics that may hold messages to flush; some more than once.
    dirty: Vec<usize>,
    aliases: HashMap<u16, TopicName>,
    /// What became of what was taken since the last flush.
    outcome: Outcome,
    /// Answers to messages taken since the last flush.
    answers: Output,
    /// One of them claims that the store has forgotten or knows a packet id.
    claims: bool,
    /// Answers that wait for the disk, or behind one that does: they go in the order of their
    /// messages (MQTT 5.0 section 4.6).
    waiting: FuturesOrdered<BoxFuture<'static, Answered>>,
    /// A message that comes too soon after others, and when it may be taken. Nothing more is read
    /// until then: 3.1.1 has no answer that would have the client send it again later.
    held: Option<(Box<Publish>, Instant)>,
}

/// Whether the messages are kept, and the answers that say so.
type Answered = (Result<(), StoreError>, Output);

/// Commits that answers may wait for at once; nothing more is read while there are more.
const MAX_WAITING: usize = 64;

/// How refusals are worded to this client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manners {
    /// Largest packet it takes.
    pub(crate) limit: usize,
    /// Whether it wants reason strings.
    pub(crate) reasons: bool,
}

impl Publishing {
    pub(crate) fn new(
        version: Version,
        publisher: Publisher,
        session: Arc<Session>,
        epoch: u64,
        settings: &Settings,
    ) -> Self {
        Self {
            version,
            publisher,
            session,
            epoch,
            receive_maximum: settings.receive_maximum,
            topic_alias_maximum: settings.topic_alias_maximum,
            index: Default::default(),
            topics: Vec::new(),
            dirty: Vec::new(),
            aliases: HashMap::new(),
            outcome: Outcome::default(),
            answers: Output::default(),
            claims: false,
            waiting: FuturesOrdered::new(),
            held: None,
        }
    }

    /// Takes one message and notes its answer, which [`Self::flush`] gives out, or holds it until it
    /// may be taken.
    pub(crate) fn publish(
        &mut self,
        mut publish: Box<Publish>,
        manners: Manners,
        metrics: &Metrics,
        exchange: &mut Exchange,
    ) -> Result<(), ProtocolError> {
        let qos = packet::qos(publish.qos);
        let id = publish.packet_id.map_or(0, std::num::NonZero::get);
        let waits = self.version == Version::V3 && qos != Qos::AtMostOnce;
        if waits && let Err(status) = self.publisher.admit() {
            let wait = status.retry_after.unwrap_or_default();
            self.held = Some((publish, Instant::now() + wait));
            return Ok(());
        }
        let properties = publish.properties.take().unwrap_or_default();
        let position = self.topic(&publish.topic, &properties)?;
        let (position, header) = match position {
            Found::Plain(position) => (position, None),
            Found::With(position, properties) => (position, properties.encode()),
            Found::Reserved(topic, properties) => {
                return self.hand_over(&topic, *properties, *publish, manners, exchange);
            }
        };
        let store = match qos {
            Qos::ExactlyOnce => match self.receive(id)? {
                Received::Before => return Ok(()),
                Received::New(store) => store,
            },
            _ => None,
        };
        // A message and its packet id are in one commit.
        let together = store.as_ref().map(Store::together);
        let topic = &mut self.topics[position];
        let message = Incoming {
            qos,
            retain: publish.retain,
            durability: Durability::Default,
            duplicate: false,
            header: header.as_deref(),
            payload: Payload::Shared(publish.payload),
        };
        let result = if waits {
            self.publisher.publish_admitted(topic, &message)
        } else {
            self.publisher.publish(topic, &message)
        };
        if qos == Qos::ExactlyOnce {
            self.received(id, result.is_ok());
        }
        drop(together);
        if self.dirty.last() != Some(&position) {
            self.dirty.push(position);
        }
        if let Err(status) = &result
            && status.code != Code::PermissionDenied
        {
            // A denial has been counted where it was decided.
            metrics.drop_messages("refused", 1);
            if self.version == Version::V3 && qos != Qos::AtMostOnce {
                // 3.1.1 section 3.3.5: either the answer for success, which would have the client
                // forget a message that it should send again, or the end of the connection.
                return Err(ProtocolError::new(
                    Reason::QUOTA_EXCEEDED,
                    "a message that cannot be taken now",
                ));
            }
        }
        self.answer(qos, id, result, manners);
        Ok(())
    }

    /// Hands over a message that is none: a request or an answer.
    fn hand_over(
        &mut self,
        topic: &TopicName,
        properties: Properties,
        publish: Publish,
        manners: Manners,
        exchange: &mut Exchange,
    ) -> Result<(), ProtocolError> {
        let qos = packet::qos(publish.qos);
        let id = publish.packet_id.map_or(0, std::num::NonZero::get);
        if qos == Qos::ExactlyOnce && matches!(self.receive(id)?, Received::Before) {
            return Ok(());
        }
        let result = exchange.publish(topic, properties, publish.payload, publish.retain);
        if qos == Qos::ExactlyOnce {
            self.received(id, result.is_ok());
        }
        match (qos, &result) {
            (Qos::AtLeastOnce, Ok(())) => self.answers.puback(id),
            (Qos::ExactlyOnce, Ok(())) => self.answers.pubrec(id),
            _ => self.answer(qos, id, result, manners),
        }
        Ok(())
    }

    /// Keeps the packet id of a QoS 2 message until it is released, unless the message was refused: to
    /// 5.0 that is told, and ends the exchange.
    fn received(&self, id: u16, taken: bool) {
        let mut packets = self.session.packets();
        if taken || self.version == Version::V3 {
            packets.keep(StoredPacket::Received(id));
        } else {
            packets.forget(self.epoch, id);
        }
    }

    /// Takes note of the packet id of a QoS 2 message, and answers one that was taken before.
    fn receive(&mut self, id: u16) -> Result<Received, ProtocolError> {
        // 3.1.1 knows no receive maximum, but that of its packet ids.
        let most = match self.version {
            Version::V3 => u16::MAX,
            Version::V5 => self.receive_maximum,
        };
        let mut packets = self.session.packets();
        match packets.receive(self.epoch, id, most) {
            Receipt::New => Ok(Received::New(packets.store().cloned())),
            Receipt::Again => {
                self.claims |= packets.store().is_some();
                self.answers.pubrec(id);
                Ok(Received::Before)
            }
            // The connection that has the session now is sent it again.
            Receipt::Stale => Ok(Received::Before),
            Receipt::TooMany => Err(ProtocolError::new(
                Reason::RECEIVE_MAXIMUM_EXCEEDED,
                "more QoS 2 messages than the receive maximum",
            )),
        }
    }

    /// PUBREL: the packet id is free again.
    pub(crate) fn release(&mut self, id: u16, manners: Manners, output: &mut Output) {
        let mut packets = self.session.packets();
        if packets.forget(self.epoch, id) {
            if packets.store().is_some() {
                // If the store still had it later, a message of the same id would be lost.
                packets.drop_kept(PacketKey::Received(id));
                self.claims = true;
                self.answers.pubcomp(id);
            } else {
                output.pubcomp(id);
            }
        } else if self.version == Version::V3 {
            output.pubcomp(id);
        } else {
            let reason = Reason::PACKET_ID_NOT_FOUND;
            output.refusal(Answer::Release, id, reason, None, manners.limit);
        }
    }

    /// Hands everything taken to the receivers. The answers go to `output` unless they have to wait
    /// for the disk.
    pub(crate) fn flush(&mut self, output: &mut Output) {
        self.flush_topics();
        let outcome = std::mem::take(&mut self.outcome);
        if !self.answers.has_remaining() {
            return;
        }
        let answers = std::mem::take(&mut self.answers);
        let reached = self.publisher.reached(Durability::Default, outcome);
        let waits = std::mem::take(&mut self.claims) || reached.is_none();
        match self.publisher.synced().filter(|_| waits) {
            Some(synced) => self.waiting.push_back(Box::pin(async move {
                let closed = || Err(StoreError::Failed("it was closed".into()));
                (synced.await.unwrap_or_else(|_| closed()), answers)
            })),
            None if self.waiting.is_empty() => output.append(answers),
            None => self
                .waiting
                .push_back(Box::pin(std::future::ready((Ok(()), answers)))),
        }
    }

    /// Whether answers wait for the disk.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether more may be read from the client.
    pub(crate) fn may_take(&self) -> bool {
        self.waiting.len() < MAX_WAITING && !self.is_resting()
    }

    /// Whether a message is held back.
    pub(crate) fn is_resting(&self) -> bool {
        self.resting_until().is_some()
    }

    /// When the message that is held back may be taken.
    pub(crate) fn resting_until(&self) -> Option<Instant> {
        self.held.as_ref().map(|(_, until)| *until)
    }

    /// The message that was held back.
    pub(crate) fn take_held(&mut self) -> Option<Box<Publish>> {
        self.held.take().map(|(publish, _)| publish)
    }

    /// The next answers that waited for the disk. May be cancelled without loss.
    pub(crate) async fn synced(&mut self) -> Option<Answered> {
        self.waiting.next().await
    }

    fn flush_topics(&mut self) {
        for position in self.dirty.drain(..) {
            let topic = &mut self.topics[position];
            self.publisher.flush(topic);
            let mut outcome = topic.take_outcome();
            outcome.stored &= topic.durability(Durability::Default) == Durability::Default;
            self.outcome.merge(outcome);
        }
    }

    fn answer(&mut self, qos: Qos, id: u16, result: Result<(), Status>, manners: Manners) {
        let output = &mut self.answers;
        match (qos, result) {
            (Qos::AtMostOnce, _) => {}
            (_, Err(status)) if self.version == Version::V5 => {
                let kind = if qos == Qos::AtLeastOnce {
                    Answer::Publish
                } else {
                    Answer::PublishQos2
                };
                let text = manners.reasons.then_some(&*status.message);
                output.refusal(kind, id, Reason::of_refusal(&status), text, manners.limit);
            }
            // 3.1.1 section 3.3.5 knows no other answer than the one for success.
            (Qos::AtLeastOnce, result) => {
                output.puback(id);
                if result.is_ok() {
                    self.publisher.count_acknowledged(1);
                }
            }
            (Qos::ExactlyOnce, result) => {
                output.pubrec(id);
                if result.is_ok() {
                    self.publisher.count_acknowledged(1);
                }
            }
        }
    }

    /// The open topic that a message is for.
    fn topic(
        &mut self,
        name: &str,
        properties: &PublishProperties,
    ) -> Result<Found, ProtocolError> {
        if *properties == PublishProperties::default() {
            if let Some(&position) = self.index[Class::Normal.index()].get(name) {
                return Ok(Found::Plain(position));
            }
            let name = parse(name)?;
            if exchange::is_reserved(name.as_str()) {
                return Ok(Found::Reserved(name, Box::default()));
            }
            return Ok(Found::Plain(self.open(name, Class::Normal)));
        }
        if !properties.subscription_ids.is_empty() {
            return Err(ProtocolError::new(
                Reason::PROTOCOL_ERROR,
                "a subscription identifier in a PUBLISH",
            ));
        }
        let name = match properties.topic_alias.map(std::num::NonZero::get) {
            None => parse(name)?,
            Some(alias) => self.resolve(name, alias)?,
        };
        let (properties, class) = properties::from_publish(properties.clone())?;
        if exchange::is_reserved(name.as_str()) {
            return Ok(Found::Reserved(name, Box::new(properties)));
        }
        let position = match self.index[class.index()].get(&name) {
            Some(&position) => position,
            None => self.open(name, class),
        };
        Ok(Found::With(position, Box::new(properties)))
    }

    fn resolve(&mut self, name: &str, alias: u16) -> Result<TopicName, ProtocolError> {
        if alias > self.topic_alias_maximum {
            return Err(ProtocolError::new(
                Reason::TOPIC_ALIAS_INVALID,
                "a topic alias beyond the maximum",
            ));
        }
        if name.is_empty() {
            return self.aliases.get(&alias).cloned().ok_or(ProtocolError::new(
                Reason::PROTOCOL_ERROR,
                "a topic alias that was never set",
            ));
        }
        let name = parse(name)?;
        self.aliases.insert(alias, name.clone());
        Ok(name)
    }

    fn open(&mut self, name: TopicName, class: Class) -> usize {
        if self.topics.len() >= MAX_TOPICS {
            self.flush_topics();
            self.topics.clear();
            self.index = Default::default();
        }
        let position = self.topics.len();
        self.topics.push(self.publisher.open(name.clone(), class));
        self.index[class.index()].insert(name, position);
        position
    }
}

/// What a QoS 2 message is.
enum Received {
    /// It was taken before, or is none of this connection's.
    Before,
    /// A new one, and where its packet id is kept, if anywhere.
    New(Option<Store>),
}

/// Where a message goes.
enum Found {
    /// It has no properties.
    Plain(usize),
    With(usize, Box<Properties>),
    /// Nowhere: it is a request, or the answer to one.
    Reserved(TopicName, Box<Properties>),
}

fn parse(name: &str) -> Result<TopicName, ProtocolError> {
    TopicName::parse(name)
        .map_err(|_| ProtocolError::new(Reason::TOPIC_NAME_INVALID, "an invalid topic name"))
}
