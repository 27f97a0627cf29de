//! `selvedge bridge`: carry messages between MQTT brokers and the fabric until told to stop.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_bridge::{Bridge, BridgeConfig};
use tracing::info;

use crate::output;
use crate::signals::Signals;

/// `selvedge bridge`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge bridge --config bridge.toml --check
  selvedge bridge --config bridge.toml

Prints `ready` once every remote is connected. SIGTERM and SIGINT stop it gracefully, a second
signal ends it at once.")]
pub(crate) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration, name every problem, and connect to nothing.
    #[arg(long)]
    check: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let file = args.config.display();
    let config = BridgeConfig::load(&args.config).with_context(|| format!("check {file}"))?;
    if args.check {
        output::line("ok")?;
        for remote in &config.remotes {
            let rules = remote.rules.len();
            output::line(format_args!("  remote {} with {rules} rules", remote.name))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut signals = Signals::listen()?;
    let bridge = tokio::select! {
        bridge = Box::pin(Bridge::start(config)) => bridge.context("start the bridge")?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let ended = {
        // A remote may come and go; only the first time that all are there is news.
        let ready = async {
            bridge.ready().await;
            let _ = output::line("ready");
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = signals.next() => None,
            reason = bridge.closed() => Some(reason),
            () = ready => None,
        }
    };
    info!("stopping; a second signal ends the bridge at once");
    signals.or_end_at_once(bridge.shutdown()).await;
    match ended {
        None => Ok(ExitCode::SUCCESS),
        Some(reason) => bail!("the fabric turned the bridge away: {reason}"),
    }
}
