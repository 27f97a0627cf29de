//! Counters of a client.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the client was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientStats {
    /// Messages taken from the application for publishing, of either quality of service.
    pub published: u64,
    /// QoS 1 messages that the broker acknowledged.
    pub acknowledged: u64,
    /// Messages that the broker refused, by policy or limits.
    pub refused: u64,
    /// QoS 0 messages not taken because the client was disconnected and its buffer full.
    pub dropped_disconnected: u64,
    /// Bytes of frames that were waiting to be sent when a connection was lost, QoS 0 and QoS 1
    /// alike. The QoS 1 messages among them are sent again, the others are lost.
    pub discarded_bytes: u64,
    /// Of the messages published, those that were to go in datagrams and did, unless they were
    /// dropped.
    pub datagrams: u64,
    /// Messages that were to go in datagrams and did not fit: they went on a lane.
    pub datagram_fallbacks: u64,
    /// Datagrams dropped before they were sent: newer ones came faster than the network took them,
    /// or the connection was lost.
    pub datagrams_dropped: u64,
    /// Messages handed to subscriptions; one that matches two of them counts twice.
    pub delivered: u64,
    /// QoS 0 messages dropped because a subscription's queue was full.
    pub dropped_slow: u64,
    /// Messages that no subscription of this client wanted any more.
    pub unmatched: u64,
    /// Messages that the broker delivered again although the application had taken them, told by
    /// their message ids: they were acknowledged and not handed over again.
    pub duplicates: u64,
    /// Connections made after the first.
    pub reconnects: u64,
}

/// The counters behind [`ClientStats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) acknowledged: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) dropped_disconnected: AtomicU64,
    pub(crate) discarded_bytes: AtomicU64,
    pub(crate) datagrams: AtomicU64,
    pub(crate) datagram_fallbacks: AtomicU64,
    pub(crate) datagrams_dropped: AtomicU64,
    pub(crate) delivered: AtomicU64,
    pub(crate) dropped_slow: AtomicU64,
    pub(crate) unmatched: AtomicU64,
    pub(crate) duplicates: AtomicU64,
    pub(crate) reconnects: AtomicU64,
}

impl Counters {
    /// The counters, with what the lanes count themselves.
    pub(crate) fn snapshot(&self, published_on_lanes: u64) -> ClientStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ClientStats {
            published: published_on_lanes + get(&self.datagrams),
            acknowledged: get(&self.acknowledged),
            refused: get(&self.refused),
            dropped_disconnected: get(&self.dropped_disconnected),
            discarded_bytes: get(&self.discarded_bytes),
            datagrams: get(&self.datagrams),
            datagram_fallbacks: get(&self.datagram_fallbacks),
            datagrams_dropped: get(&self.datagrams_dropped),
            delivered: get(&self.delivered),
            dropped_slow: get(&self.dropped_slow),
            unmatched: get(&self.unmatched),
            duplicates: get(&self.duplicates),
            reconnects: get(&self.reconnects),
        }
    }
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
