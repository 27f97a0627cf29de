//! Tests of the mapping and of the search for loops.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn rule(direction: Direction, filter: &str, remote: &str, local: &str) -> Rule {
    Rule::new(direction, filter, remote, local).unwrap()
}

fn topic(name: &str) -> TopicName {
    TopicName::parse(name).unwrap()
}

fn conflicts(version: Version, rules: &[Rule]) -> Vec<RuleConflict> {
    check_rules(&[RuleSet {
        remote: "plant",
        version,
        rules,
    }])
}

#[test]
fn prefixes_are_replaced_in_the_direction_of_the_rule() {
    let inward = rule(Direction::In, "sensors/#", "hall-1/", "site/hall-1/");
    assert_eq!(inward.remote_filter().as_str(), "hall-1/sensors/#");
    assert_eq!(inward.local_filter().as_str(), "site/hall-1/sensors/#");
    let mapped = inward.map_in(&topic("hall-1/sensors/7/temp"));
    assert_eq!(mapped, Some(topic("site/hall-1/sensors/7/temp")));
    assert_eq!(inward.map_in(&topic("hall-2/sensors/7/temp")), None);
    assert_eq!(inward.map_out(&topic("site/hall-1/sensors/7/temp")), None);

    let outward = rule(Direction::Out, "cmd/+", "", "site/");
    assert_eq!(outward.map_out(&topic("site/cmd/a")), Some(topic("cmd/a")));
    assert_eq!(outward.map_out(&topic("site/cmd/a/b")), None);
    assert_eq!(outward.map_in(&topic("cmd/a")), None);
}

#[test]
fn what_a_prefix_hides_is_not_carried() {
    // The remote's own topics must not become the fabric's system topics.
    let inward = rule(Direction::In, "#", "x/", "");
    assert_eq!(inward.map_in(&topic("x/$SYS/broker/uptime")), None);
    assert_eq!(inward.map_in(&topic("x/a")), Some(topic("a")));
    // `x/#` matches `x` and `x/` too, and neither leaves a name behind.
    assert_eq!(inward.map_in(&topic("x")), None);
    assert_eq!(inward.map_in(&topic("x/")), None);
    let system = rule(Direction::In, "#", "$SYS/", "remote-sys/");
    let mapped = system.map_in(&topic("$SYS/uptime"));
    assert_eq!(mapped, Some(topic("remote-sys/uptime")));
}

#[test]
fn a_prefix_that_is_not_whole_levels_is_refused() {
    assert_eq!(
        Rule::new(Direction::In, "#", "hall", "").unwrap_err(),
        RuleError::PrefixWithinLevel {
            side: "remote",
            prefix: "hall".into()
        }
    );
    assert_eq!(
        Rule::new(Direction::In, "#", "", "+/").unwrap_err(),
        RuleError::PrefixWildcard {
            side: "local",
            prefix: "+/".into()
        }
    );
    assert!(matches!(
        Rule::new(Direction::In, "#/a", "", ""),
        Err(RuleError::Filter { side: "remote", .. })
    ));
    assert!(matches!(
        Rule::new(Direction::In, "g/a", "$share/", "x/"),
        Err(RuleError::Filter {
            side: "remote",
            reason: TopicError::ReservedShare(_),
            ..
        })
    ));
}

#[test]
fn both_ways_over_one_mapping_is_allowed_only_where_echo_is_prevented() {
    let both = [rule(Direction::Both, "#", "a/", "b/")];
    assert_eq!(conflicts(Version::V5, &both), []);
    let pair = [
        rule(Direction::In, "x/#", "a/", "b/"),
        rule(Direction::Out, "#", "a/", "b/"),
    ];
    assert_eq!(conflicts(Version::V5, &pair), []);

    let found = conflicts(Version::V311, &both);
    assert!(
        matches!(&found[..], [RuleConflict::Loop { inward, outward, .. }] if inward == outward),
        "{found:?}"
    );
    let found = conflicts(Version::V311, &pair);
    let [conflict @ RuleConflict::Loop { output, .. }] = &found[..] else {
        panic!("expected one loop, found {found:?}");
    };
    assert_eq!(output.as_str(), "a/x/#");
    let message = conflict.to_string();
    assert!(message.contains("1 in \"x/#\""), "{message}");
    assert!(message.contains("2 out \"#\""), "{message}");
    assert!(message.contains("version = \"5\""), "{message}");
}

#[test]
fn a_loop_that_renames_is_refused_in_every_version() {
    let rules = [
        rule(Direction::In, "#", "a/", "l/"),
        rule(Direction::Out, "#", "a/deeper/", "l/"),
    ];
    for version in [Version::V5, Version::V311] {
        assert!(
            matches!(conflicts(version, &rules)[..], [RuleConflict::Loop { .. }]),
            "{version}"
        );
    }
}

#[test]
fn rules_that_only_look_alike_are_allowed() {
    let rules = [
        rule(Direction::In, "sensors/#", "", "site/"),
        rule(Direction::Out, "commands/#", "", "site/"),
    ];
    assert_eq!(conflicts(Version::V311, &rules), []);
    // Sent out, but never brought in again.
    let rules = [
        rule(Direction::In, "#", "up/", "site/"),
        rule(Direction::Out, "#", "down/", "site/"),
    ];
    assert_eq!(conflicts(Version::V311, &rules), []);
}

#[test]
fn overlapping_inward_rules_are_refused() {
    let rules = [
        rule(Direction::In, "a/#", "", "x/"),
        rule(Direction::In, "+/b", "", "y/"),
    ];
    assert!(matches!(
        &conflicts(Version::V5, &rules)[..],
        [RuleConflict::Twice { overlap, .. }] if overlap.as_str() == "a/b"
    ));
}

#[test]
fn a_circle_through_two_remotes_without_hop_lists_is_refused() {
    let one = [
        rule(Direction::Out, "#", "r/", "x/"),
        rule(Direction::In, "#", "r/", "y/"),
    ];
    let two = [
        rule(Direction::Out, "#", "s/", "y/"),
        rule(Direction::In, "#", "s/", "x/"),
    ];
    let check = |second| {
        let set = |remote, version, rules| RuleSet {
            remote,
            version,
            rules,
        };
        check_rules(&[set("one", Version::V311, &one), set("two", second, &two)])
    };
    assert_eq!(check(Version::V5), []);
    let found = check(Version::V311);
    let [RuleConflict::Circle { rules }] = &found[..] else {
        panic!("expected a circle, found {found:?}");
    };
    assert_eq!(rules.len(), 2);
    assert!(rules[0].starts_with("\"one\" 2 in"), "{rules:?}");
}

fn level() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), Just("$s".to_owned()), "[ab]{1,2}"]
}

fn name() -> impl Strategy<Value = TopicName> {
    proptest::collection::vec(level(), 1..5)
        .prop_map(|levels| levels.join("/"))
        .prop_filter_map("a topic name", |name| TopicName::parse(name).ok())
}

fn filter() -> impl Strategy<Value = String> {
    let level = prop_oneof![3 => level(), 2 => Just("+".to_owned())];
    (proptest::collection::vec(level, 0..4), any::<bool>()).prop_map(|(mut levels, rest)| {
        if rest || levels.is_empty() {
            levels.push("#".to_owned());
        }
        levels.join("/")
    })
}

fn prefix() -> impl Strategy<Value = String> {
    proptest::collection::vec("[ab]", 0..3)
        .prop_map(|levels| levels.iter().map(|level| format!("{level}/")).collect())
}

fn any_rule(direction: Direction) -> impl Strategy<Value = Rule> {
    (filter(), prefix(), prefix()).prop_filter_map("a rule", move |(filter, remote, local)| {
        Rule::new(direction, &filter, &remote, &local).ok()
    })
}

proptest! {
    #[test]
    fn what_is_carried_one_way_comes_back_the_other(
        rule in any_rule(Direction::Both),
        name in name(),
    ) {
        if let Some(mapped) = rule.map_in(&name) {
            prop_assert!(rule.remote_filter().matches(&name));
            prop_assert!(rule.local_filter().matches(&mapped));
            prop_assert_eq!(rule.map_out(&mapped), Some(name.clone()));
        }
        if let Some(mapped) = rule.map_out(&name) {
            prop_assert_eq!(rule.map_in(&mapped), Some(name));
        }
    }

    #[test]
    fn the_intersection_matches_what_both_match(
        left in filter(),
        right in filter(),
        name in name(),
    ) {
        let (Ok(left), Ok(right)) = (TopicFilter::parse(left), TopicFilter::parse(right)) else {
            return Ok(());
        };
        let both = left.matches(&name) && right.matches(&name);
        let found = intersection(&left, &right).is_some_and(|both| both.matches(&name));
        prop_assert_eq!(found, both);
    }

    /// Whatever rules the check lets pass on a 3.1.1 remote, no message comes back in twice.
    #[test]
    fn no_message_goes_round_rules_that_pass_the_check(
        rules in proptest::collection::vec(
            prop_oneof![any_rule(Direction::In), any_rule(Direction::Out)],
            1..5,
        ),
        name in name(),
    ) {
        if !conflicts(Version::V311, &rules).is_empty() {
            return Ok(());
        }
        for local in rules.iter().filter_map(|rule| rule.map_in(&name)) {
            for sent in rules.iter().filter_map(|rule| rule.map_out(&local)) {
                let back = rules.iter().find_map(|rule| rule.map_in(&sent));
                prop_assert_eq!(back, None, "{} became {} and {}", name, local, sent);
            }
        }
    }
}
