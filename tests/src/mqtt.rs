//! An MQTT client of another make (rumqttc), in both protocol versions behind one interface.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{TlsConfiguration, Transport, v5};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::wait::within;

pub mod wire;

/// Events a peer has received and the test has not taken; a test that lets more pile up stalls its
/// own peer, never the broker's other clients.
const EVENT_QUEUE: usize = 1_024;
/// Requests to rumqttc's event loop that wait to be written.
const REQUEST_QUEUE: usize = 256;
/// The largest packet a peer sends or takes.
const MAX_PACKET: usize = 16 << 20;
/// Long enough that no test is about it.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// The protocol version of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MqttVersion {
    /// MQTT 3.1.1.
    V311,
    /// MQTT 5.0.
    V5,
}

/// How a peer connects.
#[derive(Debug, Clone)]
pub struct MqttOptions {
    version: MqttVersion,
    broker: SocketAddr,
    client_id: String,
    tls: Option<(String, Arc<rustls::ClientConfig>)>,
    login: Option<(String, String)>,
    clean_start: bool,
    session_expiry: Option<u32>,
    will: Option<(String, Bytes)>,
}

impl MqttOptions {
    /// A clean session without TLS and without a password.
    pub fn new(version: MqttVersion, broker: SocketAddr, client_id: &str) -> Self {
        Self {
            version,
            broker,
            client_id: client_id.into(),
            tls: None,
            login: None,
            clean_start: true,
            session_expiry: None,
            will: None,
        }
    }

    /// TLS towards a server of this name.
    pub fn tls(mut self, server_name: &str, config: Arc<rustls::ClientConfig>) -> Self {
        self.tls = Some((server_name.into(), config));
        self
    }

    /// User name and password.
    pub fn login(mut self, user: &str, password: &str) -> Self {
        self.login = Some((user.into(), password.into()));
        self
    }

    /// Keeps the session for `seconds` after the connection; MQTT 3.1.1 has no time and keeps it as
    /// long as the broker likes.
    pub fn kept_session(mut self, seconds: u32) -> Self {
        self.clean_start = false;
        self.session_expiry = Some(seconds);
        self
    }

    /// A will of QoS 1.
    pub fn will(mut self, topic: &str, payload: impl Into<Bytes>) -> Self {
        self.will = Some((topic.into(), payload.into()));
        self
    }

    /// The name rumqttc dials. With TLS it is also the name the certificate must carry, so it has to
    /// resolve to the broker: `localhost` in every test.
    fn host(&self) -> String {
        match &self.tls {
            Some((server_name, _)) => server_name.clone(),
            None => self.broker.ip().to_string(),
        }
    }

    fn transport(&self) -> Transport {
        match &self.tls {
            Some((_, config)) => {
                Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(config)))
            }
            None => Transport::tcp(),
        }
    }
}

/// A message as a peer received it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttMessage {
    /// The topic.
    pub topic: String,
    /// The payload.
    pub payload: Bytes,
    /// 0, 1 or 2.
    pub qos: u8,
    /// A retained message sent because of a new subscription.
    pub retain: bool,
    /// Sent before.
    pub duplicate: bool,
    /// The user properties; none in MQTT 3.1.1.
    pub properties: Vec<(String, String)>,
}

/// The answer to a publish or a subscribe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttAnswer {
    /// The reason as rumqttc names it, such as `Success` or `NotAuthorized`.
    pub reason: String,
    /// The reason string; none in MQTT 3.1.1.
    pub text: Option<String>,
}

/// Something a peer has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MqttEvent {
    /// The broker accepted the connection.
    Connected {
        /// The broker still has the session.
        session_present: bool,
    },
    /// A message has arrived.
    Message(MqttMessage),
    /// A publish of QoS 1 or 2 has been answered.
    Published(MqttAnswer),
    /// A subscribe has been answered.
    Subscribed(MqttAnswer),
    /// An unsubscribe has been answered.
    Unsubscribed,
    /// The connection is over, with rumqttc's words for it. Nothing follows.
    Closed(String),
}

/// An MQTT client whose event loop runs in a task of its own. It does not reconnect.
#[derive(Debug)]
pub struct MqttPeer {
    client: Handle,
    events: mpsc::Receiver<MqttEvent>,
    /// Events that came before the one a test asked for.
    passed: VecDeque<MqttEvent>,
    _driver: AbortOnDropHandle<()>,
}

#[derive(Debug)]
enum Handle {
    V311(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

impl MqttPeer {
    /// Connects, or answers with rumqttc's words for the refusal.
    pub async fn connect(options: MqttOptions) -> Result<MqttPeer, String> {
        let mut peer = Self::start(&options);
        match within("the CONNACK", peer.events.recv()).await {
            Some(MqttEvent::Connected { session_present }) => {
                peer.passed
                    .push_back(MqttEvent::Connected { session_present });
                Ok(peer)
            }
            Some(MqttEvent::Closed(reason)) => Err(reason),
            other => Err(format!("expected the CONNACK, found {other:?}")),
        }
    }

    fn start(options: &MqttOptions) -> MqttPeer {
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let (client, driver) = match options.version {
            MqttVersion::V311 => {
                let (client, event_loop) =
                    rumqttc::AsyncClient::new(options_v311(options), REQUEST_QUEUE);
                (
                    Handle::V311(client),
                    tokio::spawn(drive_v311(event_loop, sender)),
                )
            }
            MqttVersion::V5 => {
                let (client, event_loop) = v5::AsyncClient::new(options_v5(options), REQUEST_QUEUE);
                (
                    Handle::V5(client),
                    tokio::spawn(drive_v5(event_loop, sender)),
                )
            }
        };
        MqttPeer {
            client,
            events,
            passed: VecDeque::new(),
            _driver: AbortOnDropHandle::new(driver),
        }
    }

    /// Whether the broker still had the session when this peer connected.
    pub async fn session_present(&mut self) -> bool {
        self.next_matching("the CONNACK", |event| match event {
            MqttEvent::Connected { session_present } => Some(*session_present),
            _ => None,
        })
        .await
    }

    /// Publishes and, above QoS 0, waits for the answer.
    pub async fn publish(&mut self, topic: &str, qos: u8, payload: impl Into<Bytes>) -> MqttAnswer {
        self.send(topic, qos, false, payload.into()).await;
        if qos == 0 {
            return MqttAnswer {
                reason: "Success".into(),
                text: None,
            };
        }
        self.next_matching("the answer to a publish", |event| match event {
            MqttEvent::Published(answer) => Some(answer.clone()),
            _ => None,
        })
        .await
    }

    /// Publishes a retained message of QoS 1 and waits for the answer.
    pub async fn retain(&mut self, topic: &str, payload: impl Into<Bytes>) -> MqttAnswer {
        self.send(topic, 1, true, payload.into()).await;
        self.next_matching("the answer to a publish", |event| match event {
            MqttEvent::Published(answer) => Some(answer.clone()),
            _ => None,
        })
        .await
    }

    /// Subscribes and waits for the answer.
    pub async fn subscribe(&mut self, filter: &str, qos: u8) -> MqttAnswer {
        match &self.client {
            Handle::V311(client) => client.subscribe(filter, qos_v311(qos)).await.is_ok(),
            Handle::V5(client) => client.subscribe(filter, qos_v5(qos)).await.is_ok(),
        };
        self.next_matching("the SUBACK", |event| match event {
            MqttEvent::Subscribed(answer) => Some(answer.clone()),
            _ => None,
        })
        .await
    }

    /// Unsubscribes and waits for the answer.
    pub async fn unsubscribe(&mut self, filter: &str) {
        match &self.client {
            Handle::V311(client) => client.unsubscribe(filter).await.is_ok(),
            Handle::V5(client) => client.unsubscribe(filter).await.is_ok(),
        };
        self.next_matching("the UNSUBACK", |event| {
            matches!(event, MqttEvent::Unsubscribed).then_some(())
        })
        .await;
    }

    /// The next message, in the order of arrival.
    pub async fn message(&mut self) -> MqttMessage {
        self.next_matching("a message", |event| match event {
            MqttEvent::Message(message) => Some(message.clone()),
            _ => None,
        })
        .await
    }

    /// Waits until the connection is over and says why.
    pub async fn closed(&mut self) -> String {
        self.next_matching("the end of the connection", |event| match event {
            MqttEvent::Closed(reason) => Some(reason.clone()),
            _ => None,
        })
        .await
    }

    /// Says goodbye in MQTT's way and waits for the end of the connection.
    pub async fn disconnect(mut self) {
        match &self.client {
            Handle::V311(client) => client.disconnect().await.is_ok(),
            Handle::V5(client) => client.disconnect().await.is_ok(),
        };
        self.closed().await;
    }

    async fn send(&self, topic: &str, qos: u8, retain: bool, payload: Bytes) {
        match &self.client {
            Handle::V311(client) => client
                .publish_bytes(topic, qos_v311(qos), retain, payload)
                .await
                .is_ok(),
            Handle::V5(client) => client
                .publish_bytes(topic, qos_v5(qos), retain, payload)
                .await
                .is_ok(),
        };
    }

    /// The next event that `pick` takes; the others stay, in order.
    async fn next_matching<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(&MqttEvent) -> Option<T>,
    ) -> T {
        for index in 0..self.passed.len() {
            if let Some(found) = pick(&self.passed[index]) {
                self.passed.remove(index);
                return found;
            }
        }
        let Self { events, passed, .. } = self;
        within(what, async move {
            loop {
                let event = events.recv().await.unwrap_or_else(|| {
                    panic!("waited for {what}, but the connection is over: {passed:?}")
                });
                match pick(&event) {
                    Some(found) => return found,
                    None => passed.push_back(event),
                }
            }
        })
        .await
    }
}

fn options_v311(options: &MqttOptions) -> rumqttc::MqttOptions {
    let mut made =
        rumqttc::MqttOptions::new(&options.client_id, options.host(), options.broker.port());
    made.set_transport(options.transport());
    made.set_keep_alive(KEEP_ALIVE);
    made.set_max_packet_size(MAX_PACKET, MAX_PACKET);
    made.set_clean_session(options.clean_start);
    if let Some((user, password)) = &options.login {
        made.set_credentials(user, password);
    }
    if let Some((topic, payload)) = &options.will {
        made.set_last_will(rumqttc::LastWill::new(
            topic,
            payload.clone(),
            rumqttc::QoS::AtLeastOnce,
            false,
        ));
    }
    made
}

fn options_v5(options: &MqttOptions) -> v5::MqttOptions {
    let mut made = v5::MqttOptions::new(&options.client_id, options.host(), options.broker.port());
    made.set_transport(options.transport());
    made.set_keep_alive(KEEP_ALIVE);
    made.set_max_packet_size(Some(MAX_PACKET as u32));
    made.set_clean_start(options.clean_start);
    made.set_session_expiry_interval(options.session_expiry);
    if let Some((user, password)) = &options.login {
        made.set_credentials(user, password);
    }
    if let Some((topic, payload)) = &options.will {
        made.set_last_will(v5::mqttbytes::v5::LastWill::new(
            topic.as_str(),
            payload.clone(),
            v5::mqttbytes::QoS::AtLeastOnce,
            false,
            None,
        ));
    }
    made
}

async fn drive_v311(mut event_loop: rumqttc::EventLoop, events: mpsc::Sender<MqttEvent>) {
    use rumqttc::{Event, Packet};
    loop {
        let event = match event_loop.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(ack))) => MqttEvent::Connected {
                session_present: ack.session_present,
            },
            Ok(Event::Incoming(Packet::Publish(publish))) => MqttEvent::Message(MqttMessage {
                topic: publish.topic,
                payload: publish.payload,
                qos: publish.qos as u8,
                retain: publish.retain,
                duplicate: publish.dup,
                properties: Vec::new(),
            }),
            Ok(Event::Incoming(Packet::PubAck(_) | Packet::PubComp(_))) => {
                MqttEvent::Published(MqttAnswer {
                    reason: "Success".into(),
                    text: None,
                })
            }
            Ok(Event::Incoming(Packet::SubAck(ack))) => MqttEvent::Subscribed(MqttAnswer {
                reason: format!("{:?}", ack.return_codes[0]),
                text: None,
            }),
            Ok(Event::Incoming(Packet::UnsubAck(_))) => MqttEvent::Unsubscribed,
            Ok(_) => continue,
            Err(error) => MqttEvent::Closed(error.to_string()),
        };
        let last = matches!(event, MqttEvent::Closed(_));
        // Not polling again after an error is what keeps rumqttc from reconnecting.
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

async fn drive_v5(mut event_loop: v5::EventLoop, events: mpsc::Sender<MqttEvent>) {
    use v5::Event;
    use v5::mqttbytes::v5::{Packet, PubAckReason};
    loop {
        let event = match event_loop.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(ack))) => MqttEvent::Connected {
                session_present: ack.session_present,
            },
            Ok(Event::Incoming(Packet::Publish(publish))) => MqttEvent::Message(MqttMessage {
                topic: String::from_utf8_lossy(&publish.topic).into_owned(),
                payload: publish.payload,
                qos: publish.qos as u8,
                retain: publish.retain,
                duplicate: publish.dup,
                properties: publish
                    .properties
                    .map(|p| p.user_properties)
                    .unwrap_or_default(),
            }),
            Ok(Event::Incoming(Packet::PubAck(ack))) => MqttEvent::Published(MqttAnswer {
                reason: match ack.reason {
                    // Not an error: the message was taken.
                    PubAckReason::NoMatchingSubscribers => "Success".into(),
                    other => format!("{other:?}"),
                },
                text: ack
                    .properties
                    .and_then(|properties| properties.reason_string),
            }),
            Ok(Event::Incoming(Packet::PubComp(ack))) => MqttEvent::Published(MqttAnswer {
                reason: format!("{:?}", ack.reason),
                text: ack
                    .properties
                    .and_then(|properties| properties.reason_string),
            }),
            Ok(Event::Incoming(Packet::SubAck(ack))) => MqttEvent::Subscribed(MqttAnswer {
                reason: format!("{:?}", ack.return_codes[0]),
                text: ack
                    .properties
                    .and_then(|properties| properties.reason_string),
            }),
            Ok(Event::Incoming(Packet::UnsubAck(_))) => MqttEvent::Unsubscribed,
            Ok(_) => continue,
            Err(error) => MqttEvent::Closed(error.to_string()),
        };
        let last = matches!(event, MqttEvent::Closed(_));
        // Not polling again after an error is what keeps rumqttc from reconnecting.
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

fn qos_v311(qos: u8) -> rumqttc::QoS {
    rumqttc::qos(qos).expect("tests use 0, 1 and 2")
}

fn qos_v5(qos: u8) -> v5::mqttbytes::QoS {
    v5::mqttbytes::qos(qos).expect("tests use 0, 1 and 2")
}
