//! `$SYS` topics: a tenant's own numbers under the names that MQTT dashboards read.
//!
//! They are retained, so that a new subscriber has them at once, but not stored: another broker has
//! other numbers. Nobody else may publish there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use selvedge_proto::lane::{self, Flags};
use selvedge_proto::message::{Class, Qos};
use selvedge_proto::topic::TopicName;

use crate::batch::{Batch, Flow};
use crate::clock;
use crate::fabric::Fabric;
use crate::quota::Figures;
use crate::router::Choice;
use crate::tenant::Tenant;

/// How the broker's own topics begin.
pub(crate) const PREFIX: &str = "$SYS/";

/// Times over which loads are averaged, with their names.
const SPANS: [(&str, Duration); 3] = [
    ("1min", Duration::from_secs(60)),
    ("5min", Duration::from_secs(5 * 60)),
    ("15min", Duration::from_secs(15 * 60)),
];

/// One number of a tenant.
type Figure = fn(&Figures) -> u64;

/// What loads are of.
const LOADS: [(&str, Figure); 7] = [
    ("messages/received", |figures| figures.received.messages),
    ("messages/sent", |figures| figures.sent.messages),
    ("publish/received", |figures| figures.received.messages),
    ("publish/sent", |figures| figures.sent.messages),
    ("bytes/received", |figures| figures.received.bytes),
    ("bytes/sent", |figures| figures.sent.bytes),
    ("connections", |figures| figures.connections_made),
];

/// The topics of one tenant between two turns.
#[derive(Debug, Default)]
struct Board {
    flows: HashMap<String, Arc<Flow>>,
    before: Option<(Instant, Figures)>,
    most_connected: u64,
    loads: [[f64; SPANS.len()]; LOADS.len()],
}

/// Brings the topics up to date until the broker stops.
pub(crate) async fn publish(fabric: Arc<Fabric>) {
    let interval = fabric.mqtt.sys_interval;
    if interval.is_zero() {
        return;
    }
    let mut boards: HashMap<Arc<str>, Board> = HashMap::new();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = fabric.shutdown.cancelled() => return,
        }
        for tenant in fabric.tenants() {
            let board = boards.entry(Arc::clone(&tenant.name)).or_default();
            board.update(&fabric, &tenant, clock::now());
        }
    }
}

impl Board {
    fn update(&mut self, fabric: &Fabric, tenant: &Tenant, now: Instant) {
        let figures = tenant.usages.figures();
        self.average(now, figures);
        self.most_connected = self.most_connected.max(figures.connected);
        let sessions = tenant.session_count() as u64;
        let uptime = now.saturating_duration_since(fabric.started).as_secs();
        let offline = sessions.saturating_sub(figures.connected);
        let retained = tenant.retained.len().saturating_sub(self.flows.len());
        let number = |topic: &str, value: u64| (topic.to_owned(), value.to_string());
        let mut topics = vec![
            (
                "version".to_owned(),
                format!("selvedge version {}", env!("CARGO_PKG_VERSION")),
            ),
            ("uptime".to_owned(), format!("{uptime} seconds")),
            number("clients/connected", figures.connected),
            number("clients/active", figures.connected),
            number("clients/disconnected", offline),
            number("clients/inactive", offline),
            number("clients/total", sessions),
            number("clients/maximum", self.most_connected),
            number("messages/received", figures.received.messages),
            number("messages/sent", figures.sent.messages),
            number("publish/messages/received", figures.received.messages),
            number("publish/messages/sent", figures.sent.messages),
            number("publish/messages/dropped", tenant.losses.count()),
            number("publish/bytes/received", figures.received.bytes),
            number("publish/bytes/sent", figures.sent.bytes),
            number("bytes/received", figures.received.bytes),
            number("bytes/sent", figures.sent.bytes),
            number("subscriptions/count", figures.subscriptions),
            number("retained messages/count", retained as u64),
        ];
        for ((load, _), values) in LOADS.iter().zip(&self.loads) {
            for ((span, _), value) in SPANS.iter().zip(values) {
                topics.push((format!("load/{load}/{span}"), format!("{value:.2}")));
            }
        }
        for (topic, value) in topics {
            self.put(fabric, tenant, topic, &value);
        }
    }

    /// Moves the averages, each per minute, on to now.
    fn average(&mut self, now: Instant, figures: Figures) {
        if let Some((since, before)) = self.before.replace((now, figures)) {
            let passed = now.saturating_duration_since(since).as_secs_f64();
            if passed > 0.0 {
                for ((_, of), values) in LOADS.iter().zip(&mut self.loads) {
                    let grown = of(&figures).saturating_sub(of(&before)) as f64;
                    let rate = grown * 60.0 / passed;
                    for ((_, span), value) in SPANS.iter().zip(values) {
                        let weight = (-passed / span.as_secs_f64()).exp();
                        *value = *value * weight + rate * (1.0 - weight);
                    }
                }
            }
        }
    }

    fn put(&mut self, fabric: &Fabric, tenant: &Tenant, topic: String, value: &str) {
        let flow = match self.flows.get(&topic) {
            Some(flow) => Arc::clone(flow),
            None => {
                let Ok(name) = TopicName::parse(format!("{PREFIX}broker/{topic}")) else {
                    return;
                };
                // No session has the number 0, so nobody takes the message for its own.
                let flow = tenant.flow(name, &fabric.identity, 0);
                self.flows.insert(topic, Arc::clone(&flow));
                flow
            }
        };
        let unchanged = tenant.retained.get(&flow.topic).is_some_and(|held| {
            held.messages()
                .next()
                .is_some_and(|held| held.payload == value.as_bytes())
        });
        if unchanged {
            return;
        }
        let mut frames = BytesMut::new();
        let flags = Flags::new(Qos::AtMostOnce);
        lane::put_message(&mut frames, flags, flow.id, None, value.as_bytes());
        let batch = Arc::new(Batch {
            flow: Arc::clone(&flow),
            class: Class::Normal,
            qos: Qos::AtMostOnce,
            retain: false,
            retain_as_published: true,
            count: 1,
            frames: frames.freeze(),
            payload: Bytes::new(),
            expires: None,
        });
        // When there is no room the tenant's own messages go before. These are none of its messages, so the
        // metric does not count them.
        let _ = tenant
            .retained
            .set(Arc::new(batch.with_flags(Qos::AtMostOnce, true)));
        let route = tenant.router.route(&flow.topic, 0);
        for target in &route.targets {
            target.subscriber.queues[batch.class.index()].push(&batch);
        }
        for group in &route.groups {
            if let Choice::Member(member) = group.choose(&flow.topic, 0, batch.class, batch.qos) {
                member.queues[batch.class.index()].push(&batch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_a_rate_per_minute_that_follows_slowly() {
        let mut board = Board::default();
        let start = clock::now();
        let mut figures = Figures::default();
        for second in 0..600 {
            board.average(start + Duration::from_secs(second), figures);
            figures.received.messages += 10;
        }
        let [one, five, fifteen] = board.loads[0];
        assert!((one - 600.0).abs() < 1.0, "{one}");
        assert!((500.0..530.0).contains(&five), "{five}");
        assert!((270.0..310.0).contains(&fifteen), "{fifteen}");
        assert_eq!(board.loads[1], [0.0; 3]);
    }
}
