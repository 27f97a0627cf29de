//! Inference: placement by credits, residency and confidence.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use selvedge_client::{
    AnswerInfo, CallError, Class, Client, Code, IncomingInference, Infer, InferStream,
    ModelRegistration, Preference, Residency, Tier, WorkerHandle,
};
use selvedge_tests::broker::OPEN;
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{TestBroker, UdpLink};
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
        continues: false,
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
async fn after_a_start_a_site_bound_request_waits_for_the_worker_of_its_site() {
    let broker = TestBroker::with(OPEN, |config, _| {
        config.limits.resume_grace = Duration::from_secs(30);
    })
    .await;
    let camera = broker.client("acme/plant-1/camera-3").await;
    let cloud = broker.client("acme/cloud/gpu-1").await;
    // The cloud's worker is back first.
    let _cloud = answering(&cloud, Tier::Cloud, 0.99, "cloud").await;
    let asker = camera.clone();
    let asked = tokio::spawn(async move {
        let bound = Infer::new("digits")
            .payload("face")
            .residency(Residency::Site);
        asker.infer(bound).await
    });
    broker
        .metric_reaches("selvedge_calls_in_flight", &[], 1)
        .await;
    let edge = broker.client("acme/plant-1/edge-1").await;
    let edge_worker = answering(&edge, Tier::Edge, 0.9, "edge").await;
    let answer = within("the answer", asked).await.unwrap().unwrap();
    assert_eq!(answer.payload, "edge");

    // One that withdrew is not waited for.
    drop(edge_worker);
    edge.close().await;
    let bound = Infer::new("digits")
        .payload("face")
        .residency(Residency::Site);
    let error = within("a refusal", camera.infer(bound)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
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
async fn a_cloud_that_is_too_slow_leaves_the_edge_answer() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    let edge = broker.client("edge-1").await;
    let cloud = broker.client("acme/cloud-1/cloud").await;
    let _edge = answering(&edge, Tier::Edge, 0.55, "edge").await;
    // It takes the request and never answers.
    let mut stuck = cloud
        .work(registration("digits", Tier::Cloud, 4))
        .await
        .unwrap();
    let request = Infer::new("digits")
        .payload("image")
        .min_confidence(0.8)
        .deadline(Duration::from_secs(2));
    let inference = camera.infer(request).await.unwrap();
    assert_eq!(
        (&inference.payload[..], inference.answer.escalated),
        (&b"edge"[..], false)
    );
    assert!(
        inference
            .answer
            .reason
            .ends_with("kept: the cloud did not answer in time")
    );
    // The cloud is told to stop.
    let asked = incoming(&mut stuck).await;
    within("the cancellation", asked.cancelled()).await;
}

#[tokio::test]
async fn a_model_that_nobody_runs_is_not_found() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    let error = camera.infer(Infer::new("nothing")).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
}

#[tokio::test]
async fn an_answer_streams_and_giving_it_up_reaches_the_worker() {
    let broker = TestBroker::open().await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let mut worker = edge
        .work(registration("chat", Tier::Edge, 1))
        .await
        .unwrap();
    let request = Infer::new("chat").payload("why?");
    let (stream, mut asked) = tokio::join!(camera.infer_stream(request), async {
        let mut asked = incoming(&mut worker).await;
        assert_eq!(asked.request().await.unwrap(), "why?");
        asked.answer(AnswerInfo::default()).await.unwrap();
        asked.send("be").await.unwrap();
        asked
    });
    let mut stream = stream.unwrap();
    assert_eq!(
        within("a token", stream.next()).await.unwrap().unwrap(),
        "be"
    );
    asked.send("cause").await.unwrap();
    assert_eq!(
        within("a token", stream.next()).await.unwrap().unwrap(),
        "cause"
    );
    stream.cancel();
    within("the cancel to reach the worker", asked.cancelled()).await;
    // The slot is free again.
    drop(asked);
    let (inference, ()) = tokio::join!(camera.infer(Infer::new("chat")), async {
        let asked = incoming(&mut worker).await;
        asked.reply(AnswerInfo::default(), "again").await.unwrap();
    });
    assert_eq!(inference.unwrap().payload, "again");
}

#[tokio::test]
async fn a_lost_worker_is_unavailable_unless_the_request_may_be_repeated() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    for repeat in [false, true] {
        let edge = broker.client("edge-1").await;
        let mut dying = edge
            .work(registration("digits", Tier::Edge, 1))
            .await
            .unwrap();
        let request = Infer::new("digits").payload("image").idempotent(repeat);
        let (outcome, successor) = tokio::join!(camera.infer(request), async {
            let _asked = incoming(&mut dying).await;
            let other = broker.client("edge-2").await;
            let successor = answering(&other, Tier::Edge, 0.9, "seven").await;
            edge.close().await;
            (other, successor)
        });
        match outcome {
            Ok(inference) => assert!(repeat && inference.payload == "seven"),
            Err(error) => assert!(!repeat && error.code() == Code::Unavailable, "{error}"),
        }
        successor.0.close().await;
    }
}

/// A model that should answer in a millisecond.
async fn working(client: &Client, tier: Tier) -> WorkerHandle {
    client.work(registration("digits", tier, 4)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_falls_silent_is_hedged_with_the_edge() {
    let broker = TestBroker::open().await;
    let link = UdpLink::start(broker.quic(), 11).await.unwrap();
    let camera = broker.client("acme/plant-1/camera-3").await;
    let edge = broker.client("acme/plant-1/edge-1").await;
    let behind = broker.options(broker.device("acme/cloud/gpu-1"));
    let cloud = broker.connect(behind.resolve(link.address())).await;
    let mut gone = working(&cloud, Tier::Cloud).await;
    let _edge = answering(&edge, Tier::Edge, 0.9, "edge").await;
    let request = |residency| {
        Infer::new("digits")
            .payload("image")
            .preference(Preference::Cloud)
            .residency(residency)
            .deadline(Duration::from_secs(20))
    };
    // While all is well the cloud answers.
    let (well, ()) = tokio::join!(
        camera.infer(request(Residency::Any).idempotent(true)),
        async {
            let mut asked = incoming(&mut gone).await;
            asked.request().await.unwrap();
            asked.reply(sure(0.9), "cloud").await.unwrap();
        }
    );
    let well = well.unwrap();
    assert_eq!(
        (&well.payload[..], well.answer.hedged),
        (&b"cloud"[..], false)
    );

    link.cut();
    let hedged = camera.infer(request(Residency::Any).idempotent(true));
    let hedged = within("the edge's answer", hedged).await.unwrap();
    let answer = &hedged.answer;
    assert_eq!((&hedged.payload[..], answer.hedged), (&b"edge"[..], true));
    assert_eq!(answer.tier, Some(Tier::Edge));
    assert!(
        answer.reason.contains("gpu-1 was silent"),
        "{}",
        answer.reason
    );
    assert_eq!(
        broker
            .metric("selvedge_hedges_total", &[("outcome", "won")])
            .await,
        1
    );
}

/// A worker whose answers others may go on with.
fn continuing(tier: Tier) -> ModelRegistration {
    ModelRegistration {
        continues: true,
        ..registration("words", tier, 4)
    }
}

/// Says so many words of `one two three …`, all that are left if there is no number, and returns the request
/// unless it is done.
async fn say(mut asked: IncomingInference, words: usize) -> Option<IncomingInference> {
    asked.request().await.unwrap();
    for word in WORDS.iter().take(words) {
        asked.send(*word).await.unwrap();
    }
    if words < WORDS.len() {
        return Some(asked);
    }
    asked.finish().await.unwrap();
    None
}

/// The next parts of an answer are these.
async fn hear(stream: &mut InferStream, words: &[&str]) {
    for word in words {
        let found = within("a word", stream.next()).await.unwrap();
        assert_eq!(found.as_deref(), Some(word.as_bytes()));
    }
}

const WORDS: [&str; 6] = ["one", "two", "three", "four", "five", "six"];

#[tokio::test]
async fn an_answer_whose_worker_is_lost_midway_goes_on_at_another() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    let (gpu, spare) = (broker.client("gpu-1").await, broker.client("gpu-2").await);
    let other = broker.client("gpu-3").await;
    let mut worker = gpu.work(continuing(Tier::Cloud)).await.unwrap();
    let ask = || Infer::new("words").payload("count").idempotent(true);

    let asking = camera.infer_stream(ask());
    let (stream, half) = tokio::join!(asking, async {
        let asked = incoming(&mut worker).await;
        assert_eq!(asked.resume_from(), 0);
        say(asked, 3).await
    });
    let mut stream = stream.unwrap();
    hear(&mut stream, &WORDS[..3]).await;
    // One that does not say that its answers are the same is not asked, though it is there.
    let _plain = other
        .work(registration("words", Tier::Cloud, 4))
        .await
        .unwrap();
    let mut second = spare.work(continuing(Tier::Cloud)).await.unwrap();
    gpu.close().await;
    drop(half);
    let asked = incoming(&mut second).await;
    assert_eq!(asked.resume_from(), 3);
    assert!(say(asked, WORDS.len()).await.is_none());
    hear(&mut stream, &WORDS[3..]).await;
    assert_eq!(within("the end", stream.next()).await.unwrap(), None);
    broker
        .metric_reaches("selvedge_continuations_total", &[], 1)
        .await;

    // Nobody is left who could go on.
    let (stream, half) = tokio::join!(camera.infer_stream(ask()), async {
        say(incoming(&mut second).await, 2).await
    });
    let mut stream = stream.unwrap();
    hear(&mut stream, &WORDS[..2]).await;
    spare.close().await;
    drop(half);
    let error = within("the end", stream.next()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(
        error.to_string().contains("broke off after 2 messages"),
        "{error}"
    );
}

#[tokio::test]
async fn a_late_worker_is_hedged_and_told_to_stop_unless_the_request_counts_once() {
    let broker = TestBroker::open().await;
    let camera = broker.client("acme/plant-1/camera-3").await;
    let edge = broker.client("acme/plant-1/edge-1").await;
    let cloud = broker.client("acme/cloud/gpu-1").await;
    let mut stuck = working(&edge, Tier::Edge).await;
    let _cloud = answering(&cloud, Tier::Cloud, 0.9, "cloud").await;
    let request = || {
        Infer::new("digits")
            .payload("image")
            .preference(Preference::Edge)
            .deadline(Duration::from_secs(20))
    };
    let (answer, loser) = tokio::join!(camera.infer(request().idempotent(true)), async {
        let asked = incoming(&mut stuck).await;
        within("the loser to hear of it", asked.cancelled()).await;
        asked
    });
    drop(loser);
    let answer = answer.unwrap();
    assert_eq!(
        (&answer.payload[..], answer.answer.hedged),
        (&b"cloud"[..], true)
    );
    assert!(answer.answer.reason.contains("edge-1 took too long"));

    // What may be done only once waits for the first, however late: long enough for a hedge.
    let (once, ()) = tokio::join!(camera.infer(request()), async {
        let mut asked = incoming(&mut stuck).await;
        asked.request().await.unwrap();
        tokio::time::sleep(Duration::from_millis(600)).await;
        asked.reply(sure(0.9), "edge").await.unwrap();
    });
    let once = once.unwrap();
    assert_eq!(
        (&once.payload[..], once.answer.hedged),
        (&b"edge"[..], false)
    );

    // And a request bound to its site is never given to the cloud.
    let bound = request().idempotent(true).residency(Residency::Site);
    let (bound, ()) = tokio::join!(camera.infer(bound), async {
        let mut asked = incoming(&mut stuck).await;
        asked.request().await.unwrap();
        tokio::time::sleep(Duration::from_millis(600)).await;
        asked.reply(sure(0.9), "edge").await.unwrap();
    });
    let bound = bound.unwrap();
    assert_eq!(
        (&bound.payload[..], bound.answer.hedged),
        (&b"edge"[..], false)
    );
    assert_eq!(
        broker
            .metric("selvedge_hedges_total", &[("outcome", "won")])
            .await,
        1
    );
}

#[tokio::test]
async fn a_routing_key_brings_requests_to_the_same_worker_until_it_is_gone() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    let mut workers = Vec::new();
    for name in ["edge-1", "edge-2", "edge-3"] {
        let client = broker.client(name).await;
        let task = answering(&client, Tier::Edge, 0.9, name).await;
        workers.push((name, client, task));
    }
    let ask = async |key: &str| {
        let request = Infer::new("digits").payload("image").routing_key(key);
        camera.infer(request).await.unwrap().payload
    };
    let home = ask("chat-7").await;
    for _ in 0..20 {
        assert_eq!(ask("chat-7").await, home);
    }
    // Keys are spread over the workers.
    let mut homes = std::collections::HashSet::new();
    for key in 0..40 {
        homes.insert(ask(&format!("chat-{key}")).await);
    }
    assert_eq!(homes.len(), 3, "{homes:?}");
    let place = workers.iter().position(|(name, ..)| home == *name).unwrap();
    let (_, gone, _task) = workers.remove(place);
    gone.close().await;
    let other = eventually("another worker", || async {
        let request = Infer::new("digits").payload("x").routing_key("chat-7");
        let answer = camera.infer(request).await.ok()?;
        (answer.payload != home).then_some(answer.payload)
    })
    .await;
    assert_eq!(ask("chat-7").await, other);

    let long = Infer::new("digits").routing_key("k".repeat(129));
    let error = camera.infer(long).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.to_string().contains("up to 128"), "{error}");
}

#[tokio::test]
async fn when_too_many_wait_the_next_is_refused_with_a_time_to_come_again() {
    let broker = TestBroker::with(selvedge_tests::broker::OPEN, |config, _| {
        config.limits.waiting_per_model = 1;
    })
    .await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let mut worker = edge
        .work(registration("digits", Tier::Edge, 1))
        .await
        .unwrap();
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let camera = camera.clone();
        requests.spawn(async move { camera.infer(Infer::new("digits")).await });
    }
    let running = incoming(&mut worker).await;
    // One runs and one waits: the third is the first to be answered.
    let error = within("the refusal", requests.join_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    let CallError::Status(status) = error else {
        panic!("{error:?}")
    };
    assert!(status.retry_after.is_some(), "{status:?}");
    running.reply(AnswerInfo::default(), "1").await.unwrap();
    incoming(&mut worker)
        .await
        .reply(AnswerInfo::default(), "2")
        .await
        .unwrap();
    for outcome in within("the others", requests.join_all()).await {
        outcome.unwrap();
    }
}

#[tokio::test]
async fn a_deadline_that_no_worker_can_meet_is_refused_at_once_with_the_estimate() {
    let broker = TestBroker::open().await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let slow = ModelRegistration {
        service_time: Some(Duration::from_secs(60)),
        continues: false,
        ..registration("digits", Tier::Edge, 1)
    };
    let mut worker = edge.work(slow).await.unwrap();
    let request = Infer::new("digits").deadline(Duration::from_secs(20));
    let begun = std::time::Instant::now();
    let error = camera.infer(request).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    assert!(error.to_string().contains("60"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "refused late");
    assert!(
        tokio::time::timeout(Duration::ZERO, worker.next())
            .await
            .is_err(),
        "the worker never sees it"
    );
}

#[tokio::test]
async fn of_those_who_wait_the_urgent_and_then_the_soonest_due_go_first() {
    let broker = TestBroker::open().await;
    let (camera, edge) = (
        broker.client("camera-3").await,
        broker.client("edge-1").await,
    );
    let mut worker = edge
        .work(registration("digits", Tier::Edge, 1))
        .await
        .unwrap();
    let mut asked = tokio::task::JoinSet::new();
    let mut ask = |name: &'static str, class, seconds| {
        let camera = camera.clone();
        let request = Infer::new("digits")
            .payload(name)
            .class(class)
            .deadline(Duration::from_secs(seconds));
        asked.spawn(async move { camera.infer(request).await.map(|answer| answer.payload) });
    };
    ask("first", Class::Normal, 60);
    let mut held = incoming(&mut worker).await;
    // The only slot is taken; the others wait.
    let waiting = [
        ("bulk", Class::Bulk, 20),
        ("late", Class::Normal, 60),
        ("soon", Class::Normal, 30),
        ("alarm", Class::Alarm, 60),
    ];
    for (name, class, seconds) in waiting {
        ask(name, class, seconds);
    }
    broker
        .metric_reaches("selvedge_waiting_inferences", &[], 4)
        .await;
    let mut order = Vec::new();
    loop {
        let payload = held.request().await.unwrap();
        order.push(String::from_utf8(payload.to_vec()).unwrap());
        held.reply(AnswerInfo::default(), payload).await.unwrap();
        if order.len() == 5 {
            break;
        }
        held = incoming(&mut worker).await;
    }
    assert_eq!(order, ["first", "alarm", "soon", "late", "bulk"]);
    for answer in within("all answers", asked.join_all()).await {
        answer.unwrap();
    }
}

#[tokio::test]
async fn a_burst_of_ten_thousand_is_answered_or_refused_and_never_over_admitted() {
    const SLOTS: u32 = 16;
    let broker = TestBroker::open().await;
    let edge = broker.client("edge-1").await;
    let mut worker = edge
        .work(registration("digits", Tier::Edge, SLOTS))
        .await
        .unwrap();
    let (busy, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (counting, peak) = (Arc::clone(&busy), Arc::clone(&most));
    let _working = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut inference) = worker.next().await {
            let (busy, most) = (Arc::clone(&counting), Arc::clone(&peak));
            most.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::spawn(async move {
                let request = inference.request().await;
                busy.fetch_sub(1, Ordering::SeqCst);
                if let Ok(request) = request {
                    let _ = inference.reply(AnswerInfo::default(), request).await;
                }
            });
        }
    }));
    let mut requests = tokio::task::JoinSet::new();
    for sender in 0..10 {
        let camera = broker.client(&format!("camera-{sender}")).await;
        for number in 0..1_000 {
            let camera = camera.clone();
            requests.spawn(async move {
                let request = Infer::new("digits")
                    .payload(format!("{sender}-{number}"))
                    .deadline(Duration::from_secs(60));
                camera.infer(request).await.map_err(|error| error.code())
            });
        }
    }
    let mut answered = 0;
    for outcome in within("all of the burst", requests.join_all()).await {
        match outcome {
            Ok(_) => answered += 1,
            Err(code) => assert_eq!(code, Code::ResourceExhausted),
        }
    }
    let most = most.load(Ordering::SeqCst);
    assert!(most <= SLOTS, "{most} requests at once with {SLOTS} slots");
    assert!(answered >= 1_024, "{answered} were answered");
}

#[tokio::test]
async fn a_worker_that_keeps_failing_is_given_nothing_while_another_is_there() {
    let broker = TestBroker::open().await;
    let camera = broker.client("camera-3").await;
    let bad = broker.client("edge-bad").await;
    let mut failing = bad
        .work(registration("digits", Tier::Edge, 4))
        .await
        .unwrap();
    let failed = Arc::new(AtomicU32::new(0));
    let counting = Arc::clone(&failed);
    let _failing = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(inference) = failing.next().await {
            counting.fetch_add(1, Ordering::SeqCst);
            let _ = inference
                .fail(selvedge_client::Status::new(Code::Internal, "out of order"))
                .await;
        }
    }));
    for _ in 0..5 {
        let error = camera.infer(Infer::new("digits")).await.unwrap_err();
        assert_eq!(error.code(), Code::Internal, "{error}");
    }
    broker
        .metric_reaches("selvedge_ejections_total", &[], 1)
        .await;
    let good = broker.client("edge-good").await;
    let _good = answering(&good, Tier::Edge, 0.9, "well").await;
    for _ in 0..20 {
        let answer = camera.infer(Infer::new("digits")).await;
        // Once a second one request may find out how the other does.
        if let Err(error) = answer {
            assert_eq!(error.code(), Code::Internal, "{error}");
        }
    }
    let failed = failed.load(Ordering::SeqCst);
    assert!(
        failed <= 10,
        "{failed} requests went to a worker that fails"
    );
}
