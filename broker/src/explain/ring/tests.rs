#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::time::Instant;

use proptest::prelude::*;
use selvedge_proto::status::{Code, Denial};
use selvedge_proto::topic::TopicName;

use super::super::query::{Kind, Match, Query};
use super::*;

/// What a test lets happen, with numbers for names.
#[derive(Debug, Clone)]
struct Happening {
    /// Milliseconds since the one before.
    later: u64,
    sender: u8,
    topic: u8,
    receiver: Option<u8>,
    id: Option<u16>,
    /// Refused, not dropped.
    refused: bool,
    count: u64,
}

fn happening() -> impl Strategy<Value = Happening> {
    let id = prop_oneof![3 => Just(None), 2 => (0..500_u16).prop_map(Some)];
    (
        prop_oneof![5 => 0..1000_u64, 1 => 60_000..200_000_u64],
        0..4_u8,
        0..4_u8,
        proptest::option::of(0..4_u8),
        id,
        any::<bool>(),
        1..100_u64,
    )
        .prop_map(
            |(later, sender, topic, receiver, id, refused, count)| Happening {
                later,
                sender,
                topic,
                receiver,
                id,
                refused,
                count,
            },
        )
}

fn client(number: u8) -> Identity {
    Identity::new("example.org", "acme", "plant-1", &format!("press-{number}")).unwrap()
}

fn key(number: u8) -> SessionKey {
    SessionKey {
        identity: Identity::new("example.org", "acme", "office", &format!("panel-{number}"))
            .unwrap(),
        name: format!("session-{number}").into(),
    }
}

fn topic(number: u8) -> String {
    format!("line/{number}")
}

fn flow(sender: u8, number: u8) -> Arc<Flow> {
    let topic = TopicName::parse(topic(number)).unwrap();
    Arc::new(Flow::new(1, topic, client(sender), 1))
}

fn denied(sender: u8) -> Status {
    Status::denied(Denial {
        verb: "publish".into(),
        subject: format!("line/{sender}").into(),
        rule: None,
    })
}

fn id_of(number: u16) -> String {
    format!("order-{number}")
}

impl Happening {
    fn push(&self, ring: &mut Ring, now: SystemTime) {
        let id = self.id.map(id_of);
        let message_id = id.as_deref().map(str::as_bytes);
        if self.refused {
            let event = Event::Refused {
                client: &client(self.sender),
                verb: Some(Verb::Publish),
                subject: Some(&topic(self.topic)),
                message_id,
                status: &denied(self.topic),
            };
            ring.push(now, self.count, &event);
        } else {
            let receiver = self.receiver.map(key);
            let event = Event::Dropped {
                reason: Reason::QueueFull,
                receiver: receiver.as_ref(),
                flow: &flow(self.sender, self.topic),
                message_id,
            };
            ring.push(now, self.count, &event);
        }
    }

    /// What a record of it has to be like.
    fn is(&self, record: &Record) -> bool {
        let fate = &*record.fate;
        let id = self.id.map(id_of);
        matches!(fate, Fate::Refused { .. }) == self.refused
            && *fate.sender() == client(self.sender)
            && fate.subject() == Some(&topic(self.topic))
            && fate.message_id() == id.as_deref().map(str::as_bytes)
            && (self.refused || fate.receiver() == self.receiver.map(key).as_ref())
    }
}

/// That the parts of a ring agree, and keep within their bounds.
fn check(ring: &Ring) {
    assert!(ring.slots.len() <= ring.most_records);
    assert!(ring.bytes <= ring.most_bytes);
    assert_eq!(
        ring.bytes,
        ring.slots.values().map(|slot| slot.bytes).sum::<usize>()
    );
    assert!(ring.index.len() <= ring.slots.len());
    for serial in ring.index.values() {
        assert!(ring.slots.contains_key(serial));
    }
    let mut shared = 0;
    for (identity, share) in &ring.shares {
        assert!(!share.serials.is_empty());
        assert!(share.serials.len() <= ring.most_records / SHARE);
        assert!(share.bytes <= ring.most_bytes / SHARE);
        assert!(share.serials.iter().is_sorted());
        let slots = share.serials.iter().map(|serial| &ring.slots[serial]);
        assert_eq!(
            share.bytes,
            slots.clone().map(|slot| slot.bytes).sum::<usize>()
        );
        for slot in slots {
            assert_eq!(slot.record.fate.sender(), identity);
        }
        shared += share.serials.len();
    }
    assert_eq!(shared, ring.slots.len());
}

fn moment(ms: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_event_is_in_one_record_while_there_is_room(
        happenings in proptest::collection::vec(happening(), 0..80),
    ) {
        let mut ring = Ring::new(1000, 1 << 20);
        let mut now = 0;
        let mut total = 0;
        for happening in &happenings {
            now += happening.later;
            total += happening.count;
            happening.push(&mut ring, moment(now));
            check(&ring);
            // It is in the record that was changed last.
            let mut newest = ring.records().filter(|record| record.last == moment(now));
            prop_assert!(newest.any(|record| happening.is(record)));
        }
        prop_assert_eq!(ring.records().map(|record| record.count).sum::<u64>(), total);
        prop_assert_eq!(ring.complete_since(), None);
        for happening in &happenings {
            let alike: Vec<_> = ring.records().filter(|record| happening.is(record)).collect();
            // Events with an id are never added up; others are, unless a while lies between them.
            match happening.id {
                Some(_) => {
                    let events = happenings.iter().filter(|other| {
                        alike.iter().any(|record| other.is(record))
                    });
                    prop_assert_eq!(alike.len(), events.count());
                }
                None => for pair in alike.windows(2) {
                    let gap = pair[1].first.duration_since(pair[0].last).unwrap();
                    prop_assert!(gap > MERGED_WITHIN);
                },
            }
        }
    }

    #[test]
    fn bounds_hold_and_what_is_forgotten_is_said(
        happenings in proptest::collection::vec(happening(), 0..200),
        records in 4..40_usize,
        bytes in 8_000..20_000_usize,
    ) {
        let mut ring = Ring::new(records, bytes);
        let mut now = 0;
        for happening in &happenings {
            now += happening.later;
            happening.push(&mut ring, moment(now));
            check(&ring);
        }
        let since = ring.complete_since();
        let mut now = 0;
        for happening in &happenings {
            now += happening.later;
            if since.is_none_or(|since| moment(now) > since) {
                let known = ring.records().any(|record| {
                    happening.is(record) && record.first <= moment(now) && moment(now) <= record.last
                });
                prop_assert!(known, "{happening:?} at {now}");
            }
        }
    }

    #[test]
    fn one_identity_cannot_wash_away_the_others(flood in 100..2000_u16) {
        let mut ring = Ring::new(100, 1 << 20);
        let quiet = Happening {
            later: 0, sender: 1, topic: 1, receiver: Some(1), id: None, refused: false, count: 1,
        };
        quiet.push(&mut ring, moment(0));
        for id in 0..flood {
            let loud = Happening { sender: 2, id: Some(id), ..quiet.clone() };
            loud.push(&mut ring, moment(1 + u64::from(id)));
        }
        prop_assert!(ring.records().any(|record| quiet.is(record)));
        prop_assert_eq!(ring.records().count(), 1 + 25);
        // Of the flood, the end is known.
        let last = Happening { sender: 2, id: Some(flood - 1), ..quiet };
        prop_assert!(ring.records().any(|record| last.is(record)));
    }

    #[test]
    fn a_query_finds_what_it_is_about_newest_first(
        happenings in proptest::collection::vec(happening(), 0..60),
        number in 0..4_u8,
        id in 0..500_u16,
    ) {
        let mut ring = Ring::default();
        let mut now = 0;
        for happening in &happenings {
            now += happening.later;
            happening.push(&mut ring, moment(now));
        }
        let records: Vec<Record> = ring.records().cloned().collect();
        type Wanted<'a> = &'a dyn Fn(&Happening) -> bool;
        let cases: [(String, Kind, Match, Wanted<'_>); 7] = [
            (id_of(id), Kind::Message, Match::MessageId, &|h| h.id == Some(id)),
            (client(number).uri().to_owned(), Kind::Client, Match::Publisher, &|h| h.sender == number),
            (format!("press-{number}"), Kind::Client, Match::Publisher, &|h| h.sender == number),
            (format!("plant-1/press-{number}"), Kind::Client, Match::Publisher, &|h| h.sender == number),
            (format!("panel-{number}"), Kind::Client, Match::Receiver, &|h| {
                !h.refused && h.receiver == Some(number)
            }),
            (format!("session-{number}"), Kind::Client, Match::Receiver, &|h| {
                !h.refused && h.receiver == Some(number)
            }),
            (topic(number), Kind::Topic, Match::Topic, &|h| h.topic == number),
        ];
        for (text, kind, why, wanted) in cases {
            for kind in [Some(kind), None] {
                let query = Query::new(&text, kind).unwrap();
                let found = query.find(&records);
                prop_assert!(found.iter().all(|(_, found)| *found == why), "{text}");
                prop_assert!(found.is_sorted_by_key(|(record, _)| std::cmp::Reverse(record.last)));
                let expected = records.iter().filter(|record| {
                    happenings.iter().any(|happening| wanted(happening) && happening.is(record))
                });
                prop_assert_eq!(found.len(), expected.count(), "{}", text);
            }
        }
    }
}

#[test]
fn a_denied_subscription_says_why_messages_of_its_topics_did_not_arrive() {
    let mut ring = Ring::default();
    let status = denied(1);
    let event = Event::Refused {
        client: &client(1),
        verb: Some(Verb::Subscribe),
        subject: Some("line/#"),
        message_id: None,
        status: &status,
    };
    ring.push(moment(1), 1, &event);
    let records: Vec<Record> = ring.records().cloned().collect();
    let found = |text, kind| Query::new(text, kind).unwrap().find(&records).len();
    assert_eq!(found("line/7/temp", None), 1);
    assert_eq!(found("line", None), 0);
    assert_eq!(found("line", Some(Kind::Topic)), 1);
    assert_eq!(found("other/7", None), 0);
    assert_eq!(found("line/#", None), 1);
}

#[test]
fn long_texts_are_cut_and_ids_that_are_no_text_can_be_asked_for() {
    let mut ring = Ring::default();
    let status = Status::new(Code::InvalidArgument, "é".repeat(5000));
    for id in [&[0xff, 0x01][..], &[b'x'; 5000]] {
        let event = Event::Refused {
            client: &client(1),
            verb: None,
            subject: None,
            message_id: Some(id),
            status: &status,
        };
        ring.push(moment(1), 1, &event);
    }
    let records: Vec<Record> = ring.records().cloned().collect();
    let query = Query::new("hex:ff01", None).unwrap();
    assert_eq!(query.find(&records)[0].1, Match::MessageId);
    let lengths: HashSet<usize> = records
        .iter()
        .map(|record| record.fate.message_id().unwrap().len())
        .collect();
    assert_eq!(lengths, HashSet::from([2, LONGEST_ID]));
    for record in &records {
        let Fate::Refused { status, .. } = &*record.fate else {
            panic!("{record:?}");
        };
        assert!(status.message.len() <= LONGEST_MESSAGE);
    }
    // The same long message once more is still the same.
    for _ in 0..2 {
        let event = Event::Refused {
            client: &client(2),
            verb: None,
            subject: None,
            message_id: None,
            status: &status,
        };
        ring.push(moment(2), 1, &event);
    }
    assert_eq!(ring.records().last().unwrap().count, 2);
}

/// `cargo test --release -p selvedge-broker -- --ignored --nocapture explain` says what a drop costs.
#[test]
#[ignore = "measures"]
#[allow(clippy::print_stderr)]
fn a_drop_that_is_counted_up_costs_well_under_a_microsecond() {
    const DROPS: u32 = 1_000_000;
    let explain = super::super::Explain::default();
    let receivers: Vec<SessionKey> = (0..100).map(key).collect();
    let flow = flow(1, 1);
    let mut frames = bytes::BytesMut::new();
    selvedge_proto::lane::put_message(
        &mut frames,
        selvedge_proto::lane::Flags::new(selvedge_proto::message::Qos::AtMostOnce),
        1,
        None,
        &[7; 64],
    );
    let batch = crate::batch::Batch {
        flow,
        class: selvedge_proto::message::Class::Normal,
        qos: selvedge_proto::message::Qos::AtMostOnce,
        retain: false,
        retain_as_published: false,
        count: 1,
        frames: frames.freeze(),
        payload: bytes::Bytes::new(),
        expires: None,
    };
    for fanout in [1, 100] {
        let begun = Instant::now();
        for drop in 0..DROPS as usize {
            let receiver = Some(&receivers[drop % fanout]);
            explain.dropped(Reason::QueueFull, receiver, &batch, 1);
        }
        let each = begun.elapsed() / DROPS;
        eprintln!("{fanout} receivers: {each:?} for each drop");
        // An unoptimised build says nothing about it.
        assert!(
            cfg!(debug_assertions) || each < Duration::from_micros(1),
            "{each:?}"
        );
    }
    assert_eq!(explain.snapshot().records.len(), 100);
}
