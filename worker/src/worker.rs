//! The worker itself: registers models with a broker and answers the requests that come.

use std::collections::HashSet;
use std::num::NonZeroU32;
#[cfg(not(feature = "llm"))]
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use selvedge_client::{
    AnswerInfo, CallError, Client, Code, ConnectError, IncomingInference, LoadReport,
    ModelRegistration, Options, OptionsError, Status, Tier, WorkError, WorkerHandle,
};
use selvedge_proto::inference::{decode_tensors, encode_tensors};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::batch::{Batched, NoBatches};
use crate::config::{LlmConfig, ModelSource, WorkerConfig, cores};
use crate::engine::{self, Capacity, Engine, MESSAGES, Reply};
#[cfg(feature = "llm")]
use crate::llm::Llm;
use crate::model::{CancelFlag, Inference, InputError, Model, ModelError, Tensor, TensorSpec};
use crate::onnx::{LoadError, OnnxModel};
use crate::upstream::UpstreamError;
use crate::upstream::open_inference::OpenInference;
use crate::upstream::openai::OpenAi;

/// How long [`Worker::shutdown`] waits for requests in hand unless told otherwise.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

/// Under what a model is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// What requests ask for.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Requests answered at once.
    pub slots: NonZeroU32,
}

impl ModelSpec {
    /// Version `1` of a model, with as many slots as cores.
    pub fn new(name: impl Into<String>) -> Self {
        ModelSpec {
            name: name.into(),
            version: "1".to_owned(),
            slots: cores(),
        }
    }

    /// The same under another version.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// The same with another number of slots.
    #[must_use]
    pub fn slots(mut self, slots: NonZeroU32) -> Self {
        self.slots = slots;
        self
    }
}

/// Whom a worker connects to, where it runs, and what it answers with.
pub struct WorkerOptions {
    client: Options,
    tier: Tier,
    models: Vec<(ModelSpec, Runs)>,
    drain: Duration,
}

/// What answers the requests for a model.
#[derive(Clone)]
enum Runs {
    /// On a thread for each request.
    Model(Arc<dyn Model>),
    /// In its own time.
    Engine(Arc<dyn Engine>),
}

impl WorkerOptions {
    /// A worker without models.
    pub fn new(client: Options, tier: Tier) -> Self {
        let client = client.agent(concat!("selvedge-worker/", env!("CARGO_PKG_VERSION")));
        WorkerOptions {
            client,
            tier,
            models: Vec::new(),
            drain: DEFAULT_DRAIN,
        }
    }

    /// Adds a model.
    #[must_use]
    pub fn model(mut self, spec: ModelSpec, model: Arc<dyn Model>) -> Self {
        self.models.push((spec, Runs::Model(model)));
        self
    }

    /// Adds a model that an engine answers for.
    #[must_use]
    pub fn engine(mut self, spec: ModelSpec, engine: Arc<dyn Engine>) -> Self {
        self.models.push((spec, Runs::Engine(engine)));
        self
    }

    /// How long [`Worker::shutdown`] waits for requests in hand. Default: [`DEFAULT_DRAIN`].
    #[must_use]
    pub fn drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }

    /// Loads the certificates and models that a configuration names, one after the other.
    pub async fn load(config: &WorkerConfig) -> Result<Self, StartError> {
        let connect = &config.connect;
        let mut client = Options::new(&connect.broker)?.identity_files(
            &connect.ca,
            &connect.cert,
            &connect.key,
        )?;
        if let Some(name) = &connect.server_name {
            client = client.server_name(name);
        }
        let mut options = WorkerOptions::new(client, config.tier);
        let mut failures = Vec::new();
        for model in &config.models {
            let deadline = model.load_deadline;
            let loaded = match &model.source {
                ModelSource::Onnx {
                    path,
                    confidence,
                    batch,
                } => {
                    let (path, rule) = (path.clone(), confidence.clone());
                    let loaded = spawn_blocking(move || OnnxModel::load(path, rule, deadline))
                        .await
                        .expect("loading catches its own panics")
                        .map_err(LoadFailure::from);
                    loaded.and_then(|loaded| {
                        let mut runs: Arc<dyn Model> = Arc::new(loaded);
                        if let Some(batch) = *batch {
                            let batched = Batched::new(runs, confidence.clone(), batch);
                            runs = Arc::new(batched.map_err(|source| LoadFailure::NoBatches {
                                model: model.name.clone(),
                                source,
                            })?);
                        }
                        Ok(Runs::Model(runs))
                    })
                }
                ModelSource::Llm(llm) => load_llm(llm.clone(), model.slots, deadline).await,
                ModelSource::OpenInference(upstream) => {
                    Box::pin(OpenInference::load(upstream, model.slots.get(), deadline))
                        .await
                        .map(|engine| Runs::Engine(engine))
                        .map_err(LoadFailure::from)
                }
                ModelSource::OpenAi(upstream) => OpenAi::new(upstream, model.slots.get())
                    .map(|engine| Runs::Engine(engine))
                    .map_err(LoadFailure::from),
            };
            match loaded {
                Ok(loaded) => {
                    let spec = ModelSpec {
                        name: model.name.clone(),
                        version: model.version.clone(),
                        slots: model.slots,
                    };
                    options.models.push((spec, loaded));
                }
                Err(failure) => failures.push(failure),
            }
        }
        if failures.is_empty() {
            Ok(options)
        } else {
            Err(StartError::Load(failures))
        }
    }
}

#[cfg(feature = "llm")]
async fn load_llm(
    config: LlmConfig,
    slots: NonZeroU32,
    deadline: Duration,
) -> Result<Runs, LoadFailure> {
    let loaded = spawn_blocking(move || Llm::load(&config, slots, deadline)).await;
    let llm = loaded.expect("loading catches its own panics")?;
    Ok(Runs::Engine(Arc::new(llm)))
}

#[cfg(not(feature = "llm"))]
async fn load_llm(
    config: LlmConfig,
    _slots: NonZeroU32,
    _deadline: Duration,
) -> Result<Runs, LoadFailure> {
    Err(LoadFailure::NoLlm(config.path))
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadFailure {
    /// An ONNX file.
    #[error(transparent)]
    Onnx(#[from] LoadError),
    /// A GGUF file.
    #[cfg(feature = "llm")]
    #[error(transparent)]
    Llm(#[from] crate::llm::LoadError),
    /// A GGUF file, which this program was built without an engine for.
    #[cfg(not(feature = "llm"))]
    #[error(
        "model {}: this program was built without language models; build it with `--features llm`",
        .0.display()
    )]
    NoLlm(PathBuf),
    /// A server elsewhere.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// A model that cannot be asked in batches.
    #[error("model {model}: {source}")]
    NoBatches {
        /// Its name.
        model: String,
        /// What it has instead.
        source: NoBatches,
    },
}

/// Why a worker did not start. Nothing is left running or registered.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address or the certificates are no good.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// These models could not be loaded; the others could.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Load(Vec<LoadFailure>),
    /// A worker needs a model.
    #[error("expected at least one model, found none")]
    NoModels,
    /// One model stands twice.
    #[error("expected each model and version once, found `{model}` version `{version}` again")]
    Duplicate {
        /// The model.
        model: String,
        /// Its version.
        version: String,
    },
    /// The broker cannot be reached, or refuses this worker.
    #[error("connect to the broker: {0}")]
    Connect(#[from] ConnectError),
    /// The broker refuses a model.
    #[error("register model `{model}`: {source}")]
    Work {
        /// The model.
        model: String,
        /// What the broker said.
        source: WorkError,
    },
}

/// What a worker has done since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerStats {
    /// Requests answered.
    pub answered: u64,
    /// Requests that did not fit the model.
    pub invalid: u64,
    /// Requests the model failed on, or whose answer could not be sent.
    pub failed: u64,
    /// Requests that were given up before their answer.
    pub cancelled: u64,
    /// Requests beyond a model's slots. A broker that keeps to its credits makes none.
    pub over_slots: u64,
}

#[derive(Default)]
struct Counters {
    answered: AtomicU64,
    invalid: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    over_slots: AtomicU64,
}

/// A running worker. Dropping it withdraws its models and gives up the requests in hand;
/// [`shutdown`](Self::shutdown) lets them end first.
pub struct Worker {
    client: Client,
    counters: Arc<Counters>,
    /// Cancelled to drain: requests in hand end, new ones are turned away.
    stop: CancellationToken,
    /// One task for each model.
    models: JoinSet<()>,
}

impl Worker {
    /// Connects, registers every model, and returns when the broker has taken them all.
    pub async fn start(options: WorkerOptions) -> Result<Self, StartError> {
        let WorkerOptions {
            client,
            tier,
            models,
            drain,
        } = options;
        if models.is_empty() {
            return Err(StartError::NoModels);
        }
        let mut seen = HashSet::new();
        for (spec, _) in &models {
            if !seen.insert((&spec.name, &spec.version)) {
                let (model, version) = (spec.name.clone(), spec.version.clone());
                return Err(StartError::Duplicate { model, version });
            }
        }

        let client = Client::connect(client).await?;
        let counters = Arc::new(Counters::default());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for (spec, runs) in models {
            let handle = match client.work(registration(&spec, tier, &runs)).await {
                Ok(handle) => handle,
                Err(source) => {
                    client.close().await;
                    return Err(StartError::Work {
                        model: spec.name,
                        source,
                    });
                }
            };
            info!(
                model = spec.name,
                version = spec.version,
                slots = spec.slots,
                "model offered"
            );
            let capacity = match &runs {
                Runs::Model(_) => None,
                Runs::Engine(engine) => Some(engine.capacity()),
            };
            let served = Served {
                slots: Slots::new(spec.slots),
                spec,
                runs,
                counters: Arc::clone(&counters),
            };
            let serve = Serve {
                served: Arc::new(served),
                handle,
                stop: stop.clone(),
                drain,
                requests: JoinSet::new(),
                service: ServiceTime::default(),
                capacity,
            };
            tasks.spawn(serve.run());
        }
        Ok(Worker {
            client,
            counters,
            stop,
            models: tasks,
        })
    }

    /// The connection to the broker, to watch its state.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What was done so far.
    pub fn stats(&self) -> WorkerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WorkerStats {
            answered: read(&self.counters.answered),
            invalid: read(&self.counters.invalid),
            failed: read(&self.counters.failed),
            cancelled: read(&self.counters.cancelled),
            over_slots: read(&self.counters.over_slots),
        }
    }

    /// Waits until a model is no longer offered, because the client closed or the broker took the
    /// permission away. A worker that is asked for nothing else runs until then.
    pub async fn ended(&mut self) {
        if let Some(Err(failure)) = self.models.join_next().await {
            error!("a model's task failed: {failure}");
        }
    }

    /// Withdraws the models, lets requests in hand end, and says goodbye.
    pub async fn shutdown(mut self) {
        // First stop new requests and finish those in hand, each model within its drain time; the
        // connection must outlive them, since it carries their answers.
        self.stop.cancel();
        while self.models.join_next().await.is_some() {}
        self.client.close().await;
    }
}

fn registration(spec: &ModelSpec, tier: Tier, runs: &Runs) -> ModelRegistration {
    let (inputs, outputs, loaded) = match runs {
        Runs::Model(model) => {
            let signature = model.signature();
            let wire = |specs: &[TensorSpec]| specs.iter().map(Into::into).collect();
            (wire(&signature.inputs), wire(&signature.outputs), true)
        }
        Runs::Engine(engine) => {
            let loaded = engine.capacity().borrow().loaded;
            (engine.inputs(), engine.outputs(), loaded)
        }
    };
    ModelRegistration {
        model: spec.name.clone(),
        version: spec.version.clone(),
        tier,
        slots: spec.slots.get(),
        inputs,
        outputs,
        loaded,
        service_time: None,
        continues: match runs {
            Runs::Model(_) => false,
            Runs::Engine(engine) => engine.continues(),
        },
    }
}

/// The task of one model: takes its requests and reports its load.
struct Serve {
    served: Arc<Served>,
    handle: WorkerHandle,
    stop: CancellationToken,
    /// How long requests in hand may take once `stop` is cancelled.
    drain: Duration,
    /// One task for each request in hand, at most two for each slot; each gives its compute time.
    requests: JoinSet<Option<Duration>>,
    service: ServiceTime,
    /// What an engine can take; for others always the slots of the specification.
    capacity: Option<watch::Receiver<Capacity>>,
}

impl Serve {
    async fn run(mut self) {
        // A server that is not there yet has no room from the first moment on.
        if self.capacity.is_some() {
            self.handle.report(self.report());
        }
        loop {
            tokio::select! {
                // Stopping comes before new work, and a request that ended before one that
                // begins, so that the load report is no older than need be.
                biased;
                () = self.stop.cancelled() => break,
                Some(ended) = self.requests.join_next() => self.ended(ended),
                () = changed(&mut self.capacity) => self.handle.report(self.report()),
                request = self.handle.next() => match request {
                    Some(request) => {
                        self.requests.spawn(answer(request, Arc::clone(&self.served)));
                    }
                    None => {
                        // After a lost permission or a closed client nothing comes back by itself.
                        warn!(model = self.served.spec.name, "model no longer offered");
                        return;
                    }
                },
            }
        }
        self.finish().await;
    }

    /// Lets requests in hand end. Those that the broker sent before it knew are turned away, and
    /// it places them elsewhere.
    async fn finish(&mut self) {
        self.handle.report(LoadReport {
            slots: 0,
            ..self.report()
        });
        let deadline = tokio::time::sleep(self.drain);
        tokio::pin!(deadline);
        while !self.requests.is_empty() {
            tokio::select! {
                biased;
                () = &mut deadline => {
                    let left = self.requests.len();
                    warn!(model = self.served.spec.name, left, "requests given up at shutdown");
                    return;
                }
                Some(_) = self.requests.join_next() => {}
                Some(request) = self.handle.next() => {
                    let status = Status::new(Code::Unavailable, "the worker is shutting down");
                    end(request, status).await;
                }
            }
        }
    }

    fn ended(&mut self, ended: Result<Option<Duration>, tokio::task::JoinError>) {
        match ended {
            Ok(Some(compute)) => {
                if self.service.measure(compute) {
                    self.handle.report(self.report());
                }
            }
            Ok(None) => {}
            Err(failure) => error!(model = self.served.spec.name, "a request failed: {failure}"),
        }
    }

    fn report(&self) -> LoadReport {
        let most = self.served.spec.slots.get();
        let capacity = self.capacity.as_ref().map(|capacity| *capacity.borrow());
        LoadReport {
            slots: capacity.map_or(most, |capacity| capacity.slots.min(most)),
            loaded: capacity.is_none_or(|capacity| capacity.loaded),
            service_time: self.service.smoothed,
            queue_depth: self.served.slots.waiting(),
        }
    }
}

/// What the requests of one model share.
struct Served {
    spec: ModelSpec,
    runs: Runs,
    slots: Slots,
    counters: Arc<Counters>,
}

/// Waits until what an engine can take has changed.
async fn changed(capacity: &mut Option<watch::Receiver<Capacity>>) {
    if let Some(capacity) = capacity
        && capacity.changed().await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

/// Answers one request. Gives the time the model took when it answered.
async fn answer(mut request: IncomingInference, served: Arc<Served>) -> Option<Duration> {
    let arrived = Instant::now();
    let counters = &served.counters;
    let Some(admission) = served.slots.admit() else {
        counters.over_slots.fetch_add(1, Ordering::Relaxed);
        let message = format!(
            "expected at most {} requests at once, found one more",
            served.spec.slots
        );
        end(request, Status::new(Code::ResourceExhausted, message)).await;
        return None;
    };

    let model = match &served.runs {
        Runs::Model(model) => Arc::clone(model),
        Runs::Engine(engine) => {
            let engine = Arc::clone(engine);
            return Box::pin(stream(request, &served, engine, admission, arrived)).await;
        }
    };
    let inputs = match read(&mut request).await {
        Ok(inputs) => inputs,
        Err(Unread::Ended(reason)) => {
            counters.cancelled.fetch_add(1, Ordering::Relaxed);
            debug!(
                model = served.spec.name,
                "request ended before it was whole: {reason}"
            );
            return None;
        }
        Err(Unread::Invalid(status)) => {
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            drop(admission);
            end(request, status).await;
            return None;
        }
    };

    // Dropped with this future, the guard tells the model to stop.
    let cancelled = CancelFlag::new();
    let _guard = cancelled.clone().cancel_on_drop();
    let compute = {
        let (served, cancelled) = (Arc::clone(&served), cancelled.clone());
        async move {
            let slot = served.slots.compute().await;
            spawn_blocking(move || {
                let _slot = slot;
                let started = Instant::now();
                let result = model.infer(inputs, &cancelled);
                (result, started.duration_since(arrived), started.elapsed())
            })
            .await
        }
    };
    let computed = tokio::select! {
        // An answer that is there is sent, even if the caller gives up just now.
        biased;
        computed = compute => computed,
        () = request.cancelled() => {
            counters.cancelled.fetch_add(1, Ordering::Relaxed);
            drop(admission);
            let status = if tokio::time::Instant::now() < request.deadline() {
                Status::new(Code::Cancelled, "the request was cancelled")
            } else {
                Status::new(Code::DeadlineExceeded, "the model was not done by the deadline")
            };
            end(request, status).await;
            return None;
        }
    };
    // Free the slot before the broker learns that it is free: it may fill it at once.
    drop(admission);

    match computed {
        Ok((Ok(inference), queue, compute)) => {
            match reply(request, inference, queue, compute).await {
                Ok(()) => counters.answered.fetch_add(1, Ordering::Relaxed),
                Err(failure) => {
                    debug!(model = served.spec.name, "answer not sent: {failure}");
                    counters.failed.fetch_add(1, Ordering::Relaxed)
                }
            };
            Some(compute)
        }
        Ok((Err(refusal), ..)) => {
            let counter = match refusal {
                ModelError::Input(_) => &counters.invalid,
                ModelError::Cancelled => &counters.cancelled,
                ModelError::NotAProbability { .. } | ModelError::Failed(_) => &counters.failed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            end(request, status(&refusal)).await;
            None
        }
        Err(failure) => {
            error!(model = served.spec.name, "the model panicked: {failure}");
            counters.failed.fetch_add(1, Ordering::Relaxed);
            end(request, Status::new(Code::Internal, "the model panicked")).await;
            None
        }
    }
}

/// Answers one request by an engine, which may answer in many messages. Gives the time until the
/// first of them when it answered well.
async fn stream(
    mut request: IncomingInference,
    served: &Served,
    engine: Arc<dyn Engine>,
    admission: Admission,
    arrived: Instant,
) -> Option<Duration> {
    let counters = &served.counters;
    let payload = match request.request().await {
        Ok(payload) => payload,
        Err(error) if error.code() == Code::InvalidArgument => {
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            end(request, Status::new(error.code(), error.to_string())).await;
            return None;
        }
        Err(_) => {
            counters.cancelled.fetch_add(1, Ordering::Relaxed);
            return None;
        }
    };
    let asked = engine::Request {
        id: request.request_id().to_owned(),
        payload,
        parameters: request.parameters().to_vec(),
        deadline: request.deadline(),
        traceparent: request.traceparent().to_owned(),
    };
    let (sender, mut messages) = mpsc::channel(MESSAGES);
    let slot = tokio::select! {
        slot = served.slots.compute() => slot,
        () = request.cancelled() => {
            counters.cancelled.fetch_add(1, Ordering::Relaxed);
            return None;
        }
    };
    let begun = Instant::now();
    let queue = begun.duration_since(arrived);
    let mut answering = engine.answer(asked, Reply(sender));
    let mut outcome = None;
    let mut first = None;
    loop {
        tokio::select! {
            // What is there is sent, before the end is.
            biased;
            Some(message) = messages.recv() => {
                let compute = *first.get_or_insert_with(|| begun.elapsed());
                let info = AnswerInfo { queue, compute, ..AnswerInfo::default() };
                let sent = match request.answer(info).await {
                    Ok(()) => request.send(message).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = sent {
                    debug!(model = served.spec.name, "answer not sent: {error}");
                    counters.cancelled.fetch_add(1, Ordering::Relaxed);
                    // Too large a message ends the request; one that was given up has ended.
                    end(request, Status::new(error.code(), error.to_string())).await;
                    return None;
                }
            }
            ended = &mut answering, if outcome.is_none() => outcome = Some(ended),
            () = request.cancelled() => {
                // Dropping the answer stops the work for it.
                counters.cancelled.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            else => break,
        }
        if outcome.is_some() && messages.is_empty() {
            break;
        }
    }
    drop(answering);
    drop((slot, admission));
    match outcome {
        Some(Ok(())) => {
            counters.answered.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = request.finish().await {
                debug!(model = served.spec.name, "answer not ended: {error}");
            }
            Some(begun.elapsed())
        }
        Some(Err(status)) => {
            let counter = match status.code {
                Code::InvalidArgument => &counters.invalid,
                Code::Cancelled => &counters.cancelled,
                _ => &counters.failed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            end(request, status).await;
            None
        }
        None => None,
    }
}

/// Why a request has no inputs.
enum Unread {
    /// It was given up, or its connection lost.
    Ended(CallError),
    /// Its payload is no tensors.
    Invalid(Status),
}

async fn read(request: &mut IncomingInference) -> Result<Vec<Tensor>, Unread> {
    let payload = request
        .request()
        .await
        .map_err(|error| match error.code() {
            Code::InvalidArgument => {
                Unread::Invalid(Status::new(Code::InvalidArgument, error.to_string()))
            }
            _ => Unread::Ended(error),
        })?;
    let invalid = |message: String| Unread::Invalid(Status::new(Code::InvalidArgument, message));
    let tensors = decode_tensors(payload).map_err(|error| invalid(error.to_string()))?;
    tensors
        .into_iter()
        .map(|tensor| {
            let tensor = Tensor::try_from(tensor).map_err(InputError::from);
            tensor.map_err(|error| invalid(error.to_string()))
        })
        .collect()
}

async fn reply(
    mut request: IncomingInference,
    inference: Inference,
    queue: Duration,
    compute: Duration,
) -> Result<(), CallError> {
    let confidence = inference.confidence;
    let info = AnswerInfo {
        confidence,
        queue,
        compute,
        parameters: Vec::new(),
    };
    let payload = encode_tensors(inference.outputs.into_iter().map(Into::into).collect());
    request.answer(info).await?;
    match request.send(payload).await {
        Ok(()) => request.finish().await,
        Err(error @ CallError::TooLarge { .. }) => {
            end(
                request,
                Status::new(Code::OutOfRange, format!("the answer is a {error}")),
            )
            .await;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Ends a request with a status. That it has ended already is no news.
async fn end(request: IncomingInference, status: Status) {
    if let Err(error) = request.fail(status).await {
        debug!("request ended before its refusal: {error}");
    }
}

fn status(error: &ModelError) -> Status {
    let code = match error {
        ModelError::Input(_) => Code::InvalidArgument,
        ModelError::Cancelled => Code::Cancelled,
        ModelError::NotAProbability { .. } | ModelError::Failed(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The slots of one model: how many requests are in hand, and how many compute.
///
/// The broker frees a slot when it hears of a cancellation, and this worker hears of it after
/// that, perhaps after the request that takes the slot. So as many requests again as there are
/// slots may be in hand: each waits for one that is ending. Beyond that the broker has miscounted,
/// and the request is refused rather than queued.
struct Slots {
    admission: Arc<Semaphore>,
    compute: Arc<Semaphore>,
    slots: usize,
}

/// A request in hand. Dropping it makes room for another.
#[derive(Debug)]
struct Admission {
    _permit: OwnedSemaphorePermit,
}

impl Slots {
    fn new(slots: NonZeroU32) -> Self {
        // A semaphore holds less than a `u32` counts on small machines, and nobody has so many.
        let slots = usize::try_from(slots.get())
            .unwrap_or(usize::MAX)
            .min(Semaphore::MAX_PERMITS / 2);
        Slots {
            admission: Arc::new(Semaphore::new(slots * 2)),
            compute: Arc::new(Semaphore::new(slots)),
            slots,
        }
    }

    /// Takes a request in hand, or not, without waiting.
    fn admit(&self) -> Option<Admission> {
        let permit = Arc::clone(&self.admission).try_acquire_owned().ok()?;
        Some(Admission { _permit: permit })
    }

    /// Waits for a slot to compute in. Holds it until the thread is done, even if nobody waits for
    /// the answer any more: threads are what slots bound.
    async fn compute(&self) -> OwnedSemaphorePermit {
        let permit = Arc::clone(&self.compute).acquire_owned().await;
        permit.expect("the semaphore is never closed")
    }

    /// Requests in hand that have no slot to compute in.
    fn waiting(&self) -> u32 {
        let in_hand = self.slots * 2 - self.admission.available_permits();
        let waiting = in_hand.saturating_sub(self.slots);
        u32::try_from(waiting).unwrap_or(u32::MAX)
    }
}

/// Smoothed compute time of a model, and when it is worth a report.
#[derive(Debug, Default)]
struct ServiceTime {
    smoothed: Option<Duration>,
    reported: Option<Duration>,
}

impl ServiceTime {
    /// Takes a measurement in. True when the broker should hear: the first time, and when the
    /// value has moved by an eighth since it last heard.
    fn measure(&mut self, compute: Duration) -> bool {
        let smoothed = match self.smoothed {
            Some(smoothed) => smoothed.mul_f64(7.0 / 8.0) + compute.mul_f64(1.0 / 8.0),
            None => compute,
        };
        self.smoothed = Some(smoothed);
        let moved = self
            .reported
            .is_none_or(|reported| smoothed.abs_diff(reported) * 8 > reported);
        if moved {
            self.reported = Some(smoothed);
        }
        moved
    }
}

#[cfg(test)]
mod tests;
