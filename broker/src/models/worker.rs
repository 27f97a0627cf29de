//! One model of one worker: what it registered, its slots, how it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use selvedge_certs::Identity;
use selvedge_proto::inference::{TensorSpec, Tier};
use selvedge_proto::status::Code;
use selvedge_proto::topic::TopicName;

use super::Registry;
use crate::clock;
use crate::placement::affinity::fingerprint;
use crate::placement::health::{Health, Standing};
use crate::placement::{Candidate, Choice};
use crate::services::Load;
use crate::statistics::Statistics;

/// Payloads up to this size are on their way at once. Of larger ones the time is estimated.
const AT_ONCE: u64 = 16 * 1024;

/// One model of one worker.
#[derive(Debug)]
pub struct WorkerModel {
    /// Who, as verified; its site bounds residency.
    pub identity: Identity,
    /// Chosen by the worker, unique on its connection.
    pub registration: u32,
    /// Where to open the request's stream.
    pub connection: quinn::Connection,
    /// Its version of the model.
    pub version: String,
    /// Its tier.
    pub tier: Tier,
    /// Names, datatypes and shapes it takes.
    pub inputs: Vec<TensorSpec>,
    /// Names, datatypes and shapes it answers.
    pub outputs: Vec<TensorSpec>,
    /// It would give the same messages as the other workers of this version that say so.
    pub continues: bool,
    pub(super) slots: AtomicU32,
    pub(super) loaded: AtomicBool,
    pub(super) gone: AtomicBool,
    fingerprint: u64,
    load: Load,
    statistics: Statistics,
    health: Mutex<Health>,
}

impl WorkerModel {
    /// A worker's model as registered.
    #[allow(
        clippy::too_many_arguments,
        reason = "one for each field of the registration"
    )]
    pub fn new(
        identity: Identity,
        registration: u32,
        connection: quinn::Connection,
        version: String,
        tier: Tier,
        slots: u32,
        loaded: bool,
        inputs: Vec<TensorSpec>,
        outputs: Vec<TensorSpec>,
        continues: bool,
    ) -> Self {
        Self {
            fingerprint: fingerprint(identity.uri()),
            identity,
            registration,
            connection,
            version,
            tier,
            inputs,
            outputs,
            continues,
            slots: AtomicU32::new(slots),
            loaded: AtomicBool::new(loaded),
            gone: AtomicBool::new(false),
            load: Load::default(),
            statistics: Statistics::default(),
            health: Mutex::default(),
        }
    }

    /// Requests it takes at once.
    pub fn slots(&self) -> u32 {
        self.slots.load(Ordering::Acquire)
    }

    /// Whether it can answer without loading first.
    pub fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }

    /// Outstanding requests and service time.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// What became of the requests that it answered, or failed to.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Whether it is trusted with requests.
    pub fn standing(&self, now: Instant) -> Standing {
        self.health.lock().standing(now)
    }

    pub(super) fn candidate(&self, payload_bytes: u64, now: Instant) -> Candidate<'_> {
        Candidate {
            fingerprint: self.fingerprint,
            site: self.identity.site(),
            version: &self.version,
            tier: self.tier,
            slots: self.slots(),
            outstanding: self.load.outstanding(),
            service_time: self.load.service_time(),
            rtt: self.connection.rtt(),
            transfer: self.transfer(payload_bytes),
            standing: self.standing(now),
            loaded: self.is_loaded(),
        }
    }

    /// Time that a payload takes to the worker: what congestion control lets through in a round trip is the
    /// bandwidth that QUIC has measured.
    fn transfer(&self, payload_bytes: u64) -> Duration {
        if payload_bytes <= AT_ONCE {
            return Duration::ZERO;
        }
        let path = self.connection.stats().path;
        let rounds = payload_bytes as f64 / path.cwnd.max(1) as f64;
        Duration::try_from_secs_f64(path.rtt.as_secs_f64() * rounds).unwrap_or(Duration::MAX / 8)
    }

    /// Takes one of the slots. The count decides, and not a candidate's copy of it: others place at the same
    /// time.
    pub(super) fn try_begin(&self, standing: Standing, now: Instant) -> bool {
        let slots = self.slots();
        if slots == 0 || self.gone.load(Ordering::Acquire) || !self.load.try_begin(slots) {
            return false;
        }
        if standing == Standing::Probe && !self.health.lock().begin(now) {
            self.load.end();
            return false;
        }
        true
    }
}

/// One of a worker's slots, held until dropped.
#[derive(Debug)]
pub struct Slot {
    /// Whose.
    pub worker: Arc<WorkerModel>,
    /// Expected completion and why this worker.
    pub choice: Choice,
    pub(super) begun: Instant,
    pub(super) model: TopicName,
    pub(super) registry: Arc<Registry>,
    /// Whoever waits for a slot is told when this one is free.
    pub(super) tells: bool,
}

impl Slot {
    /// The request was answered: its time counts for the estimate.
    pub fn complete(self) {
        let time = self.begun.elapsed();
        self.worker.load.record(time);
        self.worker.statistics.record(Code::Ok, time);
        self.worker.health.lock().succeed();
    }

    /// The request failed, and the worker is to blame. True when it is given no more requests for a while.
    pub fn fail(self) -> bool {
        let statistics = &self.worker.statistics;
        statistics.record(Code::Unavailable, self.begun.elapsed());
        self.worker.health.lock().fail(clock::now())
    }

    /// Whether the worker had much longer for this request than it should need.
    pub fn is_overdue(&self) -> bool {
        let patience = (self.choice.estimate * 4).max(Duration::from_secs(1));
        clock::now().saturating_duration_since(self.begun) >= patience
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.worker.load.end();
        if self.tells {
            self.registry.serve_waiting(&self.model);
        }
    }
}
