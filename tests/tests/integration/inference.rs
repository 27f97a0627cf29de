//! Inference: placement by credits, residency and confidence.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use selvedge_client::{
    AnswerInfo, Client, Code, IncomingInference, Infer, ModelRegistration, Residency, Tier,
    WorkerHandle,
};
use selvedge_tests::TestBroker;
use selvedge_tests::wait::within;
use tokio_util::task::AbortOnDropHandle;

fn registration(model: &str, tier: Tier, slots: u32) -> ModelRegistration {
    ModelRegistration {
        model: model.into(),
        version: "1".into(),
        tier,
        slots,
        inputs: Vec::new(),
        outputs: Vec::new(),
        loaded: true,
        service_time: Some(Duration::from_millis(1)),
    }
}

fn sure(confidence: f32) -> AnswerInfo {
    AnswerInfo {
        confidence: Some(confidence),
        ..Default::default()
    }
}

async fn incoming(worker: &mut WorkerHandle) -> IncomingInference {
    within("an inference", worker.next())
        .await
        .expect("the model is registered")
}

/// Answers every request with `answer` at this confidence, until dropped.
async fn answering(
    client: &Client,
    tier: Tier,
    confidence: f32,
    answer: &'static str,
) -> AbortOnDropHandle<()> {
    let mut worker = client.work(registration("digits", tier, 4)).await.unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut inference) = worker.next().await {
            if inference.request().await.is_ok() {
                let _ = inference.reply(sure(confidence), answer).await;
            }
        }
    }))
}

#[tokio::test]
async fn an_inference_says_where_it_ran_and_why() {
    let broker = TestBroker::open().await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let mut worker = edge
        .work(registration("digits", Tier::Edge, 1))
        .await
        .unwrap();
    let (inference, ()) = tokio::join!(
        camera.infer(Infer::new("digits").payload("image").request_id("r-1")),
        async {
            let mut asked = incoming(&mut worker).await;
            assert_eq!((asked.model(), asked.request_id()), ("digits", "r-1"));
            assert_eq!(
                asked.caller(),
                "spiffe://test.example/acme/plant-1/camera-3"
            );
            assert_eq!(asked.request().await.unwrap(), "image");
            asked.reply(sure(0.9), "seven").await.unwrap();
        }
    );
    let inference = inference.unwrap();
    assert_eq!(inference.payload, "seven");
    let answer = inference.answer;
    assert_eq!(&*answer.worker, "spiffe://test.example/acme/plant-1/edge-1");
    assert_eq!(
        (answer.tier, answer.confidence),
        (Some(Tier::Edge), Some(0.9))
    );
    assert_eq!(
        (answer.model.as_str(), answer.version.as_str()),
        ("digits", "1")
    );
    assert_eq!(answer.request_id, "r-1");
    assert!(!answer.reason.is_empty() && !answer.escalated);
}

#[tokio::test]
async fn a_worker_never_gets_more_requests_than_it_has_slots() {
    let broker = TestBroker::open().await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let mut worker = edge
        .work(registration("digits", Tier::Edge, 2))
        .await
        .unwrap();
    let (busy, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (counting, peak) = (Arc::clone(&busy), Arc::clone(&most));
    let _working = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut inference) = worker.next().await {
            let (busy, most) = (Arc::clone(&counting), Arc::clone(&peak));
            most.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::spawn(async move {
                let request = inference.request().await.unwrap();
                // Let others come in meanwhile if the broker would send them.
                for _ in 0..20 {
                    tokio::task::yield_now().await;
                }
                busy.fetch_sub(1, Ordering::SeqCst);
                inference
                    .reply(AnswerInfo::default(), request)
                    .await
                    .unwrap();
            });
        }
    }));
    let mut requests = tokio::task::JoinSet::new();
    for number in 0..200 {
        let camera = camera.clone();
        requests.spawn(async move {
            let request = Infer::new("digits").payload(number.to_string());
            assert_eq!(
                camera.infer(request).await.unwrap().payload,
                number.to_string()
            );
        });
    }
    within("all inferences", requests.join_all()).await;
    let most = most.load(Ordering::SeqCst);
    assert!(most <= 2, "{most} requests at once with 2 slots");
}

#[tokio::test]
async fn a_payload_bound_to_its_site_never_leaves_it() {
    let broker = TestBroker::open().await;
    let camera = broker.client("acme/plant-1/camera-3").await;
    let cloud = broker.client("acme/cloud/gpu-1").await;
    let _cloud = answering(&cloud, Tier::Cloud, 0.99, "cloud").await;
    let bound = || {
        Infer::new("digits")
            .payload("face")
            .residency(Residency::Site)
    };
    let free = camera
        .infer(Infer::new("digits").payload("part"))
        .await
        .unwrap();
    assert_eq!(free.payload, "cloud");
    let error = camera.infer(bound()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    broker
        .metric_reaches("selvedge_privacy_refusals_total", &[], 1)
        .await;

    let edge = broker.client("acme/plant-1/edge-1").await;
    let _edge = answering(&edge, Tier::Edge, 0.2, "edge").await;
    // Not even for the sake of confidence.
    let kept = camera.infer(bound().min_confidence(0.8)).await.unwrap();
    assert_eq!(
        (&kept.payload[..], kept.answer.escalated),
        (&b"edge"[..], false)
    );
}

#[tokio::test]
async fn an_unsure_edge_answer_gives_way_to_the_cloud() {
    let broker = TestBroker::open().await;
    let camera = broker.client("acme/plant-1/camera-3").await;
    let edge = broker.client("acme/plant-1/edge-1").await;
    let cloud = broker.client("acme/cloud/gpu-1").await;
    let _edge = answering(&edge, Tier::Edge, 0.55, "edge").await;
    let _cloud = answering(&cloud, Tier::Cloud, 0.95, "cloud").await;

    let request = |confidence| {
        Infer::new("digits")
            .payload("image")
            .min_confidence(confidence)
    };
    let sure = camera.infer(request(0.5)).await.unwrap();
    assert_eq!(
        (&sure.payload[..], sure.answer.escalated),
        (&b"edge"[..], false)
    );
    let unsure = camera.infer(request(0.8)).await.unwrap();
    assert_eq!(
        (&unsure.payload[..], unsure.answer.escalated),
        (&b"cloud"[..], true)
    );
    assert_eq!(unsure.answer.edge_confidence, Some(0.55));
    assert_eq!(unsure.answer.tier, Some(Tier::Cloud));
}

#[tokio::test]
async fn without_the_cloud_the_edge_answer_is_used_and_says_so() {
    let broker = TestBroker::open().await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let _edge = answering(&edge, Tier::Edge, 0.55, "edge").await;
    let request = Infer::new("digits").payload("image").min_confidence(0.8);
    let inference = camera.infer(request).await.unwrap();
    assert_eq!(inference.payload, "edge");
    assert!(!inference.answer.escalated);
    assert!(
        inference.answer.reason.contains("cloud"),
        "{}",
        inference.answer.reason
    );
}

#[tokio::test]
async fn a_model_that_nobody_runs_is_not_found() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    let error = camera.infer(Infer::new("nothing")).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
}
