//! `selvedge pub`: publish messages.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_client::{
    Bytes, Class, Client, Durability, FlushError, Publish, PublishError, Qos, TopicName,
};
use serde_json::json;

use crate::output::{self, Refused};
use crate::{connect, payload};

/// `selvedge pub`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge pub sites/plant-1/press-7/temperature 21.5
  selvedge pub --qos 1 --retain sites/plant-1/press-7/state running
  selvedge pub --qos 1 --message-id order-4711 orders/new 'part 12'
  tail -f readings.log | selvedge pub sites/plant-1/press-7/readings --lines

The exit code is 1 when the broker refuses a message, with either quality of service;
of datagrams that it refuses, it says so too late.")]
pub(crate) struct Args {
    /// Topic to publish to.
    topic: TopicName,
    #[command(flatten)]
    payload: payload::Args,
    /// Publish each line of standard input as a message.
    #[arg(long, conflicts_with_all = ["payload", "file", "stdin", "count"])]
    lines: bool,
    /// Quality of service: 0 at most once, 1 at least once.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// Keep the message for those who subscribe later. An empty payload clears it.
    #[arg(long)]
    retain: bool,
    /// Urgency.
    #[arg(long, default_value = "normal")]
    class: ClassName,
    /// How safe the broker must have a message of QoS 1 before it says so.
    #[arg(long, default_value = "default")]
    durability: DurabilityName,
    /// Name the message, so that the broker takes it once, however often it is published.
    #[arg(long, value_name = "ID", conflicts_with = "lines")]
    message_id: Option<String>,
    /// Send in datagrams what is worthless when late: lost means lost.
    #[arg(long, conflicts_with = "retain")]
    datagram: bool,
    /// Publish the message this many times.
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: u64,
    /// Write one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    connection: connect::Args,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ClassName {
    /// Ahead of everything else.
    Alarm,
    /// In between.
    Normal,
    /// Behind everything else.
    Bulk,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum DurabilityName {
    /// The broker's choice for the topic.
    Default,
    /// In the broker's memory.
    Memory,
    /// On the broker's disk.
    Disk,
    /// On the disks of several brokers.
    Replicated,
}

/// What was published so far.
#[derive(Debug, Default)]
struct Tally {
    messages: u64,
    bytes: u64,
    /// What the last acknowledgement said.
    durability: Option<Durability>,
}

/// Runs the command.
pub(crate) async fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    if !args.lines && !args.payload.is_given() {
        bail!("expected a payload, --file, --stdin or --lines, found none; '' is an empty payload");
    }
    if args.datagram && args.qos > 0 {
        bail!("expected QoS 0 with --datagram, found --qos 1: a datagram is not acknowledged");
    }
    let client = args.connection.connect().await?;
    let published = publish(&client, &mut args).await;
    // Also after a failure: what went before it should not be lost for it.
    client.close().await;
    let tally = published?;
    if args.json {
        output::line(json!({
            "ok": true,
            "topic": args.topic.as_str(),
            "messages": tally.messages,
            "bytes": tally.bytes,
            "durability": tally.durability.map(word),
        }))?;
    } else {
        let plural = if tally.messages == 1 { "" } else { "s" };
        let kept = match tally.durability {
            Some(durability) => format!(", acknowledged: {}", place(durability)),
            None => String::new(),
        };
        output::line(format_args!(
            "published {} message{plural} of {} bytes in all to {}{kept}",
            tally.messages,
            tally.bytes,
            output::escaped(args.topic.as_str()),
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn publish(client: &Client, args: &mut Args) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    if args.lines {
        let mut lines = payload::lines();
        while let Some(line) = lines.recv().await {
            let line = line.context("read standard input")?;
            one(client, args, line, &mut tally).await?;
        }
    } else {
        let source = std::mem::take(&mut args.payload);
        let payload = source.read()?;
        for _ in 0..args.count {
            one(client, args, payload.clone(), &mut tally).await?;
        }
    }
    // A refusal of QoS 0 comes back on its own time, so ask that everything was processed.
    client.flush().await.map_err(|error| match error {
        FlushError::Refused(status) => refused(&args.topic, status),
        other => anyhow::Error::new(other).context(format!("publish to {}", args.topic)),
    })?;
    Ok(tally)
}

async fn one(
    client: &Client,
    args: &Args,
    payload: Bytes,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let bytes = payload.len();
    let qos = if args.qos == 0 {
        Qos::AtMostOnce
    } else {
        Qos::AtLeastOnce
    };
    let message = Publish::new(&args.topic, payload)
        .qos(qos)
        .datagram(args.datagram)
        .message_id(args.message_id.clone().unwrap_or_default())
        .retain(args.retain)
        .class(match args.class {
            ClassName::Alarm => Class::Alarm,
            ClassName::Normal => Class::Normal,
            ClassName::Bulk => Class::Bulk,
        })
        .durability(match args.durability {
            DurabilityName::Default => Durability::Default,
            DurabilityName::Memory => Durability::Memory,
            DurabilityName::Disk => Durability::Disk,
            DurabilityName::Replicated => Durability::Replicated,
        });
    let ack = client
        .publish_message(message)
        .await
        .map_err(|error| match error {
            PublishError::Refused(status) => refused(&args.topic, status),
            other => anyhow::Error::new(other).context(format!("publish to {}", args.topic)),
        })?;
    tally.messages += 1;
    tally.bytes += bytes as u64;
    tally.durability = ack.durability.or(tally.durability);
    Ok(())
}

fn refused(topic: &TopicName, status: selvedge_client::Status) -> anyhow::Error {
    anyhow::Error::new(Refused {
        what: format!("publish to {topic}"),
        status,
    })
}

fn word(durability: Durability) -> &'static str {
    match durability {
        Durability::Default => "default",
        Durability::Memory => "memory",
        Durability::Disk => "disk",
        Durability::Replicated => "replicated",
    }
}

fn place(durability: Durability) -> &'static str {
    match durability {
        Durability::Default | Durability::Memory => "in memory",
        Durability::Disk => "on the broker's disk",
        Durability::Replicated => "on the disks of several brokers",
    }
}
