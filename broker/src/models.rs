//! Who runs models: workers by model name, their slots, and the wait for one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::Rng;
use selvedge_certs::Identity;
use selvedge_proto::inference::{TensorSpec, Tier};
use selvedge_proto::topic::TopicName;
use tokio::sync::Notify;

use crate::clock;
use crate::placement::{self, Candidate, Choice, Refusal, Request};
use crate::services::Load;

/// The models of one tenant.
#[derive(Debug, Default)]
pub struct Models {
    inner: Mutex<HashMap<TopicName, Model>>,
    /// A slot became free, or a worker came or changed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Model {
    workers: Vec<Arc<WorkerModel>>,
    waiting: Arc<AtomicUsize>,
    lost: Option<Instant>,
    /// Sites that had a worker since the broker started, and when one was lost there with its
    /// connection. Bounded by [`SITES`].
    sites: HashMap<Box<str>, Option<Instant>>,
}

/// Sites remembered for one model. Those beyond are treated as never seen.
const SITES: usize = 4096;

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
    slots: AtomicU32,
    loaded: AtomicBool,
    gone: AtomicBool,
    load: Load,
}

impl Model {
    fn see(&mut self, site: &str, lost: Option<Instant>) {
        if let Some(held) = self.sites.get_mut(site) {
            *held = lost;
        } else if self.sites.len() < SITES {
            self.sites.insert(site.into(), lost);
        }
    }
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
    ) -> Self {
        Self {
            identity,
            registration,
            connection,
            version,
            tier,
            inputs,
            outputs,
            slots: AtomicU32::new(slots),
            loaded: AtomicBool::new(loaded),
            gone: AtomicBool::new(false),
            load: Load::default(),
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

    fn candidate(&self) -> Candidate<'_> {
        Candidate {
            site: self.identity.site(),
            version: &self.version,
            tier: self.tier,
            slots: self.slots(),
            outstanding: self.load.outstanding(),
            service_time: self.load.service_time(),
            rtt: self.connection.rtt(),
            loaded: self.loaded.load(Ordering::Relaxed),
        }
    }
}

/// One of a worker's slots, held until dropped.
#[derive(Debug)]
pub struct Slot {
    /// Whose.
    pub worker: Arc<WorkerModel>,
    /// Expected completion and why this worker.
    pub choice: Choice,
    begun: Instant,
    tenant: Arc<crate::tenant::Tenant>,
    completed: bool,
}

impl Slot {
    /// The request was answered: its time counts for the estimate.
    pub fn complete(mut self) {
        self.completed = true;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.completed {
            self.worker.load.record(self.begun.elapsed());
        }
        self.worker.load.end();
        self.tenant.models.changed.notify_waiters();
    }
}

/// Counts one request that waits for a slot.
struct Waiting(Arc<AtomicUsize>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How long and among how many to wait.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Requests that may wait for one model.
    pub waiting: usize,
    /// Grace after the broker's start that is left.
    pub start_grace: Duration,
    /// Grace after the last worker was lost.
    pub resume_grace: Duration,
    /// When the answer is due.
    pub deadline: Instant,
}

impl Models {
    /// Registers a worker's model.
    pub fn insert(&self, model: TopicName, worker: WorkerModel) -> Arc<WorkerModel> {
        let worker = Arc::new(worker);
        let mut inner = self.inner.lock();
        let entry = inner.entry(model).or_default();
        entry.workers.push(Arc::clone(&worker));
        entry.lost = None;
        entry.see(worker.identity.site(), None);
        drop(inner);
        self.changed.notify_waiters();
        worker
    }

    /// Withdraws a worker's model.
    pub fn remove(&self, model: &TopicName, worker: &Arc<WorkerModel>, lost: Option<Instant>) {
        worker.gone.store(true, Ordering::Release);
        let mut inner = self.inner.lock();
        let Some(entry) = inner.get_mut(model) else {
            return;
        };
        entry.workers.retain(|held| !Arc::ptr_eq(held, worker));
        let site = worker.identity.site();
        if lost.is_some()
            && !entry
                .workers
                .iter()
                .any(|held| held.identity.site() == site)
        {
            entry.see(site, lost);
        }
        if entry.workers.is_empty() {
            match lost {
                Some(_) => entry.lost = lost,
                None => {
                    inner.remove(model);
                }
            }
        }
        drop(inner);
        self.changed.notify_waiters();
    }

    /// Takes over what a worker reports.
    pub fn report(&self, worker: &WorkerModel, slots: u32, loaded: bool, service_time: Duration) {
        worker.slots.store(slots, Ordering::Release);
        worker.loaded.store(loaded, Ordering::Relaxed);
        if !service_time.is_zero() {
            worker.load.set_service_time(service_time);
        }
        self.changed.notify_waiters();
    }

    /// Takes a slot for a request, waiting for one while others have them all.
    ///
    /// # Errors
    /// See [`Refusal`]; `Busy` when too many wait already or the deadline comes first.
    pub async fn place(
        &self,
        tenant: &Arc<crate::tenant::Tenant>,
        model: &TopicName,
        request: &Request<'_>,
        exclude: Option<&Arc<WorkerModel>>,
        patience: Patience,
    ) -> Result<Slot, Refusal> {
        let begun = clock::now();
        let mut waiting: Option<Waiting> = None;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that a change between look and wait is not missed.
            changed.as_mut().enable();
            let now = clock::now();
            let request = Request {
                deadline: patience.deadline.saturating_duration_since(now),
                ..request.clone()
            };
            let refusal = match self.try_place(tenant, model, &request, exclude) {
                Ok(slot) => return Ok(slot),
                Err(refusal) => refusal,
            };
            let until = match &refusal {
                Refusal::Busy { .. } => {
                    if waiting.is_none() {
                        waiting = self.join_waiting(model, patience.waiting);
                        if waiting.is_none() {
                            return Err(refusal);
                        }
                    }
                    patience.deadline
                }
                Refusal::NotFound => {
                    let lost = self.inner.lock().get(model).and_then(|model| model.lost);
                    let start = begun + patience.start_grace;
                    lost.map_or(start, |lost| (lost + patience.resume_grace).max(start))
                        .min(patience.deadline)
                }
                // The worker of the requester's own site may be on its way back.
                Refusal::Residency => self
                    .expected_at(model, request.site, begun, patience)
                    .min(patience.deadline),
                Refusal::TooLate { .. } => return Err(refusal),
            };
            if until <= now {
                return Err(refusal);
            }
            let _ = tokio::time::timeout_at(until.into(), changed).await;
        }
    }

    /// Until when a worker of this site may still come.
    fn expected_at(
        &self,
        model: &TopicName,
        site: &str,
        begun: Instant,
        patience: Patience,
    ) -> Instant {
        let inner = self.inner.lock();
        match inner.get(model).and_then(|model| model.sites.get(site)) {
            None => begun + patience.start_grace,
            // It was there and withdrew.
            Some(None) => begun,
            Some(Some(lost)) => *lost + patience.resume_grace,
        }
    }

    fn try_place(
        &self,
        tenant: &Arc<crate::tenant::Tenant>,
        model: &TopicName,
        request: &Request<'_>,
        exclude: Option<&Arc<WorkerModel>>,
    ) -> Result<Slot, Refusal> {
        let workers: Vec<Arc<WorkerModel>> = {
            let inner = self.inner.lock();
            let Some(entry) = inner.get(model) else {
                return Err(Refusal::NotFound);
            };
            entry
                .workers
                .iter()
                .filter(|worker| exclude.is_none_or(|exclude| !Arc::ptr_eq(exclude, worker)))
                .cloned()
                .collect()
        };
        let mut candidates: Vec<Candidate<'_>> =
            workers.iter().map(|worker| worker.candidate()).collect();
        let mut random = rand::rng();
        loop {
            let choice =
                placement::place(request, &candidates, |count| random.random_range(0..count))?;
            let worker = &workers[choice.index];
            let slots = worker.slots();
            // The count decides, not the candidate's copy of it: others place at the same time.
            if slots > 0 && !worker.gone.load(Ordering::Acquire) && worker.load.try_begin(slots) {
                return Ok(Slot {
                    worker: Arc::clone(worker),
                    choice,
                    begun: clock::now(),
                    tenant: Arc::clone(tenant),
                    completed: false,
                });
            }
            candidates[choice.index].outstanding = candidates[choice.index].slots;
        }
    }

    fn join_waiting(&self, model: &TopicName, limit: usize) -> Option<Waiting> {
        let waiting = Arc::clone(&self.inner.lock().get(model)?.waiting);
        waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| {
                (held < limit).then_some(held + 1)
            })
            .ok()?;
        Some(Waiting(waiting))
    }

    /// Forgets models whose workers were lost longer than `grace` ago, as
    /// [`Services::forget_lost`](crate::services::Services::forget_lost) does.
    pub fn forget_lost(&self, now: Instant, grace: Duration) {
        self.inner.lock().retain(|_, model| {
            !model.workers.is_empty()
                || model
                    .lost
                    .is_some_and(|lost| now.saturating_duration_since(lost) < grace)
        });
    }

    /// Withdraws every worker that `keep` does not allow; returns how many.
    pub fn retain(&self, keep: impl Fn(&Identity, &TopicName) -> bool) -> usize {
        let mut removed = 0;
        self.inner.lock().retain(|name, model| {
            model.workers.retain(|worker| {
                let kept = keep(&worker.identity, name);
                if !kept {
                    worker.gone.store(true, Ordering::Release);
                    removed += 1;
                }
                kept
            });
            !model.workers.is_empty() || model.lost.is_some()
        });
        self.changed.notify_waiters();
        removed
    }

    /// The workers of one model.
    pub fn workers(&self, model: &TopicName) -> Vec<Arc<WorkerModel>> {
        let inner = self.inner.lock();
        inner
            .get(model)
            .map_or_else(Vec::new, |model| model.workers.clone())
    }

    /// Every model with its workers, for people.
    pub fn list(&self) -> Vec<(TopicName, Vec<Arc<WorkerModel>>)> {
        let inner = self.inner.lock();
        let mut list: Vec<_> = inner
            .iter()
            .filter(|(_, model)| !model.workers.is_empty())
            .map(|(name, model)| (name.clone(), model.workers.clone()))
            .collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}
