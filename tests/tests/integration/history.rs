//! Subscriptions that begin with a part of the history: what they get, once, and what is refused.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use selvedge_broker::config::DurabilityRules;
use selvedge_broker::history::HistoryRule;
use selvedge_broker::{Config, StoreConfig};
use selvedge_client::{
    Client, Durability, Message, Properties, Publish, PublishError, Qos, Replay, State,
    SubscribeError, SubscribeOptions, Subscription, TopicFilter,
};
use selvedge_tests::UdpLink;
use selvedge_tests::broker::{OPEN, TestBroker};
use selvedge_tests::wait::{eventually, wait_for, within};

fn rule(filter: &str, messages: usize) -> HistoryRule {
    HistoryRule {
        filter: TopicFilter::parse(filter).unwrap(),
        messages,
        age: Duration::from_secs(3600),
        bytes: 64 << 20,
    }
}

async fn broker(rules: &[HistoryRule]) -> TestBroker {
    TestBroker::with(OPEN, |config, _| config.history = rules.to_vec()).await
}

fn keep(config: &mut Config, folder: &Path) {
    config.store = Some(StoreConfig {
        folder: folder.to_owned(),
        durability: DurabilityRules::all(true),
    });
}

fn replaying(replay: Replay) -> SubscribeOptions {
    SubscribeOptions {
        replay: Some(replay),
        ..SubscribeOptions::default()
    }
}

async fn subscribe(client: &Client, filter: &str, options: SubscribeOptions) -> Subscription {
    within("a subscription", client.subscribe_with(filter, options))
        .await
        .expect("the broker accepts it")
}

async fn publish(client: &Client, topic: &str, payload: &str) -> Option<Durability> {
    let message = Publish::new(topic, payload.to_owned()).qos(Qos::AtLeastOnce);
    within("an acknowledgement", client.publish_message(message))
        .await
        .expect("the broker takes it")
        .durability
}

async fn next(subscription: &mut Subscription) -> Message {
    within("a message", subscription.next())
        .await
        .expect("the subscription goes on")
}

fn text(message: &Message) -> String {
    String::from_utf8_lossy(&message.payload).into_owned()
}

async fn take(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut payloads = Vec::new();
    while payloads.len() < count {
        payloads.push(text(&next(subscription).await));
    }
    payloads
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_messages_come_with_their_time_and_then_what_is_live() {
    let broker = broker(&[rule("line/#", 100)]).await;
    let writer = broker.client("writer").await;
    let begin = SystemTime::now() - Duration::from_millis(1);
    for number in 0..10 {
        publish(&writer, "line/1", &number.to_string()).await;
    }
    let reader = broker.client("reader").await;
    let mut subscription = subscribe(&reader, "line/+", replaying(Replay::last(3))).await;
    for want in ["7", "8", "9"] {
        let message = next(&mut subscription).await;
        assert_eq!((text(&message).as_str(), message.retain), (want, false));
        assert!(message.publisher.ends_with("/acme/plant-1/writer"));
        let published = message.published().unwrap();
        assert!(published >= begin && published <= SystemTime::now());
    }
    publish(&writer, "line/1", "live").await;
    let live = next(&mut subscription).await;
    assert_eq!((text(&live).as_str(), live.published()), ("live", None));
}

#[tokio::test(flavor = "multi_thread")]
async fn times_bound_a_replay() {
    let broker = broker(&[rule("#", 100)]).await;
    let writer = broker.client("writer").await;
    publish(&writer, "a", "early").await;
    let reader = broker.client("reader").await;
    let mut all = subscribe(&reader, "a", replaying(Replay::all())).await;
    let early = next(&mut all).await.published().unwrap();
    let later = early + Duration::from_millis(2);
    eventually("the clock to go on", || async {
        (SystemTime::now() > later + Duration::from_millis(2)).then_some(())
    })
    .await;
    publish(&writer, "a", "late").await;

    let mut since = subscribe(&reader, "a", replaying(Replay::all().since(later))).await;
    assert_eq!(take(&mut since, 1).await, ["late"]);
    let mut until = subscribe(&reader, "+", replaying(Replay::last(9).until(later))).await;
    assert_eq!(take(&mut until, 1).await, ["early"]);
    publish(&writer, "a", "live").await;
    assert_eq!(take(&mut since, 1).await, ["live"]);
    assert_eq!(take(&mut until, 1).await, ["live"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn replays_that_begin_amid_publishing_miss_nothing_and_repeat_nothing() {
    let broker = broker(&[rule("line/#", 100_000)]).await;
    let (sender, stop) = tokio::sync::watch::channel(false);
    let writers: Vec<_> = ["line/1", "line/2"]
        .into_iter()
        .map(|topic| {
            let (stop, connect) = (stop.clone(), broker.options(broker.device("writer")));
            tokio::spawn(async move {
                let writer = Client::connect(connect).await.unwrap();
                let mut number = 0u32;
                while !*stop.borrow() {
                    // QoS 0, so that many are under way at once; a QoS 1 now and then paces it.
                    for _ in 0..20 {
                        writer.publish(topic, number.to_string()).await.unwrap();
                        number += 1;
                    }
                    let paced = Publish::new(topic, number.to_string()).qos(Qos::AtLeastOnce);
                    writer.publish_message(paced).await.unwrap();
                    number += 1;
                }
                number
            })
        })
        .collect();
    let readers: Vec<_> = (0..12)
        .map(|_| {
            let connect = broker.options(broker.device("reader"));
            tokio::spawn(async move {
                let reader = Client::connect(connect).await.unwrap();
                let options = SubscribeOptions {
                    queue: 1 << 20,
                    ..replaying(Replay::all())
                };
                let mut subscription = reader.subscribe_with("line/#", options).await.unwrap();
                let (mut replayed, mut live) = (0, 0);
                let mut wanted = [0u32; 2];
                while live < 400 {
                    let message = subscription.next().await.unwrap();
                    let topic = usize::from(message.topic.as_str() == "line/2");
                    let number: u32 = text(&message).parse().unwrap();
                    assert_eq!(number, wanted[topic], "of {}", message.topic);
                    wanted[topic] += 1;
                    match message.published() {
                        Some(_) => replayed += 1,
                        None => live += 1,
                    }
                    assert!(message.published().is_none() || live == 0);
                }
                replayed
            })
        })
        .collect();
    let mut replayed = 0;
    for reader in readers {
        replayed += within("a reader", reader).await.unwrap();
    }
    assert!(replayed > 0);
    sender.send_replace(true);
    for writer in writers {
        assert!(within("a writer", writer).await.unwrap() > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_no_history_is_refused_and_so_is_a_share_group() {
    let broker = broker(&[rule("line/#", 10)]).await;
    let reader = broker.client("reader").await;
    let cases = [
        (
            "other/+",
            "FAILED_PRECONDITION: no topic of other/+ keeps history: the broker's configuration \
             says which do",
        ),
        (
            "$share/group/line/1",
            "INVALID_ARGUMENT: a share group has no replay: its messages are handed out as they \
             come",
        ),
    ];
    for (filter, want) in cases {
        let subscribing = reader.subscribe_with(filter, replaying(Replay::last(1)));
        let refused = within("an answer", subscribing).await;
        let Err(SubscribeError::Refused(status)) = refused else {
            panic!("expected a refusal of {filter}, found {refused:?}");
        };
        assert_eq!(status.to_string(), want);
    }
    // A filter that overlaps a rule is served, whether there is something or not.
    let _empty = subscribe(&reader, "+/1", replaying(Replay::last(1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_leaves_out_what_policy_denies_and_what_is_ones_own() {
    const POLICY: &str = r##"
[[rule]]
name = "everyone"
identities = ["*/*/*"]
allow = ["publish", "subscribe"]
subjects = ["#"]
[[rule]]
name = "secret"
identities = ["acme/*/reader"]
deny = ["subscribe"]
subjects = ["line/secret"]
"##;
    let broker = TestBroker::with(POLICY, |config, _| {
        config.history = vec![rule("#", 10)];
    })
    .await;
    let writer = broker.client("writer").await;
    publish(&writer, "line/secret", "secret").await;
    publish(&writer, "line/open", "open").await;
    let reader = broker.client("reader").await;
    publish(&reader, "line/open", "own").await;
    let options = SubscribeOptions {
        no_local: true,
        ..replaying(Replay::all())
    };
    let mut subscription = subscribe(&reader, "line/#", options).await;
    publish(&writer, "line/open", "end").await;
    assert_eq!(take(&mut subscription, 2).await, ["open", "end"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_survives_a_restart_with_its_order_and_times() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = TestBroker::with(OPEN, |config, _| {
        keep(config, folder.path());
        config.history = vec![rule("line/#", 5)];
    })
    .await;
    let writer = broker.client("writer").await;
    for number in 0..8 {
        // The history is what the acknowledgement waits for: nobody has subscribed.
        let reached = publish(&writer, "line/1", &number.to_string()).await;
        assert_eq!(reached, Some(Durability::Disk));
    }
    assert_eq!(
        publish(&writer, "other", "x").await,
        Some(Durability::Memory)
    );
    writer.close().await;
    let stopped = SystemTime::now();
    broker.restart().await;

    let reader = broker.client("reader").await;
    let mut subscription = subscribe(&reader, "line/#", replaying(Replay::all())).await;
    let mut numbers = Vec::new();
    for _ in 0..5 {
        let message = next(&mut subscription).await;
        assert!(message.published().unwrap() <= stopped);
        numbers.push(text(&message));
    }
    assert_eq!(numbers, ["3", "4", "5", "6", "7"]);
    let writer = broker.client("writer-2").await;
    publish(&writer, "line/1", "8").await;
    assert_eq!(take(&mut subscription, 1).await, ["8"]);
    let mut again = subscribe(&reader, "line/1", replaying(Replay::all())).await;
    assert_eq!(take(&mut again, 5).await, ["4", "5", "6", "7", "8"]);

    // What no rule matches any more is not kept any more, either.
    writer.close().await;
    reader.close().await;
    for rules in [vec![rule("other", 5)], vec![rule("line/#", 5)]] {
        broker.config.history = rules;
        broker.restart().await;
    }
    assert_eq!(broker.metric("selvedge_history_messages", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_session_is_not_replayed_to_again() {
    let broker = broker(&[rule("#", 100)]).await;
    let writer = broker.client("writer").await;
    for number in 0..50 {
        publish(&writer, "line/1", &number.to_string()).await;
    }
    let link = UdpLink::start(broker.quic(), 7).await.unwrap();
    let options = broker
        .options(broker.device("reader"))
        .resolve(link.address())
        .session("kept")
        .session_expiry(Duration::from_secs(3600));
    let reader = broker.connect(options).await;
    let mut subscription = subscribe(&reader, "line/1", replaying(Replay::all())).await;
    let mut seen: HashSet<String> = take(&mut subscription, 50).await.into_iter().collect();
    let mut state = reader.state();
    link.cut();
    wait_for("the loss to be noticed", &mut state, |state| {
        !state.is_connected()
    })
    .await;
    link.heal();
    wait_for("the client to be back", &mut state, State::is_connected).await;
    publish(&writer, "line/1", "50").await;
    loop {
        let message = next(&mut subscription).await;
        let number = text(&message);
        if number == "50" {
            break;
        }
        // At least once: what was not acknowledged before the loss may come again, and says so.
        assert!(message.duplicate, "{number} was replayed again");
        seen.insert(number);
    }
    assert_eq!(seen.len(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_lost_goes_on_after_what_was_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = TestBroker::with(OPEN, |config, _| {
        keep(config, folder.path());
        config.history = vec![rule("line/#", 100)];
    })
    .await;
    let writer = broker.client("writer").await;
    publish(&writer, "line/1", "first").await;
    let early = {
        let reader = broker.client("early").await;
        let mut subscription = subscribe(&reader, "line/1", replaying(Replay::all())).await;
        next(&mut subscription).await.published().unwrap()
    };
    eventually("the clock to go on", || async {
        (SystemTime::now() > early + Duration::from_millis(2)).then_some(())
    })
    .await;
    publish(&writer, "line/1", "second").await;
    let reader = broker.client("reader").await;
    let mut subscription = subscribe(&reader, "line/1", replaying(Replay::last(2))).await;
    assert_eq!(take(&mut subscription, 2).await, ["first", "second"]);
    publish(&writer, "line/1", "live").await;
    assert_eq!(take(&mut subscription, 1).await, ["live"]);
    broker.restart().await;
    // The session was not kept. Everything since the last message that was replayed comes, with it.
    assert_eq!(take(&mut subscription, 2).await, ["second", "live"]);
    publish(&writer, "line/1", "end").await;
    assert_eq!(take(&mut subscription, 1).await, ["end"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_cannot_date_its_messages() {
    let broker = TestBroker::open().await;
    let writer = broker.client("writer").await;
    let properties = Properties {
        published: Some(SystemTime::UNIX_EPOCH),
        ..Properties::default()
    };
    let message = Publish::new("line/1", "x")
        .qos(Qos::AtLeastOnce)
        .properties(properties);
    let refused = within("an answer", writer.publish_message(message)).await;
    let Err(PublishError::Refused(status)) = refused else {
        panic!("expected a refusal, found {refused:?}");
    };
    assert_eq!(
        status.to_string(),
        "INVALID_ARGUMENT: a header with published_ms: expected none, since that is the broker's to set"
    );
}
