//! MQTT over everything that carries it: TCP, TLS, WebSockets in both, QUIC; and behind load balancers.

use std::sync::Arc;
use std::time::Duration;

use selvedge_broker::mqtt::password::{Passwords, set_user};
use selvedge_broker::mqtt::proxy::TrustedProxies;
use selvedge_certs::{Authority, quic_client_config};
use selvedge_client::{Credentials, Publish, Qos};
use selvedge_tests::pki::SERVER_NAME;
use selvedge_tests::tunnel::{self, Tunnel, WebSocketOptions};
use selvedge_tests::wait::within;
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, TestBroker, broker};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::pubsub::next;

const BOTH: [MqttVersion; 2] = [MqttVersion::V311, MqttVersion::V5];
const REFUSED: &str = "selvedge_refused_connections_total";

/// A broker with every listener; everyone in the clear is `sensors`, and `meter` has the password
/// `water`.
async fn everywhere() -> TestBroker {
    TestBroker::with(broker::OPEN, |config, pki| {
        let any = ([127, 0, 0, 1], 0).into();
        let file = pki.ca_file().with_file_name("users.toml");
        let meter = pki.device("acme", "plant-1", "meter").identity().clone();
        set_user(&file, "meter", &meter, "water").unwrap();
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.tls = Some(any);
        config.mqtt.wss = Some(any);
        config.mqtt.quic = true;
        config.mqtt.passwords = Some(Passwords::load(&file).unwrap());
        config.mqtt.danger_plaintext = Some((any, sensors.clone()));
        config.mqtt.danger_ws = Some((any, sensors));
    })
    .await
}

fn ws(broker: &TestBroker) -> WebSocketOptions {
    let (broker, _) = broker.config.mqtt.danger_ws.clone().unwrap();
    WebSocketOptions {
        broker,
        tls: None,
        frame: 3,
    }
}

fn wss(broker: &TestBroker, device: Option<&Credentials>) -> WebSocketOptions {
    WebSocketOptions {
        broker: broker.config.mqtt.wss.unwrap(),
        tls: Some(broker.pki.tls_client(device)),
        frame: 1000,
    }
}

fn mqtt_over_quic(broker: &TestBroker, device: &Credentials) -> quinn::ClientConfig {
    let anchors = broker.pki.anchors();
    let tls = quic_client_config(device, &anchors, &[b"mqtt"]).unwrap();
    quinn::ClientConfig::new(Arc::new(tls))
}

async fn connect(options: MqttOptions) -> MqttPeer {
    MqttPeer::connect(options).await.unwrap()
}

#[tokio::test]
async fn every_version_and_quality_crosses_every_transport_both_ways() {
    let broker = everywhere().await;
    let device = broker.device("press-7");
    let over_ws = Tunnel::websocket(ws(&broker)).await;
    let over_wss = Tunnel::websocket(wss(&broker, Some(&device))).await;
    let over_quic = Tunnel::quic(broker.quic(), mqtt_over_quic(&broker, &device)).await;
    let tls = broker.pki.tls_client(Some(&device));
    let panel = broker.client("panel-1").await;
    let mut all = panel.subscribe("press/#").await.unwrap();
    for version in BOTH {
        for (transport, address, publisher) in [
            ("tcp", broker.mqtt(), "sensors"),
            ("tls", broker.mqtts(), "press-7"),
            ("ws", over_ws.address, "sensors"),
            ("wss", over_wss.address, "press-7"),
            ("quic", over_quic.address, "press-7"),
        ] {
            let options = MqttOptions::new(version, address, transport);
            let options = match transport {
                "tls" => options.tls(SERVER_NAME, Arc::clone(&tls)),
                _ => options,
            };
            let mut press = connect(options).await;
            press.subscribe("orders/+", 1).await;
            // Larger than a frame of the tunnels, and than one of the broker's.
            let large = "x".repeat(100_000);
            for payload in ["71.3", &large] {
                for qos in [0, 1, 2] {
                    let published = press.publish("press/7", qos, payload.to_owned()).await;
                    assert_eq!(published.reason, "Success", "{version:?} {transport}");
                    let message = next(&mut all).await;
                    assert!(message.payload == payload, "{version:?} {transport} {qos}");
                    let expected = format!("spiffe://test.example/acme/plant-1/{publisher}");
                    assert_eq!(*message.publisher, *expected, "{version:?} {transport}");
                }
                for qos in [Qos::AtMostOnce, Qos::AtLeastOnce] {
                    let order = Publish::new("orders/1", payload.to_owned()).qos(qos);
                    panel.publish_message(order).await.unwrap();
                    let order = press.message().await;
                    assert!(order.payload == payload, "{version:?} {transport} {qos:?}");
                }
            }
            press.disconnect().await;
        }
    }
}

#[tokio::test]
async fn over_wss_a_certificate_or_a_password_is_the_identity_and_nothing_else_is_let_in() {
    let broker = everywhere().await;
    let panel = broker.client("panel-1").await;
    let mut all = panel.subscribe("#").await.unwrap();
    let nobody = Tunnel::websocket(wss(&broker, None)).await;
    for version in BOTH {
        let options = MqttOptions::new(version, nobody.address, "meter");
        let mut meter = connect(options.clone().login("meter", "water")).await;
        meter.publish("meter", 1, "x").await;
        let publisher = next(&mut all).await.publisher;
        assert_eq!(&*publisher, "spiffe://test.example/acme/plant-1/meter");
        for (options, reason) in [
            (
                options.clone().login("meter", "wine"),
                "BadUserNamePassword",
            ),
            (options, "NotAuthorized"),
        ] {
            let refusal = MqttPeer::connect(options).await.unwrap_err();
            assert!(refusal.contains(reason), "{refusal}");
        }
    }
}

#[tokio::test]
async fn a_revoked_device_is_evicted_from_wss_and_quic_and_let_in_no_more() {
    let mut broker = everywhere().await;
    let files = broker.pki.device_files("acme", "plant-1", "press-7");
    let device = Credentials::from_files(&files.cert, &files.key).unwrap();
    let over_wss = Tunnel::websocket(wss(&broker, Some(&device))).await;
    let over_quic = Tunnel::quic(broker.quic(), mqtt_over_quic(&broker, &device)).await;
    let mut peers = Vec::new();
    for (id, address) in [("wss", over_wss.address), ("quic", over_quic.address)] {
        peers.push(connect(MqttOptions::new(MqttVersion::V5, address, id)).await);
    }
    revoke(&mut broker, &std::fs::read(&files.cert).unwrap());
    for mut peer in peers {
        let end = peer.closed().await;
        assert!(end.contains("NotAuthorized"), "{end}");
    }
    for (listener, address) in [("wss", over_wss.address), ("mqtt-quic", over_quic.address)] {
        let labels = [("listener", listener), ("reason", "revoked")];
        broker
            .metric_reaches("selvedge_evicted_connections_total", &labels, 1)
            .await;
        let options = MqttOptions::new(MqttVersion::V5, address, "again");
        MqttPeer::connect(options).await.unwrap_err();
    }
    let labels = [("reason", "revoked")];
    broker.metric_reaches(REFUSED, &labels, 2).await;
}

/// Puts a revocation list in force that names one certificate.
fn revoke(broker: &mut TestBroker, cert_pem: &[u8]) {
    let ca = broker.pki.ca_file();
    let folder = ca.parent().unwrap();
    let authority = Authority::load(folder).unwrap();
    let (serial, _) = authority.serial_of(cert_pem).unwrap();
    let month = Duration::from_secs(30 * 86_400);
    let written = authority.revoke(folder, &[serial], month).unwrap();
    let anchors = broker.pki.anchors();
    let trust = anchors.with_revocations_of_file(&written.path).unwrap();
    broker.config.trust = trust;
    broker.reload_config();
}

#[tokio::test]
async fn mqtt_over_quic_is_only_there_when_it_is_wanted() {
    let broker = TestBroker::open().await;
    let config = mqtt_over_quic(&broker, &broker.device("press-7"));
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let connecting = endpoint.connect_with(config, broker.quic(), SERVER_NAME);
    let error = connecting.unwrap().await.unwrap_err();
    // The TLS alert no_application_protocol.
    assert!(error.to_string().contains("120"), "{error}");
}

#[tokio::test]
async fn an_mqtt_client_on_quic_has_one_stream_and_little_time_to_open_it() {
    let broker = TestBroker::with(broker::OPEN, |config, _| {
        config.mqtt.quic = true;
        config.limits.handshake_timeout = Duration::from_millis(500);
    })
    .await;
    let config = mqtt_over_quic(&broker, &broker.device("press-7"));
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let connect = || async {
        let connecting = endpoint.connect_with(config.clone(), broker.quic(), SERVER_NAME);
        connecting.unwrap().await.unwrap()
    };
    let silent = connect().await;
    within("the end of who says nothing", silent.closed()).await;
    let labels = [("listener", "mqtt-quic"), ("reason", "connect_timeout")];
    broker.metric_reaches(REFUSED, &labels, 1).await;

    let connection = connect().await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let hello = b"\x10\x0d\0\x04MQTT\x05\x02\0\0\0\0\0";
    send.write_all(hello).await.unwrap();
    let mut answer = [0; 2];
    within("the CONNACK", recv.read_exact(&mut answer))
        .await
        .unwrap();
    assert_eq!(answer[0], 0x20);
    let (mut second, mut nothing) = connection.open_bi().await.unwrap();
    second.write_all(b"x").await.unwrap();
    let reset = within("the reset", nothing.read(&mut [0; 1])).await;
    assert!(
        matches!(reset, Err(quinn::ReadError::Reset(_))),
        "{reset:?}"
    );
    // The first goes on.
    send.write_all(b"\xC0\0").await.unwrap();
    let mut rest = Vec::new();
    while !rest.ends_with(b"\xD0\0") {
        let mut byte = [0];
        within("the PINGRESP", recv.read_exact(&mut byte))
            .await
            .unwrap();
        rest.extend(byte);
    }
}

#[tokio::test]
async fn behind_a_load_balancer_only_its_headers_open_a_connection() {
    let broker = TestBroker::with(broker::OPEN, |config, pki| {
        let any = ([127, 0, 0, 1], 0).into();
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        let here = TrustedProxies::new(["127.0.0.0/8".parse().unwrap()]);
        let elsewhere = TrustedProxies::new(["192.0.2.0/24".parse().unwrap()]);
        config.mqtt.tls = Some(any);
        config.mqtt.proxies.tls = Some(here.clone());
        config.mqtt.danger_plaintext = Some((any, sensors.clone()));
        config.mqtt.proxies.danger_plaintext = Some(here);
        config.mqtt.danger_ws = Some((any, sensors));
        config.mqtt.proxies.danger_ws = Some(elsewhere);
    })
    .await;
    let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0C\xC0\0\x02\x07\x7F\0\0\x01\x1F\x90\x07\x5B";
    let hello = b"\x10\x0d\0\x04MQTT\x05\x02\0\0\0\0\0";
    let address = broker.mqtt();
    let answer = |first: Vec<u8>| async move {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(&first).await.unwrap();
        let mut answer = [0; 1];
        within("an answer or the end", tcp.read(&mut answer))
            .await
            .map(|count| answer[..count].to_vec())
    };
    let with_header = [&header[..], &hello[..]].concat();
    assert_eq!(answer(with_header).await.unwrap(), b"\x20");
    let without = answer(hello.to_vec()).await;
    assert!(without.as_ref().map_or(true, Vec::is_empty), "{without:?}");
    let labels = [("listener", "mqtt"), ("reason", "proxy_header_missing")];
    broker.metric_reaches(REFUSED, &labels, 1).await;

    // The header comes before TLS.
    let mut tcp = TcpStream::connect(broker.mqtts()).await.unwrap();
    tcp.write_all(header).await.unwrap();
    let device = broker.device("press-7");
    let tls = broker.pki.tls_client(Some(&device));
    let name = rustls::pki_types::ServerName::try_from(SERVER_NAME).unwrap();
    let mut tls = tokio_rustls::TlsConnector::from(tls)
        .connect(name, tcp)
        .await
        .unwrap();
    tls.write_all(hello).await.unwrap();
    let mut answer = [0; 1];
    within("the CONNACK", tls.read_exact(&mut answer))
        .await
        .unwrap();
    assert_eq!(answer, [0x20]);

    // A header where none is expected has a word of its own.
    let plain = TestBroker::with(broker::OPEN, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
    })
    .await;
    let mut tcp = TcpStream::connect(plain.mqtt()).await.unwrap();
    tcp.write_all(header).await.unwrap();
    let labels = [("listener", "mqtt"), ("reason", "proxy_header_unexpected")];
    plain.metric_reaches(REFUSED, &labels, 1).await;

    // Whoever is not a balancer is sent away, header or not.
    let refused = tunnel::open_websocket(&ws(&broker)).await;
    assert!(refused.is_err());
    let labels = [("listener", "ws"), ("reason", "proxy_untrusted")];
    broker.metric_reaches(REFUSED, &labels, 1).await;
}
