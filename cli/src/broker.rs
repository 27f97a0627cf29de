//! `selvedge broker`: run a broker until it is told to stop.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_broker::{Addresses, Config, ConfigErrors, Server};
use serde_json::json;
use tracing::{error, info};

use crate::bridge;
use crate::output::{self, Problems};
use crate::signals::{Asked, Signals};

/// `selvedge broker`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge broker --config broker.toml --check
  selvedge broker --config broker.toml

Prints the addresses in use, such as quic=0.0.0.0:7443, and then `ready`. SIGTERM and SIGINT stop
it gracefully: clients are told, and what is queued for them is sent. A second signal ends it at
once. SIGHUP reads policy, certificate, trust and revocations again: only who holds a revoked
certificate is disconnected.")]
pub(crate) struct Args {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Run a bridge with this configuration in the same process; may be given several times.
    #[arg(long, value_name = "FILE")]
    bridge: Vec<PathBuf>,
    /// Check the configuration, name every problem, and start nothing.
    #[arg(long)]
    check: bool,
    /// With --check: write one JSON object.
    #[arg(long, requires = "check")]
    pub(crate) json: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = load(&args.config)?;
    let bridges = args.bridge.iter().map(|file| bridge::load(file));
    let bridges = bridges.collect::<anyhow::Result<Vec<_>>>()?;
    if args.check {
        summary(&config, args.json)?;
        for config in bridges.iter().filter(|_| !args.json) {
            bridge::summary(config, args.json)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut signals = Signals::listen()?;
    let mut server = Box::pin(Server::bind(config))
        .await
        .context("start the broker")?;
    announce(&server.addresses());
    let bridges = tokio::select! {
        started = bridge::Beside::start(bridges) => match started {
            Ok(bridges) => bridges,
            Err(error) => {
                server.shutdown().await;
                return Err(error);
            }
        },
        _ = signals.next() => {
            signals.or_end_at_once(server.shutdown()).await;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let _ = output::line("ready");

    let failed = loop {
        let asked = tokio::select! {
            asked = signals.next_or_reload() => asked,
            () = server.join() => break true,
            () = bridges.watch() => continue,
        };
        match asked {
            Asked::Stop => break false,
            Asked::Reload => reload(&server, &args.config),
        }
    };
    info!("stopping; a second signal ends the broker at once");
    signals
        .or_end_at_once(async {
            bridges.shutdown().await;
            server.shutdown().await;
        })
        .await;
    if failed {
        bail!("a listener ended by itself, so the broker stopped; its log says why");
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes over what may change in a running broker. With a problem in the configuration nothing does.
pub(crate) fn reload(server: &Server, file: &Path) {
    reload_with(server, file, |_| Ok(()));
}

/// As [`reload`], with changes to what the file says.
pub(crate) fn reload_with(
    server: &Server,
    file: &Path,
    change: impl FnOnce(&mut Config) -> anyhow::Result<()>,
) {
    let loaded = load(file).and_then(|mut config| {
        change(&mut config)?;
        Ok(config)
    });
    match loaded {
        Ok(config) => {
            server.reload(config);
        }
        Err(error) => {
            error!(
                error = format!("{error:#}"),
                "the configuration was not reloaded"
            );
        }
    }
}

/// Reads a broker's configuration; a failure names every problem.
pub(crate) fn load(file: &Path) -> anyhow::Result<Config> {
    Config::load(file).map_err(|ConfigErrors(problems)| {
        Problems {
            file: file.display().to_string(),
            problems: problems
                .into_iter()
                .map(|problem| (problem.key, problem.problem))
                .collect(),
        }
        .into()
    })
}

/// Prints the addresses in use, a line each, for scripts. Nobody being there to read them is no
/// reason to stop.
pub(crate) fn announce(addresses: &Addresses) {
    let known = [
        ("quic", addresses.quic),
        ("mqtt", addresses.mqtt),
        ("mqtts", addresses.mqtts),
        ("ws", addresses.ws),
        ("wss", addresses.wss),
        ("grpc", addresses.grpc),
        ("grpcs", addresses.grpcs),
        ("http", addresses.http),
        ("https", addresses.https),
        ("admin", addresses.admin),
    ];
    for (name, address) in known {
        if let Some(address) = address {
            let _ = output::line(format_args!("{name}={address}"));
        }
    }
}

fn summary(config: &Config, json: bool) -> std::io::Result<()> {
    let plaintext = config.mqtt.danger_plaintext.as_ref();
    if json {
        return output::line(json!({
            "ok": true,
            "name": config.name,
            "identity": config.credentials.identity().to_string(),
            "quic": config.quic,
            "mqtt": plaintext.map(|(address, _)| address),
            "mqtts": config.mqtt.tls,
            "ws": config.mqtt.danger_ws.as_ref().map(|(address, _)| address),
            "wss": config.mqtt.wss,
            "grpc": config.front.danger_plaintext_grpc,
            "grpcs": config.front.grpc,
            "http": config.front.danger_plaintext_http,
            "https": config.front.http,
            "admin": config.admin,
        }));
    }
    output::line("ok")?;
    output::line(format_args!(
        "  broker     {} ({})",
        config.name,
        config.credentials.description()
    ))?;
    for authority in config.trust.subjects() {
        output::line(format_args!("  trusts     {authority}"))?;
    }
    if config.trust.revoked() > 0 {
        output::line(format_args!("  revoked    {}", config.trust.revoked()))?;
    }
    if let Some(address) = config.quic {
        output::line(format_args!("  quic       {address}"))?;
    }
    if let Some(address) = config.mqtt.tls {
        let passwords = match &config.mqtt.passwords {
            Some(_) => "client certificate, or user name and password",
            None => "client certificate",
        };
        output::line(format_args!("  mqtt, TLS  {address} ({passwords})"))?;
    }
    if let Some((address, identity)) = plaintext {
        output::line(format_args!(
            "  mqtt       {address} (in the clear: everyone is {identity})"
        ))?;
    }
    let front = &config.front;
    let proof = match &front.tokens {
        Some(tokens) => format!("client certificate, or one of {} tokens", tokens.len()),
        None => "client certificate".to_owned(),
    };
    for (name, address) in [("gRPC, TLS ", front.grpc), ("HTTP, TLS ", front.http)] {
        if let Some(address) = address {
            output::line(format_args!("  {name} {address} ({proof})"))?;
        }
    }
    for (name, address) in [
        ("gRPC      ", front.danger_plaintext_grpc),
        ("HTTP      ", front.danger_plaintext_http),
    ] {
        if let Some(address) = address {
            output::line(format_args!(
                "  {name} {address} (in the clear: bearer tokens)"
            ))?;
        }
    }
    if let Some(address) = config.admin {
        output::line(format_args!("  admin      {address}"))?;
    }
    Ok(())
}
