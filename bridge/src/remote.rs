//! The task that keeps one remote connected and carries its messages both ways.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::ready;
use futures_util::stream::FuturesOrdered;
use selvedge_client::{Backoff, Client, Reconnect};
use selvedge_proto::message::Qos;
use selvedge_proto::topic::TopicFilter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::RemoteConfig;
use crate::forward::{Outbound, Taken, give_to_fabric, inward};
use crate::link::{Event, Incoming, Limits, Link, Receipt, WINDOW};
use crate::mapping::Rule;
use crate::outbox::Outbox;
use crate::status::{DropReason, Record, Way};

/// First ceiling of the back-off between connections; the last is configured.
const RECONNECT_MIN: Duration = Duration::from_millis(250);

/// How long messages under way may still be acknowledged after the order to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Messages that may wait here for the remote. Their bytes are bounded by `outbox_bytes`; the number
/// only bounds bookkeeping for small ones. When it is full the rules' tasks wait, and the fabric keeps
/// what follows.
const OUTBOX_MESSAGES: usize = 1024;

/// Messages of the remote that may wait for the fabric; `outbox_bytes` bounds them as well. Beyond
/// either, QoS 0 is dropped and counted, and nothing more is read from a remote that has sent QoS 1.
const INBOX_MESSAGES: usize = 1024;

/// Everything that the task owns.
pub(crate) struct Remote {
    config: RemoteConfig,
    rules: Arc<[Rule]>,
    /// Client of the remote's own session, so that its no-local subscriptions hold back the remote's
    /// own messages and no others.
    fabric: Client,
    own_hop: Arc<str>,
    record: Record,
    shutdown: CancellationToken,
    /// What the outward rules' tasks have taken from the fabric.
    arrivals: mpsc::Receiver<Outbound>,
    outbox: Outbox<Outbound>,
    /// Messages being given to the fabric. Ordered, since a remote expects its acknowledgements in
    /// the order of its messages.
    inbox: FuturesOrdered<Pin<Box<dyn Future<Output = Settled> + Send>>>,
    inbox_bytes: usize,
    inbox_wants_ack: usize,
    backoff: Backoff,
    /// Number of the connection. A receipt of an earlier one must not be used.
    connection: u64,
}

/// A message of the remote that the fabric has taken, or never will.
struct Settled {
    connection: u64,
    receipt: Receipt,
    bytes: usize,
    rule: Option<usize>,
    taken: Taken,
}

/// Why a connection ended.
enum Ended {
    Lost(String),
    Shutdown,
}

/// State of one connection.
struct Connection {
    link: Link,
    events: mpsc::Receiver<Event>,
    /// `None` until the remote has accepted.
    limits: Option<Limits>,
    /// The subscriptions are requested.
    subscribed: bool,
    /// Acknowledgements the event loop had no room for.
    receipts: VecDeque<Receipt>,
    /// When silence means that the connection is dead.
    silent_at: tokio::time::Instant,
}

impl Remote {
    pub(crate) fn new(
        config: RemoteConfig,
        fabric: Client,
        own_hop: Arc<str>,
        record: Record,
        arrivals: mpsc::Receiver<Outbound>,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            rules: config.rules.clone().into(),
            backoff: Backoff::new(Reconnect {
                min: RECONNECT_MIN,
                max: config.reconnect_max,
            }),
            config,
            fabric,
            own_hop,
            record,
            shutdown,
            arrivals,
            outbox: Outbox::new(),
            inbox: FuturesOrdered::new(),
            inbox_bytes: 0,
            inbox_wants_ack: 0,
            connection: 0,
        }
    }

    /// The queue from the outward rules' tasks to a remote.
    pub(crate) fn arrivals() -> (mpsc::Sender<Outbound>, mpsc::Receiver<Outbound>) {
        // The outbox behind it is the queue that counts.
        mpsc::channel(16)
    }

    /// Runs until the shutdown.
    pub(crate) async fn run(mut self) {
        while !self.shutdown.is_cancelled() {
            let reason = match self.connect().await {
                Ended::Lost(reason) => reason,
                Ended::Shutdown => {
                    self.record.disconnected("the bridge is stopped");
                    return;
                }
            };
            self.record.disconnected(&reason);
            self.restart();
            self.backoff.lost(Instant::now());
            let delay = self.backoff.delay(rand::random());
            tracing::warn!(
                remote = %self.config.name,
                host = %self.config.host,
                port = self.config.port,
                %reason,
                ?delay,
                "not connected"
            );
            self.wait(delay).await;
        }
    }

    /// Waits before the next attempt; what the fabric has meanwhile taken is counted.
    async fn wait(&mut self, delay: Duration) {
        let shutdown = self.shutdown.clone();
        let until = tokio::time::Instant::now() + delay;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                () = shutdown.cancelled() => return,
                Some(settled) = self.inbox.next(), if !self.inbox.is_empty() => {
                    self.settled(settled, None);
                }
            }
        }
    }

    /// Everything not acknowledged waits for the next connection, except QoS 0.
    fn restart(&mut self) {
        self.connection += 1;
        self.outbox.restart();
        let dropped = self
            .outbox
            .extract(|message| message.packet.qos == Qos::AtMostOnce);
        for message in dropped {
            let reason = DropReason::Disconnected;
            self.record.dropped(Some(message.rule), reason, None);
            message.acknowledge();
        }
    }

    /// One connection from the attempt to its end.
    async fn connect(&mut self) -> Ended {
        let (link, events) = match Link::open(&self.config).await {
            Ok(opened) => opened,
            Err(error) => return Ended::Lost(error.to_string()),
        };
        let mut connection = Connection {
            link,
            events,
            limits: None,
            subscribed: false,
            receipts: VecDeque::new(),
            silent_at: silent_at(self.config.keep_alive),
        };
        let shutdown = self.shutdown.clone();
        loop {
            self.pump(&mut connection);
            // Not biased: neither a flood from the remote nor one from the fabric may starve the
            // other, and both are bounded.
            let event = tokio::select! {
                () = shutdown.cancelled() => {
                    self.drain(connection).await;
                    return Ended::Shutdown;
                }
                event = connection.events.recv(), if !self.inbox_is_full() => event,
                Some(settled) = self.inbox.next(), if !self.inbox.is_empty() => {
                    // While the inbox is full, the remote's silence is the bridge's doing.
                    if self.inbox_is_full() {
                        connection.silent_at = silent_at(self.config.keep_alive);
                    }
                    self.settled(settled, Some(&mut connection));
                    continue;
                }
                Some(message) = self.arrivals.recv(), if self.outbox.len() < OUTBOX_MESSAGES => {
                    self.outbox.push(message);
                    continue;
                }
                () = tokio::time::sleep_until(connection.silent_at), if !self.inbox_is_full() => {
                    return Ended::Lost("the remote has gone silent".to_owned());
                }
            };
            if let Err(ended) = self.handle(event, &mut connection) {
                return ended;
            }
        }
    }

    /// Whether to read no more from the remote. QoS 0 is dropped instead, so a remote that sends
    /// nothing else is always read.
    fn inbox_is_full(&self) -> bool {
        self.inbox_wants_ack > 0 && self.inbox_is_over()
    }

    fn inbox_is_over(&self) -> bool {
        self.inbox.len() >= INBOX_MESSAGES || self.inbox_bytes >= self.config.outbox_bytes
    }

    /// Gives the event loop whatever it has room for. What does not fit is tried after the next event,
    /// which there will be, since the requests in its way make events.
    fn pump(&mut self, connection: &mut Connection) {
        let Some(limits) = connection.limits else {
            return;
        };
        if !connection.subscribed {
            let filters = self.subscriptions(limits);
            let resumable = !self.config.clean_session && limits.session_present;
            connection.subscribed =
                filters.is_empty() || connection.link.try_subscribe(&filters, resumable);
            if filters.is_empty() {
                self.record.subscribed();
            }
        }
        // Before new messages: the remote may be waiting for them.
        if !connection.flush_receipts() {
            return;
        }
        // One less than the remote takes, so that rumqttc never finds its window full: it would
        // read no more requests then, acknowledgements among them.
        let window = WINDOW.min(limits.receive_maximum.saturating_sub(1)).max(1);
        while let Some(message) = self.outbox.next(window.into()) {
            message.packet.qos = message.packet.qos.min(limits.qos);
            message.packet.retain &= limits.retain;
            let now = Instant::now();
            let refused = if message.expires.is_some_and(|expires| expires <= now) {
                Some((DropReason::Expired, None))
            } else {
                if let Some(expires) = message.expires {
                    // MQTT asks for the lifetime that is left.
                    message.packet.properties.expiry = Some(expires - now);
                }
                let bytes = connection.link.packet_bytes(&message.packet);
                (bytes > limits.packet_bytes).then(|| {
                    let limit = limits.packet_bytes;
                    let error = format!(
                        "the packet has {bytes} bytes and the remote takes at most {limit} bytes"
                    );
                    (DropReason::TooLarge, Some(error))
                })
            };
            if let Some((reason, error)) = refused {
                if let Some(message) = self.outbox.discard() {
                    self.record.dropped(Some(message.rule), reason, error);
                    message.acknowledge();
                }
                continue;
            }
            if !connection.link.try_publish(&message.packet) {
                return;
            }
            self.outbox.handed();
        }
    }

    fn subscriptions(&self, limits: Limits) -> Vec<(TopicFilter, Qos)> {
        let rules = self.rules.iter();
        rules
            .filter(|rule| rule.direction().carries_in())
            .map(|rule| {
                let filter = rule.remote_filter().clone();
                (filter, rule.qos_cap.min(limits.qos))
            })
            .collect()
    }

    fn handle(&mut self, event: Option<Event>, connection: &mut Connection) -> Result<(), Ended> {
        let server_keep_alive = connection.limits.and_then(|limits| limits.keep_alive);
        let keep_alive = server_keep_alive.unwrap_or(self.config.keep_alive);
        connection.silent_at = silent_at(keep_alive);
        match event {
            None => return Err(Ended::Lost("the MQTT event loop has ended".to_owned())),
            Some(Event::Closed(reason)) => return Err(Ended::Lost(reason)),
            Some(Event::Disconnected) => {
                return Err(Ended::Lost("the MQTT protocol was violated".to_owned()));
            }
            Some(Event::Alive) => {}
            Some(Event::Connected(limits)) => {
                connection.limits = Some(limits);
                self.backoff.connected(Instant::now());
                self.record.connected();
                tracing::info!(
                    remote = %self.config.name,
                    session_present = limits.session_present,
                    "connected"
                );
            }
            Some(Event::Subscribed(granted)) => self.granted(&granted),
            Some(Event::Message(incoming)) => self.accept(*incoming),
            Some(Event::Sent(packet_id)) => {
                if let Some(message) = self.outbox.sent(packet_id) {
                    self.record.forwarded(message.rule, Way::Out);
                    message.acknowledge();
                }
            }
            Some(Event::Answered(packet_id, Ok(()))) => {
                if let Some(message) = self.outbox.answered(packet_id) {
                    self.record.forwarded(message.rule, Way::Out);
                    message.acknowledge();
                }
            }
            Some(Event::Answered(_, Err(refusal))) if refusal.passing => {
                // The message stays in the outbox, in its place, and is sent after the back-off.
                return Err(Ended::Lost(format!(
                    "the remote cannot take a message now: {}",
                    refusal.reason
                )));
            }
            Some(Event::Answered(packet_id, Err(refusal))) => {
                if let Some(message) = self.outbox.answered(packet_id) {
                    let error = format!("the remote refused a message: {}", refusal.reason);
                    let reason = DropReason::Refused;
                    self.record.dropped(Some(message.rule), reason, Some(error));
                    message.acknowledge();
                }
            }
        }
        Ok(())
    }

    fn granted(&self, granted: &[Result<(), String>]) {
        let rules = self.rules.iter().enumerate();
        let inward = rules.filter(|(_, rule)| rule.direction().carries_in());
        let mut all = true;
        for ((index, rule), granted) in inward.zip(granted) {
            if let Err(code) = granted {
                all = false;
                let reason = format!(
                    "the remote refused the subscription {}: {code}; \
                     allow it to this client there, or remove the rule",
                    rule.remote_filter()
                );
                tracing::error!(remote = %self.config.name, %reason, "nothing is carried in");
                self.record.rule_error(index, reason);
            }
        }
        if all {
            self.record.subscribed();
        }
    }

    /// Sends a message of the remote on its way to the fabric.
    fn accept(&mut self, Incoming { packet, receipt }: Incoming) {
        let bytes = packet.bytes();
        if !receipt.is_wanted() && self.inbox_is_over() {
            self.record.dropped(None, DropReason::Overflow, None);
            return;
        }
        let connection = self.connection;
        self.inbox_bytes += bytes;
        self.inbox_wants_ack += usize::from(receipt.is_wanted());
        match inward(&self.rules, &self.own_hop, packet) {
            Err((rule, reason)) => {
                self.record.dropped(rule, reason, None);
                // Acknowledged in its turn all the same: the remote would send it again for ever.
                self.inbox.push_back(Box::pin(ready(Settled {
                    connection,
                    receipt,
                    bytes,
                    rule: None,
                    taken: Taken::Yes,
                })));
            }
            Ok(inward) => {
                let rule = inward.rule;
                let in_flight = self.record.set_out(rule);
                let record = self.record.clone();
                let give = give_to_fabric(self.fabric.clone(), inward, record, in_flight);
                self.inbox.push_back(Box::pin(async move {
                    Settled {
                        connection,
                        receipt,
                        bytes,
                        rule: Some(rule),
                        taken: give.await,
                    }
                }));
            }
        }
    }

    fn settled(&mut self, settled: Settled, connection: Option<&mut Connection>) {
        self.inbox_bytes -= settled.bytes;
        self.inbox_wants_ack -= usize::from(settled.receipt.is_wanted());
        match (settled.rule, settled.taken) {
            (Some(rule), Taken::Yes) => self.record.forwarded(rule, Way::In),
            (None, Taken::Yes) => {}
            (rule, Taken::Dropped(reason, error)) => self.record.dropped(rule, reason, Some(error)),
            (rule, Taken::No(error)) => {
                if let Some(rule) = rule {
                    self.record.rule_error(rule, error);
                }
                // Not acknowledged: the remote keeps it.
                return;
            }
        }
        if let Some(connection) = connection
            && settled.connection == self.connection
            && settled.receipt.is_wanted()
        {
            connection.receipts.push_back(settled.receipt);
        }
    }

    /// Lets what is under way be acknowledged on both sides, takes nothing new, and says goodbye.
    async fn drain(&mut self, mut connection: Connection) {
        let connected = connection.limits.is_some();
        let work = async {
            while !(self.outbox.is_idle() && self.inbox.is_empty()) {
                let event = tokio::select! {
                    event = connection.events.recv() => event,
                    Some(settled) = self.inbox.next(), if !self.inbox.is_empty() => {
                        self.settled(settled, Some(&mut connection));
                        connection.flush_receipts();
                        continue;
                    }
                };
                // What comes in now is not acknowledged, so the remote keeps it.
                if !matches!(event, Some(Event::Message(_)))
                    && self.handle(event, &mut connection).is_err()
                {
                    return;
                }
                connection.flush_receipts();
            }
            while !(connection.flush_receipts() && connection.link.try_disconnect()) {
                if matches!(
                    connection.events.recv().await,
                    None | Some(Event::Closed(_))
                ) {
                    return;
                }
            }
            // The event loop ends by itself after the goodbye.
            while connection.events.recv().await.is_some() {}
        };
        if connected {
            let _elapsed = tokio::time::timeout(DRAIN, work).await;
        }
    }
}

impl Connection {
    /// Whether the event loop had room for every acknowledgement.
    fn flush_receipts(&mut self) -> bool {
        while let Some(receipt) = self.receipts.front() {
            if !self.link.try_ack(*receipt) {
                return false;
            }
            self.receipts.pop_front();
        }
        true
    }
}

/// rumqttc pings each keep-alive, which makes an event; but a write that the network does not take
/// stops its timers as well, and only this notices.
fn silent_at(keep_alive: Duration) -> tokio::time::Instant {
    tokio::time::Instant::now() + keep_alive * 2 + Duration::from_secs(5)
}
