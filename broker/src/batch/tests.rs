#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn an_id_is_free_again_when_its_flow_is_dropped_and_the_smallest_is_taken() {
    let ids = Arc::<FlowIds>::default();
    let flow = || {
        let topic = TopicName::parse("a").unwrap();
        let publisher = Identity::new("example.org", "acme", "site", "p").unwrap();
        Flow::numbered(&ids, topic, publisher, 1)
    };
    let mut flows: Vec<Flow> = (0..5).map(|_| flow()).collect();
    assert_eq!(
        flows.iter().map(|flow| flow.id).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    flows.remove(3);
    flows.remove(1);
    flows.extend((0..3).map(|_| flow()));
    assert_eq!(
        flows.iter().map(|flow| flow.id).collect::<Vec<_>>(),
        [1, 3, 5, 2, 4, 6]
    );
}
