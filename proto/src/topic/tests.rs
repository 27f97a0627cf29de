//! Tests of topic names and filters: tables, a naive matcher as oracle, and exhaustive comparison of small filters.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn name(text: &str) -> TopicName {
    TopicName::parse(text).unwrap()
}

fn filter(text: &str) -> TopicFilter {
    TopicFilter::parse(text).unwrap()
}

/// Matching as the standard words it, over split levels and without any of the code under test.
fn oracle(filter: &str, topic: &str) -> bool {
    fn walk(filter: &[&str], topic: &[&str]) -> bool {
        match (filter, topic) {
            (["#"], _) | ([], []) => true,
            (["+", filter @ ..], [_, topic @ ..]) => walk(filter, topic),
            ([wanted, filter @ ..], [found, topic @ ..]) => wanted == found && walk(filter, topic),
            _ => false,
        }
    }
    let hidden = topic.starts_with('$') && (filter.starts_with('+') || filter.starts_with('#'));
    let filter: Vec<&str> = filter.split('/').collect();
    let topic: Vec<&str> = topic.split('/').collect();
    !hidden && walk(&filter, &topic)
}

#[test]
fn topic_names_are_accepted_and_refused_as_the_standard_says() {
    let deepest = vec!["a"; MAX_TOPIC_LEVELS].join("/");
    for text in [
        "a",
        "/",
        "//",
        "a/b",
        " ",
        "Ä/ß",
        "$SYS/x",
        "$shared/x",
        "a/$share",
        &deepest,
    ] {
        let name = name(text);
        assert_eq!(name.as_str(), text);
        assert!(name.levels().eq(text.split('/')));
    }
    assert!(TopicName::parse("x".repeat(MAX_TOPIC_BYTES)).is_ok());

    let refused = |text: &str, error: TopicError| {
        assert_eq!(TopicName::parse(text), Err(error), "{text:.40}");
    };
    let kind = TopicKind::Name;
    refused("", TopicError::Empty(kind));
    refused(
        &"x".repeat(65_536),
        TopicError::TooLong {
            kind,
            bytes: 65_536,
        },
    );
    refused(
        &format!("{deepest}/"),
        TopicError::TooManyLevels { kind, levels: 129 },
    );
    refused("a/b\0", TopicError::Nul { kind, level: 2 });
    refused("$share/g/x", TopicError::ReservedShare(kind));
    refused("$share", TopicError::ReservedShare(kind));
    for (text, wildcard, level, found) in [
        ("a/+", '+', 2, "\"+\""),
        ("#", '#', 1, "\"#\""),
        ("a/b/c#d", '#', 3, "\"c#d\""),
    ] {
        refused(
            text,
            TopicError::WildcardInName {
                level,
                wildcard,
                found: found.into(),
            },
        );
    }
    let invalid = TopicName::try_from(&b"a/\xff"[..]);
    assert_eq!(invalid, Err(TopicError::NotUtf8 { kind, at: 2 }));
}

#[test]
fn topic_filters_are_accepted_and_refused_as_the_standard_says() {
    for text in [
        "a", "+", "#", "/", "+/+", "a/+/b", "a/#", "+/#", "/#", "$SYS/#", "$SYS/+/x",
    ] {
        assert_eq!(filter(text).as_str(), text);
        assert_eq!(
            filter(text).is_literal(),
            !text.contains(['+', '#']),
            "{text}"
        );
    }
    let refused = |text: &str, error: TopicError| {
        assert_eq!(TopicFilter::parse(text), Err(error), "{text:.40}");
    };
    let kind = TopicKind::Filter;
    refused("", TopicError::Empty(kind));
    refused(
        &"x".repeat(65_536),
        TopicError::TooLong {
            kind,
            bytes: 65_536,
        },
    );
    refused(
        &"/".repeat(128),
        TopicError::TooManyLevels { kind, levels: 129 },
    );
    refused("\0/a", TopicError::Nul { kind, level: 1 });
    refused("$share/g/a", TopicError::ReservedShare(kind));
    refused(
        "a/#/b",
        TopicError::RestNotLast {
            level: 2,
            levels: 3,
        },
    );
    refused(
        "#/#",
        TopicError::RestNotLast {
            level: 1,
            levels: 2,
        },
    );
    for (text, wildcard, level, found) in [
        ("a/b+", '+', 2, "\"b+\""),
        ("a#", '#', 1, "\"a#\""),
        ("++", '+', 1, "\"++\""),
    ] {
        refused(
            text,
            TopicError::PartialWildcard {
                level,
                wildcard,
                found: found.into(),
            },
        );
    }
}

#[test]
fn messages_say_what_was_expected_found_and_where() {
    let message = |result: Result<TopicFilter, TopicError>| result.unwrap_err().to_string();
    assert_eq!(
        message(TopicFilter::parse("plant/pre\nss+")),
        r#"expected `+` to be a whole level, found level 2 "pre\nss+""#
    );
    assert_eq!(
        message(TopicFilter::parse("a/#/b")),
        "expected `#` only as the last level, found it as level 2 of 3"
    );
    assert_eq!(
        message(TopicFilter::parse("")),
        "expected a topic filter of 1 to 65535 bytes, found an empty one"
    );
    assert_eq!(
        TopicName::parse("a/b+").unwrap_err().to_string(),
        "expected a topic name without wildcards, found `+` in level 2 \"b+\"; \
         publish to one topic, wildcards are for subscriptions"
    );
    let long = TopicFilter::parse(format!("{}+", "é".repeat(60_000 / 2))).unwrap_err();
    assert!(long.to_string().len() < 200, "{long}");
}

#[test]
fn filters_match_as_the_standard_says() {
    for (pattern, topic, expected) in [
        ("a/b", "a/b", true),
        ("a/b", "a/B", false),
        ("a/b", "a/b/", false),
        ("a/#", "a", true),
        ("a/#", "a/", true),
        ("a/#", "a/b/c", true),
        ("a/#", "ab", false),
        ("a/+", "a", false),
        ("a/+", "a/", true),
        ("a/+", "a/b/c", false),
        ("a/+/#", "a", false),
        ("a/+/#", "a/b", true),
        ("+", "/", false),
        ("+/+", "/", true),
        ("/+", "/a", true),
        ("+", "/a", false),
        ("#", "a//b", true),
        ("#", "$SYS/x", false),
        ("+/x", "$SYS/x", false),
        ("$SYS/#", "$SYS/x", true),
        ("$SYS/#", "$SYS", true),
        ("a/+", "a/$b", true),
    ] {
        assert_eq!(
            filter(pattern).matches(&name(topic)),
            expected,
            "{pattern} {topic}"
        );
        assert_eq!(
            oracle(pattern, topic),
            expected,
            "oracle: {pattern} {topic}"
        );
    }
}

/// Every path of 1 to `depth` of these levels, the empty one left out.
fn paths(levels: &[&str], depth: usize) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut longest: Vec<String> = levels.iter().map(ToString::to_string).collect();
    for _ in 0..depth {
        all.extend(longest.iter().filter(|path| !path.is_empty()).cloned());
        longest = longest
            .iter()
            .flat_map(|path| levels.iter().map(move |level| format!("{path}/{level}")))
            .collect();
    }
    all
}

/// With topics one level deeper than any filter, and with levels that no filter names, these
/// topics tell any two of the filters apart: the comparison is exact both ways.
#[test]
fn covers_and_overlaps_agree_with_brute_force() {
    let topics = paths(&["", "a", "$s", "z", "$z"], 4);
    let filters: Vec<String> = paths(&["", "a", "$s", "+", "#"], 3)
        .into_iter()
        .filter(|text| TopicFilter::parse(text.as_str()).is_ok())
        .collect();
    assert!(filters.len() > 100 && topics.len() > 700);
    let matched: Vec<Vec<bool>> = filters
        .iter()
        .map(|filter| topics.iter().map(|topic| oracle(filter, topic)).collect())
        .collect();
    for (left, left_topics) in filters.iter().zip(&matched) {
        for (right, right_topics) in filters.iter().zip(&matched) {
            let mut both = left_topics.iter().zip(right_topics);
            let covers = both.clone().all(|(left, right)| *left || !right);
            let overlaps = both.any(|(left, right)| *left && *right);
            assert_eq!(
                filter(left).covers(&filter(right)),
                covers,
                "{left} covers {right}"
            );
            assert_eq!(
                filter(left).overlaps(&filter(right)),
                overlaps,
                "{left} overlaps {right}"
            );
        }
    }
}

#[test]
fn filters_whose_common_topic_would_be_too_long_do_not_overlap() {
    let half = "x".repeat(MAX_TOPIC_BYTES / 2);
    let fits = filter(&format!("+/{half}"));
    assert!(filter(&format!("{half}/+")).overlaps(&fits));
    assert!(filter(&format!("{half}/#")).overlaps(&fits));
    assert!(fits.overlaps(&filter(&format!("{half}/#"))));
    for too_long in [
        format!("{half}x/+"),
        format!("{half}x/#"),
        format!("{half}x/+/#"),
    ] {
        assert!(!filter(&too_long).overlaps(&fits));
        assert!(!fits.overlaps(&filter(&too_long)));
    }
    let longest = filter(&"x".repeat(MAX_TOPIC_BYTES));
    assert!(longest.overlaps(&filter("#")) && longest.overlaps(&filter("+")));
    assert!(longest.overlaps(&filter("+/#")) && longest.overlaps(&longest));
}

#[test]
fn shared_subscriptions_are_told_from_plain_ones() {
    let shared = SubscribeTarget::parse("$share/workers/a/+/#").unwrap();
    assert_eq!(shared.share.unwrap().as_str(), "workers");
    assert_eq!(shared.filter, filter("a/+/#"));
    assert_eq!(
        SubscribeTarget::parse("$share/g//x").unwrap().filter,
        filter("/x")
    );
    assert_eq!(SubscribeTarget::parse("$shared/g/x").unwrap().share, None);

    let refused = |text: &str, error: TopicError| {
        assert_eq!(SubscribeTarget::parse(text), Err(error), "{text}");
    };
    for text in ["$share", "$share/", "$share/g"] {
        refused(
            text,
            TopicError::ShareIncomplete {
                found: format!("{text:?}"),
            },
        );
    }
    refused("$share//x", TopicError::Empty(TopicKind::ShareGroup));
    refused("$share/g/", TopicError::Empty(TopicKind::Filter));
    refused(
        "$share/g+/x",
        TopicError::ShareGroupCharacter {
            character: '+',
            found: "\"g+\"".into(),
        },
    );
    refused(
        "$share/g/$share/h/x",
        TopicError::ReservedShare(TopicKind::Filter),
    );
    refused(
        "$share/g/a/#/b",
        TopicError::RestNotLast {
            level: 2,
            levels: 3,
        },
    );
    assert_eq!(
        ShareGroup::parse("a/b"),
        Err(TopicError::ShareGroupCharacter {
            character: '/',
            found: "\"a/b\"".into()
        })
    );
}

#[test]
fn names_are_found_in_collections_by_text() {
    let names: HashSet<TopicName> = [name("a/b")].into();
    assert!(names.contains("a/b"));
    let mut sorted = [name("b"), name("a/z"), name("a")];
    sorted.sort();
    assert_eq!(sorted, [name("a"), name("a/z"), name("b")]);
}

fn level() -> impl Strategy<Value = String> {
    prop_oneof![Just(""), Just("a"), Just("b"), Just("$s"), Just("é")].prop_map(String::from)
}

fn any_name() -> impl Strategy<Value = TopicName> {
    prop::collection::vec(level(), 1..7)
        .prop_map(|levels| levels.join("/"))
        .prop_filter("not empty", |text| !text.is_empty())
        .prop_map(|text| name(&text))
}

fn any_filter() -> impl Strategy<Value = TopicFilter> {
    let level = prop_oneof![3 => level(), 2 => Just("+".to_owned())];
    (prop::collection::vec(level, 0..7), any::<bool>())
        .prop_map(|(mut levels, rest)| {
            if rest || levels.is_empty() {
                levels.push("#".to_owned());
            }
            levels.join("/")
        })
        .prop_filter("not empty", |text| !text.is_empty())
        .prop_map(|text| filter(&text))
}

/// Text made mostly of what the parsers care about.
fn hostile_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("/"),
        Just("+"),
        Just("#"),
        Just("$share"),
        Just("$"),
        Just("\0"),
        Just("a"),
        Just("é"),
        Just("\u{1}")
    ];
    prop_oneof![
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat()),
        any::<String>(),
    ]
}

proptest! {
    #[test]
    fn matching_agrees_with_the_oracle(filter in any_filter(), name in any_name()) {
        prop_assert_eq!(filter.matches(&name), oracle(filter.as_str(), name.as_str()));
    }

    #[test]
    fn a_literal_filter_is_its_topic(filter in any_filter(), name in any_name()) {
        let literal = TopicFilter::from(name.clone());
        prop_assert!(literal.is_literal());
        prop_assert_eq!(literal.as_topic(), Some(name.clone()));
        prop_assert_eq!(filter.covers(&literal), filter.matches(&name));
        prop_assert_eq!(filter.overlaps(&literal), filter.matches(&name));
        prop_assert_eq!(filter.as_topic().is_some(), filter.is_literal());
    }

    #[test]
    fn covering_and_overlapping_hold_together(a in any_filter(), b in any_filter(), c in any_filter()) {
        prop_assert!(a.covers(&a));
        prop_assert_eq!(a.overlaps(&b), b.overlaps(&a));
        prop_assert!(!a.covers(&b) || a.overlaps(&b));
        prop_assert!(!(a.covers(&b) && b.covers(&c)) || a.covers(&c));
        prop_assert!(!(a.covers(&b) && b.overlaps(&c)) || a.overlaps(&c));
    }

    #[test]
    fn what_is_covered_is_matched(a in any_filter(), b in any_filter(), name in any_name()) {
        prop_assert!(!(a.covers(&b) && b.matches(&name)) || a.matches(&name));
        prop_assert!(!(a.matches(&name) && b.matches(&name)) || a.overlaps(&b));
    }

    #[test]
    fn parsing_text_never_panics_and_what_is_accepted_is_kept(text in hostile_text()) {
        if let Ok(name) = TopicName::parse(text.as_str()) {
            prop_assert_eq!(name.to_string(), text.as_str());
            prop_assert!(!text.contains(['+', '#', '\0']) && !text.is_empty());
        }
        if let Ok(filter) = TopicFilter::parse(text.as_str()) {
            prop_assert_eq!(filter.to_string(), text.as_str());
            prop_assert!(filter.covers(&filter) && filter.overlaps(&filter));
        }
        if let Ok(target) = text.parse::<SubscribeTarget>() {
            prop_assert_eq!(target.to_string(), text.as_str());
            prop_assert_eq!(target.share.is_some(), text.starts_with("$share/"));
        }
        if let Err(error) = SubscribeTarget::parse(&text) {
            prop_assert!(!error.to_string().contains(['\0', '\n']));
        }
    }

    #[test]
    fn parsing_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let name = TopicName::try_from(bytes.as_slice());
        let filter = TopicFilter::try_from(bytes.as_slice());
        if std::str::from_utf8(&bytes).is_err() {
            let refused = |error| matches!(error, Some(TopicError::NotUtf8 { .. }));
            prop_assert!(refused(name.err()) && refused(filter.err()));
        }
    }

    #[test]
    fn a_subscription_survives_being_written_and_read(filter in any_filter(), group in prop::option::of("[a-zäé$ ]{1,8}")) {
        let share = group.map(|group| ShareGroup::parse(group).unwrap());
        let target = SubscribeTarget { share, filter };
        prop_assert_eq!(target.to_string().parse(), Ok(target));
    }
}
