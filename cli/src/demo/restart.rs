//! The broker goes and comes back: connections, subscriptions, services and models with it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use selvedge_client::{Client, Publish, Qos, Residency};
use serde_json::json;

use super::report::{Finding, shown};
use super::scene::{CAMERA, DASHBOARD, EDGE, OPERATOR, Scene};
use super::{calls, digits};
use crate::duration;

const TOPIC: &str = "plant-1/camera-3/heartbeat";
/// Time between heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(50);

/// Stops the broker, starts it again, and waits for everything to work as before.
pub(super) async fn restart(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    calls::start_press(scene).await?;
    scene.start_worker(EDGE).await?;
    let camera = scene.client(CAMERA).await?;
    let dashboard = scene.client(DASHBOARD).await?;
    let operator = scene.client(OPERATOR).await?;
    let mut seen = dashboard.subscribe(TOPIC).await?;
    let before = camera.stats().reconnects;

    let address = scene.quic()?;
    scene.stop_broker().await;
    disconnected(&camera).await?;
    progress.seen("the broker is stopped, and the camera has lost its connection");
    let back = Instant::now();
    scene.start_broker().await?;
    ensure!(
        scene.quic()? == address,
        "expected the broker on {address} again"
    );
    progress.seen(format_args!("the broker is started again on {address}"));

    // At once, whoever is back by then: a call waits for the press rather than say NOT_FOUND.
    let call = async {
        let reply = operator.call(calls::SET_SPEED, "900").await;
        let reply = reply.context("call the press after the restart")?;
        let expected = calls::speed_set("900", &Scene::uri(OPERATOR));
        ensure!(
            reply == expected.as_bytes(),
            "expected {expected:?} after the restart"
        );
        Ok(back.elapsed())
    };
    let messages = async {
        // The broker has forgotten the subscription until the dashboard is back, so the camera's
        // first heartbeats may find nobody.
        let beat = async {
            for number in 1_u32.. {
                let heartbeat = Publish::new(TOPIC, number.to_string()).qos(Qos::AtLeastOnce);
                camera.publish_message(heartbeat).await?;
                tokio::time::sleep(HEARTBEAT).await;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            message = seen.next() => message.context("the subscription ended")?,
            beat = beat => {
                beat.context("publish after the restart")?;
                unreachable!("heartbeats do not end");
            }
        };
        Ok(back.elapsed())
    };
    let image = digits::load()?
        .first()
        .context("expected an image")?
        .clone();
    let inference = async {
        // Bound to the site, it must not be refused because the cloud's worker was back first.
        let answer = camera
            .infer(image.question().residency(Residency::Site))
            .await;
        answer.context("ask after the restart")?;
        Ok(back.elapsed())
    };
    let (call, messages, inference): (Duration, Duration, Duration) =
        tokio::try_join!(call, messages, inference)?;

    let reconnects = camera.stats().reconnects - before;
    ensure!(
        reconnects >= 1,
        "expected the camera to count a reconnect, found none"
    );
    progress.seen(format_args!(
        "after the start: call answered in {}, messages flow in {}, inference in {}",
        shown(call),
        shown(messages),
        shown(inference)
    ));
    let all = call.max(messages).max(inference);
    Ok(Finding::new(
        format!(
            "connections, subscriptions, services and models were back within {}",
            shown(all)
        ),
        json!({
            "reconnects": reconnects,
            "call_ms": duration::millis(call),
            "messages_ms": duration::millis(messages),
            "inference_ms": duration::millis(inference),
        }),
    ))
}

async fn disconnected(client: &Client) -> anyhow::Result<()> {
    let mut state = client.state();
    let lost = state.wait_for(|state| !state.is_connected());
    lost.await.map(drop).context("the client has ended")
}
