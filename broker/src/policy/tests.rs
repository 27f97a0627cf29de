//! Tests of policies: files good and bad, decisions in tables, and properties against a naive reading of the rules.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::sample::{Index, subsequence};

use super::pattern::{IdentityPattern, SubjectTemplate};
use super::*;

fn identity(path: &str) -> Identity {
    format!("spiffe://plant.example/{path}").parse().unwrap()
}

fn topic(text: &str) -> TopicName {
    TopicName::parse(text).unwrap()
}

fn filter(text: &str) -> TopicFilter {
    TopicFilter::parse(text).unwrap()
}

const PLANT: &str = r##"
[[rule]]
name = "devices use their own topics"
identities = ["acme/plant-1/*"]
allow = ["publish", "subscribe"]
subjects = ["sites/{site}/{name}/#"]

[[rule]]
name = "dashboards read everything"
identities = ["acme/*/dashboard-*"]
allow = ["subscribe"]
subjects = ["#"]

[[rule]]
name = "secrets stay secret"
identities = ["*/*/*"]
deny = ["subscribe", "publish"]
subjects = ["sites/+/+/secret/#", "+/secrets"]

[[rule]]
name = "operators read the broker"
identities = ["spiffe://plant.example/acme/cloud/operator"]
allow = ["subscribe"]
subjects = ["$SYS/#"]

[[rule]]
name = "presses can be driven"
identities = ["acme/plant-1/panel"]
allow = ["call", "infer"]
subjects = ["press-7/+", "{tenant}-digits"]
"##;

fn decide(path: &str, verb: Verb, subject: &str) -> Decision {
    let policy = Policy::parse(PLANT).unwrap();
    policy
        .for_identity(&identity(path))
        .decide(verb, &topic(subject))
}

fn decide_filter(path: &str, subject: &str) -> FilterDecision {
    let policy = Policy::parse(PLANT).unwrap();
    policy
        .for_identity(&identity(path))
        .decide_filter(&filter(subject))
}

#[test]
fn subjects_are_allowed_by_the_first_rule_that_matches() {
    for (path, verb, subject, rule) in [
        (
            "acme/plant-1/press-7",
            Verb::Publish,
            "sites/plant-1/press-7/temp",
            "devices use their own topics",
        ),
        (
            "acme/plant-1/press-7",
            Verb::Publish,
            "sites/plant-1/press-7",
            "devices use their own topics",
        ),
        (
            "acme/plant-2/dashboard-1",
            Verb::Subscribe,
            "anything/at/all",
            "dashboards read everything",
        ),
        (
            "acme/plant-1/dashboard-1",
            Verb::Subscribe,
            "sites/plant-1/dashboard-1/x",
            "devices use their own topics",
        ),
        (
            "acme/cloud/operator",
            Verb::Subscribe,
            "$SYS/broker/uptime",
            "operators read the broker",
        ),
        (
            "acme/plant-1/panel",
            Verb::Call,
            "press-7/set-speed",
            "presses can be driven",
        ),
        (
            "acme/plant-1/panel",
            Verb::Infer,
            "acme-digits",
            "presses can be driven",
        ),
    ] {
        let decision = decide(path, verb, subject);
        assert_eq!(
            decision,
            Decision::Allowed { rule: rule.into() },
            "{path} {verb} {subject}"
        );
    }
}

#[test]
fn denials_name_verb_subject_and_rule() {
    for (path, verb, subject, denial) in [
        (
            "acme/plant-1/press-7",
            Verb::Publish,
            "sites/plant-1/press-8/temp",
            r#"publish on "sites/plant-1/press-8/temp" denied: no rule allows it"#,
        ),
        (
            "acme/plant-1/press-7",
            Verb::Publish,
            "sites/plant-1/press-7/secret/key",
            r#"publish on "sites/plant-1/press-7/secret/key" denied by rule "secrets stay secret""#,
        ),
        (
            "other/plant-1/press-7",
            Verb::Publish,
            "sites/plant-1/press-7/temp",
            r#"publish on "sites/plant-1/press-7/temp" denied: no rule allows it"#,
        ),
        (
            "acme/plant-2/dashboard-1",
            Verb::Subscribe,
            "a/secrets",
            r#"subscribe on "a/secrets" denied by rule "secrets stay secret""#,
        ),
        (
            "acme/plant-2/dashboard-1",
            Verb::Subscribe,
            "$SYS/broker",
            r#"subscribe on "$SYS/broker" denied: no rule allows it"#,
        ),
        (
            "acme/plant-1/panel",
            Verb::Serve,
            "press-7/set-speed",
            r#"serve on "press-7/set-speed" denied: no rule allows it"#,
        ),
        (
            "acme/plant-1/panel",
            Verb::Work,
            "acme-digits",
            r#"work on "acme-digits" denied: no rule allows it"#,
        ),
    ] {
        let Decision::Denied(found) = decide(path, verb, subject) else {
            panic!("expected {denial}");
        };
        assert_eq!(found.to_string(), denial);
        assert_eq!((found.verb, &*found.subject), (verb, subject));
    }
    let elsewhere: Identity = "spiffe://other.example/acme/cloud/operator"
        .parse()
        .unwrap();
    let policy = Policy::parse(PLANT).unwrap().for_identity(&elsewhere);
    assert!(
        !policy
            .decide(Verb::Subscribe, &topic("$SYS/x"))
            .is_allowed()
    );
}

#[test]
fn filters_are_allowed_whole_with_a_residual_or_denied() {
    let allowed = |path, subject, rule: &str, residual: &[&str]| {
        let residual: Vec<TopicFilter> = residual.iter().map(|text| filter(text)).collect();
        let expected = FilterDecision::Allowed {
            rule: rule.into(),
            residual: residual.into(),
        };
        assert_eq!(decide_filter(path, subject), expected, "{path} {subject}");
    };
    let own = "devices use their own topics";
    let all = "dashboards read everything";
    allowed(
        "acme/plant-1/press-7",
        "sites/plant-1/press-7/#",
        own,
        &["sites/+/+/secret/#"],
    );
    allowed(
        "acme/plant-1/press-7",
        "sites/plant-1/press-7/temp/#",
        own,
        &[],
    );
    allowed(
        "acme/plant-2/dashboard-1",
        "#",
        all,
        &["sites/+/+/secret/#", "+/secrets"],
    );
    allowed("acme/plant-2/dashboard-1", "+/+", all, &["+/secrets"]);
    allowed(
        "acme/plant-2/dashboard-1",
        "sites/+/+/+",
        all,
        &["sites/+/+/secret/#"],
    );
    allowed(
        "acme/cloud/operator",
        "$SYS/#",
        "operators read the broker",
        &[],
    );

    let denied = |path, subject: &str, rule: Option<&str>| {
        let denial = Denial {
            verb: Verb::Subscribe,
            subject: subject.into(),
            rule: rule.map(Into::into),
        };
        assert_eq!(
            decide_filter(path, subject),
            FilterDecision::Denied(denial),
            "{path} {subject}"
        );
    };
    denied("acme/plant-1/press-7", "sites/plant-1/+/temp", None);
    denied("acme/plant-1/press-7", "#", None);
    denied(
        "acme/plant-2/dashboard-1",
        "sites/a/b/secret/+",
        Some("secrets stay secret"),
    );
    denied("acme/plant-2/dashboard-1", "$SYS/#", None);
    denied("acme/cloud/operator", "#", None);
}

#[test]
fn a_subject_denied_twice_is_enforced_once() {
    let rule = |name, effect, subjects| {
        format!(
            "[[rule]]\nname = '{name}'\nidentities = ['*/*/*']\n{effect} = ['subscribe']\nsubjects = {subjects}\n"
        )
    };
    let policy = Policy::parse(
        &[
            rule("all", "allow", "['#']"),
            rule("x", "deny", "['a/+', 'b']"),
            rule("y", "deny", "['c', 'a/+']"),
        ]
        .concat(),
    );
    let decision = policy
        .unwrap()
        .for_identity(&identity("t/s/n"))
        .decide_filter(&filter("#"));
    let residual = ["a/+", "b", "c"].map(filter).into();
    assert_eq!(
        decision,
        FilterDecision::Allowed {
            rule: "all".into(),
            residual
        }
    );
}

#[test]
fn an_empty_policy_denies_everything() {
    let policies = [
        Policy::default(),
        Policy::parse("").unwrap(),
        Policy::parse("rule = []").unwrap(),
    ];
    for policy in policies {
        let policy = policy.for_identity(&identity("a/b/c"));
        for verb in Verb::ALL {
            let Decision::Denied(denial) = policy.decide(verb, &topic("x")) else {
                panic!("{verb} allowed");
            };
            assert_eq!(denial.rule, None);
        }
    }
    assert!(
        !IdentityPolicy::default()
            .decide_filter(&filter("x"))
            .is_allowed()
    );
}

#[test]
fn every_problem_of_a_file_is_reported_at_once() {
    let errors = Policy::parse(
        r##"
colour = "red"

[[rule]]
name = "one"
identities = ["acme/*", "acme//x", "acme/plant?/x", "acme/**/x", "http://a/b/c/d"]
allow = ["publish", "delete", 7]
subjects = ["a/#/b", "{user}/x", "{name", "a}", "${tenant}/x", "$share/g/x", ""]
subject = ["a"]

[[rule]]
name = "one"
identities = []
allow = ["publish"]
deny = []
subjects = "a"

[[rule]]
name = ""
identities = [["a/b/c"]]
subjects = ["a"]

[[rule]]
"##,
    )
    .unwrap_err();
    let found: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let expected = [
        r#"expected [[rule]] and nothing else, found the unknown key "colour"; correct or remove it"#,
        r#"rule 1 "one": expected the keys name, identities, allow or deny, and subjects, found the unknown key "subject"; correct or remove it"#,
        r#"rule 1 "one": in `identities`, "acme/*": expected tenant/site/name or spiffe://trust-domain/tenant/site/name; a `*` stands for characters within one segment, so write */*/* for everyone"#,
        r#"rule 1 "one": in `identities`, "acme//x": expected a site, found an empty segment; write `*` for any site"#,
        r#"rule 1 "one": in `identities`, "acme/plant?/x": expected letters, digits, `.`, `-`, `_` and the wildcard `*` in the site, found '?'"#,
        r#"rule 1 "one": in `identities`, "acme/**/x": expected `*` in the site, found `**`; no wildcard crosses a `/`"#,
        r#"rule 1 "one": in `identities`, "http://a/b/c/d": expected tenant/site/name or spiffe://trust-domain/tenant/site/name; a `*` stands for characters within one segment, so write */*/* for everyone"#,
        r#"rule 1 "one": in `allow`: expected one of publish, subscribe, call, serve, infer and work, found "delete""#,
        r#"rule 1 "one": expected `allow` to be a list of strings, found integer"#,
        r#"rule 1 "one": in `subjects`, "a/#/b": expected `#` only as the last level, found it as level 2 of 3"#,
        r#"rule 1 "one": in `subjects`, "{user}/x": expected {tenant}, {site} or {name}, found {user}"#,
        r#"rule 1 "one": in `subjects`, "{name": expected braces only around a placeholder, as in {name}, found one without the other"#,
        r#"rule 1 "one": in `subjects`, "a}": expected braces only around a placeholder, as in {name}, found one without the other"#,
        r#"rule 1 "one": in `subjects`, "${tenant}/x": expected no placeholder in a first level that starts with `$`; move it to a later level"#,
        r#"rule 1 "one": in `subjects`, "$share/g/x": expected a topic filter that does not start with the level `$share`, which is reserved for subscriptions of the form $share/<group>/<filter>"#,
        r#"rule 1 "one": in `subjects`, "": expected a topic filter of 1 to 65535 bytes, found an empty one"#,
        r#"rule 2 "one": expected at least one entry in `identities`, found none; add one or remove the rule"#,
        r#"rule 2 "one": expected either `allow` or `deny`, found both; split the rule in two"#,
        r#"rule 2 "one": expected at least one entry in `deny`, found none; add one or remove the rule"#,
        r#"rule 2 "one": expected `subjects` to be a list of strings, found string"#,
        r#"rule 2 "one": expected a `name` of its own, found that of rule 1; rename one of them"#,
        r#"rule 3 "": expected a `name` of 1 to 256 bytes, found 0"#,
        r#"rule 3 "": expected `identities` to be a list of strings, found array"#,
        r#"rule 3 "": expected either `allow` or `deny`, found neither; add allow = ["publish"]"#,
        r#"rule 4: expected the key `name`, found none; add name = "what the rule is for""#,
        r#"rule 4: expected the key `identities`, found none; add identities = ["tenant/site/*"]"#,
        r#"rule 4: expected either `allow` or `deny`, found neither; add allow = ["publish"]"#,
        r#"rule 4: expected the key `subjects`, found none; add subjects = ["sites/{site}/{name}/#"]"#,
    ];
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    assert!(
        errors
            .to_string()
            .starts_with("28 problems\n  expected [[rule]]")
    );
}

#[test]
fn files_of_another_shape_are_refused() {
    let problem = |text| {
        let errors = Policy::parse(text).unwrap_err();
        let [error] = errors.iter().collect::<Vec<_>>()[..] else {
            panic!("{errors}");
        };
        error.problem.clone()
    };
    assert!(matches!(problem("[[rule]"), PolicyProblem::Syntax(text) if text.contains("line 1")));
    assert!(matches!(
        problem("rule = 1\nrule = 2"),
        PolicyProblem::Syntax(_)
    ));
    assert!(matches!(
        problem("rule = 1"),
        PolicyProblem::WrongType {
            key: "rule",
            found: "integer",
            ..
        }
    ));
    assert!(matches!(
        problem("[rule]\nname = 'x'"),
        PolicyProblem::WrongType {
            key: "rule",
            found: "table",
            ..
        }
    ));
    assert!(matches!(
        problem("rule = [1]"),
        PolicyProblem::WrongType {
            key: "rule",
            found: "integer",
            ..
        }
    ));
    assert!(
        matches!(problem("[[rules]]\nname = 'x'"), PolicyProblem::UnknownKey { key, .. } if key == "rules")
    );
}

#[test]
fn a_file_that_cannot_be_read_or_used_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.toml");
    let missing = Policy::load(&path).unwrap_err();
    assert!(
        matches!(&missing, PolicyLoadError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    std::fs::write(&path, "colour = 1").unwrap();
    let invalid = Policy::load(&path).unwrap_err().to_string();
    assert!(
        invalid.contains("policy.toml is refused: expected [[rule]]"),
        "{invalid}"
    );
    std::fs::write(&path, PLANT).unwrap();
    assert!(Policy::load(&path).is_ok());
}

#[test]
fn verbs_are_written_in_one_way() {
    for verb in Verb::ALL {
        assert_eq!(verb.to_string().parse(), Ok(verb));
        assert_eq!(serde_json::to_string(&verb).unwrap(), format!("\"{verb}\""));
    }
    assert_eq!(
        "Publish".parse::<Verb>(),
        Err(VerbError {
            found: "Publish".into()
        })
    );
}

#[test]
fn an_explanation_goes_through_every_rule() {
    let policy = Policy::parse(PLANT).unwrap();
    let explain = |path, verb, subject| {
        policy
            .explain(&identity(path), verb, &filter(subject))
            .to_string()
    };
    assert_eq!(
        explain(
            "acme/plant-1/dashboard-1",
            Verb::Subscribe,
            "sites/plant-1/+/temp"
        ),
        r##"spiffe://plant.example/acme/plant-1/dashboard-1: subscribe on "sites/plant-1/+/temp" allowed by rule "dashboards read everything"
  rule 1 "devices use their own topics" (allow): matches a part of the filter by "sites/plant-1/dashboard-1/#"
  rule 2 "dashboards read everything" (allow): matches identity "acme/*/dashboard-*" and subject "#"
  rule 3 "secrets stay secret" (deny): is about other subjects: "sites/+/+/secret/#", "+/secrets"
  rule 4 "operators read the broker" (allow): does not name this identity
  rule 5 "presses can be driven" (allow): does not name this identity"##
    );
    let denied = explain("acme/plant-1/panel", Verb::Publish, "a/secrets");
    assert!(
        denied.contains(r#"panel: publish on "a/secrets" denied by rule "secrets stay secret""#),
        "{denied}"
    );
    assert!(
        denied.contains(r#"rule 5 "presses can be driven" (allow): is not about this verb"#),
        "{denied}"
    );
    let except = explain("acme/plant-1/dashboard-1", Verb::Subscribe, "+/+");
    assert!(
        except.contains(r#"allowed by rule "dashboards read everything", except "+/secrets""#),
        "{except}"
    );
    let nobody = Policy::default().explain(&identity("a/b/c"), Verb::Call, &filter("x"));
    assert!(
        nobody
            .to_string()
            .ends_with("denied: no rule allows it\n  the policy has no rules")
    );
}

#[test]
fn a_denying_rule_that_cannot_be_compiled_denies_everything() {
    let policy = Policy::parse(&format!(
        r##"
[[rule]]
name = "all"
identities = ["*/*/*"]
allow = ["publish"]
subjects = ["#"]
[[rule]]
name = "long"
identities = ["a/*/*"]
deny = ["publish"]
subjects = ["{}/{{name}}"]
"##,
        "x".repeat(65_500)
    ))
    .unwrap();
    let long = identity(&format!("a/b/{}", "n".repeat(100)));
    assert!(
        policy
            .for_identity(&identity("a/b/n"))
            .decide(Verb::Publish, &topic("x"))
            .is_allowed()
    );
    assert!(
        !policy
            .for_identity(&long)
            .decide(Verb::Publish, &topic("x"))
            .is_allowed()
    );
    let explanation = policy.explain(&long, Verb::Publish, &filter("x"));
    assert_eq!(explanation.rules[1].verdict, RuleVerdict::Unusable);
    assert!(!explanation.decision.is_allowed());
}

#[test]
fn identities_hold_nothing_that_a_subject_would_read() {
    for hostile in [
        "+", "#", "a/b", "*", "$SYS", "{name}", "a+", "\0", "", "..", ".",
    ] {
        assert!(
            Identity::new("plant.example", hostile, "s", "n").is_err(),
            "{hostile:?}"
        );
        assert!(
            Identity::new("plant.example", "t", hostile, "n").is_err(),
            "{hostile:?}"
        );
        assert!(
            Identity::new("plant.example", "t", "s", hostile).is_err(),
            "{hostile:?}"
        );
    }
}

/// A rule before it is written as TOML.
#[derive(Clone, Debug)]
struct Spec {
    effect: Effect,
    verbs: Vec<Verb>,
    identities: Vec<&'static str>,
    subjects: Vec<&'static str>,
}

const IDENTITIES: [&str; 7] = [
    "*/*/*",
    "a/*/*",
    "a/s1/press-*",
    "b/s2/*",
    "*/s1/*-7",
    "spiffe://plant.example/a/*/*",
    "spiffe://x*/*/*/*",
];
const SUBJECTS: [&str; 14] = [
    "#",
    "+",
    "+/#",
    "a/#",
    "a/+",
    "a/b",
    "a/+/b",
    "/#",
    "{tenant}/#",
    "{site}/{name}",
    "x-{name}/+",
    "$SYS/#",
    "$SYS/{tenant}",
    "+/{tenant}/#",
];
const LEVELS: [&str; 8] = ["", "a", "b", "s1", "press-7", "x-press-7", "$SYS", "c"];

fn any_spec() -> impl Strategy<Value = Spec> {
    (
        prop_oneof![Just(Effect::Allow), Just(Effect::Deny)],
        subsequence(Verb::ALL.to_vec(), 1..=6),
        subsequence(IDENTITIES.to_vec(), 1..=2),
        subsequence(SUBJECTS.to_vec(), 1..=3),
    )
        .prop_map(|(effect, verbs, identities, subjects)| Spec {
            effect,
            verbs,
            identities,
            subjects,
        })
}

fn any_specs() -> impl Strategy<Value = Vec<Spec>> {
    prop::collection::vec(any_spec(), 0..6)
}

fn any_identity() -> impl Strategy<Value = Identity> {
    prop_oneof![
        Just("a/s1/press-7"),
        Just("a/s2/press-8"),
        Just("b/s2/c"),
        Just("b/s1/a-7")
    ]
    .prop_map(identity)
}

fn any_verb() -> impl Strategy<Value = Verb> {
    prop::sample::select(Verb::ALL.to_vec())
}

fn any_topic() -> impl Strategy<Value = TopicName> {
    prop::collection::vec(prop::sample::select(LEVELS.to_vec()), 1..5)
        .prop_filter_map("not empty", |levels| {
            TopicName::parse(levels.join("/")).ok()
        })
}

fn any_filter() -> impl Strategy<Value = TopicFilter> {
    let level =
        prop_oneof![2 => prop::sample::select(LEVELS.to_vec()), 1 => Just("+"), 1 => Just("#")];
    prop::collection::vec(level, 1..5).prop_filter_map("a filter", |levels| {
        TopicFilter::parse(levels.join("/")).ok()
    })
}

/// The policy of these rules, named by their position.
fn policy(specs: &[Spec]) -> Policy {
    let rules = specs.iter().enumerate().map(|(index, spec)| {
        let verbs: Vec<&str> = spec.verbs.iter().map(|verb| verb.as_str()).collect();
        let Spec { effect, identities, subjects, .. } = spec;
        format!("[[rule]]\nname = '{index}'\nidentities = {identities:?}\n{effect} = {verbs:?}\nsubjects = {subjects:?}\n")
    });
    Policy::parse(&rules.collect::<String>()).unwrap()
}

/// A glob by its definition: `*` takes nothing, or one character and goes on.
fn naive_glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => {
            naive_glob(rest, text) || !text.is_empty() && naive_glob(pattern, &text[1..])
        }
        ([wanted, pattern @ ..], [found, text @ ..]) => {
            wanted == found && naive_glob(pattern, text)
        }
        _ => false,
    }
}

impl Spec {
    /// The subjects for this identity; none when the rule is not about it or the verb.
    fn subjects_for(&self, identity: &Identity, verb: Verb) -> Vec<TopicFilter> {
        let named = self.identities.iter().any(|pattern| {
            let whole = if pattern.starts_with("spiffe://") {
                (*pattern).to_owned()
            } else {
                format!("spiffe://*/{pattern}")
            };
            whole
                .split('/')
                .zip(identity.uri().split('/'))
                .all(|(p, i)| naive_glob(p.as_bytes(), i.as_bytes()))
        });
        let subjects = self.subjects.iter().map(|subject| {
            let subject = subject.replace("{tenant}", identity.tenant());
            let subject = subject.replace("{site}", identity.site());
            filter(&subject.replace("{name}", identity.name()))
        });
        if named && self.verbs.contains(&verb) {
            subjects.collect()
        } else {
            Vec::new()
        }
    }
}

/// The position of the first rule of this effect that takes in the topic.
fn first(
    specs: &[Spec],
    effect: Effect,
    identity: &Identity,
    verb: Verb,
    topic: &TopicName,
) -> Option<Arc<str>> {
    let position = specs.iter().position(|spec| {
        spec.effect == effect
            && spec
                .subjects_for(identity, verb)
                .iter()
                .any(|subject| subject.matches(topic))
    });
    position.map(|index| index.to_string().into())
}

proptest! {
    #[test]
    fn decisions_follow_the_rules_and_a_deny_wins(specs in any_specs(), identity in any_identity(), verb in any_verb(), topic in any_topic()) {
        let denied = first(&specs, Effect::Deny, &identity, verb, &topic);
        let allowed = first(&specs, Effect::Allow, &identity, verb, &topic);
        let expected = match (denied, allowed) {
            (None, Some(rule)) => Decision::Allowed { rule },
            (rule, _) => Decision::Denied(Denial { verb, subject: topic.clone().into(), rule }),
        };
        prop_assert_eq!(policy(&specs).for_identity(&identity).decide(verb, &topic), expected);
    }

    #[test]
    fn a_subscription_delivers_exactly_the_topics_that_are_allowed(
        specs in any_specs(), identity in any_identity(), filter in any_filter(), topics in prop::collection::vec(any_topic(), 30)
    ) {
        let policy = policy(&specs).for_identity(&identity);
        if let FilterDecision::Allowed { residual, .. } = policy.decide_filter(&filter) {
            for topic in topics.iter().filter(|topic| filter.matches(topic)) {
                let delivered = !residual.iter().any(|denied| denied.matches(topic));
                prop_assert_eq!(delivered, policy.decide(Verb::Subscribe, topic).is_allowed(), "{}", topic);
            }
        }
    }

    #[test]
    fn the_residual_is_every_denied_subject_that_overlaps(specs in any_specs(), identity in any_identity(), filter in any_filter()) {
        let mut overlapping: Vec<TopicFilter> = Vec::new();
        let mut covered = false;
        for spec in specs.iter().filter(|spec| spec.effect == Effect::Deny) {
            for subject in spec.subjects_for(&identity, Verb::Subscribe) {
                covered |= subject.covers(&filter);
                if subject.overlaps(&filter) && !overlapping.contains(&subject) {
                    overlapping.push(subject);
                }
            }
        }
        match policy(&specs).for_identity(&identity).decide_filter(&filter) {
            FilterDecision::Allowed { residual, .. } => {
                prop_assert!(!covered);
                prop_assert_eq!(&residual[..], &overlapping[..]);
            }
            FilterDecision::Denied(denial) => prop_assert_eq!(denial.rule.is_some(), covered),
        }
    }

    #[test]
    fn a_literal_filter_is_decided_like_its_topic(specs in any_specs(), identity in any_identity(), topic in any_topic()) {
        let policy = policy(&specs).for_identity(&identity);
        let literal = match policy.decide_filter(&TopicFilter::from(topic.clone())) {
            FilterDecision::Allowed { rule, residual } => {
                prop_assert!(residual.is_empty());
                Decision::Allowed { rule }
            }
            FilterDecision::Denied(denial) => Decision::Denied(denial),
        };
        prop_assert_eq!(literal, policy.decide(Verb::Subscribe, &topic));
    }

    #[test]
    fn another_denying_rule_never_widens(
        specs in any_specs(), added in any_spec(), at in any::<Index>(), identity in any_identity(), verb in any_verb(), topic in any_topic(), filter in any_filter()
    ) {
        let before = policy(&specs).for_identity(&identity);
        let mut specs = specs;
        specs.insert(at.index(specs.len() + 1), Spec { effect: Effect::Deny, ..added });
        let after = policy(&specs).for_identity(&identity);
        prop_assert!(!after.decide(verb, &topic).is_allowed() || before.decide(verb, &topic).is_allowed());
        match (before.decide_filter(&filter), after.decide_filter(&filter)) {
            (FilterDecision::Allowed { residual: fewer, .. }, FilterDecision::Allowed { residual: more, .. }) => {
                prop_assert!(fewer.iter().all(|filter| more.contains(filter)));
            }
            (FilterDecision::Denied(_), after) => prop_assert!(!after.is_allowed()),
            (FilterDecision::Allowed { .. }, FilterDecision::Denied(_)) => {}
        }
    }

    #[test]
    fn an_explanation_agrees_with_the_decision(specs in any_specs(), identity in any_identity(), topic in any_topic(), filter in any_filter()) {
        let policy = policy(&specs);
        let compiled = policy.for_identity(&identity);
        let explanation = policy.explain(&identity, Verb::Subscribe, &filter);
        prop_assert_eq!(&explanation.decision, &compiled.decide_filter(&filter));
        prop_assert_eq!(explanation.rules.len(), specs.len());
        let (effect, decisive) = match &explanation.decision {
            FilterDecision::Allowed { rule, .. } => (Effect::Allow, Some(rule.clone())),
            FilterDecision::Denied(denial) => (Effect::Deny, denial.rule.clone()),
        };
        let matching = explanation.rules.iter().find(|rule| {
            rule.effect == effect && matches!(rule.verdict, RuleVerdict::Matches { .. })
        });
        prop_assert_eq!(matching.map(|rule| rule.name.clone()), decisive);
        let literal = policy.explain(&identity, Verb::Publish, &topic.clone().into());
        prop_assert_eq!(literal.decision.is_allowed(), compiled.decide(Verb::Publish, &topic).is_allowed());
    }

    #[test]
    fn placeholders_never_widen_a_subject(tenant in "[A-Za-z0-9_-]{1,9}", site in "[A-Za-z0-9_-]{1,9}", name in "[A-Za-z0-9_-]{1,9}", subject in prop::sample::select(SUBJECTS.to_vec())) {
        let identity = Identity::new("plant.example", &tenant, &site, &name).unwrap();
        let own = SubjectTemplate::parse(subject).unwrap().for_identity(&identity).unwrap();
        let wildcards = |text: &str| text.matches(['+', '#', '/', '$']).count();
        prop_assert_eq!(wildcards(own.as_str()), wildcards(subject));
        let widest: Vec<&str> = subject.split('/').map(|level| if level.contains('{') { "+" } else { level }).collect();
        prop_assert!(filter(&widest.join("/")).covers(&own));
    }

    #[test]
    fn globs_agree_with_their_definition(pattern in "[ab*]{1,6}", name in "[ab]{1,7}") {
        prop_assume!(!pattern.contains("**"));
        let parsed = IdentityPattern::parse(&format!("t/s/{pattern}")).unwrap();
        prop_assert_eq!(parsed.matches(&identity(&format!("t/s/{name}"))), naive_glob(pattern.as_bytes(), name.as_bytes()));
    }

    #[test]
    fn hostile_files_never_panic(pieces in prop::collection::vec(prop::sample::select(vec![
        "[[rule]]\n", "name", "identities", "allow", "deny", "subjects", " = ", "[", "]", "{", "}", "\"", "'", "\n", ",", "a/b/c", "{name}", "{", "#", "$share/", "publish", "**", "\0", "é", "1", "rule", ".", "spiffe://"
    ]), 0..40), noise in any::<String>()) {
        for text in [pieces.concat(), noise.clone(), format!("[[rule]]\n{}", pieces.concat())] {
            if let Err(errors) = Policy::parse(&text) {
                prop_assert!(errors.iter().count() > 0 && !errors.to_string().is_empty());
            }
        }
        let text = pieces.concat();
        for entry in [text.as_str(), &noise] {
            if let Err(error) = SubjectTemplate::parse(entry) {
                prop_assert!(!error.to_string().is_empty());
            }
            if let Err(error) = IdentityPattern::parse(entry) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
        let quoted = toml::Value::String(noise).to_string();
        let file = format!("[[rule]]\nname = {quoted}\nidentities = [{quoted}]\nallow = [{quoted}]\nsubjects = [{quoted}]");
        prop_assert!(Policy::parse(&file).is_err());
    }
}
