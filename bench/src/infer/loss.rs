//! The cloud is lost while it has a request that may be made twice: how soon the edge has answered.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use selvedge_client::{AnswerInfo, Client, Infer, Preference, Tier};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::figure::{Figure, quantile};
use super::link::Link;
use super::scene::{CLOUD, Ground, PLANT, Scene, work};

const DEADLINE: Duration = Duration::from_secs(10);

/// A worker of a model in the cloud, behind a link.
struct Cloud {
    client: Client,
    endpoint: quinn::Endpoint,
    link: Link,
    /// Requests that it has and does not answer.
    held: mpsc::Receiver<()>,
    _task: AbortOnDropHandle<()>,
}

impl Cloud {
    async fn start(scene: &Scene, name: &str) -> anyhow::Result<Self> {
        let link = Link::to(scene.address()).await?;
        let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into())?;
        let options = scene
            .options(CLOUD, name)?
            .resolve(link.address())
            .endpoint(endpoint.clone());
        let client = Client::connect(options).await?;
        let mut worker = work(&client, "digits", Tier::Cloud, 8).await?;
        let (told, held) = mpsc::channel(8);
        let task = tokio::spawn(async move {
            while let Some(mut request) = worker.next().await {
                let told = told.clone();
                tokio::spawn(async move {
                    match request.request().await {
                        Ok(payload) if payload == "hold" => {
                            let _ = told.send(()).await;
                            request.cancelled().await;
                        }
                        Ok(_) => {
                            let _ = request.reply(AnswerInfo::default(), "seven").await;
                        }
                        Err(_) => {}
                    }
                });
            }
        });
        Ok(Self {
            client,
            endpoint,
            link,
            held,
            _task: AbortOnDropHandle::new(task),
        })
    }
}

pub(super) async fn measure(ground: &Ground<'_>, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let count = if quick { 3 } else { 20 };
    let mut refused = Vec::new();
    let mut silent = Vec::new();
    for cut in [false, true] {
        let scene = ground.open().await?;
        let edge = scene.client(PLANT, "edge").await?;
        let mut worker = work(&edge, "digits", Tier::Edge, 8).await?;
        tokio::spawn(async move {
            while let Some(mut request) = worker.next().await {
                tokio::spawn(async move {
                    if request.request().await.is_ok() {
                        let _ = request.reply(AnswerInfo::default(), "seven").await;
                    }
                });
            }
        });
        let device = scene.client(PLANT, "device").await?;
        let ask = |payload: &'static str| {
            let request = Infer::new("digits")
                .payload(payload)
                .preference(Preference::Cloud)
                .idempotent(true)
                .deadline(DEADLINE);
            device.infer(request)
        };
        for turn in 0..count {
            let mut cloud = Cloud::start(&scene, &format!("gpu-{turn}")).await?;
            // The budget for asking twice is earned by requests, and the path is measured by them.
            for _ in 0..10 {
                let answer = ask("ask").await.context("while all is well")?;
                ensure!(
                    answer.answer.tier == Some(Tier::Cloud),
                    "expected the cloud to answer while it is there: {}",
                    answer.answer.reason
                );
            }
            if cut {
                cloud.link.cut(true);
                let start = Instant::now();
                let answer = ask("ask").await.context("after the cut")?;
                silent.push(start.elapsed());
                ensure!(
                    answer.answer.tier == Some(Tier::Edge),
                    "expected the edge to answer: {}",
                    answer.answer.reason
                );
                cloud.link.cut(false);
                cloud.client.close().await;
            } else {
                let asking = ask("hold");
                let lost = async {
                    cloud.held.recv().await;
                    let start = Instant::now();
                    cloud.endpoint.close(0u32.into(), b"gone");
                    start
                };
                let (answer, start) = tokio::join!(
                    async { asking.await.map(|answer| (answer, Instant::now())) },
                    lost
                );
                let (answer, end) = answer.context("after the cloud was lost")?;
                refused.push(end.saturating_duration_since(start));
                ensure!(
                    answer.answer.tier == Some(Tier::Edge),
                    "expected the edge to answer: {}",
                    answer.answer.reason
                );
            }
        }
    }
    Ok(vec![
        Figure::ms(
            "cloud's connection closed to the edge's answer, p50",
            quantile(&mut refused, 0.5),
        ),
        Figure::ms("the same, longest", quantile(&mut refused, 1.0)).at_most(50.0),
        Figure::ms(
            "request into a cloud that is cut off to the edge's answer, p50",
            quantile(&mut silent, 0.5),
        ),
        Figure::ms("the same, longest", quantile(&mut silent, 1.0)).at_most(1_000.0),
    ])
}
