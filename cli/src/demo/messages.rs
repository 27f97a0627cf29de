//! Publish and subscribe: real images, byte for byte, from a publisher that was verified.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use selvedge_client::{Publish, Qos};
use serde_json::json;

use super::digits;
use super::report::Finding;
use super::scene::{CAMERA, DASHBOARD, Scene};

/// Where the camera publishes.
pub(super) const TOPIC: &str = "plant-1/camera-3/digit";
/// What the dashboard asks for: every camera of the plant.
const FILTER: &str = "plant-1/+/digit";

/// The camera publishes every test image, and the dashboard receives them all.
pub(super) async fn images(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    let digits = digits::load()?;
    let camera = scene.client(CAMERA).await?;
    let dashboard = scene.client(DASHBOARD).await?;
    let mut seen = dashboard.subscribe(FILTER).await?;

    let begun = Instant::now();
    let publish = async {
        for digit in &digits {
            let image = Publish::new(TOPIC, digit.image.clone()).qos(Qos::AtLeastOnce);
            camera.publish_message(image).await.context("publish")?;
        }
        anyhow::Ok(())
    };
    let receive = async {
        for (number, digit) in digits.iter().enumerate() {
            let message = seen.next().await.context("the subscription ended")?;
            ensure!(
                message.payload == digit.image,
                "image {number} arrived with other bytes than were sent"
            );
            ensure!(
                message.topic.as_str() == TOPIC && *message.publisher == *Scene::uri(CAMERA),
                "expected image {number} from {CAMERA} on {TOPIC}, found it from {} on {}",
                message.publisher,
                message.topic
            );
        }
        anyhow::Ok(())
    };
    tokio::try_join!(publish, receive)?;
    let rate = digits.len() as f64 / begun.elapsed().as_secs_f64();

    let bytes: usize = digits.iter().map(|digit| digit.image.len()).sum();
    progress.seen(format_args!(
        "camera-3 published to {TOPIC}, each acknowledged before the next: {rate:.0}/s"
    ));
    progress.seen(format_args!(
        "dashboard subscribed to {FILTER}; the broker vouches for the publisher of each image:"
    ));
    progress.seen(Scene::uri(CAMERA));
    let count = digits.len();
    Ok(Finding::new(
        format!("{count} of {count} images received, in order, byte for byte as they were sent"),
        json!({
            "published": count,
            "received": count,
            "bytes": bytes,
            "images_per_second": rate.round(),
        }),
    ))
}
