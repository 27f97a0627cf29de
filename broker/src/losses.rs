//! What is given up: counted by reason, and remembered for a while for `selvedge explain`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::batch::Batch;
use crate::explain::Explain;
use crate::metrics::Metrics;
use crate::session::SessionKey;

/// Why a message went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The receiver's queue is full.
    QueueFull,
    /// The receiver is offline, and QoS 0 is not kept for it.
    Offline,
    /// It is past its expiry.
    Expired,
    /// The receiver's session ended with messages waiting.
    SessionEnded,
    /// It is larger than the receiver accepts.
    TooLarge,
    /// No member of a share group is there to take it.
    NoMember,
    /// The publisher sent it before, with the same message id.
    Duplicate,
}

impl Reason {
    /// The word for it in metrics and explanations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::Offline => "offline",
            Self::Expired => "expired",
            Self::SessionEnded => "session_ended",
            Self::TooLarge => "too_large_for_receiver",
            Self::NoMember => "no_member",
            Self::Duplicate => "duplicate",
        }
    }
}

/// Takes note of what one tenant's messages run into. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Losses {
    metrics: Arc<Metrics>,
    explain: Arc<Explain>,
    count: Arc<AtomicU64>,
}

impl Losses {
    /// Counts in `metrics`, remembers in `explain`.
    pub fn new(metrics: Arc<Metrics>, explain: Arc<Explain>) -> Self {
        Self {
            metrics,
            explain,
            count: Arc::default(),
        }
    }

    /// Messages given up so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// `count` messages of a batch will not reach `receiver`, or nobody for none.
    #[cold]
    pub fn lose(&self, reason: Reason, receiver: Option<&SessionKey>, batch: &Batch, count: u32) {
        if count == 0 {
            return;
        }
        self.count.fetch_add(count.into(), Ordering::Relaxed);
        let counter = match reason {
            Reason::QueueFull => &self.metrics.dropped_overflow,
            Reason::Offline => &self.metrics.dropped_offline,
            Reason::Expired => &self.metrics.dropped_expired,
            Reason::SessionEnded => &self.metrics.dropped_session_ended,
            Reason::TooLarge | Reason::NoMember | Reason::Duplicate => {
                self.metrics.drop_messages(reason.as_str(), count.into());
                self.explain.dropped(reason, receiver, batch, count);
                return;
            }
        };
        counter.inc_by(count.into());
        self.explain.dropped(reason, receiver, batch, count);
    }
}
