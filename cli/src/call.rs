//! `selvedge call`: call a service and print its response.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use selvedge_client::{Bytes, Call, CallError, Client};
use serde_json::{Map, Value, json};

use crate::output::{self, Refused};
use crate::{connect, duration, payload};

/// `selvedge call`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge call press-7/set-speed 1200
  selvedge call camera-3/snapshot --deadline 2s --raw > snapshot.png

Each message of the response is a line, unless --raw. The exit code is 1 when the call fails, and
standard error says how: NOT_FOUND nobody serves it, PERMISSION_DENIED with the rule,
DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED busy, UNAVAILABLE the responder was lost.")]
pub(crate) struct Args {
    /// Service to call.
    service: String,
    #[command(flatten)]
    payload: payload::Args,
    /// How long the call may take.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    deadline: Duration,
    /// The call may be made again when its responder is lost.
    #[arg(long)]
    idempotent: bool,
    /// A property for the responder to read; may be given again.
    #[arg(long, value_name = "NAME=VALUE", value_parser = property)]
    property: Vec<(String, String)>,
    /// Write one JSON object for each message of the response, and one at its end.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the response as it is, without line ends between messages.
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    connection: connect::Args,
}

/// Reads `NAME=VALUE`.
pub(crate) fn property(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("expected NAME=VALUE, found {text:?}")),
    }
}

/// Runs the command.
pub(crate) async fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    let payload = std::mem::take(&mut args.payload).read()?;
    let client = args.connection.connect().await?;
    let called = call(&client, &args, payload).await;
    client.close().await;
    called?;
    Ok(ExitCode::SUCCESS)
}

async fn call(client: &Client, args: &Args, payload: Bytes) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut call = Call::new(&args.service)
        .deadline(args.deadline)
        .idempotent(args.idempotent)
        .payload(payload);
    for (name, value) in &args.property {
        call = call.property(name, value);
    }
    let failed = |error| failed(format!("call {}", args.service), error);
    let mut stream = client.call_with(call).await.map_err(failed)?;
    let mut messages = 0_u64;
    while let Some(message) = stream.next().await.map_err(failed)? {
        if args.raw {
            output::raw(&message)?;
        } else if args.json {
            let mut object = Map::new();
            object.insert("message".into(), messages.into());
            output::insert_payload(&mut object, &message);
            output::line(Value::Object(object))?;
        } else {
            output::line(output::printable(&message))?;
        }
        messages += 1;
    }
    if args.json {
        output::line(json!({
            "ok": true,
            "messages": messages,
            "elapsed_ms": duration::millis(started.elapsed()),
        }))?;
    }
    Ok(())
}

/// The failure of a call or an inference, with its status for those who ask for JSON.
pub(crate) fn failed(what: String, error: CallError) -> anyhow::Error {
    match error {
        CallError::Status(status) => Refused { what, status }.into(),
        other => anyhow::Error::new(other).context(what),
    }
}
