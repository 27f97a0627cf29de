//! `selvedge bench`: this broker beside its peers, in one run.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use selvedge_bench::compare::{self, Job, Options, Subject, load, process, relay};
use selvedge_bench::infer;

use crate::output;
use crate::signals::Signals;

mod placement;

/// What a run that was stopped by a signal exits with.
const STOPPED: u8 = 130;

/// `selvedge bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge bench compare --quick")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Measure this broker, a bare QUIC relay, nats-server and mosquitto in turns.
    Compare(Compare),
    /// Measure calls: this broker and nats-server in turns.
    Rpc(Rpc),
    /// Compare ways of choosing a worker in a simulation.
    Placement(placement::Args),
    /// Measure inference: what routing adds, large bodies, cancellation, bursts, loss, residency.
    Infer(Infer),
    /// Be the clients of one measurement: read it from standard input, write the result.
    #[command(hide = true, after_help = "Example: run by `selvedge bench compare`")]
    Load,
    /// Be the bare relay.
    #[command(hide = true, after_help = "Example: run by `selvedge bench compare`")]
    Relay(Relay),
    /// Become a command that ends when the process does that started this one.
    #[command(hide = true, after_help = "Example: run by `selvedge bench compare`")]
    Guard(Guard),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge bench rpc --quick

A client of this broker's library calls a service that another serves; with nats-server it is
request and reply of the async-nats library. 256 bytes each way, over mutual TLS on the same
certificates, one call at a time and 64 at a time. Both clients are in one process, the server in
another, and systems take turns.

Without --quick, JSON and tables are written to the folder of --out. Needs Linux.")]
struct Rpc {
    /// Three short turns; writes no files.
    #[arg(long)]
    quick: bool,
    /// Write one JSON object to standard output instead of tables.
    #[arg(long)]
    json: bool,
    /// Turns of each shape. Default: 7, with --quick 3.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Systems, separated by commas. Default: all that are here.
    #[arg(long, value_delimiter = ',', value_name = "SYSTEMS")]
    systems: Vec<String>,
    /// Folder for results.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
    /// A further NATS server, called `nats-2.15` or whatever its version is. May be given more than once.
    #[arg(long, value_name = "PROGRAM", env = "SELVEDGE_BENCH_NATS")]
    nats: Vec<PathBuf>,
    /// Time that is measured in each turn.
    #[arg(long, hide = true, value_name = "SECONDS")]
    seconds: Option<f64>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge bench infer --quick

The broker is a process of its own, over mutual TLS; those who ask and those who work are in this
one, so that the moments at both ends are told by one clock.

  added      1,000 requests a second through the broker, and straight to the worker, in turns
  bodies     150 chats at once of 22 KB, 220 KB and 2.2 MB: first byte, and the broker's memory
  cancel     from the requester giving up to the worker hearing of it
  burst      10,000 requests at once for 16 slots
  loss       the cloud is lost or silent: the time until the edge has answered
  residency  bytes of requests for their site that the cloud sees

Without --quick, JSON and a table are written to the folder of --out. Needs Linux.")]
struct Infer {
    /// A tenth of the requests; writes no files.
    #[arg(long)]
    quick: bool,
    /// Write one JSON object to standard output instead of a table.
    #[arg(long)]
    json: bool,
    /// What to measure, separated by commas. Default: all.
    #[arg(long, value_delimiter = ',', value_name = "SHAPES")]
    shapes: Vec<String>,
    /// Folder for results.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  cargo run --release -- bench compare --quick
  selvedge bench compare --shapes 1:1 --systems selvedge,nats --rounds 7
  selvedge bench compare --nats ~/nats-2.15/nats-server

Every system runs as a process of its own, over mutual TLS on the same certificates; the clients
are in another process. Systems take turns, and each ratio is formed within a turn. nats-server and
mosquitto are found in PATH, and left out with a word when they are not there.

Shapes, with the size of a message after a slash: 1:1, 1:20, 20-pairs, 1:1000; qos1-memory,
qos1-stored, qos1-disk and these with -20-pairs; latency; connections-10, -1000, -10000;
subscriptions-1, -1000, -100000; idle. `1:1` is all sizes, `1:1/256B` one.

A file for --config, where {port}, {dir}, {ca}, {cert}, {key} and {config} are filled in:
  [[peer]]
  name = \"another\"
  protocol = \"mqtt\"                    # or nats
  command = [\"another-broker\", \"-c\", \"{config}\"]
  config = \"tls.listener = 127.0.0.1:{port}\"
  version = [\"--version\"]

Without --quick, JSON, tables and charts are written to the folder of --out. Needs Linux.")]
struct Compare {
    /// Only the shapes that goals are set for, in less than four minutes; writes no files.
    #[arg(long)]
    quick: bool,
    /// Write one JSON object to standard output instead of tables.
    #[arg(long)]
    json: bool,
    /// Turns of each shape. Default: 5, with --quick 3.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Shapes, separated by commas. Default: all, with --quick those with goals.
    #[arg(long, value_delimiter = ',', value_name = "SHAPES")]
    shapes: Vec<String>,
    /// Systems, separated by commas. Default: all that are here.
    #[arg(long, value_delimiter = ',', value_name = "SYSTEMS")]
    systems: Vec<String>,
    /// Folder for results.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
    /// Further peers that speak NATS or MQTT.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A further NATS server, called `nats-2.15` or whatever its version is. May be given more than once.
    #[arg(long, value_name = "PROGRAM", env = "SELVEDGE_BENCH_NATS")]
    nats: Vec<PathBuf>,
    /// Folder for what servers store; its file system is what the disk shapes measure. Default: the
    /// system's folder for temporary files.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Largest UDP payload of QUIC, for this broker and the relay: 1452 is that of a path of 1,500
    /// bytes. Default: the broker's, which the loopback interface allows.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1200..=6550))]
    packet_bytes: Option<u16>,
    /// Time that is measured in each turn.
    #[arg(long, hide = true, value_name = "SECONDS")]
    seconds: Option<f64>,
}

#[derive(Debug, clap::Args)]
struct Relay {
    /// Its certificate.
    #[arg(long, value_name = "FILE")]
    cert: PathBuf,
    /// Its key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The authority of its clients.
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// Largest UDP payload.
    #[arg(long, value_name = "BYTES")]
    packet_bytes: Option<u16>,
}

#[derive(Debug, clap::Args)]
struct Guard {
    /// The process that starts this one.
    #[arg(long, value_name = "PID")]
    parent: u32,
    /// The command to become.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl Args {
    /// Whether results, and failures with them, are JSON.
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            Command::Compare(args) => args.json,
            Command::Rpc(args) => args.json,
            Command::Infer(args) => args.json,
            Command::Placement(args) => args.json,
            _ => false,
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Compare(args) => crate::block_on(run_compare(args)),
        Command::Rpc(args) => crate::block_on(run_rpc(args)),
        Command::Infer(args) => crate::block_on(run_infer(args)),
        Command::Placement(args) => placement::run(&args),
        Command::Load => crate::block_on(run_load()),
        Command::Relay(args) => crate::block_on(run_relay(args)),
        Command::Guard(args) => {
            process::become_guarded(args.parent, &args.command)?;
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn run_compare(args: Compare) -> anyhow::Result<ExitCode> {
    let options = Options {
        subject: Subject::Messages,
        quick: args.quick,
        rounds: args.rounds,
        shapes: args.shapes,
        systems: args.systems,
        seconds: args.seconds,
        peers: args.config,
        nats: args.nats,
        dir: args.dir,
        packet_bytes: args.packet_bytes,
    };
    measure(&options, &args.out, args.json).await
}

async fn run_rpc(args: Rpc) -> anyhow::Result<ExitCode> {
    let options = Options {
        subject: Subject::Calls,
        quick: args.quick,
        rounds: args.rounds.or(if args.quick { None } else { Some(7) }),
        systems: args.systems,
        seconds: args.seconds.or(if args.quick { Some(1.0) } else { None }),
        nats: args.nats,
        ..Options::default()
    };
    measure(&options, &args.out, args.json).await
}

async fn run_infer(args: Infer) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let program = this_program()?;
    let options = infer::Options {
        quick: args.quick,
        shapes: args.shapes,
    };
    let progress = |line: &str| output::note(line);
    let report = tokio::select! {
        report = infer::run(&options, &program, &progress) => report?,
        // The broker ends, and its folder goes, as the run is dropped.
        () = signals.next() => return Ok(ExitCode::from(STOPPED)),
    };
    if !args.quick {
        wrote(&report.save(&args.out)?);
    }
    if args.json {
        output::line(serde_json::to_string(&report)?)?;
    } else {
        output::line(report.table())?;
    }
    Ok(ExitCode::from(u8::from(!report.failures.is_empty())))
}

async fn measure(options: &Options, out: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let program = this_program()?;
    let progress = |line: &str| output::note(line);
    let report = tokio::select! {
        report = compare::run(options, &program, &progress) => report?,
        // Servers end, and their folder goes, as the run is dropped.
        () = signals.next() => return Ok(ExitCode::from(STOPPED)),
    };
    if !options.quick {
        wrote(&report.save(out)?);
    }
    if json && options.quick {
        output::line(report.brief())?;
    } else if json {
        output::line(serde_json::to_string(&report)?)?;
    } else {
        output::line(report.table())?;
    }
    Ok(ExitCode::from(u8::from(!report.failures.is_empty())))
}

/// The binary whose broker is measured, with a word when that tells nothing.
fn this_program() -> anyhow::Result<PathBuf> {
    if cfg!(debug_assertions) {
        output::note("this is not an optimised build: its figures mean nothing");
    }
    std::env::current_exe().context("find this program")
}

fn wrote(files: &[PathBuf]) {
    for file in files {
        output::note(format_args!("wrote {}", file.display()));
    }
}

async fn run_load() -> anyhow::Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("read the job")?;
    let job: Job = serde_json::from_str(&text).context("read the job")?;
    let outcome = load::run(job).await?;
    output::line(serde_json::to_string(&outcome)?)?;
    Ok(ExitCode::SUCCESS)
}

async fn run_relay(args: Relay) -> anyhow::Result<ExitCode> {
    let endpoint = relay::bind(&args.cert, &args.key, &args.ca, args.packet_bytes)?;
    output::line(format_args!("quic={}", endpoint.local_addr()?))?;
    output::line("ready")?;
    relay::serve(endpoint).await;
    Ok(ExitCode::SUCCESS)
}
