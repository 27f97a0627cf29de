//! The receiving side of one MQTT connection: from its queues to packets, and acknowledgements back.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Buf as _;
use selvedge_proto::message::Qos;

use crate::batch::{Batch, BatchMessage, Flow};
use crate::clock;
use crate::losses::{Losses, Reason};
use crate::metrics::Metrics;
use crate::mqtt::inflight::{Numbers, PacketIds};
use crate::mqtt::output::{Outgoing, Output};
use crate::mqtt::packet::Version;
use crate::queue::DeliveryQueue;
use crate::router::is_receiver;
use crate::session::Session;

/// QoS 1 messages sent and not acknowledged, at most; a client may ask for fewer. Enough for ten
/// thousand messages a second over a round trip of 100 ms.
const MAX_IN_FLIGHT: u16 = 1024;

/// Bytes waiting for the socket beyond which no more messages are taken from the queues. What
/// waits there is dropped by their rules; what waits here is not.
pub(crate) const HIGH_WATER: usize = 256 * 1024;

/// Bytes taken from a queue at once.
const TAKE: usize = 64 * 1024;

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
    /// Lane and number of the message behind each packet id.
    ids: PacketIds<(usize, u64)>,
    /// Lanes with acknowledgements that their queue has not heard of.
    acknowledged: Vec<usize>,
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
    messages: std::vec::IntoIter<BatchMessage>,
}

/// How the session's subscriptions see a flow.
#[derive(Debug)]
struct View {
    flow: Arc<Flow>,
    identifiers: Vec<u32>,
    retain_as_published: bool,
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
    ) -> Self {
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
            ids: PacketIds::new(receive_maximum.min(MAX_IN_FLIGHT)),
            acknowledged: Vec::new(),
            views: HashMap::new(),
        }
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
        for class in 0..self.ready.len() {
            while let Some(key) = self.ready[class].pop_front() {
                match self.drain(key, now, output, metrics, losses) {
                    Stop::Drained => {}
                    Stop::Window => self.blocked[class].push_back(key),
                    Stop::Output => {
                        self.ready[class].push_back(key);
                        return;
                    }
                }
            }
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

    /// Notes that the client has a message. Ids that stand for nothing are not an error: they may
    /// be left from before the session was resumed.
    pub(crate) fn acknowledge(&mut self, packet_id: u16) {
        let Some((key, number)) = self.ids.remove(packet_id) else {
            return;
        };
        if let Some(lane) = self.lanes.get_mut(&key)
            && let Some(upto) = lane.numbers.acknowledge(number)
        {
            lane.upto = upto;
            if self.acknowledged.last() != Some(&key) {
                self.acknowledged.push(key);
            }
        }
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
        now: Instant,
        output: &mut Output,
        metrics: &Metrics,
        losses: &Losses,
    ) -> Stop {
        let Some(lane) = self.lanes.get_mut(&key) else {
            return Stop::Drained;
        };
        loop {
            let Some(waiting) = lane.waiting.front_mut() else {
                if output.remaining() >= HIGH_WATER {
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
            );
            let expiry = batch
                .expires
                .map(|expires| expires.saturating_duration_since(now));
            let expired = expiry.is_some_and(|left| left.is_zero());
            let before = output.remaining();
            let mut sent = 0;
            let mut stopped = None;
            while !waiting.messages.as_slice().is_empty() {
                if output.remaining() >= HIGH_WATER {
                    stopped = Some(Stop::Output);
                    break;
                }
                let mut packet_id = 0;
                let mut number = None;
                if batch.qos != Qos::AtMostOnce {
                    if self.ids.is_full() {
                        stopped = Some(Stop::Window);
                        break;
                    }
                    let issued = lane.numbers.issue();
                    packet_id = self.ids.insert((key, issued)).unwrap_or_default();
                    number = Some(issued);
                }
                let Some(message) = waiting.messages.next() else {
                    break;
                };
                let receiver = Some(&self.session.key);
                let written = if expired {
                    losses.lose(Reason::Expired, receiver, batch, 1);
                    false
                } else {
                    let outgoing = Outgoing {
                        topic: batch.flow.topic.as_str(),
                        packet_id,
                        qos: batch.qos,
                        duplicate: waiting.duplicate && batch.qos != Qos::AtMostOnce,
                        retain: batch.retain
                            || (view.retain_as_published && batch.retain_as_published),
                        header: message.header.as_deref(),
                        expiry,
                        subscription_ids: &view.identifiers,
                        payload: &message.payload,
                    };
                    let written = output.publish(self.version, &outgoing, self.limit).is_ok();
                    if !written {
                        losses.lose(Reason::TooLarge, receiver, batch, 1);
                    }
                    written
                };
                if written {
                    sent += 1;
                } else if let Some(number) = number {
                    // Given up, which for the queue is as good as delivered.
                    self.ids.remove(packet_id);
                    if let Some(upto) = lane.numbers.acknowledge(number) {
                        lane.upto = upto;
                        lane.queue.acknowledge(self.epoch, upto);
                    }
                }
            }
            metrics.messages_out.inc_by(sent);
            metrics
                .bytes_out
                .inc_by((output.remaining() - before) as u64);
            match stopped {
                Some(stop) => return stop,
                None => {
                    lane.waiting.pop_front();
                }
            }
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
