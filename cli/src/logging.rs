//! Logging to standard error.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

/// Flags of every command.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// What to log to standard error, such as `debug` or `selvedge_broker=trace,info`.
    /// Default: info for services, warn for other commands.
    #[arg(long, global = true, value_name = "FILTER", env = "SELVEDGE_LOG", value_parser = filter)]
    log: Option<String>,
    /// How log lines are written.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object on each line.
    Json,
}

/// Starts logging what the flags say, else what `default` says.
pub(crate) fn init(args: &Args, default: &str) {
    let filter = args.log.as_deref().unwrap_or(default);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match args.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn filter(text: &str) -> Result<String, String> {
    text.parse::<EnvFilter>()
        .map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}
