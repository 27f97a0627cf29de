//! What the harness asks of a load process, and what that answers: one JSON object each way.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One measurement, as a load process reads it from its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// What the server speaks.
    pub protocol: Protocol,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its process, whose CPU time and memory are read.
    pub server: u32,
    /// Folder of the authority; every client gets a certificate of its own from it.
    pub pki: PathBuf,
    /// Unique among the jobs of one server: part of topics and of the names of clients.
    pub run: String,
    /// What to measure.
    pub task: Task,
}

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// selvedge/1 over QUIC.
    Selvedge,
    /// The frames of selvedge/1 over QUIC, copied without being looked at.
    Relay,
    /// The text protocol of NATS over TLS.
    Nats,
    /// MQTT 3.1.1 over TLS.
    Mqtt,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Task {
    /// Messages from publishers to subscribers.
    Traffic(Traffic),
    /// Connections that do nothing but hold one subscription each.
    Idle {
        /// How many.
        connections: usize,
    },
    /// Requests that are answered.
    Calls(Calls),
}

/// Requests from one client, which another answers with as many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Calls {
    /// Requests on their way at any time.
    pub in_flight: usize,
    /// Bytes of a request and of its answer.
    pub size: usize,
    /// Time before anything is counted, in seconds.
    pub warm_up: f64,
    /// Time that is counted, in seconds.
    pub seconds: f64,
}

/// Messages from publishers to subscribers, in groups that have nothing to do with each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Publishers, each with a topic of its own.
    pub groups: usize,
    /// Subscribers of each topic.
    pub subscribers: usize,
    /// Bytes of a payload.
    pub size: usize,
    /// What is promised about a message.
    pub service: Service,
    /// When messages are sent.
    pub pace: Pace,
    /// Further connections with one subscription each, to which nothing is sent.
    pub idle_connections: usize,
    /// Further subscriptions with wildcards, which no message matches.
    pub idle_filters: usize,
    /// Time before anything is counted, in seconds.
    pub warm_up: f64,
    /// Time that is counted, in seconds.
    pub seconds: f64,
}

/// What is promised about a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Service {
    /// QoS 0.
    AtMostOnce,
    /// QoS 1 to sessions that end with their connections; an acknowledgement says "in memory".
    Memory,
    /// QoS 1 to sessions that are kept, so the store gets every message; an acknowledgement does
    /// not wait for it.
    Stored,
    /// QoS 1 to sessions that are kept; an acknowledgement says "on disk".
    Disk,
}

impl Service {
    /// Whether messages are acknowledged.
    pub fn acknowledged(self) -> bool {
        self != Self::AtMostOnce
    }

    /// Whether the sessions of subscribers outlive their connections.
    pub fn kept(self) -> bool {
        matches!(self, Self::Stored | Self::Disk)
    }
}

/// When messages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Pace {
    /// As fast as the slowest subscriber takes them, this many bytes of payload ahead of it.
    Closed {
        /// Bytes ahead, of each publisher.
        window: usize,
    },
    /// At fixed times, whatever becomes of them.
    Offered {
        /// Messages a second, of each publisher.
        rate: u32,
    },
}

/// What a load process writes to its standard output.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Messages delivered in the time that was counted, connections opened, or requests answered.
    pub count: u64,
    /// The time that was counted, in seconds.
    pub seconds: f64,
    /// CPU time of the server in it, in seconds.
    pub cpu_seconds: f64,
    /// Deliveries that never came, and acknowledgements.
    pub lost: u64,
    /// Memory of the server at the end, in KiB.
    pub rss_kib: u64,
    /// Time from the moment a message was due to its delivery, or from a request to its answer.
    pub latency: Option<Latency>,
    /// Growth of the server's memory for each connection, in KiB.
    pub idle_kib: Option<f64>,
}

/// Quantiles in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Half are faster.
    pub p50_us: f64,
    /// One in a hundred is slower.
    pub p99_us: f64,
    /// One in a thousand is slower.
    pub p999_us: f64,
}
