//! A display: everything that the presses say, and who said it.

use std::io::Write as _;

use anyhow::{Result, bail};
use selvedge_examples::connect;

#[tokio::main]
async fn main() -> Result<()> {
    let (client, arguments) = connect("[filter]").await?;
    let filter = arguments.first().map_or("press/#", String::as_str);

    // The subscription outlives connections: after a reconnect the messages simply go on.
    let mut messages = client.subscribe(filter).await?;
    while let Some(message) = messages.next().await {
        let text = String::from_utf8_lossy(&message.payload);
        // The publisher is the identity that the broker verified, so it cannot be forged.
        writeln!(
            std::io::stdout(),
            "{} from {}: {text}",
            message.topic,
            message.publisher
        )?;
    }
    match messages.end() {
        Some(status) => bail!("the broker ended the subscription: {status}"),
        None => Ok(()),
    }
}
