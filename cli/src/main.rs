//! The `selvedge` binary: arguments, logging, dispatch, exit code.

#[cfg(target_os = "linux")]
mod bench;
mod bridge;
mod broker;
mod call;
mod certs;
mod connect;
mod demo;
mod dev;
mod duration;
mod explain;
mod fabric;
mod infer;
mod logging;
mod mqtt;
mod output;
mod payload;
mod policy;
mod publish;
mod serve;
mod services;
mod signals;
mod subscribe;
mod tensor;
mod token;
mod worker;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// How long tasks that are left over may take to end after a command is done.
const LEFT_OVER: Duration = Duration::from_secs(1);

/// A secure messaging fabric from edge to cloud.
#[derive(Debug, Parser)]
#[command(name = "selvedge", version, propagate_version = true, after_help = EXAMPLE)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    logging: logging::Args,
}

const EXAMPLE: &str = "\
Example, in two terminals:
  selvedge dev
  selvedge pub hello world

Exit code: 0 success, 1 failure, 2 wrong usage. Every command has an example in its --help.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Take a tour of the whole fabric, which checks everything it shows.
    Demo(demo::Args),
    /// Start a whole local fabric for trying things.
    Dev(dev::Args),
    /// Run a broker.
    Broker(broker::Args),
    /// Carry messages between an MQTT broker and the fabric.
    Bridge(bridge::Args),
    /// Answer inference requests with ONNX models.
    Worker(worker::Args),
    /// Make an authority, issue certificates and explain them.
    Certs(certs::Args),
    /// Check a policy and ask it what it allows.
    Policy(policy::Args),
    /// Manage the users of the MQTT listener.
    Mqtt(mqtt::Args),
    /// Manage the bearer tokens of the front door.
    Token(token::Args),
    /// Say where a message went, and what a client or a topic has to do with it.
    Explain(explain::Args),
    /// Show who serves which service and model, and how it goes.
    Services(services::Args),
    /// Publish messages.
    Pub(publish::Args),
    /// Subscribe to topics and print their messages.
    Sub(subscribe::Args),
    /// Call a service and print its response.
    Call(call::Args),
    /// Answer the calls to a service.
    Serve(serve::Args),
    /// Ask a model for an inference.
    Infer(infer::Args),
    /// Measure this broker beside its peers.
    #[cfg(target_os = "linux")]
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init(&cli.logging, cli.command.log_filter());
    let format = cli.command.format();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => output::failure(&error, format),
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => block_on(demo::run(args)),
        Command::Dev(args) => block_on(dev::run(args)),
        Command::Broker(args) => block_on(broker::run(args)),
        Command::Bridge(args) => block_on(bridge::run(args)),
        Command::Worker(args) => block_on(worker::run(args)),
        Command::Certs(args) => certs::run(args),
        Command::Policy(args) => policy::run(args),
        Command::Mqtt(args) => mqtt::run(args),
        Command::Token(args) => token::run(args),
        Command::Explain(args) => block_on(explain::run(args)),
        Command::Services(args) => block_on(services::run(args)),
        Command::Pub(args) => block_on(publish::run(args)),
        Command::Sub(args) => block_on(subscribe::run(args)),
        Command::Call(args) => block_on(call::run(args)),
        Command::Serve(args) => block_on(serve::run(args)),
        Command::Infer(args) => block_on(infer::run(args)),
        #[cfg(target_os = "linux")]
        Command::Bench(args) => bench::run(args),
    }
}

fn block_on(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(Box::pin(command));
    runtime.shutdown_timeout(LEFT_OVER);
    result
}

impl Command {
    /// What is logged unless the flags say otherwise.
    fn log_filter(&self) -> &'static str {
        match self {
            // Run until they are told to stop, so that their log is what people look at.
            Self::Dev(_) | Self::Broker(_) | Self::Bridge(_) | Self::Worker(_) => {
                "info,quinn=warn,rumqttc=warn,tract=warn"
            }
            // Shows the peers that the broker refuses itself.
            Self::Demo(_) => "warn,selvedge_broker::quic=error",
            _ => "warn",
        }
    }

    /// How results, and failures with them, are written.
    fn format(&self) -> output::Format {
        let json = match self {
            Self::Demo(args) => args.json,
            Self::Broker(args) => args.json,
            Self::Certs(args) => args.json(),
            Self::Policy(args) => args.json(),
            Self::Explain(args) => args.json,
            Self::Services(args) => args.json,
            Self::Pub(args) => args.json,
            Self::Sub(args) => args.json,
            Self::Call(args) => args.json,
            Self::Serve(args) => args.json,
            Self::Infer(args) => args.json,
            #[cfg(target_os = "linux")]
            Self::Bench(args) => args.json(),
            Self::Bridge(args) => args.json,
            Self::Dev(_) | Self::Worker(_) | Self::Mqtt(_) | Self::Token(_) => false,
        };
        output::Format::from_flag(json)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_that_can_be_pasted() {
        fn check(command: &clap::Command) {
            let name = command.get_name();
            let help = command.get_after_help().expect(name).to_string();
            assert!(help.contains("Example"), "{name}");
            for line in help.lines() {
                // A terminal would wrap longer ones in the middle of a command.
                assert!(line.chars().count() <= 100, "{name}: {line}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
