//! The receiving side of one MQTT connection: from its queues to packets, and acknowledgements back.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Buf as _;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use selvedge_proto::message::Qos;
use selvedge_proto::topic::TopicName;

use crate::batch::{Batch, BatchMessage, Flow};
use crate::clock;
use crate::losses::{Losses, Reason};
use crate::metrics::Metrics;
use crate::mqtt::inflight::Numbers;
use crate::mqtt::output::{Alias, Answer, Outgoing, Output};
use crate::mqtt::packet::{ProtocolError, Version};
use crate::mqtt::reason::Reason as Code;
use crate::queue::DeliveryQueue;
use crate::router::is_receiver;
use crate::session::Session;
use crate::session::packets::{Packets, Sent};
use crate::store::{PacketKey, QueueKey, Store, StoredPacket};

/// QoS 1 and 2 messages sent and not acknowledged, at most; a client may ask for fewer. Enough for ten
/// thousand messages a second over a round trip of 100 ms.
const MAX_IN_FLIGHT: u16 = 1024;

/// Bytes waiting for the socket beyond which no more messages are taken from the queues. What
/// waits there is dropped by their rules; what waits here is not.
pub(crate) const HIGH_WATER: usize = 256 * 1024;

/// Bytes taken from a queue at once.
const TAKE: usize = 64 * 1024;

/// Rest before a store that fails is asked again whether it has what QoS 2 packets wait for.
const STORE_PAUSE: Duration = Duration::from_millis(500);

/// Flows whose subscriptions are remembered. Beyond it all are forgotten and found again.
const MAX_VIEWS: usize = 1024;

/// What a client receives.
#[derive(Debug)]
pub(crate) struct Delivery {
    version: Version,
    session: Arc<Session>,
    /// Number of the connection within its session.
    epoch: u64,
    /// Largest packet the client takes.
    limit: usize,
    /// One for each queue that ever had something, by the queue's address, which its lane keeps.
    lanes: HashMap<usize, Lane>,
    /// Lanes to go on with, by class, in turn.
    ready: [VecDeque<usize>; 3],
    /// Lanes that wait for an acknowledgement, by class.
    blocked: [VecDeque<usize>; 3],
    /// Lanes that have nothing but what they are owed, which is sent as the pacer allows.
    owing: Vec<usize>,
    /// Bytes of it that may be sent now.
    granted: usize,
    /// QoS 2 packets of this turn that claim what the store is to have first.
    claims: Output,
    /// The same of earlier turns, in order. Not more than the client's receive maximum.
    claimed: FuturesOrdered<BoxFuture<'static, Output>>,
    /// Bytes in `claimed`.
    claimed_bytes: usize,
    /// Lanes with acknowledgements that their queue has not heard of.
    acknowledged: Vec<usize>,
    /// Topic aliases towards the client, and whether the client has been told, by number less one.
    aliases: HashMap<TopicName, u16>,
    told: Vec<bool>,
    alias_maximum: u16,
    views: HashMap<(u32, u32), Arc<View>>,
}

#[derive(Debug)]
struct Lane {
    queue: Arc<DeliveryQueue>,
    /// It is in `ready` or `blocked`.
    listed: bool,
    /// Its receiver is owed more than what is in the queue.
    owes: bool,
    numbers: Numbers,
    /// How far everything has been acknowledged, for the queue to hear.
    upto: u64,
    /// Taken from the queue and not sent.
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    batch: Arc<Batch>,
    duplicate: bool,
    stored: Option<u64>,
    /// Packet ids of an earlier connection for the first messages; zero for those it acknowledged.
    sent_as: Option<Arc<Vec<u16>>>,
    /// Messages taken so far.
    position: usize,
    messages: std::vec::IntoIter<BatchMessage>,
}

/// How the session's subscriptions see a flow.
#[derive(Debug)]
struct View {
    flow: Arc<Flow>,
    identifiers: Vec<u32>,
    retain_as_published: bool,
    /// Stands for the topic, if the client takes so many.
    alias: Option<u16>,
}

/// Where the work on a lane stopped.
enum Stop {
    /// Nothing is left; the next push wakes.
    Drained,
    /// The client has to acknowledge first.
    Window,
    /// The socket has to take something first.
    Output,
}

impl Delivery {
    pub(crate) fn new(
        version: Version,
        session: Arc<Session>,
        epoch: u64,
        receive_maximum: u16,
        limit: usize,
        alias_maximum: u16,
    ) -> Self {
        session
            .packets()
            .open(epoch, receive_maximum.min(MAX_IN_FLIGHT));
        Self {
            version,
            session,
            epoch,
            limit,
            lanes: HashMap::new(),
            ready: Default::default(),
            blocked: Default::default(),
            owing: Vec::new(),
            granted: 0,
            claims: Output::default(),
            claimed: FuturesOrdered::new(),
            claimed_bytes: 0,
            acknowledged: Vec::new(),
            aliases: HashMap::new(),
            told: Vec::new(),
            alias_maximum,
            views: HashMap::new(),
        }
    }

    /// Sends the PUBRELs that the client is owed from before.
    pub(crate) fn resume(&mut self, output: &mut Output) {
        let session = Arc::clone(&self.session);
        let packets = session.packets();
        if packets.are_for(self.epoch) {
            for id in packets.released() {
                self.pubrel(&packets, id, output);
            }
        }
        self.close_claims(&packets);
    }

    /// Whether QoS 2 packets wait for the disk.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.claimed.is_empty()
    }

    /// The next QoS 2 packets that waited for the disk. May be cancelled without loss.
    pub(crate) async fn synced(&mut self) -> Option<Output> {
        let packets = self.claimed.next().await?;
        self.claimed_bytes -= packets.remaining();
        Some(packets)
    }

    /// Whether more may be taken from the queues.
    pub(crate) fn has_room(&self, output: &Output) -> bool {
        output.remaining() + self.claims.remaining() + self.claimed_bytes < HIGH_WATER
    }

    /// Whether there is more to send as soon as the output has room.
    pub(crate) fn has_more(&self) -> bool {
        self.ready.iter().any(|lanes| !lanes.is_empty())
    }

    /// Moves messages from the queues to the output: the most urgent class first, lanes of one
    /// class in turn.
    pub(crate) fn fill(&mut self, output: &mut Output, metrics: &Metrics, losses: &Losses) {
        for queue in self.session.outbox.take(self.epoch) {
            let key = Arc::as_ptr(&queue) as usize;
            let lane = self.lanes.entry(key).or_insert_with(|| Lane {
                queue,
                listed: false,
                owes: false,
                numbers: Numbers::default(),
                upto: 0,
                waiting: VecDeque::new(),
            });
            if !lane.listed {
                lane.listed = true;
                self.ready[lane.queue.class.index()].push_back(key);
            }
        }
        if !self.has_more() {
            return;
        }
        let now = clock::now();
        let session = Arc::clone(&self.session);
        // Held for the whole turn: a connection that takes the session over comes before or after it.
        let mut packets = session.packets();
        if !packets.are_for(self.epoch) {
            return;
        }
        'classes: for class in 0..self.ready.len() {
            while let Some(key) = self.ready[class].pop_front() {
                match self.drain(key, &mut packets, now, output, metrics, losses) {
                    Stop::Drained => {}
                    Stop::Window => self.blocked[class].push_back(key),
                    Stop::Output => {
                        self.ready[class].push_back(key);
                        break 'classes;
                    }
                }
            }
        }
        self.close_claims(&packets);
    }

    /// Has what was claimed in this turn wait until the store has it.
    fn close_claims(&mut self, packets: &Packets) {
        if !self.claims.has_remaining() {
            return;
        }
        let claims = std::mem::take(&mut self.claims);
        self.claimed_bytes += claims.remaining();
        let store = packets.store().cloned();
        self.claimed.push_back(Box::pin(async move {
            while let Some(store) = &store {
                match store.sync().await {
                    Ok(Ok(())) => break,
                    // The messages stay where they are. A store that works again has them.
                    _ => tokio::time::sleep(STORE_PAUSE).await,
                }
            }
            claims
        }));
    }

    /// PUBREL, once the store knows that the client has the message: it would be a new one to the
    /// client if it were sent again after this.
    fn pubrel(&mut self, packets: &Packets, id: u16, output: &mut Output) {
        match packets.store() {
            Some(_) => self.claims.pubrel(id),
            None => output.pubrel(id),
        }
    }

    /// Whether there is more to send as soon as the pacer allows it.
    pub(crate) fn owes(&self) -> bool {
        !self.owing.is_empty()
    }

    /// Allows so many bytes of what is owed.
    pub(crate) fn grant(&mut self, bytes: usize) {
        self.granted = bytes;
        for key in self.owing.drain(..) {
            if let Some(lane) = self.lanes.get_mut(&key)
                && !lane.listed
            {
                lane.listed = true;
                self.ready[lane.queue.class.index()].push_back(key);
            }
        }
    }

    /// PUBACK. Ids that stand for nothing are not an error: they may be left from before the session
    /// was resumed.
    pub(crate) fn acknowledge(&mut self, packet_id: u16) -> Result<(), ProtocolError> {
        let session = Arc::clone(&self.session);
        let mut packets = session.packets();
        if !packets.are_for(self.epoch) {
            return Ok(());
        }
        match packets.get(packet_id) {
            Some(Sent::Message {
                queue,
                number,
                exactly_once: false,
            }) => {
                packets.finish(packet_id);
                self.note(queue, number);
                Ok(())
            }
            Some(Sent::Message { .. } | Sent::Released { .. }) => Err(ProtocolError::new(
                Code::PROTOCOL_ERROR,
                "PUBACK for a QoS 2 message",
            )),
            Some(Sent::Again) | None => Ok(()),
        }
    }

    /// PUBREC: the client has a QoS 2 message, or does not take it.
    pub(crate) fn received(
        &mut self,
        packet_id: u16,
        refused: bool,
        output: &mut Output,
    ) -> Result<(), ProtocolError> {
        let session = Arc::clone(&self.session);
        let mut packets = session.packets();
        if !packets.are_for(self.epoch) {
            return Ok(());
        }
        match packets.get(packet_id) {
            Some(Sent::Message {
                queue,
                number,
                exactly_once: true,
            }) => {
                let store = packets.store().cloned();
                // The message must not be gone from the store before it says that it was taken.
                let together = store.as_ref().map(Store::together);
                if let Some(lane) = self.lanes.get(&queue) {
                    lane.queue.complete(self.epoch, number);
                }
                if refused {
                    packets.finish(packet_id);
                    packets.drop_kept(PacketKey::Sent(packet_id));
                } else {
                    packets.release(packet_id);
                    packets.keep(StoredPacket::Released(packet_id));
                }
                drop(together);
                self.note(queue, number);
                if !refused {
                    self.pubrel(&packets, packet_id, output);
                }
            }
            Some(Sent::Message { .. }) => {
                return Err(ProtocolError::new(
                    Code::PROTOCOL_ERROR,
                    "PUBREC for a QoS 1 message",
                ));
            }
            Some(Sent::Released { .. }) => self.pubrel(&packets, packet_id, output),
            Some(Sent::Again) | None if refused => {}
            Some(Sent::Again) | None if self.version == Version::V3 => output.pubrel(packet_id),
            Some(Sent::Again) | None => {
                let reason = Code::PACKET_ID_NOT_FOUND;
                output.refusal(Answer::Received, packet_id, reason, None, self.limit);
            }
        }
        Ok(())
    }

    /// PUBCOMP: the client is done with a QoS 2 message.
    pub(crate) fn complete(&mut self, packet_id: u16) -> Result<(), ProtocolError> {
        let session = Arc::clone(&self.session);
        let mut packets = session.packets();
        if !packets.are_for(self.epoch) {
            return Ok(());
        }
        match packets.get(packet_id) {
            Some(Sent::Released { .. }) => {
                packets.finish(packet_id);
                packets.drop_kept(PacketKey::Sent(packet_id));
                self.unblock();
                Ok(())
            }
            Some(Sent::Message { .. }) => Err(ProtocolError::new(
                Code::PROTOCOL_ERROR,
                "PUBCOMP for a message that was not released",
            )),
            Some(Sent::Again) | None => Ok(()),
        }
    }

    /// Notes that a message needs no more of its queue.
    fn note(&mut self, key: usize, number: u64) {
        if let Some(lane) = self.lanes.get_mut(&key)
            && let Some(upto) = lane.numbers.acknowledge(number)
        {
            lane.upto = upto;
            if self.acknowledged.last() != Some(&key) {
                self.acknowledged.push(key);
            }
        }
        self.unblock();
    }

    fn unblock(&mut self) {
        for (ready, blocked) in self.ready.iter_mut().zip(&mut self.blocked) {
            ready.append(blocked);
        }
    }

    /// Tells the queues what has been acknowledged.
    pub(crate) fn settle(&mut self) {
        for key in self.acknowledged.drain(..) {
            if let Some(lane) = self.lanes.get(&key) {
                self.session.acknowledge(&lane.queue, self.epoch, lane.upto);
            }
        }
        if self.claims.has_remaining() {
            let session = Arc::clone(&self.session);
            self.close_claims(&session.packets());
        }
    }

    /// The session's subscriptions have changed.
    pub(crate) fn subscriptions_changed(&mut self) {
        self.views.clear();
        self.lanes
            .retain(|_, lane| lane.listed || !lane.queue.is_closed() || !lane.numbers.is_idle());
    }

    fn drain(
        &mut self,
        key: usize,
        packets: &mut Packets,
        now: Instant,
        output: &mut Output,
        metrics: &Metrics,
        losses: &Losses,
    ) -> Stop {
        let mut aliases = Aliases {
            by_topic: &mut self.aliases,
            told: &mut self.told,
            maximum: self.alias_maximum,
        };
        let Some(lane) = self.lanes.get_mut(&key) else {
            return Stop::Drained;
        };
        loop {
            let Some(waiting) = lane.waiting.front_mut() else {
                if output.remaining() + self.claims.remaining() + self.claimed_bytes >= HIGH_WATER {
                    return Stop::Output;
                }
                let owed = if lane.owes {
                    std::mem::take(&mut self.granted)
                } else {
                    0
                };
                let taken = lane.queue.take(self.epoch, TAKE, owed, now);
                lane.owes = taken.owes;
                if taken.entries.is_empty() {
                    lane.listed = false;
                    if lane.owes && !self.owing.contains(&key) {
                        self.owing.push(key);
                    }
                    return Stop::Drained;
                }
                lane.waiting
                    .extend(taken.entries.into_iter().map(|entry| Waiting {
                        messages: entry.batch.messages().collect::<Vec<_>>().into_iter(),
                        duplicate: entry.duplicate,
                        stored: entry.stored,
                        sent_as: entry.sent_as,
                        position: 0,
                        batch: entry.batch,
                    }));
                continue;
            };
            let batch = &waiting.batch;
            let view = view(
                &mut self.views,
                self.version,
                &self.session,
                lane.queue.subscription,
                &batch.flow,
                &mut aliases,
            );
            let expiry = batch
                .expires
                .map(|expires| expires.saturating_duration_since(now));
            let expired = expiry.is_some_and(|left| left.is_zero());
            let exactly_once = batch.qos == Qos::ExactlyOnce;
            let before = output.remaining() + self.claims.remaining();
            let mut sent = 0;
            let mut stopped = None;
            while !waiting.messages.as_slice().is_empty() {
                if output.remaining() + self.claims.remaining() + self.claimed_bytes >= HIGH_WATER {
                    stopped = Some(Stop::Output);
                    break;
                }
                let earlier = waiting
                    .sent_as
                    .as_ref()
                    .and_then(|ids| ids.get(waiting.position).copied());
                let mut packet_id = 0;
                let mut number = None;
                if batch.qos != Qos::AtMostOnce {
                    if packets.is_full() {
                        stopped = Some(Stop::Window);
                        break;
                    }
                    let issued = lane.numbers.issue();
                    number = Some(issued);
                    packet_id = match earlier {
                        // An earlier connection has acknowledged it.
                        Some(0) => 0,
                        Some(id) => {
                            packets.send_again(id, key, issued, batch.qos);
                            id
                        }
                        None => packets.send(key, issued, batch.qos).unwrap_or_default(),
                    };
                }
                let Some(message) = waiting.messages.next() else {
                    break;
                };
                waiting.position += 1;
                let receiver = Some(&self.session.key);
                let written = if earlier == Some(0) {
                    false
                } else if expired && earlier.is_none() {
                    losses.lose(Reason::Expired, receiver, batch, 1);
                    false
                } else {
                    let duplicate = match &waiting.sent_as {
                        None => waiting.duplicate && batch.qos == Qos::AtLeastOnce,
                        Some(_) => earlier.is_some(),
                    };
                    // The id means this message from now on, also to a client that comes back to a
                    // broker that was started anew.
                    let kept =
                        packets.store().is_some() && exactly_once && waiting.stored.is_some();
                    // What waits for the store goes out later than what comes after it, which must not
                    // need an alias of it.
                    let alias = match view.alias {
                        Some(alias) if !kept => aliases.of(alias),
                        _ => Alias::None,
                    };
                    let outgoing = Outgoing {
                        topic: batch.flow.topic.as_str(),
                        alias,
                        packet_id,
                        qos: batch.qos,
                        duplicate,
                        retain: batch.retain
                            || (view.retain_as_published && batch.retain_as_published),
                        header: message.header.as_deref(),
                        expiry,
                        subscription_ids: &view.identifiers,
                        payload: &message.payload,
                    };
                    // The id means this message from now on, also to a client that comes back to a
                    // broker that was started anew.
                    let kept =
                        packets.store().is_some() && exactly_once && waiting.stored.is_some();
                    let to = if kept { &mut self.claims } else { &mut *output };
                    let written = to.publish(self.version, &outgoing, self.limit).is_ok();
                    if let (true, Alias::Set(alias)) = (written, alias) {
                        aliases.told[usize::from(alias) - 1] = true;
                    }
                    if !written {
                        losses.lose(Reason::TooLarge, receiver, batch, 1);
                    } else if let Some(sequence) = waiting.stored.filter(|_| kept) {
                        let place = QueueKey {
                            session: self.session.id,
                            subscription: lane.queue.subscription,
                            class: lane.queue.class,
                            sequence,
                        };
                        packets.keep(StoredPacket::Sent(packet_id, place));
                    }
                    written
                };
                if written {
                    sent += 1;
                } else if let Some(number) = number {
                    // Given up, which for the queue is as good as delivered.
                    if exactly_once {
                        lane.queue.complete(self.epoch, number);
                    }
                    if exactly_once && earlier.is_some() {
                        // The client may have it from before, and does not know that it is done.
                        packets.release(packet_id);
                        packets.keep(StoredPacket::Released(packet_id));
                        match packets.store() {
                            Some(_) => self.claims.pubrel(packet_id),
                            None => output.pubrel(packet_id),
                        }
                    } else {
                        packets.finish(packet_id);
                    }
                    if let Some(upto) = lane.numbers.acknowledge(number) {
                        lane.upto = upto;
                        lane.queue.acknowledge(self.epoch, upto);
                    }
                }
            }
            metrics.messages_out.inc_by(sent);
            metrics
                .bytes_out
                .inc_by((output.remaining() + self.claims.remaining() - before) as u64);
            match stopped {
                Some(stop) => return stop,
                None => {
                    lane.waiting.pop_front();
                }
            }
        }
    }
}

/// The topic aliases towards a client. The topics that come first have them, for good: what is worth
/// one comes again and again.
struct Aliases<'a> {
    by_topic: &'a mut HashMap<TopicName, u16>,
    told: &'a mut Vec<bool>,
    maximum: u16,
}

impl Aliases<'_> {
    /// The number of a topic.
    fn number(&mut self, topic: &TopicName) -> Option<u16> {
        if let Some(alias) = self.by_topic.get(topic) {
            return Some(*alias);
        }
        let alias = u16::try_from(self.told.len() + 1).ok()?;
        if alias > self.maximum {
            return None;
        }
        self.told.push(false);
        self.by_topic.insert(topic.clone(), alias);
        Some(alias)
    }

    /// How a message says it.
    fn of(&self, alias: u16) -> Alias {
        match self.told.get(usize::from(alias) - 1) {
            Some(true) => Alias::Use(alias),
            _ => Alias::Set(alias),
        }
    }
}

/// What the client's subscriptions add to messages of a flow: overlapping ones give one copy with
/// all their identifiers (MQTT 5.0 section 3.3.4). `subscription` is the one whose queue it is, or
/// zero for the queue of all.
fn view(
    views: &mut HashMap<(u32, u32), Arc<View>>,
    version: Version,
    session: &Session,
    subscription: u32,
    flow: &Arc<Flow>,
    aliases: &mut Aliases<'_>,
) -> Arc<View> {
    let key = (subscription, flow.id);
    if let Some(view) = views.get(&key)
        && Arc::ptr_eq(&view.flow, flow)
    {
        return Arc::clone(view);
    }
    let mut view = View {
        flow: Arc::clone(flow),
        identifiers: Vec::new(),
        retain_as_published: false,
        alias: aliases.number(&flow.topic),
    };
    // 3.1.1 has neither.
    if version == Version::V5 {
        let subscribers = match subscription {
            0 => session.subscriptions(),
            id => session.subscription(id).into_iter().collect(),
        };
        for subscriber in subscribers {
            let matches = subscriber.own_lane == (subscription != 0)
                && subscriber.target.filter.matches(&flow.topic)
                && is_receiver(&subscriber, &flow.topic, flow.session);
            if matches {
                view.identifiers.extend(subscriber.identifier);
                view.retain_as_published |= subscriber.retain_as_published;
            }
        }
        view.identifiers.sort_unstable();
        view.identifiers.dedup();
    }
    let view = Arc::new(view);
    if views.len() >= MAX_VIEWS {
        views.clear();
    }
    views.insert(key, Arc::clone(&view));
    view
}
