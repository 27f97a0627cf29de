//! A worker for tests of clients: `echo` repeats what it is told, `slow` never answers, and `full` has no
//! room.
#![allow(clippy::print_stdout)]

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use selvedge_client::{Code, Options, Status, TensorSpec, Tier};
use selvedge_worker::engine::{Answering, Capacity, Engine, JSON, Reply, Request};
use selvedge_worker::{ModelSpec, Worker, WorkerOptions};
use serde_json::{Value, json};
use tokio::sync::watch;

/// Answer chats by repeating them, as a worker of a fabric of `selvedge dev`.
#[derive(Debug, Parser)]
struct Args {
    /// The broker.
    #[arg(long)]
    broker: String,
    /// The folder of certificates of the fabric.
    #[arg(long)]
    pki: PathBuf,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Echo {
    /// The last message comes back, a word at a time.
    Repeat,
    /// Nothing, for ever.
    Wait,
    /// It is turned away.
    Refuse,
}

/// Between two words of a stream, so that one can be given up in the middle.
const BETWEEN_WORDS: Duration = Duration::from_millis(20);

impl Engine for Echo {
    fn inputs(&self) -> Vec<TensorSpec> {
        if *self == Self::Wait {
            // Anything.
            return Vec::new();
        }
        let operation = TensorSpec {
            name: "chat.completions".to_owned(),
            datatype: JSON.to_owned(),
            shape: Vec::new(),
        };
        vec![operation]
    }

    fn outputs(&self) -> Vec<TensorSpec> {
        self.inputs()
    }

    fn capacity(&self) -> watch::Receiver<Capacity> {
        let capacity = Capacity {
            slots: u32::MAX,
            loaded: true,
        };
        watch::Sender::new(capacity).subscribe()
    }

    fn answer(self: Arc<Self>, request: Request, reply: Reply) -> Answering {
        Box::pin(async move {
            match *self {
                Self::Repeat => repeat(&request, &reply).await,
                Self::Wait => std::future::pending().await,
                Self::Refuse => Err(Status::new(Code::ResourceExhausted, "there is no room")
                    .retry_after(Duration::from_millis(250))),
            }
        })
    }
}

async fn repeat(request: &Request, reply: &Reply) -> Result<(), Status> {
    let asked: Value = serde_json::from_slice(&request.payload)
        .map_err(|error| Status::new(Code::InvalidArgument, error.to_string()))?;
    let messages = asked["messages"].as_array();
    let last = messages.and_then(|messages| messages.last());
    let text = last.and_then(|message| message["content"].as_str());
    let text = text.ok_or_else(|| Status::new(Code::InvalidArgument, "expected a message"))?;
    let object = |kind: &str, choice: Value| {
        let mut choice = choice;
        choice["index"] = 0.into();
        json!({
            "id": request.id, "object": kind, "created": 0, "model": asked["model"],
            "choices": [choice],
        })
        .to_string()
    };
    if asked["stream"] != true {
        let message = json!({"role": "assistant", "content": text});
        let choice = json!({"message": message, "finish_reason": "stop"});
        return Ok(reply.send(object("chat.completion", choice)).await?);
    }
    let words: Vec<&str> = text.split_inclusive(' ').collect();
    for (at, word) in words.iter().enumerate() {
        let finish = (at + 1 == words.len()).then_some("stop");
        let delta = json!({"role": "assistant", "content": word});
        let choice = json!({"delta": delta, "finish_reason": finish});
        reply.send(object("chat.completion.chunk", choice)).await?;
        tokio::time::sleep(BETWEEN_WORDS).await;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let identity = args.pki.join("dev/local/admin");
    let client = Options::new(&args.broker)?
        .server_name("localhost")
        .identity_files(
            &args.pki.join("ca.pem"),
            &identity.join("cert.pem"),
            &identity.join("key.pem"),
        )?;
    let one = |name| ModelSpec::new(name).slots(NonZeroU32::MIN);
    let options = WorkerOptions::new(client, Tier::Edge)
        .engine(one("echo"), Arc::new(Echo::Repeat))
        .engine(one("slow"), Arc::new(Echo::Wait))
        .engine(one("full"), Arc::new(Echo::Refuse));
    let mut worker = Worker::start(options).await.context("start the worker")?;
    println!("ready");
    worker.ended().await;
    Ok(())
}
