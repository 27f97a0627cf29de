//! The load process: all clients of one measurement, so that the server's CPU time is its own.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use hdrhistogram::Histogram;
use selvedge_certs::{Authority, TrustAnchors};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::client::{Clients, Publisher, Subscriber, Wish};
use self::framing::Found;
use self::window::Window;
use super::job::{Job, Latency, Outcome, Pace, Service, Task, Traffic};
use super::process;

mod calls;
mod client;
mod framing;
mod window;

/// Bytes of messages that are written at once when there is so much to write.
const WRITE: usize = 64 * 1024;
/// Handshakes at once.
const HANDSHAKES: usize = 32;
/// Time without a delivery after which what is missing is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// Subscriptions that one connection holds at most: the broker's default limit for a session.
const FILTERS: usize = 10_000;
/// Connections before memory is first looked at, so that one-time costs are not counted.
const FIRST: usize = 16;
/// Longest latency that is told from longer ones, in nanoseconds.
const LONGEST: u64 = 60_000_000_000;
/// Longest time that the server may take to come to rest after many connections.
const REST: Duration = Duration::from_secs(10);

/// Messages of this size that one write takes.
fn per_write(frame: usize) -> usize {
    (WRITE / frame).max(1)
}

/// The configuration of a QUIC client with a certificate of its own, as the load processes have it.
///
/// # Errors
/// There is no authority in the folder.
pub(crate) fn client_config(pki: &Path, name: &str) -> anyhow::Result<quinn::ClientConfig> {
    let authority = Authority::load(pki).context("load the authority")?;
    let trust = TrustAnchors::from_pem(authority.ca_pem().as_bytes())?;
    client::quic_config(&authority, &trust, name)
}

/// Does what a job says.
///
/// # Errors
/// The server cannot be reached, refuses, or ends a connection.
pub async fn run(job: Job) -> anyhow::Result<Outcome> {
    let clients = Arc::new(Clients::new(&job)?);
    let outcome = match &job.task {
        Task::Traffic(traffic) => {
            // One future for all of it would be large.
            Box::pin(run_traffic(&job, &clients, traffic)).await
        }
        Task::Idle { connections } => run_idle(&job, &clients, *connections).await,
        Task::Calls(wanted) => calls::run(&job, wanted).await,
    };
    clients.close().await;
    outcome
}

/// What the tasks of one measurement share.
struct Shared {
    /// Times are told from here.
    start: Instant,
    /// Stamps from and to which latencies are counted.
    counted: (AtomicU64, AtomicU64),
    latencies: Mutex<Histogram<u64>>,
    /// The first failure; later ones follow from it.
    failure: Mutex<Option<anyhow::Error>>,
    /// Publishers have to stop.
    stop: CancellationToken,
    /// Whatever happens now is of no interest.
    over: CancellationToken,
}

/// Messages that one subscriber has, on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Tally(AtomicU64);

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Remembers a failure and stops, unless all is over.
    fn fail(&self, error: anyhow::Error) {
        if !self.over.is_cancelled() {
            let mut failure = locked(&self.failure);
            failure.get_or_insert(error);
            self.stop.cancel();
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        locked(&self.failure).take().map_or(Ok(()), Err)
    }

    fn record(&self, stamps: &[u64]) {
        if stamps.is_empty() {
            return;
        }
        let now = self.now();
        let from = self.counted.0.load(Ordering::Relaxed);
        let to = self.counted.1.load(Ordering::Relaxed);
        let mut latencies = locked(&self.latencies);
        for stamp in stamps.iter().filter(|stamp| (from..to).contains(stamp)) {
            latencies.saturating_record(now.saturating_sub(*stamp));
        }
    }
}

async fn run_traffic(
    job: &Job,
    clients: &Arc<Clients>,
    traffic: &Traffic,
) -> anyhow::Result<Outcome> {
    let stamped = matches!(traffic.pace, Pace::Offered { .. });
    if stamped && (traffic.service.acknowledged() || traffic.size < 8) {
        bail!("expected QoS 0 and 8 bytes at least for a stamp");
    }
    let shared = Arc::new(Shared {
        start: Instant::now(),
        counted: (AtomicU64::new(u64::MAX), AtomicU64::new(u64::MAX)),
        latencies: Mutex::new(
            Histogram::new_with_bounds(1, LONGEST, 3).context("make a histogram")?,
        ),
        failure: Mutex::default(),
        stop: CancellationToken::new(),
        over: CancellationToken::new(),
    });
    let topic = |group: usize| format!("bench/{}/t/{group}", job.run);

    let mut wishes: Vec<Wish> = (0..traffic.idle_connections)
        .map(|place| Wish {
            group: 1_000_000 + place as u32,
            filters: vec![format!("bench/{}/idle/{place}", job.run)],
            service: Service::AtMostOnce,
        })
        .collect();
    let filters: Vec<String> = (0..traffic.idle_filters)
        .map(|place| format!("bench/{}/+/f{place}/#", job.run))
        .collect();
    wishes.extend(
        filters
            .chunks(FILTERS)
            .enumerate()
            .map(|(place, filters)| Wish {
                group: 2_000_000 + place as u32,
                filters: filters.to_vec(),
                service: Service::AtMostOnce,
            }),
    );
    let idle = connect(clients, "idle", wishes, Sharing::Socket).await?;

    let wishes = (0..traffic.groups * traffic.subscribers)
        .map(|place| Wish {
            group: (place / traffic.subscribers) as u32,
            filters: vec![topic(place / traffic.subscribers)],
            service: traffic.service,
        })
        .collect();
    let subscribers = connect(clients, "sub", wishes, Sharing::Nothing).await?;

    let messages = match traffic.pace {
        Pace::Closed { window } => window / traffic.size,
        Pace::Offered { .. } => 1,
    };
    let windows: Vec<Arc<Window>> = (0..traffic.groups)
        .map(|_| Arc::new(Window::new(messages, traffic.subscribers)))
        .collect();
    let tallies: Arc<[Tally]> = subscribers.iter().map(|_| Tally::default()).collect();
    let mut background = JoinSet::new();
    for (place, subscriber) in subscribers.into_iter().enumerate() {
        let window = Arc::clone(&windows[place / traffic.subscribers]);
        let (tallies, shared) = (Arc::clone(&tallies), Arc::clone(&shared));
        background.spawn(async move {
            let count = |found: &Found| {
                let tally = &tallies[place].0;
                // Only this task changes it.
                let before = tally.load(Ordering::Relaxed);
                tally.store(before + found.messages, Ordering::Relaxed);
                window.received(before, before + found.messages);
                shared.record(&found.stamps);
            };
            let error = match subscriber.run(stamped, count).await {
                Ok(()) => anyhow!("the server ended a subscriber's connection"),
                Err(error) => anyhow::Error::new(error).context("a subscriber's connection"),
            };
            shared.fail(error);
        });
    }

    let mut publishing = JoinSet::new();
    let mut heard = Vec::new();
    for (group, window) in windows.iter().enumerate() {
        let prepared = clients.prepare(&format!("pub-{group}"))?;
        let (size, service) = (traffic.size, traffic.service);
        let mut publisher = clients
            .publish(prepared, group as u32, &topic(group), size, service)
            .await?;
        heard.push(Arc::clone(&publisher.heard));
        if let Some(listening) = publisher.listening.take() {
            let (heard, shared) = (Arc::clone(&publisher.heard), Arc::clone(&shared));
            let window = Arc::clone(window);
            background.spawn(async move {
                let error = match listening.run(&heard, || window.wake()).await {
                    Ok(()) => anyhow!("the server ended a publisher's connection"),
                    Err(error) => anyhow::Error::new(error).context("a publisher's connection"),
                };
                shared.fail(error);
            });
        }
        let (window, shared) = (Arc::clone(window), Arc::clone(&shared));
        let (pace, service) = (traffic.pace, traffic.service);
        publishing.spawn(async move {
            let sent = match pace {
                Pace::Closed { .. } => publish_closed(publisher, &window, service, &shared).await,
                Pace::Offered { rate } => publish_offered(publisher, rate, &shared).await,
            };
            sent.map_err(|error| shared.fail(error.context("a publisher")))
                .ok()
        });
    }

    let delivered = || -> u64 {
        let counts = tallies.iter().map(|tally| tally.0.load(Ordering::Relaxed));
        counts.sum()
    };
    pause(Duration::from_secs_f64(traffic.warm_up), &shared).await?;
    let before = (delivered(), process::cpu_time(job.server)?, Instant::now());
    shared.counted.0.store(shared.now(), Ordering::Relaxed);
    pause(Duration::from_secs_f64(traffic.seconds), &shared).await?;
    shared.counted.1.store(shared.now(), Ordering::Relaxed);
    let after = (delivered(), process::cpu_time(job.server)?, Instant::now());
    let rss_kib = process::memory_kib(job.server)?;

    shared.stop.cancel();
    for window in &windows {
        window.wake();
    }
    let acknowledged = || -> u64 {
        let counts = heard.iter().map(|heard| heard.acks.load(Ordering::Acquire));
        counts.sum()
    };
    // Every publisher takes its connection along, so the deliveries and acknowledgements that are
    // missing have to come first.
    let mut sent = 0;
    let mut publishers = Vec::new();
    let progress = || delivered() + acknowledged();
    loop {
        match patient(publishing.join_next(), progress, &shared).await? {
            Some(None) => break,
            Some(Some(done)) => {
                let done = done.context("a publisher panicked")?;
                let (publisher, count) = done.context("a publisher failed")?;
                sent += count;
                publishers.push(publisher);
            }
            None => bail!("the server takes no more messages from a publisher"),
        }
    }
    let wanted = sent * traffic.subscribers as u64;
    let wanted_acks = if traffic.service.acknowledged() {
        sent
    } else {
        0
    };
    let complete = async {
        while delivered() < wanted || acknowledged() < wanted_acks {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    patient(complete, progress, &shared).await?;
    shared.over.cancel();
    shared.check()?;
    let lost = wanted.saturating_sub(delivered()) + wanted_acks.saturating_sub(acknowledged());
    let latencies = locked(&shared.latencies);
    let quantile = |quantile| latencies.value_at_quantile(quantile) as f64 / 1000.0;
    let latency = (stamped && !latencies.is_empty()).then(|| Latency {
        p50_us: quantile(0.5),
        p99_us: quantile(0.99),
        p999_us: quantile(0.999),
    });
    drop((idle, publishers));
    Ok(Outcome {
        count: after.0 - before.0,
        seconds: (after.2 - before.2).as_secs_f64(),
        cpu_seconds: (after.1 - before.1).as_secs_f64(),
        lost,
        rss_kib,
        latency,
        idle_kib: None,
    })
}

async fn run_idle(
    job: &Job,
    clients: &Arc<Clients>,
    connections: usize,
) -> anyhow::Result<Outcome> {
    let wishes = |name: &str, first: u32, count: usize| -> Vec<Wish> {
        let wish = |place| Wish {
            group: first + place as u32,
            filters: vec![format!("bench/{}/{name}/{place}", job.run)],
            service: Service::AtMostOnce,
        };
        (0..count).map(wish).collect()
    };
    let first = connect(clients, "first", wishes("first", 0, FIRST), Sharing::Socket).await?;
    let many = wishes("idle", 1_000, connections);
    let prepared = prepare(clients, "idle", many.len())?;
    process::settle(job.server, REST).await?;
    let memory = process::memory_kib(job.server)?;
    let cpu = process::cpu_time(job.server)?;
    let start = Instant::now();
    let idle = connect_prepared(clients, prepared, many, Sharing::Socket).await?;
    let seconds = start.elapsed().as_secs_f64();
    process::settle(job.server, REST).await?;
    let cpu_seconds = (process::cpu_time(job.server)? - cpu).as_secs_f64();
    let rss_kib = process::memory_kib(job.server)?;
    drop((first, idle));
    Ok(Outcome {
        count: connections as u64,
        seconds,
        cpu_seconds,
        rss_kib,
        idle_kib: Some(rss_kib.saturating_sub(memory) as f64 / connections as f64),
        ..Outcome::default()
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// Each client has a UDP socket of its own.
    Nothing,
    /// Clients share UDP sockets: a thousand would cost the load process gigabytes of buffers.
    Socket,
}

async fn connect(
    clients: &Arc<Clients>,
    name: &str,
    wishes: Vec<Wish>,
    sharing: Sharing,
) -> anyhow::Result<Vec<Subscriber>> {
    let prepared = prepare(clients, name, wishes.len())?;
    connect_prepared(clients, prepared, wishes, sharing).await
}

fn prepare(clients: &Clients, name: &str, count: usize) -> anyhow::Result<Vec<client::Prepared>> {
    (0..count)
        .map(|place| clients.prepare(&format!("{name}-{place}")))
        .collect()
}

/// Connects subscribers, some at once, and gives them in the order of the wishes.
async fn connect_prepared(
    clients: &Arc<Clients>,
    prepared: Vec<client::Prepared>,
    wishes: Vec<Wish>,
    sharing: Sharing,
) -> anyhow::Result<Vec<Subscriber>> {
    let mut connected: Vec<Option<Subscriber>> = Vec::new();
    connected.resize_with(wishes.len(), || None);
    let mut waiting = prepared.into_iter().zip(wishes).enumerate();
    let mut connecting = JoinSet::new();
    loop {
        while connecting.len() < HANDSHAKES
            && let Some((place, (prepared, wish))) = waiting.next()
        {
            let clients = Arc::clone(clients);
            connecting.spawn(async move {
                let subscriber = match sharing {
                    Sharing::Nothing => clients.subscribe(prepared, &wish).await,
                    Sharing::Socket => clients.subscribe_idle(prepared, &wish).await,
                };
                subscriber.map(|subscriber| (place, subscriber))
            });
        }
        let Some(done) = connecting.join_next().await else {
            return Ok(connected.into_iter().flatten().collect());
        };
        let (place, subscriber) = done.context("connect")??;
        connected[place] = Some(subscriber);
    }
}

/// Publishes as fast as the window allows, until it has to stop. Gives the number of messages.
async fn publish_closed(
    mut publisher: Publisher,
    window: &Window,
    service: Service,
    shared: &Shared,
) -> anyhow::Result<(Publisher, u64)> {
    let mut sent = 0;
    while !shared.stop.is_cancelled() {
        let mut allowed = window.allowance(sent);
        if service.acknowledged() {
            let acked = publisher.heard.acks.load(Ordering::Acquire);
            allowed = allowed.min((acked + window.messages()).saturating_sub(sent));
        }
        if allowed == 0 {
            window.moved().await;
            continue;
        }
        let messages = usize::try_from(allowed)
            .unwrap_or(usize::MAX)
            .min(publisher.per_write());
        publisher.send(messages).await?;
        sent += messages as u64;
    }
    Ok((publisher, sent))
}

/// Publishes each message when it is due, or as soon after it as the server takes it.
async fn publish_offered(
    mut publisher: Publisher,
    rate: u32,
    shared: &Arc<Shared>,
) -> anyhow::Result<(Publisher, u64)> {
    let interval = 1_000_000_000 / u64::from(rate.max(1));
    let first = shared.now();
    let due = Arc::new((AtomicU64::new(0), Notify::new()));
    // The timers of the runtime tick every millisecond; a thread sleeps to within 60 µs.
    let clock = {
        let (due, shared) = (Arc::clone(&due), Arc::clone(shared));
        move || {
            while !shared.stop.is_cancelled() {
                let count = (shared.now() - first) / interval + 1;
                due.0.store(count, Ordering::Release);
                due.1.notify_one();
                let next = first + count * interval;
                let wait = next.saturating_sub(shared.now());
                std::thread::sleep(Duration::from_nanos(wait));
            }
            due.1.notify_one();
        }
    };
    let clock = std::thread::Builder::new()
        .name("clock".into())
        .spawn(clock)
        .context("start the clock")?;
    let mut sent = 0;
    while !shared.stop.is_cancelled() {
        let to = due.0.load(Ordering::Acquire);
        if sent == to {
            due.1.notified().await;
            continue;
        }
        let to = to.min(sent + publisher.per_write() as u64);
        let stamps = (sent..to).map(|number| first + number * interval);
        publisher.send_stamped(stamps).await?;
        sent = to;
    }
    if clock.join().is_err() {
        bail!("the clock panicked");
    }
    Ok((publisher, sent))
}

/// Waits this long, or until something fails.
async fn pause(time: Duration, shared: &Shared) -> anyhow::Result<()> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = shared.stop.cancelled() => {
            shared.check()?;
            bail!("stopped before its time");
        }
    }
}

/// Waits for something for as long as there is progress. `None` when there was none for a while.
async fn patient<T>(
    wanted: impl Future<Output = T>,
    progress: impl Fn() -> u64,
    shared: &Shared,
) -> anyhow::Result<Option<T>> {
    tokio::pin!(wanted);
    let mut seen = progress();
    loop {
        if let Ok(done) = tokio::time::timeout(PATIENCE, &mut wanted).await {
            return Ok(Some(done));
        }
        shared.check()?;
        let now = progress();
        if now == seen {
            return Ok(None);
        }
        seen = now;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it is locked")
}
