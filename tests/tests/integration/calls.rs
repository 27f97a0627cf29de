//! Calls: one message or a stream each way, and every way they can end.

use std::time::Duration;

use selvedge_client::{Call, CallError, Client, Code, IncomingCall, Responder, Status};
use selvedge_tests::TestBroker;
use selvedge_tests::wait::{eventually, within};
use tokio_util::task::AbortOnDropHandle;

async fn incoming(responder: &mut Responder) -> IncomingCall {
    within("a call", responder.next())
        .await
        .expect("the service is registered")
}

/// Serves `service` with its own name as the answer, until dropped.
async fn naming(client: &Client, service: &str, answer: &'static str) -> AbortOnDropHandle<()> {
    let mut responder = client.serve(service).await.unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(call) = responder.next().await {
            let _ = call.reply(answer).await;
        }
    }))
}

#[tokio::test]
async fn a_call_reaches_its_responder_and_brings_the_answer_back() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut speed = press.serve("press-7/set-speed").await.unwrap();
    let answering = async {
        let mut call = incoming(&mut speed).await;
        assert_eq!(call.service(), "press-7/set-speed");
        assert_eq!(call.caller(), "spiffe://test.example/acme/plant-1/panel-1");
        assert_eq!(call.properties(), [("unit".to_owned(), "rpm".to_owned())]);
        assert_eq!(call.request().await.unwrap(), "900");
        call.reply("ok").await.unwrap();
    };
    let call = Call::new("press-7/set-speed")
        .property("unit", "rpm")
        .payload("900");
    let (answer, ()) = tokio::join!(panel.request(call), answering);
    assert_eq!(answer.unwrap(), "ok");
}

#[tokio::test]
async fn messages_stream_both_ways_at_once() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut echo = press.serve("echo").await.unwrap();
    let answering = tokio::spawn(async move {
        let mut call = incoming(&mut echo).await;
        while let Some(message) = call.next().await.unwrap() {
            call.send(message).await.unwrap();
        }
        call.finish().await.unwrap();
    });
    let mut call = panel.call_with(Call::new("echo")).await.unwrap();
    for number in 0..50 {
        call.send(number.to_string()).await.unwrap();
        let answer = within("the echo", call.next()).await.unwrap();
        assert_eq!(answer.unwrap(), number.to_string());
    }
    call.finish_requests().unwrap();
    assert_eq!(within("the end", call.next()).await.unwrap(), None);
    answering.await.unwrap();
}

#[tokio::test]
async fn a_failure_of_the_responder_reaches_the_caller_word_for_word() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut service = press.serve("press-7/open").await.unwrap();
    let status = Status::new(Code::FailedPrecondition, "the guard is not closed");
    let failing = async {
        incoming(&mut service)
            .await
            .fail(status.clone())
            .await
            .unwrap();
    };
    let (answer, ()) = tokio::join!(panel.call("press-7/open", ""), failing);
    assert_eq!(answer.unwrap_err(), CallError::Status(status));
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_at_all_three_parties() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut slow = press.serve("slow").await.unwrap();
    let call = Call::new("slow")
        .deadline(Duration::from_millis(300))
        .payload("x");
    let (answer, ()) = tokio::join!(panel.request(call), async {
        let call = incoming(&mut slow).await;
        let left = call
            .deadline()
            .saturating_duration_since(tokio::time::Instant::now());
        assert!(left <= Duration::from_millis(300), "{left:?}");
        within("the deadline to reach the responder", call.cancelled()).await;
    });
    assert_eq!(answer.unwrap_err().code(), Code::DeadlineExceeded);
    let labels = [("outcome", "DEADLINE_EXCEEDED")];
    broker
        .metric_reaches("selvedge_calls_total", &labels, 1)
        .await;
}

#[tokio::test]
async fn cancelling_a_call_reaches_the_responder() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut service = press.serve("long").await.unwrap();
    let mut call = panel.call_with(Call::new("long")).await.unwrap();
    call.send("begin").await.unwrap();
    let mut taken = incoming(&mut service).await;
    assert_eq!(taken.next().await.unwrap().unwrap(), "begin");
    call.cancel();
    within("the cancel to reach the responder", taken.cancelled()).await;
    let labels = [("outcome", "CANCELLED")];
    broker
        .metric_reaches("selvedge_calls_total", &labels, 1)
        .await;
}

#[tokio::test]
async fn a_responder_that_is_lost_ends_its_calls_as_unavailable() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut service = press.serve("press-7/stop").await.unwrap();
    let (answer, ()) = tokio::join!(panel.call("press-7/stop", "x"), async {
        let _call = incoming(&mut service).await;
        press.close().await;
    });
    assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_service_that_nobody_serves_is_not_found() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let error = panel.call("nobody/home", "x").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.to_string().contains("nobody/home"), "{error}");
}

#[tokio::test]
async fn a_responder_of_the_callers_own_site_is_asked_first() {
    let broker = TestBroker::open().await;
    let near = broker.client("acme/plant-1/robot-1").await;
    let far = broker.client("acme/plant-2/robot-2").await;
    let caller = broker.client("acme/plant-1/panel-1").await;
    let _far = naming(&far, "robot", "plant-2").await;
    let near_service = naming(&near, "robot", "plant-1").await;
    for _ in 0..20 {
        assert_eq!(caller.call("robot", "where").await.unwrap(), "plant-1");
    }
    // Without a responder at home the other site serves.
    drop(near_service);
    near.close().await;
    assert_eq!(caller.call("robot", "where").await.unwrap(), "plant-2");
}

#[tokio::test]
async fn a_call_that_may_be_repeated_is_answered_although_a_responder_dies() {
    let broker = TestBroker::open().await;
    let near = broker.client("acme/plant-1/robot-1").await;
    let far = broker.client("acme/plant-2/robot-2").await;
    let caller = broker.client("acme/plant-1/panel-1").await;
    let _far = naming(&far, "robot", "plant-2").await;
    let mut dying = near.serve("robot").await.unwrap();
    let call = Call::new("robot").idempotent(true).payload("where");
    let (answer, ()) = tokio::join!(caller.request(call), async {
        let _call = incoming(&mut dying).await;
        near.close().await;
    });
    assert_eq!(answer.unwrap(), "plant-2");
}

#[tokio::test]
async fn a_hundred_calls_at_once_are_each_answered_with_their_own_answer() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut echo = press.serve("echo").await.unwrap();
    let _echo = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut call) = echo.next().await {
            tokio::spawn(async move {
                let request = call.request().await.unwrap();
                call.reply(request).await.unwrap();
            });
        }
    }));
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..100 {
        let panel = panel.clone();
        calls.spawn(async move {
            let answer = panel.call("echo", number.to_string()).await.unwrap();
            assert_eq!(answer, number.to_string());
        });
    }
    within("all calls", calls.join_all()).await;
}

#[tokio::test]
async fn the_broker_tells_who_serves_what_and_how_it_goes() {
    let broker = TestBroker::governed(
        r##"
[[rule]]
name = "everything, and the broker's own services"
identities = ["*/*/*"]
allow = ["call", "serve"]
subjects = ["#", "$SYS/#"]
"##,
    )
    .await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let overview = async |question: &str| {
        let answer = within(
            "the overview",
            panel.call("$SYS/services", question.to_owned()),
        );
        serde_json::from_slice::<serde_json::Value>(&answer.await.unwrap()).unwrap()
    };
    let nothing = overview("").await;
    assert_eq!(nothing["service_count"], 0, "{nothing}");

    let mut jobs = press.serve("press-7/jobs").await.unwrap();
    let _other = naming(&press, "lights", "on").await;
    for _ in 0..3 {
        let (answer, ()) = tokio::join!(panel.call("press-7/jobs", "x"), async {
            incoming(&mut jobs).await.reply("done").await.unwrap();
        });
        answer.unwrap();
    }
    let (answer, ()) = tokio::join!(panel.call("press-7/jobs", "x"), async {
        let status = Status::new(Code::FailedPrecondition, "the guard is open");
        incoming(&mut jobs).await.fail(status).await.unwrap();
    });
    assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition);

    // A fifth is under way. The counts of the first four come when the broker is done with them.
    let _call = panel.call_with(Call::new("press-7/jobs")).await.unwrap();
    let _fifth = incoming(&mut jobs).await;
    let known = eventually("the counts", || async {
        let known = overview(r#"{"pattern": "press-7/#"}"#).await;
        (known["services"][0]["responders"][0]["calls"] == 4).then_some(known)
    });
    let known = known.await;
    assert_eq!(known["service_count"], 1, "{known}");
    assert_eq!(known["services"][0]["service"], "press-7/jobs");
    assert_eq!(known["services"][0]["responder_count"], 1);
    let responder = &known["services"][0]["responders"][0];
    let uri = "spiffe://test.example/acme/plant-1/press-7";
    assert_eq!(responder["identity"], uri);
    assert_eq!(responder["errors"], 1, "{responder}");
    assert_eq!(responder["in_flight"], 1, "{responder}");
    let time = |name: &str| responder[name].as_u64().unwrap();
    assert!(
        0 < time("p50_us") && time("p50_us") <= time("p99_us"),
        "{responder}"
    );

    let all = overview(r#"{"limit": 1}"#).await;
    assert_eq!(all["service_count"], 2, "{all}");
    assert_eq!(all["services"].as_array().unwrap().len(), 1, "{all}");
    for (question, expected) in [
        ("x", "expected value"),
        (r#"{"pattern": "a/#/b"}"#, "pattern: "),
    ] {
        let error = panel.call("$SYS/services", question).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}
