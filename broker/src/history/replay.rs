//! What a replay has yet to send, encoded again piece by piece.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use prost::Message as _;
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::message::Qos;
use selvedge_proto::wire;

use super::Kept;
use crate::backlog::{Backlog, Chunk};
use crate::batch::Batch;
use crate::clock;
use crate::publisher::LARGE;
use crate::store::unix_ms;

/// Batches are closed at this size.
const BATCH: usize = 64 * 1024;

/// A batch of the history to be sent, without its first messages.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) kept: Arc<Kept>,
    pub(super) skip: usize,
}

pub(super) type Items = Mutex<VecDeque<Item>>;

/// Messages of the history that a subscription of one class is owed before anything live.
#[derive(Debug)]
pub struct ReplayBacklog {
    items: Arc<Items>,
    max_qos: Qos,
}

impl Item {
    /// Messages of it that are to be sent.
    pub(super) fn count(&self) -> u64 {
        u64::from(self.kept.batch.count) - self.skip as u64
    }
}

impl ReplayBacklog {
    pub(super) fn new(items: VecDeque<Item>, max_qos: Qos) -> Self {
        Self {
            items: Arc::new(Mutex::new(items)),
            max_qos,
        }
    }

    /// What is left, as long as there is anybody to send it to.
    pub(super) fn items(&self) -> Weak<Items> {
        Arc::downgrade(&self.items)
    }
}

impl Backlog for ReplayBacklog {
    fn next(&mut self, budget: usize) -> Chunk {
        let now = clock::now();
        let mut packer = Packer::new(self.max_qos);
        let mut items = self.items.lock();
        while packer.bytes < budget
            && let Some(item) = items.pop_front()
        {
            packer.add(&item, now);
        }
        Chunk {
            done: items.is_empty(),
            batches: packer.finish(),
        }
    }

    fn before_live(&self) -> bool {
        true
    }
}

/// Packs messages into batches again: those of one flow together, up to [`BATCH`] bytes.
struct Packer {
    max_qos: Qos,
    batches: Vec<Arc<Batch>>,
    /// Cost of `batches`, and what is in `frames`.
    bytes: usize,
    frames: BytesMut,
    count: u32,
    /// The batch that what is in `frames` comes from, and what it says of flow, class and expiry.
    of: Option<Arc<Batch>>,
}

impl Packer {
    fn new(max_qos: Qos) -> Self {
        Self {
            max_qos,
            batches: Vec::new(),
            bytes: 0,
            frames: BytesMut::new(),
            count: 0,
            of: None,
        }
    }

    fn add(&mut self, item: &Item, now: Instant) {
        let batch = &item.kept.batch;
        let joins = self.of.as_ref().is_some_and(|of| {
            let plain = |batch: &Batch| batch.expires.is_none() && !batch.retain_as_published;
            Arc::ptr_eq(&of.flow, &batch.flow)
                && of.qos == batch.qos
                && of.class == batch.class
                && plain(of)
                && plain(batch)
        });
        if !joins {
            self.close();
            self.of = Some(Arc::clone(batch));
        }
        let flags = Flags::new(batch.qos.min(self.max_qos));
        let left = batch
            .expires
            .map(|expires| expires.saturating_duration_since(now));
        let facts: Bytes = wire::MessageHeader {
            published_ms: Some(unix_ms(item.kept.published)),
            expiry_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            ..Default::default()
        }
        .encode_to_vec()
        .into();
        for message in batch.messages().skip(item.skip) {
            // Of a field that comes twice the last one counts, so the publisher's header is as it was.
            let header = match &message.header {
                None => facts.clone(),
                Some(header) => [&header[..], &facts[..]].concat().into(),
            };
            let payload = &message.payload;
            let size = header.len() + payload.len() + lane::MESSAGE_OVERHEAD;
            if self.frames.len() + size > BATCH || payload.len() >= LARGE {
                self.close();
                self.of = Some(Arc::clone(batch));
            }
            self.count += 1;
            if payload.len() >= LARGE {
                let frames = &mut self.frames;
                lane::put_message_head(frames, flags, batch.flow.id, Some(&header), payload.len());
                self.close_with(payload.clone());
                self.of = Some(Arc::clone(batch));
            } else {
                let before = self.frames.len();
                let frames = &mut self.frames;
                lane::put_message(frames, flags, batch.flow.id, Some(&header), payload);
                self.bytes += self.frames.len() - before;
            }
        }
    }

    fn close(&mut self) {
        self.close_with(Bytes::new());
    }

    fn close_with(&mut self, payload: Bytes) {
        let Some(of) = self.of.take().filter(|_| self.count > 0) else {
            return;
        };
        self.bytes += payload.len() + Batch::OVERHEAD;
        self.batches.push(Arc::new(Batch {
            flow: Arc::clone(&of.flow),
            class: of.class,
            qos: of.qos.min(self.max_qos),
            retain: false,
            retain_as_published: of.retain_as_published,
            count: std::mem::take(&mut self.count),
            frames: std::mem::take(&mut self.frames).freeze(),
            payload,
            expires: of.expires,
        }));
    }

    fn finish(mut self) -> Vec<Arc<Batch>> {
        self.close();
        self.batches
    }
}
