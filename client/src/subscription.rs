//! Subscriptions: the stream of messages that match a filter.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use bytes::Bytes;
use futures_core::Stream;
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::status::Status;
use selvedge_proto::topic::{SubscribeTarget, TopicError, TopicFilter, TopicName};
use selvedge_proto::wire;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::ack::Ticket;
use crate::client::Client;
use crate::control::Refusal;
use crate::receipts::{Receipt, Receipts};
use crate::stats::count;
use crate::sync::lock;

/// What the broker does when this subscriber is too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// The broker's default for the quality of service.
    #[default]
    Default,
    /// The oldest queued message is dropped.
    DropOldest,
    /// The message that does not fit is dropped.
    DropNewest,
    /// The publisher is refused.
    Refuse,
    /// The subscriber is disconnected.
    Disconnect,
}

/// Whether retained messages are sent at the start of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetainHandling {
    /// Always.
    #[default]
    Send,
    /// Only when the subscription is new to the session.
    SendIfNew,
    /// Never.
    DoNotSend,
}

/// Which part of their history topics deliver first, where the broker is configured to keep any. The
/// bounds that are given all hold.
///
/// Nothing is missing between the replay and what is published from then on, and nothing comes twice.
/// Replayed messages say when they were [published](Message::published); they are never dropped in
/// this process, their lane waits instead. The replay is not repeated as long as the broker keeps the
/// session. When it does not, the client asks again: for everything since the last message that was
/// replayed, if it has seen the end of the replay, and else for the same replay. So messages may come
/// again then, and none is missing that the history still has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replay {
    last: Option<u32>,
    since: Option<SystemTime>,
    until: Option<SystemTime>,
}

impl Replay {
    /// All that is kept.
    pub fn all() -> Self {
        Self::default()
    }

    /// The last so many messages of each topic, at least one.
    pub fn last(count: u32) -> Self {
        Self {
            last: Some(count.max(1)),
            ..Self::default()
        }
    }

    /// Only what was published at or after this time, by the broker's clock.
    #[must_use]
    pub fn since(mut self, time: SystemTime) -> Self {
        self.since = Some(time);
        self
    }

    /// Only what was published before this time, by the broker's clock.
    #[must_use]
    pub fn until(mut self, time: SystemTime) -> Self {
        self.until = Some(time);
        self
    }

    fn to_wire(self) -> wire::Replay {
        wire::Replay {
            last: self.last.unwrap_or_default(),
            from_ms: self.since.map(unix_ms),
            until_ms: self.until.map(unix_ms),
        }
    }
}

/// How to subscribe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubscribeOptions {
    /// Highest quality of service to deliver with, 0 or 1. Default: 1.
    pub max_qos: Qos,
    /// Leave out messages that this client published. Default: false.
    pub no_local: bool,
    /// Whether retained messages are sent at the start.
    pub retain_handling: RetainHandling,
    /// Deliver on a lane of its own, so that a slow reader of this subscription delays no other.
    /// Implied by a share group. Default: false.
    pub own_lane: bool,
    /// Deliver with the retain flag as published, instead of only on messages that were retained
    /// before. Implies `own_lane`. Default: false.
    pub retain_as_published: bool,
    /// Deliver QoS 0 messages of class normal that fit as datagrams, for what is worthless when late:
    /// one that the network loses is not sent again, and holds up none behind it. Retained and
    /// replayed messages and all others come on lanes as ever. Implies `own_lane`. Default: false.
    pub datagrams: bool,
    /// Deliver a part of the topics' history first, instead of retained messages. Refused where no
    /// topic of the filter keeps history, and for a share group. Implies `own_lane`. Default: none.
    pub replay: Option<Replay>,
    /// What the broker does when this subscriber is too slow. Anything but the default implies
    /// `own_lane`, since the lanes that subscriptions share have one queue.
    pub overflow: Overflow,
    /// Messages that may wait in this process, at least 1; 16 MiB bound them as well. QoS 0
    /// messages beyond it are dropped and counted; QoS 1 messages make the lane wait. Default: 4096.
    pub queue: usize,
    /// Acknowledge QoS 1 messages by [`Message::ack`] instead of when they are taken. Default:
    /// false.
    pub manual_ack: bool,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            max_qos: Qos::AtLeastOnce,
            no_local: false,
            retain_handling: RetainHandling::Send,
            own_lane: false,
            retain_as_published: false,
            datagrams: false,
            replay: None,
            overflow: Overflow::Default,
            queue: 4096,
            manual_ack: false,
        }
    }
}

/// Why a subscription was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The filter is neither a topic filter nor `$share/<group>/<filter>`.
    #[error(transparent)]
    InvalidFilter(#[from] TopicError),
    /// The broker refused it.
    #[error("the broker refused the subscription: {0}")]
    Refused(Status),
    /// The client is closed.
    #[error("the client is closed: {0}")]
    Closed(Arc<str>),
}

impl From<Refusal> for SubscribeError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Status(status) => Self::Refused(status),
            Refusal::Closed(reason) => Self::Closed(reason),
        }
    }
}

impl SubscribeOptions {
    /// The subscription on the wire; its id is chosen later.
    pub(crate) fn to_wire(&self, target: &SubscribeTarget) -> wire::Subscription {
        let overflow = match self.overflow {
            Overflow::Default => wire::Overflow::Default,
            Overflow::DropOldest => wire::Overflow::DropOldest,
            Overflow::DropNewest => wire::Overflow::DropNewest,
            Overflow::Refuse => wire::Overflow::Refuse,
            Overflow::Disconnect => wire::Overflow::Disconnect,
        };
        let retain_handling = match self.retain_handling {
            RetainHandling::Send => wire::RetainHandling::RetainSend,
            RetainHandling::SendIfNew => wire::RetainHandling::RetainSendIfNew,
            RetainHandling::DoNotSend => wire::RetainHandling::RetainDoNotSend,
        };
        wire::Subscription {
            id: 0,
            filter: target.to_string(),
            max_qos: self.max_qos as u32,
            no_local: self.no_local,
            retain_handling: retain_handling.into(),
            overflow: overflow.into(),
            own_lane: self.own_lane || self.overflow != Overflow::Default,
            retain_as_published: self.retain_as_published,
            replay: self.replay.map(Replay::to_wire),
            datagrams: self.datagrams,
        }
    }
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// The topic it was published to.
    pub topic: TopicName,
    /// Identity URI of the publisher as the broker verified it.
    pub publisher: Arc<str>,
    /// What the publisher said.
    pub payload: Bytes,
    /// Quality of service of the delivery.
    pub qos: Qos,
    /// It was kept as the topic's retained message from before the subscription.
    pub retain: bool,
    /// It may have been delivered before.
    pub duplicate: bool,
    /// Urgency.
    pub class: Class,
    pub(crate) properties: Option<Box<Properties>>,
    pub(crate) ticket: Option<Ticket>,
    pub(crate) receipt: Option<Receipt>,
}

impl Message {
    /// What it carries besides the payload; everything is empty for most messages.
    pub fn properties(&self) -> &Properties {
        static NONE: LazyLock<Properties> = LazyLock::new(Properties::default);
        self.properties.as_deref().unwrap_or(&NONE)
    }

    /// When the broker took it, for a message that is replayed from the history.
    pub fn published(&self) -> Option<SystemTime> {
        self.properties().published
    }

    /// Acknowledges a QoS 1 message of a subscription with
    /// [`manual_ack`](SubscribeOptions::manual_ack); otherwise nothing happens.
    ///
    /// Acknowledgements are cumulative: a message that is dropped without it, and those after it
    /// on the same lane, are delivered again after a reconnect of a kept session.
    pub fn ack(&mut self) {
        if let Some(receipt) = self.receipt.take() {
            receipt.sign(self);
        }
        if let Some(ticket) = self.ticket.take() {
            ticket.redeem();
        }
    }
}

/// A stream of messages. A message with an id that the application has taken does not come again
/// when the broker repeats it, within the last 65,536 ids. Dropping it unsubscribes; to leave the subscription in a session that the
/// broker keeps, [close](Client::close) the client first.
#[derive(Debug)]
pub struct Subscription {
    /// Messages taken from the route and not yet by the application.
    ready: VecDeque<Message>,
    route: Arc<Route>,
    /// What the application has taken.
    receipts: Receipts,
    /// Keeps the connection open.
    client: Client,
}

impl Subscription {
    pub(crate) fn new(client: Client, route: Arc<Route>) -> Self {
        Self {
            ready: VecDeque::new(),
            route,
            receipts: Receipts::default(),
            client,
        }
    }

    /// The next message, or `None` when the subscription has ended: see [`Self::end`].
    pub async fn next(&mut self) -> Option<Message> {
        std::future::poll_fn(|context| self.poll_message(context)).await
    }

    /// Why the subscription ended, if the broker refused to restore it after a reconnect.
    pub fn end(&self) -> Option<Status> {
        self.route.ended().flatten()
    }

    /// Unsubscribes and waits until the broker has done it. Messages not taken are dropped.
    ///
    /// # Errors
    /// As [`SubscribeError`].
    pub async fn unsubscribe(self) -> Result<(), SubscribeError> {
        let answer = self.client.shared().control.unsubscribe(&self.route);
        // The sender is dropped only together with the client, and then nothing is subscribed.
        match answer.await.unwrap_or(Ok(())) {
            Ok(()) => Ok(()),
            Err(refusal) => Err(refusal.into()),
        }
    }

    #[inline]
    fn poll_message(&mut self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        loop {
            if self.ready.is_empty() {
                match self.route.poll_take(context, &mut self.ready) {
                    Poll::Ready(true) => {}
                    Poll::Ready(false) => return Poll::Ready(None),
                    Poll::Pending => return Poll::Pending,
                }
            }
            let Some(mut message) = self.ready.pop_front() else {
                return Poll::Ready(None);
            };
            if message.duplicate && self.receipts.has(&message) {
                count(&self.client.shared().counters.duplicates, 1);
                message.ack();
                continue;
            }
            message.receipt = self.receipts.receipt(&message);
            if !self.route.manual_ack {
                message.ack();
            }
            return Poll::Ready(Some(message));
        }
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        self.get_mut().poll_message(context)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.client.shared().control.unsubscribe(&self.route);
        self.route.end(None);
        self.route.discard_queue();
        // What was not taken must not hold up the acknowledgement of others' messages.
        discard(&mut self.ready);
    }
}

/// Bytes of messages that may wait in one subscription's queue, besides the bound on their number.
const QUEUE_BYTES: usize = 16 * 1024 * 1024;
/// What a message takes besides its payload, roughly.
const MESSAGE_COST: usize = 128;

/// The way from the delivery lanes to one subscription: a bounded queue.
///
/// When it is full, a QoS 0 message is dropped and counted in [`ClientStats::dropped_slow`]; a
/// QoS 1 message makes its lane wait.
///
/// [`ClientStats::dropped_slow`]: crate::ClientStats::dropped_slow
#[derive(Debug)]
pub(crate) struct Route {
    id: u32,
    filter: TopicFilter,
    owns_lane: bool,
    max_qos: Qos,
    manual_ack: bool,
    limit: usize,
    /// It began with a replay.
    replays: bool,
    queue: Mutex<Queue>,
    /// Told when there is room again.
    room: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Message>,
    bytes: usize,
    reader: Option<Waker>,
    /// A lane waits for room.
    waited_for: bool,
    /// Set when no more will come; with the status if the broker refused.
    ended: Option<Option<Status>>,
    /// How far the replay has come that the subscription began with, by class.
    replayed: [Replayed; 3],
}

/// How far the replay of one class has come.
#[derive(Debug, Default)]
struct Replayed {
    /// When the latest message was published.
    upto: Option<SystemTime>,
    /// What came after the replay has begun to come.
    ended: bool,
}

/// What became of messages offered to a route.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Offered {
    pub(crate) delivered: u64,
    pub(crate) dropped: u64,
    /// Messages that came after the subscription had ended.
    pub(crate) unwanted: u64,
    /// The queue is more than half full: the reader should get a chance to run.
    pub(crate) crowded: bool,
}

impl Route {
    pub(crate) fn new(id: u32, target: &SubscribeTarget, options: &SubscribeOptions) -> Self {
        Self {
            id,
            filter: target.filter.clone(),
            owns_lane: options.own_lane
                || options.retain_as_published
                || options.datagrams
                || options.replay.is_some()
                || options.overflow != Overflow::Default
                || target.share.is_some(),
            max_qos: options.max_qos,
            manual_ack: options.manual_ack,
            limit: options.queue.max(1),
            replays: options.replay.is_some(),
            queue: Mutex::default(),
            room: Notify::new(),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn filter(&self) -> &TopicFilter {
        &self.filter
    }

    pub(crate) fn owns_lane(&self) -> bool {
        self.owns_lane
    }

    pub(crate) fn max_qos(&self) -> Qos {
        self.max_qos
    }

    /// Puts messages into the queue, in order, until a QoS 1 message finds no room; it and those
    /// after it stay in `batch`, and [`Self::room`] says when to offer them again.
    pub(crate) fn offer(&self, batch: &mut VecDeque<Message>) -> Offered {
        let mut offered = Offered::default();
        let reader = {
            let mut queue = lock(&self.queue);
            if queue.ended.is_some() {
                drop(queue);
                offered.unwanted = batch.len() as u64;
                discard(batch);
                return offered;
            }
            let was_empty = queue.messages.is_empty();
            while let Some(message) = batch.front() {
                let full = queue.messages.len() >= self.limit
                    || (queue.bytes >= QUEUE_BYTES && !queue.messages.is_empty());
                if full && (message.ticket.is_some() || message.published().is_some()) {
                    queue.waited_for = true;
                    break;
                }
                let message = batch.pop_front().expect("there is a front");
                if self.replays {
                    queue.replayed[message.class.index()].note(message.published());
                }
                if full {
                    offered.dropped += 1;
                    continue;
                }
                queue.bytes += message.payload.len() + MESSAGE_COST;
                queue.messages.push_back(message);
                offered.delivered += 1;
            }
            offered.crowded = queue.messages.len() > self.limit / 2;
            if was_empty && offered.delivered > 0 {
                queue.reader.take()
            } else {
                None
            }
        };
        if let Some(reader) = reader {
            reader.wake();
        }
        offered
    }

    /// What to ask for in place of `replay` when the broker has lost the session. Another replay begins
    /// with it.
    pub(crate) fn rest_of(&self, replay: wire::Replay) -> wire::Replay {
        let replayed = std::mem::take(&mut lock(&self.queue).replayed);
        let begun = || replayed.iter().filter(|class| class.upto.is_some());
        let upto = begun().filter_map(|class| class.upto).max();
        match upto {
            // Its end may not have come yet, and topic comes after topic, so times say nothing.
            _ if begun().any(|class| !class.ended) => replay,
            None => replay,
            Some(upto) => wire::Replay {
                last: 0,
                from_ms: replay.from_ms.max(Some(unix_ms(upto))),
                ..replay
            },
        }
    }

    /// Resolves when there is room again; ask before [`Self::offer`].
    pub(crate) fn room(&self) -> Notified<'_> {
        self.room.notified()
    }

    /// No more will come.
    pub(crate) fn end(&self, status: Option<Status>) {
        let mut queue = lock(&self.queue);
        if queue.ended.is_none() {
            queue.ended = Some(status);
        }
        let reader = queue.reader.take();
        drop(queue);
        self.room.notify_waiters();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Whether it has ended, and the status if the broker refused it.
    pub(crate) fn ended(&self) -> Option<Option<Status>> {
        lock(&self.queue).ended.clone()
    }

    /// Drops what waits, as taken.
    fn discard_queue(&self) {
        let mut messages = {
            let mut queue = lock(&self.queue);
            queue.bytes = 0;
            std::mem::take(&mut queue.messages)
        };
        discard(&mut messages);
    }

    /// Swaps everything that waits into `ready`, which is empty. `false` at the end.
    pub(crate) fn poll_take(
        &self,
        context: &mut Context<'_>,
        ready: &mut VecDeque<Message>,
    ) -> Poll<bool> {
        let mut queue = lock(&self.queue);
        if queue.messages.is_empty() {
            if queue.ended.is_some() {
                return Poll::Ready(false);
            }
            match &mut queue.reader {
                Some(reader) => reader.clone_from(context.waker()),
                none => *none = Some(context.waker().clone()),
            }
            return Poll::Pending;
        }
        std::mem::swap(&mut queue.messages, ready);
        queue.bytes = 0;
        let waited_for = std::mem::take(&mut queue.waited_for);
        drop(queue);
        if waited_for {
            self.room.notify_waiters();
        }
        Poll::Ready(true)
    }
}

impl Replayed {
    fn note(&mut self, published: Option<SystemTime>) {
        match published {
            Some(_) => self.upto = self.upto.max(published),
            None => self.ended = true,
        }
    }
}

/// Milliseconds since 1970.
fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Drops messages as taken.
fn discard(messages: &mut VecDeque<Message>) {
    for message in messages.drain(..) {
        if let Some(ticket) = message.ticket {
            ticket.redeem();
        }
    }
}
