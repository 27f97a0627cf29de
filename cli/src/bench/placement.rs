//! `selvedge bench placement`: ways of choosing a worker, simulated.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use selvedge_bench::placement::{self, Options};

use crate::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge bench placement --workers 5000 --utilisation 0.9

Nothing is measured: workers of different speed and their faults are simulated, and every policy
gets the same requests. Workers are of three classes (20, 50 and 120 ms), with two slots each; for
the middle half of the time 5 % are ten times slower, 5 % are dead and 2 % fail at once. The
fabric's policy is the code that the broker runs. The same seed gives the same table.")]
pub(super) struct Args {
    /// Workers of the model.
    #[arg(long, value_name = "N", default_value_t = Options::default().workers)]
    workers: usize,
    /// Requests under each policy.
    #[arg(long, value_name = "N", default_value_t = Options::default().requests)]
    requests: usize,
    /// Share of what all workers could do that is asked of them.
    #[arg(long, value_name = "SHARE", default_value_t = Options::default().utilisation)]
    utilisation: f64,
    /// Deadline of every request.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = crate::duration::parse)]
    deadline: std::time::Duration,
    /// No worker becomes slow, fails or dies.
    #[arg(long)]
    no_faults: bool,
    /// Decides everything.
    #[arg(long, value_name = "N", default_value_t = Options::default().seed)]
    seed: u64,
    /// Write one JSON object to standard output instead of a table.
    #[arg(long)]
    pub(super) json: bool,
    /// Write the table into this folder too, as `placement.md`.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let options = Options {
        workers: args.workers,
        requests: args.requests,
        utilisation: args.utilisation,
        deadline_ms: u64::try_from(args.deadline.as_millis()).unwrap_or(u64::MAX),
        faults: !args.no_faults,
        seed: args.seed,
    };
    let report = placement::run(&options, |outcome| {
        output::note(format_args!(
            "{}: {:.2} % had no answer in time",
            outcome.policy.name(),
            outcome.missed_percent()
        ));
    })?;
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let path = folder.join("placement.md");
        std::fs::write(&path, report.table())
            .with_context(|| format!("write {}", path.display()))?;
        output::note(format_args!("wrote {}", path.display()));
    }
    if args.json {
        output::line(serde_json::to_string(&report)?)?;
    } else {
        output::line(report.table())?;
    }
    Ok(ExitCode::SUCCESS)
}
