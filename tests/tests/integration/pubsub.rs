//! Messages from publishers to subscribers.

use std::collections::HashMap;
use std::time::Duration;

use selvedge_client::{
    Client, Durability, Message, Properties, Publish, Qos, SubscribeOptions, Subscription,
    TopicName, Will,
};
use selvedge_tests::TestBroker;
use selvedge_tests::wait::{wait_for, within};

pub(crate) async fn next(subscription: &mut Subscription) -> Message {
    within("a message", subscription.next())
        .await
        .expect("the subscription is live")
}

fn text(message: &Message) -> &str {
    std::str::from_utf8(&message.payload).unwrap()
}

fn kept(topic: &str, payload: impl Into<bytes::Bytes>) -> Publish {
    Publish::new(topic, payload).qos(Qos::AtLeastOnce)
}

#[tokio::test]
async fn messages_of_both_qualities_arrive_with_their_publisher() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut temps = panel.subscribe("press/+/temp").await.unwrap();

    press.publish("press/7/temp", "71.3").await.unwrap();
    let ack = press
        .publish_message(kept("press/7/temp", "71.4"))
        .await
        .unwrap();
    assert_eq!(ack.durability, Some(Durability::Memory));

    let (first, second) = (next(&mut temps).await, next(&mut temps).await);
    assert_eq!((text(&first), first.qos), ("71.3", Qos::AtMostOnce));
    assert_eq!((text(&second), second.qos), ("71.4", Qos::AtLeastOnce));
    for message in [first, second] {
        assert_eq!(message.topic.as_str(), "press/7/temp");
        assert_eq!(
            &*message.publisher,
            "spiffe://test.example/acme/plant-1/press-7"
        );
        assert!(!message.retain && !message.duplicate);
    }
}

#[tokio::test]
async fn filters_select_levels_and_leave_system_topics_to_those_who_name_them() {
    let broker = TestBroker::open().await;
    let client = broker.client("press-7").await;
    let mut level = client.subscribe("a/+/c").await.unwrap();
    let mut rest = client.subscribe("a/#").await.unwrap();
    let mut all = client.subscribe("#").await.unwrap();
    for topic in ["b", "a", "a/b", "a/b/c", "a/b/c/d", "end", "a/end/c"] {
        client.publish(topic, topic).await.unwrap();
    }
    async fn until(subscription: &mut Subscription, last: &str) -> Vec<String> {
        let mut topics = Vec::new();
        while topics.last().is_none_or(|topic| topic != last) {
            topics.push(next(subscription).await.topic.as_str().to_owned());
        }
        topics
    }
    assert_eq!(until(&mut level, "a/end/c").await, ["a/b/c", "a/end/c"]);
    assert_eq!(
        until(&mut rest, "a/end/c").await,
        ["a", "a/b", "a/b/c", "a/b/c/d", "a/end/c"]
    );
    assert_eq!(
        until(&mut all, "a/end/c").await,
        ["b", "a", "a/b", "a/b/c", "a/b/c/d", "end", "a/end/c"]
    );
}

#[tokio::test]
async fn overlapping_subscriptions_each_get_a_message_once() {
    let broker = TestBroker::open().await;
    let client = broker.client("press-7").await;
    let mut exact = client.subscribe("press/7/temp").await.unwrap();
    let mut wide = client.subscribe("press/#").await.unwrap();
    for payload in ["1", "2"] {
        client.publish("press/7/temp", payload).await.unwrap();
    }
    for subscription in [&mut exact, &mut wide] {
        assert_eq!(text(&next(subscription).await), "1");
        assert_eq!(text(&next(subscription).await), "2");
    }
}

#[tokio::test]
async fn no_local_keeps_a_clients_own_messages_from_it() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let options = SubscribeOptions {
        no_local: true,
        ..Default::default()
    };
    let mut others = press.subscribe_with("chat", options).await.unwrap();
    press.publish("chat", "mine").await.unwrap();
    press.flush().await.unwrap();
    panel.publish("chat", "theirs").await.unwrap();
    assert_eq!(text(&next(&mut others).await), "theirs");
}

#[tokio::test]
async fn a_share_group_divides_messages_among_its_members() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let (one, two) = (
        broker.client("panel-1").await,
        broker.client("panel-2").await,
    );
    let mut first = one.subscribe("$share/panels/jobs/+").await.unwrap();
    let mut second = two.subscribe("$share/panels/jobs/+").await.unwrap();
    for job in 0..100 {
        press
            .publish_message(kept(&format!("jobs/{}", job % 7), job.to_string()))
            .await
            .unwrap();
    }
    let (mut seen, mut by_first) = (Vec::new(), 0);
    while seen.len() < 100 {
        let message = tokio::select! {
            message = next(&mut first) => { by_first += 1; message }
            message = next(&mut second) => message,
        };
        seen.push(text(&message).parse::<u32>().unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    assert!(
        (10..=90).contains(&by_first),
        "{by_first} of 100 for one of two members"
    );
}

#[tokio::test]
async fn messages_keep_their_order_per_publisher_and_topic() {
    const EACH: u32 = 300;
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut all = panel.subscribe("line/#").await.unwrap();
    let mut publishing = tokio::task::JoinSet::new();
    for name in ["press-1", "press-2"] {
        let press = broker.client(name).await;
        publishing.spawn(async move {
            for number in 0..EACH {
                for topic in ["line/a", "line/b"] {
                    press
                        .publish_message(kept(topic, number.to_string()))
                        .await
                        .unwrap();
                }
            }
        });
    }
    let mut expected: HashMap<(String, String), u32> = HashMap::new();
    for _ in 0..4 * EACH {
        let message = next(&mut all).await;
        let key = (message.publisher.to_string(), message.topic.to_string());
        let number = expected.entry(key).or_default();
        assert_eq!(text(&message), number.to_string(), "{message:?}");
        *number += 1;
    }
    assert_eq!(expected.len(), 4);
}

/// What runs of messages are passed on where they were read, and what breaks a run, in one stream.
#[tokio::test]
async fn runs_of_messages_and_what_interrupts_them_arrive_whole_and_in_order() {
    const COUNT: usize = 6_000;
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let mut all = panel.subscribe("run/#").await.unwrap();
    // Lengths of runs, sizes and qualities from a fixed sequence: every run length up to 200 messages.
    let mut sequence = 7u32;
    let mut draw = |below: u32| {
        sequence = sequence.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (sequence >> 8) % below
    };
    let mut sent = Vec::new();
    while sent.len() < COUNT {
        let topic = format!("run/{}", draw(3));
        let qos = [Qos::AtMostOnce, Qos::AtLeastOnce][draw(2) as usize];
        for _ in 0..1 + draw(200).min(draw(200)) {
            let size = match draw(40) {
                0 => 4_000 + draw(4_000),
                1 => 0,
                _ => 40 + draw(400),
            };
            let mut payload = format!("{}:", sent.len()).into_bytes();
            payload.resize(payload.len() + size as usize, b'x');
            sent.push((topic.clone(), qos, payload, draw(50) == 0));
        }
    }
    let publishing = async {
        let mut acks = Vec::new();
        for (topic, qos, payload, with_header) in &sent {
            let mut message = Publish::new(topic.as_str(), payload.clone()).qos(*qos);
            if *with_header {
                message = message.properties(Properties {
                    content_type: "text/plain".into(),
                    ..Default::default()
                });
            }
            if *qos == Qos::AtMostOnce {
                press.publish_message(message).await.unwrap();
            } else {
                acks.push(press.publish_message(message));
                // Those that wait are sent together.
                if acks.len() == 64 {
                    futures_util::future::try_join_all(acks.drain(..))
                        .await
                        .unwrap();
                }
            }
        }
        futures_util::future::try_join_all(acks).await.unwrap();
    };
    let receiving = async {
        let mut received = Vec::new();
        while received.len() < sent.len() {
            received.push(next(&mut all).await);
        }
        received
    };
    let ((), received) = tokio::join!(publishing, receiving);
    let number = |payload: &[u8]| -> usize {
        let digits = payload.split(|&byte| byte == b':').next().unwrap();
        std::str::from_utf8(digits).unwrap().parse().unwrap()
    };
    let mut seen = vec![false; sent.len()];
    let mut last: HashMap<(String, Qos), usize> = HashMap::new();
    for message in received {
        let at = number(&message.payload);
        let (topic, qos, payload, with_header) = &sent[at];
        assert!(
            !std::mem::replace(&mut seen[at], true),
            "message {at} came twice"
        );
        assert_eq!(message.topic.as_str(), topic);
        assert_eq!(message.qos, *qos);
        assert_eq!(&message.payload[..], &payload[..]);
        let content_type = if *with_header { "text/plain" } else { "" };
        assert_eq!(message.properties().content_type, content_type);
        // Those of QoS 1 are begun later than they are numbered, so each quality is in order by itself.
        let before = last.insert((topic.clone(), *qos), at);
        assert!(
            before.is_none_or(|before| before < at),
            "{at} after {before:?}"
        );
    }
}

#[tokio::test]
async fn a_message_of_one_mebibyte_arrives_whole() {
    let broker = TestBroker::open().await;
    let client = broker.client("camera-3").await;
    let mut images = client.subscribe("images").await.unwrap();
    let image: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    client
        .publish_message(kept("images", image.clone()))
        .await
        .unwrap();
    assert!(next(&mut images).await.payload == image);
}

#[tokio::test]
async fn unsubscribing_stops_messages() {
    let broker = TestBroker::open().await;
    let (press, panel) = (
        broker.client("press-7").await,
        broker.client("panel-1").await,
    );
    let stopped = panel.subscribe("a").await.unwrap();
    let mut kept_on = panel.subscribe("b").await.unwrap();
    stopped.unsubscribe().await.unwrap();
    press.publish("a", "unwanted").await.unwrap();
    press.publish("b", "wanted").await.unwrap();
    assert_eq!(text(&next(&mut kept_on).await), "wanted");
    let stats = panel.stats();
    assert_eq!((stats.delivered, stats.unmatched), (1, 0));
}

#[tokio::test]
async fn a_retained_message_greets_later_subscribers_until_it_is_cleared() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    for payload in ["old", "new"] {
        press
            .publish_message(kept("state", payload).retain(true))
            .await
            .unwrap();
    }
    let panel = broker.client("panel-1").await;
    let mut state = panel.subscribe("state").await.unwrap();
    let greeting = next(&mut state).await;
    assert_eq!((text(&greeting), greeting.retain), ("new", true));

    press
        .publish_message(kept("state", "").retain(true))
        .await
        .unwrap();
    let late = broker.client("panel-2").await;
    let mut state = late.subscribe("state").await.unwrap();
    press.publish("state", "live").await.unwrap();
    let live = next(&mut state).await;
    assert_eq!((text(&live), live.retain), ("live", false));
}

/// A client that goes as if its power failed: no goodbye.
async fn vanish(client: Client, link: &selvedge_tests::UdpLink) {
    link.cut();
    let mut state = client.state();
    wait_for("the loss", &mut state, |state| !state.is_connected()).await;
    drop(client);
}

#[tokio::test]
async fn a_kept_session_gets_what_it_missed() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let options = || {
        let options = broker.options(broker.device("panel-1")).session("panel");
        options.session_expiry(Duration::from_secs(60))
    };
    let link = selvedge_tests::UdpLink::start(broker.quic(), 1)
        .await
        .unwrap();
    let panel = broker.connect(options().resolve(link.address())).await;
    let subscription = panel.subscribe("orders").await.unwrap();
    drop(panel.clone());
    let mut state = panel.state();
    link.cut();
    wait_for("the loss", &mut state, |state| !state.is_connected()).await;
    for order in 0..10 {
        press
            .publish_message(kept("orders", order.to_string()))
            .await
            .unwrap();
    }
    link.heal();
    let mut subscription = subscription;
    for order in 0..10 {
        assert_eq!(text(&next(&mut subscription).await), order.to_string());
    }
}

#[tokio::test]
async fn a_will_is_published_when_its_client_vanishes_and_not_when_it_says_goodbye() {
    let broker = TestBroker::open().await;
    let panel = broker.client("panel-1").await;
    let mut wills = panel.subscribe("gone/+").await.unwrap();
    let with_will = |name: &str| {
        let topic = TopicName::parse(format!("gone/{name}")).unwrap();
        broker
            .options(broker.device(name))
            .will(Will::new(topic, "lost"))
    };
    let polite = broker.connect(with_will("press-1")).await;
    polite.close().await;
    let link = selvedge_tests::UdpLink::start(broker.quic(), 1)
        .await
        .unwrap();
    let lost = broker
        .connect(with_will("press-2").resolve(link.address()))
        .await;
    vanish(lost, &link).await;
    let will = next(&mut wills).await;
    assert_eq!(will.topic.as_str(), "gone/press-2");
    assert_eq!(
        &*will.publisher,
        "spiffe://test.example/acme/plant-1/press-2"
    );
}
