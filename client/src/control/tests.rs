//! What a client tells its broker, over several connections.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use selvedge_proto::frame::FrameDecoder;
use selvedge_proto::message::{Class, Properties, Qos};
use selvedge_proto::topic::{SubscribeTarget, TopicName};

use super::*;
use crate::subscription::{Message, Replay, SubscribeOptions};

fn subscribe(control: &Control, filter: &str) -> (Arc<Route>, Answer) {
    let target = SubscribeTarget::parse(filter).unwrap();
    let options = SubscribeOptions::default();
    let route = |id| Arc::new(Route::new(id, &target, &options));
    control.subscribe(options.to_wire(&target), route).unwrap()
}

fn serve(control: &Control, service: &str) -> (u32, Answer) {
    let (sender, _) = mpsc::channel(1);
    let serve = wire::Serve {
        service: service.to_owned(),
        ..wire::Serve::default()
    };
    let kind = Registration::Serve(serve);
    control.register(kind, Sink::Calls(sender)).unwrap()
}

/// What is sent, in words; everything is answered with `status`.
fn exchange(control: &Control, status: &Status) -> Vec<String> {
    let mut decoder = FrameDecoder::new(1 << 16);
    decoder.push(control.take_outgoing().freeze());
    let mut sent = Vec::new();
    while let Some(frame) = decoder.next_frame().unwrap() {
        let frame: wire::Control = frame::decode("control", frame.body).unwrap();
        let (words, request_id) = match frame.frame.unwrap() {
            Frame::Subscribe(f) => (
                format!("subscribe {}", f.subscriptions[0].filter),
                f.request_id,
            ),
            Frame::Unsubscribe(f) => (format!("unsubscribe {:?}", f.ids), f.request_id),
            Frame::Serve(f) => (format!("serve {}", f.service), f.request_id),
            Frame::Unserve(f) => (format!("unserve {}", f.id), f.request_id),
            other => panic!("unexpected frame {other:?}"),
        };
        let statuses = vec![status.clone().into()];
        control.answered(wire::Reply {
            request_id,
            statuses,
        });
        sent.push(words);
    }
    sent
}

#[test]
fn a_new_connection_is_told_what_the_broker_does_not_have() {
    let control = Control::new();
    let (route, mut answer) = subscribe(&control, "a");
    let (_, mut served) = serve(&control, "s");
    let ok = Status::ok();
    assert!(exchange(&control, &ok).is_empty(), "there is no connection");
    control.connected(false);
    assert_eq!(exchange(&control, &ok), ["subscribe a", "serve s"]);
    assert!(answer.try_recv().unwrap().is_ok() && served.try_recv().unwrap().is_ok());

    // The session is kept: subscriptions are there, registrations never are.
    control.disconnected();
    control.connected(true);
    assert_eq!(exchange(&control, &ok), ["serve s"]);

    // The session is gone, and the connection too before the broker could answer.
    control.disconnected();
    control.connected(false);
    control.disconnected();
    control.connected(true);
    assert_eq!(exchange(&control, &ok), ["subscribe a", "serve s"]);

    // What was given up while disconnected is taken back from a kept session only.
    control.disconnected();
    drop(control.unsubscribe(&route));
    control.connected(true);
    let gone = format!("unsubscribe [{}]", route.id());
    assert_eq!(exchange(&control, &ok), [gone.as_str(), "serve s"]);
    control.disconnected();
    control.connected(false);
    assert_eq!(exchange(&control, &ok), ["serve s"]);
}

#[test]
fn an_unsubscribe_that_may_be_lost_is_repeated() {
    let control = Control::new();
    control.connected(false);
    let (route, _) = subscribe(&control, "a");
    exchange(&control, &Status::ok());
    let mut answer = control.unsubscribe(&route);
    control.disconnected();
    assert!(
        answer.try_recv().unwrap().is_ok(),
        "nobody listens any more"
    );
    control.connected(true);
    let gone = format!("unsubscribe [{}]", route.id());
    assert_eq!(exchange(&control, &Status::ok()), [gone]);
}

#[test]
fn a_refusal_reaches_who_asked_and_ends_what_was_restored() {
    let control = Control::new();
    control.connected(false);
    let (_, mut answer) = subscribe(&control, "a");
    let no = Status::new(Code::PermissionDenied, "no");
    exchange(&control, &no);
    let refused = answer.try_recv().unwrap();
    assert!(matches!(refused, Err(Refusal::Status(status)) if status == no));
    assert!(control.matching(&"a".try_into().unwrap()).is_empty());

    let (route, _) = subscribe(&control, "a");
    exchange(&control, &Status::ok());
    control.disconnected();
    control.connected(false);
    exchange(&control, &no);
    assert_eq!(route.ended(), Some(Some(no)));
}

#[test]
fn ids_are_the_same_in_every_run_and_unique_in_each() {
    let control = Control::new();
    let (first, _) = subscribe(&control, "a/#");
    let (twin, _) = subscribe(&control, "a/#");
    assert_eq!(first.id(), stable_id("a/#"));
    assert_eq!(twin.id(), stable_id("a/#") + 1);
    assert_eq!(stable_id("a/#"), 0xf98e_0f6e);
}

#[tokio::test]
async fn restored_is_said_when_everything_is_answered_and_not_before() {
    let is_restored = |control: &Control| *control.restored.borrow();
    let control = Control::new();
    assert!(!is_restored(&control), "there is no connection");
    control.connected(false);
    control.restored().await;

    let (_route, _answer) = subscribe(&control, "a");
    assert!(is_restored(&control), "what is new does not count");
    serve(&control, "s");
    exchange(&control, &Status::ok());
    control.disconnected();
    assert!(!is_restored(&control));
    control.connected(false);
    assert!(!is_restored(&control), "the broker has not answered");
    exchange(&control, &Status::ok());
    control.restored().await;

    // A refusal is an answer, too.
    control.disconnected();
    control.connected(false);
    exchange(&control, &Status::new(Code::PermissionDenied, "no"));
    control.restored().await;
}

fn came(class: Class, published: Option<u64>) -> Message {
    let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
    let properties = published.map(|ms| {
        Box::new(Properties {
            published: Some(at(ms)),
            ..Properties::default()
        })
    });
    Message {
        topic: TopicName::parse("a").unwrap(),
        publisher: "p".into(),
        payload: Default::default(),
        qos: Qos::AtMostOnce,
        retain: false,
        duplicate: false,
        class,
        properties,
        ticket: None,
        receipt: None,
    }
}

#[test]
fn a_lost_session_asks_for_the_replay_again_or_for_what_came_after_it() {
    let control = Control::new();
    let target = SubscribeTarget::parse("a").unwrap();
    let options = SubscribeOptions {
        replay: Some(Replay::last(10)),
        ..SubscribeOptions::default()
    };
    let route = |id| Arc::new(Route::new(id, &target, &options));
    let (route, _answer) = control.subscribe(options.to_wire(&target), route).unwrap();
    let offer = |class, published| {
        route.offer(&mut VecDeque::from([came(class, published)]));
    };
    let asked = || {
        control.disconnected();
        control.connected(false);
        let mut decoder = FrameDecoder::new(1 << 16);
        decoder.push(control.take_outgoing().freeze());
        let frame = decoder.next_frame().unwrap().unwrap();
        let frame: wire::Control = frame::decode("control", frame.body).unwrap();
        let Some(Frame::Subscribe(subscribe)) = frame.frame else {
            panic!("unexpected frame {frame:?}");
        };
        let replay = subscribe.subscriptions[0].replay.unwrap();
        (replay.last, replay.from_ms)
    };
    assert_eq!(asked(), (10, None));
    // It broke off: the whole of it again.
    offer(Class::Normal, Some(5));
    offer(Class::Normal, Some(3));
    assert_eq!(asked(), (10, None));
    // In one class it may not be complete.
    offer(Class::Normal, Some(5));
    offer(Class::Bulk, Some(9));
    offer(Class::Normal, None);
    assert_eq!(asked(), (10, None));
    // What is live tells that it is.
    offer(Class::Normal, Some(5));
    offer(Class::Normal, None);
    assert_eq!(asked(), (0, Some(5)));
    // The same holds for what was asked for then.
    assert_eq!(asked(), (0, Some(5)));
    offer(Class::Normal, Some(7));
    assert_eq!(asked(), (0, Some(5)));
    offer(Class::Normal, Some(7));
    offer(Class::Normal, None);
    assert_eq!(asked(), (0, Some(7)));
}
