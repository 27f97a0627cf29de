//! `selvedge demo`: a tour of the whole fabric that checks everything it shows.

mod calls;
mod digits;
mod inference;
mod messages;
mod mqtt;
mod refusals;
mod report;
mod restart;
mod scene;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;

use self::report::{Progress, Tour};
use self::scene::Scene;
use crate::output::Format;
use crate::signals::Signals;

/// How long a step may take, on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the step with thousands of inferences may take.
const LONG_LIMIT: Duration = Duration::from_secs(60);

/// `selvedge demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge demo
  selvedge demo --json > summary.json

Needs nothing: it makes its certificates, uses free ports of the loopback address and a temporary
folder, and cleans up. Exit code 0 when every step went as it should, else 1.")]
pub(crate) struct Args {
    /// Write the summary as one JSON object; progress goes to standard error.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let format = Format::from_flag(args.json);
    let mut scene = Scene::prepare(Progress::for_format(format))?;
    let mut tour = Tour::begin(scene.progress, 11);
    let interrupted = tokio::select! {
        () = take(&mut tour, &mut scene) => false,
        () = signals.next() => true,
    };
    signals.or_end_at_once(scene.shutdown()).await;
    if interrupted {
        bail!("interrupted before the end of the tour");
    }
    tour.summary(format)
}

/// The steps in their order. A step that fails does not keep the others from being tried.
async fn take(tour: &mut Tour, scene: &mut Scene) {
    tour.step(
        "broker",
        "a certificate for every party, and a broker that lets nobody else in",
        LIMIT,
        Box::pin(scene::open(scene)),
    )
    .await;
    tour.step(
        "messages",
        "a camera publishes images of handwritten digits, a dashboard receives them",
        LIMIT,
        Box::pin(messages::images(scene)),
    )
    .await;
    tour.step(
        "inference",
        "what does each image show? a small model at the plant, a large one in the cloud",
        LONG_LIMIT,
        Box::pin(inference::compare(scene)),
    )
    .await;
    tour.step(
        "cloud away",
        "without the cloud the plant goes on by itself",
        LIMIT,
        Box::pin(inference::cloud_away(scene)),
    )
    .await;
    tour.step(
        "residency",
        "an image that must stay at the plant never goes to the cloud",
        LIMIT,
        Box::pin(inference::edge_away(scene)),
    )
    .await;
    tour.step(
        "MQTT sensor",
        "a thermostat that only speaks MQTT joins over TLS with its certificate",
        LIMIT,
        Box::pin(mqtt::sensor(scene)),
    )
    .await;
    tour.step(
        "bridge",
        "sensors on an MQTT broker that was there before are brought in untouched",
        LIMIT,
        Box::pin(mqtt::bridge(scene)),
    )
    .await;
    tour.step(
        "calls",
        "an operator calls a machine, and streams its answer",
        LIMIT,
        Box::pin(calls::operate(scene)),
    )
    .await;
    tour.step(
        "denials",
        "a guest with a good certificate and no rights is told which rule stands in the way",
        LIMIT,
        Box::pin(refusals::denials(scene)),
    )
    .await;
    tour.step(
        "certificates",
        "whoever has the wrong certificate does not get in, and is told why",
        LIMIT,
        Box::pin(refusals::certificates(scene)),
    )
    .await;
    tour.step(
        "restart",
        "the broker goes away and comes back; nobody writes retry code",
        LIMIT,
        Box::pin(restart::restart(scene)),
    )
    .await;
}
