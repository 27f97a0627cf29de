//! Counters and gauges of a broker, in the Prometheus text format.

use std::sync::atomic::AtomicI64;
use std::time::SystemTime;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use selvedge_proto::status::Code;

/// One label named `reason`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// Why it happened.
    pub reason: &'static str,
}

/// One label named `verb`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VerbLabel {
    /// The verb of the policy that was refused.
    pub verb: &'static str,
}

/// One label named `limit`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LimitLabel {
    /// The key of the limit in the configuration.
    pub limit: &'static str,
}

/// Listener and reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ListenerReason {
    /// `quic`, `mqtt` or `mqtts`.
    pub listener: &'static str,
    /// Why it happened.
    pub reason: &'static str,
}

/// One label named `listener`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Listener {
    /// `quic`, `mqtt` or `mqtts`.
    pub listener: &'static str,
}

/// One label named `outcome`, a gRPC code name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// How it ended.
    pub outcome: &'static str,
}

/// Tier and outcome of an inference.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InferOutcome {
    /// `edge`, `cloud` or `none` when it was not placed.
    pub tier: &'static str,
    /// How it ended.
    pub outcome: &'static str,
}

/// How a hedge ended, as a metrics label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HedgeOutcome {
    /// `won` when the second worker answered, `lost` when the first did after all, `none` when nobody did.
    pub outcome: &'static str,
}

/// A tier, as a metrics label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TierLabel {
    /// `edge` or `cloud`.
    pub tier: &'static str,
}

/// Times of inferences, by tier, in seconds.
pub type Times = Family<TierLabel, Histogram, fn() -> Histogram>;

/// From a tenth of a millisecond to some 50 s, each bound twice the one before.
fn times() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 20))
}

/// Everything a broker counts. Reading or adding takes no lock but for labels seen first.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Connections now, by listener.
    pub connections: Family<Listener, Gauge<i64, AtomicI64>>,
    /// Connections accepted so far, by listener.
    pub accepted: Family<Listener, Counter>,
    /// Connections refused before they were sessions, by listener and reason.
    pub refused: Family<ListenerReason, Counter>,
    /// Connections ended because their certificate was withdrawn, by listener and reason.
    pub evicted: Family<ListenerReason, Counter>,
    /// When the first of the revocation lists should be renewed, in seconds since 1970; zero without
    /// any.
    pub list_renewal: Gauge,
    /// Peers that broke a protocol, by listener and kind.
    pub protocol_errors: Family<ListenerReason, Counter>,
    /// Sessions kept now, connected or not.
    pub sessions: Gauge,
    /// Subscriptions now.
    pub subscriptions: Gauge,
    /// Messages kept for new subscribers now.
    pub retained: Gauge,
    /// Messages in the history of topics now.
    pub history_messages: Gauge,
    /// Memory of the history of topics now.
    pub history_bytes: Gauge,
    /// Messages that the history did not keep, or that a replay did not send, by reason.
    pub history_left_out: Family<Reason, Counter>,
    /// Messages received from publishers.
    pub messages_in: Counter,
    /// Payload bytes received from publishers, with their frames.
    pub bytes_in: Counter,
    /// Messages handed to receivers' lanes.
    pub messages_out: Counter,
    /// Bytes handed to receivers' lanes.
    pub bytes_out: Counter,
    /// QoS 1 messages acknowledged to publishers.
    pub acknowledged: Counter,
    /// Messages given up, by reason.
    pub dropped: Family<Reason, Counter>,
    /// Of `dropped`, for the hot path: the queue was full.
    pub dropped_overflow: Counter,
    /// Of `dropped`, for the hot path: QoS 0 for a receiver that is offline.
    pub dropped_offline: Counter,
    /// Of `dropped`, for the hot path: past their expiry.
    pub dropped_expired: Counter,
    /// Of `dropped`: the session ended with messages waiting.
    pub dropped_session_ended: Counter,
    /// Requests refused by policy, by verb.
    pub denied: Family<VerbLabel, Counter>,
    /// What was refused or given up because an identity or a tenant uses as much as it may, by limit.
    pub limit_reached: Family<LimitLabel, Counter>,
    /// Calls, by outcome.
    pub calls: Family<Outcome, Counter>,
    /// Calls and inferences in progress.
    pub calls_in_flight: Gauge,
    /// Inferences, by tier and outcome.
    pub inferences: Family<InferOutcome, Counter>,
    /// Edge answers given up for a cloud answer.
    pub escalations: Counter,
    /// Inferences that a second worker was asked for while the first did not answer, by outcome.
    pub hedges: Family<HedgeOutcome, Counter>,
    /// Answers that went on at another worker when theirs was lost.
    pub continuations: Counter,
    /// How long inferences waited for a worker's slot.
    pub slot_wait: Times,
    /// What the fabric added to an answer: its time less what the worker queued and computed.
    pub overhead: Times,
    /// Time from a request to the first frame of its answer.
    pub first_answer: Times,
    /// Inferences that wait for a slot now.
    pub waiting_inferences: Gauge,
    /// Workers that were given no more requests of a model for a while because they failed.
    pub ejections: Counter,
    /// Inferences refused because no worker within the residency bound exists.
    pub privacy_refusals: Counter,
    /// Commits of the store, each with one fsync.
    pub store_commits: Counter,
    /// Commits of the store that failed.
    pub store_errors: Counter,
    /// One while the store cannot write, else zero.
    pub store_failing: Gauge,
    /// Records of the store that could not be restored at the start.
    pub store_left_out: Counter,
    /// Tasks that panicked; each is a bug.
    pub panics: Counter,
}

fn register_times(registry: &mut Registry, name: &str, help: &str) -> Times {
    let metric = Times::new_with_constructor(times);
    registry.register(name, help, metric.clone());
    metric
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("selvedge");
        macro_rules! register {
            ($name:literal, $help:literal) => {{
                let metric = Default::default();
                registry.register($name, $help, Clone::clone(&metric));
                metric
            }};
        }
        let dropped: Family<Reason, Counter> =
            register!("dropped_messages", "Messages given up, by reason");
        let reason = |reason| dropped.get_or_create_owned(&Reason { reason });
        Self {
            connections: register!("connections", "Connections now"),
            accepted: register!("accepted_connections", "Connections accepted"),
            refused: register!("refused_connections", "Connections refused, by reason"),
            evicted: register!(
                "evicted_connections",
                "Connections ended for their certificate, by reason"
            ),
            list_renewal: register!(
                "revocation_list_next_update_seconds",
                "Time by which a revocation list should be renewed"
            ),
            protocol_errors: register!("protocol_errors", "Peers that broke a protocol"),
            sessions: register!("sessions", "Sessions kept now"),
            subscriptions: register!("subscriptions", "Subscriptions now"),
            retained: register!("retained_messages", "Retained messages now"),
            history_messages: register!(
                "history_messages",
                "Messages in the history of topics now"
            ),
            history_bytes: register!("history_bytes", "Memory of the history of topics now"),
            history_left_out: register!(
                "history_left_out",
                "Messages that the history did not keep or a replay did not send, by reason"
            ),
            messages_in: register!("messages_in", "Messages received from publishers"),
            bytes_in: register!("bytes_in", "Bytes received from publishers"),
            messages_out: register!("messages_out", "Messages handed to receivers"),
            bytes_out: register!("bytes_out", "Bytes handed to receivers"),
            acknowledged: register!(
                "acknowledged_messages",
                "QoS 1 messages acknowledged to publishers"
            ),
            dropped_overflow: reason("queue_full"),
            dropped_offline: reason("offline"),
            dropped_expired: reason("expired"),
            dropped_session_ended: reason("session_ended"),
            dropped,
            denied: register!("denied_requests", "Requests refused by policy"),
            limit_reached: register!(
                "limit_reached",
                "Refused or given up for a limit of an identity or a tenant"
            ),
            calls: register!("calls", "Calls, by outcome"),
            calls_in_flight: register!("calls_in_flight", "Calls and inferences in progress"),
            inferences: register!("inferences", "Inferences, by tier and outcome"),
            escalations: register!("escalations", "Edge answers given up for a cloud answer"),
            hedges: register!(
                "hedges",
                "Inferences given to a second worker while the first did not answer"
            ),
            continuations: register!(
                "continuations",
                "Answers that went on at another worker when theirs was lost"
            ),
            slot_wait: register_times(
                &mut registry,
                "inference_slot_wait_seconds",
                "Time that inferences waited for a slot",
            ),
            overhead: register_times(
                &mut registry,
                "inference_overhead_seconds",
                "Time of answers less what the worker queued and computed",
            ),
            first_answer: register_times(
                &mut registry,
                "inference_first_answer_seconds",
                "Time from request to the first frame of the answer",
            ),
            waiting_inferences: register!(
                "waiting_inferences",
                "Inferences that wait for a slot now"
            ),
            ejections: register!(
                "ejections",
                "Workers given no requests for a while for their failures"
            ),
            privacy_refusals: register!(
                "privacy_refusals",
                "Inferences refused for their residency"
            ),
            store_commits: register!("store_commits", "Commits of the store, each with one fsync"),
            store_errors: register!("store_errors", "Commits of the store that failed"),
            store_failing: register!("store_failing", "Whether the store cannot write now"),
            store_left_out: register!(
                "store_left_out",
                "Records of the store that could not be restored"
            ),
            panics: register!("panics", "Tasks that panicked"),
            registry,
        }
    }
}

impl Metrics {
    /// The metrics in the Prometheus text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }

    /// Counts a message given up.
    pub fn drop_messages(&self, reason: &'static str, count: u64) {
        if count > 0 {
            self.dropped.get_or_create(&Reason { reason }).inc_by(count);
        }
    }

    /// Counts a request refused by policy.
    pub fn deny(&self, verb: &'static str) {
        self.denied.get_or_create(&VerbLabel { verb }).inc();
    }

    /// The counter of what one limit has stopped.
    pub fn limit_reached(&self, limit: &'static str) -> Counter {
        self.limit_reached
            .get_or_create_owned(&LimitLabel { limit })
    }

    /// Counts a connection refused before it was a session.
    pub fn refuse(&self, listener: &'static str, reason: &'static str) {
        self.refused
            .get_or_create(&ListenerReason { listener, reason })
            .inc();
    }

    /// Shows when the first of the revocation lists should be renewed.
    pub fn renew_lists_by(&self, time: Option<SystemTime>) {
        let seconds = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let seconds = seconds.unwrap_or_default().as_secs();
        self.list_renewal
            .set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// Counts a connection that was ended for its certificate.
    pub fn evict(&self, listener: &'static str, reason: &'static str) {
        self.evicted
            .get_or_create(&ListenerReason { listener, reason })
            .inc();
    }

    /// Counts a peer that broke the protocol of a listener.
    pub fn protocol_error(&self, listener: &'static str, reason: &'static str) {
        self.protocol_errors
            .get_or_create(&ListenerReason { listener, reason })
            .inc();
    }

    /// Counts a call's end.
    pub fn call_ended(&self, code: Code) {
        self.calls
            .get_or_create(&Outcome {
                outcome: code.as_str(),
            })
            .inc();
    }

    /// Counts how a hedge ended.
    pub fn hedge_ended(&self, outcome: &'static str) {
        self.hedges.get_or_create(&HedgeOutcome { outcome }).inc();
    }

    /// Counts an inference's end.
    pub fn inference_ended(&self, tier: &'static str, code: Code) {
        self.inferences
            .get_or_create(&InferOutcome {
                tier,
                outcome: code.as_str(),
            })
            .inc();
    }

    /// Counts a connection for as long as the guard lives.
    pub fn connected(&self, listener: &'static str) -> ConnectedGuard {
        let label = Listener { listener };
        self.accepted.get_or_create(&label).inc();
        let gauge = self.connections.get_or_create_owned(&label);
        gauge.inc();
        ConnectedGuard { gauge }
    }
}

/// Counts one connection down when dropped.
#[derive(Debug)]
pub struct ConnectedGuard {
    gauge: Gauge<i64, AtomicI64>,
}

impl Drop for ConnectedGuard {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}
