//! MQTT clients of another make beside native ones.

use std::process::Stdio;

use selvedge_broker::MqttConfig;
use selvedge_broker::mqtt::password::{Passwords, set_user};
use selvedge_client::{Publish, Qos};
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, TestBroker, broker};
use tokio::process::Command;

use super::pubsub::next;

const BOTH: [MqttVersion; 2] = [MqttVersion::V311, MqttVersion::V5];

/// A broker with a plaintext listener on which everyone is the identity `sensors`.
async fn plaintext(policy: &str) -> TestBroker {
    TestBroker::with(policy, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
    })
    .await
}

/// A broker with MQTT over TLS, where `meter` has the password `water`.
async fn with_tls() -> TestBroker {
    TestBroker::with(broker::OPEN, |config, pki| {
        let file = pki.ca_file().with_file_name("users.toml");
        let meter = pki.device("acme", "plant-1", "meter").identity().clone();
        set_user(&file, "meter", &meter, "water").unwrap();
        config.mqtt = MqttConfig {
            tls: Some(([127, 0, 0, 1], 0).into()),
            passwords: Some(Passwords::load(&file).unwrap()),
            ..MqttConfig::default()
        };
    })
    .await
}

async fn connect(options: MqttOptions) -> MqttPeer {
    MqttPeer::connect(options).await.unwrap()
}

#[tokio::test]
async fn messages_pass_between_sensors_and_native_clients_both_ways() {
    let broker = plaintext(broker::OPEN).await;
    let panel = broker.client("panel-1").await;
    let mut temps = panel.subscribe("sensor/#").await.unwrap();
    for version in BOTH {
        let mut sensor = connect(MqttOptions::new(version, broker.mqtt(), "sensor-1")).await;
        let subscribed = sensor.subscribe("orders/+", 1).await;
        assert_eq!(subscribed.reason, "Success(AtLeastOnce)");
        for qos in [0, 1] {
            assert_eq!(
                sensor.publish("sensor/1", qos, "71.3").await.reason,
                "Success"
            );
            let message = next(&mut temps).await;
            assert_eq!(
                (message.payload.as_ref(), message.qos as u8),
                (&b"71.3"[..], qos)
            );
            assert_eq!(
                &*message.publisher,
                "spiffe://test.example/acme/plant-1/sensors"
            );
        }
        for qos in [Qos::AtMostOnce, Qos::AtLeastOnce] {
            let order = Publish::new("orders/1", "faster").qos(qos);
            panel.publish_message(order).await.unwrap();
            let message = sensor.message().await;
            assert_eq!(
                (message.topic.as_str(), &message.payload[..]),
                ("orders/1", &b"faster"[..])
            );
            assert_eq!(
                (message.qos, message.retain, message.duplicate),
                (qos as u8, false, false)
            );
        }
        sensor.disconnect().await;
    }
}

#[tokio::test]
async fn quality_of_service_2_arrives_once() {
    let broker = plaintext(broker::OPEN).await;
    for version in BOTH {
        let mut sensor = connect(MqttOptions::new(version, broker.mqtt(), "sensor-1")).await;
        sensor.subscribe("sensor/#", 2).await;
        for number in ["1", "2"] {
            assert_eq!(
                sensor.publish("sensor/1", 2, number).await.reason,
                "Success"
            );
        }
        assert_eq!(sensor.message().await.payload, "1");
        assert_eq!(sensor.message().await.payload, "2");
        sensor.disconnect().await;
    }
}

#[tokio::test]
async fn a_retained_message_and_a_will_reach_sensors() {
    let broker = plaintext(broker::OPEN).await;
    for version in BOTH {
        let options = |id: &str| MqttOptions::new(version, broker.mqtt(), id);
        let mut sensor = connect(options("sensor-1").will("sensor/gone", "1")).await;
        assert_eq!(sensor.retain("sensor/state", "on").await.reason, "Success");
        let mut panel = connect(options("panel-1")).await;
        panel.subscribe("sensor/#", 1).await;
        let state = panel.message().await;
        assert_eq!((&state.payload[..], state.retain), (&b"on"[..], true));
        // Dropped without a DISCONNECT.
        drop(sensor);
        assert_eq!(panel.message().await.topic, "sensor/gone");
    }
}

#[tokio::test]
async fn a_kept_session_gets_what_its_sensor_missed() {
    let broker = plaintext(broker::OPEN).await;
    let panel = broker.client("panel-1").await;
    for version in BOTH {
        let options = MqttOptions::new(version, broker.mqtt(), "sensor-1").kept_session(60);
        let mut sensor = connect(options.clone()).await;
        sensor.session_present().await;
        sensor.subscribe("orders", 1).await;
        sensor.disconnect().await;
        for order in ["1", "2"] {
            let order = Publish::new("orders", order).qos(Qos::AtLeastOnce);
            panel.publish_message(order).await.unwrap();
        }
        let mut sensor = connect(options).await;
        assert!(sensor.session_present().await);
        assert_eq!(sensor.message().await.payload, "1");
        assert_eq!(sensor.message().await.payload, "2");
        sensor.unsubscribe("orders").await;
        sensor.disconnect().await;
    }
}

#[tokio::test]
async fn a_denial_is_a_reason_code_with_words_and_for_old_clients_a_failure() {
    let broker = plaintext(
        r#"
        [[rule]]
        name = "own topics"
        identities = ["acme/*/*"]
        allow = ["publish", "subscribe"]
        subjects = ["sensor/#"]
        "#,
    )
    .await;
    let mut new = connect(MqttOptions::new(MqttVersion::V5, broker.mqtt(), "new")).await;
    let published = new.publish("orders/1", 1, "x").await;
    assert_eq!(published.reason, "NotAuthorized");
    let words = "publish on \"orders/1\" denied: no rule allows it";
    assert_eq!(published.text.as_deref(), Some(words));
    let subscribed = new.subscribe("orders/#", 1).await;
    assert_eq!(subscribed.reason, "NotAuthorized");
    let words = "subscribe on \"orders/#\" denied: no rule allows it";
    assert_eq!(subscribed.text.as_deref(), Some(words));

    let mut old = connect(MqttOptions::new(MqttVersion::V311, broker.mqtt(), "old")).await;
    assert_eq!(old.subscribe("orders/#", 1).await.reason, "Failure");
    assert_eq!(old.publish("orders/1", 1, "x").await.reason, "Success");
    let labels = [("verb", "publish")];
    broker
        .metric_reaches("selvedge_denied_requests_total", &labels, 2)
        .await;
}

#[tokio::test]
async fn over_tls_a_certificate_or_a_password_is_the_identity() {
    let broker = with_tls().await;
    let panel = broker.client("panel-1").await;
    let mut all = panel.subscribe("#").await.unwrap();
    for version in BOTH {
        let press = broker.device("press-7");
        let options = MqttOptions::new(version, broker.mqtts(), "press");
        let mut press =
            connect(options.tls("localhost", broker.pki.tls_client(Some(&press)))).await;
        press.publish("press", 1, "x").await;
        let publisher = next(&mut all).await.publisher;
        assert_eq!(&*publisher, "spiffe://test.example/acme/plant-1/press-7");

        let options = MqttOptions::new(version, broker.mqtts(), "meter").login("meter", "water");
        let mut meter = connect(options.tls("localhost", broker.pki.tls_client(None))).await;
        meter.publish("meter", 1, "x").await;
        let publisher = next(&mut all).await.publisher;
        assert_eq!(&*publisher, "spiffe://test.example/acme/plant-1/meter");
    }
}

#[tokio::test]
async fn over_tls_a_wrong_password_or_none_at_all_is_refused() {
    let broker = with_tls().await;
    let tls = broker.pki.tls_client(None);
    for version in BOTH {
        let options =
            MqttOptions::new(version, broker.mqtts(), "meter").tls("localhost", tls.clone());
        for options in [options.clone().login("meter", "wine"), options] {
            let refusal = MqttPeer::connect(options).await.unwrap_err();
            let expected = match version {
                MqttVersion::V311 => ["BadUserNamePassword", "NotAuthorized"],
                MqttVersion::V5 => ["BadUserNamePassword", "NotAuthorized"],
            };
            assert!(
                expected.iter().any(|word| refusal.contains(word)),
                "{refusal}"
            );
        }
    }
}

#[tokio::test]
async fn another_identity_with_the_same_client_id_does_not_take_the_session() {
    let broker = with_tls().await;
    let device = |name: &str| {
        let device = broker.device(name);
        let options = MqttOptions::new(MqttVersion::V5, broker.mqtts(), "the-id");
        options.tls("localhost", broker.pki.tls_client(Some(&device)))
    };
    let mut owner = connect(device("press-7")).await;
    owner.subscribe("orders", 1).await;
    let mut thief = connect(device("press-8")).await;
    thief.publish("orders", 1, "stop").await;
    // The owner is still connected and still subscribed.
    assert_eq!(owner.message().await.payload, "stop");
    // Its own second connection takes the session over.
    let _second = connect(device("press-7")).await;
    assert!(owner.closed().await.contains("SessionTakenOver"));
}

#[tokio::test]
async fn mosquittos_own_clients_are_at_home() {
    let broker = plaintext(broker::OPEN).await;
    let port = broker.mqtt().port().to_string();
    let common = ["-h", "127.0.0.1", "-p", &port, "-q", "1", "-V"];
    for version in ["mqttv31", "mqttv311", "mqttv5"] {
        let mut subscriber = Command::new("mosquitto_sub");
        subscriber.args(common).arg(version);
        subscriber.args(["-t", "sensor/#", "-C", "1", "-F", "%t %p"]);
        let started = subscriber.stdout(Stdio::piped()).kill_on_drop(true).spawn();
        let subscriber = match started {
            Ok(subscriber) => subscriber,
            Err(error) => return say_skipped("mosquitto_sub", &error),
        };
        broker
            .metric_reaches("selvedge_subscriptions", &[], 1)
            .await;
        let mut publisher = Command::new("mosquitto_pub");
        publisher.args(common).arg(version);
        publisher.args(["-t", "sensor/1", "-m", "71.3"]);
        let status = match within("mosquitto_pub", publisher.status()).await {
            Ok(status) => status,
            Err(error) => return say_skipped("mosquitto_pub", &error),
        };
        assert!(status.success(), "{version}: {status}");
        let received = within("mosquitto_sub", subscriber.wait_with_output())
            .await
            .unwrap();
        assert_eq!(received.stdout, b"sensor/1 71.3\n", "{version}");
        // The next version must not find the subscription of this one.
        let gone =
            || async { (broker.metric("selvedge_subscriptions", &[]).await == 0).then_some(()) };
        eventually("the subscription to end", gone).await;
    }
}

#[allow(clippy::print_stderr)]
fn say_skipped(program: &str, error: &std::io::Error) {
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::NotFound,
        "{program}: {error}"
    );
    eprintln!("SKIPPED: {program} is not installed, so nothing of it was tested");
}
