//! What routing an inference adds to a direct call of the same worker, at 1,000 requests a second.
//!
//! Direct is a stream of a QUIC connection from the one who asks to the worker, with the same TLS, the
//! same settings and the same bytes, and nothing in between. Both are measured from the moment that a
//! request was due, in turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use quinn::{Connection, Endpoint};
use selvedge_broker::{Limits, quic};
use selvedge_certs::{Credentials, ReloadableCredentials, TrustAnchors};
use selvedge_client::{AnswerInfo, Client, Infer, Tier};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::figure::{Figure, quantile};
use super::scene::{CLOUD, Ground, PLANT, Scene, work};
use crate::compare::load::client_config;
use crate::compare::pki::SERVER_NAME;

/// Requests in a second.
const RATE: u32 = 1_000;
/// Bytes of a request and of its answer.
const SIZE: usize = 256;

#[derive(Clone)]
enum Way {
    Routed(Client),
    Direct(Connection),
}

impl Way {
    async fn ask(&self, payload: Bytes) -> anyhow::Result<usize> {
        match self {
            Self::Routed(client) => {
                let answer = client.infer(Infer::new("echo").payload(payload)).await?;
                Ok(answer.payload.len())
            }
            Self::Direct(connection) => {
                let (mut send, mut recv) = connection.open_bi().await?;
                send.write_chunk(payload).await?;
                send.finish()?;
                Ok(recv.read_to_end(SIZE * 2).await?.len())
            }
        }
    }
}

pub(super) async fn measure(
    ground: &Ground<'_>,
    quick: bool,
    progress: &(dyn Fn(&str) + Sync),
) -> anyhow::Result<Vec<Figure>> {
    let scene = ground.open().await?;
    let worker = scene.client(CLOUD, "worker").await?;
    let _answering = answering(&worker).await?;
    let (server, address) = listen(&scene)?;
    let direct = connect(&scene, address).await?;
    let ways = [
        Way::Routed(scene.client(PLANT, "device").await?),
        Way::Direct(direct),
    ];
    let (rounds, seconds) = if quick { (3, 1) } else { (7, 4) };
    for way in &ways {
        drive(way, 1).await.context("warm up")?;
    }
    let mut added = (Vec::new(), Vec::new());
    let mut halves = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let mut routed = drive(&ways[0], seconds).await.context("routed")?;
        let mut direct = drive(&ways[1], seconds).await.context("direct")?;
        let mut gap = |share| {
            let (routed, direct) = (quantile(&mut routed, share), quantile(&mut direct, share));
            (
                routed,
                direct,
                routed.as_secs_f64() * 1e3 - direct.as_secs_f64() * 1e3,
            )
        };
        let (half, tail) = (gap(0.5), gap(0.99));
        progress(&format!(
            "added {}/{rounds}: routed p50 {:.0?} p99 {:.0?}, direct p50 {:.0?} p99 {:.0?}",
            round + 1,
            half.0,
            tail.0,
            half.1,
            tail.1
        ));
        added.0.push(half.2);
        added.1.push(tail.2);
        halves.0.push(half.0);
        halves.1.push(half.1);
    }
    drop(server);
    let ms = |what, value| Figure::new(what, value, "ms");
    Ok(vec![
        Figure::ms(
            "routed, p50, 1,000 requests a second",
            quantile(&mut halves.0, 0.5),
        ),
        Figure::ms("direct, p50", quantile(&mut halves.1, 0.5)),
        ms("added by routing, p50", middle(&mut added.0)).at_most(0.3),
        ms("added by routing, p99", middle(&mut added.1)).at_most(1.5),
    ])
}

fn middle(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

async fn answering(client: &Client) -> anyhow::Result<AbortOnDropHandle<()>> {
    let mut worker = work(client, "echo", Tier::Cloud, 1_000).await?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut request) = worker.next().await {
            tokio::spawn(async move {
                if let Ok(payload) = request.request().await {
                    // Whoever asks sees it when this fails.
                    let _ = request.reply(AnswerInfo::default(), payload).await;
                }
            });
        }
    })))
}

/// A QUIC server that gives back what it gets.
fn listen(scene: &Scene) -> anyhow::Result<(AbortOnDropHandle<()>, std::net::SocketAddr)> {
    let pki = scene.pki();
    let credentials = Credentials::from_files(&pki.cert, &pki.key)?;
    let endpoint = quic::bind(
        ([127, 0, 0, 1], 0).into(),
        &ReloadableCredentials::new(credentials),
        &TrustAnchors::from_file(&pki.ca)?,
        &Limits::default(),
        &[selvedge_proto::ALPN],
    )?;
    let address = endpoint.local_addr()?;
    let serve = async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async move {
                let connection = incoming.await?;
                while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                    tokio::spawn(async move {
                        let payload = recv.read_to_end(SIZE * 2).await?;
                        send.write_chunk(payload.into()).await?;
                        send.finish()?;
                        anyhow::Ok(())
                    });
                }
                anyhow::Ok(())
            });
        }
    };
    Ok((AbortOnDropHandle::new(tokio::spawn(serve)), address))
}

async fn connect(scene: &Scene, address: std::net::SocketAddr) -> anyhow::Result<Connection> {
    let config = client_config(&scene.pki().folder, "direct")?;
    let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into())?;
    Ok(endpoint.connect_with(config, address, SERVER_NAME)?.await?)
}

/// Asks at the rate for so many seconds, and gives the time of each request from when it was due.
async fn drive(way: &Way, seconds: u32) -> anyhow::Result<Vec<Duration>> {
    let (due, mut dues) = mpsc::channel(RATE as usize);
    let stop = Arc::new(AtomicBool::new(false));
    // The timers of the runtime tick every millisecond; a thread sleeps to within 60 µs.
    let clock = {
        let stop = Arc::clone(&stop);
        move || {
            let start = Instant::now();
            for number in 0..RATE * seconds {
                let at = start + Duration::from_secs(1) * number / RATE;
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                if stop.load(Ordering::Relaxed) || due.blocking_send(at).is_err() {
                    return;
                }
            }
        }
    };
    let clock = std::thread::Builder::new()
        .name("clock".into())
        .spawn(clock)?;
    let payload = Bytes::from(vec![7; SIZE]);
    let mut asking = JoinSet::new();
    while let Some(at) = dues.recv().await {
        let (way, payload) = (way.clone(), payload.clone());
        asking.spawn(async move {
            let found = way.ask(payload).await?;
            let time = at.elapsed();
            anyhow::ensure!(found == SIZE, "expected {SIZE} bytes, found {found}");
            Ok(time)
        });
    }
    stop.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    while let Some(ended) = asking.join_next().await {
        times.push(ended??);
    }
    clock.join().map_err(|_| anyhow!("the clock panicked"))?;
    Ok(times)
}
