//! `selvedge serve`: answer the calls to a service by a command, or by their own words.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use selvedge_client::{Bytes, CallError, Code, IncomingCall, ServeError, ServeOptions, Status};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::output::{self, Refused};
use crate::signals::Signals;
use crate::{connect, duration};

/// The most a command is given, and may answer without `--stream`: the frame limit brokers have by
/// default.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// How much of what a failing command writes to standard error is told to its caller.
const MAX_COMPLAINT: usize = 4096;
/// How much of a streamed answer is read, and sent as one message, at a time.
const CHUNK: usize = 64 * 1024;

/// `selvedge serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge serve press-7/echo --echo
  selvedge serve press-7/uptime --exec uptime
  selvedge serve press-7/upper --exec 'tr a-z A-Z'

The command runs once for each call, by the shell. The request is its standard input, what it
writes to standard output the response; another exit code than 0 fails the call with INTERNAL.
SELVEDGE_SERVICE and SELVEDGE_CALLER are in its environment; the caller is verified.")]
pub(crate) struct Args {
    /// Service to answer for.
    service: String,
    #[command(flatten)]
    answer: Answer,
    /// With --exec: send output as it comes instead of whole at the end.
    #[arg(long, requires = "exec")]
    stream: bool,
    /// Calls taken at once.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    max_in_flight: u32,
    /// End after this many calls.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Write one JSON object for each call.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    connection: connect::Args,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Answer {
    /// Answer each call with its own request.
    #[arg(long)]
    echo: bool,
    /// Answer each call with what this command makes of it.
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let client = tokio::select! {
        client = args.connection.connect() => client?,
        () = signals.next() => bail!("interrupted before the broker answered"),
    };
    let options = ServeOptions {
        max_in_flight: args.max_in_flight,
    };
    let mut responder = client
        .serve_with(&args.service, options)
        .await
        .map_err(|error| {
            let what = format!("serve {}", args.service);
            match error {
                ServeError::Refused(status) => Refused { what, status }.into(),
                other => anyhow::Error::new(other).context(what),
            }
        })?;
    output::note(format_args!("serving {}", output::escaped(&args.service)));

    let args = Arc::new(args);
    let mut calls = JoinSet::new();
    let mut taken = 0;
    let ended = loop {
        tokio::select! {
            call = responder.next() => match call {
                Some(call) => {
                    calls.spawn(answer(call, Arc::clone(&args)));
                    taken += 1;
                    if Some(taken) == args.count {
                        break Ok(());
                    }
                }
                None => break Err(anyhow::anyhow!("{} is no longer served: the client is closed, or the broker refused it", args.service)),
            },
            Some(done) = calls.join_next() => done.context("answer a call")??,
            () = signals.next() => break Ok(()),
        }
    };
    // No new calls; those under way end first.
    drop(responder);
    signals
        .or_end_at_once(async {
            while let Some(done) = calls.join_next().await {
                done.context("answer a call")??;
            }
            client.close().await;
            anyhow::Ok(())
        })
        .await?;
    ended.map(|()| ExitCode::SUCCESS)
}

/// Answers one call and writes a line about it. Only writing that line can fail.
async fn answer(call: IncomingCall, args: Arc<Args>) -> std::io::Result<()> {
    let started = std::time::Instant::now();
    let caller = call.caller().to_owned();
    let outcome = match &args.answer.exec {
        Some(command) => execute(call, command, args.stream).await,
        None => echo(call).await,
    };
    let elapsed = started.elapsed();
    if args.json {
        return output::line(json!({
            "service": args.service,
            "caller": caller,
            "code": outcome.code.as_str(),
            "message": outcome.message,
            "elapsed_ms": duration::millis(elapsed),
        }));
    }
    output::line(format_args!(
        "{} {} in {elapsed:.1?}",
        output::escaped(&caller),
        output::escaped(&outcome.to_string())
    ))
}

async fn echo(mut call: IncomingCall) -> Status {
    let echoed = async {
        while let Some(message) = call.next().await? {
            call.send(message).await?;
        }
        call.finish().await
    };
    match echoed.await {
        Ok(()) => Status::ok(),
        Err(error) => lost(error),
    }
}

/// Runs the command with the call's request and responds with its output.
async fn execute(mut call: IncomingCall, command: &str, stream: bool) -> Status {
    let mut child = match shell(command, &call).spawn() {
        Ok(child) => child,
        Err(error) => {
            let status = Status::new(Code::Internal, format!("cannot run the command: {error}"));
            return fail(call, status).await;
        }
    };
    let outcome = converse(&mut call, &mut child, stream).await;
    // The caller may be gone, and a command that runs on would do so for nobody.
    let _ = child.kill().await;
    match outcome {
        Ok(Ok(())) => match call.finish().await {
            Ok(()) => Status::ok(),
            Err(error) => lost(error),
        },
        Ok(Err(status)) => fail(call, status).await,
        Err(error) => lost(error),
    }
}

fn shell(command: &str, call: &IncomingCall) -> Command {
    #[cfg(unix)]
    let mut shell = Command::new("sh");
    #[cfg(unix)]
    shell.arg("-c");
    #[cfg(not(unix))]
    let mut shell = Command::new("cmd");
    #[cfg(not(unix))]
    shell.arg("/C");
    shell
        .arg(command)
        .env("SELVEDGE_SERVICE", call.service())
        .env("SELVEDGE_CALLER", call.caller())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    shell
}

/// Moves the request into the command and its output into the response. The outer error says that
/// the call has ended, the inner that the command failed.
async fn converse(
    call: &mut IncomingCall,
    child: &mut Child,
    stream: bool,
) -> Result<Result<(), Status>, CallError> {
    let mut stdin = child.stdin.take().expect("it was asked for");
    let mut stdout = child.stdout.take().expect("it was asked for");
    let stderr = child.stderr.take().expect("it was asked for");
    let mut complaint = tokio::spawn(first_bytes(stderr));

    let mut request = Vec::new();
    while let Some(message) = call.next().await? {
        if request.len() + message.len() > MAX_MESSAGE {
            let status = format!("the command takes requests of at most {MAX_MESSAGE} bytes");
            return Ok(Err(Status::new(Code::ResourceExhausted, status)));
        }
        request.extend_from_slice(&message);
    }
    // Beside reading the output, or a command that writes before it has read all would wait for us
    // as we for it. One that reads no further is free to.
    tokio::spawn(async move { stdin.write_all(&request).await });

    let mut answer = Vec::new();
    loop {
        let mut chunk = vec![0; CHUNK];
        let read = tokio::select! {
            read = stdout.read(&mut chunk) => read,
            () = call.cancelled() => return Err(CallError::Ended),
        };
        let Ok(read) = read else { break };
        if read == 0 {
            break;
        }
        chunk.truncate(read);
        if stream {
            call.send(Bytes::from(chunk)).await?;
        } else if answer.len() + read > MAX_MESSAGE {
            let message = format!("the command answers more than {MAX_MESSAGE} bytes");
            return Ok(Err(Status::new(Code::ResourceExhausted, message)));
        } else {
            answer.append(&mut chunk);
        }
    }
    let exit = tokio::select! {
        exit = child.wait() => exit,
        () = call.cancelled() => return Err(CallError::Ended),
    };
    match exit {
        Ok(exit) if exit.success() => {
            if !stream {
                call.send(Bytes::from(answer)).await?;
            }
            Ok(Ok(()))
        }
        Ok(exit) => {
            // A process that the command left behind may keep the pipe open.
            let complaint = tokio::select! {
                complaint = &mut complaint => complaint.unwrap_or_default(),
                () = call.cancelled() => return Err(CallError::Ended),
            };
            let complaint = String::from_utf8_lossy(&complaint);
            let message = format!("the command ended with {exit}: {}", complaint.trim());
            let message = message.trim_end_matches(": ");
            Ok(Err(Status::new(Code::Internal, message)))
        }
        Err(error) => {
            let message = format!("the command was lost: {error}");
            Ok(Err(Status::new(Code::Internal, message)))
        }
    }
}

/// The start of what is read; the rest is read too, so that the writer is not held up.
async fn first_bytes(mut from: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut chunk = [0; 1024];
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        let room = MAX_COMPLAINT - kept.len();
        kept.extend_from_slice(&chunk[..read.min(room)]);
    }
    kept
}

async fn fail(call: IncomingCall, status: Status) -> Status {
    // When the call has ended already, there is nobody left to tell.
    let _ = call.fail(status.clone()).await;
    status
}

fn lost(error: CallError) -> Status {
    match error {
        CallError::Status(status) => status,
        other => Status::new(other.code(), other.to_string()),
    }
}
