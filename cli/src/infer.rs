//! `selvedge infer`: ask a model for an inference, and say where it ran and why.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use selvedge_client::{Client, Infer, Inference, Preference, Residency, Tensor, Tier};
use serde_json::{Map, Value, json};

use crate::{call, connect, duration, output, tensor};

/// `selvedge infer`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge infer digits --tensor 'input:FP32:[1,4]:0,0.5,1,1'
  selvedge infer digits --input request.json --min-confidence 0.8 --residency tenant
  selvedge infer summarise --payload-file document.txt --deadline 10s --json

request.json is as in the Open Inference Protocol v2:
  {\"inputs\": [{\"name\": \"input\", \"datatype\": \"FP32\",
               \"shape\": [1, 4], \"data\": [0, 0.5, 1, 1]}]}")]
pub(crate) struct Args {
    /// Model to ask.
    model: String,
    #[command(flatten)]
    request: Request,
    /// Only this version of the model will do.
    #[arg(long, value_name = "VERSION")]
    model_version: Option<String>,
    /// How long the answer may take.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    deadline: Duration,
    /// How far the request may travel: site, tenant or any.
    #[arg(long, value_name = "REACH", default_value = "tenant")]
    residency: Residency,
    /// Which worker to favour: fastest, edge, cloud or cheapest.
    #[arg(long, value_name = "CHOICE", default_value = "fastest")]
    prefer: Preference,
    /// Ask a cloud worker when an edge worker is less confident than this, 0 to 1.
    #[arg(long, value_name = "LEAST", value_parser = confidence)]
    min_confidence: Option<f32>,
    /// Requests with the same key go to the same worker while it has room.
    #[arg(long, value_name = "KEY")]
    routing_key: Option<String>,
    /// The request may be made again when its worker is lost.
    #[arg(long)]
    idempotent: bool,
    /// A parameter for the model; may be given again.
    #[arg(long, value_name = "NAME=VALUE", value_parser = call::property)]
    parameter: Vec<(String, String)>,
    /// Write one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    connection: connect::Args,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Request {
    /// An input tensor; may be given again for models with several.
    #[arg(long, value_name = "NAME:TYPE:[D1,D2]:v,v,…", value_parser = tensor::parse)]
    tensor: Vec<Tensor>,
    /// Input tensors from a JSON file of the Open Inference Protocol v2.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// A payload from a file, for models that take no tensors.
    #[arg(long, value_name = "FILE")]
    payload_file: Option<PathBuf>,
}

fn confidence(text: &str) -> Result<f32, String> {
    let confidence = text.parse().ok();
    confidence
        .filter(|confidence| (0.0..=1.0).contains(confidence))
        .ok_or_else(|| format!("expected a number from 0 to 1, found {text:?}"))
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = request(&args)?;
    let client = args.connection.connect().await?;
    let asked = ask(&client, request, &args).await;
    client.close().await;
    asked?;
    Ok(ExitCode::SUCCESS)
}

fn request(args: &Args) -> anyhow::Result<Infer> {
    let mut request = Infer::new(&args.model)
        .deadline(args.deadline)
        .residency(args.residency)
        .preference(args.prefer)
        .idempotent(args.idempotent);
    if let Some(version) = &args.model_version {
        request = request.version(version);
    }
    if let Some(key) = &args.routing_key {
        request = request.routing_key(key);
    }
    if let Some(confidence) = args.min_confidence {
        request = request.min_confidence(confidence);
    }
    for (name, value) in &args.parameter {
        request = request.parameter(name, value);
    }
    let Request {
        tensor,
        input,
        payload_file,
    } = &args.request;
    if let Some(file) = payload_file {
        let read = std::fs::read(file);
        return Ok(request.payload(read.with_context(|| format!("read {}", file.display()))?));
    }
    let Some(file) = input else {
        return Ok(request.tensors(tensor.clone()));
    };
    let text = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let json = serde_json::from_slice(&text)
        .with_context(|| format!("expected JSON in {}", file.display()))?;
    let tensors =
        tensor::inputs(&json).map_err(|problem| anyhow!("{}: {problem}", file.display()))?;
    Ok(request.tensors(tensors))
}

async fn ask(client: &Client, request: Infer, args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let inference = (client.infer(request).await)
        .map_err(|error| call::failed(format!("infer {}", args.model), error))?;
    let elapsed = started.elapsed();
    // What does not read as tensors is what a model without tensors answers.
    let tensors = inference
        .tensors()
        .ok()
        .filter(|tensors| !tensors.is_empty());
    if args.json {
        output::line(json(&inference, tensors.as_deref(), elapsed))?;
    } else {
        text(&inference, tensors.as_deref(), elapsed)?;
    }
    Ok(())
}

fn text(
    inference: &Inference,
    tensors: Option<&[Tensor]>,
    elapsed: Duration,
) -> std::io::Result<()> {
    match tensors {
        Some(tensors) => {
            for tensor in tensors {
                output::line(tensor::text(tensor))?;
            }
        }
        None => output::line(output::printable(&inference.payload))?,
    }
    let answer = &inference.answer;
    let tier = answer.tier.map_or("unknown", Tier::as_str);
    output::line(format_args!(
        "\nmodel       {} version {}",
        output::escaped(&answer.model),
        output::escaped(&answer.version)
    ))?;
    output::line(format_args!(
        "worker      {} ({tier})",
        output::escaped(&answer.worker)
    ))?;
    output::line(format_args!(
        "reason      {}",
        output::escaped(&answer.reason)
    ))?;
    if let Some(confidence) = answer.confidence {
        output::line(format_args!("confidence  {confidence:.4}"))?;
    }
    if answer.escalated {
        let edge = answer.edge_confidence;
        let edge = edge.map_or("unknown".to_owned(), |edge| format!("{edge:.4}"));
        output::line(format_args!(
            "escalated   yes, the edge answer's confidence was {edge}"
        ))?;
    }
    output::line(format_args!(
        "time        {elapsed:.1?} in all: placement {:.1?}, queue {:.1?}, compute {:.1?}",
        answer.placement, answer.queue, answer.compute
    ))
}

fn json(inference: &Inference, tensors: Option<&[Tensor]>, elapsed: Duration) -> Value {
    let answer = &inference.answer;
    let parameters: Map<String, Value> = (answer.parameters.iter())
        .map(|(name, value)| (name.clone(), value.as_str().into()))
        .collect();
    let mut object = Map::new();
    object.insert("ok".into(), true.into());
    object.insert("model_name".into(), answer.model.as_str().into());
    object.insert("model_version".into(), answer.version.as_str().into());
    object.insert("id".into(), answer.request_id.as_str().into());
    match tensors {
        Some(tensors) => {
            let outputs: Vec<Value> = tensors.iter().map(tensor::json).collect();
            object.insert("outputs".into(), outputs.into());
        }
        None => output::insert_payload(&mut object, &inference.payload),
    }
    object.insert("parameters".into(), parameters.into());
    object.insert("confidence".into(), number(answer.confidence));
    object.insert("worker".into(), (&*answer.worker).into());
    object.insert("tier".into(), answer.tier.map(Tier::as_str).into());
    object.insert("reason".into(), answer.reason.as_str().into());
    object.insert("escalated".into(), answer.escalated.into());
    object.insert("hedged".into(), answer.hedged.into());
    object.insert("edge_confidence".into(), number(answer.edge_confidence));
    object.insert(
        "time_ms".into(),
        json!({
            "placement": duration::millis(answer.placement),
            "queue": duration::millis(answer.queue),
            "compute": duration::millis(answer.compute),
            "estimate": duration::millis(answer.estimate),
            "elapsed": duration::millis(elapsed),
        }),
    );
    Value::Object(object)
}

fn number(value: Option<f32>) -> Value {
    value.map(f64::from).into()
}
