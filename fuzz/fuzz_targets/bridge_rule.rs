//! The bridge's mapping: what a rule carries one way, the same rule carries back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_bridge::mapping::{Direction, Rule, RuleSet, Version, check_rules};
use selvedge_proto::topic::TopicName;

// One text to a line: filter, remote prefix and local prefix of two rules, then a topic.
fuzz_target!(|text: &str| {
    let mut lines = text.split('\n');
    let mut next = || lines.next().unwrap_or_default();
    let mut rule = |direction| Rule::new(direction, next(), next(), next());
    let (Ok(both), Ok(out)) = (rule(Direction::Both), rule(Direction::Out)) else {
        return;
    };
    if let Ok(topic) = TopicName::parse(lines.next().unwrap_or_default()) {
        if let Some(local) = both.map_in(&topic) {
            assert!(both.local_filter().matches(&local));
            assert_eq!(both.map_out(&local), Some(topic.clone()));
        }
        if let Some(remote) = both.map_out(&topic) {
            assert!(both.remote_filter().matches(&remote));
            assert_eq!(both.map_in(&remote), Some(topic));
        }
    }
    let rules = [both, out];
    for version in [Version::V311, Version::V5] {
        let remote = "remote";
        for conflict in check_rules(&[RuleSet {
            remote,
            version,
            rules: &rules,
        }]) {
            drop(conflict.to_string());
        }
    }
});
