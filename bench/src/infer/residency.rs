//! Requests that have to stay at their site: what reaches the cloud of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::ensure;
use bytes::Bytes;
use selvedge_client::{AnswerInfo, Client, Code, Infer, Preference, Residency, Tier};
use tokio_util::task::AbortOnDropHandle;

use super::figure::Figure;
use super::scene::{CLOUD, Ground, PLANT, work};

const SIZE: usize = 10_000;

pub(super) async fn measure(ground: &Ground<'_>, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let scene = ground.open().await?;
    let count = if quick { 50 } else { 500 };
    let gpu = scene.client(CLOUD, "gpu").await?;
    let (_cloud, at_cloud) = counting(&gpu, Tier::Cloud).await?;
    let device = scene.client(PLANT, "device").await?;
    let ask = async |residency| {
        let request = Infer::new("digits")
            .payload(Bytes::from(vec![7; SIZE]))
            .preference(Preference::Cloud)
            .idempotent(true)
            .residency(residency);
        device.infer(request).await
    };
    // The counting itself has to work.
    ask(Residency::Tenant).await?;
    ensure!(
        at_cloud.swap(0, Ordering::SeqCst) == SIZE,
        "the cloud did not count"
    );
    let mut refused = 0;
    for _ in 0..count {
        match ask(Residency::Site).await {
            Err(error) if error.code() == Code::FailedPrecondition => refused += 1,
            Err(error) => return Err(error.into()),
            Ok(answer) => anyhow::bail!("answered by {}", answer.answer.worker),
        }
    }
    let edge = scene.client(PLANT, "edge").await?;
    let (_edge, at_edge) = counting(&edge, Tier::Edge).await?;
    for _ in 0..count {
        ask(Residency::Site).await?;
    }
    Ok(vec![
        Figure::count("requests for their site while only the cloud works", count),
        Figure::count("of them refused with FAILED_PRECONDITION", refused),
        Figure::count(
            "payload bytes of as many with a worker at the site, seen there",
            at_edge.load(Ordering::SeqCst),
        ),
        Figure::count(
            "payload bytes of all of them that the cloud's worker saw",
            at_cloud.load(Ordering::SeqCst),
        )
        .at_most(0.0),
    ])
}

/// A worker that counts the bytes it is given.
async fn counting(
    client: &Client,
    tier: Tier,
) -> anyhow::Result<(AbortOnDropHandle<()>, Arc<AtomicUsize>)> {
    let mut worker = work(client, "digits", tier, 8).await?;
    let bytes = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&bytes);
    let task = tokio::spawn(async move {
        while let Some(mut request) = worker.next().await {
            while let Ok(Some(part)) = request.next().await {
                counter.fetch_add(part.len(), Ordering::SeqCst);
            }
            // Whoever asks sees it when this fails.
            let _ = request.reply(AnswerInfo::default(), "seven").await;
        }
    });
    Ok((AbortOnDropHandle::new(task), bytes))
}
