//! Attacks the delivery contract for as long as asked, with the `selvedge` binary beside this one.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

#[cfg(target_os = "linux")]
mod soak {
    use std::path::PathBuf;
    use std::process::ExitCode;
    use std::time::{Duration, Instant};

    use anyhow::Context as _;
    use clap::Parser;
    use selvedge_tests::checker::{Progress, Report, Settings, Span, check};
    use selvedge_tests::power::Fsync;
    use serde_json::{Value, json};

    /// At least so long between two lines of progress.
    const PROGRESS: Duration = Duration::from_secs(5);
    /// Longer than a busy machine ever stands still.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Publish numbered messages while the broker is killed, held, cut off and robbed of its power,
    /// and check that the delivery contract holds. Exit code: 0 it does, 1 it does not.
    #[derive(Debug, Parser)]
    struct Args {
        /// How long, such as `90s`, `10m` or `8h`; the round of faults begun by then is finished.
        #[arg(long, default_value = "10m", env = "SOAK_DURATION", value_parser = duration)]
        duration: Duration,
        /// Decides what is broken when. Default: a random one.
        #[arg(long, env = "SOAK_SEED")]
        seed: Option<u64>,
        /// Clients that publish.
        #[arg(long, default_value_t = 4)]
        publishers: usize,
        /// Topics of each.
        #[arg(long, default_value_t = 3)]
        topics: usize,
        /// Messages that each has on their way at a time.
        #[arg(long, default_value_t = 64)]
        window: usize,
        /// Clients that subscribe, each to everything; the last is away now and then.
        #[arg(long, default_value_t = 3)]
        readers: usize,
        /// Messages acknowledged at disk between two faults, at most.
        #[arg(long, default_value_t = 2000)]
        spacing: u64,
        /// The `selvedge` binary. Default: the one beside this program.
        #[arg(long, value_name = "FILE")]
        broker: Option<PathBuf>,
        /// The disk ignores fsync, so that messages must be lost: shows that the check can fail.
        #[arg(long)]
        lying_disk: bool,
        /// Write one JSON object for each line of progress and for the verdict.
        #[arg(long)]
        json: bool,
    }

    /// Runs the program.
    pub(crate) async fn run() -> anyhow::Result<ExitCode> {
        let args = Args::parse();
        selvedge_tests::log::init();
        let binary = match args.broker {
            Some(binary) => binary,
            None => std::env::current_exe()?.with_file_name("selvedge"),
        };
        anyhow::ensure!(
            binary.is_file(),
            "expected the selvedge binary at {}: build it, or name another with --broker",
            binary.display()
        );
        let settings = Settings {
            span: Span::For(args.duration),
            publishers: args.publishers.max(1),
            topics: args.topics.max(1),
            window: args.window.max(1),
            readers: args.readers.max(1),
            spacing: (args.spacing.max(10) / 10, args.spacing.max(10)),
            fsync: if args.lying_disk {
                Fsync::Lying
            } else {
                Fsync::Honest
            },
            patience: PATIENCE,
            ..Settings::new(binary, args.seed.unwrap_or_else(rand::random))
        };
        if args.json {
            println!("{}", json!({ "seed": settings.seed }));
        } else {
            println!("seed {}", settings.seed);
        }
        let started = Instant::now();
        let mut shown = started;
        let report = check(&settings, |progress| {
            if shown.elapsed() >= PROGRESS {
                shown = Instant::now();
                show(progress, started.elapsed(), args.json);
            }
        })
        .await
        .with_context(|| format!("seed {}", settings.seed))?;
        Ok(conclude(&report, args.json))
    }

    fn show(progress: &Progress, elapsed: Duration, as_json: bool) {
        if as_json {
            let mut line = numbers(progress);
            line["seconds"] = elapsed.as_secs().into();
            println!("{line}");
            return;
        }
        let counts = &progress.counts;
        println!(
            "{:5} s  {:9} published  {:9} acked at disk  {:10} delivered  {:7} owed  {:7} repeats  \
             {:5} refused  {:4} faults",
            elapsed.as_secs(),
            counts.published,
            counts.acked_disk,
            counts.delivered,
            counts.owed,
            counts.marked_repeats + counts.unmarked_repeats,
            counts.refused,
            progress.faults.values().sum::<u64>()
        );
    }

    fn numbers(progress: &Progress) -> Value {
        let counts = &progress.counts;
        json!({
            "published": counts.published,
            "acked_disk": counts.acked_disk,
            "acked_memory": counts.acked_memory,
            "refused": counts.refused,
            "delivered": counts.delivered,
            "marked_repeats": counts.marked_repeats,
            "unmarked_repeats": counts.unmarked_repeats,
            "owed": counts.owed,
            "violations": counts.violations,
            "faults": progress.faults,
        })
    }

    fn conclude(report: &Report, as_json: bool) -> ExitCode {
        let progress = Progress {
            counts: report.verdict.counts,
            faults: report.faults.clone(),
        };
        let kept = report.verdict.violations.is_empty();
        if as_json {
            let mut line = numbers(&progress);
            let violations = report.verdict.violations.iter();
            line["seed"] = report.seed.into();
            line["kept"] = kept.into();
            line["seconds"] = report.took.as_secs().into();
            line["unsynced_bytes"] = report.unsynced.into();
            line["skipped"] = report.no_power_cuts.clone().into();
            line["violated"] = violations.map(ToString::to_string).collect();
            line["evidence"] = report
                .evidence
                .as_ref()
                .map(|folder| folder.display().to_string())
                .into();
            println!("{line}");
            return code(kept);
        }
        show(&progress, report.took, false);
        for (kind, count) in &report.faults {
            println!("{count:9} {kind}");
        }
        match &report.no_power_cuts {
            Some(why) => println!("SKIPPED: no power was cut, only killed: {why}"),
            None => println!(
                "{} bytes were not fsynced when the power went",
                report.unsynced
            ),
        }
        for violation in &report.verdict.violations {
            println!("VIOLATED: {violation}");
        }
        if kept {
            println!("the delivery contract was kept");
        } else {
            println!(
                "the delivery contract was BROKEN, with seed {}",
                report.seed
            );
        }
        if let Some(folder) = &report.evidence {
            println!("the broker's log and store are in {}", folder.display());
        }
        code(kept)
    }

    fn code(kept: bool) -> ExitCode {
        if kept {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn duration(text: &str) -> Result<Duration, String> {
        let wrong = || format!("expected a number and s, m or h, found {text:?}");
        let unit = match text.chars().last() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            _ => return Err(wrong()),
        };
        let count: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
        let seconds = count.checked_mul(unit).ok_or_else(wrong)?;
        Ok(Duration::from_secs(seconds))
    }
}

#[cfg(target_os = "linux")]
#[tokio::main]
async fn main() -> ExitCode {
    let interrupted = tokio::signal::ctrl_c();
    let ended = tokio::select! {
        ended = Box::pin(soak::run()) => ended,
        // Nothing is left behind: the disk is unmounted as what uses it is dropped.
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
    eprintln!("expected Linux, whose signals and FUSE this needs");
    ExitCode::FAILURE
}
