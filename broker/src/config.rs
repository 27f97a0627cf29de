//! The configuration file `broker.toml`, checked whole before a port opens.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use selvedge_certs::{Credentials, Identity, TrustAnchors};
use selvedge_proto::topic::{TopicFilter, TopicName};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::front::token::Tokens;
use crate::history::HistoryRule;
use crate::mqtt::password::Passwords;
use crate::mqtt::proxy::{Network, TrustedProxies};
use crate::mqtt::settings::{DeniedSubscription, ServerReference, Settings};
use crate::mqtt::websocket::Origins;
use crate::policy::{IdentityPattern, Policy};
use crate::quota::rate;

/// A checked configuration: what [`crate::Server::bind`] needs, with every file read.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the broker, for people and hop lists.
    pub name: String,
    /// Certificate and key of the broker.
    pub credentials: Credentials,
    /// Authorities whose clients are let in, and what they have withdrawn.
    pub trust: TrustAnchors,
    /// Who may do what.
    pub policy: Policy,
    /// Address of the native listener.
    pub quic: Option<SocketAddr>,
    /// MQTT listeners.
    pub mqtt: MqttConfig,
    /// The front door: inference over gRPC and HTTP.
    pub front: FrontConfig,
    /// Address of the admin listener.
    pub admin: Option<SocketAddr>,
    /// Where sessions, their queues and retained messages outlive the process.
    pub store: Option<StoreConfig>,
    /// Topics that keep history for replays.
    pub history: Vec<HistoryRule>,
    /// Bounds.
    pub limits: Limits,
}

/// The store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// Its folder, made if need be. One broker at a time may have it open.
    pub folder: PathBuf,
    /// What an acknowledgement means when the publisher does not say.
    pub durability: DurabilityRules,
}

/// What the acknowledgement of a QoS 1 message to a kept session means when the publisher does not
/// say, by topic: that it is on disk, or only that it is in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DurabilityRules {
    /// For topics that no rule names.
    pub on_disk: bool,
    /// Of several that match, the first decides.
    pub rules: Vec<(TopicFilter, bool)>,
}

impl DurabilityRules {
    /// The same for every topic.
    pub fn all(on_disk: bool) -> Self {
        Self {
            on_disk,
            rules: Vec::new(),
        }
    }

    /// Whether an acknowledgement on this topic waits for the disk.
    pub fn on_disk(&self, topic: &TopicName) -> bool {
        self.rules
            .iter()
            .find(|(filter, _)| filter.matches(topic))
            .map_or(self.on_disk, |(_, on_disk)| *on_disk)
    }
}

/// The front door: inference for applications without a native client. Who asks proves with a client
/// certificate or a bearer token who it is.
#[derive(Debug, Clone, Default)]
pub struct FrontConfig {
    /// Address of the Open Inference Protocol over gRPC, with TLS.
    pub grpc: Option<SocketAddr>,
    /// Address of the Open Inference Protocol and the OpenAI API over HTTP, with TLS.
    pub http: Option<SocketAddr>,
    /// As `grpc`, in the clear.
    pub danger_plaintext_grpc: Option<SocketAddr>,
    /// As `http`, in the clear.
    pub danger_plaintext_http: Option<SocketAddr>,
    /// Bearer tokens; without any, a client certificate is required.
    pub tokens: Option<Tokens>,
}

/// The MQTT listeners.
#[derive(Debug, Clone, Default)]
pub struct MqttConfig {
    /// Address of the TLS listener.
    pub tls: Option<SocketAddr>,
    /// Users with passwords; without any, a client certificate is required.
    pub passwords: Option<Passwords>,
    /// Address of the plaintext listener and the identity of everyone on it.
    pub danger_plaintext: Option<(SocketAddr, Identity)>,
    /// Address of the listener for WebSockets over TLS. Clients prove who they are as on `tls`.
    pub wss: Option<SocketAddr>,
    /// Address of the listener for WebSockets without TLS and the identity of everyone on it.
    pub danger_ws: Option<(SocketAddr, Identity)>,
    /// Web pages that may open a WebSocket.
    pub origins: Origins,
    /// Whether the QUIC listener takes MQTT clients, too.
    pub quic: bool,
    /// Listeners behind load balancers.
    pub proxies: MqttProxies,
    /// The protocol itself.
    pub settings: Settings,
}

/// Load balancers before the MQTT listeners. Where there are any, every connection has to come from
/// one of them and begin with a PROXY protocol header.
#[derive(Debug, Clone, Default)]
pub struct MqttProxies {
    /// Before `mqtt.tls`.
    pub tls: Option<TrustedProxies>,
    /// Before `mqtt.wss`.
    pub wss: Option<TrustedProxies>,
    /// Before `mqtt.danger_plaintext`.
    pub danger_plaintext: Option<TrustedProxies>,
    /// Before `mqtt.danger_ws`.
    pub danger_ws: Option<TrustedProxies>,
}

/// Bounds on what peers may use. Each has a default that suits a small server.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest message, in bytes. Default 16 MiB.
    pub max_frame_bytes: usize,
    /// Largest UDP payload of QUIC, in bytes: what is tried on a path, and what clients may send. A path
    /// with a smaller MTU is found out. Default 6,550, which is also the most.
    pub packet_bytes: u16,
    /// Largest alias on a publish lane. Default 4,096.
    pub aliases_per_lane: u32,
    /// Connections at once, all listeners together. Default 100,000.
    pub connections: usize,
    /// Handshakes in progress beyond which a QUIC client must prove its address. Default 64.
    pub handshakes_before_retry: usize,
    /// Time for handshake and first frame. Default 10 s.
    #[serde(with = "duration")]
    pub handshake_timeout: Duration,
    /// Time without a sign of life after which a connection is lost. Default 15 s.
    #[serde(with = "duration")]
    pub idle_timeout: Duration,
    /// Subscriptions of one session. Default 10,000.
    pub subscriptions_per_session: usize,
    /// Services and models registered by one connection. Default 1,000.
    pub registrations_per_session: usize,
    /// Calls and inferences in progress of one connection, each way. Default 1,024.
    pub calls_per_connection: u32,
    /// Bytes waiting in one queue of a session, there are three for its classes. Default 16 MiB.
    pub queue_bytes: usize,
    /// QoS 1 bytes sent on a lane and not yet acknowledged. Default 4 MiB.
    pub inflight_bytes: usize,
    /// Longest time a session is kept without a connection. Default 7 days.
    #[serde(with = "duration")]
    pub session_expiry: Duration,
    /// Retained messages of a tenant. Default 1,000,000.
    pub retained_messages: usize,
    /// Bytes of the retained messages of a tenant. Default 256 MiB.
    pub retained_bytes: usize,
    /// How long a message id is remembered, so that the same message is taken once. Default 10 min.
    #[serde(with = "duration")]
    pub dedup_window: Duration,
    /// Message ids remembered, of a tenant; beyond it the oldest are forgotten sooner. Default
    /// 100,000.
    pub dedup_ids: usize,
    /// How long a call waits for a responder that was just lost, or after a start for one that
    /// was not seen yet. Default 5 s.
    #[serde(with = "duration")]
    pub resume_grace: Duration,
    /// Deadline of a call or inference that names none. Default 30 s.
    #[serde(with = "duration")]
    pub default_deadline: Duration,
    /// Inferences that wait for a slot, per model. Default 1,024.
    pub waiting_per_model: usize,
    /// Largest request that can be escalated, in bytes. Default 1 MiB.
    pub cascade_bytes: usize,
    /// Of each tenant, all its identities together.
    pub tenant: TenantLimits,
    /// Of each identity, all its sessions together.
    pub identity: IdentityLimits,
    /// What some identities may use instead; of several that name one, the first decides.
    #[serde(rename = "override")]
    pub overrides: Vec<LimitOverride>,
}

/// What the identities of one tenant may use together. What is left out is not limited.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TenantLimits {
    /// Connections at once.
    pub connections: Option<usize>,
    /// Subscriptions of all sessions, connected or kept.
    pub subscriptions: Option<usize>,
    /// Bytes in all queues of its sessions, connected or kept.
    pub queue_bytes: Option<usize>,
    /// Messages published in a second; after a pause, so many at once.
    pub publish_rate: Option<usize>,
}

/// What one identity may use, all its sessions together. What is left out is not limited but by what
/// holds for everyone.
#[derive(Debug, Clone, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct IdentityLimits {
    /// Connections at once. One that takes over a session has the place of the one before.
    pub connections: Option<usize>,
    /// Subscriptions of all sessions, connected or kept.
    pub subscriptions: Option<usize>,
    /// Largest message, and largest MQTT packet, in bytes; at most [`Limits::max_frame_bytes`].
    pub message_bytes: Option<usize>,
    /// Messages published in a second; after a pause, so many at once.
    pub publish_rate: Option<usize>,
    /// Bytes in all queues of its sessions, connected or kept.
    pub queue_bytes: Option<usize>,
    /// QoS 1 bytes sent on one lane and not yet acknowledged; at most [`Limits::inflight_bytes`].
    pub inflight_bytes: Option<usize>,
}

/// What some identities may use instead of what [`Limits::identity`] says.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(from = "OverrideTable")]
pub struct LimitOverride {
    /// Whom it names.
    pub identities: Vec<IdentityPattern>,
    /// What is set here holds instead.
    pub limits: IdentityLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_frame_bytes: selvedge_proto::DEFAULT_MAX_FRAME,
            packet_bytes: selvedge_proto::MAX_UDP_PAYLOAD,
            aliases_per_lane: 4096,
            connections: 100_000,
            handshakes_before_retry: 64,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(15),
            subscriptions_per_session: 10_000,
            registrations_per_session: 1_000,
            calls_per_connection: 1_024,
            queue_bytes: 16 << 20,
            inflight_bytes: 4 << 20,
            session_expiry: Duration::from_secs(7 * 24 * 3600),
            retained_messages: 1_000_000,
            retained_bytes: 256 << 20,
            dedup_window: Duration::from_secs(600),
            dedup_ids: 100_000,
            resume_grace: Duration::from_secs(5),
            default_deadline: Duration::from_secs(30),
            waiting_per_model: 1_024,
            cascade_bytes: 1 << 20,
            tenant: TenantLimits::default(),
            identity: IdentityLimits::default(),
            overrides: Vec::new(),
        }
    }
}

impl Config {
    /// A configuration with one native listener on a free loopback port and default limits.
    pub fn new(credentials: Credentials, trust: TrustAnchors, policy: Policy) -> Self {
        Self {
            name: credentials.identity().name().to_owned(),
            credentials,
            trust,
            policy,
            quic: Some(([127, 0, 0, 1], 0).into()),
            mqtt: MqttConfig::default(),
            front: FrontConfig::default(),
            admin: None,
            store: None,
            history: Vec::new(),
            limits: Limits::default(),
        }
    }

    /// Reads `broker.toml` and every file it names. Paths in it are relative to its folder.
    ///
    /// # Errors
    /// Every problem found, not only the first.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigErrors(vec![ConfigProblem::new(
                path.display().to_string(),
                format!("cannot be read: {error}"),
            )])
        })?;
        Self::parse(&text, path.parent().unwrap_or(Path::new(".")))
    }

    /// As [`Self::load`], from text; `base` is the folder that relative paths start from.
    ///
    /// # Errors
    /// Every problem found, not only the first.
    pub fn parse(text: &str, base: &Path) -> Result<Self, ConfigErrors> {
        let file: File = toml::from_str(text)
            .map_err(|error| ConfigErrors(vec![ConfigProblem::new("file", error.to_string())]))?;
        let mut problems = Vec::new();
        let at = |path: &Path| base.join(path);

        let cert = at(&file.identity.cert);
        let key = at(&file.identity.key);
        let credentials = keep(
            &mut problems,
            "identity.cert, identity.key",
            Credentials::from_files(&cert, &key),
        );
        let trust = keep(
            &mut problems,
            "identity.trust",
            TrustAnchors::from_file(&at(&file.identity.trust)),
        );
        // Without authorities there is nobody whose list it could be.
        let trust = match (trust, &file.identity.crl) {
            (Some(trust), Some(crl)) => keep(
                &mut problems,
                "identity.crl",
                trust.with_revocations_of_file(&at(crl)),
            ),
            (trust, _) => trust,
        };
        let policy = keep(
            &mut problems,
            "policy.file",
            Policy::load(at(&file.policy.file)),
        );
        let quic = address(&mut problems, "listen.quic", file.listen.quic.as_deref());
        let admin = address(&mut problems, "admin.listen", file.admin.listen.as_deref());
        let tls = address(&mut problems, "mqtt.tls", file.mqtt.tls.as_deref());
        let plaintext = address(
            &mut problems,
            "mqtt.danger_plaintext",
            file.mqtt.danger_plaintext.as_deref(),
        );
        let wss = address(&mut problems, "mqtt.wss", file.mqtt.wss.as_deref());
        let ws = file.mqtt.danger_ws.as_deref();
        let ws = address(&mut problems, "mqtt.danger_ws", ws);
        let origins = keep(
            &mut problems,
            "mqtt.origins",
            Origins::parse(&file.mqtt.origins),
        );
        let proxies = file.mqtt.proxies(&mut problems);
        let settings = mqtt_settings(&file.mqtt, &mut problems);
        let passwords = file
            .mqtt
            .passwords
            .as_ref()
            .and_then(|path| keep(&mut problems, "mqtt.passwords", Passwords::load(&at(path))));
        let fixed = file
            .mqtt
            .danger_plaintext_identity
            .as_ref()
            .and_then(|uri| {
                keep(
                    &mut problems,
                    "mqtt.danger_plaintext_identity",
                    uri.parse::<Identity>(),
                )
            });
        let in_the_clear = file.mqtt.danger_plaintext.is_some() || file.mqtt.danger_ws.is_some();
        match &file.mqtt.danger_plaintext_identity {
            None if in_the_clear => problems.push(ConfigProblem::new(
                "mqtt.danger_plaintext_identity",
                "missing: expected the identity of everyone on the plaintext listener, \
                 spiffe://<trust-domain>/<tenant>/<site>/<name>",
            )),
            Some(_) if !in_the_clear => problems.push(ConfigProblem::new(
                "mqtt.danger_plaintext_identity",
                "given without mqtt.danger_plaintext or mqtt.danger_ws: add an address or take \
                 this out",
            )),
            _ => {}
        }
        let danger_plaintext = plaintext.zip(fixed.clone());
        let danger_ws = ws.zip(fixed);
        let with_websocket = file.mqtt.wss.is_some() || file.mqtt.danger_ws.is_some();
        if !file.mqtt.origins.is_empty() && !with_websocket {
            problems.push(ConfigProblem::new(
                "mqtt.origins",
                "given without mqtt.wss or mqtt.danger_ws: only web pages have origins",
            ));
        }
        if file.mqtt.quic && file.listen.quic.is_none() {
            problems.push(ConfigProblem::new(
                "mqtt.quic",
                "given without listen.quic: MQTT clients share that listener with native ones",
            ));
        }
        let with_tls = file.mqtt.tls.is_some() || file.mqtt.wss.is_some();
        if file.mqtt.passwords.is_some() && !with_tls {
            problems.push(ConfigProblem::new(
                "mqtt.passwords",
                "given without mqtt.tls or mqtt.wss: passwords are only taken over TLS",
            ));
        }
        if file.listen.quic.is_none() && !with_tls && !in_the_clear {
            problems.push(ConfigProblem::new(
                "listen.quic",
                "missing: expected at least one listener",
            ));
        }
        let front = file.front.check(&mut problems, base);
        file.limits.check(&mut problems);
        let store = file.store.map(|store| {
            let default = store.durability.as_deref().unwrap_or("disk");
            let mut durability = DurabilityRules::all(
                on_disk(&mut problems, "store.durability", default).unwrap_or_default(),
            );
            for rule in &store.topics {
                let filter = keep(
                    &mut problems,
                    "store.topics.filter",
                    TopicFilter::parse(rule.filter.as_str()),
                );
                let sync = on_disk(&mut problems, "store.topics.durability", &rule.durability);
                durability.rules.extend(filter.zip(sync));
            }
            StoreConfig {
                folder: at(&store.folder),
                durability,
            }
        });
        let mut history = Vec::new();
        for rule in &file.history {
            let filter = keep(
                &mut problems,
                "history.filter",
                TopicFilter::parse(rule.filter.as_str()),
            );
            if rule.messages == 0 || rule.age.is_zero() || rule.bytes == 0 {
                problems.push(ConfigProblem::new(
                    "history",
                    format!(
                        "{:?} keeps nothing: expected messages, age and bytes above zero",
                        rule.filter
                    ),
                ));
            }
            history.extend(filter.map(|filter| HistoryRule {
                filter,
                messages: rule.messages,
                age: rule.age,
                bytes: rule.bytes,
            }));
        }

        match (credentials, trust, policy) {
            (Some(credentials), Some(trust), Some(policy)) if problems.is_empty() => Ok(Self {
                name: file
                    .identity
                    .broker_name
                    .unwrap_or_else(|| credentials.identity().name().to_owned()),
                credentials,
                trust,
                policy,
                quic,
                mqtt: MqttConfig {
                    tls,
                    passwords,
                    danger_plaintext,
                    wss,
                    danger_ws,
                    origins: origins.unwrap_or_default(),
                    quic: file.mqtt.quic,
                    proxies,
                    settings,
                },
                front,
                admin,
                store,
                history,
                limits: file.limits,
            }),
            _ => Err(ConfigErrors(problems)),
        }
    }
}

impl IdentityLimits {
    /// These, and those of `other` where nothing is set here.
    fn or(&self, other: &Self) -> Self {
        Self {
            connections: self.connections.or(other.connections),
            subscriptions: self.subscriptions.or(other.subscriptions),
            message_bytes: self.message_bytes.or(other.message_bytes),
            publish_rate: self.publish_rate.or(other.publish_rate),
            queue_bytes: self.queue_bytes.or(other.queue_bytes),
            inflight_bytes: self.inflight_bytes.or(other.inflight_bytes),
        }
    }
}

impl Limits {
    /// What one identity may use.
    pub fn of_identity(&self, identity: &Identity) -> IdentityLimits {
        let named = |special: &&LimitOverride| {
            let mut patterns = special.identities.iter();
            patterns.any(|pattern| pattern.matches(identity))
        };
        match self.overrides.iter().find(named) {
            Some(special) => special.limits.or(&self.identity),
            None => self.identity.clone(),
        }
    }

    fn check(&self, problems: &mut Vec<ConfigProblem>) {
        let mut bound = |key: &str, value: usize, least: usize, most: usize| {
            if !(least..=most).contains(&value) {
                problems.push(ConfigProblem::new(
                    format!("limits.{key}"),
                    format!("{value} is out of range: expected {least} to {most}"),
                ));
            }
        };
        bound(
            "max_frame_bytes",
            self.max_frame_bytes,
            selvedge_proto::MIN_MAX_FRAME,
            selvedge_proto::frame::MAX_FRAME,
        );
        bound(
            "aliases_per_lane",
            self.aliases_per_lane as usize,
            1,
            1 << 20,
        );
        bound(
            "packet_bytes",
            self.packet_bytes.into(),
            selvedge_proto::MIN_UDP_PAYLOAD.into(),
            selvedge_proto::MAX_UDP_PAYLOAD.into(),
        );
        bound("connections", self.connections, 1, 10_000_000);
        bound(
            "subscriptions_per_session",
            self.subscriptions_per_session,
            1,
            10_000_000,
        );
        bound(
            "registrations_per_session",
            self.registrations_per_session,
            1,
            1_000_000,
        );
        bound(
            "calls_per_connection",
            self.calls_per_connection as usize,
            1,
            1 << 20,
        );
        bound("queue_bytes", self.queue_bytes, 1024, usize::MAX);
        bound("inflight_bytes", self.inflight_bytes, 1024, usize::MAX);
        bound("cascade_bytes", self.cascade_bytes, 0, 1 << 30);
        bound("dedup_ids", self.dedup_ids, 1, 100_000_000);
        let mut optional = |table: &str, key: &str, value: Option<usize>, least, most| {
            if let Some(value) = value {
                bound(&format!("{table}.{key}"), value, least, most);
            }
        };
        let frame = selvedge_proto::MIN_MAX_FRAME;
        let TenantLimits {
            connections,
            subscriptions,
            queue_bytes,
            publish_rate,
        } = self.tenant;
        optional("tenant", "connections", connections, 1, usize::MAX);
        optional("tenant", "subscriptions", subscriptions, 1, usize::MAX);
        optional("tenant", "queue_bytes", queue_bytes, frame, usize::MAX);
        optional("tenant", "publish_rate", publish_rate, 1, rate::FASTEST);
        let numbered = self.overrides.iter().enumerate();
        let special = numbered.map(|(at, special)| (format!("override[{at}]"), &special.limits));
        let everyone = std::iter::once(("identity".to_owned(), &self.identity));
        for (table, limits) in everyone.chain(special) {
            let table = table.as_str();
            let (message, inflight) = (self.max_frame_bytes, self.inflight_bytes);
            optional(table, "connections", limits.connections, 1, usize::MAX);
            optional(table, "subscriptions", limits.subscriptions, 1, usize::MAX);
            optional(table, "message_bytes", limits.message_bytes, frame, message);
            optional(table, "publish_rate", limits.publish_rate, 1, rate::FASTEST);
            optional(table, "queue_bytes", limits.queue_bytes, frame, usize::MAX);
            optional(
                table,
                "inflight_bytes",
                limits.inflight_bytes,
                1024,
                inflight,
            );
        }
        let mut span = |key: &str, value: Duration, least: Duration, most: Duration| {
            let ms =
                |duration: Duration| usize::try_from(duration.as_millis()).unwrap_or(usize::MAX);
            bound(&format!("{key} (in ms)"), ms(value), ms(least), ms(most));
        };
        let second = Duration::from_secs(1);
        let hour = second * 3600;
        span(
            "handshake_timeout",
            self.handshake_timeout,
            second / 10,
            second * 600,
        );
        span("idle_timeout", self.idle_timeout, second, hour);
        span("resume_grace", self.resume_grace, Duration::ZERO, hour);
        span(
            "default_deadline",
            self.default_deadline,
            second / 1000,
            hour * 24,
        );
        span("dedup_window", self.dedup_window, second, hour * 24 * 7);
        span(
            "session_expiry",
            self.session_expiry,
            Duration::ZERO,
            hour * 24 * 365 * 100,
        );
        for (at, special) in self.overrides.iter().enumerate() {
            if special.identities.is_empty() {
                problems.push(ConfigProblem::new(
                    format!("limits.override[{at}].identities"),
                    "names nobody: expected patterns of identities",
                ));
            }
        }
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigProblem>);

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The key, with its table.
    pub key: String,
    /// What was found, what was expected.
    pub problem: String,
}

impl ConfigProblem {
    fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{}: {}", problem.key, problem.problem)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

fn keep<T, E: std::error::Error>(
    problems: &mut Vec<ConfigProblem>,
    key: &str,
    result: Result<T, E>,
) -> Option<T> {
    result
        .map_err(|error| {
            let mut message = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                let text = cause.to_string();
                if !message.contains(&text) {
                    message = format!("{message}: {text}");
                }
                source = cause.source();
            }
            problems.push(ConfigProblem::new(key, message));
        })
        .ok()
}

fn on_disk(problems: &mut Vec<ConfigProblem>, key: &str, word: &str) -> Option<bool> {
    match word {
        "disk" => Some(true),
        "memory" => Some(false),
        other => {
            problems.push(ConfigProblem::new(
                key,
                format!("{other:?} is no durability: expected disk or memory"),
            ));
            None
        }
    }
}

fn address(
    problems: &mut Vec<ConfigProblem>,
    key: &str,
    value: Option<&str>,
) -> Option<SocketAddr> {
    let value = value?;
    value
        .parse()
        .map_err(|_| {
            problems.push(ConfigProblem::new(
                key,
                format!(
                    "{value:?} is no address: expected ip:port, such as 0.0.0.0:7443 or [::]:7443"
                ),
            ));
        })
        .ok()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    identity: IdentityTable,
    policy: PolicyTable,
    #[serde(default)]
    listen: ListenTable,
    #[serde(default)]
    mqtt: MqttTable,
    #[serde(default)]
    front: FrontTable,
    #[serde(default)]
    admin: AdminTable,
    store: Option<StoreTable>,
    #[serde(default)]
    history: Vec<HistoryTable>,
    #[serde(default)]
    limits: Limits,
}

/// [`LimitOverride`] as it is written: the limits beside the patterns.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OverrideTable {
    #[serde(deserialize_with = "patterns")]
    identities: Vec<IdentityPattern>,
    connections: Option<usize>,
    subscriptions: Option<usize>,
    message_bytes: Option<usize>,
    publish_rate: Option<usize>,
    queue_bytes: Option<usize>,
    inflight_bytes: Option<usize>,
}

impl From<OverrideTable> for LimitOverride {
    fn from(table: OverrideTable) -> Self {
        Self {
            identities: table.identities,
            limits: IdentityLimits {
                connections: table.connections,
                subscriptions: table.subscriptions,
                message_bytes: table.message_bytes,
                publish_rate: table.publish_rate,
                queue_bytes: table.queue_bytes,
                inflight_bytes: table.inflight_bytes,
            },
        }
    }
}

/// Patterns of identities, or everything that is wrong with them.
fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IdentityPattern>, D::Error> {
    let mut wrong = Vec::new();
    let mut parsed = Vec::new();
    for text in Vec::<String>::deserialize(deserializer)? {
        match IdentityPattern::parse(&text) {
            Ok(pattern) => parsed.push(pattern),
            Err(error) => wrong.push(format!("{text:?}: {error}")),
        }
    }
    if wrong.is_empty() {
        Ok(parsed)
    } else {
        Err(D::Error::custom(wrong.join("; ")))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreTable {
    folder: PathBuf,
    durability: Option<String>,
    #[serde(default)]
    topics: Vec<TopicDurability>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TopicDurability {
    filter: String,
    durability: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HistoryTable {
    filter: String,
    #[serde(default = "history_messages")]
    messages: usize,
    #[serde(default = "history_age", with = "duration")]
    age: Duration,
    #[serde(default = "history_bytes")]
    bytes: usize,
}

fn history_messages() -> usize {
    1_000
}

fn history_age() -> Duration {
    Duration::from_secs(24 * 3600)
}

fn history_bytes() -> usize {
    64 << 20
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityTable {
    cert: PathBuf,
    key: PathBuf,
    trust: PathBuf,
    crl: Option<PathBuf>,
    broker_name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyTable {
    file: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenTable {
    quic: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MqttTable {
    tls: Option<String>,
    passwords: Option<PathBuf>,
    danger_plaintext: Option<String>,
    danger_plaintext_identity: Option<String>,
    wss: Option<String>,
    danger_ws: Option<String>,
    #[serde(default)]
    origins: Vec<String>,
    #[serde(default)]
    quic: bool,
    #[serde(default)]
    proxy_protocol: Vec<ProxyTable>,
    receive_maximum: Option<u16>,
    topic_alias_maximum: Option<u16>,
    #[serde(default, with = "maybe_duration")]
    server_keep_alive: Option<Duration>,
    response_information: Option<String>,
    server_reference: Option<String>,
    #[serde(default)]
    server_moved: bool,
    denied_subscription: Option<String>,
    #[serde(default, with = "maybe_duration")]
    sys_interval: Option<Duration>,
}

/// The settings of the protocol, checked.
fn mqtt_settings(table: &MqttTable, problems: &mut Vec<ConfigProblem>) -> Settings {
    let default = Settings::default();
    let mut problem = |key: &str, text: String| problems.push(ConfigProblem::new(key, text));
    if table.receive_maximum == Some(0) {
        let text = "0 would let no message in: expected 1 to 65535";
        problem("mqtt.receive_maximum", text.to_owned());
    }
    if let Some(found) = table.server_keep_alive
        && !(1..=65535).contains(&found.as_secs())
    {
        let text = format!("{found:?} is out of range: expected 1s to 65535s");
        problem("mqtt.server_keep_alive", text);
    }
    if let Some(found) = &table.response_information
        && let Err(error) = TopicName::parse(format!("{found}x").as_str())
    {
        let text = format!("{found:?} is no beginning of a topic: {error}");
        problem("mqtt.response_information", text);
    }
    if table.server_moved && table.server_reference.is_none() {
        let text = "given without mqtt.server_reference: say where to";
        problem("mqtt.server_moved", text.to_owned());
    }
    let denied_subscription = match table.denied_subscription.as_deref() {
        None | Some("not_authorized") => DeniedSubscription::NotAuthorized,
        Some("unspecified") => DeniedSubscription::Unspecified,
        Some(found) => {
            let text = format!("{found:?}: expected \"not_authorized\" or \"unspecified\"");
            problem("mqtt.denied_subscription", text);
            DeniedSubscription::default()
        }
    };
    Settings {
        receive_maximum: table.receive_maximum.unwrap_or(default.receive_maximum),
        topic_alias_maximum: table
            .topic_alias_maximum
            .unwrap_or(default.topic_alias_maximum),
        server_keep_alive: table.server_keep_alive,
        response_information: table.response_information.clone(),
        server_reference: table
            .server_reference
            .clone()
            .map(|address| ServerReference {
                address,
                for_good: table.server_moved,
            }),
        denied_subscription,
        sys_interval: table.sys_interval.unwrap_or(default.sys_interval),
    }
}

/// Listeners behind load balancers, by key.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProxyTable {
    listeners: Vec<String>,
    trusted: Vec<String>,
}

impl MqttTable {
    fn proxies(&self, problems: &mut Vec<ConfigProblem>) -> MqttProxies {
        let mut proxies = MqttProxies::default();
        for (at, table) in self.proxy_protocol.iter().enumerate() {
            let key = |key: &str| format!("mqtt.proxy_protocol[{at}].{key}");
            let networks: Vec<Network> = table
                .trusted
                .iter()
                .filter_map(|text| keep(problems, &key("trusted"), text.parse()))
                .collect();
            for (list, what) in [(&table.listeners, "listeners"), (&table.trusted, "trusted")] {
                if list.is_empty() {
                    problems.push(ConfigProblem::new(key(what), "names nobody"));
                }
            }
            for name in &table.listeners {
                let (given, slot) = match name.as_str() {
                    "tls" => (self.tls.is_some(), &mut proxies.tls),
                    "wss" => (self.wss.is_some(), &mut proxies.wss),
                    "danger_plaintext" => (
                        self.danger_plaintext.is_some(),
                        &mut proxies.danger_plaintext,
                    ),
                    "danger_ws" => (self.danger_ws.is_some(), &mut proxies.danger_ws),
                    other => {
                        problems.push(ConfigProblem::new(
                            key("listeners"),
                            format!(
                                "{other:?} is no listener: expected tls, wss, danger_plaintext or \
                                 danger_ws"
                            ),
                        ));
                        continue;
                    }
                };
                if !given {
                    problems.push(ConfigProblem::new(
                        key("listeners"),
                        format!("names {name:?} without mqtt.{name}"),
                    ));
                }
                if slot.is_some() {
                    problems.push(ConfigProblem::new(
                        key("listeners"),
                        format!("names {name:?}, which was named before"),
                    ));
                }
                *slot = Some(TrustedProxies::new(networks.iter().copied()));
            }
        }
        proxies
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FrontTable {
    grpc: Option<String>,
    http: Option<String>,
    danger_plaintext_grpc: Option<String>,
    danger_plaintext_http: Option<String>,
    tokens: Option<PathBuf>,
}

impl FrontTable {
    fn check(&self, problems: &mut Vec<ConfigProblem>, base: &Path) -> FrontConfig {
        let mut read = |key: &str, value: &Option<String>| {
            address(problems, &format!("front.{key}"), value.as_deref())
        };
        let grpc = read("grpc", &self.grpc);
        let http = read("http", &self.http);
        let danger_plaintext_grpc = read("danger_plaintext_grpc", &self.danger_plaintext_grpc);
        let danger_plaintext_http = read("danger_plaintext_http", &self.danger_plaintext_http);
        let tokens = self.tokens.as_ref();
        let tokens =
            tokens.and_then(|path| keep(problems, "front.tokens", Tokens::load(&base.join(path))));
        let plaintext = [
            ("danger_plaintext_grpc", &self.danger_plaintext_grpc),
            ("danger_plaintext_http", &self.danger_plaintext_http),
        ];
        for (key, value) in plaintext {
            if value.is_some() && self.tokens.is_none() {
                problems.push(ConfigProblem::new(
                    format!("front.{key}"),
                    "given without front.tokens: nobody could prove who they are",
                ));
            }
        }
        let listens = self.grpc.is_some() || self.http.is_some();
        if self.tokens.is_some() && !listens && plaintext.iter().all(|(_, value)| value.is_none()) {
            problems.push(ConfigProblem::new(
                "front.tokens",
                "given without an address: expected front.grpc or front.http",
            ));
        }
        FrontConfig {
            grpc,
            http,
            danger_plaintext_grpc,
            danger_plaintext_http,
            tokens,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdminTable {
    listen: Option<String>,
}

/// Durations in the file are text with a unit: `250ms`, `10s`, `5m`, `2h`, `7d`.
mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, de::Error};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::parse_duration(&text).ok_or_else(|| {
            D::Error::custom(format!(
                "{text:?} is no duration: expected a whole number and a unit, such as 250ms, 10s, 5m, 2h or 7d"
            ))
        })
    }
}

/// As [`duration`], for what may be left out.
mod maybe_duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, de::Error};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        let text = String::deserialize(deserializer)?;
        match super::parse_duration(&text) {
            Some(duration) => Ok(Some(duration)),
            None => Err(D::Error::custom(format!(
                "{text:?} is no duration: expected a whole number and a unit, such as 250ms, 10s, 5m, 2h or 7d"
            ))),
        }
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let millis = match unit.trim() {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_named_at_once() {
        let text = r#"
            [identity]
            cert = "no-cert.pem"
            key = "no-key.pem"
            trust = "no-ca.pem"
            [policy]
            file = "no-policy.toml"
            [listen]
            quic = "localhost:7443"
            [mqtt]
            passwords = "users.toml"
            danger_plaintext = "127.0.0.1:1883"
            [limits]
            queue_bytes = 1
            resume_grace = "99999999999d"
            [limits.tenant]
            connections = 0
            publish_rate = 20000000
            [limits.identity]
            message_bytes = 1024
            inflight_bytes = 4194305
            [[limits.override]]
            identities = []
            queue_bytes = 65535
        "#;
        let folder = tempfile::tempdir().unwrap();
        let errors = Config::parse(text, folder.path()).unwrap_err();
        let keys: Vec<&str> = errors
            .0
            .iter()
            .map(|problem| problem.key.as_str())
            .collect();
        for key in [
            "identity.cert, identity.key",
            "identity.trust",
            "policy.file",
            "listen.quic",
            "mqtt.passwords",
            "mqtt.danger_plaintext_identity",
            "limits.queue_bytes",
            "limits.resume_grace (in ms)",
            "limits.tenant.connections",
            "limits.tenant.publish_rate",
            "limits.identity.message_bytes",
            "limits.identity.inflight_bytes",
            "limits.override[0].identities",
            "limits.override[0].queue_bytes",
        ] {
            assert!(keys.contains(&key), "{key} is missing from {keys:?}");
        }
    }

    #[test]
    fn a_front_door_that_lets_nobody_in_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |front: &str| {
            let text = format!(
                "[identity]\ncert = 'a'\nkey = 'b'\ntrust = 'c'\n[policy]\nfile = 'x'\n[front]\n{front}"
            );
            Config::parse(&text, folder.path()).unwrap_err().to_string()
        };
        let open = refused("danger_plaintext_http = '127.0.0.1:8000'");
        assert!(
            open.contains("front.danger_plaintext_http: given without front.tokens"),
            "{open}"
        );
        let nowhere = refused("tokens = 'tokens.toml'");
        assert!(nowhere.contains("front.tokens: cannot read"), "{nowhere}");
        assert!(
            nowhere.contains("front.tokens: given without an address"),
            "{nowhere}"
        );
        assert!(
            refused("grpc = 'everywhere'").contains("front.grpc: \"everywhere\" is no address")
        );
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let text =
            "[identity]\ncert = 'a'\nkey = 'b'\ntrust = 'c'\npolcy = 'd'\n[policy]\nfile = 'x'";
        let errors = Config::parse(text, Path::new(".")).unwrap_err();
        assert!(
            errors.to_string().contains("unknown field `polcy`"),
            "{errors}"
        );
    }

    #[test]
    fn limits_of_tenants_and_identities_are_read_and_their_patterns_checked() {
        let text = r#"
            [tenant]
            queue_bytes = 1073741824
            [identity]
            connections = 4
            [[override]]
            identities = ["spiffe://*/acme/line-1/*", "acme/*/gateway-*"]
            publish_rate = 100
        "#;
        let limits: Limits = toml::from_str(text).unwrap();
        assert_eq!(limits.tenant.queue_bytes, Some(1 << 30));
        let mut problems = Vec::new();
        limits.check(&mut problems);
        assert_eq!(problems, []);
        let gateway = Identity::new("example.org", "acme", "line-2", "gateway-1").unwrap();
        let expected = IdentityLimits {
            connections: Some(4),
            publish_rate: Some(100),
            ..IdentityLimits::default()
        };
        assert_eq!(limits.of_identity(&gateway), expected);

        let refused = |text: &str| toml::from_str::<Limits>(text).unwrap_err().to_string();
        let both = refused("[[override]]\nidentities = ['acme/*', '**/a/b']");
        for found in [
            r#""acme/*": expected tenant/site/name"#,
            r#""**/a/b": expected `*` in the tenant"#,
        ] {
            assert!(both.contains(found), "{both}");
        }
        for (text, key) in [
            ("[tenant]\nmessage_bytes = 70000", "message_bytes"),
            ("[identity]\nconections = 1", "conections"),
            ("[[override]]\nidentities = ['a/b/c']\nrate = 1", "rate"),
        ] {
            let error = refused(text);
            assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("7d"), Some(Duration::from_secs(7 * 86_400)));
        for bad in ["", "10", "s", "-1s", "1.5s", "99999999999999999999s", "1w"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
