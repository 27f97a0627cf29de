//! MQTT: a sensor on the broker's own listener, and sensors on a broker that was there before.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rumqttc::{
    AsyncClient, Event, MqttOptions, Outgoing, Packet, QoS, TlsConfiguration, Transport,
};
use selvedge_bridge::{Bridge, BridgeConfig};
use selvedge_broker::policy::Policy;
use selvedge_broker::{Config, Server};
use selvedge_certs::{Authority, IssueRequest, ServerIdentity, tcp_client_config};
use selvedge_client::{Subscription, TrustAnchors};
use serde_json::json;

use super::report::Finding;
use super::scene::{BRIDGE, DASHBOARD, SERVER_NAME, Scene, THERMOSTAT};

const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Temperatures that a sensor publishes.
const READINGS: [&str; 5] = ["21.4", "21.5", "21.7", "21.6", "21.5"];

/// Everybody on the old broker is this, and may do everything there.
const OLD_SENSORS: &str = "spiffe://old.example/plant/hall/sensors";
const OLD_POLICY: &str = r##"
[[rule]]
name = "as MQTT brokers were: everybody may do everything"
identities = ["plant/hall/sensors"]
allow = ["publish", "subscribe"]
subjects = ["#"]
"##;

/// A thermostat publishes over MQTT with its certificate, and a native subscriber receives it.
pub(super) async fn sensor(scene: &mut Scene) -> anyhow::Result<Finding> {
    const TOPIC: &str = "plant-1/thermostat-4/temperature";
    let progress = scene.progress;
    let dashboard = scene.client(DASHBOARD).await?;
    let mut seen = dashboard.subscribe("plant-1/+/temperature").await?;
    let tls = tcp_client_config(
        Some(scene.credentials(THERMOSTAT)?),
        &scene.anchors()?,
        ServerIdentity::Spiffe,
        &[b"mqtt"],
    )?;
    let broker = scene.mqtts()?;
    let mut options = MqttOptions::new("thermostat-4", broker.ip().to_string(), broker.port());
    options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)));

    let from = Scene::uri(THERMOSTAT);
    tokio::try_join!(publish(options, TOPIC), receive(&mut seen, TOPIC, &from))?;
    progress.seen(format_args!(
        "thermostat-4 published {} over MQTT 3.1.1 and TLS, to {TOPIC}",
        READINGS.join(", ")
    ));
    progress.seen(format_args!(
        "dashboard received them over QUIC, from {from}"
    ));
    Ok(Finding::new(
        format!(
            "{} MQTT readings reached a QUIC subscriber, the sensor's identity verified",
            READINGS.len()
        ),
        json!({ "published": READINGS.len(), "received": READINGS.len(), "publisher": from }),
    ))
}

/// A plain MQTT broker with a sensor, and the bridge from it to the fabric.
pub(super) async fn bridge(scene: &mut Scene) -> anyhow::Result<Finding> {
    const OLD_TOPIC: &str = "sensors/hall/temperature";
    const TOPIC: &str = "plant-1/old/sensors/hall/temperature";
    let progress = scene.progress;
    let dashboard = scene.client(DASHBOARD).await?;
    let mut seen = dashboard.subscribe("plant-1/old/#").await?;
    let (old, address) = old_broker().await?;
    progress.seen(format_args!(
        "an MQTT broker on {address}: no TLS, no certificates, not part of the fabric"
    ));

    let pki = scene.pki();
    let text = format!(
        r#"
        [fabric]
        broker = "{quic}"
        server_name = "{SERVER_NAME}"
        ca = "ca.pem"
        cert = "{BRIDGE}/cert.pem"
        key = "{BRIDGE}/key.pem"

        [[remote]]
        name = "old"
        url = "mqtt://{address}"
        client_id = "selvedge-bridge"

        [[remote.rule]]
        direction = "in"
        filter = "sensors/#"
        local_prefix = "plant-1/old/"
        "#,
        quic = scene.quic()?,
    );
    let config = BridgeConfig::parse(&text, &pki)?;
    let bridge = Box::pin(Bridge::start(config)).await?;
    bridge.ready().await;
    progress.seen("the bridge is connected to both: sensors/# there is plant-1/old/sensors/# here");

    let from = Scene::uri(BRIDGE);
    let mut options = MqttOptions::new("hall-sensor", address.ip().to_string(), address.port());
    options.set_transport(Transport::tcp());
    let carried = tokio::try_join!(
        publish(options, OLD_TOPIC),
        receive(&mut seen, TOPIC, &from)
    );
    bridge.shutdown().await;
    old.shutdown().await;
    carried?;
    progress.seen(format_args!(
        "dashboard received {} on {TOPIC}",
        READINGS.join(", ")
    ));
    let count = READINGS.len();
    Ok(Finding::new(
        format!("{count} readings of a sensor without a certificate came in over the bridge"),
        json!({ "published": count, "received": count, "publisher": from }),
    ))
}

/// Publishes the readings over MQTT at QoS 1; returns when all are acknowledged.
async fn publish(mut options: MqttOptions, topic: &str) -> anyhow::Result<()> {
    options.set_keep_alive(KEEP_ALIVE);
    let (client, mut events) = AsyncClient::new(options, READINGS.len() + 1);
    for reading in READINGS {
        client
            .publish(topic, QoS::AtLeastOnce, false, reading)
            .await?;
    }
    let mut acknowledged = 0;
    while acknowledged < READINGS.len() {
        let event = events.poll().await.context("publish over MQTT")?;
        if let Event::Incoming(Packet::PubAck(_)) = event {
            acknowledged += 1;
        }
    }
    client.disconnect().await?;
    loop {
        if let Event::Outgoing(Outgoing::Disconnect) = events.poll().await? {
            return Ok(());
        }
    }
}

/// Receives the readings in their order, on this topic and from this publisher only.
async fn receive(seen: &mut Subscription, topic: &str, from: &str) -> anyhow::Result<()> {
    for reading in READINGS {
        let Some(message) = seen.next().await else {
            bail!("the subscription ended: {:?}", seen.end());
        };
        ensure!(
            message.payload == reading.as_bytes()
                && message.topic.as_str() == topic
                && &*message.publisher == from,
            "expected {reading} on {topic} from {from}, found {:?} on {} from {}",
            String::from_utf8_lossy(&message.payload),
            message.topic,
            message.publisher
        );
    }
    Ok(())
}

/// A broker as plants have had for years, with an authority that nobody here trusts.
async fn old_broker() -> anyhow::Result<(Server, SocketAddr)> {
    let authority = Authority::create("old.example")?;
    let issued = authority.issue(&IssueRequest::server("plant", "hall", "broker"))?;
    let anchors = TrustAnchors::from_pem(authority.ca_pem().as_bytes())?;
    let policy = Policy::parse(OLD_POLICY).context("read the policy of the old broker")?;
    let mut config = Config::new(issued.credentials(), anchors, policy);
    config.quic = None;
    let free = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.mqtt.danger_plaintext = Some((free, OLD_SENSORS.parse()?));
    let server = Box::pin(Server::bind(config)).await?;
    let address = server.addresses().mqtt;
    Ok((server, address.context("expected an MQTT listener")?))
}
