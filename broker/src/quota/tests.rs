#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::rate::{FASTEST, Rate, step};
use super::*;
use crate::config::LimitOverride;
use crate::policy::IdentityPattern;

fn identity(name: &str) -> Identity {
    Identity::new("example.org", "acme", "plant-1", name).unwrap()
}

fn usages(tenant: TenantLimits, identity: IdentityLimits) -> (Usages, Metrics) {
    let metrics = Metrics::default();
    let limits = Limits {
        tenant,
        identity,
        ..Limits::default()
    };
    (Usages::new("acme".into(), &limits, &metrics), metrics)
}

fn exhausted(message: &str) -> Status {
    Status::new(Code::ResourceExhausted, message)
}

#[test]
fn without_limits_nothing_is_refused_or_counted_in_bytes() {
    let usage = Arc::<Usage>::default();
    let holds: Vec<_> = (0..1000).map(|_| usage.connect().unwrap()).collect();
    for _ in 0..1000 {
        usage.subscribe().unwrap();
        usage.admit().unwrap();
        usage.take_bytes(usize::MAX).unwrap();
    }
    assert!(usage.account.bytes.is_unused());
    drop(holds);
    assert!(usage.account.connections.is_unused());
}

#[test]
fn a_connection_counts_until_it_is_dropped_released_or_handed_on() {
    let limits = IdentityLimits {
        connections: Some(1),
        ..IdentityLimits::default()
    };
    let (usages, metrics) = usages(TenantLimits::default(), limits);
    let press = usages.of(&identity("press-7"));
    let first = press.connect().unwrap();
    let refusal =
        "identity spiffe://example.org/acme/plant-1/press-7 has as many connections as it may: 1";
    assert_eq!(press.connect().unwrap_err(), exhausted(refusal));
    assert_eq!(metrics.limit_reached("identity.connections").get(), 1);
    // Another identity of the tenant is none of its business.
    drop(usages.of(&identity("press-8")).connect().unwrap());

    let second = first.hand_on().unwrap();
    assert!(first.hand_on().is_none());
    drop(first);
    press.connect().unwrap_err();
    second.release();
    let third = press.connect().unwrap();
    drop(second);
    press.connect().unwrap_err();
    drop(third);
    press.connect().unwrap();
}

#[test]
fn what_the_tenant_does_not_have_is_given_back_by_the_identity() {
    let tenant = TenantLimits {
        connections: Some(1),
        subscriptions: Some(1),
        queue_bytes: Some(100),
        publish_rate: Some(1),
    };
    let own = IdentityLimits {
        connections: Some(2),
        subscriptions: Some(2),
        queue_bytes: Some(90),
        publish_rate: Some(1),
        ..IdentityLimits::default()
    };
    let (usages, metrics) = usages(tenant, own);
    let (one, two) = (usages.of(&identity("one")), usages.of(&identity("two")));
    let hold = one.connect().unwrap();
    assert_eq!(
        two.connect().unwrap_err(),
        exhausted("tenant acme has as many connections as it may: 1")
    );
    one.subscribe().unwrap();
    assert_eq!(
        two.subscribe().unwrap_err(),
        exhausted("tenant acme has as many subscriptions as it may: 1")
    );
    one.take_bytes(80).unwrap();
    let reached = two.take_bytes(80).unwrap_err();
    assert_eq!((reached.whose, reached.most), (Whose::Tenant, 100));
    let reached = one.take_bytes(20).unwrap_err();
    assert_eq!((reached.whose, reached.most), (Whose::Identity, 90));
    let now = usages.beginning;
    one.admit_at(now).unwrap();
    let reached = two.admit_at(now).unwrap_err();
    assert_eq!(reached.whose, Whose::Tenant);
    assert_eq!(reached.wait, Some(Duration::from_secs(1)));
    // What the tenant refused is not held against the identity: it is as if it had never asked.
    assert!(two.is_idle(now));
    assert_eq!(metrics.limit_reached("tenant.connections").get(), 1);

    drop(hold);
    one.unsubscribe(1);
    one.give_bytes(80);
    two.connect().unwrap();
    two.subscribe().unwrap();
    two.take_bytes(90).unwrap();
    assert!(!two.has_room() && one.has_room());
    one.take_bytes(10).unwrap();
    assert!(!one.has_room());
}

#[test]
fn what_is_refused_to_an_identity_costs_its_tenant_nothing() {
    let tenant = TenantLimits {
        publish_rate: Some(3),
        ..TenantLimits::default()
    };
    let own = IdentityLimits {
        publish_rate: Some(2),
        ..IdentityLimits::default()
    };
    let (usages, _metrics) = usages(tenant, own);
    let (loud, quiet) = (usages.of(&identity("loud")), usages.of(&identity("quiet")));
    let now = usages.beginning;
    loud.admit_at(now).unwrap();
    loud.admit_at(now).unwrap();
    for _ in 0..100 {
        let reached = loud.admit_at(now).unwrap_err();
        assert_eq!(reached.whose, Whose::Identity);
    }
    quiet.admit_at(now).unwrap();
    assert_eq!(quiet.admit_at(now).unwrap_err().whose, Whose::Tenant);
}

#[test]
fn a_refusal_names_the_rate_and_the_time_to_wait() {
    let own = IdentityLimits {
        publish_rate: Some(100),
        ..IdentityLimits::default()
    };
    let (usages, metrics) = usages(TenantLimits::default(), own);
    let press = usages.of(&identity("press-7"));
    let now = usages.beginning;
    for _ in 0..100 {
        press.admit_at(now).unwrap();
    }
    let reached = press.admit_at(now).unwrap_err();
    let sentence =
        "identity spiffe://example.org/acme/plant-1/press-7 may publish 100 messages a second";
    let expected = exhausted(sentence).retry_after(Duration::from_millis(10));
    assert_eq!(press.refuse(reached), expected);
    assert_eq!(metrics.limit_reached("identity.publish_rate").get(), 1);
    press.admit_at(now + Duration::from_millis(9)).unwrap_err();
    press.admit_at(now + Duration::from_millis(10)).unwrap();
}

#[test]
fn an_identity_is_forgotten_when_nothing_is_left_and_its_rate_has_rested() {
    let own = IdentityLimits {
        publish_rate: Some(1),
        ..IdentityLimits::default()
    };
    let (usages, _metrics) = usages(TenantLimits::default(), own);
    let press = usages.of(&identity("press-7"));
    let now = usages.beginning;
    press.admit_at(now).unwrap();
    usages.sweep(now + Duration::from_secs(5));
    assert!(Arc::ptr_eq(&press, &usages.of(&identity("press-7"))));
    drop(press);
    // Coming back does not help.
    usages.sweep(now);
    usages.of(&identity("press-7")).admit_at(now).unwrap_err();
    for number in 0..1000 {
        usages.of(&identity(&format!("passer-by-{number}")));
    }
    usages.sweep(now + Duration::from_secs(1));
    assert!(usages.held.is_empty());
}

#[test]
fn the_first_override_that_names_an_identity_decides_and_leaves_the_rest_as_it_is() {
    let special = |pattern: &str, publish_rate| LimitOverride {
        identities: vec![IdentityPattern::parse(pattern).unwrap()],
        limits: IdentityLimits {
            publish_rate: Some(publish_rate),
            ..IdentityLimits::default()
        },
    };
    let limits = Limits {
        identity: IdentityLimits {
            connections: Some(7),
            publish_rate: Some(1),
            ..IdentityLimits::default()
        },
        overrides: vec![
            special("spiffe://*/acme/*/press-*", 100),
            special("acme/*/*", 10),
        ],
        ..Limits::default()
    };
    let of = |tenant: &str, name: &str| {
        let identity = Identity::new("example.org", tenant, "plant-1", name).unwrap();
        let limits = limits.of_identity(&identity);
        (limits.publish_rate, limits.connections)
    };
    assert_eq!(of("acme", "press-7"), (Some(100), Some(7)));
    assert_eq!(of("acme", "panel-1"), (Some(10), Some(7)));
    assert_eq!(of("other", "press-7"), (Some(1), Some(7)));
}

/// Threads that take and give at random never hold more than the limits together, and leave nothing
/// behind.
#[test]
fn counts_are_exact_whoever_counts_at_once() {
    const THREADS: usize = 8;
    let tenant = TenantLimits {
        connections: Some(3),
        queue_bytes: Some(1000),
        ..TenantLimits::default()
    };
    let own = IdentityLimits {
        connections: Some(2),
        queue_bytes: Some(600),
        ..IdentityLimits::default()
    };
    let (usages, _metrics) = usages(tenant, own);
    let both = [usages.of(&identity("one")), usages.of(&identity("two"))];
    // What the threads say that they hold, counted after a take and before a give, is never more than
    // what is taken.
    let held: [[AtomicUsize; 2]; 3] = Default::default();
    let most = [[600, 2], [600, 2], [1000, 3]];
    let (start, over) = (Barrier::new(THREADS), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (usage, held, start, over) = (&both[thread % 2], &held, &start, &over);
            let count = move |what: usize, more: isize| {
                for whose in [thread % 2, 2] {
                    held[whose][what].fetch_add(more as usize, Ordering::SeqCst);
                }
            };
            scope.spawn(move || {
                start.wait();
                let mut connections = VecDeque::new();
                let mut taken = VecDeque::new();
                for round in 0..20_000 {
                    let bytes = 1 + (round * 31 + thread * 17) % 400;
                    if usage.take_bytes(bytes).is_ok() {
                        count(0, bytes as isize);
                        taken.push_back(bytes);
                    }
                    if let Ok(hold) = usage.connect() {
                        count(1, 1);
                        connections.push_back(hold);
                    }
                    for (held, most) in held.iter().flatten().zip(most.iter().flatten()) {
                        if held.load(Ordering::SeqCst) > *most {
                            over.store(true, Ordering::SeqCst);
                        }
                    }
                    if round % 3 == 0
                        && let Some(bytes) = taken.pop_front()
                    {
                        count(0, -(bytes as isize));
                        usage.give_bytes(bytes);
                    }
                    if round % 5 == 0
                        && let Some(hold) = connections.pop_front()
                    {
                        count(1, -1);
                        // A taken-over connection gives its place away and ends later.
                        drop(hold.hand_on());
                    }
                }
                for bytes in taken {
                    count(0, -(bytes as isize));
                    usage.give_bytes(bytes);
                }
                for hold in connections {
                    count(1, -1);
                    hold.release();
                }
            });
        }
    });
    assert!(!over.into_inner(), "more was held than may be");
    let tenant = &usages.tenant.account;
    for account in both.iter().map(|usage| &usage.account).chain([tenant]) {
        assert!(account.bytes.is_unused() && account.connections.is_unused());
    }
}

/// As many threads as may be never get more out of a rate than one would.
#[test]
fn a_rate_admits_no_more_when_many_ask_at_once() {
    let beginning = clock::now();
    let rate = Rate::new(1000, beginning);
    let admitted = AtomicUsize::new(0);
    for (after, expected) in [(0, 1000), (1, 1), (500, 499), (10_000, 1000)] {
        admitted.store(0, Ordering::SeqCst);
        let now = beginning + Duration::from_millis(after);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        if rate.admit(now).is_ok() {
                            admitted.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert_eq!(
            admitted.load(Ordering::SeqCst),
            expected,
            "after {after} ms"
        );
    }
}

/// Takes back at random what was admitted, as a tenant's refusal does, on many threads: what stays
/// admitted is never more than the rate allows.
#[test]
fn taking_back_never_makes_room_for_more_than_the_rate() {
    let beginning = clock::now();
    let rate = Rate::new(500, beginning);
    let kept = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let (rate, kept) = (&rate, &kept);
            scope.spawn(move || {
                for round in 0..5000 {
                    match rate.admit(beginning) {
                        Ok(admitted) if (round + thread) % 2 == 0 => rate.take_back(admitted),
                        Ok(_) => {
                            kept.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(_) => {}
                    }
                }
            });
        }
    });
    assert!(kept.into_inner() <= 500);
}

proptest! {
    /// In every window, no more is admitted than the burst and what the rate allows in its time; and
    /// after the time that a refusal names, one more is.
    #[test]
    fn no_window_has_more_than_burst_and_rate(
        per_second in 1_usize..=2000,
        gaps in prop::collection::vec(prop_oneof![
            4 => Just(0_u64),
            4 => 0_u64..5_000_000,
            1 => 0_u64..3_000_000_000,
        ], 1..400),
    ) {
        let beginning = Instant::now();
        let rate = Rate::new(per_second, beginning);
        let mut now = beginning;
        let mut admitted: Vec<Instant> = Vec::new();
        for gap in gaps {
            now += Duration::from_nanos(gap);
            match rate.admit(now) {
                Ok(_) => admitted.push(now),
                Err(wait) => {
                    prop_assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1));
                    let later = now + wait;
                    prop_assert!(rate.admit(later).is_ok(), "refused after the wait");
                    admitted.push(later);
                    now = later;
                }
            }
        }
        for (first, start) in admitted.iter().enumerate() {
            for (last, end) in admitted.iter().enumerate().skip(first) {
                let window = end.duration_since(*start).as_nanos();
                let most = per_second as u128 + window * per_second as u128 / 1_000_000_000;
                prop_assert!((last - first + 1) as u128 <= most);
            }
        }
    }

    /// Whatever the rate and however long the pause, a whole burst passes and no message more.
    #[test]
    fn after_a_pause_exactly_one_burst_passes(per_second in 1_usize..=5000, pause in 0_u64..1 << 50) {
        let beginning = Instant::now();
        let rate = Rate::new(per_second, beginning);
        let now = beginning + Duration::from_nanos(pause);
        for _ in 0..per_second {
            prop_assert!(rate.admit(now).is_ok());
        }
        prop_assert!(rate.admit(now).is_err());
    }

    /// A step never goes back, and never further ahead of now than the burst.
    #[test]
    fn a_step_stays_within_the_burst(
        per_second in 1..=FASTEST as u64,
        paid in 0..u64::MAX / 4,
        now in 0..u64::MAX / 4,
    ) {
        let interval = 1_000_000_000_u64.div_ceil(per_second);
        let burst = interval * per_second;
        match step(paid, now, interval, burst) {
            Ok(after) => {
                prop_assert_eq!(after, paid.max(now) + interval);
                prop_assert!(after - now <= burst);
            }
            Err(wait) => prop_assert_eq!(wait, paid + interval - now - burst),
        }
    }
}
