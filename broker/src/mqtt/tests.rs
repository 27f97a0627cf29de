//! MQTT clients against the real listener: what they get, and exactly how they are refused.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use rmqtt_codec::types::QoS;
use rmqtt_codec::{v3, v5};
use selvedge_certs::{
    Authority, ClientAuth, Credentials, Identity, IssueRequest, ServerIdentity, TrustAnchors,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::codec::Framed;

use super::packet::Publish;
use super::{Carrier, Listener, Mode, listen, password};
use crate::config::{DurabilityRules, Limits};
use crate::fabric::{Fabric, FabricOptions, REFUSALS};
use crate::policy::Policy;

const POLICY: &str = r##"
[[rule]]
name = "everyone uses the plant"
identities = ["acme/*/*"]
allow = ["publish", "subscribe"]
subjects = ["plant/#"]

[[rule]]
name = "each has a place of its own"
identities = ["acme/*/*"]
allow = ["publish", "subscribe"]
subjects = ["own/{name}/#"]

[[rule]]
name = "secrets stay secret"
identities = ["*/*/*"]
deny = ["publish", "subscribe"]
subjects = ["plant/secret/#"]
"##;

/// Long enough for a busy machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(20);

fn identity(name: &str) -> Identity {
    format!("spiffe://example.org/acme/berlin/{name}")
        .parse()
        .unwrap()
}

/// A broker with one MQTT listener, stopped with the test.
struct Broker {
    fabric: Arc<Fabric>,
    address: SocketAddr,
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.fabric.shutdown.cancel();
    }
}

impl Broker {
    async fn with(mode: Mode, limits: Limits) -> Self {
        let policy = Policy::parse(POLICY).unwrap();
        let fabric = Fabric::new(FabricOptions {
            name: "test".to_owned(),
            identity: identity("broker"),
            limits,
            policy,
            metrics: Arc::default(),
            store: None,
            durability: DurabilityRules::all(true),
            history: Vec::new(),
            mqtt: crate::mqtt::settings::Settings::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let kind = Listener {
            mode,
            carrier: Carrier::Stream,
            proxies: None,
        };
        tokio::spawn(listen(Arc::clone(&fabric), listener, kind));
        Self { fabric, address }
    }

    async fn plaintext(limits: Limits) -> Self {
        let identity = identity("sensor");
        Self::with(Mode::Plaintext { identity }, limits).await
    }

    async fn start() -> Self {
        Self::plaintext(Limits::default()).await
    }

    async fn stream(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn client(&self, connect: v5::Connect) -> (Client<TcpStream>, v5::ConnectAck) {
        Client::connect(self.stream().await, connect).await
    }

    /// A client with a clean session, let in.
    async fn named(&self, name: &str) -> Client<TcpStream> {
        let (client, ack) = self.client(clean(name)).await;
        assert_eq!(ack.reason_code, v5::ConnectAckReason::Success);
        client
    }

    fn metric(&self, line: &str) -> bool {
        self.fabric.metrics.encode().lines().any(|l| l == line)
    }
}

fn clean(name: &str) -> v5::Connect {
    v5::Connect {
        client_id: name.into(),
        clean_start: true,
        ..v5::Connect::default()
    }
}

fn kept(name: &str) -> v5::Connect {
    v5::Connect {
        client_id: name.into(),
        session_expiry_interval_secs: 600,
        ..v5::Connect::default()
    }
}

fn message(topic: &str, payload: &'static str, id: u16) -> Publish {
    Publish {
        dup: false,
        retain: false,
        qos: if id == 0 {
            QoS::AtMostOnce
        } else {
            QoS::AtLeastOnce
        },
        topic: topic.into(),
        packet_id: id.try_into().ok(),
        payload: Bytes::from_static(payload.as_bytes()),
        properties: None,
    }
}

/// A 5.0 client that shows every packet.
struct Client<S> {
    framed: Framed<S, v5::Codec>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    async fn connect(stream: S, connect: v5::Connect) -> (Self, v5::ConnectAck) {
        let mut client = Self {
            framed: Framed::new(stream, v5::Codec::new(0, 0)),
        };
        client.send(connect.into()).await;
        let v5::Packet::ConnectAck(ack) = client.next().await else {
            panic!("expected CONNACK");
        };
        (client, *ack)
    }

    async fn send(&mut self, packet: v5::Packet) {
        self.framed.send(packet).await.unwrap();
    }

    async fn try_next(&mut self) -> Option<v5::Packet> {
        let next = timeout(PATIENCE, self.framed.next()).await;
        Some(next.expect("an answer in time")?.unwrap().0)
    }

    async fn next(&mut self) -> v5::Packet {
        self.try_next().await.expect("the connection is open")
    }

    async fn publish(&mut self, message: Publish) -> v5::PublishAck {
        self.send(message.into()).await;
        match self.next().await {
            v5::Packet::PublishAck(ack) => ack,
            other => panic!("expected PUBACK, got {other:?}"),
        }
    }

    async fn subscribe(&mut self, filter: &str) -> v5::SubscribeAck {
        self.subscribe_with(filter, None, v5::SubscriptionOptions::default())
            .await
    }

    async fn subscribe_with(
        &mut self,
        filter: &str,
        id: Option<u32>,
        options: v5::SubscriptionOptions,
    ) -> v5::SubscribeAck {
        self.send(v5::Packet::Subscribe(v5::Subscribe {
            packet_id: 7.try_into().unwrap(),
            id: id.map(|id| id.try_into().unwrap()),
            user_properties: Vec::new(),
            topic_filters: vec![(
                filter.into(),
                v5::SubscriptionOptions {
                    qos: QoS::AtLeastOnce,
                    ..options
                },
            )],
        }))
        .await;
        match self.next().await {
            v5::Packet::SubscribeAck(ack) => ack,
            other => panic!("expected SUBACK, got {other:?}"),
        }
    }

    /// The next message, which is not acknowledged.
    async fn message(&mut self) -> Publish {
        match self.next().await {
            v5::Packet::Publish(publish) => *publish,
            other => panic!("expected PUBLISH, got {other:?}"),
        }
    }

    async fn acknowledge(&mut self, message: &Publish) {
        let packet_id = message.packet_id.unwrap();
        self.send(v5::Packet::PublishAck(v5::PublishAck {
            packet_id,
            ..v5::PublishAck::default()
        }))
        .await;
    }

    /// Nothing has come that the broker sent before answering this.
    async fn nothing_waits(&mut self) {
        self.send(v5::Packet::PingRequest).await;
        assert_eq!(self.next().await, v5::Packet::PingResponse);
    }

    async fn disconnected(&mut self) -> v5::DisconnectReasonCode {
        match self.next().await {
            v5::Packet::Disconnect(disconnect) => {
                assert_eq!(self.try_next().await, None);
                disconnect.reason_code
            }
            other => panic!("expected DISCONNECT, got {other:?}"),
        }
    }

    async fn leave(mut self) {
        self.send(v5::Packet::Disconnect(v5::Disconnect::default()))
            .await;
        assert_eq!(self.try_next().await, None);
    }
}

#[tokio::test]
async fn both_versions_of_another_make_exchange_messages() {
    use rumqttc::{v5 as five, *};
    let broker = Broker::start().await;
    let port = broker.address.port();

    let mut old = MqttOptions::new("old", "127.0.0.1", port);
    old.set_keep_alive(Duration::from_secs(60));
    let (old, mut old_events) = AsyncClient::new(old, 16);
    let mut new = five::MqttOptions::new("new", "127.0.0.1", port);
    new.set_keep_alive(Duration::from_secs(60));
    let (new, mut new_events) = five::AsyncClient::new(new, 16);

    old.subscribe("plant/old", QoS::AtLeastOnce).await.unwrap();
    new.subscribe("plant/new/+", five::mqttbytes::QoS::AtLeastOnce)
        .await
        .unwrap();
    let exchange = async {
        loop {
            if let Event::Incoming(Packet::SubAck(_)) = old_events.poll().await.unwrap() {
                break;
            }
        }
        loop {
            let event = new_events.poll().await.unwrap();
            if matches!(event, five::Event::Incoming(five::Incoming::SubAck(_))) {
                break;
            }
        }
        for (index, qos) in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]
            .into_iter()
            .enumerate()
        {
            let payload = format!("from old {index}");
            old.publish("plant/new/x", qos, false, payload)
                .await
                .unwrap();
        }
        let mut received = Vec::new();
        while received.len() < 3 {
            tokio::select! {
                event = old_events.poll() => { event.unwrap(); }
                event = new_events.poll() => {
                    if let five::Event::Incoming(five::Incoming::Publish(publish)) = event.unwrap() {
                        received.push(publish.payload);
                    }
                }
            }
        }
        assert_eq!(received, ["from old 0", "from old 1", "from old 2"]);
        new.publish(
            "plant/old",
            five::mqttbytes::QoS::AtLeastOnce,
            false,
            "from new",
        )
        .await
        .unwrap();
        loop {
            tokio::select! {
                event = new_events.poll() => { event.unwrap(); }
                event = old_events.poll() => {
                    if let Event::Incoming(Packet::Publish(publish)) = event.unwrap() {
                        assert_eq!(publish.payload, "from new");
                        break;
                    }
                }
            }
        }
    };
    timeout(PATIENCE, exchange).await.unwrap();
}

#[tokio::test]
async fn properties_and_large_payloads_arrive_as_they_were_sent() {
    let broker = Broker::start().await;
    let mut receiver = broker.named("receiver").await;
    receiver.subscribe("plant/a").await;
    let mut sender = broker.named("sender").await;
    let properties = v5::PublishProperties {
        correlation_data: Some(Bytes::from_static(b"42")),
        message_expiry_interval: 60.try_into().ok(),
        content_type: Some("text/plain".into()),
        user_properties: vec![
            ("a".into(), "b".into()),
            ("selvedge-class".into(), "alarm".into()),
        ],
        is_utf8_payload: true,
        response_topic: Some("plant/answers".into()),
        ..v5::PublishProperties::default()
    };
    let large = Bytes::from(vec![b'x'; 300_000]);
    sender
        .publish(Publish {
            payload: large.clone(),
            properties: Some(properties.clone()),
            ..message("plant/a", "", 1)
        })
        .await;
    let received = receiver.message().await;
    assert_eq!(received.payload, large);
    assert_eq!(received.properties, Some(properties));
    // The empty payload is neither large nor missing.
    sender.publish(message("plant/a", "", 2)).await;
    assert_eq!(receiver.message().await.payload, "");
}

#[tokio::test]
async fn a_retained_message_meets_new_subscribers_until_it_is_cleared() {
    let broker = Broker::start().await;
    let mut sender = broker.named("sender").await;
    let retained = |payload, id| Publish {
        retain: true,
        ..message("plant/state", payload, id)
    };
    sender.publish(retained("on", 1)).await;

    let mut early = broker.named("early").await;
    early.subscribe("plant/#").await;
    let first = early.message().await;
    assert_eq!((&*first.payload, first.retain), (&b"on"[..], true));
    early.acknowledge(&first).await;

    // To an established subscription the flag is not passed on, unless it asked for it.
    let mut as_published = broker.named("as-published").await;
    let options = v5::SubscriptionOptions {
        retain_as_published: true,
        retain_handling: v5::RetainHandling::NoAtSubscribe,
        ..v5::SubscriptionOptions::default()
    };
    as_published.subscribe_with("plant/#", None, options).await;
    sender.publish(retained("off", 2)).await;
    let second = early.message().await;
    assert_eq!((&*second.payload, second.retain), (&b"off"[..], false));
    let third = as_published.message().await;
    assert_eq!((&*third.payload, third.retain), (&b"off"[..], true));

    sender.publish(retained("", 3)).await;
    let mut late = broker.named("late").await;
    late.subscribe("plant/#").await;
    late.nothing_waits().await;
}

#[tokio::test]
async fn a_will_is_published_when_the_connection_is_lost_and_only_then() {
    let broker = Broker::start().await;
    let mut watcher = broker.named("watcher").await;
    watcher.subscribe("plant/wills").await;
    let with_will = |name: &str, payload: &'static str| v5::Connect {
        last_will: Some(v5::LastWill {
            qos: QoS::AtMostOnce,
            retain: false,
            topic: "plant/wills".into(),
            message: Bytes::from_static(payload.as_bytes()),
            will_delay_interval_sec: None,
            correlation_data: None,
            message_expiry_interval: None,
            content_type: None,
            user_properties: Vec::new(),
            is_utf8_payload: None,
            response_topic: None,
        }),
        ..clean(name)
    };
    let (polite, _) = broker.client(with_will("polite", "polite")).await;
    polite.leave().await;
    let (mut second, _) = broker.client(with_will("second", "asked for")).await;
    let disconnect = v5::Disconnect::new(v5::DisconnectReasonCode::DisconnectWithWillMessage);
    second.send(v5::Packet::Disconnect(disconnect)).await;
    assert_eq!(watcher.message().await.payload, "asked for");
    let (lost, _) = broker.client(with_will("lost", "lost")).await;
    drop(lost);
    assert_eq!(watcher.message().await.payload, "lost");

    let mut denied = with_will("denied", "never");
    denied.last_will.as_mut().unwrap().topic = "plant/secret/x".into();
    let (_, ack) = broker.client(denied).await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::NotAuthorized);
    assert_eq!(
        ack.reason_string.unwrap(),
        r#"publish on "plant/secret/x" denied by rule "secrets stay secret""#
    );
}

#[tokio::test]
async fn a_denial_is_an_answer_with_its_rule() {
    let broker = Broker::start().await;
    let mut client = broker.named("client").await;
    let ack = client.subscribe("plant/secret/#").await;
    assert_eq!(ack.status, [v5::SubscribeAckReason::NotAuthorized]);
    assert_eq!(
        ack.reason_string.unwrap(),
        r#"subscribe on "plant/secret/#" denied by rule "secrets stay secret""#
    );
    let ack = client.subscribe("plant/a#").await;
    assert_eq!(ack.status, [v5::SubscribeAckReason::TopicFilterInvalid]);
    let ack = client.publish(message("elsewhere", "x", 1)).await;
    assert_eq!(ack.reason_code, v5::PublishAckReason::NotAuthorized);
    assert_eq!(
        ack.reason_string.unwrap(),
        r#"publish on "elsewhere" denied: no rule allows it"#
    );
    // QoS 0 has no answer; the connection goes on.
    client.send(message("elsewhere", "x", 0).into()).await;
    client.nothing_waits().await;
    assert!(broker.metric(r#"selvedge_denied_requests_total{verb="publish"} 2"#));
    assert!(broker.metric(r#"selvedge_denied_requests_total{verb="subscribe"} 1"#));
}

#[tokio::test]
async fn an_old_client_is_denied_as_its_standard_allows() {
    let broker = Broker::start().await;
    let mut client = Framed::new(broker.stream().await, v3::Codec::default());
    let connect = v3::Connect {
        clean_session: true,
        client_id: "old".into(),
        ..v3::Connect::default()
    };
    client.send(connect.into()).await.unwrap();
    client
        .send(v3::Packet::Subscribe {
            packet_id: 1.try_into().unwrap(),
            topic_filters: vec![
                ("plant/secret/#".into(), QoS::AtMostOnce),
                ("plant/#".into(), QoS::ExactlyOnce),
            ],
        })
        .await
        .unwrap();
    client
        .send(message("elsewhere", "x", 2).into())
        .await
        .unwrap();
    let mut answers = Vec::new();
    while answers.len() < 3 {
        let next = timeout(PATIENCE, client.next()).await.unwrap();
        answers.push(next.unwrap().unwrap().0);
    }
    use v3::SubscribeReturnCode::{Failure, Success};
    let expected = [
        v3::Packet::ConnectAck(v3::ConnectAck {
            return_code: v3::ConnectAckReason::ConnectionAccepted,
            session_present: false,
        }),
        v3::Packet::SubscribeAck {
            packet_id: 1.try_into().unwrap(),
            status: vec![Failure, Success(QoS::ExactlyOnce)],
        },
        v3::Packet::PublishAck {
            packet_id: 2.try_into().unwrap(),
        },
    ];
    assert_eq!(answers, expected);
    assert!(broker.metric(r#"selvedge_denied_requests_total{verb="publish"} 1"#));
}

#[tokio::test]
async fn a_share_group_gives_each_message_to_one_member() {
    let broker = Broker::start().await;
    let mut members = [broker.named("a").await, broker.named("b").await];
    for member in &mut members {
        let ack = member.subscribe("$share/group/plant/jobs").await;
        assert_eq!(ack.status, [v5::SubscribeAckReason::GrantedQos1]);
    }
    let mut sender = broker.named("sender").await;
    for id in 1..=4 {
        sender.publish(message("plant/jobs", "job", id)).await;
    }
    for member in &mut members {
        for _ in 0..2 {
            let job = member.message().await;
            member.acknowledge(&job).await;
        }
        member.nothing_waits().await;
    }
}

#[tokio::test]
async fn a_resumed_session_has_what_came_and_what_was_not_acknowledged() {
    let broker = Broker::start().await;
    let (mut first, ack) = broker.client(kept("kept")).await;
    assert!(!ack.session_present);
    first.subscribe("plant/a").await;
    let mut sender = broker.named("sender").await;
    sender.publish(message("plant/a", "1", 1)).await;
    sender.publish(message("plant/a", "2", 2)).await;
    let one = first.message().await;
    assert!(!one.dup);
    let two = first.message().await;
    first.acknowledge(&one).await;
    assert_eq!(two.payload, "2");
    first.leave().await;
    sender.publish(message("plant/a", "3", 3)).await;

    let (mut second, ack) = broker.client(kept("kept")).await;
    assert!(ack.session_present);
    let two = second.message().await;
    assert_eq!((&*two.payload, two.dup), (&b"2"[..], true));
    let three = second.message().await;
    assert_eq!((&*three.payload, three.dup), (&b"3"[..], false));
    // In any order.
    second.acknowledge(&three).await;
    second.acknowledge(&two).await;
    second.leave().await;

    let (mut third, ack) = broker.client(kept("kept")).await;
    assert!(ack.session_present);
    third.nothing_waits().await;
    third.leave().await;
    let (_, ack) = broker.client(clean("kept")).await;
    assert!(!ack.session_present);
}

#[tokio::test]
async fn a_client_without_a_name_is_given_one_and_expiry_is_bounded() {
    let limits = Limits {
        session_expiry: Duration::from_secs(60),
        ..Limits::default()
    };
    let broker = Broker::plaintext(limits).await;
    let (_, ack) = broker.client(clean("")).await;
    assert!(ack.assigned_client_id.unwrap().starts_with("auto-"));
    assert_eq!(ack.session_expiry_interval_secs, None);
    assert_eq!(ack.max_packet_size, Some(16 << 20));
    let (_, ack) = broker.client(kept("greedy")).await;
    assert_eq!(ack.session_expiry_interval_secs, Some(60));
}

#[tokio::test]
async fn overlapping_subscriptions_give_one_copy_with_all_identifiers() {
    let broker = Broker::start().await;
    let mut client = broker.named("client").await;
    let options = v5::SubscriptionOptions::default();
    client.subscribe_with("plant/+", Some(3), options).await;
    client.subscribe_with("plant/#", Some(300), options).await;
    let mut sender = broker.named("sender").await;
    sender.publish(message("plant/a", "x", 1)).await;
    let ids = |message: Publish| -> Vec<u32> {
        let ids = message.properties.unwrap().subscription_ids;
        ids.into_iter().map(std::num::NonZero::get).collect()
    };
    let both = client.message().await;
    client.acknowledge(&both).await;
    assert_eq!(ids(both), [3, 300]);
    client.nothing_waits().await;

    client
        .send(v5::Packet::Unsubscribe(v5::Unsubscribe {
            packet_id: 9.try_into().unwrap(),
            user_properties: Vec::new(),
            topic_filters: vec!["plant/+".into(), "plant/never".into()],
        }))
        .await;
    let v5::Packet::UnsubscribeAck(ack) = client.next().await else {
        panic!("expected UNSUBACK");
    };
    use v5::UnsubscribeAckReason::{NoSubscriptionExisted, Success};
    assert_eq!(ack.status, [Success, NoSubscriptionExisted]);
    sender.publish(message("plant/a", "x", 2)).await;
    assert_eq!(ids(client.message().await), [300]);
}

#[tokio::test]
async fn no_more_is_in_flight_than_the_client_takes() {
    let broker = Broker::start().await;
    let connect = v5::Connect {
        receive_max: 2.try_into().ok(),
        max_packet_size: 64.try_into().ok(),
        ..clean("narrow")
    };
    let (mut client, _) = broker.client(connect).await;
    client.subscribe("plant/a").await;
    let mut sender = broker.named("sender").await;
    // In one write, so that they reach the queue as one batch.
    for (id, payload) in ["1", "2", "3", "4"].into_iter().enumerate() {
        let message = message("plant/a", payload, id as u16 + 1);
        sender.framed.feed(message.into()).await.unwrap();
    }
    sender.framed.flush().await.unwrap();
    let one = client.message().await;
    let two = client.message().await;
    client.nothing_waits().await;
    client.acknowledge(&two).await;
    assert_eq!(client.message().await.payload, "3");
    client.nothing_waits().await;
    client.acknowledge(&one).await;
    let four = client.message().await;
    assert_eq!(four.payload, "4");
    client.acknowledge(&four).await;

    // What is too large for it is given up and does not hold up the rest.
    let large = "a text that does not fit into a packet of sixty-four bytes, by far";
    for _ in 1..=4 {
        let answer = sender.next().await;
        assert!(matches!(answer, v5::Packet::PublishAck(_)), "{answer:?}");
    }
    sender.publish(message("plant/a", large, 5)).await;
    sender.publish(message("plant/a", "6", 6)).await;
    assert_eq!(client.message().await.payload, "6");
    assert!(broker.metric(r#"selvedge_dropped_messages_total{reason="too_large_for_receiver"} 1"#));
}

#[tokio::test]
async fn a_qos_2_message_is_taken_once() {
    let broker = Broker::start().await;
    let mut receiver = broker.named("receiver").await;
    receiver.subscribe("plant/a").await;
    let mut sender = broker.named("sender").await;
    let exactly_once = Publish {
        qos: QoS::ExactlyOnce,
        ..message("plant/a", "once", 5)
    };
    for dup in [false, true] {
        let message = Publish {
            dup,
            ..exactly_once.clone()
        };
        sender.send(message.into()).await;
        let answer = sender.next().await;
        assert!(
            matches!(answer, v5::Packet::PublishReceived(_)),
            "{answer:?}"
        );
    }
    for expected in [
        v5::PublishAck2Reason::Success,
        v5::PublishAck2Reason::PacketIdNotFound,
    ] {
        sender
            .send(v5::Packet::PublishRelease(v5::PublishAck2 {
                packet_id: 5.try_into().unwrap(),
                ..v5::PublishAck2::default()
            }))
            .await;
        let v5::Packet::PublishComplete(complete) = sender.next().await else {
            panic!("expected PUBCOMP");
        };
        assert_eq!(complete.reason_code, expected);
    }
    let once = receiver.message().await;
    assert_eq!((&*once.payload, once.qos), (&b"once"[..], QoS::AtLeastOnce));
    receiver.nothing_waits().await;
}

#[tokio::test]
async fn topic_aliases_stand_for_their_topic() {
    let broker = Broker::start().await;
    let mut receiver = broker.named("receiver").await;
    receiver.subscribe("plant/a").await;
    let (mut sender, ack) = broker.client(clean("sender")).await;
    assert_eq!(ack.topic_alias_max, 64);
    let aliased = |topic: &str, alias: u16, payload, id| Publish {
        properties: Some(v5::PublishProperties {
            topic_alias: alias.try_into().ok(),
            ..v5::PublishProperties::default()
        }),
        ..message(topic, payload, id)
    };
    sender.publish(aliased("plant/a", 64, "1", 1)).await;
    sender.publish(aliased("", 64, "2", 2)).await;
    assert_eq!(receiver.message().await.payload, "1");
    assert_eq!(receiver.message().await.payload, "2");
    sender.send(aliased("plant/a", 65, "3", 3).into()).await;
    assert_eq!(
        sender.disconnected().await,
        v5::DisconnectReasonCode::TopicAliasInvalid
    );
}

#[tokio::test]
async fn a_client_that_reads_nothing_still_publishes_and_stays_bounded() {
    let limits = Limits {
        queue_bytes: 256 * 1024,
        ..Limits::default()
    };
    let broker = Broker::plaintext(limits).await;
    let mut deaf = broker.named("deaf").await;
    let at_most_once = v5::SubscriptionOptions::default();
    deaf.subscribe_with("plant/flood", None, at_most_once).await;
    let mut sender = broker.named("sender").await;
    let payload = Bytes::from(vec![0; 64 * 1024]);
    // Far more than the buffers of the sockets hold.
    for id in 1..=1000 {
        sender
            .publish(Publish {
                payload: payload.clone(),
                ..message("plant/flood", "", id)
            })
            .await;
    }
    let session = &broker.fabric.tenants()[0]
        .sessions()
        .into_iter()
        .find(|session| &*session.key.name == "deaf")
        .unwrap();
    assert!(session.shared.iter().all(|q| q.bytes() <= 300 * 1024));
    assert!(broker.fabric.metrics.dropped_overflow.get() > 0);
    let mut other = broker.named("other").await;
    other.subscribe("plant/said").await;
    deaf.send(message("plant/said", "I hear nothing", 1).into())
        .await;
    assert_eq!(other.message().await.payload, "I hear nothing");
}

#[tokio::test]
async fn each_breach_of_the_protocol_is_named_and_ends_only_its_connection() {
    use v5::DisconnectReasonCode as Code;
    let limits = Limits {
        max_frame_bytes: 4096,
        ..Limits::default()
    };
    let broker = Broker::plaintext(limits).await;
    let mut bystander = broker.named("bystander").await;
    let breaches: [(&[u8], Code); 9] = [
        // PUBLISH of 1 MiB, of which only the head comes.
        (b"\x30\x80\x80\x40", Code::PacketTooLarge),
        // A length of five bytes.
        (b"\x30\xff\xff\xff\xff\x01", Code::MalformedPacket),
        // A packet type that is none, and SUBSCRIBE with the flags of PUBLISH.
        (b"\x00\x00", Code::MalformedPacket),
        (b"\x80\x05\x00\x01\x00\x00\x00", Code::MalformedPacket),
        // SUBSCRIBE without a filter.
        (b"\x82\x03\x00\x01\x00", Code::ProtocolError),
        // PUBLISH to a filter, to a share, and to nothing.
        (b"\x30\x04\x00\x01#\x00", Code::TopicNameInvalid),
        (b"\x30\x0d\x00\x0a$share/g/t\x00", Code::TopicNameInvalid),
        (b"\x30\x03\x00\x00\x00", Code::ProtocolError),
        // A CONNACK from a client.
        (b"\x20\x03\x00\x00\x00", Code::ProtocolError),
    ];
    for (bytes, code) in breaches {
        let mut client = broker.named("breaker").await;
        client.framed.get_mut().write_all(bytes).await.unwrap();
        assert_eq!(client.disconnected().await, code, "{bytes:?}");
    }
    let mut again = broker.named("again").await;
    again.send(clean("again").into()).await;
    assert_eq!(again.disconnected().await, Code::ProtocolError);
    bystander.nothing_waits().await;
}

#[tokio::test]
async fn an_identity_may_have_a_largest_packet_of_its_own() {
    let mut limits = Limits::default();
    limits.identity.message_bytes = Some(64 * 1024);
    let broker = Broker::plaintext(limits).await;
    let (mut client, ack) = broker.client(clean("small")).await;
    assert_eq!(ack.max_packet_size, Some(64 * 1024));
    // PUBLISH of a little more than 64 KiB, of which only the head comes.
    let stream = client.framed.get_mut();
    stream.write_all(b"\x30\x81\x80\x04").await.unwrap();
    let code = v5::DisconnectReasonCode::PacketTooLarge;
    assert_eq!(client.disconnected().await, code);
}

#[tokio::test]
async fn what_is_not_a_connect_is_refused() {
    let broker = Broker::start().await;
    let answers: [(&[u8], &[u8]); 4] = [
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (b"\x30\x03\x00\x01a", b""),
        // Level 6 of a protocol named MQTT.
        (
            b"\x10\x0d\x00\x04MQTT\x06\x02\x00\x00\x00\x00\x00",
            b"\x20\x31\x00\x84\x2e\x1f\x00\x2bthe client sent an unknown protocol version",
        ),
        // 3.1.1 without a name and without clean session.
        (
            b"\x10\x0c\x00\x04MQTT\x04\x00\x00\x00\x00\x00",
            b"\x20\x02\x00\x02",
        ),
    ];
    for (sent, expected) in answers {
        let mut stream = broker.stream().await;
        stream.write_all(sent).await.unwrap();
        let mut answer = Vec::new();
        // What was not read of the request may turn the end into a reset.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut answer))
            .await
            .unwrap();
        assert_eq!(answer, expected, "{sent:?}");
    }
    let (_, ack) = broker
        .client(v5::Connect {
            auth_method: Some("SCRAM".into()),
            ..clean("modern")
        })
        .await;
    assert_eq!(
        ack.reason_code,
        v5::ConnectAckReason::BadAuthenticationMethod
    );
}

#[tokio::test]
async fn silence_ends_a_connection_before_and_after_connect() {
    let limits = Limits {
        handshake_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    let broker = Broker::plaintext(limits).await;
    let mut silent = broker.stream().await;
    let (mut client, _) = broker
        .client(v5::Connect {
            keep_alive: 1,
            ..clean("asleep")
        })
        .await;
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(
        client.disconnected().await,
        v5::DisconnectReasonCode::KeepAliveTimeout
    );
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_until_one_ends() {
    let limits = Limits {
        connections: 1,
        ..Limits::default()
    };
    let broker = Broker::plaintext(limits).await;
    let first = broker.named("first").await;
    let (_, ack) = broker.client(clean("second")).await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::QuotaExceeded);
    let reason = "the broker has as many connections as it may: try again later";
    assert_eq!(ack.reason_string.as_deref(), Some(reason));
    // 3.1.1 knows "server unavailable".
    let mut old = broker.stream().await;
    let connect = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01a";
    old.write_all(connect).await.unwrap();
    let mut answer = Vec::new();
    old.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"\x20\x02\x00\x03");
    assert!(broker.metric(
        r#"selvedge_refused_connections_total{listener="mqtt",reason="connection_limit"} 2"#
    ));
    // Those that are told so are few, and the next is not even listened to.
    let slots = broker.fabric.refusal_slots.acquire_many(REFUSALS);
    let _busy = timeout(PATIENCE, slots).await.unwrap().unwrap();
    assert_eq!(broker.stream().await.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(broker.metric(
        r#"selvedge_refused_connections_total{listener="mqtt",reason="connection_limit"} 3"#
    ));
    first.leave().await;
    let released = broker.fabric.connection_slots.acquire();
    drop(timeout(PATIENCE, released).await.unwrap().unwrap());
    broker.named("second").await;
}

#[tokio::test]
async fn a_stopping_broker_says_so() {
    let broker = Broker::start().await;
    let mut client = broker.named("client").await;
    broker.fabric.shutdown.cancel();
    assert_eq!(
        client.disconnected().await,
        v5::DisconnectReasonCode::ServerShuttingDown
    );
    broker.fabric.tasks.close();
    timeout(PATIENCE, broker.fabric.tasks.wait()).await.unwrap();
}

/// A TLS listener with certificates and, unless left out, the users `sensor` and `other`.
struct Secure {
    broker: Broker,
    authority: Authority,
    anchors: TrustAnchors,
}

impl Secure {
    async fn start(with_passwords: bool) -> Self {
        let authority = Authority::create("example.org").unwrap();
        let anchors = TrustAnchors::from_pem(authority.ca_pem().as_bytes()).unwrap();
        let server = authority
            .issue(&IssueRequest::server("acme", "berlin", "broker").dns("localhost"))
            .unwrap();
        let passwords = with_passwords.then(|| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("users.toml");
            for name in ["sensor", "other"] {
                password::set_user(&path, name, &identity(name), &format!("{name}'s secret"))
                    .unwrap();
            }
            password::Passwords::load(&path).unwrap()
        });
        let config = selvedge_certs::tcp_server_config(
            server.credentials(),
            ClientAuth::Optional(&anchors),
            None,
            &[],
        )
        .unwrap();
        let mode = Mode::Tls {
            acceptor: TlsAcceptor::from(config),
            trust: anchors.clone(),
            passwords,
        };
        Self {
            broker: Broker::with(mode, Limits::default()).await,
            authority,
            anchors,
        }
    }

    fn certificate(&self, name: &str) -> Credentials {
        self.authority
            .issue(&IssueRequest::client("acme", "berlin", name))
            .unwrap()
            .credentials()
    }

    async fn client(
        &self,
        credentials: Option<&Credentials>,
        connect: v5::Connect,
    ) -> (
        Client<tokio_rustls::client::TlsStream<TcpStream>>,
        v5::ConnectAck,
    ) {
        let config = selvedge_certs::tcp_client_config(
            credentials,
            &self.anchors,
            ServerIdentity::Spiffe,
            &[],
        )
        .unwrap();
        let stream = TlsConnector::from(config)
            .connect("localhost".try_into().unwrap(), self.broker.stream().await)
            .await
            .unwrap();
        Client::connect(stream, connect).await
    }
}

fn login(name: &str, user: &str, password: &'static str) -> v5::Connect {
    v5::Connect {
        username: Some(user.into()),
        password: Some(Bytes::from_static(password.as_bytes())),
        ..kept(name)
    }
}

#[tokio::test]
async fn a_password_proves_an_identity_and_nothing_else_does() {
    let secure = Secure::start(true).await;
    let (mut client, ack) = secure
        .client(None, login("id", "sensor", "sensor's secret"))
        .await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::Success);
    let allowed = client.publish(message("own/sensor/a", "x", 1)).await;
    assert_eq!(allowed.reason_code, v5::PublishAckReason::Success);
    let denied = client.publish(message("own/other/a", "x", 2)).await;
    assert_eq!(denied.reason_code, v5::PublishAckReason::NotAuthorized);

    let mut answers = Vec::new();
    for connect in [
        login("id", "sensor", "other's secret"),
        login("id", "nobody", "sensor's secret"),
        login("id", "sensor", ""),
    ] {
        let (mut client, ack) = secure.client(None, connect).await;
        assert_eq!(ack.reason_code, v5::ConnectAckReason::BadUserNameOrPassword);
        assert_eq!(client.try_next().await, None);
        answers.push(ack);
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    let (_, ack) = secure.client(None, kept("id")).await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::NotAuthorized);
    // The one that is let in has not been disturbed.
    client.nothing_waits().await;
}

#[tokio::test]
async fn a_certificate_is_the_identity_whatever_the_user_name() {
    let secure = Secure::start(true).await;
    let certificate = secure.certificate("machine");
    let (mut client, ack) = secure
        .client(Some(&certificate), login("id", "sensor", "wrong"))
        .await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::Success);
    let ack = client.publish(message("own/machine/a", "x", 1)).await;
    assert_eq!(ack.reason_code, v5::PublishAckReason::Success);
    let ack = client.publish(message("own/sensor/a", "x", 2)).await;
    assert_eq!(ack.reason_code, v5::PublishAckReason::NotAuthorized);
}

#[tokio::test]
async fn without_passwords_only_a_certificate_lets_in() {
    let secure = Secure::start(false).await;
    let (_, ack) = secure
        .client(None, login("id", "sensor", "sensor's secret"))
        .await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::NotAuthorized);
    let certificate = secure.certificate("machine");
    let (_, ack) = secure.client(Some(&certificate), clean("id")).await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::Success);
}

#[tokio::test]
async fn only_the_same_identity_takes_a_session_over() {
    let secure = Secure::start(true).await;
    let (mut first, _) = secure
        .client(None, login("id", "sensor", "sensor's secret"))
        .await;
    let (_other, ack) = secure
        .client(None, login("id", "other", "other's secret"))
        .await;
    assert!(!ack.session_present);
    first.nothing_waits().await;
    let (_again, ack) = secure
        .client(None, login("id", "sensor", "sensor's secret"))
        .await;
    assert!(ack.session_present);
    assert_eq!(
        first.disconnected().await,
        v5::DisconnectReasonCode::SessionTakenOver
    );
}

#[tokio::test]
async fn peers_that_stop_in_mid_handshake_do_not_stall_others() {
    let secure = Secure::start(true).await;
    let mut stuck = Vec::new();
    for _ in 0..20 {
        let mut stream = secure.broker.stream().await;
        // The head of a TLS record that never comes.
        stream.write_all(b"\x16\x03\x01\x02\x00").await.unwrap();
        stuck.push(stream);
    }
    let certificate = secure.certificate("machine");
    let (_, ack) = secure.client(Some(&certificate), clean("id")).await;
    assert_eq!(ack.reason_code, v5::ConnectAckReason::Success);
}
