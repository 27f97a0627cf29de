//! One connection to a remote, the same for MQTT 3.1.1 and MQTT 5: requests go in, events come out.
//!
//! rumqttc's event loop cannot be interrupted between two awaits and must not wait for whoever feeds
//! it, so it runs in a task of its own, and requests are only ever tried, never awaited. Each
//! connection has a new event loop: what an old one still held would otherwise be sent behind the
//! bridge's back, or forgotten without a word when the remote has no session. The bridge's own
//! [`Outbox`](crate::outbox::Outbox) decides what is sent again.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::v5 as v5packet;
use rumqttc::{Outgoing, TlsConfiguration, Transport, v5};
use selvedge_certs::{Credentials, ServerIdentity, TrustAnchors, tcp_client_config};
use selvedge_proto::message::{Properties, Qos};
use selvedge_proto::topic::TopicFilter;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::config::{RemoteConfig, RemoteTls};
use crate::forward::Packet;
use crate::mapping::Version;
use crate::properties::{from_remote, to_remote};

/// QoS 1 messages that may be unacknowledged in either direction: enough to fill a long link, and few
/// enough to send again after a reconnect.
pub(crate) const WINDOW: u16 = 64;

/// Requests that may wait for the event loop. Twice the window holds every publish and, from a remote
/// that keeps to the window, every acknowledgement; a full queue only makes the caller try again
/// after the next event.
const REQUESTS: usize = 2 * WINDOW as usize + 8;

/// Events that may wait for the bridge. Few, since each may hold a message; when it is full the event
/// loop reads no more from the remote.
const EVENTS: usize = 16;

/// Packet ids that rumqttc cycles through. Far more than the window, so that an id is free again
/// even when the remote acknowledges out of order.
const PACKET_IDS: u16 = 1024;

/// How long TCP, TLS and the MQTT handshake may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What the remote allows on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// It has kept the session.
    pub(crate) session_present: bool,
    /// QoS 1 messages it takes before it acknowledges.
    pub(crate) receive_maximum: u16,
    /// The largest packet it takes, in bytes.
    pub(crate) packet_bytes: usize,
    /// The best quality of service it takes.
    pub(crate) qos: Qos,
    /// It keeps retained messages.
    pub(crate) retain: bool,
    /// The keep-alive it insists on.
    pub(crate) keep_alive: Option<Duration>,
}

/// What happened on the connection.
#[derive(Debug)]
pub(crate) enum Event {
    /// The remote accepted the connection.
    Connected(Limits),
    /// The remote's answer to each subscription, in order.
    Subscribed(Vec<Result<(), String>>),
    /// A message; it wants an acknowledgement unless it is of QoS 0.
    Message(Box<Incoming>),
    /// The oldest request to publish was sent under this packet id.
    Sent(u16),
    /// The remote has answered for a packet id, perhaps with a refusal.
    Answered(u16, Result<(), Refusal>),
    /// The goodbye is sent.
    Disconnected,
    /// A sign of life, and perhaps room for a request.
    Alive,
    /// The connection is over.
    Closed(String),
}

/// A message of the remote and how to acknowledge it.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) packet: Packet,
    pub(crate) receipt: Receipt,
}

/// What an acknowledgement needs. It is valid on the connection that the message came by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Receipt {
    packet_id: u16,
    qos: Qos,
}

/// Why the remote did not take a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    /// It may take the message later.
    pub(crate) passing: bool,
}

/// Why no connection could be tried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// A certificate, key or trust anchor cannot be loaded.
    #[error(transparent)]
    Load(#[from] selvedge_certs::LoadError),
    /// They do not make a TLS configuration.
    #[error(transparent)]
    Tls(#[from] selvedge_certs::TlsError),
    /// The password cannot be read.
    #[error("cannot read password_file: {0}")]
    Password(#[source] std::io::Error),
}

/// The sending half; its event loop ends with it.
#[derive(Debug)]
pub(crate) struct Link {
    requests: Requests,
    _event_loop: AbortOnDropHandle<()>,
}

#[derive(Debug)]
enum Requests {
    V311(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

impl Link {
    /// Starts to connect. Certificates and password are read anew, so a renewed one is used from the
    /// next connection on.
    pub(crate) async fn open(
        config: &RemoteConfig,
    ) -> Result<(Self, mpsc::Receiver<Event>), LinkError> {
        let login = match &config.login {
            Some((user, file)) => Some((user.clone(), read_password(file).await?)),
            None => None,
        };
        let transport = match &config.tls {
            Some(tls) => Transport::tls_with_config(TlsConfiguration::Rustls(tls_config(tls)?)),
            None => Transport::Tcp,
        };
        let (events, receiver) = mpsc::channel(EVENTS);
        let (requests, event_loop) = match config.version {
            Version::V311 => {
                let options = options_v311(config, login, transport);
                let (client, mut event_loop) = rumqttc::AsyncClient::new(options, REQUESTS);
                event_loop.network_options.set_tcp_nodelay(true);
                let timeout = CONNECT_TIMEOUT.as_secs();
                event_loop.network_options.set_connection_timeout(timeout);
                let max_packet = config.max_packet_bytes;
                let drive = drive_v311(event_loop, max_packet, events);
                (Requests::V311(client), tokio::spawn(drive))
            }
            Version::V5 => {
                let options = options_v5(config, login, transport);
                let (client, event_loop) = v5::AsyncClient::new(options, REQUESTS);
                let max_packet = config.max_packet_bytes;
                let drive = drive_v5(event_loop, max_packet, events);
                (Requests::V5(client), tokio::spawn(drive))
            }
        };
        let link = Self {
            requests,
            _event_loop: AbortOnDropHandle::new(event_loop),
        };
        Ok((link, receiver))
    }

    /// Asks for messages; `false` when the request must be tried again after the next event. One
    /// request, so that there is one answer.
    pub(crate) fn try_subscribe(&self, filters: &[(TopicFilter, Qos)], resumable: bool) -> bool {
        let filters = filters.iter();
        match &self.requests {
            Requests::V311(client) => client
                .try_subscribe_many(filters.map(|(filter, qos)| {
                    rumqttc::SubscribeFilter::new(filter.to_string(), to_v311_qos(*qos))
                }))
                .is_ok(),
            Requests::V5(client) => client
                .try_subscribe_many(filters.map(|(filter, qos)| v5packet::Filter {
                    // The remote does not send the bridge what the bridge published there.
                    nolocal: true,
                    // Or live messages would lose their retain flag on the way.
                    preserve_retain: true,
                    retain_forward_rule: match resumable {
                        true => v5packet::RetainForwardRule::OnNewSubscribe,
                        false => v5packet::RetainForwardRule::OnEverySubscribe,
                    },
                    ..v5packet::Filter::new(filter.to_string(), to_v5_qos(*qos))
                }))
                .is_ok(),
        }
    }

    /// Publishes; `false` when the request must be tried again after the next event.
    pub(crate) fn try_publish(&self, packet: &Packet) -> bool {
        // The topic is one of the bridge's own, which are text.
        let topic = String::from_utf8_lossy(&packet.topic).into_owned();
        match &self.requests {
            Requests::V311(client) => {
                let qos = to_v311_qos(packet.qos);
                let payload = packet.payload.to_vec();
                client
                    .try_publish(topic, qos, packet.retain, payload)
                    .is_ok()
            }
            Requests::V5(client) => client
                .try_publish_with_properties(
                    topic,
                    to_v5_qos(packet.qos),
                    packet.retain,
                    packet.payload.clone(),
                    to_remote(&packet.properties),
                )
                .is_ok(),
        }
    }

    /// Acknowledges; `false` when the request must be tried again after the next event.
    pub(crate) fn try_ack(&self, receipt: Receipt) -> bool {
        match &self.requests {
            Requests::V311(client) => {
                let mut publish = rumqttc::Publish::new("", to_v311_qos(receipt.qos), Vec::new());
                publish.pkid = receipt.packet_id;
                client.try_ack(&publish).is_ok()
            }
            Requests::V5(client) => {
                let qos = to_v5_qos(receipt.qos);
                let mut publish = v5packet::Publish::new("", qos, Bytes::new(), None);
                publish.pkid = receipt.packet_id;
                client.try_ack(&publish).is_ok()
            }
        }
    }

    /// Says goodbye after everything requested so far; `false` when it must be tried again after the
    /// next event.
    pub(crate) fn try_disconnect(&self) -> bool {
        match &self.requests {
            Requests::V311(client) => client.try_disconnect().is_ok(),
            Requests::V5(client) => client.try_disconnect().is_ok(),
        }
    }

    /// Bytes of the packet that would carry this message.
    pub(crate) fn packet_bytes(&self, packet: &Packet) -> usize {
        match &self.requests {
            // Fixed header of at most 5, length of the topic, packet id.
            Requests::V311(_) => 9 + packet.topic.len() + packet.payload.len(),
            Requests::V5(_) => {
                let topic = String::from_utf8_lossy(&packet.topic);
                let properties = Some(to_remote(&packet.properties));
                let payload = packet.payload.clone();
                let qos = to_v5_qos(packet.qos);
                v5packet::Publish::new(topic, qos, payload, properties).size()
            }
        }
    }
}

impl Receipt {
    /// Whether the remote waits for an acknowledgement.
    pub(crate) fn is_wanted(self) -> bool {
        self.qos > Qos::AtMostOnce
    }
}

async fn read_password(file: &Path) -> Result<String, LinkError> {
    let text = tokio::fs::read_to_string(file).await;
    let text = text.map_err(LinkError::Password)?;
    // Editors end a file with a line break, and no password does.
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn tls_config(tls: &RemoteTls) -> Result<std::sync::Arc<rustls::ClientConfig>, LinkError> {
    let anchors = TrustAnchors::from_file(&tls.ca)?;
    let credentials = match &tls.identity {
        Some((cert, key)) => Some(Credentials::from_files(cert, key)?),
        None => None,
    };
    let credentials = credentials.as_ref();
    Ok(tcp_client_config(
        credentials,
        &anchors,
        ServerIdentity::Any,
        &[],
    )?)
}

fn options_v311(
    config: &RemoteConfig,
    login: Option<(String, String)>,
    transport: Transport,
) -> rumqttc::MqttOptions {
    let mut options = rumqttc::MqttOptions::new(&config.client_id, &config.host, config.port);
    options
        .set_transport(transport)
        .set_keep_alive(config.keep_alive)
        .set_clean_session(config.clean_session)
        .set_max_packet_size(config.max_packet_bytes, config.max_packet_bytes)
        .set_inflight(PACKET_IDS)
        .set_manual_acks(true);
    if let Some((user, password)) = login {
        options.set_credentials(user, password);
    }
    options
}

fn options_v5(
    config: &RemoteConfig,
    login: Option<(String, String)>,
    transport: Transport,
) -> v5::MqttOptions {
    let mut network = rumqttc::NetworkOptions::new();
    network.set_tcp_nodelay(true);
    let timeout = CONNECT_TIMEOUT.as_secs();
    network.set_connection_timeout(timeout);
    let expiry = match config.clean_session {
        true => 0,
        false => u32::try_from(config.session_expiry.as_secs()).unwrap_or(u32::MAX),
    };
    let max_packet = u32::try_from(config.max_packet_bytes).unwrap_or(u32::MAX);
    let mut options = v5::MqttOptions::new(&config.client_id, &config.host, config.port);
    options
        .set_transport(transport)
        .set_keep_alive(config.keep_alive)
        .set_clean_start(config.clean_session)
        .set_session_expiry_interval(Some(expiry))
        .set_receive_maximum(Some(WINDOW))
        .set_max_packet_size(Some(max_packet))
        .set_network_options(network)
        .set_connection_timeout(timeout)
        .set_outgoing_inflight_upper_limit(PACKET_IDS)
        .set_manual_acks(true);
    if let Some((user, password)) = login {
        options.set_credentials(user, password);
    }
    options
}

async fn drive_v311(
    mut event_loop: rumqttc::EventLoop,
    max_packet: usize,
    events: mpsc::Sender<Event>,
) {
    loop {
        let event = match event_loop.poll().await {
            Ok(rumqttc::Event::Incoming(packet)) => translate_v311(packet, max_packet),
            Ok(rumqttc::Event::Outgoing(outgoing)) => translate_outgoing(&outgoing),
            Err(error) => Event::Closed(error.to_string()),
        };
        let last = matches!(event, Event::Closed(_) | Event::Disconnected);
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

async fn drive_v5(mut event_loop: v5::EventLoop, max_packet: usize, events: mpsc::Sender<Event>) {
    loop {
        let event = match event_loop.poll().await {
            Ok(v5::Event::Incoming(packet)) => translate_v5(packet, max_packet),
            Ok(v5::Event::Outgoing(outgoing)) => translate_outgoing(&outgoing),
            Err(error) => Event::Closed(error.to_string()),
        };
        let last = matches!(event, Event::Closed(_) | Event::Disconnected);
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

fn translate_outgoing(outgoing: &Outgoing) -> Event {
    match outgoing {
        Outgoing::Publish(packet_id) => Event::Sent(*packet_id),
        Outgoing::Disconnect => Event::Disconnected,
        // A packet id in use (`AwaitAck`) holds its message back; `Publish` follows when it is free.
        _ => Event::Alive,
    }
}

fn translate_v311(packet: rumqttc::Packet, max_packet: usize) -> Event {
    match packet {
        rumqttc::Packet::ConnAck(connack) => Event::Connected(Limits {
            session_present: connack.session_present,
            receive_maximum: u16::MAX,
            packet_bytes: max_packet,
            qos: Qos::ExactlyOnce,
            retain: true,
            keep_alive: None,
        }),
        rumqttc::Packet::SubAck(suback) => {
            let codes = suback.return_codes.into_iter();
            let granted = codes.map(|code| match code {
                rumqttc::SubscribeReasonCode::Success(_) => Ok(()),
                rumqttc::SubscribeReasonCode::Failure => Err("0x80".to_owned()),
            });
            Event::Subscribed(granted.collect())
        }
        rumqttc::Packet::Publish(publish) => {
            let qos = from_v311_qos(publish.qos);
            Event::Message(Box::new(Incoming {
                packet: Packet {
                    topic: publish.topic.into(),
                    payload: publish.payload,
                    qos,
                    retain: publish.retain,
                    properties: Properties::default(),
                },
                receipt: Receipt {
                    packet_id: publish.pkid,
                    qos,
                },
            }))
        }
        rumqttc::Packet::PubAck(puback) => Event::Answered(puback.pkid, Ok(())),
        _ => Event::Alive,
    }
}

fn translate_v5(packet: v5packet::Packet, max_packet: usize) -> Event {
    match packet {
        v5packet::Packet::ConnAck(connack) => {
            let given = connack.properties.as_ref();
            let packet_bytes = given.and_then(|given| given.max_packet_size);
            let packet_bytes = packet_bytes.and_then(|bytes| usize::try_from(bytes).ok());
            let qos = given.and_then(|given| given.max_qos);
            let keep_alive = given.and_then(|given| given.server_keep_alive);
            Event::Connected(Limits {
                session_present: connack.session_present,
                receive_maximum: given
                    .and_then(|given| given.receive_max)
                    .unwrap_or(u16::MAX),
                packet_bytes: packet_bytes.map_or(max_packet, |bytes| bytes.min(max_packet)),
                qos: qos
                    .and_then(|qos| Qos::try_from(qos).ok())
                    .unwrap_or(Qos::ExactlyOnce),
                retain: given.and_then(|given| given.retain_available) != Some(0),
                keep_alive: keep_alive.map(|seconds| Duration::from_secs(seconds.into())),
            })
        }
        v5packet::Packet::SubAck(suback) => {
            let codes = suback.return_codes.into_iter();
            let granted = codes.map(|code| match code {
                v5packet::SubscribeReasonCode::Success(_) => Ok(()),
                refusal => Err(format!("{refusal:?}")),
            });
            Event::Subscribed(granted.collect())
        }
        v5packet::Packet::Publish(publish) => {
            let qos = from_v5_qos(publish.qos);
            Event::Message(Box::new(Incoming {
                packet: Packet {
                    topic: publish.topic,
                    payload: publish.payload,
                    qos,
                    retain: publish.retain,
                    properties: publish.properties.map(from_remote).unwrap_or_default(),
                },
                receipt: Receipt {
                    packet_id: publish.pkid,
                    qos,
                },
            }))
        }
        v5packet::Packet::PubAck(puback) => {
            use v5packet::PubAckReason as Reason;
            let outcome = match puback.reason {
                Reason::Success | Reason::NoMatchingSubscribers => Ok(()),
                reason => Err(Refusal {
                    passing: reason == Reason::QuotaExceeded,
                    reason: format!("{reason:?}"),
                }),
            };
            Event::Answered(puback.pkid, outcome)
        }
        _ => Event::Alive,
    }
}

fn to_v311_qos(qos: Qos) -> rumqttc::QoS {
    match qos {
        Qos::AtMostOnce => rumqttc::QoS::AtMostOnce,
        Qos::AtLeastOnce => rumqttc::QoS::AtLeastOnce,
        Qos::ExactlyOnce => rumqttc::QoS::ExactlyOnce,
    }
}

fn from_v311_qos(qos: rumqttc::QoS) -> Qos {
    match qos {
        rumqttc::QoS::AtMostOnce => Qos::AtMostOnce,
        rumqttc::QoS::AtLeastOnce => Qos::AtLeastOnce,
        rumqttc::QoS::ExactlyOnce => Qos::ExactlyOnce,
    }
}

fn to_v5_qos(qos: Qos) -> v5::mqttbytes::QoS {
    match qos {
        Qos::AtMostOnce => v5::mqttbytes::QoS::AtMostOnce,
        Qos::AtLeastOnce => v5::mqttbytes::QoS::AtLeastOnce,
        Qos::ExactlyOnce => v5::mqttbytes::QoS::ExactlyOnce,
    }
}

fn from_v5_qos(qos: v5::mqttbytes::QoS) -> Qos {
    match qos {
        v5::mqttbytes::QoS::AtMostOnce => Qos::AtMostOnce,
        v5::mqttbytes::QoS::AtLeastOnce => Qos::AtLeastOnce,
        v5::mqttbytes::QoS::ExactlyOnce => Qos::ExactlyOnce,
    }
}

#[cfg(test)]
mod tests;
