//! The admin listener of a bridge: health, readiness, metrics and status.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::bridge::Site;
use crate::spool::QueueStatus;
use crate::status::RemoteStatus;

type Sites = Arc<[Site]>;

/// Serves until it is aborted.
pub(crate) async fn serve(sites: Sites, listener: TcpListener) {
    let app = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/api/status", get(status))
        .with_state(sites);
    if let Err(error) = axum::serve(listener, app).await {
        tracing::error!(%error, "the admin listener failed");
    }
}

async fn ready(State(sites): State<Sites>) -> impl IntoResponse {
    let ready = |status: &RemoteStatus| status.ready && status.fabric_connected;
    match sites.iter().map(Site::status).all(|status| ready(&status)) {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not connected\n"),
    }
}

async fn metrics(State(sites): State<Sites>) -> impl IntoResponse {
    let statuses: Vec<RemoteStatus> = sites.iter().map(Site::status).collect();
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], encode(&statuses))
}

async fn status(State(sites): State<Sites>) -> Json<Value> {
    let remotes: Vec<Value> = sites.iter().map(|site| to_json(&site.status())).collect();
    Json(json!({ "remotes": remotes }))
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRemote {
    remote: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfQueue {
    remote: String,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRule {
    remote: String,
    /// From 1 on, as problems of the configuration name them.
    rule: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Forwarded {
    remote: String,
    rule: usize,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Dropped {
    remote: String,
    /// 0 for a message that no rule took.
    rule: usize,
    reason: &'static str,
}

/// The families of one scrape: the figures are counted elsewhere.
#[derive(Default)]
struct Families {
    connected: Family<OfRemote, Gauge>,
    fabric_connected: Family<OfRemote, Gauge>,
    ready: Family<OfRemote, Gauge>,
    store_failing: Family<OfRemote, Gauge>,
    connections: Family<OfRemote, Counter>,
    queued: Family<OfQueue, Gauge>,
    queued_bytes: Family<OfQueue, Gauge>,
    queue_limit: Family<OfQueue, Gauge>,
    queue_lag: Family<OfQueue, Gauge<f64, std::sync::atomic::AtomicU64>>,
    kept: Family<OfQueue, Counter>,
    full: Family<OfQueue, Counter>,
    forwarded: Family<Forwarded, Counter>,
    repeated: Family<OfRule, Counter>,
    in_flight: Family<OfRule, Gauge>,
    lag: Family<OfRule, Gauge<f64, std::sync::atomic::AtomicU64>>,
    dropped: Family<Dropped, Counter>,
}

fn encode(statuses: &[RemoteStatus]) -> String {
    let families = Families::default();
    for status in statuses {
        families.fill(status);
    }
    let mut registry = Registry::with_prefix("selvedge_bridge");
    families.register(&mut registry);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

impl Families {
    fn fill(&self, status: &RemoteStatus) {
        let remote = &status.name;
        let of = OfRemote {
            remote: remote.clone(),
        };
        let flags = [
            (&self.connected, status.connected),
            (&self.fabric_connected, status.fabric_connected),
            (&self.ready, status.ready),
            (&self.store_failing, status.store_error.is_some()),
        ];
        for (family, flag) in flags {
            family.get_or_create(&of).set(flag.into());
        }
        self.connections
            .get_or_create(&of)
            .inc_by(status.connections);
        self.fill_queue(remote, "in", &status.inward);
        self.fill_queue(remote, "out", &status.outward);
        let dropped = status.dropped.iter().map(|dropped| (0, dropped));
        let rules = (1..).zip(&status.rules);
        let of_rules = rules
            .clone()
            .flat_map(|(rule, status)| status.dropped.iter().map(move |dropped| (rule, dropped)));
        for (rule, (reason, count)) in dropped.chain(of_rules) {
            let of = Dropped {
                remote: remote.clone(),
                rule,
                reason: reason.as_str(),
            };
            self.dropped.get_or_create(&of).inc_by(*count);
        }
        for (rule, status) in rules {
            let of = OfRule {
                remote: remote.clone(),
                rule,
            };
            self.repeated.get_or_create(&of).inc_by(status.repeated);
            self.in_flight
                .get_or_create(&of)
                .set(signed(status.in_flight));
            self.lag.get_or_create(&of).set(status.lag.as_secs_f64());
            let ways = [("in", status.forwarded_in), ("out", status.forwarded_out)];
            for (direction, count) in ways {
                let of = Forwarded {
                    remote: remote.clone(),
                    rule,
                    direction,
                };
                self.forwarded.get_or_create(&of).inc_by(count);
            }
        }
    }

    fn fill_queue(&self, remote: &str, direction: &'static str, status: &QueueStatus) {
        let of = OfQueue {
            remote: remote.to_owned(),
            direction,
        };
        let bytes = |bytes: usize| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.queued.get_or_create(&of).set(signed(status.messages));
        self.queued_bytes
            .get_or_create(&of)
            .set(bytes(status.bytes));
        self.queue_limit.get_or_create(&of).set(bytes(status.limit));
        self.queue_lag
            .get_or_create(&of)
            .set(status.lag.as_secs_f64());
        self.kept.get_or_create(&of).inc_by(status.kept);
        self.full.get_or_create(&of).inc_by(status.full);
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "connected",
            "The remote has accepted the connection",
            self.connected.clone(),
        );
        registry.register(
            "fabric_connected",
            "The fabric has accepted the connection",
            self.fabric_connected.clone(),
        );
        registry.register(
            "ready",
            "The remote has granted every subscription",
            self.ready.clone(),
        );
        registry.register(
            "store_failing",
            "The bridge's disk takes nothing",
            self.store_failing.clone(),
        );
        registry.register(
            "connections",
            "Connections that the remote has accepted",
            self.connections.clone(),
        );
        registry.register(
            "queued_messages",
            "Messages that the other side does not have yet",
            self.queued.clone(),
        );
        registry.register_with_unit(
            "queued",
            "Bytes of them",
            Unit::Bytes,
            self.queued_bytes.clone(),
        );
        registry.register_with_unit(
            "queue_limit",
            "Bytes beyond which the source has to wait",
            Unit::Bytes,
            self.queue_limit.clone(),
        );
        registry.register_with_unit(
            "queue_lag",
            "How long the oldest of them has been on its way",
            Unit::Seconds,
            self.queue_lag.clone(),
        );
        registry.register(
            "kept_messages",
            "Messages acknowledged since they were on the bridge's disk",
            self.kept.clone(),
        );
        registry.register(
            "queue_full",
            "Messages that had to wait for room",
            self.full.clone(),
        );
        registry.register(
            "forwarded_messages",
            "Messages that the other side has taken",
            self.forwarded.clone(),
        );
        registry.register(
            "repeated_messages",
            "Messages that came again and were known",
            self.repeated.clone(),
        );
        registry.register(
            "in_flight_messages",
            "Messages on their way",
            self.in_flight.clone(),
        );
        registry.register_with_unit(
            "lag",
            "How long the oldest message of the rule has been on its way",
            Unit::Seconds,
            self.lag.clone(),
        );
        registry.register(
            "dropped_messages",
            "Messages that were not carried",
            self.dropped.clone(),
        );
    }
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn to_json(status: &RemoteStatus) -> Value {
    let dropped = |dropped: &std::collections::BTreeMap<crate::status::DropReason, u64>| -> Value {
        let dropped = dropped.iter();
        dropped
            .map(|(reason, count)| (reason.as_str().to_owned(), json!(count)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let queue = |queue: &QueueStatus| {
        json!({
            "messages": queue.messages,
            "bytes": queue.bytes,
            "limit": queue.limit,
            "lag_seconds": queue.lag.as_secs_f64(),
            "kept": queue.kept,
            "full": queue.full,
        })
    };
    let rules: Vec<Value> = status
        .rules
        .iter()
        .map(|rule| {
            json!({
                "rule": rule.rule,
                "forwarded_in": rule.forwarded_in,
                "forwarded_out": rule.forwarded_out,
                "repeated": rule.repeated,
                "in_flight": rule.in_flight,
                "lag_seconds": rule.lag.as_secs_f64(),
                "dropped": dropped(&rule.dropped),
                "last_error": rule.last_error,
            })
        })
        .collect();
    json!({
        "name": status.name,
        "connected": status.connected,
        "fabric_connected": status.fabric_connected,
        "ready": status.ready,
        "connections": status.connections,
        "last_error": status.last_error,
        "store_error": status.store_error,
        "dropped": dropped(&status.dropped),
        "inward": queue(&status.inward),
        "outward": queue(&status.outward),
        "rules": rules,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::mapping::{Direction, Rule};
    use crate::status::{DropReason, Record, Way};

    #[test]
    fn the_figures_of_a_remote_are_in_the_metrics() {
        let rules = [Rule::new(Direction::Both, "#", "a/", "b/").unwrap()];
        let record = Record::new("plant", &rules);
        record.connected();
        record.forwarded(0, Way::Out);
        record.dropped(Some(0), DropReason::Loop, None);
        record.dropped(None, DropReason::Unmapped, None);
        let mut status = record.snapshot();
        status.inward.bytes = 300;
        let text = encode(&[status]);
        for line in [
            r#"selvedge_bridge_connected{remote="plant"} 1"#,
            r#"selvedge_bridge_connections_total{remote="plant"} 1"#,
            r#"selvedge_bridge_queued_bytes{remote="plant",direction="in"} 300"#,
            r#"selvedge_bridge_forwarded_messages_total{remote="plant",rule="1",direction="out"} 1"#,
            r#"selvedge_bridge_dropped_messages_total{remote="plant",rule="1",reason="loop"} 1"#,
            r#"selvedge_bridge_dropped_messages_total{remote="plant",rule="0",reason="unmapped"} 1"#,
            r#"selvedge_bridge_lag_seconds{remote="plant",rule="1"} 0.0"#,
        ] {
            assert!(text.contains(line), "expected {line} in\n{text}");
        }
    }
}
