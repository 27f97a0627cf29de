use std::collections::BTreeSet;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use selvedge_certs::Identity;
use selvedge_proto::topic::SubscribeTarget;

use super::*;
use crate::queue::Overflow;
use crate::session::{Session, SessionKey};

fn session(id: u64) -> Arc<Session> {
    let identity =
        Identity::new("example.org", "acme", "plant-1", &format!("device-{id}")).unwrap();
    let name = "s".into();
    Session::new(id, SessionKey { identity, name }, 1 << 20, None)
}

fn subscriber(session: &Session, id: u32, target: &str, max_qos: Qos) -> Arc<Subscriber> {
    let target = SubscribeTarget::parse(target).unwrap();
    let own_lane = target.share.is_some();
    Arc::new(Subscriber {
        id,
        session_id: session.id,
        max_qos,
        no_local: false,
        retain_as_published: false,
        identifier: None,
        residual: Arc::default(),
        own_lane,
        overflow: Overflow::Default,
        queues: session.queues_for(id, own_lane, Overflow::Default),
        session: Weak::new(),
        target,
    })
}

fn topic() -> impl Strategy<Value = TopicName> {
    proptest::collection::vec(prop::sample::select(vec!["a", "b", "", "$x"]), 1..5)
        .prop_filter_map("a topic is not empty", |levels| {
            TopicName::parse(levels.join("/")).ok()
        })
}

fn filter() -> impl Strategy<Value = String> {
    let level = prop::sample::select(vec!["a", "b", "", "$x", "+", "+"]);
    (proptest::collection::vec(level, 0..4), any::<bool>()).prop_filter_map(
        "a filter",
        |(levels, rest)| {
            let mut levels = levels;
            if rest {
                levels.push("#");
            }
            let filter = levels.join("/");
            SubscribeTarget::parse(&filter).ok().map(|_| filter)
        },
    )
}

proptest! {
    #[test]
    fn a_route_is_what_the_filters_match_one_by_one(
        subscriptions in proptest::collection::vec((0u64..4, filter(), any::<bool>(), any::<bool>()), 0..30),
        topics in proptest::collection::vec(topic(), 1..10),
    ) {
        let router = Router::default();
        let sessions: Vec<_> = (0..4).map(session).collect();
        let mut kept = Vec::new();
        for (id, (owner, filter, reliable, removed)) in subscriptions.into_iter().enumerate() {
            let qos = if reliable { Qos::AtLeastOnce } else { Qos::AtMostOnce };
            let subscriber = subscriber(&sessions[owner as usize], id as u32 + 1, &filter, qos);
            router.insert(Arc::clone(&subscriber));
            kept.push((subscriber, removed));
        }
        kept.retain(|(subscriber, removed)| {
            assert!(!removed || router.remove(subscriber));
            !removed
        });
        for topic in topics {
            let route = router.route(&topic, u64::MAX);
            let found: BTreeSet<(u64, Qos)> =
                route.targets.iter().map(|target| (target.subscriber.session_id, target.max_qos)).collect();
            prop_assert_eq!(found.len(), route.targets.len(), "one copy for each session");
            let mut wanted: std::collections::BTreeMap<u64, Qos> = std::collections::BTreeMap::new();
            for (subscriber, _) in kept.iter().filter(|(s, _)| s.target.filter.matches(&topic)) {
                let qos = wanted.entry(subscriber.session_id).or_insert(subscriber.max_qos);
                *qos = (*qos).max(subscriber.max_qos);
            }
            prop_assert_eq!(found, wanted.into_iter().collect::<BTreeSet<_>>());
        }
        for (subscriber, _) in &kept {
            prop_assert!(router.remove(subscriber));
            prop_assert!(!router.remove(subscriber));
        }
        prop_assert!(router.root.read().is_empty(), "nothing is left of what was removed");
    }
}

#[test]
fn a_share_group_takes_turns_and_no_local_leaves_out_the_publisher() {
    let router = Router::default();
    let sessions: Vec<_> = (0..2).map(session).collect();
    for (id, session) in sessions.iter().enumerate() {
        session.attach(
            crate::session::Kick::default(),
            std::time::Duration::ZERO,
            None,
        );
        router.insert(subscriber(
            session,
            id as u32 + 1,
            "$share/g/a/+",
            Qos::AtMostOnce,
        ));
    }
    let topic = TopicName::parse("a/b").unwrap();
    let route = router.route(&topic, u64::MAX);
    assert!(route.targets.is_empty());
    let [group] = &route.groups[..] else {
        panic!("expected one group, found {}", route.groups.len());
    };
    let chosen: Vec<u64> = (0..4)
        .map(|_| group.choose(&topic, u64::MAX).unwrap().session_id)
        .collect();
    assert!(
        chosen == [0, 1, 0, 1] || chosen == [1, 0, 1, 0],
        "{chosen:?}"
    );

    let own = subscriber(&sessions[0], 9, "a/b", Qos::AtMostOnce);
    let own = Arc::new(Subscriber {
        no_local: true,
        ..Arc::into_inner(own).unwrap()
    });
    router.insert(own);
    assert_eq!(router.route(&topic, 0).targets.len(), 0);
    assert_eq!(router.route(&topic, 1).targets.len(), 1);
}

#[test]
fn a_subscription_that_is_replaced_is_never_missing_and_never_there_twice() {
    let router = Router::default();
    let session = session(1);
    let topic = TopicName::parse("a/b").unwrap();
    let mut held = subscriber(&session, 1, "a/+", Qos::AtMostOnce);
    router.insert(Arc::clone(&held));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(router.route(&topic, 0).targets.len(), 1);
            }
        });
        for _ in 0..2000 {
            let next = subscriber(&session, 1, "a/+", Qos::AtLeastOnce);
            router.replace(&held, Arc::clone(&next));
            held = next;
        }
        done.store(true, Ordering::Relaxed);
    });
}
