//! Policy files: one that is accepted decides every question, and explains what it decided.
#![no_main]

use libfuzzer_sys::fuzz_target;
use selvedge_broker::policy::{Policy, Verb};
use selvedge_certs::Identity;
use selvedge_proto::topic::{TopicFilter, TopicName};

const SUBJECTS: [&str; 4] = [
    "sites/plant-1/press-7/temperature",
    "press-7/run",
    "$SYS/uptime",
    "a",
];

fuzz_target!(|text: &str| {
    let policy = match Policy::parse(text) {
        Ok(policy) => policy,
        Err(errors) => return drop(errors.to_string()),
    };
    let identity: Identity = "spiffe://example.test/acme/plant-1/press-7"
        .parse()
        .expect("a good identity");
    let decided = policy.for_identity(&identity);
    for (verb, subject) in Verb::ALL
        .into_iter()
        .flat_map(|verb| SUBJECTS.map(|s| (verb, s)))
    {
        let topic = TopicName::parse(subject).expect("a good topic");
        let filter = TopicFilter::from(topic.clone());
        let explanation = policy.explain(&identity, verb, &filter);
        let allowed = decided.decide(verb, &topic).is_allowed();
        assert_eq!(explanation.decision.is_allowed(), allowed);
        drop(explanation.to_string());
    }
    let _ = decided.decide_filter(&TopicFilter::parse("#").expect("a good filter"));
});
