#![allow(clippy::unwrap_used)]

use std::time::Instant;

use proptest::prelude::*;
use selvedge_certs::Identity;
use selvedge_proto::frame;
use selvedge_proto::lane;
use selvedge_proto::message::Properties;

use super::*;
use crate::backlog::Backlog as _;

const START: SystemTime = SystemTime::UNIX_EPOCH;
const AGE: Duration = Duration::from_secs(100);
const PLENTY: usize = 1 << 30;

fn at(seconds: u64) -> SystemTime {
    START + Duration::from_secs(1_000 + seconds)
}

fn rule(filter: &str, messages: usize, bytes: usize) -> HistoryRule {
    HistoryRule {
        filter: TopicFilter::parse(filter).unwrap(),
        messages,
        age: AGE,
        bytes,
    }
}

fn history(rules: &[HistoryRule]) -> History {
    History::new(rules, "acme".into(), None, Arc::default())
}

fn flow(topic: &str, session: u64) -> Arc<Flow> {
    let publisher = Identity::new("example.org", "acme", "s", "p").unwrap();
    let topic = TopicName::parse(topic).unwrap();
    Arc::new(Flow::new(1 + session as u32, topic, publisher, session))
}

/// A batch of messages whose payloads are numbers.
fn batch(flow: &Arc<Flow>, class: Class, numbers: impl IntoIterator<Item = u32>) -> Arc<Batch> {
    let (mut frames, mut count) = (BytesMut::new(), 0);
    for number in numbers {
        let payload = number.to_be_bytes();
        lane::put_message(
            &mut frames,
            Flags::new(Qos::AtLeastOnce),
            flow.id,
            None,
            &payload,
        );
        count += 1;
    }
    Arc::new(Batch {
        flow: Arc::clone(flow),
        class,
        qos: Qos::AtLeastOnce,
        retain: false,
        retain_as_published: false,
        count,
        frames: frames.freeze(),
        payload: Bytes::new(),
        expires: None,
    })
}

fn publish(history: &History, batch: &Arc<Batch>, now: SystemTime) {
    let topic = history.topic(&batch.flow.topic).unwrap();
    topic.publish(batch, now, || 0);
}

struct Ask {
    filter: TopicFilter,
    replay: Replay,
    before: u64,
    except: Option<u64>,
}

impl Ask {
    fn of(filter: &str) -> Self {
        Self {
            filter: TopicFilter::parse(filter).unwrap(),
            replay: Replay::default(),
            before: u64::MAX,
            except: None,
        }
    }

    fn last(filter: &str, last: u32) -> Self {
        let mut ask = Self::of(filter);
        ask.replay.last = Some(last);
        ask
    }

    fn backlogs(&self, history: &History, now: SystemTime) -> [Option<ReplayBacklog>; 3] {
        let request = ReplayRequest {
            filter: &self.filter,
            residual: &[],
            replay: &self.replay,
            before: self.before,
            except: self.except,
            max_qos: Qos::AtLeastOnce,
        };
        history.replay(&request, now)
    }

    /// The numbers replayed in one class, with topic and time.
    fn numbers(
        &self,
        history: &History,
        class: Class,
        now: SystemTime,
    ) -> Vec<(String, SystemTime, u32)> {
        let [alarm, normal, bulk] = self.backlogs(history, now);
        match class {
            Class::Alarm => drain(alarm, 1),
            Class::Normal => drain(normal, 1 << 20),
            Class::Bulk => drain(bulk, 300),
        }
    }
}

fn drain(backlog: Option<ReplayBacklog>, budget: usize) -> Vec<(String, SystemTime, u32)> {
    let mut found = Vec::new();
    let Some(mut backlog) = backlog else {
        return found;
    };
    assert!(backlog.before_live());
    loop {
        let chunk = backlog.next(budget);
        for batch in &chunk.batches {
            assert!(!batch.retain && batch.frames.len() <= 64 * 1024);
            assert_eq!(batch.messages().count(), batch.count as usize);
            for message in batch.messages() {
                let properties = Properties::decode(&message.header.unwrap()).unwrap();
                let number = u32::from_be_bytes(message.payload[..4].try_into().unwrap());
                let topic = batch.flow.topic.as_str().to_owned();
                found.push((topic, properties.published.unwrap(), number));
            }
        }
        if chunk.done {
            return found;
        }
    }
}

fn only(numbers: &[(String, SystemTime, u32)]) -> Vec<u32> {
    numbers.iter().map(|(_, _, number)| *number).collect()
}

/// What was published, as a list.
#[derive(Debug, Clone)]
struct Published {
    topic: usize,
    at: u64,
    class: Class,
    session: u64,
    generation: u64,
    number: u32,
}

/// What a replay must be, by going through the list.
fn model(
    published: &[Published],
    most: usize,
    ask: &Ask,
    names: &[&str],
    class: Class,
    now: u64,
) -> Vec<(String, SystemTime, u32)> {
    let mut found = Vec::new();
    let mut topics: Vec<usize> = (0..names.len()).collect();
    topics.sort_by_key(|&topic| names[topic]);
    for topic in topics {
        let name = TopicName::parse(names[topic]).unwrap();
        if !ask.filter.matches(&name) {
            continue;
        }
        let of_topic: Vec<_> = published.iter().filter(|one| one.topic == topic).collect();
        let held = &of_topic[of_topic.len().saturating_sub(most)..];
        let wanted: Vec<_> = held
            .iter()
            .filter(|one| {
                now - one.at < AGE.as_secs()
                    && one.generation < ask.before
                    && Some(one.session) != ask.except
                    && ask.replay.from.is_none_or(|from| at(one.at) >= from)
                    && ask.replay.until.is_none_or(|until| at(one.at) < until)
            })
            .collect();
        let last = ask.replay.last.unwrap_or(u32::MAX) as usize;
        for one in &wanted[wanted.len().saturating_sub(last)..] {
            if one.class == class {
                found.push((names[topic].to_owned(), at(one.at), one.number));
            }
        }
    }
    found
}

const NAMES: [&str; 4] = ["a/1", "a/2", "b", "a"];

proptest! {
    #[test]
    fn a_replay_is_what_a_list_of_everything_says(
        most in 1usize..12,
        steps in proptest::collection::vec(
            (0usize..4, 0u64..30, 0usize..3, 1u64..4, 1u32..5, prop::bool::weighted(0.2)), 1..60),
        filter in prop::sample::select(vec!["#", "a/#", "a/+", "b", "a", "+", "c"]),
        last in proptest::option::of(0u32..8),
        from in proptest::option::of(0u64..900),
        until in proptest::option::of(0u64..900),
        before in 0u64..70,
        except in proptest::option::of(1u64..4),
        swept in any::<bool>(),
    ) {
        let history = history(&[rule("#", most, PLENTY)]);
        let mut list = Vec::new();
        let (mut now, mut number, mut generation) = (0, 0, 0);
        for (topic, pause, class, session, count, changed) in steps {
            now += pause;
            generation += u64::from(changed);
            let class = Class::ALL[class];
            let numbers = number..number + count;
            number += count;
            list.extend(numbers.clone().map(|number| Published {
                topic, at: now, class, session, generation, number,
            }));
            let batch = batch(&flow(NAMES[topic], session), class, numbers);
            let topic = history.topic(&batch.flow.topic).unwrap();
            topic.publish(&batch, at(now), || generation);
            if swept {
                history.sweep(at(now));
            }
        }
        let mut ask = Ask::of(filter);
        ask.replay = Replay { last, from: from.map(at), until: until.map(at) };
        (ask.before, ask.except) = (before, except);
        for class in Class::ALL {
            let want = model(&list, most, &ask, &NAMES, class, now);
            prop_assert_eq!(ask.numbers(&history, class, at(now)), want);
        }
    }

    #[test]
    fn beyond_the_bytes_the_oldest_of_all_topics_go_first(
        bytes in 1_000usize..20_000,
        topics in proptest::collection::vec(0usize..4, 1..120),
    ) {
        let history = history(&[rule("#", 1_000, bytes)]);
        let flows: Vec<_> = NAMES.iter().map(|name| flow(name, 1)).collect();
        for (number, &topic) in topics.iter().enumerate() {
            publish(&history, &batch(&flows[topic], Class::Normal, [number as u32]), at(0));
            let state = history.rules[0].state.lock();
            prop_assert!(state.bytes <= bytes);
        }
        let mut held = only(&Ask::of("#").numbers(&history, Class::Normal, at(0)));
        held.sort_unstable();
        let count = topics.len() as u32;
        prop_assert_eq!(&held, &(count - held.len() as u32..count).collect::<Vec<_>>());
        // As many as fit: a record takes about 550 bytes.
        let used = history.rules[0].state.lock().bytes;
        prop_assert!(held.len() == topics.len() || used + 700 > bytes);
        history.sweep(at(AGE.as_secs()));
        prop_assert!(history.topics.read().is_empty());
        prop_assert_eq!(history.rules[0].state.lock().bytes, 0);
        prop_assert_eq!(history.shared.topics.load(Ordering::Relaxed), 0);
        prop_assert_eq!(history.shared.metrics.history_messages.get(), 0);
        prop_assert_eq!(history.shared.metrics.history_bytes.get(), 0);
    }
}

#[test]
fn the_first_rule_that_matches_decides_and_other_topics_keep_nothing() {
    let history = history(&[rule("a/1", 1, PLENTY), rule("a/#", 2, PLENTY)]);
    for name in ["a/1", "a/2"] {
        for number in 0..3 {
            publish(
                &history,
                &batch(&flow(name, 1), Class::Normal, [number]),
                at(0),
            );
        }
    }
    let replay = Ask::of("#").numbers(&history, Class::Normal, at(0));
    assert_eq!(only(&replay), [2, 1, 2]);
    assert!(history.topic(&TopicName::parse("b").unwrap()).is_none());
    for (filter, overlaps) in [("#", true), ("a/+", true), ("b/#", false), ("a/1", true)] {
        assert_eq!(
            history.overlaps(&TopicFilter::parse(filter).unwrap()),
            overlaps
        );
    }
}

#[test]
fn a_message_is_not_replayed_past_its_expiry_and_says_what_is_left_of_it_before() {
    let history = history(&[rule("#", 10, PLENTY)]);
    let with_expiry = |expires: Instant| {
        let mut frames = BytesMut::new();
        let properties = Properties {
            expiry: Some(Duration::from_secs(60)),
            content_type: "text/plain".into(),
            ..Properties::default()
        };
        let header = properties.encode().unwrap();
        lane::put_message(&mut frames, Flags::default(), 1, Some(&header), b"four");
        let plain = Arc::into_inner(batch(&flow("a", 1), Class::Normal, [0])).unwrap();
        Arc::new(Batch {
            frames: frames.freeze(),
            expires: Some(expires),
            ..plain
        })
    };
    publish(&history, &with_expiry(clock::now()), at(0));
    publish(
        &history,
        &with_expiry(clock::now() + Duration::from_secs(60)),
        at(0),
    );
    let [_, backlog, _] = Ask::of("a").backlogs(&history, at(0));
    let chunk = backlog.unwrap().next(1 << 20);
    assert_eq!(chunk.batches.len(), 1);
    assert!(chunk.batches[0].expires.is_some());
    let message = chunk.batches[0].messages().next().unwrap();
    let properties = Properties::decode(&message.header.unwrap()).unwrap();
    assert_eq!(properties.content_type, "text/plain");
    assert_eq!(properties.published, Some(at(0)));
    let left = properties.expiry.unwrap();
    assert!(
        left <= Duration::from_secs(60) && left > Duration::from_secs(30),
        "{left:?}"
    );
}

#[test]
fn large_payloads_stay_apart_and_small_ones_are_packed() {
    let history = history(&[rule("#", 10, PLENTY)]);
    let flow = flow("a", 1);
    for size in [10, 20, 100_000, 30] {
        let mut batch = Arc::into_inner(batch(&flow, Class::Normal, [0])).unwrap();
        let mut frames = BytesMut::new();
        lane::put_message(&mut frames, Flags::new(batch.qos), 1, None, &vec![7; size]);
        batch.frames = frames.freeze();
        publish(&history, &Arc::new(batch), at(0));
    }
    let [_, backlog, _] = Ask::of("a").backlogs(&history, at(0));
    let chunk = backlog.unwrap().next(1 << 20);
    let shapes: Vec<_> = chunk
        .batches
        .iter()
        .map(|batch| (batch.count, batch.payload.len()))
        .collect();
    assert_eq!(shapes, [(2, 0), (1, 100_000), (1, 0)]);
    let sizes: Vec<_> = chunk
        .batches
        .iter()
        .flat_map(|batch| batch.messages().map(|message| message.payload.len()))
        .collect();
    assert_eq!(sizes, [10, 20, 100_000, 30]);
    // What is announced is what there is.
    for batch in &chunk.batches {
        let head = frame::peek(&batch.frames, frame::MAX_FRAME)
            .unwrap()
            .unwrap();
        assert!(batch.count > 1 || head.total() == batch.frames.len() + batch.payload.len());
    }
}

#[test]
fn replays_that_hold_on_to_more_than_the_bytes_lose_what_the_history_gave_up() {
    let history = history(&[rule("#", 1_000_000, 20_000)]);
    let flow = flow("a", 1);
    let mut number = 0;
    let mut more = |count: u32| {
        for _ in 0..count {
            publish(&history, &batch(&flow, Class::Normal, [number]), at(0));
            number += 1;
        }
    };
    more(200);
    let [_, slow, _] = Ask::last("#", 30).backlogs(&history, at(0));
    more(200);
    // All of it is given up by the history, and within what replays may hold.
    let [_, reads, _] = Ask::last("#", 30).backlogs(&history, at(0));
    assert_eq!(only(&drain(reads, 1 << 20)), (370..400).collect::<Vec<_>>());
    let orphans = || history.rules[0].orphans.load(Ordering::Relaxed);
    assert!(orphans() > 0 && orphans() <= 20_000);

    let stuck: Vec<_> = (0..5)
        .map(|_| {
            let replay = Ask::of("#").backlogs(&history, at(0));
            more(200);
            assert!(orphans() <= 20_000, "{}", orphans());
            replay
        })
        .collect();
    let reason = "slow_replay";
    let left_out = &history.shared.metrics.history_left_out;
    assert!(left_out.get_or_create(&Reason { reason }).get() > 0);
    assert!(only(&drain(slow, 1 << 20)).is_empty());
    drop(stuck);
    assert_eq!(orphans(), 0);
}

#[test]
fn a_topic_that_is_open_is_not_forgotten_while_it_is_empty() {
    let history = history(&[rule("#", 10, PLENTY)]);
    let topic = history.topic(&TopicName::parse("a").unwrap()).unwrap();
    history.sweep(at(0));
    topic.publish(&batch(&flow("a", 1), Class::Normal, [7]), at(0), || 0);
    drop(topic);
    assert_eq!(
        only(&Ask::of("a").numbers(&history, Class::Normal, at(0))),
        [7]
    );
    history.sweep(at(AGE.as_secs()));
    assert!(history.topics.read().is_empty());
}

#[test]
fn a_topic_too_many_is_delivered_and_not_kept() {
    let history = history(&[rule("#", 10, PLENTY)]);
    history
        .shared
        .topics
        .store(MAX_TOPICS - 1, Ordering::Relaxed);
    let mut delivered = 0;
    for name in ["a", "b"] {
        let batch = batch(&flow(name, 1), Class::Normal, [0]);
        let topic = history.topic(&batch.flow.topic).unwrap();
        topic.publish(&batch, at(0), || {
            delivered += 1;
            0
        });
    }
    assert_eq!(delivered, 2);
    let replay = Ask::of("#").numbers(&history, Class::Normal, at(0));
    assert_eq!(replay.len(), 1);
    let reason = "topics";
    let left_out = &history.shared.metrics.history_left_out;
    assert_eq!(left_out.get_or_create(&Reason { reason }).get(), 1);
}
