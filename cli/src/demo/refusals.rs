//! What must not work: acts without a right, and certificates that are no good.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail, ensure};
use selvedge_certs::{Authority, IssueRequest};
use selvedge_client::{
    CallError, Client, Code, ConnectError, Options, Publish, PublishError, Qos, Status,
    SubscribeError, TrustAnchors,
};
use serde_json::{Value, json};

use super::report::Finding;
use super::scene::{CAMERA, GUEST, Scene, TRUST_DOMAIN, request};
use super::{calls, digits, messages};

const DAY: Duration = Duration::from_secs(86_400);

/// The guest tries everything; each answer names what was asked and the rule that decided.
pub(super) async fn denials(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    calls::start_press(scene).await?;
    let guest = scene.client(GUEST).await?;
    let mut denials = Vec::new();
    let mut check = |status: Status, verb: &str, subject: &str, rule: Option<&str>| {
        progress.seen(&status);
        let denial = status.denial.as_ref();
        ensure!(
            status.code == Code::PermissionDenied
                && denial.is_some_and(|denial| {
                    (&*denial.verb, &*denial.subject, denial.rule.as_deref())
                        == (verb, subject, rule)
                }),
            "expected {verb} on {subject} to be denied by {rule:?}, found {status}"
        );
        denials.push(json!({ "verb": verb, "subject": subject, "rule": rule }));
        Ok(())
    };

    let forged = Publish::new(messages::TOPIC, "not an image").qos(Qos::AtLeastOnce);
    match guest.publish_message(forged).await {
        Err(PublishError::Refused(status)) => check(status, "publish", messages::TOPIC, None)?,
        other => bail!("expected the guest's message to be denied, found {other:?}"),
    }
    match guest.subscribe("plant-1/#").await {
        Err(SubscribeError::Refused(status)) => check(status, "subscribe", "plant-1/#", None)?,
        other => bail!("expected the guest's subscription to be denied, found {other:?}"),
    }
    let image = digits::load()?
        .first()
        .context("expected an image")?
        .clone();
    match guest.infer(image.question()).await {
        Err(CallError::Status(status)) => check(status, "infer", "digits", None)?,
        other => bail!("expected the guest's question to be denied, found {other:?}"),
    }
    match guest.call(calls::SET_SPEED, "9999").await {
        Err(CallError::Status(status)) => {
            let rule = Some("guests keep their hands off machines");
            check(status, "call", calls::SET_SPEED, rule)?;
        }
        other => bail!("expected the guest's call to be denied, found {other:?}"),
    }
    Ok(Finding::new(
        format!(
            "{} of {} acts denied, each answer naming verb, subject and rule",
            denials.len(),
            denials.len()
        ),
        json!({ "denials": denials }),
    ))
}

/// A certificate of another authority and one that is over are refused by the broker, and a broker
/// of another authority by the device.
pub(super) async fn certificates(scene: &mut Scene) -> anyhow::Result<Finding> {
    let progress = scene.progress;
    let uri = Scene::uri(CAMERA);
    let camera = request(CAMERA, IssueRequest::client)?;

    // The same trust domain and the same name: only the signature is not right.
    let others = Authority::create(TRUST_DOMAIN)?;
    let rogue = others.issue(&camera)?.credentials();
    let rogue = refused_by_broker(scene.options(&rogue)?).await?;
    progress.seen(format_args!("from another authority: {rogue}"));
    expect(&rogue, &[&uri, "an authority that is not trusted here"])?;

    let over = camera.not_before(SystemTime::now() - 2 * DAY).validity(DAY);
    let expired = scene.issue(&over)?;
    let expired = refused_by_broker(scene.options(&expired)?).await?;
    progress.seen(format_args!("expired yesterday: {expired}"));
    expect(&expired, &[&uri, "expired on"])?;

    let anchors = TrustAnchors::from_pem(others.ca_pem().as_bytes())?;
    let options = scene.options(scene.credentials(CAMERA)?)?.trust(anchors);
    let broker = match Client::connect(options).await {
        Err(ConnectError::Tls { reason }) => reason,
        Err(other) => return Err(other).context("expected the camera to refuse the broker"),
        Ok(_) => bail!("expected the camera to refuse a broker of another authority"),
    };
    progress.seen(format_args!(
        "a camera that trusts another authority only: {broker}"
    ));
    expect(&broker, &["an authority that is not trusted here"])?;
    let figures: Value = json!({
        "another_authority": rogue,
        "expired": expired,
        "another_broker": broker,
    });
    Ok(Finding::new(
        "a rogue, an expired certificate and a foreign broker refused, each by name and reason",
        figures,
    ))
}

async fn refused_by_broker(options: Options) -> anyhow::Result<String> {
    match Client::connect(options).await {
        Err(ConnectError::Refused { reason }) => Ok(reason),
        Err(other) => Err(other).context("expected the broker to refuse the certificate"),
        Ok(_) => bail!("expected the broker to refuse the certificate, found it let in"),
    }
}

fn expect(reason: &str, parts: &[&str]) -> anyhow::Result<()> {
    for part in parts {
        ensure!(
            reason.contains(part),
            "expected a refusal that says {part:?}, found {reason:?}"
        );
    }
    Ok(())
}
