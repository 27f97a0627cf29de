use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn repetitions_are_a_fifth_of_the_requests_and_ten(steps in proptest::collection::vec(any::<bool>(), 0..500)) {
        let mut budget = Budget::default();
        let (mut requests, mut repeated) = (0, 0);
        for is_request in steps {
            if is_request {
                budget.earn();
                requests += 1;
            } else if budget.spend() {
                repeated += 1;
            }
            prop_assert!(repeated <= 10 + requests / 5);
        }
    }
}

#[test]
fn five_requests_earn_one_repetition() {
    let mut budget = Budget::default();
    while budget.spend() {}
    for _ in 0..4 {
        budget.earn();
        assert!(!budget.spend());
    }
    budget.earn();
    assert!(budget.spend());
}
