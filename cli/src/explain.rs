//! `selvedge explain`: where a message went, what became of a client's or a topic's.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_client::Client;
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use crate::call::failed;
use crate::connect;
use crate::output::{self, escaped, short};

/// The broker's own service that knows.
const SERVICE: &str = "$SYS/explain";

/// `selvedge explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge explain line/7/temperature
  selvedge explain acme/plant-1/press-7 --limit 10
  selvedge explain order-4711 --kind message

What the broker has dropped, refused or denied lately, most recent first, and what it knows now: who
is connected, who subscribes, what waits in which queue. Every identity needs a rule that allows it
to call \"$SYS/explain\", and sees its own tenant alone. The exit code is 1 when nothing is known.")]
pub(crate) struct Args {
    /// Id of a message (as text or hex:…), a client or session by any of its names, or a topic,
    /// filter, service or model.
    query: String,
    /// What the query means; everything that fits unless given.
    #[arg(long)]
    kind: Option<Kind>,
    /// Most records to show, and most entries of each list.
    #[arg(long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Write the broker's answer as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    connection: connect::Args,
}

/// What a query means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// The id of a message.
    Message,
    /// An identity or a session.
    Client,
    /// A topic, a filter, a service or a model.
    Topic,
}

/// The part of the broker's answer that is shown to people.
#[derive(Debug, Deserialize)]
struct Answer {
    found: bool,
    complete_since_ms: u64,
    records: Vec<Record>,
    record_count: usize,
    now: Now,
}

#[derive(Debug, Deserialize)]
struct Record {
    what: String,
    reason: String,
    count: u64,
    first_ms: u64,
    last_ms: u64,
    publisher: String,
    receiver: Option<Receiver>,
    verb: Option<String>,
    topic: Option<String>,
    message_id: Option<String>,
    status: Option<Status>,
}

#[derive(Debug, Deserialize)]
struct Receiver {
    identity: String,
    session: String,
}

#[derive(Debug, Deserialize)]
struct Status {
    message: String,
}

#[derive(Debug, Deserialize)]
struct Now {
    sessions: Vec<Session>,
    session_count: usize,
    topic: Option<Topic>,
    message: Option<Message>,
}

#[derive(Debug, Deserialize)]
struct Session {
    identity: String,
    session: String,
    online: bool,
    since_ms: u64,
    queues: Vec<Queue>,
    subscriptions: Vec<Subscription>,
    subscription_count: usize,
}

#[derive(Debug, Deserialize)]
struct Queue {
    class: String,
    waiting_bytes: u64,
    in_flight_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Subscription {
    filter: String,
    qos: u8,
    own_lane: bool,
    denied: Vec<String>,
    queues: Vec<Queue>,
}

#[derive(Debug, Deserialize)]
struct Topic {
    topic: String,
    receivers: Vec<TopicReceiver>,
    receiver_count: usize,
    retained: Option<Retained>,
    history: bool,
    responders: u64,
}

#[derive(Debug, Deserialize)]
struct TopicReceiver {
    identity: String,
    session: String,
    online: bool,
    since_ms: u64,
    filter: String,
    qos: u8,
    denied: bool,
    queues: Vec<Queue>,
}

#[derive(Debug, Deserialize)]
struct Retained {
    publisher: String,
    message_id: Option<String>,
    published_ms: Option<u64>,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Message {
    waiting: Vec<Waiting>,
    taken_from: Vec<String>,
    complete: bool,
}

#[derive(Debug, Deserialize)]
struct Waiting {
    identity: String,
    session: String,
    online: bool,
    class: String,
    in_flight: bool,
    topic: String,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = args.connection.connect().await?;
    let explained = explain(&client, &args).await;
    client.close().await;
    explained?;
    Ok(ExitCode::SUCCESS)
}

async fn explain(client: &Client, args: &Args) -> anyhow::Result<()> {
    let kind = args.kind.map(|kind| match kind {
        Kind::Message => "message",
        Kind::Client => "client",
        Kind::Topic => "topic",
    });
    let question = json!({ "query": args.query, "kind": kind, "limit": args.limit });
    let answer = client
        .call(SERVICE, question.to_string())
        .await
        .map_err(|error| failed(format!("call {SERVICE}"), error))?;
    let unreadable = "read the broker's answer, which is of another version than this program";
    let value: Value = serde_json::from_slice(&answer).context(unreadable)?;
    let answer = Answer::deserialize(&value).context(unreadable)?;
    if !answer.found {
        bail!(
            "nothing is known about {:?}: expected the id of a message, the name of a client or \
             session, or a topic, and something to tell of it; the broker remembers all that it \
             dropped or refused since {}, and has nothing of it now",
            args.query,
            time(answer.complete_since_ms)
        );
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

/// The lines for people.
fn show(answer: &Answer) -> Vec<String> {
    let mut lines = records(answer);
    let since = time(answer.complete_since_ms);
    match answer.record_count {
        0 => lines.push(format!(
            "nothing of it was dropped or refused since {since}"
        )),
        count if count > answer.records.len() => lines.push(format!(
            "… and {} more: see --limit",
            count - answer.records.len()
        )),
        _ => {}
    }
    let Now {
        sessions,
        session_count,
        topic,
        message,
    } = &answer.now;
    if sessions.is_empty() && topic.is_none() && message.is_none() {
        return lines;
    }
    lines.push(String::new());
    lines.push("now".to_owned());
    for session in sessions {
        lines.extend(session.lines());
    }
    lines.extend(more(*session_count, sessions.len(), "sessions"));
    lines.extend(topic.iter().flat_map(Topic::lines));
    lines.extend(message.iter().flat_map(Message::lines));
    lines
}

/// The table of records.
fn records(answer: &Answer) -> Vec<String> {
    if answer.records.is_empty() {
        return Vec::new();
    }
    let heads = ["TIME", "WHAT", "REASON", "COUNT", "WHO", "TOPIC"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(heads)
        .chain(answer.records.iter().map(Record::cells))
        .collect();
    let mut lines = Vec::new();
    for (index, line) in output::table(&rows).into_iter().enumerate() {
        lines.push(line);
        let details = index
            .checked_sub(1)
            .map(|index| answer.records[index].details());
        lines.extend(details.into_iter().flatten());
    }
    lines
}

impl Record {
    fn cells(&self) -> [String; 6] {
        let who = match &self.receiver {
            Some(receiver) => format!(
                "{} -> {}",
                short(&self.publisher),
                session(&receiver.identity, &receiver.session)
            ),
            None => short(&self.publisher),
        };
        let verb = self.verb.as_deref().filter(|verb| *verb != "publish");
        let topic = self
            .topic
            .as_deref()
            .map_or_else(|| "-".to_owned(), escaped);
        [
            time(self.last_ms),
            escaped(&self.what),
            escaped(&self.reason),
            self.count.to_string(),
            who,
            verb.map_or(topic.clone(), |verb| format!("{} {topic}", escaped(verb))),
        ]
    }

    /// What has no column.
    fn details(&self) -> Vec<String> {
        let mut details = Vec::new();
        if let Some(id) = &self.message_id {
            details.push(format!("  message id {}", escaped(id)));
        }
        if let Some(status) = &self.status {
            details.push(format!("  {}", escaped(&status.message)));
        }
        if self.first_ms / 1000 != self.last_ms / 1000 {
            details.push(format!("  since {}", time(self.first_ms)));
        }
        details
    }
}

impl Session {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "  session {} {}{}",
            session(&self.identity, &self.session),
            presence(self.online, self.since_ms),
            queues(&self.queues)
        )];
        for subscription in &self.subscriptions {
            let own_lane = if subscription.own_lane {
                " on its own lane"
            } else {
                ""
            };
            let mut line = format!(
                "    subscribes to {} at qos {}{own_lane}{}",
                escaped(&subscription.filter),
                subscription.qos,
                queues(&subscription.queues)
            );
            if !subscription.denied.is_empty() {
                let denied = escaped(&subscription.denied.join(", "));
                line.push_str(&format!(", policy leaves out {denied}"));
            }
            lines.push(line);
        }
        lines.extend(more(
            self.subscription_count,
            self.subscriptions.len(),
            "subscriptions",
        ));
        lines
    }
}

impl Topic {
    fn lines(&self) -> Vec<String> {
        let topic = escaped(&self.topic);
        let mut lines = Vec::new();
        if self.receivers.is_empty() && self.responders == 0 {
            lines.push(format!("  nobody subscribes to {topic}"));
        }
        for receiver in &self.receivers {
            let denied = if receiver.denied {
                ", policy leaves the topic out"
            } else {
                ""
            };
            lines.push(format!(
                "  {topic} goes to {} by {} at qos {}, {}{}{denied}",
                session(&receiver.identity, &receiver.session),
                escaped(&receiver.filter),
                receiver.qos,
                presence(receiver.online, receiver.since_ms),
                queues(&receiver.queues)
            ));
        }
        lines.extend(more(self.receiver_count, self.receivers.len(), "receivers"));
        if let Some(retained) = &self.retained {
            let id = retained.message_id.as_deref();
            lines.push(format!(
                "  {topic} has a retained message of {} bytes from {}{}{}",
                retained.bytes,
                short(&retained.publisher),
                id.map_or_else(String::new, |id| format!(", message id {}", escaped(id))),
                retained
                    .published_ms
                    .map_or_else(String::new, |ms| format!(", published {}", time(ms)))
            ));
        }
        if self.history {
            lines.push(format!("  {topic} keeps history"));
        }
        if self.responders > 0 {
            lines.push(format!(
                "  {topic} is served by {} responders",
                self.responders
            ));
        }
        lines
    }
}

impl Message {
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for waiting in &self.waiting {
            let how = match (waiting.in_flight, waiting.online) {
                (true, _) => "was sent and is not acknowledged",
                (false, true) => "waits to be sent",
                (false, false) => "waits for the session to come back",
            };
            lines.push(format!(
                "  the message {how}: {} on {}, class {}",
                session(&waiting.identity, &waiting.session),
                escaped(&waiting.topic),
                escaped(&waiting.class)
            ));
        }
        for publisher in &self.taken_from {
            lines.push(format!(
                "  it was taken from {}; the same id once more would be a duplicate",
                short(publisher)
            ));
        }
        if lines.is_empty() {
            lines.push("  the message waits nowhere, and was not taken lately".to_owned());
        }
        if !self.complete {
            lines.push("  not every queue was looked at: there may be more".to_owned());
        }
        lines
    }
}

fn session(identity: &str, name: &str) -> String {
    format!("{} ({})", short(identity), escaped(name))
}

fn presence(online: bool, since_ms: u64) -> String {
    let word = if online { "online" } else { "offline" };
    format!("{word} since {}", time(since_ms))
}

fn queues(queues: &[Queue]) -> String {
    let queues = queues.iter().map(|queue| {
        let Queue {
            class,
            waiting_bytes,
            in_flight_bytes,
        } = queue;
        let class = escaped(class);
        format!(", {class}: {waiting_bytes} bytes wait, {in_flight_bytes} in flight")
    });
    queues.collect()
}

fn more(count: usize, shown: usize, what: &str) -> Option<String> {
    (count > shown).then(|| format!("  … and {} more {what}: see --limit", count - shown))
}

/// A time in UTC, to the second.
fn time(ms: u64) -> String {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    i64::try_from(ms / 1000)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(&format).ok())
        .unwrap_or_else(|| format!("{ms} ms"))
}
