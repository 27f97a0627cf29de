//! `selvedge bridge`: carry messages between MQTT brokers and the fabric until told to stop.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_bridge::{Bridge, BridgeConfig};
use serde_json::json;
use tracing::{error, info};

use crate::output;
use crate::signals::Signals;

/// `selvedge bridge`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge bridge --config bridge.toml --check
  selvedge bridge --config bridge.toml

Prints `admin=ADDRESS` if there is an admin listener, and `ready` once every remote is connected.
SIGTERM and SIGINT stop it gracefully, a second signal ends it at once. `selvedge broker --bridge
FILE` runs the same bridge inside a broker's process.")]
pub(crate) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration, name every problem, and connect to nothing.
    #[arg(long)]
    check: bool,
    /// With --check: write one JSON object.
    #[arg(long, requires = "check")]
    pub(crate) json: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = load(&args.config)?;
    if args.check {
        summary(&config, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut signals = Signals::listen()?;
    let bridge = tokio::select! {
        bridge = Box::pin(Bridge::start(config)) => bridge.context("start the bridge")?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    announce("admin", &bridge);
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

/// Reads a bridge's configuration; a failure names every problem.
pub(crate) fn load(file: &Path) -> anyhow::Result<BridgeConfig> {
    BridgeConfig::load(file).with_context(|| format!("check {}", file.display()))
}

/// Prints the address in use, for scripts. Nobody being there to read it is no reason to stop.
fn announce(name: &str, bridge: &Bridge) {
    if let Some(address) = bridge.admin() {
        let _ = output::line(format_args!("{name}={address}"));
    }
}

/// The bridges that run beside a broker in one process.
#[derive(Default)]
pub(crate) struct Beside(Vec<Bridge>);

impl Beside {
    /// Starts them all.
    pub(crate) async fn start(configs: Vec<BridgeConfig>) -> anyhow::Result<Self> {
        let mut bridges = Self::default();
        for config in configs {
            match Box::pin(Bridge::start(config)).await {
                Ok(bridge) => {
                    announce("bridge-admin", &bridge);
                    bridges.0.push(bridge);
                }
                Err(error) => {
                    bridges.shutdown().await;
                    return Err(error).context("start the bridge");
                }
            }
        }
        Ok(bridges)
    }

    /// Tells the log when the fabric turns one of them away. The broker goes on, and so do the others.
    pub(crate) async fn watch(&self) {
        let watched = self.0.iter().map(|bridge| async {
            let reason = bridge.closed().await;
            error!(%reason, "the fabric turned a bridge away; it carries nothing more");
        });
        futures_util::future::join_all(watched).await;
        std::future::pending::<()>().await;
    }

    /// Stops them all in good order.
    pub(crate) async fn shutdown(self) {
        let stopped = self.0.into_iter().map(Bridge::shutdown);
        futures_util::future::join_all(stopped).await;
    }
}

/// What a checked configuration says.
pub(crate) fn summary(config: &BridgeConfig, as_json: bool) -> std::io::Result<()> {
    if as_json {
        let remotes = config.remotes.iter();
        let remotes = remotes.map(|remote| {
            let rules = remote.rules.iter().map(ToString::to_string);
            json!({
                "name": remote.name,
                "host": remote.host,
                "port": remote.port,
                "version": remote.version.to_string(),
                "rules": rules.collect::<Vec<_>>(),
            })
        });
        return output::line(json!({
            "ok": true,
            "broker": config.fabric.broker,
            "store": config.store,
            "admin": config.admin,
            "remotes": remotes.collect::<Vec<_>>(),
        }));
    }
    output::line("ok")?;
    for remote in &config.remotes {
        let rules = remote.rules.len();
        output::line(format_args!("  remote {} with {rules} rules", remote.name))?;
    }
    match &config.store {
        Some(folder) => output::line(format_args!("  store  {}", folder.display())),
        None => {
            output::line("  no store: what is under way is only with the remotes and the fabric")
        }
    }
}
