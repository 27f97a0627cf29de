//! Topics and filters: what parses prints as it was written, and the relations between filters hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_proto::topic::{SubscribeTarget, TopicFilter, TopicName};

// One subject to a line: a topic, then two filters.
fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let (topic, left, right) = (next(), next(), next());

    if let Ok(target) = std::str::from_utf8(left) {
        if let Ok(target) = SubscribeTarget::parse(target) {
            let printed = target.to_string();
            assert_eq!(SubscribeTarget::parse(&printed), Ok(target));
        }
    }
    let topic = TopicName::try_from(topic);
    let (Ok(left), Ok(right)) = (TopicFilter::try_from(left), TopicFilter::try_from(right)) else {
        return;
    };
    assert_eq!(left.overlaps(&right), right.overlaps(&left));
    assert!(left.covers(&left) && right.covers(&right));
    let Ok(topic) = topic else {
        return;
    };
    assert!(TopicFilter::from(topic.clone()).matches(&topic));
    if right.matches(&topic) {
        assert!(!left.covers(&right) || left.matches(&topic));
        assert!(!left.matches(&topic) || left.overlaps(&right));
    }
});
