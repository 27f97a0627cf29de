//! What a message costs on its way through the broker: a burst is encoded once, and a QoS 0 message
//! has no allocation of its own, whatever the number of receivers.

#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge_broker::Limits;
use selvedge_broker::config::DurabilityRules;
use selvedge_broker::fabric::{Fabric, FabricOptions};
use selvedge_broker::policy::Policy;
use selvedge_broker::publisher::{Incoming, Payload, Publisher, Topic};
use selvedge_broker::queue::Overflow;
use selvedge_broker::session::SessionKey;
use selvedge_broker::tenant::{Attachment, Connect, RetainDelivery, SubscribeRequest, Tenant};
use selvedge_certs::Identity;
use selvedge_proto::message::{Class, Durability, Qos};
use selvedge_proto::topic::{SubscribeTarget, TopicName};

const POLICY: &str = r##"
[[rule]]
name = "all"
identities = ["acme/*/*"]
allow = ["publish", "subscribe"]
subjects = ["#"]
"##;

const RECEIVERS: usize = 20;
/// Messages that one read brings.
const BURST: usize = 256;

fn identity(name: &str) -> Identity {
    Identity::new("example.org", "acme", "plant-1", name).unwrap()
}

struct Scene {
    fabric: Arc<Fabric>,
    tenant: Arc<Tenant>,
}

impl Scene {
    fn new() -> Self {
        let fabric = Fabric::new(FabricOptions {
            name: "test".to_owned(),
            identity: identity("broker"),
            limits: Limits::default(),
            policy: Policy::parse(POLICY).unwrap(),
            metrics: Arc::default(),
            store: None,
            durability: DurabilityRules::all(true),
            history: Vec::new(),
            mqtt: selvedge_broker::mqtt::settings::Settings::default(),
        });
        let tenant = fabric.tenant(&identity("broker"));
        Self { fabric, tenant }
    }

    fn connect(&self, name: &str) -> Attachment {
        let connect = Connect {
            key: SessionKey {
                identity: identity(name),
                name: "s".into(),
            },
            clean_start: true,
            expiry: Duration::ZERO,
            will: None,
        };
        self.tenant.attach(&self.fabric, &connect).unwrap()
    }

    fn subscribe(&self, name: &str) -> Attachment {
        let attachment = self.connect(name);
        let request = SubscribeRequest {
            id: 1,
            target: SubscribeTarget::parse("press/+/temperature").unwrap(),
            max_qos: Qos::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            identifier: None,
            own_lane: false,
            overflow: Overflow::Default,
            retain: RetainDelivery::Never,
            replay: None,
            datagrams: false,
        };
        let policy = self.fabric.policy_for(&identity(name));
        self.tenant
            .subscribe(&attachment.session, &policy, request)
            .unwrap();
        attachment
    }
}

/// Publishes a burst and lets every receiver take it, as their lanes would.
fn burst(publisher: &Publisher, topic: &mut Topic, receivers: &[Attachment], qos: Qos) {
    for _ in 0..BURST {
        let message = Incoming {
            qos,
            retain: false,
            durability: Durability::Default,
            duplicate: false,
            header: None,
            payload: Payload::Borrowed(&[7; 64]),
        };
        publisher.publish(topic, &message).unwrap();
    }
    publisher.flush(topic);
    for receiver in receivers {
        let queue = &receiver.session.shared[Class::Normal.index()];
        let taken = queue.take(receiver.epoch, usize::MAX, 0, Instant::now());
        let count: u32 = taken.entries.iter().map(|entry| entry.batch.count).sum();
        assert_eq!(count as usize, BURST);
        queue.acknowledge(receiver.epoch, BURST as u64 * 1000);
        // As a lane does that finds its queue empty and goes to sleep.
        let _ = queue.take(receiver.epoch, usize::MAX, 0, Instant::now());
        let _ = receiver.session.outbox.take(receiver.epoch);
    }
}

#[tokio::test]
async fn a_burst_costs_a_few_allocations_for_each_receiver_and_none_for_each_message() {
    let scene = Scene::new();
    let receivers: Vec<_> = (0..RECEIVERS)
        .map(|n| scene.subscribe(&format!("receiver-{n}")))
        .collect();
    let attachment = scene.connect("press-7");
    let publisher = Publisher::new(
        &scene.fabric,
        Arc::clone(&scene.tenant),
        &attachment.session,
    );
    let name = TopicName::parse("press/7/temperature").unwrap();
    let mut topic = publisher.open(name, Class::Normal);
    for qos in [Qos::AtMostOnce, Qos::AtLeastOnce] {
        // What grows once has grown after the first bursts.
        for _ in 0..4 {
            burst(&publisher, &mut topic, &receivers, qos);
        }
        let info = allocation_counter::measure(|| burst(&publisher, &mut topic, &receivers, qos));
        // The batch, its bytes as they grow, and for each receiver the lists that it takes.
        let allowed = 16 + 4 * RECEIVERS as u64;
        assert!(
            info.count_total <= allowed,
            "{qos:?}: {} allocations for {BURST} messages to {RECEIVERS} receivers: expected at \
             most {allowed}",
            info.count_total,
        );
        // Encoded once: far less than a copy for each receiver.
        let encoded = (BURST * 72) as u64;
        let bytes = 4 * encoded + 1024 * RECEIVERS as u64;
        assert!(
            info.bytes_total <= bytes,
            "{qos:?}: {} bytes allocated for {encoded} bytes of messages: expected at most {bytes}",
            info.bytes_total,
        );
    }
}
