//! Attacks a bridge between mosquitto and the fabric, with the `selvedge` binary beside this one.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

#[cfg(target_os = "linux")]
mod soak {
    use std::path::PathBuf;
    use std::process::ExitCode;
    use std::time::{Duration, SystemTime};

    use anyhow::Context as _;
    use clap::Parser;
    use selvedge_tests::bridging::{Flow, Report, Settings, mosquitto, soak};
    use serde_json::{Value, json};

    /// Publish numbered messages on both sides of a bridge while mosquitto, the fabric and the bridge
    /// are killed and restarted in turn, and check that nothing is lost, loops, or comes twice where
    /// the quality of service forbids it. Exit code: 0 it does not, 1 it does.
    #[derive(Debug, Parser)]
    struct Args {
        /// How long messages are published.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
        /// Messages a second, each way.
        #[arg(long, default_value_t = 1000)]
        rate: u32,
        /// Quality of service.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
        qos: u8,
        /// Version that bridge and mosquitto speak: 5, with one mapping both ways, or 3.1.1.
        #[arg(long, default_value = "5", value_parser = ["5", "3.1.1"])]
        mqtt: String,
        /// Decides what is broken when. Default: a random one.
        #[arg(long)]
        seed: Option<u64>,
        /// Most seconds between two faults.
        #[arg(long, default_value_t = 5)]
        spacing: u64,
        /// Most seconds that what was broken stays so.
        #[arg(long, default_value_t = 3)]
        outage: u64,
        /// The `selvedge` binary. Default: the one beside this program.
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
        /// Write one JSON object.
        #[arg(long)]
        json: bool,
    }

    /// Runs the program.
    pub(crate) async fn run() -> anyhow::Result<ExitCode> {
        let args = Args::parse();
        selvedge_tests::log::init();
        let binary = match args.binary {
            Some(binary) => binary,
            None => std::env::current_exe()?.with_file_name("selvedge"),
        };
        anyhow::ensure!(
            binary.is_file(),
            "expected the selvedge binary at {}: build it, or name another with --binary",
            binary.display()
        );
        let mosquitto = mosquitto().context("mosquitto is not installed")?;
        let seed = args.seed.unwrap_or_else(rand::random);
        let settings = Settings {
            time: Duration::from_secs(args.seconds),
            rate: args.rate.max(1),
            v5: args.mqtt == "5",
            spacing: (
                Duration::from_millis(500),
                Duration::from_secs(args.spacing),
            ),
            outage: (Duration::from_millis(50), Duration::from_secs(args.outage)),
            ..Settings::new(binary, seed, args.qos)
        };
        if !args.json {
            println!("seed {seed}");
        }
        let report = soak(&settings, &mosquitto).await;
        let report = report.with_context(|| format!("seed {seed}"))?;
        show(&settings, &report, args.json);
        Ok(match report.kept() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }

    fn flow(flow: &Flow) -> Value {
        let millis = |quantile| flow.latency.value_at_quantile(quantile) as f64 / 1000.0;
        json!({
            "published": flow.published,
            "acknowledged": flow.acknowledged,
            "delivered": flow.delivered,
            "duplicates": flow.repeats,
            "times_taken_back": flow.rewinds,
            "repeated_at_home": flow.came_back,
            "latency_ms": { "p50": millis(0.5), "p99": millis(0.99), "max": millis(1.0) },
        })
    }

    fn show(settings: &Settings, report: &Report, as_json: bool) {
        let [inward, outward] = &report.flows;
        let violations = report.violations.iter();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let line = json!({
            "kept": report.kept(),
            "seed": settings.seed,
            "unix_time": now.unwrap_or_default().as_secs(),
            "qos": settings.qos,
            "mqtt": if settings.v5 { "5" } else { "3.1.1" },
            "seconds": settings.time.as_secs(),
            "took_seconds": report.took.as_secs(),
            "rate_each_way": settings.rate,
            "payload_bytes": settings.payload,
            "debug_build": cfg!(debug_assertions),
            "faults": report.faults,
            "fault_count": report.faults.values().sum::<u64>(),
            "remote_to_fabric": flow(inward),
            "fabric_to_remote": flow(outward),
            "strange": report.strange,
            "violated": violations.map(ToString::to_string).collect::<Vec<_>>(),
            "bridge": report.bridge,
            "evidence": report.evidence.as_ref().map(|folder| folder.display().to_string()),
        });
        if as_json {
            println!("{line}");
            return;
        }
        println!("{line:#}");
        println!(
            "{}",
            match report.kept() {
                true => "every promise was kept",
                false => "a promise was BROKEN",
            }
        );
    }
}

#[cfg(target_os = "linux")]
#[tokio::main]
async fn main() -> ExitCode {
    let interrupted = tokio::signal::ctrl_c();
    let ended = tokio::select! {
        ended = Box::pin(soak::run()) => ended,
        // The processes end as what holds them is dropped.
        _ = interrupted => Err(anyhow::anyhow!("it was interrupted")),
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("no verdict: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("expected Linux, whose signals this needs");
    ExitCode::FAILURE
}
