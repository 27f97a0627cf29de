//! A faithful history passes, and each kind of planted fault is found in it.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const STREAMS: [(&str, &str); 3] = [
    ("spiffe://x/a/b/one", "t/1"),
    ("spiffe://x/a/b/one", "t/2"),
    ("spiffe://x/a/b/two", "t/1"),
];

/// What one reader was sent: streams and numbers in order, and marks.
type Deliveries = Vec<(usize, u64, bool)>;

/// What a broker that keeps the contract does.
#[derive(Debug, Clone)]
struct History {
    /// Of each stream, whether each message was acknowledged at disk.
    acked: Vec<Vec<bool>>,
    /// Of each reader.
    deliveries: Vec<Deliveries>,
    /// Every reader has been sent messages again at most so often.
    reconnects: u64,
}

impl History {
    fn play(&self) -> Ledger {
        let mut ledger = Ledger::default();
        let streams = STREAMS.map(|(publisher, topic)| ledger.stream(publisher, topic));
        let readers: Vec<ReaderId> = (0..self.deliveries.len())
            .map(|index| ledger.reader(&format!("reader-{index}")))
            .collect();
        for (stream, acked) in streams.iter().zip(&self.acked) {
            for _ in acked {
                ledger.published(*stream, Durability::Default);
            }
        }
        // Half of the deliveries come before the acknowledgements, as they do.
        let (early, late) = self.deliveries.split_at(self.deliveries.len() / 2);
        let (early_readers, late_readers) = readers.split_at(early.len());
        for (reader, deliveries) in early_readers.iter().zip(early) {
            deliver(&mut ledger, *reader, deliveries);
        }
        for (stream, acked) in streams.iter().zip(&self.acked) {
            for (number, at_disk) in (0..).zip(acked) {
                let reached = if *at_disk {
                    Durability::Disk
                } else {
                    Durability::Memory
                };
                ledger.acked(*stream, number, Some(reached));
            }
        }
        for (reader, deliveries) in late_readers.iter().zip(late) {
            deliver(&mut ledger, *reader, deliveries);
        }
        for reader in readers {
            ledger.reader_reconnected(reader, self.reconnects);
        }
        ledger
    }
}

fn deliver(ledger: &mut Ledger, reader: ReaderId, deliveries: &Deliveries) {
    for (stream, number, duplicate) in deliveries {
        let (publisher, topic) = STREAMS[*stream];
        ledger.delivered(
            reader,
            &Delivery {
                stream: StreamId(*stream),
                number: *number,
                publisher,
                topic,
                duplicate: *duplicate,
            },
        );
    }
}

prop_compose! {
    /// A reader gets a part of the stream, is taken back a little, and goes on from there; what was
    /// acknowledged below disk may be missing.
    fn stream_deliveries(stream: usize, acked: Vec<bool>)(
        steps in proptest::collection::vec((0usize..20, 0usize..6), 0..4),
        gaps in proptest::collection::vec(any::<bool>(), acked.len()),
    ) -> Deliveries {
        let wanted: Vec<u64> = (0..)
            .zip(acked.iter().zip(gaps))
            .filter(|(_, (at_disk, gap))| **at_disk || !gap)
            .map(|(number, _)| number)
            .collect();
        let (mut at, mut reached, mut deliveries) = (0usize, 0usize, Vec::new());
        for (ahead, back) in steps.into_iter().chain([(usize::MAX, 0)]) {
            let end = at.saturating_add(ahead).min(wanted.len());
            let sent = (at..).zip(&wanted[at..end]);
            deliveries.extend(sent.map(|(place, number)| (stream, *number, place < reached)));
            reached = reached.max(end);
            at = end.saturating_sub(back);
        }
        deliveries
    }
}

fn history() -> impl Strategy<Value = History> {
    let acked = proptest::collection::vec(proptest::collection::vec(any::<bool>(), 1..30), 3);
    (acked, 1usize..4)
        .prop_flat_map(|(acked, readers)| {
            let streams: Vec<_> = acked
                .iter()
                .enumerate()
                .map(|(stream, acked)| stream_deliveries(stream, acked.clone()))
                .collect();
            let reader = streams.prop_map(|streams| streams.concat());
            (
                Just(acked),
                proptest::collection::vec(reader, readers..=readers),
            )
        })
        .prop_map(|(acked, deliveries)| History {
            acked,
            deliveries,
            // One for each step of `stream_deliveries` that goes back.
            reconnects: 4,
        })
}

proptest! {
    #[test]
    fn a_faithful_history_has_no_violations(history in history()) {
        let verdict = history.play().verdict();
        prop_assert_eq!(verdict.violations, []);
        prop_assert_eq!(verdict.counts.owed, 0);
        prop_assert_eq!(verdict.counts.unanswered(), 0);
    }

    #[test]
    fn a_message_left_out_is_lost(mut history in history(), reader: Index, victim: Index) {
        let reader = reader.index(history.deliveries.len());
        let mut promised = Vec::new();
        for (stream, acked) in history.acked.iter().enumerate() {
            let at_disk = (0u64..).zip(acked).filter(|(_, at_disk)| **at_disk);
            promised.extend(at_disk.map(|(number, _)| (stream, number)));
        }
        prop_assume!(!promised.is_empty());
        let (stream, number) = promised[victim.index(promised.len())];
        history.deliveries[reader].retain(|(s, n, _)| (*s, *n) != (stream, number));
        let verdict = history.play().verdict();
        let lost = Violation::Lost {
            reader: format!("reader-{reader}").into(),
            stream: format!("{} on {}", STREAMS[stream].0, STREAMS[stream].1),
            count: 1,
            first: vec![number],
        };
        prop_assert_eq!(verdict.violations, [lost]);
        prop_assert_eq!(verdict.counts.owed, 1);
    }

    #[test]
    fn a_message_that_comes_late_is_out_of_order(mut history in history(), victim: Index) {
        let deliveries = &mut history.deliveries[0];
        prop_assume!(!deliveries.is_empty());
        let (stream, number, _) = deliveries[victim.index(deliveries.len())];
        let later = deliveries.iter().filter(|(s, n, _)| *s == stream && *n > number);
        prop_assume!(later.count() > 0);
        deliveries.retain(|(s, n, _)| (*s, *n) != (stream, number));
        deliveries.push((stream, number, false));
        history.reconnects += 1;
        let violations = history.play().verdict().violations;
        prop_assert!(
            matches!(&violations[..], [Violation::Reordered { number: found, .. }] if *found == number),
            "{violations:?}"
        );
    }

    #[test]
    fn messages_sent_again_in_reverse_are_found(mut history in history()) {
        let deliveries = &mut history.deliveries[0];
        let mut again: Deliveries = deliveries.iter().filter(|(s, ..)| *s == 0).copied().collect();
        again.dedup();
        prop_assume!(again.len() as u64 > history.reconnects + 2);
        again.reverse();
        deliveries.extend(again);
        let violations = history.play().verdict().violations;
        prop_assert!(
            matches!(&violations[..], [Violation::Rewound { .. }]),
            "{violations:?}"
        );
    }

    #[test]
    fn a_forged_message_is_found(history in history(), stream in 0usize..3, beyond in 0u64..3) {
        let mut ledger = history.play();
        let number = history.acked[stream].len() as u64 + beyond;
        deliver(&mut ledger, ReaderId(0), &vec![(stream, number, false)]);
        let forged = Violation::NeverPublished {
            reader: "reader-0".into(),
            stream: format!("{} on {}", STREAMS[stream].0, STREAMS[stream].1),
            number,
        };
        prop_assert_eq!(ledger.verdict().violations, [forged]);
    }
}

fn delivery(publisher: &'static str, topic: &'static str) -> Delivery<'static> {
    Delivery {
        stream: StreamId(0),
        number: 0,
        publisher,
        topic,
        duplicate: false,
    }
}

#[test]
fn a_message_under_another_name_or_topic_is_found() {
    for (publisher, topic) in [("spiffe://x/a/b/two", "t/1"), ("spiffe://x/a/b/one", "t/2")] {
        let mut ledger = Ledger::default();
        let stream = ledger.stream("spiffe://x/a/b/one", "t/1");
        let reader = ledger.reader("r");
        ledger.published(stream, Durability::Default);
        ledger.acked(stream, 0, Some(Durability::Disk));
        ledger.delivered(reader, &delivery("spiffe://x/a/b/one", "t/1"));
        assert_eq!(ledger.verdict().violations, []);
        ledger.delivered(reader, &delivery(publisher, topic));
        let violations = ledger.verdict().violations;
        assert!(
            matches!(&violations[..], [Violation::Misattributed { .. }]),
            "{violations:?}"
        );
    }
}

#[test]
fn answers_that_nobody_asked_for_are_found() {
    let mut ledger = Ledger::default();
    let stream = ledger.stream("p", "t");
    ledger.published(stream, Durability::Default);
    ledger.acked(stream, 0, Some(Durability::Disk));
    ledger.acked(stream, 0, Some(Durability::Disk));
    ledger.refused(stream, 0);
    ledger.acked(stream, 1, Some(Durability::Disk));
    let violations = ledger.verdict().violations;
    let before: Vec<_> = violations
        .iter()
        .map(|violation| match violation {
            Violation::Unasked { answer, before, .. } => (*answer, *before),
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(
        before,
        [
            ("with an acknowledgement", "acknowledged"),
            ("with a refusal", "acknowledged"),
            ("with an acknowledgement", "not published"),
        ]
    );
}

#[test]
fn an_acknowledgement_below_or_beyond_what_can_be_is_found() {
    let table = [
        (Durability::Default, Some(Durability::Disk), true),
        (Durability::Default, Some(Durability::Memory), true),
        (Durability::Memory, Some(Durability::Memory), true),
        (Durability::Disk, Some(Durability::Disk), true),
        (Durability::Disk, Some(Durability::Memory), false),
        (Durability::Default, Some(Durability::Replicated), false),
        (Durability::Default, None, false),
    ];
    for (demanded, reached, good) in table {
        let mut ledger = Ledger::default();
        let stream = ledger.stream("p", "t");
        let number = ledger.published(stream, demanded);
        ledger.acked(stream, number, reached);
        let violations = ledger.verdict().violations;
        assert_eq!(violations.is_empty(), good, "{violations:?}");
    }
}

#[test]
fn a_message_that_is_never_answered_is_found() {
    let mut ledger = Ledger::default();
    let stream = ledger.stream("p", "t");
    ledger.published(stream, Durability::Default);
    ledger.published(stream, Durability::Default);
    ledger.refused(stream, 0);
    let violations = ledger.verdict().violations;
    assert!(
        matches!(&violations[..], [Violation::Unanswered { count: 1, .. }]),
        "{violations:?}"
    );
}
