//! MQTT packets to and from the bridge's own events and requests, for 3.1.1 and 5 alike. The bytes are
//! read and written by rumqttc's codec.

use bytes::{Bytes, BytesMut};
use rumqttc::mqttbytes::{self as v4, v4 as v4packet};
use rumqttc::v5::mqttbytes::{self as v5, v5 as v5packet};
use selvedge_proto::message::{Properties, Qos};
use selvedge_proto::topic::TopicFilter;

use super::{Event, Incoming, Limits, Receipt, Refusal, WINDOW};
use crate::config::RemoteConfig;
use crate::forward::Packet;
use crate::mapping::Version;
use crate::properties::{from_remote, to_remote};

/// The packet id of the one SUBSCRIBE of a connection; publishes have ids below it.
const SUBSCRIBE_ID: u16 = u16::MAX;

/// Packets of one MQTT version.
#[derive(Debug, Clone, Copy)]
pub(super) struct Codec {
    version: Version,
    /// The largest packet taken, in bytes.
    max_packet: usize,
}

/// Why bytes are no packet that a broker may send.
pub(super) type Malformed = String;

impl Codec {
    pub(super) fn new(version: Version, max_packet: usize) -> Self {
        Self {
            version,
            max_packet,
        }
    }

    pub(super) fn connect(self, config: &RemoteConfig, login: Option<(String, String)>) -> Bytes {
        let keep_alive = u16::try_from(config.keep_alive.as_secs()).unwrap_or(u16::MAX);
        match self.version {
            Version::V311 => {
                let mut connect = v4packet::Connect::new(config.client_id.as_str());
                connect.keep_alive = keep_alive;
                connect.clean_session = config.clean_session;
                if let Some((user, password)) = login {
                    connect.set_login(user, password);
                }
                encode_v4(&v4packet::Packet::Connect(connect))
            }
            Version::V5 => {
                let mut properties = v5packet::ConnectProperties::new();
                properties.session_expiry_interval = Some(match config.clean_session {
                    true => 0,
                    false => u32::try_from(config.session_expiry.as_secs()).unwrap_or(u32::MAX),
                });
                properties.receive_maximum = Some(WINDOW);
                properties.max_packet_size =
                    Some(u32::try_from(self.max_packet).unwrap_or(u32::MAX));
                let connect = v5packet::Connect {
                    keep_alive,
                    client_id: config.client_id.clone(),
                    clean_start: config.clean_session,
                    properties: Some(properties),
                };
                let login = login.map(|(user, password)| v5packet::Login::new(user, password));
                encode_v5(&v5packet::Packet::Connect(connect, None, login))
            }
        }
        // A client id and a password of any length that fits a string of MQTT can be written.
        .unwrap_or_default()
    }

    /// Asks for messages, in one request so that there is one answer.
    pub(super) fn subscribe(self, filters: &[(TopicFilter, Qos)], resumable: bool) -> Bytes {
        let filters = filters.iter();
        match self.version {
            Version::V311 => {
                let mut subscribe = v4packet::Subscribe::new_many(filters.map(|(filter, qos)| {
                    v4packet::SubscribeFilter::new(filter.to_string(), to_v4(*qos))
                }));
                subscribe.pkid = SUBSCRIBE_ID;
                encode_v4(&v4packet::Packet::Subscribe(subscribe))
            }
            Version::V5 => {
                let filters = filters.map(|(filter, qos)| v5packet::Filter {
                    // The remote does not send the bridge what the bridge published there.
                    nolocal: true,
                    // Or live messages would lose their retain flag on the way.
                    preserve_retain: true,
                    retain_forward_rule: match resumable {
                        true => v5packet::RetainForwardRule::OnNewSubscribe,
                        false => v5packet::RetainForwardRule::OnEverySubscribe,
                    },
                    ..v5packet::Filter::new(filter.to_string(), to_v5(*qos))
                });
                let mut subscribe = v5packet::Subscribe::new_many(filters, None);
                subscribe.pkid = SUBSCRIBE_ID;
                encode_v5(&v5packet::Packet::Subscribe(subscribe))
            }
        }
        // Filters are checked when the configuration is.
        .unwrap_or_default()
    }

    /// The bytes of a PUBLISH, or why there can be none.
    pub(super) fn publish(
        self,
        packet: &Packet,
        packet_id: u16,
        duplicate: bool,
    ) -> Result<Bytes, String> {
        match self.version {
            Version::V311 => {
                // The topic is one of the bridge's own, which are text.
                let topic = String::from_utf8_lossy(&packet.topic);
                let payload = packet.payload.clone();
                let mut publish = v4packet::Publish::from_bytes(topic, to_v4(packet.qos), payload);
                publish.pkid = packet_id;
                publish.dup = duplicate;
                publish.retain = packet.retain;
                encode_v4(&v4packet::Packet::Publish(publish))
            }
            Version::V5 => encode_v5(&v5packet::Packet::Publish(v5packet::Publish {
                dup: duplicate,
                qos: to_v5(packet.qos),
                retain: packet.retain,
                topic: packet.topic.clone(),
                pkid: packet_id,
                payload: packet.payload.clone(),
                properties: Some(to_remote(&packet.properties)),
            })),
        }
    }

    /// PUBACK for QoS 1, PUBREC for QoS 2.
    pub(super) fn acknowledge(self, receipt: Receipt) -> Bytes {
        let id = receipt.packet_id;
        let packet = match (self.version, receipt.qos) {
            (Version::V311, Qos::ExactlyOnce) => {
                encode_v4(&v4packet::Packet::PubRec(v4packet::PubRec::new(id)))
            }
            (Version::V311, _) => encode_v4(&v4packet::Packet::PubAck(v4packet::PubAck::new(id))),
            (Version::V5, Qos::ExactlyOnce) => {
                encode_v5(&v5packet::Packet::PubRec(v5packet::PubRec::new(id, None)))
            }
            (Version::V5, _) => {
                encode_v5(&v5packet::Packet::PubAck(v5packet::PubAck::new(id, None)))
            }
        };
        packet.unwrap_or_default()
    }

    pub(super) fn release(self, id: u16) -> Bytes {
        match self.version {
            Version::V311 => encode_v4(&v4packet::Packet::PubRel(v4packet::PubRel::new(id))),
            Version::V5 => encode_v5(&v5packet::Packet::PubRel(v5packet::PubRel::new(id, None))),
        }
        .unwrap_or_default()
    }

    pub(super) fn complete(self, id: u16) -> Bytes {
        match self.version {
            Version::V311 => encode_v4(&v4packet::Packet::PubComp(v4packet::PubComp::new(id))),
            Version::V5 => encode_v5(&v5packet::Packet::PubComp(v5packet::PubComp::new(id, None))),
        }
        .unwrap_or_default()
    }

    pub(super) fn ping(self) -> Bytes {
        Bytes::from_static(&[0xc0, 0])
    }

    pub(super) fn disconnect(self) -> Bytes {
        Bytes::from_static(&[0xe0, 0])
    }

    /// Takes the next whole packet out of what was received; `None` when more is needed.
    pub(super) fn decode(self, received: &mut BytesMut) -> Result<Option<Event>, Malformed> {
        match self.version {
            Version::V311 => match v4packet::Packet::read(received, self.max_packet) {
                Ok(packet) => from_v4(packet, self.max_packet).map(Some),
                Err(v4::Error::InsufficientBytes(_)) => Ok(None),
                Err(error) => Err(error.to_string()),
            },
            Version::V5 => {
                let max_packet = u32::try_from(self.max_packet).unwrap_or(u32::MAX);
                match v5packet::Packet::read(received, Some(max_packet)) {
                    Ok(packet) => from_v5(packet, self.max_packet).map(Some),
                    Err(v5::Error::InsufficientBytes(_)) => Ok(None),
                    Err(error) => Err(error.to_string()),
                }
            }
        }
    }
}

fn encode_v4(packet: &v4packet::Packet) -> Result<Bytes, String> {
    let mut buffer = BytesMut::with_capacity(packet.size());
    let written = packet.write(&mut buffer, usize::MAX);
    written.map_err(|error| error.to_string())?;
    Ok(buffer.freeze())
}

fn encode_v5(packet: &v5packet::Packet) -> Result<Bytes, String> {
    let mut buffer = BytesMut::with_capacity(packet.size());
    let written = packet.write(&mut buffer, None);
    written.map_err(|error| error.to_string())?;
    Ok(buffer.freeze())
}

fn refused(code: impl std::fmt::Debug) -> Malformed {
    format!("the remote refused the connection: {code:?}")
}

fn from_v4(packet: v4packet::Packet, max_packet: usize) -> Result<Event, Malformed> {
    use v4packet::Packet as P;
    Ok(match packet {
        P::ConnAck(connack) if connack.code != v4packet::ConnectReturnCode::Success => {
            return Err(refused(connack.code));
        }
        P::ConnAck(connack) => Event::Connected(Limits {
            session_present: connack.session_present,
            receive_maximum: u16::MAX,
            packet_bytes: max_packet,
            qos: Qos::ExactlyOnce,
            retain: true,
            keep_alive: None,
        }),
        P::SubAck(suback) => {
            let codes = suback.return_codes.into_iter();
            let granted = codes.map(|code| match code {
                v4packet::SubscribeReasonCode::Success(_) => Ok(()),
                v4packet::SubscribeReasonCode::Failure => Err("0x80".to_owned()),
            });
            Event::Subscribed(granted.collect())
        }
        P::Publish(publish) => {
            let qos = from_v4_qos(publish.qos);
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
        P::PubAck(puback) => Event::Acknowledged(puback.pkid, Ok(())),
        P::PubRec(pubrec) => Event::Received(pubrec.pkid, Ok(())),
        P::PubRel(pubrel) => Event::Released(pubrel.pkid),
        P::PubComp(pubcomp) => Event::Completed(pubcomp.pkid),
        P::PingResp | P::UnsubAck(_) => Event::Alive,
        other => return Err(format!("expected a packet of a broker, found {other:?}")),
    })
}

fn from_v5(packet: v5packet::Packet, max_packet: usize) -> Result<Event, Malformed> {
    use v5packet::Packet as P;
    Ok(match packet {
        P::ConnAck(connack) if connack.code != v5packet::ConnectReturnCode::Success => {
            return Err(refused(connack.code));
        }
        P::ConnAck(connack) => {
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
                keep_alive: keep_alive
                    .filter(|seconds| *seconds > 0)
                    .map(|seconds| std::time::Duration::from_secs(seconds.into())),
            })
        }
        P::SubAck(suback) => {
            let codes = suback.return_codes.into_iter();
            let granted = codes.map(|code| match code {
                v5packet::SubscribeReasonCode::Success(_) => Ok(()),
                refusal => Err(format!("{refusal:?}")),
            });
            Event::Subscribed(granted.collect())
        }
        P::Publish(publish) => {
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
        P::PubAck(puback) => {
            use v5packet::PubAckReason as Reason;
            let outcome = match puback.reason {
                Reason::Success | Reason::NoMatchingSubscribers => Ok(()),
                reason => Err(Refusal {
                    passing: reason == Reason::QuotaExceeded,
                    reason: format!("{reason:?}"),
                }),
            };
            Event::Acknowledged(puback.pkid, outcome)
        }
        P::PubRec(pubrec) => {
            use v5packet::PubRecReason as Reason;
            let outcome = match pubrec.reason {
                Reason::Success | Reason::NoMatchingSubscribers => Ok(()),
                reason => Err(Refusal {
                    passing: matches!(
                        reason,
                        Reason::QuotaExceeded | Reason::PacketIdentifierInUse
                    ),
                    reason: format!("{reason:?}"),
                }),
            };
            Event::Received(pubrec.pkid, outcome)
        }
        P::PubRel(pubrel) => Event::Released(pubrel.pkid),
        // Not found is as good: it was completed before.
        P::PubComp(pubcomp) => Event::Completed(pubcomp.pkid),
        P::PingResp(_) | P::UnsubAck(_) => Event::Alive,
        P::Disconnect(disconnect) => {
            return Err(format!(
                "the remote said goodbye: {:?}",
                disconnect.reason_code
            ));
        }
        other => return Err(format!("expected a packet of a broker, found {other:?}")),
    })
}

fn to_v4(qos: Qos) -> v4::QoS {
    match qos {
        Qos::AtMostOnce => v4::QoS::AtMostOnce,
        Qos::AtLeastOnce => v4::QoS::AtLeastOnce,
        Qos::ExactlyOnce => v4::QoS::ExactlyOnce,
    }
}

fn from_v4_qos(qos: v4::QoS) -> Qos {
    match qos {
        v4::QoS::AtMostOnce => Qos::AtMostOnce,
        v4::QoS::AtLeastOnce => Qos::AtLeastOnce,
        v4::QoS::ExactlyOnce => Qos::ExactlyOnce,
    }
}

fn to_v5(qos: Qos) -> v5::QoS {
    match qos {
        Qos::AtMostOnce => v5::QoS::AtMostOnce,
        Qos::AtLeastOnce => v5::QoS::AtLeastOnce,
        Qos::ExactlyOnce => v5::QoS::ExactlyOnce,
    }
}

fn from_v5_qos(qos: v5::QoS) -> Qos {
    match qos {
        v5::QoS::AtMostOnce => Qos::AtMostOnce,
        v5::QoS::AtLeastOnce => Qos::AtLeastOnce,
        v5::QoS::ExactlyOnce => Qos::ExactlyOnce,
    }
}
