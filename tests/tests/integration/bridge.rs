//! The bridge between the fabric and an MQTT broker that was there before; here it is another broker
//! of our own, so that nothing need be installed.

use selvedge_bridge::{Bridge, BridgeConfig};
use selvedge_client::{Publish, Qos};
use selvedge_tests::wait::within;
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, TestBroker, broker};

use super::pubsub::next;

/// A plant with an MQTT broker, the fabric, and a bridge from one to the other.
struct Scene {
    plant: TestBroker,
    fabric: TestBroker,
    bridge: Bridge,
}

impl Scene {
    async fn set(version: &str) -> Scene {
        let plant = TestBroker::with(broker::OPEN, |config, pki| {
            let sensors = pki.device("old", "plant", "sensors").identity().clone();
            config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
        })
        .await;
        let fabric = TestBroker::open().await;
        let files = fabric.pki.device_files("acme", "plant-7", "bridge");
        let text = format!(
            r#"
            [fabric]
            broker = "localhost:{quic}"
            ca = {ca:?}
            cert = {cert:?}
            key = {key:?}
            [[remote]]
            name = "plant"
            url = "mqtt://127.0.0.1:{mqtt}"
            version = "{version}"
            client_id = "selvedge-bridge"
            [[remote.rule]]
            direction = "in"
            filter = "sensors/#"
            local_prefix = "plant-7/"
            [[remote.rule]]
            direction = "out"
            filter = "commands/#"
            local_prefix = "plant-7/"
            "#,
            quic = fabric.quic().port(),
            mqtt = plant.mqtt().port(),
            ca = files.ca,
            cert = files.cert,
            key = files.key,
        );
        let config = BridgeConfig::parse(&text, std::path::Path::new("/")).unwrap();
        let bridge = within("the bridge to start", Bridge::start(config))
            .await
            .unwrap();
        within("the bridge to be ready", bridge.ready()).await;
        Scene {
            plant,
            fabric,
            bridge,
        }
    }
}

async fn carries_both_ways(version: &str) {
    let Scene {
        plant,
        fabric,
        bridge,
    } = Scene::set(version).await;
    let panel = fabric.client("panel-1").await;
    let mut temps = panel.subscribe("plant-7/#").await.unwrap();
    let options = MqttOptions::new(MqttVersion::V5, plant.mqtt(), "press");
    let mut press = MqttPeer::connect(options).await.unwrap();
    press.subscribe("commands/#", 1).await;

    for qos in [0, 1] {
        press.publish("sensors/press/temp", qos, "71.3").await;
        let message = next(&mut temps).await;
        assert_eq!(message.topic.as_str(), "plant-7/sensors/press/temp");
        assert_eq!(
            (&message.payload[..], message.qos as u8),
            (&b"71.3"[..], qos)
        );
        assert_eq!(
            &*message.publisher,
            "spiffe://test.example/acme/plant-7/bridge"
        );
    }
    let order = Publish::new("plant-7/commands/press/stop", "now").qos(Qos::AtLeastOnce);
    panel.publish_message(order).await.unwrap();
    let message = press.message().await;
    assert_eq!(
        (message.topic.as_str(), &message.payload[..]),
        ("commands/press/stop", &b"now"[..])
    );
    within("the bridge to stop", bridge.shutdown()).await;
}

#[tokio::test]
async fn messages_pass_the_bridge_both_ways_with_mqtt_5() {
    Box::pin(carries_both_ways("5")).await;
}

#[tokio::test]
async fn messages_pass_the_bridge_both_ways_with_mqtt_3_1_1() {
    Box::pin(carries_both_ways("3.1.1")).await;
}

#[tokio::test]
async fn the_bridge_outlives_a_restart_of_the_plants_broker() {
    let Scene {
        mut plant,
        fabric,
        bridge,
    } = Scene::set("5").await;
    let panel = fabric.client("panel-1").await;
    let mut temps = panel.subscribe("plant-7/#").await.unwrap();
    plant.restart().await;
    within("the bridge to be ready again", bridge.ready()).await;
    plant.metric_reaches("selvedge_subscriptions", &[], 1).await;
    let options = MqttOptions::new(MqttVersion::V5, plant.mqtt(), "press");
    let mut press = MqttPeer::connect(options).await.unwrap();
    press.publish("sensors/press/temp", 1, "71.4").await;
    assert_eq!(next(&mut temps).await.payload, "71.4");
    within("the bridge to stop", bridge.shutdown()).await;
}
