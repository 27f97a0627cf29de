//! Calls: a machine that answers, and an operator who asks.

use anyhow::{Context as _, ensure};
use selvedge_client::{Bytes, Call, CallError, Code, IncomingCall, Status};
use serde_json::json;
use tokio_util::task::AbortOnDropHandle;

use super::report::Finding;
use super::scene::{OPERATOR, PRESS, Scene};

/// Answered with one message.
pub(super) const SET_SPEED: &str = "press-7/set-speed";
/// Answered line by line.
const DIAGNOSE: &str = "press-7/diagnose";

/// What the machine finds when it looks at itself.
const DIAGNOSIS: [&str; 5] = [
    "oil pressure 4.1 bar",
    "ram temperature 41 C",
    "guard closed",
    "12,873 strokes since service",
    "no fault found",
];

/// The operator sets a speed, and has the machine look at itself.
pub(super) async fn operate(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    start_press(scene).await?;
    let operator = scene.client(OPERATOR).await?;
    let me = Scene::uri(OPERATOR);

    let reply = operator.call(SET_SPEED, "1200").await?;
    let expected = speed_set("1200", &me);
    ensure!(
        reply == expected.as_bytes(),
        "expected {expected:?}, found {:?}",
        String::from_utf8_lossy(&reply)
    );
    progress.seen(format_args!("{SET_SPEED} 1200: {expected}"));

    let call = Call::new(DIAGNOSE).payload(Bytes::new());
    let mut answer = operator.call_with(call).await?;
    let mut lines = Vec::new();
    while let Some(line) = answer.next().await? {
        let line = String::from_utf8(line.to_vec()).context("expected text of the machine")?;
        progress.seen(format_args!("{DIAGNOSE}: {line}"));
        lines.push(line);
    }
    ensure!(
        lines == DIAGNOSIS,
        "expected {DIAGNOSIS:?}, found {lines:?}"
    );
    Ok(Finding::new(
        format!(
            "press-7 knew its caller, answered a call, and streamed {} lines to another",
            lines.len()
        ),
        json!({ "calls": 2, "streamed": lines.len(), "caller": me }),
    ))
}

/// Sees to it that the machine answers calls.
pub(super) async fn start_press(scene: &mut Scene) -> anyhow::Result<()> {
    if scene.press.is_some() {
        return Ok(());
    }
    let press = scene.client(PRESS).await?;
    let mut set_speed = press.serve(SET_SPEED).await?;
    let mut diagnose = press.serve(DIAGNOSE).await?;
    let answering = async move {
        loop {
            // Whoever gives a call up is the one to know of it.
            let _ = tokio::select! {
                Some(call) = set_speed.next() => answer_speed(call).await,
                Some(call) = diagnose.next() => answer_diagnosis(call).await,
                else => return,
            };
        }
    };
    scene.press = Some(AbortOnDropHandle::new(tokio::spawn(answering)));
    Ok(())
}

/// What the machine answers to a speed: it names its caller as the broker verified it.
pub(super) fn speed_set(speed: &str, caller: &str) -> String {
    format!("{speed} strokes an hour for {caller}")
}

async fn answer_speed(mut call: IncomingCall) -> Result<(), CallError> {
    let request = call.request().await?;
    let speed: Option<u32> = std::str::from_utf8(&request)
        .ok()
        .and_then(|text| text.parse().ok());
    match speed {
        Some(speed) => {
            let reply = speed_set(&speed.to_string(), call.caller());
            call.reply(reply).await
        }
        None => {
            let status = Status::new(Code::InvalidArgument, "expected a number of strokes");
            call.fail(status).await
        }
    }
}

async fn answer_diagnosis(mut call: IncomingCall) -> Result<(), CallError> {
    for line in DIAGNOSIS {
        call.send(line).await?;
    }
    call.finish().await
}
