//! A question to a language model, answered word by word. Ctrl-C gives the answer up, and the worker stops.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use selvedge_client::Infer;
use selvedge_examples::connect;
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> Result<()> {
    let (client, arguments) = connect("question ...").await?;
    // What an OpenAI client would send: the worker reads it, the fabric passes it on.
    let request = json!({
        "model": "smollm2",
        "messages": [{"role": "user", "content": arguments.join(" ")}],
        "max_tokens": 200,
        "stream": true,
    });
    let request = Infer::new("smollm2")
        .payload(request.to_string())
        .parameter("operation", "chat.completions")
        .deadline(Duration::from_secs(120))
        // When the worker is lost midway, another goes on where it broke off.
        .idempotent(true)
        // The same worker for the same chat: it may still have the prompt.
        .routing_key("chat");
    let mut answer = client.infer_stream(request).await?;
    loop {
        let chunk = tokio::select! {
            chunk = answer.next() => chunk?,
            _ = tokio::signal::ctrl_c() => {
                answer.cancel();
                break;
            }
        };
        let Some(chunk) = chunk else {
            break;
        };
        let chunk: Value = serde_json::from_slice(&chunk).context("read a part of the answer")?;
        let words = chunk["choices"][0]["delta"]["content"].as_str();
        let mut out = std::io::stdout();
        write!(out, "{}", words.unwrap_or_default())?;
        out.flush()?;
    }
    writeln!(std::io::stdout())?;
    client.close().await;
    Ok(())
}
