//! `selvedge dev`: a local fabric that stays up for trying things.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_broker::{Addresses, BindError};
use tracing::info;

use crate::fabric::{self, Fabric, Folder, Listeners, reachable};
use crate::signals::{Asked, Signals};
use crate::{broker, output};

/// Where a client connects to unless told otherwise.
const DEFAULT_QUIC: &str = "127.0.0.1:7443";

/// `selvedge dev`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge dev
  selvedge dev --dir /tmp/fabric --quic 127.0.0.1:0 --mqtt 127.0.0.1:0 \\
    --mqtts 127.0.0.1:0 --admin 127.0.0.1:0

Prints lines such as quic=127.0.0.1:7443, then `ready`, then commands to paste. The folder holds
the certificates (pki/), policy.toml and broker.toml, which are made once and then kept: edit them
as you like. Port 0 is any that is free. Stops on SIGTERM and SIGINT.")]
pub(crate) struct Args {
    /// Folder of the fabric; made if need be. Default: selvedge/dev in $XDG_STATE_HOME or
    /// ~/.local/state, where client commands find it by themselves.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The broker's configuration. Default: DIR/broker.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address for native clients, in place of the configuration's 127.0.0.1:7443.
    #[arg(long, value_name = "ADDRESS")]
    quic: Option<SocketAddr>,
    /// Address for MQTT in the clear, in place of the configuration's 127.0.0.1:1883.
    #[arg(long, value_name = "ADDRESS")]
    mqtt: Option<SocketAddr>,
    /// Address for MQTT over TLS, in place of the configuration's 127.0.0.1:8883.
    #[arg(long, value_name = "ADDRESS")]
    mqtts: Option<SocketAddr>,
    /// Address for MQTT over WebSocket in the clear, which is off unless given here or in the
    /// configuration, as danger_ws.
    #[arg(long, value_name = "ADDRESS")]
    ws: Option<SocketAddr>,
    /// Address for MQTT over WebSocket and TLS, which is off unless given here or in the configuration.
    #[arg(long, value_name = "ADDRESS")]
    wss: Option<SocketAddr>,
    /// Address of the admin page, in place of the configuration's 127.0.0.1:9443.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Address for applications that speak the Open Inference Protocol over gRPC, such as Triton's
    /// clients: in the clear, on loopback, with the bearer token of DIR/token.
    #[arg(long, value_name = "ADDRESS", value_parser = loopback)]
    grpc: Option<SocketAddr>,
    /// Address for applications that speak it over HTTP, or the OpenAI API; as --grpc.
    #[arg(long, value_name = "ADDRESS", value_parser = loopback)]
    http: Option<SocketAddr>,
    /// Start no inference workers.
    #[arg(long)]
    no_workers: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let dir = args.dir.clone().unwrap_or_else(fabric::default_dir);
    let prepare = move || Folder::prepare(&dir, fabric::POLICY);
    let folder = tokio::task::spawn_blocking(prepare)
        .await
        .context("prepare the folder")??;
    let file = args.config.unwrap_or_else(|| folder.broker_toml());
    let mut config = broker::load(&file)?;
    let listeners = Listeners {
        quic: args.quic,
        mqtt: args.mqtt,
        mqtts: args.mqtts,
        ws: args.ws,
        wss: args.wss,
        admin: args.admin,
        grpc: args.grpc,
        http: args.http,
    };
    listeners.apply(&mut config, &folder)?;
    let mut fabric = Fabric::start(config).await.inspect_err(|error| {
        if error.is::<BindError>() {
            output::note(
                "hint: another port can be given by flag, and 0 is any that is free: \
                 selvedge dev --mqtt 127.0.0.1:0",
            );
        }
    })?;
    let workers = !args.no_workers;
    if workers {
        let started = tokio::select! {
            started = fabric.start_workers(&folder) => started,
            () = signals.next() => Ok(()),
        };
        if let Err(error) = started {
            fabric.shutdown().await;
            return Err(error.context("--no-workers starts the fabric without them"));
        }
    }

    // A script may read as far as `ready` and go away; that is no reason to stop.
    let _ = output::line(format_args!("dir={}", folder.dir().display()));
    let _ = output::line(format_args!("pki={}", folder.pki().display()));
    if args.grpc.or(args.http).is_some() {
        let _ = output::line(format_args!("token={}", folder.token_file().display()));
    }
    broker::announce(fabric.addresses());
    let _ = output::line("ready");
    let _ = output::line(commands(&folder, fabric.addresses(), workers));

    let failed = loop {
        let asked = tokio::select! {
            asked = signals.next_or_reload() => asked,
            () = fabric.failed() => break true,
        };
        match asked {
            Asked::Stop => break false,
            Asked::Reload => broker::reload_with(fabric.server(), &file, |config| {
                listeners.apply(config, &folder)
            }),
        }
    };
    info!("stopping; a second signal ends the fabric at once");
    signals.or_end_at_once(fabric.shutdown()).await;
    if failed {
        bail!("a listener ended by itself, so the fabric stopped; the log says why");
    }
    Ok(ExitCode::SUCCESS)
}

/// An address that only programs on this machine reach.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("expected ip:port, found {text:?}"))?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err(format!(
            "expected a loopback address, found {}: tokens would cross the network in the clear; \
             [front] of broker.toml has TLS",
            address.ip()
        ))
    }
}

/// Commands to paste into another terminal.
fn commands(folder: &Folder, addresses: &Addresses, workers: bool) -> String {
    let program = std::env::args().next().unwrap_or_default();
    let program = if program.contains('/') {
        shell(&program)
    } else {
        "selvedge".to_owned()
    };
    let path = |path: &Path| shell(&path.display().to_string());
    let mut text = String::from("\nTry, in another terminal:\n");
    if let Some(quic) = addresses.quic {
        let mut flags = String::new();
        let broker = reachable(quic).to_string();
        if broker != DEFAULT_QUIC {
            let _ = write!(flags, " --broker {broker}");
        }
        if folder.dir() != fabric::default_dir() {
            let _ = write!(flags, " --pki {}", path(folder.pki()));
        }
        let _ = write!(
            text,
            "
  {program} sub{flags} 'demo/#'
  {program} pub{flags} demo/hello world
  {program} serve{flags} demo/upper --exec 'tr a-z A-Z'
  {program} call{flags} demo/upper hello
"
        );
        if workers {
            let request = path(&folder.example_request());
            let _ = write!(
                text,
                "
  # A zero that the small edge model takes for a six. Unsure, it may ask the cloud.
  {program} infer{flags} digits --input {request} --prefer edge
  {program} infer{flags} digits --input {request} --prefer edge --min-confidence 0.9
"
            );
        }
    }
    if let Some(mqtt) = addresses.mqtt.map(reachable) {
        let _ = write!(
            text,
            "\n  mosquitto_pub -h {} -p {} -t demo/hello -m 'from MQTT'",
            mqtt.ip(),
            mqtt.port()
        );
    }
    if let Some(mqtts) = addresses.mqtts.map(reachable) {
        let (ip, port) = (mqtts.ip(), mqtts.port());
        let ca = path(&folder.pki().join("ca.pem"));
        let admin = folder.pki().join(fabric::ADMIN);
        let (cert, key) = (path(&admin.join("cert.pem")), path(&admin.join("key.pem")));
        let user = fabric::USER_NAME;
        let password = path(&folder.password_file());
        let _ = write!(
            text,
            "
  mosquitto_pub -h {ip} -p {port} --cafile {ca} --cert {cert} --key {key} -t demo/hello -m 'from MQTT over TLS'
  mosquitto_pub -h {ip} -p {port} --cafile {ca} -u {user} -P \"$(cat {password})\" -t demo/hello -m 'with a password'"
        );
    }
    if let Some(http) = addresses.http {
        let token = path(&folder.token_file());
        let request = path(&folder.example_request());
        let _ = write!(
            text,
            "

  curl -H \"Authorization: Bearer $(cat {token})\" --json @{request} http://{http}/v2/models/digits/infer"
        );
    }
    for (scheme, address) in [("ws", addresses.ws), ("wss", addresses.wss)] {
        if let Some(address) = address.map(reachable) {
            let _ = write!(text, "\n\n  MQTT over WebSocket: {scheme}://{address}/mqtt");
        }
    }
    if let Some(admin) = addresses.admin.map(reachable) {
        let _ = write!(text, "\n\n  curl http://{admin}/metrics");
    }
    text.push_str("\n\nCtrl-C stops it.");
    text
}

/// Text as one word of a shell.
fn shell(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+,=@".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_stay_on_this_machine() {
        assert_eq!(loopback("127.0.0.1:0"), Ok("127.0.0.1:0".parse().unwrap()));
        assert!(loopback("[::1]:8000").is_ok());
        let refused = loopback("0.0.0.0:8000").unwrap_err();
        assert!(
            refused.starts_with("expected a loopback address"),
            "{refused}"
        );
        assert!(loopback("localhost").unwrap_err().contains("ip:port"));
    }

    #[test]
    fn paths_survive_a_shell() {
        assert_eq!(shell("/tmp/a-b/c.pem"), "/tmp/a-b/c.pem");
        assert_eq!(shell("/tmp/a b"), "'/tmp/a b'");
        assert_eq!(shell("it's"), r"'it'\''s'");
        assert_eq!(shell(""), "''");
    }
}
