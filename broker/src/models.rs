//! Who runs models: workers by model name, and the wait for one of their slots.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use rand::Rng;
use selvedge_certs::Identity;
use selvedge_proto::inference::{Preference, Residency, Tier};
use selvedge_proto::message::Class;
use selvedge_proto::topic::TopicName;
use tokio::sync::{Notify, oneshot};

use crate::clock;
use crate::placement::budget::Budget;
use crate::placement::waiting::{Joined, Place, Queue};
use crate::placement::{self, Candidate, Choice, Refusal, Request};

pub use self::worker::{Slot, WorkerModel};

mod worker;

/// The models of one tenant.
#[derive(Debug)]
pub struct Models {
    registry: Arc<Registry>,
}

/// What slots, which outlive a look at the models, lead back to.
#[derive(Debug, Default)]
struct Registry {
    inner: Mutex<HashMap<TopicName, Model>>,
    /// A worker came, left, or is allowed no more.
    changed: Notify,
    /// Requests that wait for a slot of any model.
    waiting: Gauge,
}

#[derive(Debug, Default)]
struct Model {
    workers: Vec<Arc<WorkerModel>>,
    /// Taken before `inner` by whoever takes both.
    queue: Arc<Mutex<Queue<Waiter>>>,
    budget: Budget,
    lost: Option<Instant>,
    /// Sites that had a worker since the broker started, and when one was lost there with its
    /// connection. Bounded by [`SITES`].
    sites: HashMap<Box<str>, Option<Instant>>,
}

/// Sites remembered for one model. Those beyond are treated as never seen.
const SITES: usize = 4096;

impl Model {
    fn see(&mut self, site: &str, lost: Option<Instant>) {
        if let Some(held) = self.sites.get_mut(site) {
            *held = lost;
        } else if self.sites.len() < SITES {
            self.sites.insert(site.into(), lost);
        }
    }
}

/// A request that waits for a slot.
#[derive(Debug)]
struct Waiter {
    wish: Wish,
    due: Instant,
    affinity: Option<u64>,
    payload_bytes: u64,
    preference: Preference,
    reply: oneshot::Sender<Result<Slot, Refusal>>,
}

/// Who may answer. When one waits in vain, so do all who wish the same.
#[derive(Debug, PartialEq)]
struct Wish {
    site: Box<str>,
    version: Box<str>,
    residency: Residency,
    tier: Option<Tier>,
    exclude: Vec<Excluded>,
}

/// A worker that is not asked again.
#[derive(Debug, Clone)]
pub struct Excluded(pub Arc<WorkerModel>);

impl PartialEq for Excluded {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Wish {
    /// Whether any worker will do.
    fn is_any(&self) -> bool {
        self.version.is_empty()
            && self.residency != Residency::Site
            && self.tier.is_none()
            && self.exclude.is_empty()
    }
}

/// How long and among how many to wait.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Requests that may wait for one model.
    pub waiting: usize,
    /// Who goes first of those who wait.
    pub class: Class,
    /// Grace after the broker's start that is left.
    pub start_grace: Duration,
    /// Grace after the last worker was lost.
    pub resume_grace: Duration,
    /// When the answer is due.
    pub deadline: Instant,
}

impl Models {
    /// No models. Requests that wait are counted in `waiting`.
    pub fn new(waiting: Gauge) -> Self {
        Self {
            registry: Arc::new(Registry {
                waiting,
                ..Registry::default()
            }),
        }
    }

    /// Registers a worker's model.
    pub fn insert(&self, model: &TopicName, worker: WorkerModel) -> Arc<WorkerModel> {
        let worker = Arc::new(worker);
        let mut inner = self.registry.inner.lock();
        let entry = inner.entry(model.clone()).or_default();
        entry.workers.push(Arc::clone(&worker));
        entry.lost = None;
        entry.see(worker.identity.site(), None);
        drop(inner);
        self.registry.changed.notify_waiters();
        self.registry.serve_waiting(model);
        worker
    }

    /// Withdraws a worker's model.
    pub fn remove(&self, model: &TopicName, worker: &Arc<WorkerModel>, lost: Option<Instant>) {
        worker.gone.store(true, Ordering::Release);
        let mut inner = self.registry.inner.lock();
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
        let queue = Arc::clone(&entry.queue);
        if entry.workers.is_empty() {
            match lost {
                Some(_) => entry.lost = lost,
                None => {
                    inner.remove(model);
                }
            }
        }
        drop(inner);
        self.registry.changed.notify_waiters();
        // Who waits for what nobody may answer any more hears of it.
        self.registry.serve(model, &queue);
    }

    /// Takes over what a worker reports.
    pub fn report(
        &self,
        model: &TopicName,
        worker: &WorkerModel,
        slots: u32,
        loaded: bool,
        service_time: Duration,
    ) {
        worker.slots.store(slots, Ordering::Release);
        worker.loaded.store(loaded, Ordering::Relaxed);
        if !service_time.is_zero() {
            worker.load().set_service_time(service_time);
        }
        self.registry.serve_waiting(model);
    }

    /// Takes a slot for a request, waiting for one while others have them all.
    ///
    /// # Errors
    /// See [`Refusal`]; `Busy` when too many wait already, when a more urgent request takes its place, or
    /// when the deadline comes first; `TooLate` also when too many are served before.
    pub async fn place(
        &self,
        model: &TopicName,
        request: &Request<'_>,
        exclude: &[Excluded],
        patience: Patience,
    ) -> Result<Slot, Refusal> {
        let begun = clock::now();
        loop {
            let changed = self.registry.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that a change between look and wait is not missed.
            changed.as_mut().enable();
            let now = clock::now();
            let request = Request {
                deadline: patience.deadline.saturating_duration_since(now),
                ..request.clone()
            };
            // Whoever waits goes first, so a newcomer looks for itself only when nobody does.
            let placed = match self.registry.queue(model) {
                None => Err(Refusal::NotFound),
                Some(queue) if queue.lock().is_empty() => {
                    match self.registry.try_place(model, &request, exclude, now) {
                        Err(Refusal::Busy { retry_after }) => {
                            let wait = self.registry.wait(
                                model,
                                &queue,
                                &request,
                                exclude,
                                patience,
                                retry_after,
                            );
                            wait.await
                        }
                        placed => placed,
                    }
                }
                Some(queue) => {
                    let pace = self.registry.pace(model, &request, exclude, now);
                    let wait = self
                        .registry
                        .wait(model, &queue, &request, exclude, patience, pace);
                    wait.await
                }
            };
            let refusal = match placed {
                Ok(slot) => return Ok(slot),
                Err(refusal) => refusal,
            };
            let until = match &refusal {
                Refusal::NotFound => {
                    let lost = self.registry.inner.lock().get(model).and_then(|m| m.lost);
                    let start = begun + patience.start_grace;
                    lost.map_or(start, |lost| (lost + patience.resume_grace).max(start))
                        .min(patience.deadline)
                }
                // The worker of the requester's own site may be on its way back.
                Refusal::Residency => self
                    .expected_at(model, request.site, begun, patience)
                    .min(patience.deadline),
                Refusal::Busy { .. } | Refusal::TooLate { .. } => return Err(refusal),
            };
            if until <= clock::now() {
                return Err(refusal);
            }
            let _ = tokio::time::timeout_at(until.into(), changed).await;
        }
    }

    /// What the best worker would take for a request if it were placed now.
    pub fn estimate(
        &self,
        model: &TopicName,
        request: &Request<'_>,
        exclude: &[Excluded],
    ) -> Option<Duration> {
        let workers = self.registry.workers(model, exclude)?;
        let candidates = candidates(&workers, request, clock::now());
        let choice = placement::place(request, &candidates, |_| 0).ok()?;
        Some(choice.estimate)
    }

    /// Counts a request towards those that may be made twice.
    pub fn earn_repetition(&self, model: &TopicName) {
        if let Some(model) = self.registry.inner.lock().get_mut(model) {
            model.budget.earn();
        }
    }

    /// Whether a request may be made once more, which is counted.
    pub fn spend_repetition(&self, model: &TopicName) -> bool {
        let mut inner = self.registry.inner.lock();
        inner
            .get_mut(model)
            .is_some_and(|model| model.budget.spend())
    }

    /// Until when a worker of this site may still come.
    fn expected_at(
        &self,
        model: &TopicName,
        site: &str,
        begun: Instant,
        patience: Patience,
    ) -> Instant {
        let inner = self.registry.inner.lock();
        match inner.get(model).and_then(|model| model.sites.get(site)) {
            None => begun + patience.start_grace,
            // It was there and withdrew.
            Some(None) => begun,
            Some(Some(lost)) => *lost + patience.resume_grace,
        }
    }

    /// Forgets models whose workers were lost longer than `grace` ago, as
    /// [`Services::forget_lost`](crate::services::Services::forget_lost) does.
    pub fn forget_lost(&self, now: Instant, grace: Duration) {
        self.registry.inner.lock().retain(|_, model| {
            !model.workers.is_empty()
                || model
                    .lost
                    .is_some_and(|lost| now.saturating_duration_since(lost) < grace)
        });
    }

    /// Withdraws every worker that `keep` does not allow; returns how many.
    pub fn retain(&self, keep: impl Fn(&Identity, &TopicName) -> bool) -> usize {
        let mut removed = 0;
        let mut touched = Vec::new();
        self.registry.inner.lock().retain(|name, model| {
            let before = removed;
            model.workers.retain(|worker| {
                let kept = keep(&worker.identity, name);
                if !kept {
                    worker.gone.store(true, Ordering::Release);
                    removed += 1;
                }
                kept
            });
            if removed > before {
                touched.push((name.clone(), Arc::clone(&model.queue)));
            }
            !model.workers.is_empty() || model.lost.is_some()
        });
        self.registry.changed.notify_waiters();
        for (name, queue) in touched {
            self.registry.serve(&name, &queue);
        }
        removed
    }

    /// The workers of one model.
    pub fn workers(&self, model: &TopicName) -> Vec<Arc<WorkerModel>> {
        self.registry.workers(model, &[]).unwrap_or_default()
    }

    /// Every model with its workers, for people.
    pub fn list(&self) -> Vec<(TopicName, Vec<Arc<WorkerModel>>)> {
        let inner = self.registry.inner.lock();
        let mut list: Vec<_> = inner
            .iter()
            .filter(|(_, model)| !model.workers.is_empty())
            .map(|(name, model)| (name.clone(), model.workers.clone()))
            .collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}

fn candidates<'a>(
    workers: &'a [Arc<WorkerModel>],
    request: &Request<'_>,
    now: Instant,
) -> Vec<Candidate<'a>> {
    let workers = workers.iter();
    workers
        .map(|worker| worker.candidate(request.payload_bytes, now))
        .collect()
}

impl Registry {
    /// The workers of a model that are not excluded; `None` when the model is not known.
    fn workers(&self, model: &TopicName, exclude: &[Excluded]) -> Option<Vec<Arc<WorkerModel>>> {
        let inner = self.inner.lock();
        let workers = inner.get(model)?.workers.iter();
        let asked = |worker: &&Arc<WorkerModel>| {
            exclude
                .iter()
                .all(|excluded| !Arc::ptr_eq(&excluded.0, worker))
        };
        Some(workers.filter(asked).cloned().collect())
    }

    fn queue(&self, model: &TopicName) -> Option<Arc<Mutex<Queue<Waiter>>>> {
        let inner = self.inner.lock();
        Some(Arc::clone(&inner.get(model)?.queue))
    }

    fn try_place(
        self: &Arc<Self>,
        model: &TopicName,
        request: &Request<'_>,
        exclude: &[Excluded],
        now: Instant,
    ) -> Result<Slot, Refusal> {
        let workers = self.workers(model, exclude).ok_or(Refusal::NotFound)?;
        let mut candidates = candidates(&workers, request, now);
        let mut random = rand::rng();
        loop {
            let choice =
                placement::place(request, &candidates, |count| random.random_range(0..count))?;
            let worker = &workers[choice.index];
            let candidate = &mut candidates[choice.index];
            if worker.try_begin(candidate.standing, now) {
                return Ok(self.slot(model, worker, choice, now));
            }
            candidate.outstanding = candidate.slots;
        }
    }

    fn slot(
        self: &Arc<Self>,
        model: &TopicName,
        worker: &Arc<WorkerModel>,
        choice: Choice,
        now: Instant,
    ) -> Slot {
        Slot {
            worker: Arc::clone(worker),
            choice,
            begun: now,
            model: model.clone(),
            registry: Arc::clone(self),
            tells: true,
        }
    }

    /// Time between two slots becoming free, if all work at their usual pace.
    fn pace(
        &self,
        model: &TopicName,
        request: &Request<'_>,
        exclude: &[Excluded],
        now: Instant,
    ) -> Duration {
        let workers = self.workers(model, exclude).unwrap_or_default();
        let mut candidates = candidates(&workers, request, now);
        for candidate in &mut candidates {
            candidate.outstanding = candidate.slots;
        }
        match placement::place(request, &candidates, |_| 0) {
            Err(Refusal::Busy { retry_after }) => retry_after,
            _ => Duration::ZERO,
        }
    }

    /// Waits for a slot in turn. `pace` is the time between two becoming free.
    async fn wait(
        self: &Arc<Self>,
        model: &TopicName,
        queue: &Arc<Mutex<Queue<Waiter>>>,
        request: &Request<'_>,
        exclude: &[Excluded],
        patience: Patience,
        pace: Duration,
    ) -> Result<Slot, Refusal> {
        let due = patience.deadline;
        let (reply, answer) = oneshot::channel();
        let waiter = Waiter {
            wish: Wish {
                site: request.site.into(),
                version: request.version.into(),
                residency: request.residency,
                tier: request.tier,
                exclude: exclude.to_vec(),
            },
            due,
            affinity: request.affinity,
            payload_bytes: request.payload_bytes,
            preference: request.preference,
            reply,
        };
        let after =
            |ahead: usize| pace.saturating_mul(u32::try_from(ahead + 1).unwrap_or(u32::MAX));
        let joined = {
            let mut queue = queue.lock();
            let ahead = queue.ahead(patience.class, due);
            // It would expire in the queue: said now, it can still be asked elsewhere.
            if ahead > 0 && after(ahead - 1) > request.deadline {
                let estimate = after(ahead);
                return Err(Refusal::TooLate { estimate });
            }
            queue.join(patience.class, due, waiter, patience.waiting)
        };
        let place = match joined {
            Joined::Waits(place) => place,
            Joined::InsteadOf(place, displaced) => {
                let retry_after = after(queue.lock().len());
                let _ = displaced.reply.send(Err(Refusal::Busy { retry_after }));
                place
            }
            Joined::Full => {
                let retry_after = after(queue.lock().len());
                return Err(Refusal::Busy { retry_after });
            }
        };
        let _turn = Turn::new(self, queue, place);
        // A slot may have become free before this one waited.
        self.serve(model, queue);
        match tokio::time::timeout_at(due.into(), answer).await {
            Ok(Ok(placed)) => placed,
            // The queue keeps a waiter until it has an answer.
            Ok(Err(_)) | Err(_) => Err(Refusal::Busy { retry_after: pace }),
        }
    }

    /// Gives free slots of a model to those who wait for them.
    fn serve_waiting(self: &Arc<Self>, model: &TopicName) {
        if let Some(queue) = self.queue(model) {
            self.serve(model, &queue);
        }
    }

    /// Gives free slots to those who wait in this queue, the most urgent first, and tells those who wait in
    /// vain.
    fn serve(self: &Arc<Self>, model: &TopicName, queue: &Mutex<Queue<Waiter>>) {
        loop {
            let mut unwanted = Vec::new();
            {
                let mut queue = queue.lock();
                let mut settled = Vec::new();
                let mut busy: Vec<&Wish> = Vec::new();
                let now = clock::now();
                for (place, waiter) in queue.iter() {
                    if busy.contains(&&waiter.wish) {
                        continue;
                    }
                    match self.try_place(model, &waiter.request(now), &waiter.wish.exclude, now) {
                        Err(Refusal::Busy { .. }) if waiter.wish.is_any() => break,
                        Err(Refusal::Busy { .. }) => busy.push(&waiter.wish),
                        placed => settled.push((place, placed)),
                    }
                }
                for (place, placed) in settled {
                    let Some(waiter) = queue.leave(place) else {
                        continue;
                    };
                    if let Err(Ok(slot)) = waiter.reply.send(placed) {
                        unwanted.push(slot);
                    }
                }
            }
            if unwanted.is_empty() {
                return;
            }
            // Who was to have them has gone; others may want them, which the next turn sees.
            for mut slot in unwanted {
                slot.tells = false;
                drop(slot);
            }
        }
    }
}

impl Waiter {
    fn request(&self, now: Instant) -> Request<'_> {
        Request {
            site: &self.wish.site,
            version: &self.wish.version,
            residency: self.wish.residency,
            preference: self.preference,
            tier: self.wish.tier,
            affinity: self.affinity,
            payload_bytes: self.payload_bytes,
            deadline: self.due.saturating_duration_since(now),
        }
    }
}

/// A place in a queue, given up when dropped.
struct Turn<'a> {
    registry: &'a Registry,
    queue: &'a Mutex<Queue<Waiter>>,
    place: Place,
}

impl<'a> Turn<'a> {
    fn new(registry: &'a Registry, queue: &'a Mutex<Queue<Waiter>>, place: Place) -> Self {
        registry.waiting.inc();
        Self {
            registry,
            queue,
            place,
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.registry.waiting.dec();
        let left = self.queue.lock().leave(self.place);
        drop(left);
    }
}
