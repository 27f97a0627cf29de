use std::time::Duration;

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn the_order_is_class_then_deadline_then_arrival_and_the_bound_holds(
        wishes in proptest::collection::vec((0usize..3, 0u64..20), 0..100),
        limit in 0usize..40,
    ) {
        let start = Instant::now();
        let mut queue = Queue::default();
        for (number, (class, due)) in wishes.iter().copied().enumerate() {
            let (class, due) = (Class::ALL[class], start + Duration::from_millis(due));
            let ahead = queue.iter().filter(|(place, _)| (place.class, place.due) <= (class, due)).count();
            prop_assert_eq!(queue.ahead(class, due), ahead);
            let last = queue.iter().last().map(|(_, value)| *value);
            match queue.join(class, due, (class, due, number), limit) {
                Joined::Waits(_) => {}
                Joined::InsteadOf(_, displaced) => {
                    prop_assert_eq!(Some(displaced), last);
                    prop_assert!(displaced.0 > class);
                }
                Joined::Full => prop_assert!(last.is_none_or(|last| last.0 <= class)),
            }
            prop_assert!(queue.len() <= limit);
            let order: Vec<_> = queue.iter().map(|(_, value)| *value).collect();
            prop_assert!(order.is_sorted());
        }
    }
}

#[test]
fn who_leaves_is_not_there_any_more() {
    let now = Instant::now();
    let mut queue = Queue::default();
    let Joined::Waits(place) = queue.join(Class::Normal, now, 'a', 1) else {
        panic!("there is room");
    };
    assert_eq!(queue.join(Class::Normal, now, 'b', 1), Joined::Full);
    assert!(matches!(
        queue.join(Class::Alarm, now, 'c', 1),
        Joined::InsteadOf(_, 'a')
    ));
    assert_eq!(queue.leave(place), None);
    assert_eq!(queue.len(), 1);
}
