//! The connection against a real mosquitto: acknowledgements, sessions, echo, refusals.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;

use selvedge_certs::{Authority, IssueRequest};
use selvedge_proto::message::Properties;
use tokio::time::timeout;

use super::*;
use crate::mapping::{Direction, Rule, Version};
use mosquitto::Mosquitto;

mod mosquitto;

const SOON: Duration = Duration::from_secs(10);

fn config(port: u16, client_id: &str, version: Version) -> RemoteConfig {
    RemoteConfig {
        name: "plant".into(),
        host: "127.0.0.1".into(),
        port,
        tls: None,
        version,
        client_id: client_id.into(),
        login: None,
        keep_alive: Duration::from_secs(30),
        clean_session: false,
        session_expiry: Duration::from_secs(60),
        reconnect_max: Duration::from_secs(1),
        max_packet_bytes: 1 << 20,
        outbox_bytes: 1 << 20,
        disk_bytes: 1 << 20,
        max_inflight: 20,
        rules: vec![Rule::new(Direction::In, "#", "", "").unwrap()],
    }
}

struct Peer {
    link: Link,
    events: mpsc::Receiver<Event>,
    limits: Limits,
}

impl Peer {
    async fn connect(config: &RemoteConfig) -> Self {
        let (link, mut events) = Link::open(config).await.unwrap();
        loop {
            match timeout(SOON, events.recv()).await.unwrap().unwrap() {
                Event::Connected(limits) => {
                    return Self {
                        link,
                        events,
                        limits,
                    };
                }
                Event::Alive => {}
                other => panic!("expected a connection, found {other:?}"),
            }
        }
    }

    async fn next(&mut self) -> Event {
        loop {
            match timeout(SOON, self.events.recv()).await.unwrap().unwrap() {
                Event::Alive => {}
                event => return event,
            }
        }
    }

    async fn subscribe(&mut self, filter: &str) {
        let filter = TopicFilter::parse(filter).unwrap();
        let tried = self
            .link
            .try_subscribe(&[(filter, Qos::ExactlyOnce)], false);
        assert_eq!(tried, Tried::Taken);
        let event = self.next().await;
        assert!(
            matches!(&event, Event::Subscribed(granted) if granted[..] == [Ok(())]),
            "{event:?}"
        );
    }

    fn send(&self, packet: &Packet, packet_id: u16, duplicate: bool) {
        let encoded = self.link.encode(packet, packet_id, duplicate).unwrap();
        assert_eq!(self.link.try_publish(encoded), Tried::Taken);
    }

    /// Publishes and waits for the acknowledgement.
    async fn publish(&mut self, packet: &Packet) {
        self.send(packet, 7, false);
        let event = self.next().await;
        assert!(matches!(event, Event::Acknowledged(7, Ok(()))), "{event:?}");
    }

    async fn message(&mut self) -> Incoming {
        match self.next().await {
            Event::Message(incoming) => *incoming,
            other => panic!("expected a message, found {other:?}"),
        }
    }

    /// Says goodbye; everything requested before it has been written.
    async fn disconnect(mut self) {
        assert_eq!(self.link.try_disconnect(), Tried::Taken);
        while self.events.recv().await.is_some() {}
    }
}

fn packet(topic: &str, payload: &str) -> Packet {
    Packet {
        topic: Bytes::copy_from_slice(topic.as_bytes()),
        payload: Bytes::copy_from_slice(payload.as_bytes()),
        qos: Qos::AtLeastOnce,
        retain: false,
        properties: Properties::default(),
    }
}

#[tokio::test]
async fn what_is_not_acknowledged_is_sent_again_and_what_is_acknowledged_is_not() {
    if !mosquitto::is_installed() {
        return;
    }
    let mosquitto = Mosquitto::start("");
    for (version, id) in [(Version::V311, "old"), (Version::V5, "new")] {
        let config = config(mosquitto.port, id, version);
        let topic = format!("{id}/t");
        let mut publisher = Peer::connect(&self::config(mosquitto.port, "p", version)).await;

        let mut bridge = Peer::connect(&config).await;
        assert!(!bridge.limits.session_present);
        bridge.subscribe(&format!("{id}/#")).await;
        publisher.publish(&packet(&topic, "one")).await;
        publisher.publish(&packet(&topic, "two")).await;
        assert_eq!(bridge.message().await.packet, packet(&topic, "one"));
        assert_eq!(bridge.message().await.packet, packet(&topic, "two"));
        bridge.disconnect().await;

        // Neither was acknowledged. Acknowledge the first only.
        let mut bridge = Peer::connect(&config).await;
        assert!(bridge.limits.session_present);
        let first = bridge.message().await;
        assert_eq!(first.packet, packet(&topic, "one"));
        assert_eq!(bridge.message().await.packet, packet(&topic, "two"));
        assert!(first.receipt.is_wanted());
        assert_eq!(bridge.link.try_ack(first.receipt), Tried::Taken);
        bridge.disconnect().await;

        let mut bridge = Peer::connect(&config).await;
        let second = bridge.message().await;
        assert_eq!(second.packet, packet(&topic, "two"), "{version}");
        assert_eq!(bridge.link.try_ack(second.receipt), Tried::Taken);
        publisher.publish(&packet(&topic, "three")).await;
        assert_eq!(bridge.message().await.packet, packet(&topic, "three"));
    }
}

#[tokio::test]
async fn properties_and_retain_survive_with_version_5() {
    if !mosquitto::is_installed() {
        return;
    }
    let mosquitto = Mosquitto::start("");
    let mut bridge = Peer::connect(&config(mosquitto.port, "b", Version::V5)).await;
    bridge.subscribe("#").await;
    let mut publisher = Peer::connect(&config(mosquitto.port, "p", Version::V5)).await;
    let sent = Packet {
        retain: true,
        properties: Properties {
            content_type: "text/plain".into(),
            response_topic: "answers".into(),
            correlation_data: Bytes::from_static(b"7"),
            user: vec![("k".into(), "v".into())],
            traceparent: "00-01-02-03".into(),
            payload_is_utf8: true,
            hops: vec!["one".into(), "two".into()],
            ..Properties::default()
        },
        ..packet("a", "x")
    };
    publisher.publish(&sent).await;
    assert_eq!(bridge.message().await.packet, sent);
    // mosquitto's figure; the bridge keeps below it.
    assert_eq!(bridge.limits.receive_maximum, 20);
}

#[tokio::test]
async fn own_messages_come_back_with_version_3_1_1_only() {
    if !mosquitto::is_installed() {
        return;
    }
    let mosquitto = Mosquitto::start("");
    let mut other = Peer::connect(&config(mosquitto.port, "other", Version::V5)).await;
    for (version, echo) in [(Version::V311, true), (Version::V5, false)] {
        let id = format!("bridge-{version}");
        let mut bridge = Peer::connect(&config(mosquitto.port, &id, version)).await;
        bridge.subscribe("#").await;
        bridge.send(&packet("a", "own"), 1, false);
        let mut acknowledged = false;
        let mut echoed = false;
        // The echo, if there is one, comes before the acknowledgement or just after it, and in any
        // case before what another publishes after that.
        while !acknowledged {
            match bridge.next().await {
                Event::Acknowledged(..) => acknowledged = true,
                Event::Message(_) => echoed = true,
                event => panic!("{event:?}"),
            }
        }
        other.publish(&packet("a", "foreign")).await;
        loop {
            let message = bridge.message().await;
            if message.packet == packet("a", "foreign") {
                break;
            }
            echoed = true;
        }
        assert_eq!(echoed, echo, "{version}");
    }
}

/// A message of QoS 2 that is sent again under its id, as after a lost connection, is one message; and
/// one that the remote sends again under its id is told by it.
#[tokio::test]
async fn the_packet_id_of_qos_2_outlives_the_connection_both_ways() {
    if !mosquitto::is_installed() {
        return;
    }
    let mosquitto = Mosquitto::start("");
    for (version, id) in [(Version::V311, "old"), (Version::V5, "new")] {
        let (from, to) = (format!("{id}-from"), format!("{id}-to"));
        let (from, to) = [&from, &to]
            .map(|id| config(mosquitto.port, id, version))
            .into();
        let mut reader = Peer::connect(&to).await;
        reader.subscribe(&format!("{id}/#")).await;
        let sent = Packet {
            qos: Qos::ExactlyOnce,
            ..packet(&format!("{id}/t"), "once")
        };

        let mut sender = Peer::connect(&from).await;
        sender.send(&sent, 7, false);
        let event = sender.next().await;
        assert!(matches!(event, Event::Received(7, Ok(()))), "{event:?}");
        sender.disconnect().await;
        let mut sender = Peer::connect(&from).await;
        assert!(sender.limits.session_present);
        sender.send(&sent, 7, true);
        let event = sender.next().await;
        assert!(matches!(event, Event::Received(7, Ok(()))), "{event:?}");
        for _ in 0..2 {
            // An id that is no longer known is as good as completed.
            assert_eq!(sender.link.try_release(7), Tried::Taken);
            let event = sender.next().await;
            assert!(matches!(event, Event::Completed(7)), "{event:?}");
        }

        let first = reader.message().await;
        assert_eq!(first.packet, sent);
        reader.disconnect().await;
        let mut reader = Peer::connect(&to).await;
        let again = reader.message().await;
        assert_eq!(again.packet, sent);
        assert_eq!(again.receipt.packet_id, first.receipt.packet_id);
        let packet_id = again.receipt.packet_id;
        assert_eq!(reader.link.try_ack(again.receipt), Tried::Taken);
        let event = reader.next().await;
        assert!(
            matches!(event, Event::Released(id) if id == packet_id),
            "{event:?}"
        );
        reader.disconnect().await;
        // Without PUBCOMP, PUBREL comes again.
        let mut reader = Peer::connect(&to).await;
        let event = reader.next().await;
        assert!(
            matches!(event, Event::Released(id) if id == packet_id),
            "{event:?}"
        );
        assert_eq!(reader.link.try_complete(packet_id), Tried::Taken);
        sender.send(&packet(&format!("{id}/t"), "next"), 8, false);
        assert_eq!(
            reader.message().await.packet,
            packet(&format!("{id}/t"), "next")
        );
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_with_the_reason() {
    if !mosquitto::is_installed() {
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    let (passwords, password) = (dir.path().join("passwords"), dir.path().join("password"));
    let made = std::process::Command::new("mosquitto_passwd")
        .args(["-c", "-b"])
        .args([passwords.as_os_str(), "user".as_ref(), "right".as_ref()])
        .status()
        .unwrap();
    assert!(made.success());
    let mut extra = String::from("allow_anonymous false\n");
    writeln!(extra, "password_file {}", passwords.display()).unwrap();
    let mosquitto = Mosquitto::start(&extra);
    for (version, reason) in [
        (Version::V311, "NotAuthorized"),
        (Version::V5, "NotAuthorized"),
    ] {
        let mut config = config(mosquitto.port, "b", version);
        config.login = Some(("user".into(), password.clone()));
        std::fs::write(&password, "right\n").unwrap();
        Peer::connect(&config).await.disconnect().await;

        std::fs::write(&password, "wrong\n").unwrap();
        let (_link, mut events) = Link::open(&config).await.unwrap();
        let event = timeout(SOON, events.recv()).await.unwrap().unwrap();
        let Event::Closed(text) = event else {
            panic!("expected a refusal, found {event:?}");
        };
        assert!(text.contains(reason), "{text}");
        assert!(!text.contains("wrong"));
    }
}

#[tokio::test]
async fn many_messages_keep_their_order_and_each_gets_its_answer() {
    if !mosquitto::is_installed() {
        return;
    }
    const MESSAGES: usize = 3000;
    let mosquitto = Mosquitto::start("max_queued_messages 0\n");
    for version in [Version::V311, Version::V5] {
        let mut sender = Peer::connect(&config(mosquitto.port, "s", version)).await;
        let mut outbox = crate::outbox::Outbox::new();
        for number in 0..MESSAGES {
            outbox.push(packet("a", &number.to_string()), 0, false);
        }
        // More messages than packet ids, so that ids are used again.
        let mut answered = Vec::new();
        while answered.len() < MESSAGES {
            while let Some(next) = outbox.next(20) {
                let encoded = sender.link.encode(next.item, next.packet_id, next.again);
                if sender.link.try_publish(encoded.unwrap()) == Tried::Full {
                    break;
                }
                outbox.sent();
            }
            match sender.next().await {
                Event::Acknowledged(packet_id, Ok(())) => {
                    answered.extend(outbox.answered(packet_id));
                }
                event => panic!("{event:?}"),
            }
        }
        let expected: Vec<Packet> = (0..MESSAGES)
            .map(|number| packet("a", &number.to_string()))
            .collect();
        assert!(answered == expected, "{version}");
    }
}

#[tokio::test]
async fn tls_is_mutual_and_an_unknown_authority_is_refused() {
    if !mosquitto::is_installed() {
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority = Authority::create("example.test").unwrap();
    let server = IssueRequest::server("acme", "plant", "mosquitto").dns("localhost");
    let server = authority.issue(&server).unwrap();
    let client = IssueRequest::client("acme", "plant", "bridge");
    let client = authority.issue(&client).unwrap();
    let ca = file("ca.pem", authority.ca_pem());
    let mosquitto = Mosquitto::start(&format!(
        "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\n",
        ca.display(),
        file("server.pem", &server.cert_pem).display(),
        file("server.key", &server.key_pem).display(),
    ));
    let identity = (
        file("bridge.pem", &client.cert_pem),
        file("bridge.key", &client.key_pem),
    );
    let stranger = file(
        "stranger.pem",
        Authority::create("other.test").unwrap().ca_pem(),
    );
    for version in [Version::V311, Version::V5] {
        let mut config = config(mosquitto.port, "b", version);
        config.host = "localhost".into();
        let tls = |ca: &Path, identity| {
            let ca = ca.to_owned();
            Some(RemoteTls { ca, identity })
        };
        config.tls = tls(&ca, Some(identity.clone()));
        Peer::connect(&config).await.disconnect().await;

        config.tls = tls(&stranger, Some(identity.clone()));
        let (_link, mut events) = Link::open(&config).await.unwrap();
        let event = timeout(SOON, events.recv()).await.unwrap().unwrap();
        assert!(
            matches!(&event, Event::Closed(reason) if reason.contains("TLS") || reason.contains("certificate")),
            "{event:?}"
        );

        config.tls = tls(&ca, None);
        let (_link, mut events) = Link::open(&config).await.unwrap();
        let event = timeout(SOON, events.recv()).await.unwrap().unwrap();
        let Event::Closed(reason) = event else {
            panic!("expected a refusal, found {event:?}");
        };
        assert!(reason.contains("CertificateRequired"), "{reason}");
    }
}
