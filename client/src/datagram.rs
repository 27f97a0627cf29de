//! Datagrams: QoS 0 messages that are worthless when late, in both directions.
//!
//! What is to be sent waits here and not in QUIC, since QUIC sends datagrams before everything on
//! streams: a long queue there would hold up the lanes, and drop without a word.

use std::collections::{HashSet, VecDeque};
use std::future::ready;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use quinn::SendDatagramError;
use selvedge_proto::datagram::DatagramRef;
use selvedge_proto::frame::FrameError;
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::topic::TopicName;
use tokio::sync::Notify;

use crate::client::Shared;
use crate::lane::Outgoing;
use crate::stats::{Counters, count};
use crate::subscription::{Message, Route};
use crate::sync::lock;

/// Bytes of received datagrams that wait to be read. A burst of a few thousand small messages fits;
/// beyond it QUIC drops the oldest without a word, as the network would.
pub(crate) const RECEIVE_BUFFER: usize = 512 * 1024;
/// Bytes of datagrams handed to QUIC and not yet sent: little more than one packet, so that each
/// packet after it has room for the lanes.
pub(crate) const SEND_BUFFER: usize = 2 * 1024;
/// Bytes of datagrams that wait to be sent: a tenth of a second at 10 Mbit/s. When there are more,
/// the oldest are dropped and counted, since they are worth the least.
const QUEUE_BYTES: usize = 128 * 1024;
/// What a waiting datagram takes besides its bytes, roughly.
const DATAGRAM_COST: usize = 32;
/// Datagrams read before their messages are handed over.
const BURST: usize = 64;
/// Topics remembered, so that each need not be checked again; all are forgotten when there are more.
const KNOWN_TOPICS: usize = 1024;

/// Datagrams on their way out.
#[derive(Debug)]
pub(crate) struct Datagrams {
    state: Mutex<State>,
    /// Told when there is something to send.
    wake: Notify,
    /// Told when everything was handed to QUIC.
    idle: Notify,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct State {
    /// The connection, while it is up.
    connection: Option<quinn::Connection>,
    queue: VecDeque<Bytes>,
    /// Cost of `queue`.
    bytes: usize,
    /// The writer is handing one over.
    sending: bool,
}

/// What became of a message on its way into a datagram.
pub(crate) enum Offer {
    /// It will be sent.
    Taken {
        /// Many wait: the publisher should let others run.
        crowded: bool,
    },
    /// It does not fit, or the broker takes no datagrams.
    Unfit(Outgoing<TopicName>),
    /// There is no connection, and it would be worthless on the next.
    Disconnected,
}

impl Datagrams {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self {
            state: Mutex::default(),
            wake: Notify::new(),
            idle: Notify::new(),
            counters,
        }
    }

    /// A connection is up.
    pub(crate) fn connected(&self, connection: quinn::Connection) {
        lock(&self.state).connection = Some(connection);
    }

    /// The connection is gone, and the writer with it. What waits is dropped.
    pub(crate) fn disconnected(&self) {
        let left = std::mem::take(&mut *lock(&self.state));
        let dropped = left.queue.len() as u64 + u64::from(left.sending);
        count(&self.counters.datagrams_dropped, dropped);
        self.idle.notify_waiters();
    }

    /// Offers a message.
    pub(crate) fn offer(&self, message: Outgoing<TopicName>) -> Offer {
        let datagram = DatagramRef {
            flags: message.flags,
            subscription: 0,
            topic: message.topic.as_str(),
            publisher: "",
            header: message.header.as_deref(),
            payload: &message.payload,
        };
        let connection = lock(&self.state).connection.clone();
        let Some(connection) = connection else {
            count(&self.counters.dropped_disconnected, 1);
            return Offer::Disconnected;
        };
        // Asked each time, since it changes with the path.
        let limit = connection.max_datagram_size().unwrap_or(0);
        if datagram.encoded_len() > limit {
            count(&self.counters.datagram_fallbacks, 1);
            return Offer::Unfit(message);
        }
        let crowded = self.push(datagram.encode());
        count(&self.counters.datagrams, 1);
        self.wake.notify_one();
        Offer::Taken { crowded }
    }

    /// Adds a datagram and drops the oldest that are too many. Whether many wait.
    fn push(&self, datagram: Bytes) -> bool {
        let mut state = lock(&self.state);
        state.bytes += cost(&datagram);
        state.queue.push_back(datagram);
        let mut dropped = 0;
        while state.bytes > QUEUE_BYTES
            && let Some(oldest) = state.queue.pop_front()
        {
            state.bytes -= cost(&oldest);
            dropped += 1;
        }
        count(&self.counters.datagrams_dropped, dropped);
        state.bytes > QUEUE_BYTES / 2
    }

    /// The oldest datagram; the one before it was handed over.
    fn take(&self) -> Option<Bytes> {
        let mut state = lock(&self.state);
        let datagram = state.queue.pop_front();
        state.sending = datagram.is_some();
        match &datagram {
            Some(datagram) => state.bytes -= cost(datagram),
            None => self.idle.notify_waiters(),
        }
        datagram
    }

    /// Waits until everything offered so far was handed to QUIC or dropped.
    pub(crate) async fn drained(&self) {
        loop {
            let idle = self.idle.notified();
            {
                let state = lock(&self.state);
                if state.queue.is_empty() && !state.sending {
                    return;
                }
            }
            idle.await;
        }
    }

    /// Hands datagrams to a connection as fast as the network takes them.
    pub(crate) async fn write(&self, connection: &quinn::Connection) -> Result<(), String> {
        loop {
            let Some(datagram) = self.take() else {
                self.wake.notified().await;
                continue;
            };
            match connection.send_datagram_wait(datagram).await {
                Ok(()) => {}
                Err(SendDatagramError::ConnectionLost(error)) => return Err(error.to_string()),
                // The path has shrunk since it was measured.
                Err(_) => count(&self.counters.datagrams_dropped, 1),
            }
        }
    }
}

fn cost(datagram: &Bytes) -> usize {
    datagram.len() + DATAGRAM_COST
}

/// Reads the broker's datagrams and hands their messages to the subscriptions that they are for.
pub(crate) async fn read(shared: Arc<Shared>, connection: quinn::Connection) -> Result<(), String> {
    let mut reader = Reader {
        shared,
        topics: HashSet::new(),
        publisher: Arc::from(""),
        batches: Vec::new(),
    };
    loop {
        let first = connection.read_datagram().await;
        let mut next = Some(first.map_err(|error| error.to_string())?);
        for _ in 0..BURST {
            let Some(datagram) = next.take() else {
                break;
            };
            reader.take(&datagram).map_err(|error| error.to_string())?;
            next = tokio::select! {
                biased;
                // The next first read says what is wrong.
                datagram = connection.read_datagram() => datagram.ok(),
                () = ready(()) => None,
            };
        }
        if let Some(datagram) = next {
            reader.take(&datagram).map_err(|error| error.to_string())?;
        }
        reader.deliver().await;
    }
}

struct Reader {
    shared: Arc<Shared>,
    /// Topics seen before.
    topics: HashSet<TopicName>,
    /// The publisher of the datagram before.
    publisher: Arc<str>,
    /// Messages not yet handed over, by subscription.
    batches: Vec<(Arc<Route>, VecDeque<Message>)>,
}

impl Reader {
    fn take(&mut self, datagram: &Bytes) -> Result<(), FrameError> {
        let Some(parsed) = DatagramRef::parse(datagram)? else {
            return Ok(());
        };
        let topic = self.topic(parsed.topic)?;
        let properties = match parsed.header {
            Some(header) => Some(Box::new(Properties::decode(header)?)),
            None => None,
        };
        let route = self.shared.control.owner(parsed.subscription);
        // A subscription that has gone, or that was made again with another filter.
        let Some(route) = route.filter(|route| route.filter().matches(&topic)) else {
            count(&self.shared.counters.unmatched, 1);
            return Ok(());
        };
        if *self.publisher != *parsed.publisher {
            self.publisher = parsed.publisher.into();
        }
        let message = Message {
            topic,
            publisher: self.publisher.clone(),
            payload: datagram.slice_ref(parsed.payload),
            qos: Qos::AtMostOnce,
            retain: parsed.flags.retain(),
            duplicate: false,
            class: Class::Normal,
            properties,
            ticket: None,
            receipt: None,
        };
        let known = self.batches.iter_mut();
        match known.into_iter().find(|(of, _)| Arc::ptr_eq(of, &route)) {
            Some((_, batch)) => batch.push_back(message),
            None => self.batches.push((route, VecDeque::from([message]))),
        }
        Ok(())
    }

    fn topic(&mut self, name: &str) -> Result<TopicName, FrameError> {
        if let Some(topic) = self.topics.get(name) {
            return Ok(topic.clone());
        }
        let topic = TopicName::parse(name).map_err(|error| FrameError::Malformed {
            what: "datagram",
            reason: error.to_string(),
        })?;
        if self.topics.len() >= KNOWN_TOPICS {
            self.topics.clear();
        }
        self.topics.insert(topic.clone());
        Ok(topic)
    }

    async fn deliver(&mut self) {
        let counters = &self.shared.counters;
        let mut crowded = false;
        for (route, mut batch) in self.batches.drain(..) {
            let offered = route.offer(&mut batch);
            count(&counters.delivered, offered.delivered);
            count(&counters.dropped_slow, offered.dropped);
            count(&counters.unmatched, offered.unwanted);
            crowded |= offered.crowded;
        }
        if crowded {
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagrams() -> Datagrams {
        Datagrams::new(Arc::default())
    }

    fn dropped(datagrams: &Datagrams) -> u64 {
        datagrams.counters.snapshot(0).datagrams_dropped
    }

    #[test]
    fn the_oldest_are_dropped_and_counted() {
        let datagrams = datagrams();
        let size = 1000;
        let fit = QUEUE_BYTES / (size + DATAGRAM_COST);
        for number in 0..fit + 3 {
            let crowded = datagrams.push(vec![number as u8; size].into());
            assert_eq!(
                crowded,
                (number + 1) * (size + DATAGRAM_COST) > QUEUE_BYTES / 2
            );
        }
        assert_eq!(dropped(&datagrams), 3);
        for number in 3..fit + 3 {
            assert_eq!(datagrams.take(), Some(vec![number as u8; size].into()));
        }
        assert_eq!(datagrams.take(), None);
        assert_eq!(lock(&datagrams.state).bytes, 0);
    }

    #[test]
    fn what_waits_is_lost_with_the_connection() {
        let datagrams = datagrams();
        for _ in 0..3 {
            datagrams.push(Bytes::from_static(b"x"));
        }
        assert!(datagrams.take().is_some());
        datagrams.disconnected();
        assert_eq!((dropped(&datagrams), datagrams.take()), (3, None));
    }

    #[tokio::test]
    async fn drained_is_when_the_last_was_handed_over() {
        let datagrams = datagrams();
        datagrams.drained().await;
        datagrams.push(Bytes::from_static(b"x"));
        assert!(datagrams.take().is_some());
        let mut drained = std::pin::pin!(datagrams.drained());
        let waits = std::future::poll_fn(|context| {
            std::task::Poll::Ready(drained.as_mut().poll(context).is_pending())
        });
        assert!(waits.await);
        assert!(datagrams.take().is_none());
        drained.await;
    }
}
