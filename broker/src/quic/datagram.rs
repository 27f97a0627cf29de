//! Datagrams: QoS 0 messages that are worthless when late, from publishers and to subscribers.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use quinn::{Connection, ConnectionError, ReadError, SendDatagramError};
use selvedge_proto::datagram::DatagramRef;
use selvedge_proto::frame::FrameError;
use selvedge_proto::lane::Flags;
use selvedge_proto::message::{Class, Durability, Qos};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

use super::connection::ControlSender;
use super::ingest::{IngestError, refuse_unnumbered};
use crate::publisher::{Incoming, Payload, Publisher, Topic};
use crate::queue::Entry;

/// Bytes of received datagrams that wait to be read. A burst of a few thousand small messages fits;
/// beyond it QUIC drops the oldest without a word, as the network would.
pub(super) const RECEIVE_BUFFER: usize = 512 * 1024;

/// Bytes of datagrams handed to QUIC and not yet sent: little more than one packet. QUIC sends
/// datagrams before everything on streams, so a larger buffer that is always full would leave the
/// lanes nothing. What waits, waits in the subscription's queue, whose policy and counters say what
/// is dropped.
pub(super) const SEND_BUFFER: usize = 2 * 1024;

/// Datagrams taken before the receivers' queues get them.
const BURST: usize = 64;

/// Topics kept open for the datagrams of one connection; all are closed when there are more.
const OPEN_TOPICS: usize = 1024;

/// The datagrams that one client publishes.
pub(super) struct DatagramIngest {
    connection: Connection,
    publisher: Publisher,
    control: ControlSender,
    topics: Vec<Topic>,
    /// Places in `topics`.
    open: HashMap<TopicName, usize>,
    /// Places of topics with messages taken since the last flush.
    dirty: Vec<usize>,
    refused: Vec<wire::PublishRefused>,
}

impl DatagramIngest {
    pub(super) fn new(
        connection: Connection,
        publisher: Publisher,
        control: ControlSender,
    ) -> Self {
        Self {
            connection,
            publisher,
            control,
            topics: Vec::new(),
            open: HashMap::new(),
            dirty: Vec::new(),
            refused: Vec::new(),
        }
    }

    /// Takes datagrams, of which `first` came first, until the connection ends.
    pub(super) async fn run(mut self, mut first: Bytes) -> Result<(), IngestError> {
        loop {
            self.burst(first).await?;
            first = self.connection.read_datagram().await.map_err(lost)?;
        }
    }

    /// Takes what has arrived already, for a client that leaves in good order.
    pub(super) async fn drain(mut self) -> Result<(), IngestError> {
        while let Some(first) = self.connection.read_datagram().now_or_never() {
            self.burst(first.map_err(lost)?).await?;
        }
        Ok(())
    }

    /// Takes a datagram and those that came with it.
    async fn burst(&mut self, first: Bytes) -> Result<(), IngestError> {
        let mut taken = self.take(&first);
        for _ in 1..BURST {
            if taken.is_err() {
                break;
            }
            match self.connection.read_datagram().now_or_never() {
                Some(Ok(datagram)) => taken = self.take(&datagram),
                // The next read says so again.
                Some(Err(_)) | None => break,
            }
        }
        self.flush();
        for refused in std::mem::take(&mut self.refused) {
            self.control
                .send(Box::new(wire::control::Frame::PublishRefused(refused)))
                .await
                .map_err(|_| IngestError::Closed)?;
        }
        Ok(taken?)
    }

    fn take(&mut self, datagram: &[u8]) -> Result<(), FrameError> {
        let Some(message) = DatagramRef::parse(datagram)? else {
            return Ok(());
        };
        let place = self.topic(message.topic)?;
        let incoming = Incoming {
            qos: Qos::AtMostOnce,
            retain: message.flags.retain(),
            durability: Durability::Default,
            duplicate: false,
            header: message.header,
            payload: Payload::Borrowed(message.payload),
        };
        let topic = &mut self.topics[place];
        match self.publisher.publish(topic, &incoming) {
            Ok(()) => {
                if self.dirty.last() != Some(&place) {
                    self.dirty.push(place);
                }
            }
            Err(status) => refuse_unnumbered(&mut self.refused, topic.name(), status),
        }
        Ok(())
    }

    /// The place of a topic, opened if it is not.
    fn topic(&mut self, name: &str) -> Result<usize, FrameError> {
        if let Some(&place) = self.open.get(name) {
            return Ok(place);
        }
        let name = TopicName::parse(name).map_err(|error| FrameError::Malformed {
            what: "datagram",
            reason: error.to_string(),
        })?;
        if self.topics.len() >= OPEN_TOPICS {
            self.flush();
            self.topics.clear();
            self.open.clear();
        }
        let place = self.topics.len();
        self.topics
            .push(self.publisher.open(name.clone(), Class::Normal));
        self.open.insert(name, place);
        Ok(place)
    }

    fn flush(&mut self) {
        for place in self.dirty.drain(..) {
            if let Some(topic) = self.topics.get_mut(place) {
                self.publisher.flush(topic);
                // Nobody is told what became of QoS 0.
                topic.take_outcome();
            }
        }
    }
}

/// The datagrams of one subscription.
pub(super) struct DatagramDelivery {
    connection: Connection,
    subscription: u32,
    /// The subscription wants the retain flag as published.
    retain_as_published: bool,
}

/// What went in datagrams.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

impl DatagramDelivery {
    pub(super) fn new(
        connection: Connection,
        subscription: u32,
        retain_as_published: bool,
    ) -> Self {
        Self {
            connection,
            subscription,
            retain_as_published,
        }
    }

    /// Sends what can go in datagrams, no faster than the network takes it; the rest stays in
    /// `entries`, for the lane.
    pub(super) async fn send(&self, entries: &mut Vec<Entry>) -> Result<Sent, ConnectionError> {
        let mut sent = Sent::default();
        let mut rest = Vec::new();
        for entry in entries.drain(..) {
            let batch = &entry.batch;
            if batch.qos != Qos::AtMostOnce || batch.retain || entry.duplicate {
                rest.push(entry);
                continue;
            }
            let retain = self.retain_as_published && batch.retain_as_published;
            let mut left = Vec::new();
            for (index, message) in batch.messages().enumerate() {
                let datagram = DatagramRef {
                    flags: Flags::new(Qos::AtMostOnce).with_retain(retain),
                    subscription: self.subscription,
                    topic: batch.flow.topic.as_str(),
                    publisher: batch.flow.publisher.uri(),
                    header: message.header.as_deref(),
                    payload: &message.payload,
                };
                // Asked each time, since it changes with the path.
                let limit = self.connection.max_datagram_size().unwrap_or(0);
                let length = datagram.encoded_len();
                if length > limit {
                    left.push(index);
                    continue;
                }
                match self.connection.send_datagram_wait(datagram.encode()).await {
                    Ok(()) => {
                        sent.messages += 1;
                        sent.bytes += length as u64;
                    }
                    Err(SendDatagramError::ConnectionLost(error)) => return Err(error),
                    // The path has shrunk meanwhile.
                    Err(_) => left.push(index),
                }
            }
            if left.len() == batch.count as usize {
                rest.push(entry);
            } else if !left.is_empty() {
                let singles = batch.singles().enumerate();
                rest.extend(singles.filter(|(index, _)| left.contains(index)).map(
                    |(_, single)| Entry {
                        batch: Arc::new(single),
                        duplicate: false,
                        stored: None,
                        sent_as: None,
                    },
                ));
            }
        }
        *entries = rest;
        Ok(sent)
    }
}

fn lost(error: ConnectionError) -> IngestError {
    IngestError::Read(ReadError::ConnectionLost(error))
}
