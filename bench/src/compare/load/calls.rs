//! Calls: one client asks, another answers, each with the library that applications use.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use futures_util::StreamExt as _;
use hdrhistogram::Histogram;
use selvedge_certs::{Authority, IssueRequest, IssuedPaths, Overwrite};
use selvedge_client::{Client, Options, ServeOptions};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::LONGEST;
use crate::compare::job::{Calls, Job, Latency, Outcome, Protocol};
use crate::compare::pki::{CLIENT_SITE, SERVER_NAME, TENANT};
use crate::compare::process;

/// The service, and the subject in NATS.
const SERVICE: (&str, &str) = ("bench/echo", "bench.echo");

/// Who answers, until it is told to stop.
struct Answering {
    task: AbortOnDropHandle<()>,
    client: Option<Client>,
}

impl Answering {
    async fn cancel(self) {
        self.task.abort();
        if let Some(client) = self.client {
            client.close().await;
        }
    }
}

/// Who asks.
#[derive(Clone)]
enum Caller {
    Selvedge(Client),
    Nats(async_nats::Client),
}

impl Caller {
    async fn call(&self, request: Bytes) -> anyhow::Result<usize> {
        Ok(match self {
            Self::Selvedge(client) => client.call(SERVICE.0, request).await?.len(),
            Self::Nats(client) => client.request(SERVICE.1, request).await?.payload.len(),
        })
    }
}

/// Calls for as long as the job says, with so many on their way.
///
/// # Errors
/// The server cannot be reached, or a call fails.
pub(super) async fn run(job: &Job, wanted: &Calls) -> anyhow::Result<Outcome> {
    let (caller, responder) = match job.protocol {
        Protocol::Selvedge => selvedge(job).await?,
        Protocol::Nats => nats(job).await?,
        other => bail!("{other:?} has no calls"),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let counting = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for _ in 0..wanted.in_flight {
        let (caller, stop, counting) = (caller.clone(), Arc::clone(&stop), Arc::clone(&counting));
        let request = Bytes::from(vec![7; wanted.size]);
        callers.spawn(async move {
            let mut times = Histogram::<u64>::new_with_bounds(1, LONGEST, 3)?;
            while !stop.load(Ordering::Relaxed) {
                let counted = counting.load(Ordering::Relaxed);
                let start = Instant::now();
                let found = caller.call(request.clone()).await?;
                if found != request.len() {
                    bail!("expected {} bytes, found {found}", request.len());
                }
                if counted && counting.load(Ordering::Relaxed) {
                    times.saturating_record(nanos(start.elapsed()));
                }
            }
            anyhow::Ok(times)
        });
    }
    let warm_up = Duration::from_secs_f64(wanted.warm_up);
    pause(&mut callers, warm_up).await?;
    let cpu = process::cpu_time(job.server)?;
    let start = Instant::now();
    counting.store(true, Ordering::Relaxed);
    pause(&mut callers, Duration::from_secs_f64(wanted.seconds)).await?;
    counting.store(false, Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = (process::cpu_time(job.server)? - cpu).as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let mut times = Histogram::<u64>::new_with_bounds(1, LONGEST, 3)?;
    while let Some(ended) = callers.join_next().await {
        times.add(ended??)?;
    }
    // A QUIC connection does not end with its process, and a responder that lingers would get calls.
    if let Caller::Selvedge(caller) = &caller {
        caller.close().await;
    }
    responder.cancel().await;
    let quantile = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
    Ok(Outcome {
        count: times.len(),
        seconds,
        cpu_seconds,
        rss_kib: process::memory_kib(job.server)?,
        latency: Some(Latency {
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
        }),
        ..Outcome::default()
    })
}

/// Waits this long, or until a caller fails.
async fn pause(
    callers: &mut JoinSet<anyhow::Result<Histogram<u64>>>,
    time: Duration,
) -> anyhow::Result<()> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        Some(ended) = callers.join_next() => {
            ended??;
            Err(anyhow!("a caller stopped before its time"))
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

async fn selvedge(job: &Job) -> anyhow::Result<(Caller, Answering)> {
    let connect = async |name: &str| {
        let files = certificate(job, name)?;
        let options = Options::new(&format!("{SERVER_NAME}:{}", job.address.port()))?
            .resolve(job.address)
            .identity_files(&job.pki.join("ca.pem"), &files.cert, &files.key)?;
        anyhow::Ok(Client::connect(options).await?)
    };
    let responder = connect("responder").await?;
    let options = ServeOptions { max_in_flight: 0 };
    let mut calls = responder.serve_with(SERVICE.0, options).await?;
    let answering = tokio::spawn(async move {
        while let Some(mut call) = calls.next().await {
            tokio::spawn(async move {
                if let Ok(request) = call.request().await {
                    // The caller sees it when this fails.
                    let _ = call.reply(request).await;
                }
            });
        }
    });
    let caller = Caller::Selvedge(connect("caller").await?);
    let answering = Answering {
        task: AbortOnDropHandle::new(answering),
        client: Some(responder),
    };
    Ok((caller, answering))
}

async fn nats(job: &Job) -> anyhow::Result<(Caller, Answering)> {
    let connect = async |name: &str| {
        let files = certificate(job, name)?;
        let options = async_nats::ConnectOptions::new()
            .require_tls(true)
            .add_root_certificates(job.pki.join("ca.pem"))
            .add_client_certificate(files.cert, files.key);
        let server = format!("tls://{SERVER_NAME}:{}", job.address.port());
        anyhow::Ok(options.connect(server).await?)
    };
    let responder = connect("responder").await?;
    let mut requests = responder.subscribe(SERVICE.1).await?;
    // The server has seen the subscription before the first request comes.
    responder.flush().await?;
    let answering = tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            if let Some(reply) = request.reply {
                // The caller sees it when this fails.
                let _ = responder.publish(reply, request.payload).await;
            }
        }
    });
    let caller = Caller::Nats(connect("caller").await?);
    let answering = Answering {
        task: AbortOnDropHandle::new(answering),
        client: None,
    };
    Ok((caller, answering))
}

fn certificate(job: &Job, name: &str) -> anyhow::Result<IssuedPaths> {
    let authority = Authority::load(&job.pki).context("load the authority")?;
    let request = IssueRequest::client(TENANT, CLIENT_SITE, name);
    Ok(authority.issue_into(&job.pki, &request, Overwrite::Yes)?)
}
