//! From the moment that a requester gives up to the moment that the worker hears of it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use selvedge_client::{Infer, Tier};
use tokio::sync::mpsc;

use super::figure::{Figure, quantile};
use super::scene::{CLOUD, Ground, PLANT, work};

const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn measure(ground: &Ground<'_>, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let scene = ground.open().await?;
    let client = scene.client(CLOUD, "worker").await?;
    let mut worker = work(&client, "chat", Tier::Cloud, 8).await?;
    let (told, mut stops) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(mut request) = worker.next().await {
            let told = told.clone();
            tokio::spawn(async move {
                if request.request().await.is_ok() && request.send("{}").await.is_ok() {
                    request.cancelled().await;
                    let _ = told.send(Instant::now()).await;
                }
            });
        }
    });
    let device = scene.client(PLANT, "device").await?;
    let count = if quick { 50 } else { 500 };
    let mut native = Vec::new();
    let mut whole = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        let mut answer = device
            .infer_stream(Infer::new("chat").payload("go on"))
            .await?;
        ensure!(answer.next().await?.is_some(), "expected a first message");
        whole.push(start.elapsed());
        let given_up = Instant::now();
        drop(answer);
        let stopped = tokio::time::timeout(PATIENCE, stops.recv())
            .await
            .context("the worker was not told")?;
        let stopped = stopped.context("the worker ended")?;
        native.push(stopped.saturating_duration_since(given_up));
    }
    let mut front = Vec::new();
    for place in 0..count / 5 {
        let mut http = scene.http(&format!("page-{place}")).await?;
        let body = r#"{"model":"chat","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
        let request = Request::post("/v1/chat/completions")
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from_static(body.as_bytes())))?;
        let mut body = http.sender.send_request(request).await?.into_body();
        body.frame().await.context("expected a first event")??;
        let given_up = Instant::now();
        drop((body, http));
        let stopped = tokio::time::timeout(PATIENCE, stops.recv())
            .await
            .context("the worker was not told of a closed connection")?;
        let stopped = stopped.context("the worker ended")?;
        front.push(stopped.saturating_duration_since(given_up));
    }
    let first = quantile(&mut whole, 0.5);
    Ok(vec![
        Figure::ms(
            "a request to its first message, which is one round trip, p50",
            first,
        ),
        Figure::ms(
            "given up by the requester to heard by the worker, p50",
            quantile(&mut native, 0.5),
        )
        .at_most(first.as_secs_f64() * 1e3),
        Figure::ms("the same, p99", quantile(&mut native, 0.99)),
        Figure::ms(
            "connection to the front door closed to heard by the worker, p50",
            quantile(&mut front, 0.5),
        ),
        Figure::ms("the same, p99", quantile(&mut front, 0.99)),
    ])
}
