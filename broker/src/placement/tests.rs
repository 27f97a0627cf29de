use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn worker(tier: Tier, site: &'static str) -> Candidate<'static> {
    Candidate {
        site,
        fingerprint: 0,
        version: "1",
        tier,
        slots: 2,
        outstanding: 0,
        service_time: MS,
        rtt: Duration::ZERO,
        transfer: Duration::ZERO,
        standing: Standing::Well,
        loaded: true,
    }
}

fn request() -> Request<'static> {
    Request {
        site: "plant-1",
        version: "",
        residency: Residency::Tenant,
        preference: Preference::Fastest,
        tier: None,
        affinity: None,
        payload_bytes: 0,
        deadline: Duration::from_secs(1),
    }
}

fn first(_: usize) -> usize {
    0
}

#[test]
fn each_refusal_says_what_is_missing() {
    let cloud = worker(Tier::Cloud, "cloud-1");
    assert_eq!(place(&request(), &[], first), Err(Refusal::NotFound));
    let private = Request {
        residency: Residency::Site,
        ..request()
    };
    assert_eq!(
        place(&private, std::slice::from_ref(&cloud), first),
        Err(Refusal::Residency)
    );
    let full = Candidate {
        outstanding: 2,
        service_time: MS * 10,
        ..cloud.clone()
    };
    assert_eq!(
        place(&request(), &[full], first),
        Err(Refusal::Busy {
            retry_after: MS * 5
        })
    );
    let hurried = Request {
        deadline: MS * 3,
        ..request()
    };
    let slow = Candidate {
        service_time: MS * 10,
        rtt: MS,
        ..cloud
    };
    assert_eq!(
        place(&hurried, &[slow], first),
        Err(Refusal::TooLate { estimate: MS * 11 })
    );
}

#[test]
fn a_preference_yields_when_its_tier_is_full() {
    let edge = Candidate {
        outstanding: 2,
        ..worker(Tier::Edge, "plant-1")
    };
    let both = [edge, worker(Tier::Cloud, "cloud-1")];
    let choice = place(
        &Request {
            preference: Preference::Edge,
            ..request()
        },
        &both,
        first,
    )
    .unwrap();
    assert_eq!(choice.index, 1);
    assert_eq!(
        choice.reason,
        "the preferred tier has no free worker in time, 1 of 2 workers free"
    );
}

fn candidates() -> impl Strategy<Value = Vec<Candidate<'static>>> {
    let one = (
        0usize..3,
        any::<bool>(),
        0u32..4,
        0u32..4,
        0u64..50,
        0u64..50,
        (0u64..20, 0usize..3, any::<bool>()),
    )
        .prop_map(
            |(site, edge, slots, outstanding, service, rtt, (transfer, standing, loaded))| {
                Candidate {
                    site: ["plant-1", "plant-2", "cloud-1"][site],
                    fingerprint: site as u64,
                    version: if edge { "1" } else { "2" },
                    tier: if edge { Tier::Edge } else { Tier::Cloud },
                    slots,
                    outstanding,
                    service_time: MS * service as u32,
                    rtt: MS * rtt as u32,
                    transfer: MS * transfer as u32,
                    standing: [Standing::Well, Standing::Probe, Standing::Ejected][standing],
                    loaded,
                }
            },
        );
    proptest::collection::vec(one, 0..8)
}

proptest! {
    #[test]
    fn a_choice_keeps_every_bound(
        candidates in candidates(),
        site_only: bool,
        version in 0usize..3,
        deadline in 0u64..100,
        seed: u64,
    ) {
        let request = Request {
            residency: if site_only { Residency::Site } else { Residency::Tenant },
            version: ["", "1", "2"][version],
            deadline: MS * deadline as u32,
            ..request()
        };
        let mut state = seed;
        let chosen = place(&request, &candidates, |count| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % count
        });
        let fits = |candidate: &Candidate<'_>| {
            (!site_only || candidate.site == request.site)
                && (request.version.is_empty() || request.version == candidate.version)
        };
        let ready = |candidate: &Candidate<'_>| {
            candidate.outstanding < candidate.slots && expected(candidate) <= request.deadline
        };
        let trusted = |candidate: &Candidate<'_>| candidate.standing != Standing::Ejected;
        let mut fitting = candidates.iter().filter(|candidate| fits(candidate));
        let is_trust_possible = fitting.any(trusted);
        if let Ok(choice) = chosen {
            let candidate = &candidates[choice.index];
            prop_assert!(!site_only || candidate.site == request.site);
            prop_assert!(request.version.is_empty() || request.version == candidate.version);
            prop_assert!(ready(candidate));
            prop_assert!(trusted(candidate) || !is_trust_possible);
        } else {
            let mut missed = candidates.iter().filter(|candidate| fits(candidate) && ready(candidate));
            prop_assert!(!missed.any(|candidate| trusted(candidate) || !is_trust_possible));
        }
    }
}

#[test]
fn the_ejected_are_asked_only_when_nobody_else_is_there() {
    let ejected = Candidate {
        standing: Standing::Ejected,
        ..worker(Tier::Edge, "plant-1")
    };
    let both = [ejected, worker(Tier::Cloud, "cloud-1")];
    assert_eq!(place(&request(), &both, first).unwrap().index, 1);
    let alone = place(&request(), &both[..1], first).unwrap();
    assert_eq!(
        alone.reason,
        "least expected completion, 1 of 1 workers free, all of them failing"
    );
    // An escalation has an answer already.
    let escalation = Request {
        tier: Some(Tier::Edge),
        ..request()
    };
    assert_eq!(
        place(&escalation, &both[..1], first),
        Err(Refusal::Busy {
            retry_after: Duration::from_secs(1)
        })
    );
}

#[test]
fn a_large_payload_goes_where_the_way_is_wide() {
    let narrow = Candidate {
        transfer: MS * 400,
        ..worker(Tier::Cloud, "cloud-1")
    };
    let slow = Candidate {
        service_time: MS * 100,
        ..worker(Tier::Edge, "plant-1")
    };
    assert_eq!(place(&request(), &[narrow, slow], first).unwrap().index, 1);
}

#[test]
fn a_routing_key_stays_with_its_worker_while_that_has_room() {
    let workers: Vec<Candidate<'_>> = (0..4)
        .map(|fingerprint| Candidate {
            fingerprint,
            slots: 8,
            ..worker(Tier::Edge, "plant-1")
        })
        .collect();
    let keyed = Request {
        affinity: Some(7),
        ..request()
    };
    let home = place(&keyed, &workers, first).unwrap();
    assert!(home.reason.ends_with("by routing key"), "{}", home.reason);
    // Whoever is slower or has a little to do is still home.
    let mut busy = workers.clone();
    busy[home.index].service_time = MS * 100;
    assert_eq!(place(&keyed, &busy, first).unwrap().index, home.index);
    // One with much more than the others is not, nor is one that nobody trusts, or that has not loaded.
    let changes: [fn(&mut Candidate<'_>); 3] = [
        |home| home.outstanding = 4,
        |home| home.standing = Standing::Ejected,
        |home| home.loaded = false,
    ];
    for change in changes {
        let mut changed = workers.clone();
        change(&mut changed[home.index]);
        assert_ne!(place(&keyed, &changed, first).unwrap().index, home.index);
    }
}
