//! `selvedge services`: who serves what, and how it goes.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_client::Client;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::call::failed;
use crate::connect;
use crate::output::{self, escaped, short};

/// The broker's own service that knows.
const SERVICE: &str = "$SYS/services";

/// `selvedge services`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge services
  selvedge services 'press-7/#' --json

Every responder of a service and every worker of a model of your own tenant: calls in flight of
how many it takes at once, calls ended and failed since it registered, and how long they took
(right to a tenth). Every identity needs a rule that allows it to call \"$SYS/services\". The exit
code is 1 when nobody serves what was asked for.")]
pub(crate) struct Args {
    /// Filter that names of services and models have to match. Everything unless given.
    pattern: Option<String>,
    /// Most services, models, and responders or workers of each, to show.
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Write the broker's answer as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    connection: connect::Args,
}

#[derive(Debug, Deserialize)]
struct Answer {
    services: Vec<Service>,
    service_count: usize,
    models: Vec<Model>,
    model_count: usize,
}

#[derive(Debug, Deserialize)]
struct Service {
    service: String,
    responders: Vec<Responder>,
    responder_count: usize,
}

#[derive(Debug, Deserialize)]
struct Responder {
    identity: String,
    in_flight: u32,
    max_in_flight: u32,
    #[serde(flatten)]
    summary: Summary,
}

#[derive(Debug, Deserialize)]
struct Model {
    model: String,
    workers: Vec<Worker>,
    worker_count: usize,
}

#[derive(Debug, Deserialize)]
struct Worker {
    identity: String,
    version: String,
    tier: String,
    loaded: bool,
    standing: String,
    slots: u32,
    in_flight: u32,
    #[serde(flatten)]
    summary: Summary,
}

#[derive(Debug, Deserialize)]
struct Summary {
    calls: u64,
    errors: u64,
    p50_us: u64,
    p90_us: u64,
    p99_us: u64,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = args.connection.connect().await?;
    let shown = services(&client, &args).await;
    client.close().await;
    shown?;
    Ok(ExitCode::SUCCESS)
}

async fn services(client: &Client, args: &Args) -> anyhow::Result<()> {
    let question = json!({ "pattern": args.pattern, "limit": args.limit });
    let answer = client
        .call(SERVICE, question.to_string())
        .await
        .map_err(|error| failed(format!("call {SERVICE}"), error))?;
    let unreadable = "read the broker's answer, which is of another version than this program";
    let value: Value = serde_json::from_slice(&answer).context(unreadable)?;
    let answer = Answer::deserialize(&value).context(unreadable)?;
    if answer.service_count + answer.model_count == 0 {
        match &args.pattern {
            Some(pattern) => bail!("nobody serves anything that matches {pattern:?}"),
            None => bail!("nobody serves anything"),
        }
    }
    if args.json {
        output::line(value)?;
        return Ok(());
    }
    for line in show(&answer) {
        output::line(line)?;
    }
    Ok(())
}

/// The lines for people: one table of services, one of models.
fn show(answer: &Answer) -> Vec<String> {
    let mut lines = Vec::new();
    if !answer.services.is_empty() {
        let mut rows = vec![heads(&["SERVICE", "RESPONDER", "IN FLIGHT"])];
        for service in &answer.services {
            let responders = service.responders.iter();
            rows.extend(responders.map(|responder| responder.cells(&service.service)));
            let hidden = service.responder_count - service.responders.len();
            rows.extend(more(&service.service, hidden));
        }
        lines.extend(output::table(&rows));
        lines.extend(left_out(
            answer.service_count - answer.services.len(),
            "services",
        ));
    }
    if !answer.models.is_empty() {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        let mut rows = vec![heads(&[
            "MODEL",
            "WORKER",
            "VERSION",
            "TIER",
            "STATE",
            "IN FLIGHT",
        ])];
        for model in &answer.models {
            let workers = model.workers.iter();
            rows.extend(workers.map(|worker| worker.cells(&model.model)));
            rows.extend(more(&model.model, model.worker_count - model.workers.len()));
        }
        lines.extend(output::table(&rows));
        lines.extend(left_out(answer.model_count - answer.models.len(), "models"));
    }
    lines
}

fn heads(own: &[&str]) -> Vec<String> {
    let common = ["CALLS", "ERRORS", "P50", "P90", "P99"];
    own.iter()
        .chain(&common)
        .map(|&head| head.to_owned())
        .collect()
}

fn more(name: &str, hidden: usize) -> Option<Vec<String>> {
    (hidden > 0).then(|| vec![escaped(name), format!("… and {hidden} more: see --limit")])
}

fn left_out(hidden: usize, what: &str) -> Option<String> {
    (hidden > 0).then(|| format!("… and {hidden} more {what}: see --limit"))
}

impl Responder {
    fn cells(&self, service: &str) -> Vec<String> {
        let in_flight = match self.max_in_flight {
            0 => self.in_flight.to_string(),
            most => format!("{}/{most}", self.in_flight),
        };
        let mut cells = vec![escaped(service), short(&self.identity), in_flight];
        cells.extend(self.summary.cells());
        cells
    }
}

impl Worker {
    fn cells(&self, model: &str) -> Vec<String> {
        let state = match (self.loaded, self.standing.as_str()) {
            (false, _) => "loading",
            (true, "well") => "ready",
            (true, other) => other,
        };
        let mut cells = vec![
            escaped(model),
            short(&self.identity),
            escaped(&self.version),
            escaped(&self.tier),
            escaped(state),
            format!("{}/{}", self.in_flight, self.slots),
        ];
        cells.extend(self.summary.cells());
        cells
    }
}

impl Summary {
    fn cells(&self) -> [String; 5] {
        let time = |micros: u64| match (self.calls, micros) {
            (0, _) => "-".to_owned(),
            (_, 0..1_000) => format!("{micros} us"),
            (_, 1_000..1_000_000) => format!("{:.1} ms", micros as f64 / 1e3),
            _ => format!("{:.1} s", micros as f64 / 1e6),
        };
        [
            self.calls.to_string(),
            self.errors.to_string(),
            time(self.p50_us),
            time(self.p90_us),
            time(self.p99_us),
        ]
    }
}
