//! Delivery lanes: from the broker's streams to the queues of the subscriptions.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use quinn::RecvStream;
use selvedge_proto::frame::{self, Frame, FrameDecoder, FrameError, Kind};
use selvedge_proto::lane::MessageFrame;
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::ack::{LaneAcks, PendingAcks};
use crate::client::Shared;
use crate::framed::{FramedError, FramedReader};
use crate::stats::count;
use crate::subscription::{Message, Route};

/// Chunks taken from QUIC at once: about as many packets as a socket read brings.
const CHUNKS: usize = 32;
/// Aliases up to this number are looked up by index, the others by hash.
const INDEXED: usize = 4096;
/// Messages of a kept session that may wait for the application to subscribe again. Beyond it
/// QoS 0 messages are dropped and counted, and QoS 1 messages make the lane wait.
const PARKED: usize = 4096;

/// Why a delivery lane cannot be read further; the connection is closed with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeliveryError {
    #[error("{0}")]
    Read(#[from] FramedError),
    #[error("delivery lane: {0}")]
    Frame(#[from] FrameError),
    #[error("delivery lane without a lane header")]
    NoHeader,
    #[error("message under alias {0}, which is not bound")]
    Unbound(u32),
    #[error("alias {0} bound to something that is no topic: {1}")]
    Topic(u32, String),
}

/// Accepts the broker's lanes on one connection, and reads each in a task of its own.
pub(crate) async fn accept(
    shared: Arc<Shared>,
    connection: quinn::Connection,
    pending: Arc<PendingAcks>,
) -> Result<(), String> {
    // Aborted together with this task. Bounded by the streams that the broker may open.
    let mut lanes = JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.accept_uni() => {
                let stream = stream.map_err(|error| error.to_string())?;
                let shared = shared.clone();
                let pending = pending.clone();
                lanes.spawn(async move { read(shared, stream, pending).await });
            }
            Some(ended) = lanes.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(error.to_string()),
                Err(error) => return Err(format!("reading a delivery lane: {error}")),
            },
        }
    }
}

async fn read(
    shared: Arc<Shared>,
    stream: RecvStream,
    pending: Arc<PendingAcks>,
) -> Result<(), DeliveryError> {
    let mut framed = FramedReader::new(stream, shared.settings.max_frame_bytes);
    let header: wire::LaneHeader = match framed.next().await {
        Ok(Some(frame)) if frame.kind == Kind::LANE => frame::decode("lane header", frame.body)?,
        Ok(None) => return Ok(()),
        Ok(Some(_)) => return Err(DeliveryError::NoHeader),
        Err(FramedError::Read(quinn::ReadError::Reset(_))) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let (mut stream, decoder) = framed.into_parts();
    let mut generation = shared.control.generation();
    let mut reader = LaneReader {
        owner: header.subscription,
        class: header.class().into(),
        acks: Arc::new(LaneAcks::new(header.lane, pending)),
        aliases: Aliases::default(),
        publisher: Arc::from(""),
        generation: *generation.borrow_and_update(),
        batches: Vec::new(),
        parked: VecDeque::new(),
        shared,
        decoder,
    };
    reader.decode()?;
    reader.deliver().await;
    let mut chunks = [const { Bytes::new() }; CHUNKS];
    loop {
        // Messages that nobody wants yet wait for a subscription, for a while.
        let parked_until = (!reader.parked.is_empty())
            .then(|| reader.shared.control.inherited_until())
            .flatten();
        tokio::select! {
            _ = generation.changed(), if parked_until.is_some() => {}
            () = until(parked_until), if parked_until.is_some() => {}
            count = stream.read_chunks(&mut chunks), if reader.parked.len() < PARKED => {
                let count = match count {
                    Ok(Some(count)) => count,
                    // The broker ended the lane: its subscription is gone, or the session.
                    Ok(None) | Err(quinn::ReadError::Reset(_)) => return Ok(()),
                    Err(error) => return Err(FramedError::Read(error).into()),
                };
                reader.refresh(&mut generation);
                for chunk in &mut chunks[..count] {
                    reader.decoder.push(std::mem::take(chunk));
                    reader.decode()?;
                }
                reader.deliver().await;
                continue;
            }
        }
        reader.refresh(&mut generation);
        reader.unpark();
        reader.deliver().await;
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// One delivery lane while it is read.
struct LaneReader {
    shared: Arc<Shared>,
    decoder: FrameDecoder,
    /// Id of the subscription that owns the lane, or zero.
    owner: u32,
    class: Class,
    acks: Arc<LaneAcks>,
    aliases: Aliases,
    /// The publisher bound last: most lanes carry few of them.
    publisher: Arc<str>,
    /// The subscriptions that the routes in `aliases` were found among.
    generation: u64,
    /// Messages decoded and not yet handed over, by subscription.
    batches: Vec<(Arc<Route>, VecDeque<Message>)>,
    /// Messages of a kept session that no subscription wants yet.
    parked: VecDeque<Message>,
}

/// What an alias stands for.
struct Bound {
    topic: TopicName,
    publisher: Arc<str>,
    /// The subscriptions that want it.
    routes: Vec<Arc<Route>>,
    /// The subscriptions that `routes` were found among.
    generation: u64,
}

impl LaneReader {
    /// Takes note of changed subscriptions.
    fn refresh(&mut self, generation: &mut watch::Receiver<u64>) {
        let now = *generation.borrow_and_update();
        if now != self.generation {
            self.generation = now;
            // A message that was parked goes before those that come now.
            self.unpark();
        }
    }

    /// Decodes every whole frame there is.
    fn decode(&mut self) -> Result<(), DeliveryError> {
        while let Some(frame) = self.decoder.next_frame()? {
            match frame.kind {
                Kind::MESSAGE => self.message(&frame)?,
                Kind::BIND => self.bind(frame)?,
                Kind::UNBIND => self.aliases = Aliases::default(),
                // Kinds of a later revision.
                _ => {}
            }
        }
        Ok(())
    }

    fn bind(&mut self, frame: Frame) -> Result<(), DeliveryError> {
        let bind: wire::Bind = frame::decode("bind", frame.body)?;
        let topic = TopicName::parse(bind.topic)
            .map_err(|error| DeliveryError::Topic(bind.alias, error.to_string()))?;
        if *self.publisher != *bind.publisher {
            self.publisher = bind.publisher.into();
        }
        let bound = Bound {
            routes: self.routes(&topic),
            topic,
            publisher: self.publisher.clone(),
            generation: self.generation,
        };
        self.aliases.insert(bind.alias, bound);
        Ok(())
    }

    fn routes(&self, topic: &TopicName) -> Vec<Arc<Route>> {
        if self.owner == 0 {
            return self.shared.control.matching(topic);
        }
        let owner = self.shared.control.owner(self.owner);
        owner
            .into_iter()
            .filter(|route| route.filter().matches(topic))
            .collect()
    }

    fn message(&mut self, frame: &Frame) -> Result<(), DeliveryError> {
        let parsed = MessageFrame::parse(&frame.body)?;
        let stale = match self.aliases.get(parsed.alias) {
            Some(bound) => bound.generation != self.generation,
            None => return Err(DeliveryError::Unbound(parsed.alias)),
        };
        if stale {
            let topic = self
                .aliases
                .get(parsed.alias)
                .map(|bound| bound.topic.clone());
            let routes = topic.map(|topic| self.routes(&topic)).unwrap_or_default();
            if let Some(bound) = self.aliases.get_mut(parsed.alias) {
                bound.routes = routes;
                bound.generation = self.generation;
            }
        }
        let Some(bound) = self.aliases.get(parsed.alias) else {
            return Err(DeliveryError::Unbound(parsed.alias));
        };
        let properties = match &parsed.header {
            Some(header) => Some(Box::new(Properties::decode(header)?)),
            None => None,
        };
        let mut message = Message {
            topic: bound.topic.clone(),
            publisher: bound.publisher.clone(),
            payload: parsed.payload,
            qos: parsed.flags.qos()?,
            retain: parsed.flags.retain(),
            duplicate: parsed.flags.duplicate(),
            class: self.class,
            properties,
            ticket: None,
            receipt: None,
        };
        let acknowledged = message.qos != Qos::AtMostOnce;
        if bound.routes.is_empty() {
            let parks = self.shared.control.inherited_until();
            if parks.is_some_and(|until| Instant::now() < until)
                && (acknowledged || self.parked.len() < PARKED)
            {
                message.ticket = acknowledged.then(|| self.acks.receive(1)).flatten();
                self.parked.push_back(message);
            } else {
                count(&self.shared.counters.unmatched, 1);
                if acknowledged {
                    self.acks.receive(0);
                }
            }
            return Ok(());
        }
        if acknowledged {
            message.ticket = self.acks.receive(bound.routes.len());
        }
        batch(&mut self.batches, &bound.routes, message);
        Ok(())
    }

    /// Offers parked messages to the subscriptions of now, and gives them up when it is time.
    fn unpark(&mut self) {
        let expired = self
            .shared
            .control
            .inherited_until()
            .is_none_or(|until| Instant::now() >= until);
        for message in std::mem::take(&mut self.parked) {
            let routes = self.routes(&message.topic);
            if !routes.is_empty() {
                // Found by the first subscription that wants it: one ticket, one taker.
                batch(&mut self.batches, &routes[..1], message);
            } else if expired {
                count(&self.shared.counters.unmatched, 1);
                if let Some(ticket) = message.ticket {
                    ticket.redeem();
                }
            } else {
                self.parked.push_back(message);
            }
        }
    }

    /// Hands the decoded messages over, and waits where a QoS 1 message finds no room.
    async fn deliver(&mut self) {
        let counters = &self.shared.counters;
        let mut crowded = false;
        for (route, batch) in &mut self.batches {
            while !batch.is_empty() {
                let room = route.room();
                let offered = route.offer(batch);
                count(&counters.delivered, offered.delivered);
                if offered.dropped + offered.unwanted > 0 {
                    count(&counters.dropped_slow, offered.dropped);
                    count(&counters.unmatched, offered.unwanted);
                }
                crowded |= offered.crowded;
                if !batch.is_empty() {
                    room.await;
                }
            }
        }
        // Routes of subscriptions long gone are not to be kept.
        self.batches.truncate(16);
        if crowded {
            tokio::task::yield_now().await;
        }
    }
}

/// Adds a message to the batch of each subscription that wants it.
fn batch(
    batches: &mut Vec<(Arc<Route>, VecDeque<Message>)>,
    routes: &[Arc<Route>],
    message: Message,
) {
    let Some((last, others)) = routes.split_last() else {
        return;
    };
    for route in others {
        push(
            batches,
            route,
            Message {
                topic: message.topic.clone(),
                publisher: message.publisher.clone(),
                payload: message.payload.clone(),
                properties: message.properties.clone(),
                ticket: message.ticket.clone(),
                receipt: None,
                ..message
            },
        );
    }
    push(batches, last, message);
}

fn push(
    batches: &mut Vec<(Arc<Route>, VecDeque<Message>)>,
    route: &Arc<Route>,
    mut message: Message,
) {
    message.qos = message.qos.min(route.max_qos());
    let index = match batches.iter().position(|(of, _)| Arc::ptr_eq(of, route)) {
        Some(index) => index,
        None => {
            batches.push((route.clone(), VecDeque::new()));
            batches.len() - 1
        }
    };
    batches[index].1.push_back(message);
}

/// The aliases that the broker has bound on a lane.
#[derive(Default)]
struct Aliases {
    indexed: Vec<Option<Bound>>,
    others: HashMap<u32, Bound>,
}

impl Aliases {
    fn insert(&mut self, alias: u32, bound: Bound) {
        let index = alias as usize;
        if index < INDEXED {
            if self.indexed.len() <= index {
                self.indexed.resize_with(index + 1, || None);
            }
            self.indexed[index] = Some(bound);
        } else {
            self.others.insert(alias, bound);
        }
    }

    #[inline]
    fn get(&self, alias: u32) -> Option<&Bound> {
        if (alias as usize) < INDEXED {
            self.indexed.get(alias as usize)?.as_ref()
        } else {
            self.others.get(&alias)
        }
    }

    fn get_mut(&mut self, alias: u32) -> Option<&mut Bound> {
        if (alias as usize) < INDEXED {
            self.indexed.get_mut(alias as usize)?.as_mut()
        } else {
            self.others.get_mut(&alias)
        }
    }
}

#[cfg(test)]
mod tests;
