use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn watch(elapsed: u32, heard: bool, rtt: u32, estimate: u32) -> Watch {
    Watch {
        elapsed: MS * elapsed,
        heard,
        rtt: MS * rtt,
        estimate: MS * estimate,
    }
}

#[test]
fn a_worker_is_silent_late_or_at_work() {
    for (elapsed, heard, rtt, estimate, expected) in [
        (399, false, 1, 1, None),
        (400, false, 1, 60_000, Some(Why::Silent)),
        (899, false, 300, 1, None),
        (900, false, 300, 1, Some(Why::Silent)),
        (249, true, 1, 1, None),
        (250, true, 1, 1, Some(Why::Late)),
        (2_999, true, 1, 1_000, None),
        (3_000, true, 1, 1_000, Some(Why::Late)),
    ] {
        let watch = watch(elapsed, heard, rtt, estimate);
        assert_eq!(is_due(&watch), expected, "{watch:?}");
    }
}

proptest! {
    #[test]
    fn what_is_due_stays_due(
        elapsed in 0..10_000_u32,
        more in 0..10_000_u32,
        heard: bool,
        rtt in 0..1_000_u32,
        estimate in 0..5_000_u32,
    ) {
        let sooner = is_due(&watch(elapsed, heard, rtt, estimate));
        let later = is_due(&watch(elapsed + more, heard, rtt, estimate));
        prop_assert!(sooner.is_none() || later == sooner);
    }
}
