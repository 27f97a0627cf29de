use super::*;

fn small() -> Options {
    Options {
        workers: 60,
        requests: 6_000,
        ..Options::default()
    }
}

fn outcome(report: &Report, policy: Policy) -> &Outcome {
    let mut outcomes = report.outcomes.iter();
    outcomes
        .find(|outcome| outcome.policy == policy)
        .expect("every policy is simulated")
}

#[test]
fn the_same_seed_gives_the_same_report() {
    let options = small();
    let report = run(&options, |_| {}).unwrap();
    assert_eq!(report, run(&options, |_| {}).unwrap());
    let other = Options { seed: 2, ..options };
    assert_ne!(report.outcomes, run(&other, |_| {}).unwrap().outcomes);
}

#[test]
fn every_request_ends_in_one_way() {
    for utilisation in [0.3, 1.5] {
        let options = Options {
            utilisation,
            ..small()
        };
        for outcome in run(&options, |_| {}).unwrap().outcomes {
            let ended = outcome.in_time + outcome.late + outcome.failed + outcome.refused;
            assert_eq!(ended, options.requests, "{:?}", outcome.policy);
        }
    }
}

#[test]
fn the_fabric_answers_more_in_time_than_the_policies_that_see_less() {
    let report = run(&small(), |_| {}).unwrap();
    let fabric = outcome(&report, Policy::Fabric).missed_percent();
    for policy in [Policy::Random, Policy::RoundRobin, Policy::LeastOutstanding] {
        let other = outcome(&report, policy).missed_percent();
        assert!(fabric < other, "{policy:?}: {fabric} against {other}");
    }
    let hits = |policy| outcome(&report, policy).hits;
    assert!(hits(Policy::FabricKeyed) > 2 * hits(Policy::Fabric));
}

#[test]
fn without_faults_or_load_nothing_is_missed() {
    let options = Options {
        faults: false,
        utilisation: 0.2,
        ..small()
    };
    let report = run(&options, |_| {}).unwrap();
    assert_eq!(outcome(&report, Policy::Fabric).in_time, options.requests);
}

#[test]
fn options_out_of_bounds_are_refused() {
    let refused = |options: Options| run(&options, |_| {}).unwrap_err().to_string();
    assert_eq!(
        refused(Options {
            workers: 0,
            ..small()
        }),
        "0 workers: expected 1 to 100000"
    );
    assert_eq!(
        refused(Options {
            utilisation: f64::NAN,
            ..small()
        }),
        "utilisation NaN: expected more than 0 and up to 2"
    );
}
