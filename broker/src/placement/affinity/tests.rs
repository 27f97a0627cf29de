use proptest::prelude::*;

use super::*;

fn members(loads: &[u32]) -> Vec<Member> {
    let member = |(place, &outstanding): (usize, &u32)| Member {
        fingerprint: fingerprint(&format!("worker-{place}")),
        outstanding,
    };
    loads.iter().enumerate().map(member).collect()
}

proptest! {
    #[test]
    fn there_is_always_somebody_and_never_somebody_with_too_much(
        key: u64,
        loads in prop::collection::vec(0..20_u32, 1..20),
    ) {
        let members = members(&loads);
        let chosen = choose(key, &members).unwrap();
        let mean = f64::from(loads.iter().sum::<u32>() + 1) / loads.len() as f64;
        prop_assert!(f64::from(loads[chosen]) < (mean * 1.25).ceil());
    }

    #[test]
    fn a_worker_that_leaves_moves_its_own_keys_only(
        key: u64,
        count in 2..20_usize,
        leaving in 0..20_usize,
    ) {
        let all = members(&vec![0; count]);
        let leaving = leaving % count;
        let mut rest = all.clone();
        rest.remove(leaving);
        let (before, after) = (choose(key, &all).unwrap(), choose(key, &rest).unwrap());
        prop_assert!(before == leaving || all[before] == rest[after]);
    }
}

#[test]
fn keys_are_spread_over_the_workers() {
    let members = members(&[0; 4]);
    let mut counts = [0; 4];
    for key in 0..1_000 {
        counts[choose(fingerprint(&key.to_string()), &members).unwrap()] += 1;
    }
    assert!(
        counts.iter().all(|count| (150..350).contains(count)),
        "{counts:?}"
    );
    assert_eq!(choose(7, &[]), None);
}
