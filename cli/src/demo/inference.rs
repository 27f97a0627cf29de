//! Inference at the edge, in the cloud, and at the edge first: how good, how fast, and where.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use selvedge_client::{
    Answer, CallError, Client, Code, Infer, Inference, Preference, Residency, Tier,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::digits::{self, Digit, Metrics};
use super::report::{Finding, Progress};
use super::scene::{CAMERA, CLOUD, EDGE, Scene};
use crate::duration;

/// Requests that the camera has under way.
pub(super) const IN_FLIGHT: usize = 8;
/// Edge answers below this confidence go to the cloud.
const MIN_CONFIDENCE: f32 = 0.8;
/// How far an accuracy may be from what was measured at training.
const TOLERANCE: f64 = 0.01;

/// The answers to every image, asked in one way.
struct Run {
    answers: Vec<Read>,
    /// How long each took, shortest first.
    latencies: Vec<Duration>,
}

/// An answer, and what was read in it.
struct Read {
    answer: Answer,
    digit: usize,
    right: bool,
}

impl Run {
    /// Asks for every image, several at a time.
    async fn ask(
        camera: &Client,
        digits: &[Digit],
        how: fn(Infer) -> Infer,
    ) -> anyhow::Result<Self> {
        let mut waiting = digits.iter().cloned().enumerate();
        let mut asking = JoinSet::new();
        let mut answers = Vec::new();
        loop {
            while asking.len() < IN_FLIGHT
                && let Some((index, digit)) = waiting.next()
            {
                let camera = camera.clone();
                asking.spawn(async move {
                    let begun = Instant::now();
                    let answer = camera.infer(how(digit.question())).await;
                    (index, digit.label, answer, begun.elapsed())
                });
            }
            let Some(done) = asking.join_next().await else {
                break;
            };
            let (index, label, answer, took) = done.context("wait for an answer")?;
            let answer: Inference = answer.with_context(|| format!("ask for image {index}"))?;
            let digit = digits::read(&answer)?;
            let read = Read {
                answer: answer.answer,
                digit,
                right: digit == label,
            };
            answers.push((index, read, took));
        }
        let mut latencies: Vec<Duration> = answers.iter().map(|(.., took)| *took).collect();
        latencies.sort();
        answers.sort_by_key(|(index, ..)| *index);
        Ok(Self {
            answers: answers.into_iter().map(|(_, read, _)| read).collect(),
            latencies,
        })
    }

    fn accuracy(&self) -> f64 {
        self.share(|read| read.right)
    }

    fn escalated(&self) -> f64 {
        self.share(|read| read.answer.escalated)
    }

    fn share(&self, counts: impl Fn(&Read) -> bool) -> f64 {
        let count = self.answers.iter().filter(|read| counts(read)).count();
        count as f64 / self.answers.len() as f64
    }

    /// The latency that this share of the requests stays within.
    fn percentile(&self, share: f64) -> Duration {
        let rank = (share * self.latencies.len() as f64).ceil() as usize;
        let index = rank.clamp(1, self.latencies.len()) - 1;
        self.latencies[index]
    }

    /// Whether every answer came from this worker.
    fn all_from(&self, worker: &str) -> bool {
        let worker = Scene::uri(worker);
        (self.answers.iter()).all(|read| *read.answer.worker == *worker)
    }

    fn show(&self, progress: Progress, name: &str) {
        progress.seen(format_args!(
            "{name:<29}  {:>5.1} % right  p50 {:>6}  p99 {:>6}  {:>5.1} % sent up",
            self.accuracy() * 100.0,
            short(self.percentile(0.5)),
            short(self.percentile(0.99)),
            self.share(|read| read.answer.tier == Some(Tier::Cloud)) * 100.0,
        ));
    }

    fn figures(&self) -> Value {
        let round = |share: f64| (share * 10_000.0).round() / 10_000.0;
        json!({
            "requests": self.answers.len(),
            "accuracy": round(self.accuracy()),
            "p50_ms": duration::millis(self.percentile(0.5)),
            "p99_ms": duration::millis(self.percentile(0.99)),
            "sent_up": round(self.share(|read| read.answer.tier == Some(Tier::Cloud))),
        })
    }

    fn agrees_with(&self, what: &str, expected: f64) -> anyhow::Result<()> {
        let found = self.accuracy();
        ensure!(
            (found - expected).abs() <= TOLERANCE,
            "expected {what} to be right in {:.1} % as at training, found {:.1} %",
            expected * 100.0,
            found * 100.0
        );
        Ok(())
    }
}

/// Asks for all test images at the edge only, in the cloud only, and at the edge first.
pub(super) async fn compare(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    let digits = digits::load()?;
    let metrics = Metrics::load()?;
    scene.start_worker(EDGE).await?;
    scene.start_worker(CLOUD).await?;
    let camera = scene.client(CAMERA).await?;
    progress.seen(format_args!(
        "{} labelled images that neither model was trained on, {IN_FLIGHT} requests at a time.",
        digits.len()
    ));
    progress.seen("Edge and cloud are both on this machine, so the cloud is not far away here.");

    let edge = Run::ask(&camera, &digits, |ask| ask.residency(Residency::Site)).await?;
    edge.show(progress, "edge only");
    let cascade = Run::ask(&camera, &digits, |ask| {
        ask.preference(Preference::Edge)
            .min_confidence(MIN_CONFIDENCE)
    })
    .await?;
    cascade.show(progress, "edge first, cloud when unsure");
    let cloud = Run::ask(&camera, &digits, |ask| ask.preference(Preference::Cloud)).await?;
    cloud.show(progress, "cloud only");
    show_escalation(progress, &digits, &edge, &cascade);

    ensure!(
        edge.all_from(EDGE),
        "expected requests bound to the plant to be answered there, found one that was not"
    );
    ensure!(
        cloud.all_from(CLOUD),
        "expected requests that prefer the cloud to be answered there while it has room"
    );
    ensure!(
        cascade.accuracy() > edge.accuracy(),
        "expected the cascade to be right more often than the edge alone"
    );
    let sent_up = cascade.escalated();
    ensure!(
        sent_up > 0.0 && sent_up < 1.0,
        "expected some images to be sent up and some not, found {:.1} %",
        sent_up * 100.0
    );
    edge.agrees_with("the edge model", metrics.edge.accuracy)?;
    cloud.agrees_with("the cloud model", metrics.cloud.accuracy)?;
    let expected = metrics.cascade(f64::from(MIN_CONFIDENCE))?;
    cascade.agrees_with("the cascade", expected)?;
    Ok(Finding::new(
        format!(
            "right: edge {:.1} %, cascade {:.1} % ({:.1} % sent up), cloud {:.1} %",
            edge.accuracy() * 100.0,
            cascade.accuracy() * 100.0,
            sent_up * 100.0,
            cloud.accuracy() * 100.0
        ),
        json!({
            "images": digits.len(),
            "in_flight": IN_FLIGHT,
            "min_confidence": 0.8,
            "edge_only": edge.figures(),
            "cascade": cascade.figures(),
            "cloud_only": cloud.figures(),
        }),
    ))
}

/// The cloud worker goes; an answer the edge is unsure of is better than none.
pub(super) async fn cloud_away(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    let digits = digits::load()?;
    scene.start_worker(EDGE).await?;
    let camera = scene.client(CAMERA).await?;
    let (number, confidence) = unsure(&camera, &digits).await?;

    scene.stop_worker(CLOUD).await;
    progress.seen("cloud-worker is stopped");
    let request = digits[number]
        .question()
        .preference(Preference::Edge)
        .min_confidence(MIN_CONFIDENCE);
    let answered = camera.infer(request).await;
    scene.start_worker(CLOUD).await?;
    let answer = answered.context("ask while the cloud is away")?.answer;
    progress.seen(format_args!(
        "answered by {}: {}",
        answer.worker, answer.reason
    ));
    ensure!(
        *answer.worker == *Scene::uri(EDGE) && !answer.escalated,
        "expected an answer of the edge worker, found one of {}",
        answer.worker
    );
    ensure!(
        answer.reason.contains("kept"),
        "expected the reason to say that the edge answer was kept, found {:?}",
        answer.reason
    );
    Ok(Finding::new(
        format!(
            "an image that the edge is only {:.0} % sure of was answered all the same",
            confidence * 100.0
        ),
        json!({ "image": number, "confidence": confidence, "reason": answer.reason }),
    ))
}

/// The edge worker goes; what must stay at the plant is refused rather than sent away.
pub(super) async fn edge_away(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    let digits = digits::load()?;
    scene.start_worker(CLOUD).await?;
    let camera = scene.client(CAMERA).await?;

    scene.stop_worker(EDGE).await;
    progress.seen("edge-worker is stopped; only the cloud could answer");
    let bound = (camera.infer(digits[0].question().residency(Residency::Site))).await;
    let free = camera.infer(digits[0].question()).await;
    scene.start_worker(EDGE).await?;
    let again = (camera.infer(digits[0].question().residency(Residency::Site))).await;

    let status = match bound {
        Err(CallError::Status(status)) => status,
        Err(other) => return Err(other).context("ask for what must stay at the plant"),
        Ok(answer) => bail!(
            "expected a refusal, found that {} got the image",
            answer.answer.worker
        ),
    };
    progress.seen(format_args!("refused: {status}"));
    ensure!(
        status.code == Code::FailedPrecondition,
        "expected FAILED_PRECONDITION, found {}",
        status.code
    );
    let free = free.context("ask for what may go to the cloud")?;
    ensure!(
        *free.answer.worker == *Scene::uri(CLOUD),
        "expected what may travel to be answered in the cloud, found {}",
        free.answer.worker
    );
    progress.seen("the same image without that bound: answered in the cloud");
    let again = again.context("ask once the edge worker is back")?;
    ensure!(
        *again.answer.worker == *Scene::uri(EDGE),
        "expected the edge worker to answer again, found {}",
        again.answer.worker
    );
    progress.seen("with edge-worker back: answered at the plant");
    Ok(Finding::new(
        "refused with FAILED_PRECONDITION while only the cloud could answer",
        json!({ "code": status.code.as_str(), "message": status.message }),
    ))
}

/// The first image that the edge is unsure of, and how sure it is.
async fn unsure(camera: &Client, digits: &[Digit]) -> anyhow::Result<(usize, f32)> {
    for (number, digit) in digits.iter().enumerate() {
        let answer = (camera.infer(digit.question().residency(Residency::Site))).await?;
        match answer.answer.confidence {
            Some(confidence) if confidence < MIN_CONFIDENCE => return Ok((number, confidence)),
            Some(_) => {}
            None => bail!("expected the edge model to say how sure it is"),
        }
    }
    bail!("expected an image that the edge model is unsure of, found none");
}

/// Draws an image that the edge read wrong and the cloud right.
fn show_escalation(progress: Progress, digits: &[Digit], edge: &Run, cascade: &Run) {
    let pairs = edge.answers.iter().zip(&cascade.answers);
    let better =
        |(edge, cascade): &(&Read, &Read)| !edge.right && cascade.right && cascade.answer.escalated;
    let Some((number, (edge, cascade))) = pairs.enumerate().find(|(_, pair)| better(pair)) else {
        return;
    };
    let sure = |answer: &Answer| answer.confidence.unwrap_or_default() * 100.0;
    let said = [
        "one that was sent up:".to_owned(),
        format!("edge:  a {}? {:.0} % sure", edge.digit, sure(&edge.answer)),
        format!(
            "cloud: a {}, {:.0} % sure",
            cascade.digit,
            sure(&cascade.answer)
        ),
        format!("truth: a {}", digits[number].label),
    ];
    let said = said.iter().map(String::as_str).chain(std::iter::repeat(""));
    progress.seen("");
    // What is said stands beside the middle of the image.
    let beside = ["", ""].into_iter().chain(said);
    for (row, said) in digits[number].drawn().iter().zip(beside) {
        progress.seen(format_args!("    |{row}|  {said}").to_string().trim_end());
    }
    progress.seen("");
}

/// A latency for people.
fn short(latency: Duration) -> String {
    format!("{:.1} ms", latency.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_latencies_that_were_seen() {
        let run = |millis: std::ops::RangeInclusive<u64>| Run {
            answers: Vec::new(),
            latencies: millis.map(Duration::from_millis).collect(),
        };
        let hundred = run(1..=100);
        assert_eq!(hundred.percentile(0.5), Duration::from_millis(50));
        assert_eq!(hundred.percentile(0.99), Duration::from_millis(99));
        assert_eq!(hundred.percentile(1.0), Duration::from_millis(100));
        assert_eq!(run(7..=7).percentile(0.01), Duration::from_millis(7));
    }
}
