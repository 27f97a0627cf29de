//! `selvedge sub`: subscribe to topics and print their messages.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{anyhow, bail};
use selvedge_client::{
    Client, Message, Overflow, Qos, Replay, Status, SubscribeError, SubscribeOptions,
    SubscribeTarget, Subscription,
};
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::output::{self, Format, Refused};
use crate::signals::Signals;
use crate::{connect, duration};

/// `selvedge sub`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge sub 'sites/plant-1/#'
  selvedge sub --count 1 --timeout 10s --json sites/plant-1/press-7/temperature
  selvedge sub --last 10 'sites/plant-1/#'
  selvedge sub --since 10m 'sites/plant-1/#'
  selvedge sub '$share/workers/jobs/#'

Runs until Ctrl-C, --count or --timeout. The exit code is 1 when a filter is refused, or when
the time is up before --count messages came (before one came, without --count).")]
pub(crate) struct Args {
    /// Topic filters: `+` is any one level, a last `#` all that follow.
    #[arg(required = true, value_name = "FILTER")]
    filters: Vec<SubscribeTarget>,
    /// End after this many messages.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this time.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    timeout: Option<Duration>,
    /// Highest quality of service to receive with.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// What the broker does when this subscriber is too slow.
    #[arg(long, value_name = "POLICY", default_value = "default")]
    overflow: OverflowName,
    /// Receive QoS 0 messages in datagrams, for what is worthless when late: lost means lost.
    #[arg(long)]
    datagrams: bool,
    /// Begin with the last N messages of each topic, as far as the broker keeps their history.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    last: Option<u32>,
    /// Begin with the history since a time: so long ago (`10m`), or `2026-01-31T12:00:00Z`.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<SystemTime>,
    /// Only the history before a time, given as for --since, and then what is published from now on.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<SystemTime>,
    /// Write one JSON object for each message.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write payloads as they are, each with a line end, and no topics.
    #[arg(long, conflicts_with_all = ["json", "verbose"])]
    raw: bool,
    /// Write quality of service, flags and publisher of each message too.
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    connection: connect::Args,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum OverflowName {
    /// Drop the oldest of QoS 0, the newest of QoS 1.
    Default,
    /// Drop the oldest QoS 0 messages.
    DropOldest,
    /// Drop the message that does not fit.
    DropNewest,
    /// Refuse the publisher, which may try again; nobody gets the message then.
    Refuse,
    /// Disconnect the subscriber.
    Disconnect,
}

impl Args {
    /// The part of the history that is asked for, if any is.
    fn replay(&self) -> Option<Replay> {
        if self.last.is_none() && self.since.is_none() && self.until.is_none() {
            return None;
        }
        let mut replay = self.last.map_or_else(Replay::all, Replay::last);
        if let Some(since) = self.since {
            replay = replay.since(since);
        }
        if let Some(until) = self.until {
            replay = replay.until(until);
        }
        Some(replay)
    }
}

/// Reads a moment: an age such as `10m`, or a date and time of RFC 3339.
fn moment(text: &str) -> Result<SystemTime, String> {
    if let Ok(ago) = duration::parse(text) {
        return SystemTime::now()
            .checked_sub(ago)
            .ok_or_else(|| format!("{text:?} is too long ago"));
    }
    OffsetDateTime::parse(text, &Rfc3339)
        .map(SystemTime::from)
        .map_err(|_| {
            format!(
                "expected an age such as 10m or a time such as 2026-01-31T12:00:00Z, found {text:?}"
            )
        })
}

/// A message, or why a subscription ended.
type Item = Result<Message, Option<Status>>;

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let client = tokio::select! {
        client = args.connection.connect() => client?,
        () = signals.next() => bail!("interrupted before the broker answered"),
    };
    let printed = print(&client, &args, &mut signals).await;
    signals.or_end_at_once(client.close()).await;
    printed?;
    Ok(ExitCode::SUCCESS)
}

async fn print(client: &Client, args: &Args, signals: &mut Signals) -> anyhow::Result<()> {
    // One message is under way between a subscription and the output; more wait, and are
    // acknowledged, only when it was written.
    let (sender, mut items) = mpsc::channel(1);
    let mut readers = JoinSet::new();
    for target in &args.filters {
        let target = target.to_string();
        let options = SubscribeOptions {
            max_qos: if args.qos == 0 {
                Qos::AtMostOnce
            } else {
                Qos::AtLeastOnce
            },
            overflow: match args.overflow {
                OverflowName::Default => Overflow::Default,
                OverflowName::DropOldest => Overflow::DropOldest,
                OverflowName::DropNewest => Overflow::DropNewest,
                OverflowName::Refuse => Overflow::Refuse,
                OverflowName::Disconnect => Overflow::Disconnect,
            },
            datagrams: args.datagrams,
            replay: args.replay(),
            ..SubscribeOptions::default()
        };
        let subscription = client
            .subscribe_with(&target, options)
            .await
            .map_err(|error| match error {
                SubscribeError::Refused(status) => refused(&target, status),
                other => anyhow::Error::new(other).context(format!("subscribe to {target}")),
            })?;
        output::note(format_args!("subscribed to {}", output::escaped(&target)));
        readers.spawn(read(target, subscription, sender.clone()));
    }
    drop(sender);

    let end = args.timeout.map(|timeout| Instant::now() + timeout);
    let mut received = 0;
    loop {
        let item = tokio::select! {
            item = items.recv() => item,
            () = signals.next() => return Ok(()),
            () = sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => {
                let wanted = args.count.unwrap_or(1);
                if received < wanted {
                    let plural = if wanted == 1 { "" } else { "s" };
                    bail!("expected {wanted} message{plural} in time, received {received}");
                }
                return Ok(());
            }
        };
        match item {
            Some((_, Ok(message))) => write(&message, args)?,
            Some((target, Err(Some(status)))) => return Err(refused(&target, status)),
            Some((target, Err(None))) => bail!("the subscription to {target} has ended"),
            None => return Err(anyhow!("every subscription has ended")),
        }
        received += 1;
        if Some(received) == args.count {
            return Ok(());
        }
    }
}

async fn read(target: String, mut subscription: Subscription, items: mpsc::Sender<(String, Item)>) {
    while let Some(message) = subscription.next().await {
        if items.send((target.clone(), Ok(message))).await.is_err() {
            return;
        }
    }
    let _ = items.send((target, Err(subscription.end()))).await;
}

fn write(message: &Message, args: &Args) -> std::io::Result<()> {
    if args.raw {
        let mut payload = message.payload.to_vec();
        payload.push(b'\n');
        return output::raw(&payload);
    }
    if Format::from_flag(args.json) == Format::Json {
        return output::line(json(message));
    }
    let topic = output::escaped(message.topic.as_str());
    let payload = output::printable(&message.payload);
    if !args.verbose {
        return output::line(format_args!("{topic} {payload}"));
    }
    let mut flags = format!("qos={}", message.qos as u8);
    if message.retain {
        flags.push_str(" retained");
    }
    if message.duplicate {
        flags.push_str(" duplicate");
    }
    if let Some(published) = published(message) {
        flags.push_str(" published=");
        flags.push_str(&published);
    }
    let publisher = output::escaped(&message.publisher);
    output::line(format_args!("{topic} {flags} from={publisher} {payload}"))
}

fn json(message: &Message) -> Value {
    let mut object = Map::new();
    object.insert("topic".into(), message.topic.as_str().into());
    output::insert_payload(&mut object, &message.payload);
    object.insert("publisher".into(), (&*message.publisher).into());
    object.insert("qos".into(), (message.qos as u8).into());
    object.insert("retain".into(), message.retain.into());
    object.insert("duplicate".into(), message.duplicate.into());
    if let Some(published) = published(message) {
        object.insert("published".into(), published.into());
    }
    let properties = message.properties();
    if !properties.message_id.is_empty() {
        let id = String::from_utf8_lossy(&properties.message_id);
        object.insert("message_id".into(), id.into());
    }
    if !properties.content_type.is_empty() {
        object.insert(
            "content_type".into(),
            properties.content_type.as_str().into(),
        );
    }
    if !properties.user.is_empty() {
        let pairs = properties.user.iter();
        let pairs: Vec<Value> = pairs
            .map(|(name, value)| serde_json::json!([name, value]))
            .collect();
        object.insert("properties".into(), pairs.into());
    }
    Value::Object(object)
}

/// When a replayed message was published.
fn published(message: &Message) -> Option<String> {
    let since = message.published()?.duration_since(SystemTime::UNIX_EPOCH);
    let since = time::Duration::try_from(since.ok()?).ok()?;
    let published = OffsetDateTime::UNIX_EPOCH.checked_add(since)?;
    published.format(&Rfc3339).ok()
}

fn refused(target: &str, status: Status) -> anyhow::Error {
    anyhow::Error::new(Refused {
        what: format!("subscribe to {target}"),
        status,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_ages_or_dates() {
        let hour = Duration::from_secs(3600);
        let ago = moment("1h")
            .expect("an age")
            .elapsed()
            .expect("it has passed");
        assert!(ago >= hour && ago < hour * 2, "{ago:?}");
        let date = SystemTime::UNIX_EPOCH + Duration::from_secs(1_769_860_800);
        assert_eq!(moment("2026-01-31T12:00:00Z"), Ok(date));
        assert_eq!(moment("2026-01-31T13:00:00+01:00"), Ok(date));
        for bad in ["", "yesterday", "10", "2026-01-31"] {
            assert_eq!(
                moment(bad),
                Err(format!(
                    "expected an age such as 10m or a time such as 2026-01-31T12:00:00Z, found {bad:?}"
                ))
            );
        }
    }
}
