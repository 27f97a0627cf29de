//! `selvedge worker`: answer inference requests with ONNX models until told to stop.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_worker::{Worker, WorkerConfig, WorkerOptions};
use tracing::info;

use crate::output;
use crate::signals::Signals;

/// `selvedge worker`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge worker --config worker.toml --check
  selvedge worker --config worker.toml

Prints `ready` once the broker has taken every model. SIGTERM and SIGINT stop it gracefully, a
second signal ends it at once.")]
pub(crate) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration, load its certificates and models, and connect to nothing.
    #[arg(long)]
    check: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let file = args.config.display();
    let config = WorkerConfig::load(&args.config).with_context(|| format!("check {file}"))?;
    let options = Box::pin(WorkerOptions::load(&config))
        .await
        .with_context(|| format!("load what {file} names"))?;
    if args.check {
        output::line("ok")?;
        for model in &config.models {
            output::line(format_args!(
                "  model {} version {} at tier {} with {} slots",
                model.name, model.version, config.tier, model.slots
            ))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut signals = Signals::listen()?;
    let mut worker = tokio::select! {
        worker = Box::pin(Worker::start(options)) => worker.context("start the worker")?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let _ = output::line("ready");
    let ended = tokio::select! {
        () = signals.next() => false,
        () = worker.ended() => true,
    };
    info!("stopping; a second signal ends the worker at once");
    signals.or_end_at_once(worker.shutdown()).await;
    if ended {
        bail!(
            "a model is no longer offered: the broker withdrew its permission or closed the connection for good"
        );
    }
    Ok(ExitCode::SUCCESS)
}
