//! A camera that asks what it sees: near by if possible, in the cloud if that is not sure enough.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use selvedge_client::{Infer, Preference, Tensor};
use selvedge_examples::connect;

#[tokio::main]
async fn main() -> Result<()> {
    let (client, arguments) = connect("[pixel ...]").await?;
    // An image of a digit, 8 by 8 pixels with values from 0 to 16.
    let mut pixels = Vec::new();
    for pixel in &arguments {
        pixels.push(pixel.parse().context("expected pixels as numbers")?);
    }
    pixels.resize(64, 0.0);

    let request = Infer::new("digits")
        .tensors(vec![Tensor::fp32("input", vec![1, 64], &pixels)])
        .preference(Preference::Edge)
        .min_confidence(0.9)
        .deadline(Duration::from_secs(2))
        .idempotent(true);
    let inference = client.infer(request).await?;

    let answer = &inference.answer;
    writeln!(
        std::io::stdout(),
        "{} answered with confidence {:?} because {}",
        answer.worker,
        answer.confidence,
        answer.reason
    )?;
    for tensor in inference.tensors()? {
        writeln!(std::io::stdout(), "{}: {:?}", tensor.name, tensor.as_fp32())?;
    }
    client.close().await;
    Ok(())
}
