//! One subscriber that never reads, at full publish rate: what the others and the broker's memory
//! notice of it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use clap::Parser;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use selvedge_client::{Client, Options};
use selvedge_proto::wire;
use selvedge_tests::broker::OPEN;
use selvedge_tests::pki::SERVER_NAME;
use selvedge_tests::raw::{RawControl, control_frame, quic_config};
use selvedge_tests::{RawQuic, TestPki};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// Messages that the publisher is ahead of the reader, at most: no more than a queue holds, so that
/// nothing is dropped for the reader.
const WINDOW: u64 = 4096;
const PAYLOAD: usize = 256;
const EXPLAIN: &str = r#"
[[rule]]
name = "everyone may ask"
identities = ["*/*/*"]
allow = ["call"]
subjects = ["$SYS/explain"]
"#;
const WARM_UP: Duration = Duration::from_secs(2);

/// Measure a publisher and a reader at full rate, alone and beside a subscriber that never reads.
#[derive(Debug, Parser)]
struct Args {
    /// Seconds with the slow subscriber; a third of it is measured before without.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The `selvedge` binary. Default: the one beside this program.
    #[arg(long, value_name = "FILE")]
    broker: Option<PathBuf>,
}

/// The broker, killed when dropped.
struct Broker {
    process: Child,
    quic: std::net::SocketAddr,
}

impl Broker {
    async fn start(binary: &Path, folder: &Path, pki: &TestPki) -> anyhow::Result<Self> {
        let identity = pki.server_files();
        let config = format!(
            "[identity]\ncert = {:?}\nkey = {:?}\ntrust = {:?}\n[policy]\nfile = \"policy.toml\"\n\
             [listen]\nquic = \"127.0.0.1:0\"\n",
            identity.cert, identity.key, identity.ca
        );
        // A wildcard does not reach the broker's own services.
        std::fs::write(folder.join("policy.toml"), OPEN.to_owned() + EXPLAIN)?;
        let path = folder.join("broker.toml");
        std::fs::write(&path, config)?;
        let mut process = Command::new(binary)
            .arg("broker")
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        let stdout = process.stdout.take().context("its output was asked for")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut quic = None;
        while let Some(line) = lines.next_line().await? {
            if let Some(address) = line.strip_prefix("quic=") {
                quic = Some(address.parse()?);
            }
            if line == "ready" {
                break;
            }
        }
        // It may write to it for as long as it lives.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let quic = quic.context("the broker ended before it was ready")?;
        Ok(Self { process, quic })
    }

    /// Its memory, in KiB.
    fn rss(&self) -> anyhow::Result<u64> {
        let id = self.process.id().context("the broker has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let text = line.context("no VmRSS in /proc")?;
        Ok(text.trim().trim_end_matches("kB").trim().parse()?)
    }

    fn options(&self, pki: &TestPki, name: &str) -> anyhow::Result<Options> {
        let address = format!("{SERVER_NAME}:{}", self.quic.port());
        Ok(Options::new(&address)?
            .resolve(self.quic)
            .credentials(pki.device("acme", "plant-1", name))
            .trust(pki.anchors()))
    }
}

/// What one phase measured.
struct Phase {
    latencies: Histogram<u64>,
    deliveries: u64,
    time: Duration,
    rss: (u64, u64),
}

impl Phase {
    fn json(&self) -> Value {
        let ms = |quantile| self.latencies.value_at_quantile(quantile) as f64 / 1000.0;
        json!({
            "deliveries_per_s": (self.deliveries as f64 / self.time.as_secs_f64()).round(),
            "p50_ms": ms(0.5),
            "p99_ms": ms(0.99),
            "p999_ms": ms(0.999),
            "rss_kib": {"first": self.rss.0, "most": self.rss.1},
        })
    }
}

/// The reader's side of the measurement.
struct Reader {
    received: AtomicU64,
    latencies: Mutex<Histogram<u64>>,
}

fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000, 3)?)
}

async fn measure(broker: &Broker, reader: &Reader, time: Duration) -> anyhow::Result<Phase> {
    let before = reader.received.load(Ordering::Relaxed);
    *reader.latencies.lock() = histogram()?;
    let started = Instant::now();
    let first = broker.rss()?;
    let mut most = first;
    while started.elapsed() < time {
        tokio::time::sleep(Duration::from_secs(1)).await;
        most = most.max(broker.rss()?);
        let received = reader.received.load(Ordering::Relaxed) - before;
        let rate = received as f64 / started.elapsed().as_secs_f64();
        eprintln!(
            "{:>4.0} s  {rate:>9.0} deliveries/s  {:>8} KiB",
            started.elapsed().as_secs_f64(),
            broker.rss()?
        );
    }
    Ok(Phase {
        latencies: reader.latencies.lock().clone(),
        deliveries: reader.received.load(Ordering::Relaxed) - before,
        time: started.elapsed(),
        rss: (first, most),
    })
}

/// Publishes for ever, never further ahead of the reader than the window.
async fn publish(client: Client, reader: Arc<Reader>, epoch: Instant) -> anyhow::Result<()> {
    let mut sent = 0u64;
    loop {
        if sent.saturating_sub(reader.received.load(Ordering::Relaxed)) >= WINDOW {
            tokio::task::yield_now().await;
            continue;
        }
        let mut payload = vec![0; PAYLOAD];
        let stamp = epoch.elapsed().as_micros() as u64;
        payload[..8].copy_from_slice(&stamp.to_be_bytes());
        client.publish("line/1", payload).await?;
        sent += 1;
    }
}

async fn read(client: Client, reader: Arc<Reader>, epoch: Instant) -> anyhow::Result<()> {
    let mut messages = client.subscribe("line/#").await?;
    while let Some(message) = messages.next().await {
        let stamp = message.payload.first_chunk().context("a stamp")?;
        let now = epoch.elapsed().as_micros() as u64;
        let latency = now.saturating_sub(u64::from_be_bytes(*stamp));
        reader.latencies.lock().saturating_record(latency.max(1));
        reader.received.fetch_add(1, Ordering::Relaxed);
    }
    Err(anyhow!("the subscription ended"))
}

/// Subscribes and never reads a byte of what comes.
async fn never_read(broker: &Broker, pki: &TestPki) -> anyhow::Result<(RawQuic, RawControl)> {
    let config = quic_config(pki.device("acme", "plant-1", "slow"), &pki.anchors());
    let raw = RawQuic::connect(broker.quic, config).await?;
    let mut control = raw.greet("slow").await?;
    let subscribe = wire::control::Frame::Subscribe(wire::Subscribe {
        request_id: 1,
        subscriptions: vec![wire::Subscription {
            id: 1,
            filter: "line/#".to_owned(),
            ..Default::default()
        }],
    });
    control.write(&control_frame(subscribe)).await?;
    control.read().await?;
    Ok((raw, control))
}

async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let binary = match args.broker {
        Some(binary) => binary,
        None => std::env::current_exe()?.with_file_name("selvedge"),
    };
    ensure!(
        binary.is_file(),
        "expected the selvedge binary at {}: build it, or name another with --broker",
        binary.display()
    );
    let (pki, folder) = (TestPki::new(), tempfile::tempdir()?);
    let broker = Broker::start(&binary, folder.path(), &pki).await?;
    let reader = Arc::new(Reader {
        received: AtomicU64::new(0),
        latencies: Mutex::new(histogram()?),
    });
    let epoch = Instant::now();
    let subscriber = Client::connect(broker.options(&pki, "reader")?).await?;
    let publisher = Client::connect(broker.options(&pki, "writer")?).await?;
    let reading = tokio::spawn(read(subscriber, Arc::clone(&reader), epoch));
    let publishing = tokio::spawn(publish(publisher.clone(), Arc::clone(&reader), epoch));
    let phases = async {
        let time = Duration::from_secs(args.seconds);
        measure(&broker, &reader, WARM_UP).await?;
        let before = measure(&broker, &reader, time / 3).await?;
        let slow = never_read(&broker, &pki).await?;
        // Its queue and its flow control windows fill once; that is its share of memory.
        measure(&broker, &reader, WARM_UP).await?;
        let beside = measure(&broker, &reader, time).await?;
        drop(slow);
        anyhow::Ok((before, beside))
    };
    let (before, beside) = tokio::select! {
        phases = phases => phases?,
        ended = reading => return Err(ended?.expect_err("it reads for ever")),
        ended = publishing => return Err(ended?.expect_err("it publishes for ever")),
    };
    let question = json!({"query": "slow", "limit": 50}).to_string();
    let answer = publisher.call("$SYS/explain", question).await?;
    let answer: Value = serde_json::from_slice(&answer)?;
    let records = answer["records"].as_array().into_iter().flatten();
    let explained = records
        .into_iter()
        .find(|record| record["reason"] == "queue_full")
        .cloned()
        .unwrap_or_default();
    let result = json!({
        "before": before.json(),
        "beside_a_subscriber_that_never_reads": beside.json(),
        "explained": explained,
    });
    println!("{}", serde_json::to_string_pretty(&result)?);
    let flat = beside.rss.1 <= beside.rss.0 + beside.rss.0 / 4;
    if !flat {
        eprintln!("the broker's memory grew: {:?} KiB", beside.rss);
    }
    let told = explained["reason"] == "queue_full";
    if !told {
        eprintln!("expected an explanation of the drops, found {explained}");
    }
    Ok(if flat && told {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(run(Args::parse())).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
