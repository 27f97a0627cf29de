//! One soak of a bridge from start to verdict.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use selvedge_client::{Client, Publish, Qos};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::device::{Device, News, Outgoing};
use super::ledger::{Direction, Flow, Place, Violation};
use super::site::Site;

/// Messages that the fabric's publisher has on their way.
const WINDOW: usize = 500;
/// Longer than any session of the soak is away.
const EXPIRY: Duration = Duration::from_secs(24 * 3600);
/// How often a publisher publishes.
const TICK: Duration = Duration::from_millis(10);

/// Something that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL to the fabric's broker.
    KillFabric,
    /// SIGTERM to the fabric's broker.
    StopFabric,
    /// SIGKILL to the bridge.
    KillBridge,
    /// SIGTERM to the bridge.
    StopBridge,
    /// SIGTERM to mosquitto, which saves what it holds when it ends, and only then.
    StopRemote,
    /// SIGSTOP to mosquitto, and SIGCONT later.
    HoldRemote,
    /// SIGKILL to the fabric's broker and to the bridge, which comes back first.
    KillBridgeWithoutFabric,
    /// SIGTERM to mosquitto and SIGKILL to the bridge, which comes back first.
    KillBridgeWithoutRemote,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::KillFabric,
        Self::StopFabric,
        Self::KillBridge,
        Self::StopBridge,
        Self::StopRemote,
        Self::HoldRemote,
        Self::KillBridgeWithoutFabric,
        Self::KillBridgeWithoutRemote,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::KillFabric => "fabric killed",
            Self::StopFabric => "fabric stopped",
            Self::KillBridge => "bridge killed",
            Self::StopBridge => "bridge stopped",
            Self::StopRemote => "mosquitto stopped",
            Self::HoldRemote => "mosquitto held",
            Self::KillBridgeWithoutFabric => "bridge killed while the fabric was away",
            Self::KillBridgeWithoutRemote => "bridge killed while mosquitto was away",
        }
    }

    /// Processes that are broken by it.
    fn processes(self) -> u64 {
        match self {
            Self::KillBridgeWithoutFabric | Self::KillBridgeWithoutRemote => 2,
            _ => 1,
        }
    }
}

/// What a soak is to be.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `selvedge` binary.
    pub binary: PathBuf,
    /// Decides what is broken when. Scheduling is not in its hands.
    pub seed: u64,
    /// How long messages are published; the rest is waited for.
    pub time: Duration,
    /// Messages a second, each way.
    pub rate: u32,
    /// 1 or 2.
    pub qos: u8,
    /// MQTT 5 between bridge and mosquitto, and one mapping both ways; else 3.1.1.
    pub v5: bool,
    /// Bytes of a message.
    pub payload: usize,
    /// Time without a fault, from and to.
    pub spacing: (Duration, Duration),
    /// How long what was broken stays so, from and to.
    pub outage: (Duration, Duration),
    /// How long nothing may arrive at the end before what is missing counts as lost.
    pub patience: Duration,
}

impl Settings {
    /// A short soak with this binary and seed: some seconds, in which everything is broken once.
    pub fn new(binary: impl Into<PathBuf>, seed: u64, qos: u8) -> Self {
        Self {
            binary: binary.into(),
            seed,
            time: Duration::from_secs(9),
            rate: 300,
            qos,
            v5: true,
            payload: 256,
            spacing: (Duration::from_millis(200), Duration::from_millis(500)),
            outage: (Duration::from_millis(50), Duration::from_millis(500)),
            patience: Duration::from_secs(30),
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// From mosquitto to the fabric, and the other way.
    pub flows: [Flow; 2],
    /// Every broken promise.
    pub violations: Vec<Violation>,
    /// Payloads that nobody published.
    pub strange: u64,
    /// What was broken how often.
    pub faults: BTreeMap<&'static str, u64>,
    /// What the bridge's last process said of its remote at the end.
    pub bridge: Value,
    /// How long it took altogether.
    pub took: Duration,
    /// Logs and stores, kept if a promise was broken.
    pub evidence: Option<PathBuf>,
}

impl Report {
    /// Whether every promise was kept.
    pub fn kept(&self) -> bool {
        self.violations.is_empty() && self.strange == 0
    }
}

/// What was published and has arrived. Cheap to clone.
#[derive(Clone)]
struct Book(Arc<Mutex<Pages>>);

struct Pages {
    started: Instant,
    flows: [Flow; 2],
    strange: u64,
}

impl Book {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Pages {
            started: Instant::now(),
            flows: [Flow::new(Direction::In), Flow::new(Direction::Out)],
            strange: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, direction: Direction, bytes: usize) -> (u64, Bytes) {
        let mut pages = self.lock();
        let now = pages.started.elapsed();
        let number = pages.flows[direction as usize].publish(now);
        let mut payload = format!("{}:{number}:", direction as usize).into_bytes();
        payload.resize(bytes.max(payload.len()), b'.');
        (number, payload.into())
    }

    fn acknowledge(&self, direction: Direction, number: u64) {
        self.lock().flows[direction as usize].acknowledge(number);
    }

    /// A message has arrived on this side of the bridge.
    fn arrive(&self, at: Direction, topic: &str, payload: &[u8]) {
        let mut pages = self.lock();
        let now = pages.started.elapsed();
        let named = std::str::from_utf8(payload).ok().and_then(|text| {
            let mut parts = text.split(':');
            let direction: usize = parts.next()?.parse().ok()?;
            let number: u64 = parts.next()?.parse().ok()?;
            Some((direction, number))
        });
        let known = match named {
            Some((index @ 0, number)) if topic.ends_with("soak/in") => Some((index, number)),
            Some((index @ 1, number)) if topic.ends_with("soak/out") => Some((index, number)),
            _ => None,
        };
        let arrived = known.is_some_and(|(index, number)| {
            let flow = &mut pages.flows[index];
            let place = match flow.direction == at {
                true => Place::Home,
                false => Place::Across,
            };
            flow.arrive(number, place, now)
        });
        pages.strange += u64::from(!arrived);
    }

    /// Whether everything that was published is acknowledged and has arrived.
    fn is_settled(&self) -> bool {
        let pages = self.lock();
        let mut flows = pages.flows.iter();
        flows.all(|flow| flow.acknowledged == flow.published && flow.owed() == 0)
    }

    /// Changes with everything that happens.
    fn progress(&self) -> u64 {
        let pages = self.lock();
        let flows = pages.flows.iter();
        flows
            .map(|flow| flow.acknowledged + flow.delivered + flow.repeats + flow.came_back)
            .sum()
    }
}

/// Runs a soak with the mosquitto at `mosquitto`.
///
/// # Errors
/// It came to no verdict: a process could not be started, or ended by itself.
pub async fn soak(settings: &Settings, mosquitto: &std::path::Path) -> io::Result<Report> {
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("bridge-soak-").tempdir()?;
    let ended = attack(settings, mosquitto, folder.path()).await;
    let broken = !matches!(&ended, Ok(report) if report.kept());
    let evidence = broken.then(|| TempDir::keep(folder));
    match ended {
        Ok(report) => Ok(Report {
            took: started.elapsed(),
            evidence,
            ..report
        }),
        Err(error) => {
            let evidence = evidence.unwrap_or_default();
            let text = format!("{error} (logs are in {})", evidence.display());
            Err(io::Error::other(text))
        }
    }
}

async fn attack(
    settings: &Settings,
    mosquitto: &std::path::Path,
    folder: &std::path::Path,
) -> io::Result<Report> {
    let mut site = Site::start(settings, mosquitto, folder).await?;
    let book = Book::new();
    let enough = CancellationToken::new();
    let fabric_reader = read_fabric(&site, &book).await?;
    let (_nothing, none) = mpsc::channel(1);
    let remote_reader = device(&site, settings, "reader", Some("soak/#"), none, &book).await?;
    let (to_remote, outgoing) = mpsc::channel(WINDOW);
    let remote_publisher = device(&site, settings, "publisher", None, outgoing, &book).await?;
    book.lock().started = Instant::now();
    let publishing = [
        tokio::spawn(publish_remote(
            settings.clone(),
            book.clone(),
            to_remote,
            enough.clone(),
        )),
        tokio::spawn(publish_fabric(
            settings.clone(),
            book.clone(),
            connect(&site, "publisher").await?,
            enough.clone(),
        )),
    ]
    .map(AbortOnDropHandle::new);

    let broken = break_things(settings, &mut site).await;
    enough.cancel();
    let faults = broken?;
    settle(settings, &mut site, &book).await?;
    let bridge = site.bridge_status().await?;
    drop((publishing, remote_publisher, remote_reader, fabric_reader));
    site.stop().await?;
    let pages = book.lock();
    let mut counts = BTreeMap::new();
    for fault in &faults {
        *counts.entry(fault.name()).or_default() += 1;
    }
    let processes = faults.iter().map(|fault| fault.processes()).sum();
    let violations = pages.flows.iter();
    let violations = violations.flat_map(|flow| flow.violations(settings.qos, processes));
    Ok(Report {
        violations: violations.collect(),
        flows: pages.flows.clone(),
        strange: pages.strange,
        faults: counts,
        bridge,
        took: Duration::ZERO,
        evidence: None,
    })
}

/// Breaks each of the three in turn until the time is up.
async fn break_things(settings: &Settings, site: &mut Site) -> io::Result<Vec<Fault>> {
    let mut random = StdRng::seed_from_u64(settings.seed);
    let between = |random: &mut StdRng, (from, to): (Duration, Duration)| {
        from + (to.saturating_sub(from)).mul_f64(random.random())
    };
    let until = Instant::now() + settings.time;
    let mut done = Vec::new();
    let mut round: Vec<Fault> = Vec::new();
    loop {
        let calm = between(&mut random, settings.spacing);
        let left = until.saturating_duration_since(Instant::now());
        tokio::time::sleep(calm.min(left)).await;
        site.check()?;
        if left <= calm {
            return Ok(done);
        }
        if round.is_empty() {
            round = Fault::ALL.to_vec();
            round.shuffle(&mut random);
        }
        let Some(fault) = round.pop() else { continue };
        let down = between(&mut random, settings.outage);
        site.suffer(fault, down).await?;
        site.bridge_ready(fault).await?;
        done.push(fault);
    }
}

/// Waits until everything has arrived, or nothing arrives any more; then a little longer, for what
/// should not arrive.
async fn settle(settings: &Settings, site: &mut Site, book: &Book) -> io::Result<()> {
    let mut progress = book.progress();
    let mut since = Instant::now();
    while !book.is_settled() && since.elapsed() < settings.patience {
        // There is no event for it.
        tokio::time::sleep(Duration::from_millis(20)).await;
        site.check()?;
        let now = book.progress();
        if now != progress {
            (progress, since) = (now, Instant::now());
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    Ok(())
}

async fn connect(site: &Site, name: &str) -> io::Result<Client> {
    let options = site.options(name).session("soak").session_expiry(EXPIRY);
    Client::connect(options).await.map_err(io::Error::other)
}

async fn read_fabric(site: &Site, book: &Book) -> io::Result<AbortOnDropHandle<()>> {
    let client = connect(site, "reader").await?;
    let subscription = client.subscribe("site/soak/#").await;
    let mut subscription = subscription.map_err(io::Error::other)?;
    let book = book.clone();
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        let _client = client;
        while let Some(message) = subscription.next().await {
            book.arrive(Direction::Out, message.topic.as_str(), &message.payload);
        }
    })))
}

/// Starts a device on mosquitto; it is ready when this returns.
async fn device(
    site: &Site,
    settings: &Settings,
    id: &str,
    filter: Option<&str>,
    outgoing: mpsc::Receiver<Outgoing>,
    book: &Book,
) -> io::Result<[AbortOnDropHandle<()>; 2]> {
    let (news, mut told) = mpsc::channel(WINDOW);
    let device = Device::new(site.mqtt, id, settings.qos, filter, outgoing, news);
    let running = AbortOnDropHandle::new(tokio::spawn(device.run()));
    let ready = tokio::time::timeout(settings.patience, async {
        while let Some(news) = told.recv().await {
            if matches!(news, News::Ready) {
                return;
            }
        }
    });
    ready
        .await
        .map_err(|_| io::Error::other("no device can connect to mosquitto"))?;
    let book = book.clone();
    let noting = tokio::spawn(async move {
        while let Some(news) = told.recv().await {
            match news {
                News::Acknowledged(number) => book.acknowledge(Direction::In, number),
                News::Message(topic, payload) => book.arrive(Direction::In, &topic, &payload),
                News::Ready => {}
            }
        }
    });
    Ok([running, AbortOnDropHandle::new(noting)])
}

/// Messages to publish at each tick so that it comes to the rate.
struct Pace {
    rate: u64,
    ticks: u64,
    published: u64,
}

impl Pace {
    fn new(settings: &Settings) -> Self {
        Self {
            rate: settings.rate.into(),
            ticks: 0,
            published: 0,
        }
    }

    fn due(&mut self) -> u64 {
        self.ticks += 1;
        let target = self.ticks * self.rate * TICK.as_millis() as u64 / 1000;
        let due = target - self.published;
        self.published = target;
        due
    }
}

async fn publish_remote(
    settings: Settings,
    book: Book,
    to: mpsc::Sender<Outgoing>,
    enough: CancellationToken,
) {
    let mut tick = tokio::time::interval(TICK);
    let mut pace = Pace::new(&settings);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = enough.cancelled() => break,
        }
        for _ in 0..pace.due() {
            // While mosquitto is away its devices wait, and make up for it later.
            let Ok(room) = to.reserve().await else { return };
            let (number, payload) = book.publish(Direction::In, settings.payload);
            let topic = "soak/in".to_owned();
            room.send(Outgoing {
                number,
                topic,
                payload,
            });
        }
    }
    // The device works on what it has as long as it can be given more.
    to.closed().await;
}

type Answer = Pin<Box<dyn Future<Output = (u64, bool)> + Send>>;

async fn publish_fabric(settings: Settings, book: Book, client: Client, enough: CancellationToken) {
    let mut tick = tokio::time::interval(TICK);
    let mut pace = Pace::new(&settings);
    let mut waiting: FuturesUnordered<Answer> = FuturesUnordered::new();
    let mut due = 0;
    loop {
        let stopping = enough.is_cancelled();
        tokio::select! {
            _ = tick.tick(), if !stopping && due == 0 => due = pace.due(),
            answer = waiting.next(), if !waiting.is_empty() => {
                if let Some((number, true)) = answer {
                    book.acknowledge(Direction::Out, number);
                }
            }
            () = std::future::ready(()), if !stopping && due > 0 && waiting.len() < WINDOW => {
                due -= 1;
                let (number, payload) = book.publish(Direction::Out, settings.payload);
                let mut message = Publish::new("site/soak/out", payload).qos(Qos::AtLeastOnce);
                if settings.qos == 2 {
                    message = message.message_id(number.to_string());
                }
                let client = client.clone();
                let mut answer: Answer = Box::pin(async move {
                    (number, client.publish_message(message).await.is_ok())
                });
                // The client takes a message when its future is first polled, which settles the order.
                let at_once = poll_fn(|context| Poll::Ready(answer.as_mut().poll(context))).await;
                waiting.push(match at_once {
                    Poll::Ready(done) => Box::pin(std::future::ready(done)),
                    Poll::Pending => answer,
                });
            }
            () = enough.cancelled(), if !stopping => {}
            else => return std::future::pending().await,
        }
    }
}
