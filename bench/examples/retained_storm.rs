//! What live traffic feels when many clients subscribe to everything that is retained at once.
//!
//! `cargo run --release -p selvedge-bench --example retained_storm -- [MESSAGES] [CLIENTS]`, 100,000 and
//! 200 unless given. The broker, the clients of the storm and the live pair are processes of their own;
//! the storm's runs at the lowest priority, so that it takes no time from the broker.

#![allow(clippy::print_stdout, reason = "it reports on its output")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use selvedge_broker::policy::Policy;
use selvedge_broker::{Config, Server};
use selvedge_certs::{Authority, Credentials, IssueRequest, Overwrite, TrustAnchors};
use selvedge_client::{Client, Options, Publish, Qos, SubscribeOptions, Subscription};
use tokio::task::JoinSet;

const POLICY: &str = r##"
[[rule]]
name = "everyone"
identities = ["*/*/*"]
allow = ["publish", "subscribe"]
subjects = ["#"]
"##;

/// Live messages a second. Timers have a resolution of a millisecond; at a rate that is no multiple of it
/// they are late by every part of one in turn, so that one run compares with another.
const RATE: u32 = 997;

/// How long the live pair is measured alone.
const ALONE: Duration = Duration::from_secs(5);

/// A storm that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes of a message.
const PAYLOAD: usize = 100;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["broker", folder] => broker(Path::new(folder)).await,
        ["readers", folder, address, messages, clients] => {
            let (messages, clients) = (messages.parse()?, clients.parse()?);
            readers(Path::new(folder), address, messages, clients).await
        }
        [] => storm(100_000, 200).await,
        [messages] => storm(messages.parse()?, 200).await,
        [messages, clients] => storm(messages.parse()?, clients.parse()?).await,
        _ => bail!("expected [MESSAGES] [CLIENTS]"),
    }
}

/// Prepares, measures alone, measures in the storm, and reports.
async fn storm(messages: usize, clients: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let authority = Authority::init(folder.path(), "storm.example", Overwrite::No)?;
    let server = IssueRequest::server("acme", "site", "broker").dns("localhost");
    for request in [server, IssueRequest::client("acme", "site", "device")] {
        authority.issue_into(folder.path(), &request, Overwrite::Yes)?;
    }
    let mut broker = Process::start(&[], "broker", &[&folder.path().display().to_string()])?;
    let address = broker.line()?;
    println!("{messages} retained messages of {PAYLOAD} bytes, {clients} clients, {RATE} live/s");

    let keeper = connect(folder.path(), &address, "keeper").await?;
    let mut publishing = JoinSet::new();
    for line in 0..100 {
        let keeper = keeper.clone();
        publishing.spawn(async move {
            for number in (line..messages).step_by(100) {
                let topic = format!("plant/line-{line}/sensor-{number}");
                let message = Publish::new(topic, vec![7u8; PAYLOAD]);
                let message = message.qos(Qos::AtLeastOnce).retain(true);
                keeper.publish_message(message).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(published) = publishing.join_next().await {
        published??;
    }
    keeper.close().await;
    println!("before: broker at {} MiB", broker.memory()?);

    let mut live = Live::start(folder.path(), &address).await?;
    live.run(ALONE).await?;
    live.samples.clear();
    live.run(ALONE).await?;
    let before = live.report("alone");

    let place = folder.path().display().to_string();
    let (messages, clients) = (messages.to_string(), clients.to_string());
    let arguments = [place.as_str(), &address, &messages, &clients];
    let mut readers = Process::start(&["nice", "-n", "19"], "readers", &arguments)?;
    ensure!(
        readers.line()? == "connected",
        "the readers did not connect"
    );
    live.run(Duration::from_secs(2)).await?;
    live.report("with idle clients");
    readers.go()?;
    let (done, mut is_done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || done.send(readers.line()));
    let (started, mut most) = (Instant::now(), 0);
    let outcome = loop {
        live.run(Duration::from_millis(200)).await?;
        most = most.max(broker.memory()?);
        match is_done.try_recv() {
            Ok(outcome) => break outcome?,
            Err(_) if started.elapsed() > PATIENCE => bail!("the storm has not ended in time"),
            Err(_) => {}
        }
    };
    let took = started.elapsed();
    let during = live.report("in the storm");
    println!(
        "storm: {outcome}, {:.1} s, broker at most {most} MiB",
        took.as_secs_f64()
    );
    println!(
        "p50 x {:.2}, p99 x {:.2}",
        during.0.as_secs_f64() / before.0.as_secs_f64(),
        during.1.as_secs_f64() / before.1.as_secs_f64()
    );
    live.run(Duration::from_secs(2)).await?;
    live.report("after");
    Ok(())
}

/// The broker's process: prints its address, and runs until its input ends.
async fn broker(folder: &Path) -> Result<()> {
    let config = Config::new(
        credentials(folder, "broker")?,
        TrustAnchors::from_file(&folder.join("ca.pem"))?,
        Policy::parse(POLICY)?,
    );
    let server = Server::bind(config).await?;
    println!("{}", server.addresses().quic.context("a QUIC listener")?);
    input_ends().await;
    server.shutdown().await;
    Ok(())
}

/// The process of the storm: connects, waits for a line, subscribes, and says when all have all.
async fn readers(folder: &Path, address: &str, messages: usize, clients: usize) -> Result<()> {
    let mut connected = Vec::new();
    for number in 0..clients {
        connected.push(connect(folder, address, &format!("reader-{number}")).await?);
    }
    println!("connected");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    tokio::spawn(async {
        // Whoever measures has given up.
        input_ends().await;
        std::process::exit(1);
    });
    let mut reading = JoinSet::new();
    for client in connected {
        reading.spawn(async move {
            let mut subscription = client.subscribe("plant/#").await?;
            for _ in 0..messages {
                subscription.next().await.context("it has ended")?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(read) = reading.join_next().await {
        read??;
    }
    println!("all {clients} have all {messages}");
    Ok(())
}

/// A publisher and a subscriber of one topic.
struct Live {
    publisher: Client,
    subscription: Subscription,
    _subscriber: Client,
    origin: Instant,
    samples: Vec<Duration>,
}

impl Live {
    async fn start(folder: &Path, address: &str) -> Result<Self> {
        let subscriber = connect(folder, address, "live-subscriber").await?;
        let options = SubscribeOptions {
            max_qos: Qos::AtMostOnce,
            ..SubscribeOptions::default()
        };
        Ok(Self {
            subscription: subscriber.subscribe_with("live", options).await?,
            _subscriber: subscriber,
            publisher: connect(folder, address, "live-publisher").await?,
            origin: Instant::now(),
            samples: Vec::new(),
        })
    }

    /// Publishes at the fixed rate for so long, and takes note of how long each message takes from
    /// when it was due, so that a stall counts for all that it held up.
    async fn run(&mut self, time: Duration) -> Result<()> {
        let count = (time.as_secs_f64() * f64::from(RATE)) as u32;
        let publisher = self.publisher.clone();
        let (origin, start) = (self.origin, Instant::now());
        let publishing = tokio::spawn(async move {
            for number in 0..count {
                let due = start + Duration::from_secs(1) / RATE * number;
                tokio::time::sleep_until(due.into()).await;
                let due = (due - origin).as_nanos() as u64;
                publisher
                    .publish("live", due.to_be_bytes().to_vec())
                    .await?;
            }
            anyhow::Ok(())
        });
        for _ in 0..count {
            let next = tokio::time::timeout(Duration::from_secs(10), self.subscription.next());
            let message = next.await.context("a live message is lost")?;
            let message = message.context("the live subscription ended")?;
            let due = u64::from_be_bytes(message.payload[..].try_into()?);
            let late = self
                .origin
                .elapsed()
                .saturating_sub(Duration::from_nanos(due));
            self.samples.push(late);
        }
        publishing.await?
    }

    /// Prints median and 99th percentile of the samples so far, and forgets them.
    fn report(&mut self, when: &str) -> (Duration, Duration) {
        let mut samples = std::mem::take(&mut self.samples);
        samples.sort_unstable();
        let at = |part: f64| samples[((samples.len() - 1) as f64 * part) as usize];
        let (median, tail) = (at(0.5), at(0.99));
        println!(
            "live {when}: p50 {median:?}, p99 {tail:?}, p99.9 {:?}, max {:?} of {}",
            at(0.999),
            at(1.0),
            samples.len()
        );
        (median, tail)
    }
}

/// A process of this program.
struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<std::process::ChildStdout>,
}

impl Process {
    fn start(prefix: &[&str], role: &str, arguments: &[&str]) -> Result<Self> {
        let program = std::env::current_exe()?;
        let program = program.to_str().context("a path in UTF-8")?;
        let words: Vec<&str> = prefix.iter().copied().chain([program, role]).collect();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().context("its output")?),
            child,
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "a process has ended");
        Ok(line.trim().to_owned())
    }

    fn go(&mut self) -> Result<()> {
        use std::io::Write as _;
        let input = self.input.as_mut().context("its input")?;
        Ok(input.write_all(b"go\n")?)
    }

    /// Resident memory in MiB.
    fn memory(&self) -> Result<usize> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: usize = line
            .context("VmRSS")?
            .trim()
            .trim_end_matches(" kB")
            .parse()?;
        Ok(kib / 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.input.take());
        if std::thread::panicking() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

async fn connect(folder: &Path, address: &str, session: &str) -> Result<Client> {
    let port = address.rsplit_once(':').context("a port")?.1;
    let options = Options::new(&format!("localhost:{port}"))?
        .resolve(address.parse()?)
        .credentials(credentials(folder, "device")?)
        .trust(TrustAnchors::from_file(&folder.join("ca.pem"))?)
        .session(session)
        .connect_timeout(Duration::from_secs(30))
        .idle_timeout(Duration::from_secs(60));
    Ok(Client::connect(options).await?)
}

fn credentials(folder: &Path, name: &str) -> Result<Credentials> {
    let folder = folder.join("acme/site").join(name);
    Ok(Credentials::from_files(
        &folder.join("cert.pem"),
        &folder.join("key.pem"),
    )?)
}

async fn input_ends() {
    let ended = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        while std::io::stdin()
            .lock()
            .read_line(&mut line)
            .is_ok_and(|read| read > 0)
        {}
    });
    let _ = ended.await;
}
