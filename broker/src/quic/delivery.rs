//! Delivery lanes: writes what waits in a queue, as much at once as there is.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quinn::{SendStream, WriteError};
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::lane::Flags;
use selvedge_proto::wire;

use super::datagram::DatagramDelivery;
use crate::batch::{Batch, Flow};
use crate::clock;
use crate::fabric::Fabric;
use crate::queue::{DeliveryQueue, Entry};

/// Bytes taken from the queue for one write.
const BUDGET: usize = 256 * 1024;

/// The same where messages go in datagrams: what was taken is beyond the reach of the queue's policy,
/// and old by the time that it is sent.
const DATAGRAM_BUDGET: usize = 8 * 1024;

/// Pieces below this size are copied together, since each piece costs the transport more than the
/// copy does.
const SMALL: usize = 1024;

/// Announcements after which a lane forgets them all, which bounds both ends' tables.
const MAX_BINDINGS: usize = 65_536;

/// The same while a backlog is sent: it names each topic once or has named it a moment ago, so there is
/// little to remember.
const MAX_BINDINGS_OWED: usize = 2_048;

/// One delivery lane.
pub(super) struct Delivery {
    queue: Arc<DeliveryQueue>,
    fabric: Arc<Fabric>,
    /// Number of the connection within its session.
    epoch: u64,
    /// The subscription that owns the lane wants the retain flag as published.
    retain_as_published: bool,
    /// The subscription that owns the lane wants datagrams.
    datagrams: Option<DatagramDelivery>,
    lane: u32,
    /// Flows announced on this lane, by id. Kept alive so that an id cannot mean another.
    bound: HashMap<u32, Arc<Flow>>,
    last: Option<Arc<Flow>>,
}

impl Delivery {
    pub(super) fn new(
        queue: Arc<DeliveryQueue>,
        fabric: Arc<Fabric>,
        epoch: u64,
        retain_as_published: bool,
        datagrams: Option<DatagramDelivery>,
        lane: u32,
    ) -> Self {
        Self {
            queue,
            fabric,
            epoch,
            retain_as_published,
            datagrams,
            lane,
            bound: HashMap::new(),
            last: None,
        }
    }

    /// Writes until the queue closes or the stream ends.
    pub(super) async fn run(mut self, mut stream: SendStream) -> Result<(), WriteError> {
        let _ = stream.set_priority(self.queue.class.priority());
        let header = wire::LaneHeader {
            lane: self.lane,
            class: wire::Class::from(self.queue.class) as i32,
            subscription: self.queue.subscription,
        };
        stream
            .write_chunk(frame::encode(Kind::LANE, &header))
            .await?;
        let mut chunks = Vec::new();
        let budget = match self.datagrams {
            Some(_) => DATAGRAM_BUDGET,
            None => BUDGET,
        };
        // Bytes of backlog that may be sent with the next take.
        let mut granted = 0;
        let mut turn = self.fabric.pacer.turn();
        loop {
            if !self.queue.has_window(self.fabric.limits.inflight_bytes) {
                self.queue.woken().await;
                continue;
            }
            let owed = std::mem::take(&mut granted);
            let mut taken = self.queue.take(self.epoch, budget, owed, clock::now());
            if taken.stale {
                return Ok(());
            }
            if !taken.entries.is_empty() {
                // A backlog does not lose its worth, so what may be of one goes on the lane.
                if let Some(datagrams) = self.datagrams.as_ref().filter(|_| owed == 0) {
                    let sent = datagrams.send(&mut taken.entries).await?;
                    self.fabric.metrics.messages_out.inc_by(sent.messages);
                    self.fabric.metrics.bytes_out.inc_by(sent.bytes);
                }
                self.encode(&taken.entries, owed > 0, &mut chunks);
                turn.done();
                stream.write_all_chunks(&mut chunks).await?;
                chunks.clear();
                continue;
            }
            if self.queue.is_closed() {
                let _ = stream.finish();
                return Ok(());
            }
            if taken.owes {
                // What is published meanwhile goes first.
                tokio::select! {
                    biased;
                    () = self.queue.woken() => {}
                    bytes = turn.granted() => granted = bytes,
                }
            } else {
                self.queue.woken().await;
            }
        }
    }

    fn encode(&mut self, entries: &[Entry], owed: bool, chunks: &mut Vec<Bytes>) {
        let mut small = BytesMut::with_capacity(self.copied(entries));
        let most = if owed {
            MAX_BINDINGS_OWED
        } else {
            MAX_BINDINGS
        };
        let mut messages = 0u64;
        let mut bytes = 0u64;
        for entry in entries {
            let batch = &entry.batch;
            messages += u64::from(batch.count);
            bytes += (batch.frames.len() + batch.payload.len()) as u64;
            self.bind(&batch.flow, most, &mut small);
            let as_published = self.retain_as_published && batch.retain_as_published;
            if entry.duplicate || as_published {
                let flags = Flags::new(batch.qos)
                    .with_duplicate(entry.duplicate)
                    .with_retain(batch.retain || as_published);
                batch.put(&mut small, flags);
                continue;
            }
            for piece in [&batch.frames, &batch.payload] {
                if piece.len() < SMALL {
                    small.extend_from_slice(piece);
                } else {
                    if !small.is_empty() {
                        chunks.push(small.split().freeze());
                    }
                    chunks.push(piece.clone());
                }
            }
        }
        if !small.is_empty() {
            chunks.push(small.freeze());
        }
        self.fabric.metrics.messages_out.inc_by(messages);
        self.fabric.metrics.bytes_out.inc_by(bytes);
    }

    /// About how many bytes [`Self::encode`] copies together.
    fn copied(&self, entries: &[Entry]) -> usize {
        let mut last = self.last.as_ref();
        let mut bytes = 0;
        for entry in entries {
            let Batch {
                flow,
                frames,
                payload,
                ..
            } = &*entry.batch;
            if !last.is_some_and(|last| Arc::ptr_eq(last, flow)) {
                bytes += flow.bind.len();
                last = Some(flow);
            }
            for piece in [frames, payload] {
                if piece.len() < SMALL {
                    bytes += piece.len();
                }
            }
        }
        bytes
    }

    /// Announces a flow unless the lane knows it.
    fn bind(&mut self, flow: &Arc<Flow>, most: usize, small: &mut BytesMut) {
        if self
            .last
            .as_ref()
            .is_some_and(|last| Arc::ptr_eq(last, flow))
        {
            return;
        }
        self.last = Some(Arc::clone(flow));
        if self
            .bound
            .get(&flow.id)
            .is_some_and(|held| Arc::ptr_eq(held, flow))
        {
            return;
        }
        if self.bound.len() >= most {
            self.bound.clear();
            frame::put_head(small, Kind::UNBIND, 0);
        }
        small.extend_from_slice(&flow.bind);
        self.bound.insert(flow.id, Arc::clone(flow));
    }
}
