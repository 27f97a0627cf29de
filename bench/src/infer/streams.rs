//! Large bodies: chat completions through the front door, and the same natively, in front of a worker
//! that answers at once. Time to the first byte, and the broker's memory.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use selvedge_client::{Client, Infer, Tier};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::figure::{Figure, quantile};
use super::scene::{CLOUD, Ground, Http, PLANT, Scene, work};

/// Requests on their way at any time.
const AT_ONCE: usize = 150;
/// Bytes of a body that the anchor was measured with: 1,141 ms to the first byte on average.
const BODY: usize = 220_000;
/// A fifth of the anchor, in milliseconds.
const GOAL_MS: f64 = 1_141.0 / 5.0;
/// The largest body may cost so many times the memory of the smallest.
const MEMORY: f64 = 1.25;

const CHUNK: &str = r#"{"id":"1","object":"chat.completion.chunk","created":0,"model":"chat","choices":[{"index":0,"delta":{"content":"yes"},"finish_reason":null}]}"#;

pub(super) async fn measure(
    ground: &Ground<'_>,
    quick: bool,
    progress: &(dyn Fn(&str) + Sync),
) -> anyhow::Result<Vec<Figure>> {
    let each = if quick { 2 } else { 10 };
    let mut figures = Vec::new();
    for front in [true, false] {
        let way = if front { "front door" } else { "native" };
        let mut peaks = Vec::new();
        for (size, label) in [
            (BODY / 10, "22 KB"),
            (BODY, "220 KB"),
            (BODY * 10, "2.2 MB"),
        ] {
            // Each size has a broker of its own, or the peak would be that of the one before.
            let scene = ground.open().await?;
            let each = if size > BODY { each.min(2) } else { each };
            let (mut times, peak) = run(&scene, front, size, each)
                .await
                .with_context(|| format!("{way}, {label}"))?;
            let mean = times.iter().sum::<Duration>() / times.len().max(1) as u32;
            progress(&format!(
                "bodies {way} {label}: first byte {mean:.0?} on average, broker's peak {peak} KiB"
            ));
            peaks.push(peak as f64 / 1024.0);
            if size == BODY {
                let what = format!("first byte, {way}, {label}, {AT_ONCE} at once");
                figures.push(Figure::ms(format!("{what}, mean"), mean).at_most(GOAL_MS));
                figures.push(Figure::ms(
                    format!("{what}, p99"),
                    quantile(&mut times, 0.99),
                ));
            }
            figures.push(Figure::new(
                format!("peak of the broker's memory, {way}, {label}"),
                peak as f64 / 1024.0,
                "MiB",
            ));
        }
        if let (Some(least), Some(most)) = (peaks.first(), peaks.last()) {
            let what = format!("{way}, memory with 2.2 MB over that with 22 KB");
            figures.push(Figure::new(what, most / least, "times").at_most(MEMORY));
        }
    }
    Ok(figures)
}

/// Times to the first byte of so many requests in each of the lanes, and the broker's peak.
async fn run(
    scene: &Scene,
    front: bool,
    size: usize,
    each: usize,
) -> anyhow::Result<(Vec<Duration>, u64)> {
    let worker = scene.client(CLOUD, "worker").await?;
    let _answering = answering(&worker).await?;
    let text = "x".repeat(size);
    let body = format!(
        r#"{{"model":"chat","stream":true,"messages":[{{"role":"user","content":"{text}"}}]}}"#
    );
    let body = Bytes::from(body);
    let native = scene.client(PLANT, "device").await?;
    let mut lanes = JoinSet::new();
    for lane in 0..AT_ONCE {
        let body = body.clone();
        if front {
            let mut http = scene.http(&format!("lane-{lane}")).await?;
            lanes.spawn(async move {
                let mut times = Vec::new();
                for _ in 0..each {
                    times.push(ask_front(&mut http, body.clone()).await?);
                }
                anyhow::Ok(times)
            });
        } else {
            let client = native.clone();
            lanes.spawn(async move {
                let mut times = Vec::new();
                for _ in 0..each {
                    times.push(ask_native(&client, body.clone()).await?);
                }
                anyhow::Ok(times)
            });
        }
    }
    let mut times = Vec::new();
    while let Some(ended) = lanes.join_next().await {
        times.extend(ended??);
    }
    Ok((times, scene.peak_kib()?))
}

async fn ask_front(http: &mut Http, body: Bytes) -> anyhow::Result<Duration> {
    let request = Request::post("/v1/chat/completions")
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Full::new(body))?;
    let start = Instant::now();
    http.sender.ready().await?;
    let response = http.sender.send_request(request).await?;
    let status = response.status();
    let mut body = response.into_body();
    let mut first = None;
    while let Some(frame) = body.frame().await {
        frame?;
        first.get_or_insert_with(|| start.elapsed());
    }
    ensure!(status.is_success(), "expected 200, found {status}");
    first.context("the answer has no body")
}

async fn ask_native(client: &Client, body: Bytes) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let request = Infer::new("chat")
        .payload(body)
        .parameter("operation", "chat.completions");
    let mut answer = client.infer_stream(request).await?;
    let mut first = None;
    while answer.next().await?.is_some() {
        first.get_or_insert_with(|| start.elapsed());
    }
    first.context("the answer is empty")
}

/// A chat model that says a word at once.
async fn answering(client: &Client) -> anyhow::Result<AbortOnDropHandle<()>> {
    let mut worker = work(client, "chat", Tier::Cloud, AT_ONCE as u32 * 2).await?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut request) = worker.next().await {
            tokio::spawn(async move {
                if request.request().await.is_ok() {
                    // Whoever asks sees it when one of these fails.
                    let _ = request.send(CHUNK).await;
                    let _ = request.send(CHUNK).await;
                    let _ = request.finish().await;
                }
            });
        }
    })))
}
