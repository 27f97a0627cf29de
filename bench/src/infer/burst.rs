//! Ten thousand requests at once for sixteen slots.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use selvedge_client::{AnswerInfo, Infer, Tier};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::figure::Figure;
use super::scene::{CLOUD, Ground, PLANT, work};

const SLOTS: usize = 16;
const CLIENTS: usize = 20;
const REQUESTS: usize = 10_000;
const WORK: Duration = Duration::from_millis(2);
const DEADLINE: Duration = Duration::from_secs(10);

pub(super) async fn measure(ground: &Ground<'_>, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let scene = ground.open().await?;
    let client = scene.client(CLOUD, "worker").await?;
    let mut worker = work(&client, "busy", Tier::Cloud, SLOTS as u32).await?;
    let running = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicUsize::new(0));
    let (counted, beyond) = (Arc::clone(&running), Arc::clone(&over));
    tokio::spawn(async move {
        while let Some(mut request) = worker.next().await {
            // Counted as it comes, before anything can hold it up.
            if counted.fetch_add(1, Ordering::SeqCst) >= SLOTS {
                beyond.fetch_add(1, Ordering::SeqCst);
            }
            let counted = Arc::clone(&counted);
            tokio::spawn(async move {
                let asked = request.request().await;
                tokio::time::sleep(WORK).await;
                // Before the broker can know that the slot is free.
                counted.fetch_sub(1, Ordering::SeqCst);
                if asked.is_ok() {
                    // Whoever asks sees it when this fails.
                    let _ = request.reply(AnswerInfo::default(), "done").await;
                }
            });
        }
    });
    let requests = if quick { REQUESTS / 10 } else { REQUESTS };
    let start = Arc::new(Barrier::new(requests));
    let mut asking = JoinSet::new();
    for place in 0..CLIENTS {
        let device = scene.client(PLANT, &format!("device-{place}")).await?;
        for _ in 0..requests / CLIENTS {
            let (device, start) = (device.clone(), Arc::clone(&start));
            asking.spawn(async move {
                start.wait().await;
                let asked = device.infer(Infer::new("busy").deadline(DEADLINE));
                match tokio::time::timeout(DEADLINE + Duration::from_secs(1), asked).await {
                    Ok(Ok(_)) => "OK".to_owned(),
                    Ok(Err(error)) => error.code().as_str().to_owned(),
                    Err(_) => "no answer".to_owned(),
                }
            });
        }
    }
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    while let Some(ended) = asking.join_next().await {
        *outcomes.entry(ended?).or_default() += 1;
    }
    let unanswered = outcomes.remove("no answer").unwrap_or_default();
    let mut figures = vec![
        Figure::count("requests at once for 16 slots", requests),
        Figure::count(
            "over-admitted, counted at the worker",
            over.load(Ordering::SeqCst),
        )
        .at_most(0.0),
        Figure::count("not answered by the deadline and a second", unanswered).at_most(0.0),
    ];
    for (code, count) in outcomes {
        figures.push(Figure::count(format!("ended with {code}"), count));
    }
    Ok(figures)
}
