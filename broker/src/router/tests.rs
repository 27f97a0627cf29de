use std::collections::BTreeSet;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use selvedge_certs::Identity;
use selvedge_proto::topic::SubscribeTarget;

use super::*;
use crate::batch::{Batch, Flow};
use crate::losses::Losses;
use crate::queue::Overflow;
use crate::session::{Kick, Session, SessionKey, SessionOptions};

fn session(id: u64) -> Arc<Session> {
    let identity =
        Identity::new("example.org", "acme", "plant-1", &format!("device-{id}")).unwrap();
    let name = "s".into();
    Session::new(SessionOptions {
        id,
        key: SessionKey { identity, name },
        queue_limit: 1 << 20,
        losses: Losses::new(Arc::default(), Arc::default()),
        usage: Arc::default(),
        store: None,
    })
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
        queues: session.queues_for(id, own_lane, Overflow::Default, false),
        datagrams: false,
        session: Weak::new(),
        group: std::sync::OnceLock::new(),
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

fn chosen(group: &Group, topic: &TopicName, qos: Qos) -> u64 {
    match group.choose(topic, u64::MAX, Class::Normal, qos) {
        Choice::Member(member) => member.session_id,
        other => panic!("expected a member, found {other:?}"),
    }
}

fn message(qos: Qos) -> Arc<Batch> {
    let publisher = Identity::new("example.org", "acme", "plant-1", "publisher").unwrap();
    let flow = Flow::new(1, TopicName::parse("a").unwrap(), publisher, 99);
    let mut frames = bytes::BytesMut::new();
    selvedge_proto::lane::put_message(
        &mut frames,
        selvedge_proto::lane::Flags::new(qos),
        1,
        None,
        b"x",
    );
    Arc::new(Batch {
        flow: Arc::new(flow),
        class: Class::Normal,
        qos,
        retain: false,
        retain_as_published: false,
        count: 1,
        frames: frames.freeze(),
        payload: bytes::Bytes::new(),
        expires: None,
    })
}

#[test]
fn a_share_group_never_assigns_to_an_offline_member_and_loses_nothing_by_it() {
    let router = Router::default();
    let sessions: Vec<_> = (0..2).map(session).collect();
    let members: Vec<_> = (0..2)
        .map(|id| subscriber(&sessions[id], 1, "$share/g/a", Qos::AtLeastOnce))
        .collect();
    for member in &members {
        router.insert(Arc::clone(member));
    }
    let topic = TopicName::parse("a").unwrap();
    let group = Arc::clone(&router.route(&topic, 99).groups[0]);
    let queue = |member: usize| &members[member].queues[Class::Normal.index()];
    let take = |member: usize, epoch| queue(member).take(epoch, usize::MAX, 0, Instant::now());
    let choose = |qos| group.choose(&topic, 99, Class::Normal, qos);

    assert!(
        matches!(choose(Qos::AtLeastOnce), Choice::Nobody),
        "nobody keeps anything"
    );
    queue(0).set_durable(true);
    assert!(
        matches!(choose(Qos::AtMostOnce), Choice::Nobody),
        "QoS 0 does not wait"
    );
    let Choice::Waits(keeper) = choose(Qos::AtLeastOnce) else {
        panic!("it should wait with the member that is kept");
    };
    assert_eq!(keeper.session_id, 0);
    queue(0).push(&message(Qos::AtLeastOnce));
    group.settle();
    assert!(queue(0).bytes() > 0, "nobody is there yet");

    // The other one connects: what waits is its.
    let (epoch, ..) = sessions[1].attach(Kick::default(), Weak::new(), Duration::ZERO, None);
    queue(1).online(epoch);
    group.hand_on();
    assert_eq!(queue(0).bytes(), 0);
    assert_eq!(take(1, epoch).entries.len(), 1);

    // It goes without having acknowledged it, and comes back as the only member with a connection.
    queue(1).set_durable(true);
    queue(1).offline();
    group.settle();
    assert!(queue(1).bytes() > 0, "nobody else is there");
    queue(0).online(7);
    group.hand_on();
    let taken = take(0, 7);
    assert_eq!(taken.entries.len(), 1);
    assert!(taken.entries[0].duplicate, "it may have been delivered");
    assert_eq!(chosen(&group, &topic, Qos::AtLeastOnce), 0);
    assert_eq!(chosen(&group, &topic, Qos::AtMostOnce), 0);

    // A member that ends leaves what it has to the others.
    queue(1).online(8);
    group.take_over(&members[0]);
    assert_eq!(take(1, 8).entries.len(), 1);
}

#[test]
fn what_is_put_to_wait_while_a_member_comes_is_that_members() {
    let router = Router::default();
    let sessions: Vec<_> = (0..2).map(session).collect();
    let members: Vec<_> = (0..2)
        .map(|id| subscriber(&sessions[id], 1, "$share/g/a", Qos::AtLeastOnce))
        .collect();
    for member in &members {
        router.insert(Arc::clone(member));
    }
    let topic = TopicName::parse("a").unwrap();
    let group = Arc::clone(&router.route(&topic, 99).groups[0]);
    let queue = |member: usize| &members[member].queues[Class::Normal.index()];
    queue(0).set_durable(true);
    let choice = group.choose(&topic, 99, Class::Normal, Qos::AtLeastOnce);
    assert!(matches!(choice, Choice::Waits(_)));
    // The other one comes after the choice and before the message is where it waits.
    queue(1).online(1);
    group.hand_on();
    queue(0).push(&message(Qos::AtLeastOnce));
    group.settle();
    assert_eq!(queue(0).bytes(), 0);
    assert!(queue(1).bytes() > 0);
}

#[test]
fn a_share_group_takes_turns_and_no_local_leaves_out_the_publisher() {
    let router = Router::default();
    let sessions: Vec<_> = (0..2).map(session).collect();
    for (id, session) in sessions.iter().enumerate() {
        session.attach(Kick::default(), Weak::new(), Duration::ZERO, None);
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
    let turns: Vec<u64> = (0..4)
        .map(|_| chosen(group, &topic, Qos::AtMostOnce))
        .collect();
    assert!(turns == [0, 1, 0, 1] || turns == [1, 0, 1, 0], "{turns:?}");

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
