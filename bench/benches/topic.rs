//! Topic matching: one filter against one topic, and the router with up to 100,000 subscriptions.
#![allow(missing_docs, reason = "Criterion's macros make public functions")]

use std::hint::black_box;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use selvedge_broker::losses::Losses;
use selvedge_broker::queue::{DeliveryQueue, Overflow, Owner, QueueOptions};
use selvedge_broker::router::Router;
use selvedge_broker::session::{SessionKey, Subscriber};
use selvedge_certs::Identity;
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::topic::{SubscribeTarget, TopicFilter, TopicName};

const TOPIC: &str = "plant/hall-3/line-0/press-7/temperature";
const SUBSCRIPTIONS: [usize; 3] = [1, 1_000, 100_000];
/// A publisher that has none of the subscriptions.
const PUBLISHER: u64 = u64::MAX;

criterion_group!(benches, filter, route_to_one, route_to_all);
criterion_main!(benches);

fn filter(criterion: &mut Criterion) {
    let topic = TopicName::parse(TOPIC).expect("the topic is valid");
    let mut group = criterion.benchmark_group("filter");
    for (name, filter) in [
        ("literal", TOPIC),
        ("one level", "plant/+/line-0/+/temperature"),
        ("rest", "plant/hall-3/#"),
        ("differs at the end", "plant/+/line-0/+/pressure"),
    ] {
        let filter = TopicFilter::parse(filter).expect("the filter is valid");
        group.bench_function(name, |bencher| {
            bencher.iter(|| black_box(&filter).matches(black_box(&topic)));
        });
    }
    group.finish();
}

/// Each subscription is to another line, so the time of a route is that of one match.
fn route_to_one(criterion: &mut Criterion) {
    let topic = TopicName::parse(TOPIC).expect("the topic is valid");
    let mut group = criterion.benchmark_group("route to one subscription of");
    for count in SUBSCRIPTIONS {
        let router = router((0..count).map(|line| format!("plant/+/line-{line}/+/temperature")));
        assert_eq!(router.route(&topic, PUBLISHER).targets.len(), 1);
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| router.route(black_box(&topic), PUBLISHER));
        });
    }
    group.finish();
}

/// Every session wants the topic; the time of a match is that of the route by their number.
fn route_to_all(criterion: &mut Criterion) {
    let topic = TopicName::parse(TOPIC).expect("the topic is valid");
    let mut group = criterion.benchmark_group("route to each subscription of");
    group.measurement_time(Duration::from_secs(8));
    for count in SUBSCRIPTIONS {
        let filters = ["plant/+/line-0/#", "plant/hall-3/+/+/temperature"];
        let router = router(filters.into_iter().cycle().take(count).map(str::to_owned));
        assert_eq!(router.route(&topic, PUBLISHER).targets.len(), count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| router.route(black_box(&topic), PUBLISHER));
        });
    }
    group.finish();
}

/// A router with one subscription of a session of its own per filter.
fn router(filters: impl Iterator<Item = String>) -> Router {
    let owner = Arc::new(Owner {
        key: SessionKey {
            identity: Identity::new("example.org", "acme", "hall-3", "receiver")
                .expect("the identity is valid"),
            name: "bench".into(),
        },
        outbox: Arc::default(),
        losses: Losses::new(Arc::default(), Arc::default()),
        usage: Arc::default(),
        store: None,
    });
    let queues = Class::ALL.map(|class| {
        DeliveryQueue::new(QueueOptions {
            class,
            subscription: 0,
            limit: 1 << 20,
            overflow: Overflow::Default,
            owner: Arc::clone(&owner),
            online: None,
            durable: false,
            held: false,
        })
    });
    let router = Router::default();
    for (session_id, filter) in filters.enumerate() {
        router.insert(Arc::new(Subscriber {
            id: 1,
            session_id: session_id as u64,
            target: SubscribeTarget::parse(&filter).expect("the filter is valid"),
            max_qos: Qos::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            identifier: None,
            residual: Arc::from([]),
            own_lane: false,
            overflow: Overflow::Default,
            queues: queues.clone(),
            datagrams: false,
            session: Weak::new(),
            group: OnceLock::new(),
        }));
    }
    router
}
