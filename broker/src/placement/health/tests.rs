use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn failing(times: u32, now: Instant) -> Health {
    let mut health = Health::default();
    for _ in 0..times {
        health.fail(now);
    }
    health
}

#[test]
fn five_failures_in_a_row_eject_and_one_answer_brings_back() {
    let now = Instant::now();
    assert_eq!(failing(4, now).standing(now), Standing::Well);
    let mut health = failing(5, now);
    assert_eq!(health.standing(now + PAUSE - MS), Standing::Ejected);
    assert_eq!(health.standing(now + PAUSE), Standing::Probe);
    assert!(health.begin(now + PAUSE));
    // One probe at a time.
    assert!(!health.begin(now + PAUSE));
    assert_eq!(health.standing(now + PAUSE), Standing::Ejected);
    health.succeed();
    assert_eq!(health.standing(now + PAUSE), Standing::Well);
    // What came before is forgotten.
    assert!(!health.fail(now + PAUSE));
}

#[test]
fn each_probe_that_fails_doubles_the_pause_up_to_the_longest() {
    let mut now = Instant::now();
    let mut health = failing(5, now);
    for doubled in [1u64, 2, 4, 8, 16, 30, 30] {
        let pause = Duration::from_secs(doubled);
        assert_eq!(health.standing(now + pause - MS), Standing::Ejected);
        now += pause;
        assert!(health.begin(now));
        assert!(health.fail(now));
    }
}

#[test]
fn a_probe_that_is_never_heard_of_is_followed_by_another() {
    let now = Instant::now();
    let mut health = failing(5, now);
    assert!(health.begin(now + PAUSE));
    assert_eq!(health.standing(now + PAUSE * 2 - MS), Standing::Ejected);
    assert!(health.begin(now + PAUSE * 2));
}

#[test]
fn failing_more_often_than_not_ejects_without_five_in_a_row() {
    let now = Instant::now();
    let mut health = Health::default();
    let mut ejected = false;
    for _ in 0..20 {
        ejected |= health.fail(now);
        ejected |= health.fail(now);
        health.succeed();
    }
    assert!(ejected);
}

proptest! {
    #[test]
    fn who_fails_one_in_four_at_most_and_never_five_in_a_row_stays(pattern in proptest::collection::vec(0usize..4, 1..200)) {
        let now = Instant::now();
        let mut health = Health::default();
        for place in pattern {
            for turn in 0..4 {
                if turn == place {
                    prop_assert!(!health.fail(now));
                } else {
                    health.succeed();
                }
            }
            prop_assert_eq!(health.standing(now), Standing::Well);
        }
    }

    #[test]
    fn whoever_is_ejected_is_probed_within_the_longest_pause(steps in proptest::collection::vec((any::<bool>(), 0u64..5_000), 0..100)) {
        let mut now = Instant::now();
        let mut health = Health::default();
        for (fails, later) in steps {
            now += Duration::from_millis(later);
            if health.begin(now) {
                if fails { health.fail(now); } else { health.succeed(); }
            }
            prop_assert!(health.standing(now + LONGEST_PAUSE) != Standing::Ejected);
        }
    }
}
