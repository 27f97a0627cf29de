//! The task that keeps one remote connected and carries its messages both ways.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::ready;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use selvedge_client::{Backoff, Publish, Reconnect, TopicName};
use selvedge_proto::message::Qos;
use selvedge_proto::topic::TopicFilter;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::bridge::Joined;
use crate::config::RemoteConfig;
use crate::forward::{Inward, Outbound, Owed, inward};
use crate::inward::{Arrived, Taken, give_to_fabric};
use crate::journal::{Journal, Op, Space};
use crate::link::{Event, Incoming, Limits, Link, Receipt, Tried};
use crate::mapping::Rule;
use crate::outbox::{Outbox, Received};
use crate::spool::record::Stored;
use crate::spool::{Consumer, Spool};
use crate::status::{DropReason, Record, Way};

/// First ceiling of the back-off between connections; the last is configured.
const RECONNECT_MIN: Duration = Duration::from_millis(250);

/// How long messages under way may still be acknowledged after the order to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Messages that may wait here for the remote; `outbox_bytes` bounds them as well. What follows waits
/// in the queue.
const OUTBOX_MESSAGES: usize = 1024;

/// Messages of the remote that may wait here for the queue or the fabric; `outbox_bytes` bounds them
/// as well. Beyond either, QoS 0 is dropped and counted, and nothing more is read from a remote that
/// has sent QoS 1 or 2.
const INBOX_MESSAGES: usize = 1024;

type Wait<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Everything that the task owns.
pub(crate) struct Remote {
    config: RemoteConfig,
    rules: Arc<[Rule]>,
    fabric: watch::Receiver<Joined>,
    own_hop: Arc<str>,
    record: Record,
    shutdown: CancellationToken,
    journal: Option<Journal>,

    /// QoS 0 that the outward rules' tasks have taken from the fabric.
    passing: mpsc::Receiver<Outbound>,
    outward: Spool<Owed>,
    waiting: Consumer<Owed>,
    /// Messages whose packet ids are being put down, in order.
    preparing: FuturesOrdered<Wait<Prepared>>,
    outbox: Outbox<Outbound>,
    outbox_bytes: usize,
    /// Packet ids that messages in the queue had in an earlier life of the bridge.
    old_ids: HashMap<u64, OutId>,
    /// PUBRECs that are being put down: the packet ids that PUBREL may be sent for then. Ordered,
    /// since a remote may deliver messages in the order of their PUBRELs.
    releasing: FuturesOrdered<Wait<u16>>,

    inward: Spool<Arrived>,
    /// QoS 2 messages of the remote that it has not released: their numbers in the queue.
    in_ids: HashMap<u16, u64>,
    /// Messages for which there is no room in the queue.
    held: VecDeque<Incoming>,
    /// Messages on their way to the fabric. Ordered, since a remote expects its acknowledgements in
    /// the order of its messages.
    inbox: FuturesOrdered<Wait<Settled>>,
    inbox_bytes: usize,
    inbox_wants_ack: usize,
    /// PUBRELs that are being put down: the packet ids that PUBCOMP may be sent for then.
    completing: FuturesUnordered<Wait<(u64, u16)>>,

    backoff: Backoff,
    /// Number of the connection. A receipt of an earlier one must not be used.
    connection: u64,
}

/// What the journal held of a remote's QoS 2 handshakes.
#[derive(Debug, Default)]
pub(crate) struct Handshakes {
    pub(crate) in_ids: HashMap<u16, u64>,
    pub(crate) out_ids: HashMap<u64, OutId>,
}

/// A packet id that a QoS 2 message was sent under, or was to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutId {
    packet_id: u16,
    /// The remote has received the message.
    received: bool,
    /// The session of the id is gone.
    forgotten: bool,
}

impl OutId {
    fn new(packet_id: u16, received: bool) -> Self {
        Self {
            packet_id,
            received,
            forgotten: false,
        }
    }

    fn encode(self) -> Vec<u8> {
        let [high, low] = self.packet_id.to_be_bytes();
        vec![high, low, self.received.into()]
    }

    /// `None` for what is no such record.
    pub(crate) fn decode(record: &[u8]) -> Option<Self> {
        let [high, low, received] = *record else {
            return None;
        };
        Some(Self::new(u16::from_be_bytes([high, low]), received != 0))
    }
}

/// A message that may be sent.
struct Prepared {
    message: Outbound,
    id: Option<OutId>,
    /// It may have been sent before.
    again: bool,
}

/// A message of the remote that need not be kept there any longer.
struct Settled {
    connection: u64,
    receipt: Receipt,
    bytes: usize,
    /// What became of QoS 0; the queue counts all else.
    passed: Option<(usize, Taken)>,
    /// Whether the remote may be told.
    safe: bool,
}

/// Why a connection ended.
enum Ended {
    Lost(String),
    Shutdown,
}

/// An answer to the remote that waits for room.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Acknowledge(Receipt),
    Release(u16),
    Complete(u16),
}

/// State of one connection.
struct Connection {
    link: Link,
    events: mpsc::Receiver<Event>,
    /// `None` until the remote has accepted.
    limits: Option<Limits>,
    /// The subscriptions are requested.
    subscribed: bool,
    /// Answers that the link had no room for.
    answers: VecDeque<Answer>,
    /// The link had no room for something.
    blocked: bool,
    /// When silence means that the connection is dead.
    silent_at: tokio::time::Instant,
}

/// What a remote's task is given.
pub(crate) struct Parts {
    pub(crate) config: RemoteConfig,
    pub(crate) fabric: watch::Receiver<Joined>,
    pub(crate) own_hop: Arc<str>,
    pub(crate) record: Record,
    pub(crate) shutdown: CancellationToken,
    pub(crate) passing: mpsc::Receiver<Outbound>,
    pub(crate) outward: Spool<Owed>,
    pub(crate) inward: Spool<Arrived>,
    pub(crate) handshakes: Handshakes,
}

impl Remote {
    pub(crate) fn new(parts: Parts) -> Self {
        let mut outbox = Outbox::new();
        for id in parts.handshakes.out_ids.values() {
            outbox.reserve(id.packet_id);
        }
        Self {
            rules: parts.config.rules.clone().into(),
            backoff: Backoff::new(Reconnect {
                min: RECONNECT_MIN,
                max: parts.config.reconnect_max,
            }),
            config: parts.config,
            fabric: parts.fabric,
            own_hop: parts.own_hop,
            record: parts.record,
            shutdown: parts.shutdown,
            journal: parts.outward.place().journal.clone(),
            passing: parts.passing,
            waiting: parts.outward.consumer(),
            outward: parts.outward,
            preparing: FuturesOrdered::new(),
            outbox,
            outbox_bytes: 0,
            old_ids: parts.handshakes.out_ids,
            releasing: FuturesOrdered::new(),
            inward: parts.inward,
            in_ids: parts.handshakes.in_ids,
            held: VecDeque::new(),
            inbox: FuturesOrdered::new(),
            inbox_bytes: 0,
            inbox_wants_ack: 0,
            completing: FuturesUnordered::new(),
            connection: 0,
        }
    }

    /// The queue of QoS 0 from the outward rules' tasks to a remote.
    pub(crate) fn passing() -> (mpsc::Sender<Outbound>, mpsc::Receiver<Outbound>) {
        // The outbox behind it is the queue that counts.
        mpsc::channel(16)
    }

    /// Runs until the shutdown.
    pub(crate) async fn run(mut self) {
        while !self.shutdown.is_cancelled() {
            let reason = match self.connect().await {
                Ended::Lost(reason) => reason,
                Ended::Shutdown => {
                    self.disconnected("the bridge is stopped");
                    return;
                }
            };
            self.disconnected(&reason);
            self.backoff.lost(Instant::now());
            let delay = self.backoff.delay(rand::random());
            tracing::warn!(
                remote = %self.config.name,
                host = %self.config.host,
                port = self.config.port,
                %reason,
                ?delay,
                "not connected"
            );
            self.wait(delay).await;
        }
    }

    /// Waits before the next attempt; what is put down or has reached the fabric meanwhile is noted.
    async fn wait(&mut self, delay: Duration) {
        let shutdown = self.shutdown.clone();
        let until = tokio::time::Instant::now() + delay;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                () = shutdown.cancelled() => return,
                Some(settled) = self.inbox.next(), if !self.inbox.is_empty() => {
                    self.settled(settled, None);
                }
                Some(prepared) = self.preparing.next(), if !self.preparing.is_empty() => {
                    self.prepared(prepared);
                }
                Some(packet_id) = self.releasing.next(), if !self.releasing.is_empty() => {
                    self.outbox.released(packet_id);
                }
                Some(_) = self.completing.next(), if !self.completing.is_empty() => {}
            }
        }
    }

    fn disconnected(&mut self, reason: &str) {
        self.record.disconnected(reason);
        self.outward.set_away(true);
        self.connection += 1;
        // The remote sends them again.
        for held in std::mem::take(&mut self.held) {
            self.inbox_bytes -= held.packet.bytes();
            self.inbox_wants_ack -= usize::from(held.receipt.is_wanted());
        }
        let dropped = self.outbox.extract(|message| message.number.is_none());
        for message in dropped {
            self.outbox_bytes -= message.packet.bytes();
            let reason = DropReason::Disconnected;
            self.record.dropped(Some(message.rule), reason, None);
        }
    }

    /// One connection from the attempt to its end.
    async fn connect(&mut self) -> Ended {
        let (link, events) = match Link::open(&self.config).await {
            Ok(opened) => opened,
            Err(error) => return Ended::Lost(error.to_string()),
        };
        let mut connection = Connection {
            link,
            events,
            limits: None,
            subscribed: false,
            answers: VecDeque::new(),
            blocked: false,
            silent_at: silent_at(self.config.keep_alive),
        };
        let shutdown = self.shutdown.clone();
        loop {
            self.pump(&mut connection).await;
            let keep_alive = self.config.keep_alive;
            let connected = connection.limits.is_some();
            let is_full = self.inbox_is_full();
            let takes = connected && !self.outbox_is_full();
            // Not biased: neither a flood from the remote nor one from the fabric may starve the
            // other, and both are bounded.
            tokio::select! {
                () = shutdown.cancelled() => {
                    self.drain(connection).await;
                    return Ended::Shutdown;
                }
                event = connection.events.recv(), if !is_full => {
                    if let Err(ended) = self.handle(event, &mut connection).await {
                        return ended;
                    }
                }
                Some(settled) = self.inbox.next(), if !self.inbox.is_empty() => {
                    // While the inbox is full, the remote's silence is the bridge's doing.
                    if is_full {
                        connection.silent_at = silent_at(keep_alive);
                    }
                    self.settled(settled, Some(&mut connection));
                }
                () = self.inward.room(), if !self.held.is_empty() => {
                    connection.silent_at = silent_at(keep_alive);
                    if let Some(held) = self.held.pop_front() {
                        self.take(held).await;
                    }
                }
                Some((of, packet_id)) = self.completing.next(), if !self.completing.is_empty() => {
                    if of == self.connection {
                        connection.answers.push_back(Answer::Complete(packet_id));
                    }
                }
                (number, stored) = self.waiting.next(), if takes => {
                    self.prepare(number, stored).await;
                }
                Some(message) = self.passing.recv(), if takes => {
                    self.outbox_bytes += message.packet.bytes();
                    self.outbox.push(message, 0, false);
                }
                Some(prepared) = self.preparing.next(), if !self.preparing.is_empty() => {
                    let owed = self.prepared(prepared).filter(|_| connected);
                    connection.answers.extend(owed.map(Answer::Release));
                }
                Some(packet_id) = self.releasing.next(), if !self.releasing.is_empty() => {
                    if self.outbox.released(packet_id) && connected {
                        connection.answers.push_back(Answer::Release(packet_id));
                    }
                }
                () = connection.link.writable(), if connection.blocked => {}
                () = tokio::time::sleep_until(connection.silent_at), if !is_full => {
                    return Ended::Lost("the remote has gone silent".to_owned());
                }
            }
        }
    }

    fn outbox_is_full(&self) -> bool {
        self.outbox.len() + self.preparing.len() >= OUTBOX_MESSAGES
            || self.outbox_bytes >= self.config.outbox_bytes
    }

    /// Whether to read no more from the remote. QoS 0 is dropped instead, so a remote that sends
    /// nothing else is always read.
    fn inbox_is_full(&self) -> bool {
        self.inbox_wants_ack > 0 && self.inbox_is_over()
    }

    fn inbox_is_over(&self) -> bool {
        self.inbox.len() + self.held.len() >= INBOX_MESSAGES
            || self.inbox_bytes >= self.config.outbox_bytes
    }

    /// A message of the queue, on its way into the outbox.
    async fn prepare(&mut self, number: u64, stored: Stored) {
        let expires = stored.expires_at();
        let message = Outbound {
            rule: stored.rule,
            packet: stored.packet,
            expires,
            number: Some(number),
        };
        self.outbox_bytes += message.packet.bytes();
        let old = self.old_ids.remove(&number);
        let wait: Wait<Prepared> = match (old, &self.journal) {
            (Some(id), _) if id.received && id.forgotten => {
                // The remote has it, and does not remember that it owes a PUBCOMP.
                self.outbox.give_back(id.packet_id);
                self.carried(message, true).await;
                return;
            }
            (Some(id), _) => Box::pin(ready(Prepared {
                message,
                id: Some(id),
                again: !id.forgotten,
            })),
            (None, Some(journal)) if message.packet.qos == Qos::ExactlyOnce => {
                let id = OutId::new(self.outbox.allocate(), false);
                let key = self.outward.place().key(Space::OutIds, number);
                let committed = journal.commit(vec![Op::Put(key, id.encode())]).await;
                Box::pin(async move {
                    // Or another message could get the id while the remote remembers this one.
                    committed.await;
                    Prepared {
                        message,
                        id: Some(id),
                        again: false,
                    }
                })
            }
            (None, _) => Box::pin(ready(Prepared {
                message,
                id: None,
                again: false,
            })),
        };
        self.preparing.push_back(wait);
    }

    /// Puts a message in the outbox. The answer is the packet id that PUBREL is owed for.
    fn prepared(&mut self, prepared: Prepared) -> Option<u16> {
        let Prepared { message, id, again } = prepared;
        match id {
            Some(id) if id.received => {
                self.outbox.push_released(message, id.packet_id);
                return Some(id.packet_id);
            }
            Some(id) => self.outbox.push(message, id.packet_id, again),
            None => self.outbox.push(message, 0, false),
        }
        None
    }

    /// Gives the link whatever it has room for.
    async fn pump(&mut self, connection: &mut Connection) {
        connection.blocked = false;
        let Some(limits) = connection.limits else {
            return;
        };
        if !connection.subscribed {
            let filters = self.subscriptions(limits);
            let resumable = !self.config.clean_session && limits.session_present;
            connection.subscribed = filters.is_empty()
                || connection.link.try_subscribe(&filters, resumable) == Tried::Taken;
            if filters.is_empty() {
                self.record.subscribed();
            }
        }
        // Before new messages: the remote may be waiting for them.
        if !connection.flush_answers() {
            return;
        }
        let window = self.config.max_inflight.min(limits.receive_maximum).max(1);
        while let Some(next) = self.outbox.next(window.into()) {
            let (packet_id, message) = (next.packet_id, next.item);
            message.packet.qos = message.packet.qos.min(limits.qos);
            message.packet.retain &= limits.retain;
            let qos = message.packet.qos;
            let again = next.again && qos > Qos::AtMostOnce;
            let now = Instant::now();
            let expired = message.expires.is_some_and(|expires| expires <= now);
            let encoded = if expired && !again {
                Err((DropReason::Expired, None))
            } else {
                if let Some(expires) = message.expires {
                    // MQTT asks for the lifetime that is left.
                    let left = expires.saturating_duration_since(now);
                    message.packet.properties.expiry = Some(left);
                }
                let too_large = |error| Err((DropReason::TooLarge, Some(error)));
                match connection.link.encode(&message.packet, packet_id, again) {
                    Ok(encoded) if encoded.len() > limits.packet_bytes => too_large(format!(
                        "the packet has {} bytes and the remote takes at most {} bytes",
                        encoded.len(),
                        limits.packet_bytes
                    )),
                    Ok(encoded) => Ok(encoded),
                    Err(error) => too_large(error),
                }
            };
            let tried = match encoded {
                Ok(encoded) => connection.link.try_publish(encoded),
                Err((reason, error)) => {
                    if let Some(message) = self.outbox.take_next() {
                        self.record.dropped(Some(message.rule), reason, error);
                        self.carried(message, false).await;
                    }
                    continue;
                }
            };
            match tried {
                Tried::Full => {
                    connection.blocked = true;
                    return;
                }
                Tried::Taken if qos == Qos::AtMostOnce => {
                    if let Some(message) = self.outbox.take_next() {
                        self.carried(message, true).await;
                    }
                }
                Tried::Taken => self.outbox.sent(),
            }
        }
    }

    fn subscriptions(&self, limits: Limits) -> Vec<(TopicFilter, Qos)> {
        let rules = self.rules.iter();
        rules
            .filter(|rule| rule.direction().carries_in())
            .map(|rule| {
                let filter = rule.remote_filter().clone();
                (filter, rule.qos_cap.min(limits.qos))
            })
            .collect()
    }

    async fn handle(
        &mut self,
        event: Option<Event>,
        connection: &mut Connection,
    ) -> Result<(), Ended> {
        let server_keep_alive = connection.limits.and_then(|limits| limits.keep_alive);
        let keep_alive = server_keep_alive.unwrap_or(self.config.keep_alive);
        connection.silent_at = silent_at(keep_alive);
        match event {
            None => return Err(Ended::Lost("the connection has ended".to_owned())),
            Some(Event::Closed(reason)) => return Err(Ended::Lost(reason)),
            Some(Event::Alive) => {}
            Some(Event::Connected(limits)) => self.accepted(limits, connection).await,
            Some(Event::Subscribed(granted)) => self.granted(&granted),
            Some(Event::Message(incoming)) => self.accept(*incoming).await,
            Some(Event::Acknowledged(_, Err(refusal)) | Event::Received(_, Err(refusal)))
                if refusal.passing =>
            {
                // The message stays in the outbox, in its place, and is sent after the back-off.
                return Err(Ended::Lost(format!(
                    "the remote cannot take a message now: {}",
                    refusal.reason
                )));
            }
            Some(Event::Acknowledged(packet_id, Ok(()))) => {
                if let Some(message) = self.outbox.answered(packet_id) {
                    self.carried(message, true).await;
                }
            }
            Some(
                Event::Acknowledged(packet_id, Err(refusal))
                | Event::Received(packet_id, Err(refusal)),
            ) => {
                if let Some(message) = self.outbox.answered(packet_id) {
                    let error = format!("the remote refused a message: {}", refusal.reason);
                    let reason = DropReason::Refused;
                    self.record.dropped(Some(message.rule), reason, Some(error));
                    self.carried(message, false).await;
                }
            }
            Some(Event::Received(packet_id, Ok(()))) => {
                self.received(packet_id, connection).await;
            }
            Some(Event::Completed(packet_id)) => {
                if let Some(message) = self.outbox.completed(packet_id) {
                    self.carried(message, true).await;
                }
            }
            Some(Event::Released(packet_id)) => self.released(packet_id, connection).await,
        }
        Ok(())
    }

    /// The remote has accepted the connection: both sides agree on what they remember.
    async fn accepted(&mut self, limits: Limits, connection: &mut Connection) {
        connection.limits = Some(limits);
        if let Some(keep_alive) = limits.keep_alive {
            connection.link.set_keep_alive(keep_alive);
        }
        let resumed = limits.session_present && !self.config.clean_session;
        let delivered = self.outbox.restart(resumed);
        for message in delivered {
            self.carried(message, true).await;
        }
        if resumed {
            let owed = self.outbox.owed_releases();
            connection
                .answers
                .extend(owed.into_iter().map(Answer::Release));
        } else {
            for id in self.old_ids.values_mut() {
                id.forgotten = true;
            }
            let forgotten = std::mem::take(&mut self.in_ids).into_keys();
            let place = self.inward.place();
            let ops = forgotten.map(|id| Op::Remove(place.key(Space::InIds, id.into())));
            if let Some(journal) = &self.journal {
                // Before any new message of the remote can be put down under such an id.
                journal.put(ops.collect(), None).await;
            }
        }
        self.outward.set_away(false);
        self.backoff.connected(Instant::now());
        self.record.connected();
        tracing::info!(
            remote = %self.config.name,
            session_present = limits.session_present,
            "connected"
        );
    }

    fn granted(&self, granted: &[Result<(), String>]) {
        let rules = self.rules.iter().enumerate();
        let inward = rules.filter(|(_, rule)| rule.direction().carries_in());
        let mut all = true;
        for ((index, rule), granted) in inward.zip(granted) {
            if let Err(code) = granted {
                all = false;
                let reason = format!(
                    "the remote refused the subscription {}: {code}; \
                     allow it to this client there, or remove the rule",
                    rule.remote_filter()
                );
                tracing::error!(remote = %self.config.name, %reason, "nothing is carried in");
                self.record.rule_error(index, reason);
            }
        }
        if all {
            self.record.subscribed();
        }
    }

    /// The remote has a message, or never will.
    async fn carried(&mut self, message: Outbound, delivered: bool) {
        self.outbox_bytes = self.outbox_bytes.saturating_sub(message.packet.bytes());
        if delivered {
            self.record.forwarded(message.rule, Way::Out);
        }
        if let Some(number) = message.number {
            let key = self.outward.place().key(Space::OutIds, number);
            self.outward.settle(number, vec![Op::Remove(key)]).await;
        }
    }

    /// PUBREC: once that is put down, the message is never sent again.
    async fn received(&mut self, packet_id: u16, connection: &mut Connection) {
        let number = match self.outbox.received(packet_id) {
            Received::PutDown(message) => message.number,
            Received::Release => {
                connection.answers.push_back(Answer::Release(packet_id));
                return;
            }
            Received::Nothing => return,
        };
        match (&self.journal, number) {
            (Some(journal), Some(number)) => {
                let key = self.outward.place().key(Space::OutIds, number);
                let record = OutId::new(packet_id, true).encode();
                let committed = journal.commit(vec![Op::Put(key, record)]).await;
                self.releasing.push_back(Box::pin(async move {
                    committed.await;
                    packet_id
                }));
            }
            _ => self.releasing.push_back(Box::pin(ready(packet_id))),
        }
    }

    /// PUBREL: the remote will not send the message again, and may use its id for another.
    async fn released(&mut self, packet_id: u16, connection: &mut Connection) {
        let known = self.in_ids.remove(&packet_id).is_some();
        match &self.journal {
            Some(journal) if known => {
                let key = self.inward.place().key(Space::InIds, packet_id.into());
                let committed = journal.commit(vec![Op::Remove(key)]).await;
                let of = self.connection;
                self.completing.push(Box::pin(async move {
                    // Or after a crash a new message under this id would pass for the old one.
                    committed.await;
                    (of, packet_id)
                }));
            }
            _ => connection.answers.push_back(Answer::Complete(packet_id)),
        }
    }

    /// A message of the remote.
    async fn accept(&mut self, incoming: Incoming) {
        let wanted = incoming.receipt.is_wanted();
        if !wanted && self.inbox_is_over() {
            self.record.dropped(None, DropReason::Overflow, None);
            return;
        }
        self.inbox_bytes += incoming.packet.bytes();
        self.inbox_wants_ack += usize::from(wanted);
        if wanted && (!self.held.is_empty() || !self.inward.has_room()) {
            self.inward.count_full();
            self.held.push_back(incoming);
            return;
        }
        self.take(incoming).await;
    }

    /// Sends a message of the remote on its way to the fabric.
    async fn take(&mut self, Incoming { packet, receipt }: Incoming) {
        let bytes = packet.bytes();
        let connection = self.connection;
        let settled = move |passed, safe| Settled {
            connection,
            receipt,
            bytes,
            passed,
            safe,
        };
        if receipt.qos == Qos::ExactlyOnce
            && let Some(number) = self.in_ids.get(&receipt.packet_id)
        {
            // The remote has not seen the PUBREC for it.
            if let Ok(known) = inward(&self.rules, &self.own_hop, packet) {
                self.record.repeated(known.rule);
            }
            let (waiter, released) = oneshot::channel();
            self.inward.attach(*number, Arrived(waiter));
            self.inbox.push_back(Box::pin(
                async move { settled(None, released.await.is_ok()) },
            ));
            return;
        }
        let inward = match inward(&self.rules, &self.own_hop, packet) {
            Ok(inward) => inward,
            Err((rule, reason)) => {
                self.record.dropped(rule, reason, None);
                // Acknowledged in its turn all the same: the remote would send it again for ever.
                self.inbox.push_back(Box::pin(ready(settled(None, true))));
                return;
            }
        };
        let rule = inward.rule;
        if inward.packet.qos == Qos::AtMostOnce {
            let give = self.pass(inward);
            self.inbox.push_back(Box::pin(
                async move { settled(Some((rule, give.await)), true) },
            ));
            return;
        }
        let once = inward.packet.qos == Qos::ExactlyOnce && self.journal.is_some();
        let (waiter, released) = oneshot::channel();
        let name = match once {
            // No other message has it, so the fabric takes this one once.
            true => Bytes::from(format!("{:032x}", rand::random::<u128>())),
            false => Bytes::new(),
        };
        let place = self.inward.place().clone();
        let id = u64::from(receipt.packet_id);
        let further = |number: u64| match once {
            true => vec![Op::Put(
                place.key(Space::InIds, id),
                number.to_be_bytes().into(),
            )],
            false => Vec::new(),
        };
        let appended = self
            .inward
            .append(inward.stored(name), Arrived(waiter), further);
        let number = appended.await;
        if once {
            self.in_ids.insert(receipt.packet_id, number);
        }
        self.inbox.push_back(Box::pin(
            async move { settled(None, released.await.is_ok()) },
        ));
    }

    /// Gives the fabric a QoS 0 message, if it is there.
    fn pass(&self, inward: Inward) -> Wait<Taken> {
        let client = self.fabric.borrow().client().cloned();
        let Some(client) = client else {
            return Box::pin(ready(Taken::Dropped(DropReason::Disconnected, None)));
        };
        let topic = String::from_utf8_lossy(&inward.packet.topic);
        let Ok(topic) = TopicName::parse(&*topic) else {
            return Box::pin(ready(Taken::Dropped(DropReason::Unmapped, None)));
        };
        let publish = Publish::new(topic, inward.packet.payload)
            .retain(inward.packet.retain)
            .properties(inward.packet.properties);
        let record = self.record.clone();
        let qos = Qos::AtMostOnce;
        Box::pin(give_to_fabric(client, publish, qos, inward.rule, record))
    }

    fn settled(&mut self, settled: Settled, connection: Option<&mut Connection>) {
        self.inbox_bytes -= settled.bytes;
        self.inbox_wants_ack -= usize::from(settled.receipt.is_wanted());
        match settled.passed {
            None => {}
            Some((rule, Taken::Yes)) => self.record.forwarded(rule, Way::In),
            Some((rule, Taken::Dropped(reason, error))) => {
                self.record.dropped(Some(rule), reason, error);
            }
            Some((rule, Taken::No(error))) => self.record.rule_error(rule, error),
        }
        if let Some(connection) = connection
            && settled.safe
            && settled.connection == self.connection
            && settled.receipt.is_wanted()
        {
            let answer = Answer::Acknowledge(settled.receipt);
            connection.answers.push_back(answer);
        }
    }

    /// Lets what is under way be acknowledged on both sides, takes nothing new, and says goodbye.
    async fn drain(&mut self, mut connection: Connection) {
        if connection.limits.is_none() {
            return;
        }
        let work = async {
            while !(self.outbox.is_idle() && self.inbox.is_empty() && self.completing.is_empty()) {
                connection.flush_answers();
                tokio::select! {
                    event = connection.events.recv() => {
                        // What comes in now is not acknowledged, so the remote keeps it.
                        if !matches!(event, Some(Event::Message(_)))
                            && self.handle(event, &mut connection).await.is_err()
                        {
                            return;
                        }
                    }
                    Some(settled) = self.inbox.next(), if !self.inbox.is_empty() => {
                        self.settled(settled, Some(&mut connection));
                    }
                    Some(packet_id) = self.releasing.next(), if !self.releasing.is_empty() => {
                        if self.outbox.released(packet_id) {
                            connection.answers.push_back(Answer::Release(packet_id));
                        }
                    }
                    Some((_, packet_id)) = self.completing.next(), if !self.completing.is_empty() => {
                        connection.answers.push_back(Answer::Complete(packet_id));
                    }
                    () = connection.link.writable(), if connection.blocked => {}
                }
            }
            while !(connection.flush_answers() && connection.link.try_disconnect() == Tried::Taken)
            {
                connection.link.writable().await;
            }
            // The connection ends by itself after the goodbye.
            while connection.events.recv().await.is_some() {}
        };
        let _elapsed = tokio::time::timeout(DRAIN, work).await;
    }
}

impl Connection {
    /// Whether the link had room for every answer.
    fn flush_answers(&mut self) -> bool {
        while let Some(answer) = self.answers.front() {
            let tried = match *answer {
                Answer::Acknowledge(receipt) => self.link.try_ack(receipt),
                Answer::Release(packet_id) => self.link.try_release(packet_id),
                Answer::Complete(packet_id) => self.link.try_complete(packet_id),
            };
            if tried == Tried::Full {
                self.blocked = true;
                return false;
            }
            self.answers.pop_front();
        }
        true
    }
}

/// The bridge pings more often than each keep-alive, and a pong is an event; but a write that the
/// network does not take holds up the pings as well, and only this notices.
fn silent_at(keep_alive: Duration) -> tokio::time::Instant {
    tokio::time::Instant::now() + keep_alive * 2 + Duration::from_secs(5)
}
