//! Calls and inferences over MQTT 5.0, by callers and responders of either kind.

use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PublishProperties};
use rumqttc::v5::{AsyncClient, Event, MqttOptions as Options5};
use selvedge_client::{Call, Client, Code, ModelRegistration, Tensor, Tier};
use selvedge_proto::inference::{decode_tensors, encode_tensors};
use selvedge_tests::wait::within;
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, TestBroker, broker};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// Sensors call, and serve what begins with `valve`; they publish and subscribe to anything but
/// what is asked for under names of its own.
const RULES: &str = r##"
[[rule]]
name = "messages are free"
identities = ["*/*/*"]
allow = ["publish", "subscribe"]
subjects = ["#", "$call/#", "$infer/#", "$serve/#", "$reply/#"]
[[rule]]
name = "who calls what"
identities = ["*/*/*"]
allow = ["call", "serve"]
subjects = ["valve/#", "press/#"]
[[rule]]
name = "valve 9 is locked"
identities = ["*/*/*"]
deny = ["call"]
subjects = ["valve/9"]
"##;

/// Something that the broker sent.
#[derive(Debug)]
enum Came {
    Message(String, Bytes, PublishProperties),
    Published(String, Option<String>),
    Subscribed(String, Option<String>),
    Unsubscribed,
}

/// An MQTT 5.0 client that sees every property.
struct Peer {
    client: AsyncClient,
    came: mpsc::Receiver<Came>,
    _driver: AbortOnDropHandle<()>,
}

impl Peer {
    async fn connect(broker: &TestBroker, id: &str) -> Self {
        let mut options = Options5::new(id, broker.mqtt().ip().to_string(), broker.mqtt().port());
        options.set_clean_start(true);
        let (client, mut events) = AsyncClient::new(options, 64);
        let (sender, mut came) = mpsc::channel(256);
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            while let Ok(event) = events.poll().await {
                let Event::Incoming(packet) = event else {
                    continue;
                };
                let came = match packet {
                    Packet::Publish(publish) => Came::Message(
                        String::from_utf8(publish.topic.to_vec()).unwrap(),
                        publish.payload,
                        publish.properties.unwrap_or_default(),
                    ),
                    Packet::PubAck(ack) => Came::Published(
                        format!("{:?}", ack.reason),
                        ack.properties.and_then(|held| held.reason_string),
                    ),
                    Packet::SubAck(ack) => Came::Subscribed(
                        format!("{:?}", ack.return_codes[0]),
                        ack.properties.and_then(|held| held.reason_string),
                    ),
                    Packet::UnsubAck(_) | Packet::ConnAck(_) => Came::Unsubscribed,
                    _ => continue,
                };
                if sender.send(came).await.is_err() {
                    return;
                }
            }
        }));
        // The CONNACK.
        within("the CONNACK", came.recv()).await.unwrap();
        Self {
            client,
            came,
            _driver: driver,
        }
    }

    async fn next(&mut self) -> Came {
        within("a packet", self.came.recv())
            .await
            .expect("the connection stays")
    }

    async fn subscribe(&mut self, filter: &str) -> (String, Option<String>) {
        self.client
            .subscribe(filter, QoS::AtLeastOnce)
            .await
            .unwrap();
        loop {
            if let Came::Subscribed(reason, text) = self.next().await {
                return (reason, text);
            }
        }
    }

    async fn send(&self, topic: &str, qos: QoS, payload: &str, properties: PublishProperties) {
        self.client
            .publish_with_properties(topic, qos, false, payload.to_owned(), properties)
            .await
            .unwrap();
    }

    async fn published(&mut self) -> (String, Option<String>) {
        loop {
            if let Came::Published(reason, text) = self.next().await {
                return (reason, text);
            }
        }
    }

    async fn message(&mut self) -> (String, Bytes, PublishProperties) {
        loop {
            if let Came::Message(topic, payload, properties) = self.next().await {
                return (topic, payload, properties);
            }
        }
    }

    /// The answer to a request with this correlation data.
    async fn answer(&mut self, correlation: &str) -> (String, Vec<(String, String)>) {
        let (topic, payload, properties) = self.message().await;
        assert_eq!(topic, "me/answers");
        assert_eq!(properties.correlation_data.unwrap(), correlation);
        (
            String::from_utf8(payload.to_vec()).unwrap(),
            properties.user_properties,
        )
    }
}

fn asking(correlation: &str) -> PublishProperties {
    PublishProperties {
        response_topic: Some("me/answers".into()),
        correlation_data: Some(correlation.to_owned().into()),
        ..Default::default()
    }
}

fn said<'a>(user: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = user.iter().find(|(held, _)| held == name);
    found.map(|(_, value)| value.as_str())
}

async fn plaintext(policy: &str) -> TestBroker {
    TestBroker::with(policy, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt.danger_plaintext = Some((([127, 0, 0, 1], 0).into(), sensors));
    })
    .await
}

/// Answers each call of `service` with what was asked, in capitals, until dropped.
async fn shouting(client: &Client, service: &str) -> AbortOnDropHandle<()> {
    let mut responder = client.serve(service).await.unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut call) = responder.next().await {
            let asked = call.request().await.unwrap();
            let loud = String::from_utf8(asked.to_vec()).unwrap().to_uppercase();
            let _ = call.reply(loud).await;
        }
    }))
}

#[tokio::test]
async fn an_mqtt_client_calls_native_services_and_is_told_how_each_call_ended() {
    let broker = plaintext(broker::OPEN).await;
    let press = broker.client("press-7").await;
    let _serving = shouting(&press, "press/echo").await;
    let mut silent = press.serve("press/silent").await.unwrap();
    let mut streaming = press.serve("press/stream").await.unwrap();
    let mut meter = Peer::connect(&broker, "meter").await;
    meter.subscribe("me/+").await;
    for (qos, id) in [
        (QoS::AtMostOnce, "0"),
        (QoS::AtLeastOnce, "1"),
        (QoS::ExactlyOnce, "2"),
    ] {
        meter
            .send("$call/press/echo", qos, "hello", asking(id))
            .await;
        let (payload, user) = meter.answer(id).await;
        assert_eq!(
            (payload.as_str(), said(&user, "status")),
            ("HELLO", Some("OK"))
        );
    }

    // Nobody serves it.
    meter
        .send("$call/press/none", QoS::AtMostOnce, "", asking("none"))
        .await;
    let (payload, user) = meter.answer("none").await;
    assert_eq!(
        (payload.as_str(), said(&user, "status")),
        ("", Some("NOT_FOUND"))
    );
    assert_eq!(said(&user, "message"), Some("nobody serves press/none"));

    // Time runs out, and the responder knows how much there was.
    let mut hurried = asking("late");
    hurried.message_expiry_interval = Some(30);
    hurried.user_properties = vec![
        ("deadline-ms".into(), "50".into()),
        ("unit".into(), "rpm".into()),
    ];
    meter
        .send("$call/press/silent", QoS::AtMostOnce, "", hurried)
        .await;
    let call = within("the call", silent.next()).await.unwrap();
    assert_eq!(call.properties(), [("unit".to_owned(), "rpm".to_owned())]);
    assert_eq!(call.caller(), "spiffe://test.example/acme/plant-1/sensors");
    let (_, user) = meter.answer("late").await;
    assert_eq!(said(&user, "status"), Some("DEADLINE_EXCEEDED"));

    // An answer of several messages.
    meter
        .send("$call/press/stream", QoS::AtMostOnce, "", asking("many"))
        .await;
    let mut call = within("the call", streaming.next()).await.unwrap();
    for part in ["a", "b", "c"] {
        call.send(part).await.unwrap();
    }
    call.finish().await.unwrap();
    for (part, more, status) in [
        ("a", Some("true"), None),
        ("b", Some("true"), None),
        ("c", None, Some("OK")),
    ] {
        let (payload, user) = meter.answer("many").await;
        assert_eq!(payload, part);
        assert_eq!((said(&user, "more"), said(&user, "status")), (more, status));
    }

    // A call ends with the connection of who asked.
    meter
        .send("$call/press/silent", QoS::AtMostOnce, "", asking("left"))
        .await;
    let call = within("the call", silent.next()).await.unwrap();
    drop(meter);
    within("the cancellation", call.cancelled()).await;
}

#[tokio::test]
async fn an_mqtt_client_answers_callers_of_either_kind() {
    let broker = plaintext(RULES).await;
    let panel = broker.client("panel-1").await;
    let mut valve = Peer::connect(&broker, "valve").await;
    assert_eq!(
        valve.subscribe("$serve/valve/1").await.0,
        "Success(AtMostOnce)"
    );
    let mut meter = Peer::connect(&broker, "meter").await;
    meter.subscribe("me/answers").await;

    // A native caller.
    let call = Call::new("valve/1")
        .property("unit", "percent")
        .property("caller", "forged")
        .payload("40");
    let answering = async {
        let (topic, payload, asked) = valve.message().await;
        assert_eq!(
            (topic.as_str(), &payload[..]),
            ("$serve/valve/1", &b"40"[..])
        );
        let user = &asked.user_properties;
        assert_eq!(said(user, "unit"), Some("percent"));
        assert_eq!(
            said(user, "caller"),
            Some("spiffe://test.example/acme/plant-1/panel-1")
        );
        assert!(said(user, "deadline-ms").unwrap().parse::<u32>().unwrap() > 20_000);
        assert!(asked.message_expiry_interval.unwrap() >= 20);
        let reply = asked.response_topic.unwrap();
        assert!(reply.starts_with("$reply/"), "{reply}");
        valve
            .send(
                &reply,
                QoS::AtLeastOnce,
                "open",
                PublishProperties::default(),
            )
            .await;
        assert_eq!(valve.published().await.0, "Success");
        // It answers once.
        valve
            .send(
                &reply,
                QoS::AtLeastOnce,
                "shut",
                PublishProperties::default(),
            )
            .await;
        let (reason, text) = valve.published().await;
        assert_ne!(reason, "Success");
        assert!(text.unwrap().contains("no call in progress"));
    };
    let (answer, ()) = tokio::join!(panel.request(call), answering);
    assert_eq!(answer.unwrap(), "open");

    // A caller over MQTT, and an answer in parts.
    meter
        .send("$call/valve/1", QoS::AtLeastOnce, "50", asking("m"))
        .await;
    let (_, _, asked) = valve.message().await;
    let reply = asked.response_topic.unwrap();
    // Only who was asked can answer.
    meter
        .send(
            &reply,
            QoS::AtLeastOnce,
            "forged",
            PublishProperties::default(),
        )
        .await;
    loop {
        let (reason, text) = meter.published().await;
        if reason != "Success" {
            assert!(text.unwrap().contains("no call in progress"));
            break;
        }
    }
    let more = PublishProperties {
        user_properties: vec![("more".into(), "true".into())],
        ..Default::default()
    };
    valve.send(&reply, QoS::AtMostOnce, "opening", more).await;
    valve
        .send(
            &reply,
            QoS::AtMostOnce,
            "open",
            PublishProperties::default(),
        )
        .await;
    let (payload, user) = meter.answer("m").await;
    assert_eq!(
        (payload.as_str(), said(&user, "more")),
        ("opening", Some("true"))
    );
    let (payload, user) = meter.answer("m").await;
    assert_eq!(
        (payload.as_str(), said(&user, "status")),
        ("open", Some("OK"))
    );

    // An error of the responder, word for word.
    let answering = async {
        let (_, _, asked) = valve.message().await;
        let failed = PublishProperties {
            user_properties: vec![
                ("status".into(), "RESOURCE_EXHAUSTED".into()),
                ("message".into(), "too hot".into()),
                ("retry-after-ms".into(), "1500".into()),
            ],
            ..Default::default()
        };
        valve
            .send(&asked.response_topic.unwrap(), QoS::AtMostOnce, "", failed)
            .await;
    };
    let (answer, ()) = tokio::join!(panel.call("valve/1", "60"), answering);
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.to_string().contains("too hot"), "{status}");

    // Nobody serves it any more once it is unsubscribed, or its connection is gone.
    valve.subscribe("$serve/valve/2").await;
    valve.client.unsubscribe("$serve/valve/1").await.unwrap();
    within("the UNSUBACK", async {
        while !matches!(valve.next().await, Came::Unsubscribed) {}
    })
    .await;
    let error = panel.call("valve/1", "x").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let lost = async {
        valve.message().await;
        drop(valve);
    };
    let (answer, ()) = tokio::join!(panel.call("valve/2", "x"), lost);
    assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn the_verbs_of_calls_decide_and_not_those_of_messages() {
    let broker = plaintext(RULES).await;
    let mut meter = Peer::connect(&broker, "meter").await;
    meter.subscribe("me/answers").await;
    // Denied, and said so in both places.
    for (topic, verb) in [
        ("$call/valve/9", "valve 9 is locked"),
        ("$call/oven/1", "no rule"),
        ("$infer/digits", "no rule"),
    ] {
        meter
            .send(topic, QoS::AtLeastOnce, "x", asking(topic))
            .await;
        let (mut acked, mut answered) = (false, false);
        while !(acked && answered) {
            match meter.next().await {
                Came::Published(reason, text) => {
                    assert_eq!(reason, "NotAuthorized", "{topic}");
                    assert!(text.unwrap().contains(verb), "{topic}");
                    acked = true;
                }
                Came::Message(_, _, properties) => {
                    let user = properties.user_properties;
                    assert_eq!(said(&user, "status"), Some("PERMISSION_DENIED"), "{topic}");
                    answered = true;
                }
                other => panic!("found {other:?}"),
            }
        }
    }
    for filter in [
        "$serve/oven/1",
        "$serve/$SYS/explain",
        "$call/#",
        "$reply/+",
        "$infer/digits",
        "$share/g/$serve/valve/1",
    ] {
        let (reason, text) = meter.subscribe(filter).await;
        assert_eq!(reason, "NotAuthorized", "{filter}: {text:?}");
    }
    assert_eq!(meter.subscribe("$serve/valve/+").await.0, "Unspecified");

    // An answer goes to who could receive it, and is never published for others.
    let press = broker.client("press-7").await;
    let _serving = shouting(&press, "press/echo").await;
    let others = PublishProperties {
        response_topic: Some("others/answers".into()),
        ..Default::default()
    };
    let nowhere = PublishProperties::default();
    let reserved = PublishProperties {
        response_topic: Some("$serve/valve/1".into()),
        ..Default::default()
    };
    for (properties, why) in [
        (others, "is not subscribed to"),
        (nowhere, "found none"),
        (reserved, "is no topic"),
    ] {
        meter
            .send("$call/press/echo", QoS::AtLeastOnce, "x", properties)
            .await;
        let (reason, text) = meter.published().await;
        assert_eq!(reason, "UnspecifiedError");
        let text = text.unwrap();
        assert!(text.contains(why), "{text}");
    }
    let mut listener = Peer::connect(&broker, "listener").await;
    listener.subscribe("me/answers").await;
    meter
        .send("$call/press/echo", QoS::AtLeastOnce, "secret", asking("s"))
        .await;
    assert_eq!(meter.answer("s").await.0, "SECRET");
    listener
        .send(
            "me/answers",
            QoS::AtMostOnce,
            "mark",
            PublishProperties::default(),
        )
        .await;
    assert_eq!(listener.message().await.1, "mark");

    // 3.1.1 has no words for any of it.
    let mut old = MqttPeer::connect(MqttOptions::new(MqttVersion::V311, broker.mqtt(), "old"))
        .await
        .unwrap();
    assert_eq!(old.subscribe("$serve/valve/1", 1).await.reason, "Failure");
    assert_eq!(
        old.publish("$call/press/echo", 1, "x").await.reason,
        "Success"
    );
}

#[tokio::test]
async fn an_mqtt_client_asks_models_with_tensors_in_json_or_whatever_they_take() {
    let broker = plaintext(broker::OPEN).await;
    let edge = broker.client("edge-1").await;
    let registration = ModelRegistration {
        model: "double".into(),
        version: "1".into(),
        tier: Tier::Edge,
        slots: 4,
        inputs: Vec::new(),
        outputs: Vec::new(),
        loaded: true,
        service_time: Some(Duration::from_millis(1)),
        continues: false,
    };
    let mut worker = edge.work(registration).await.unwrap();
    let _working = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut inference) = worker.next().await {
            let payload = inference.request().await.unwrap();
            let answer: Bytes = match decode_tensors(payload.clone()) {
                Ok(tensors) => {
                    let doubled: Vec<u8> = (tensors[0].data.chunks_exact(4))
                        .flat_map(|value| {
                            (2.0 * f32::from_le_bytes(value.try_into().unwrap())).to_le_bytes()
                        })
                        .collect();
                    encode_tensors(vec![Tensor {
                        name: "out".into(),
                        data: doubled.into(),
                        ..tensors[0].clone()
                    }])
                }
                Err(_) => payload,
            };
            let _ = inference.reply(Default::default(), answer).await;
        }
    }));
    let mut camera = Peer::connect(&broker, "camera").await;
    camera.subscribe("me/answers").await;
    let request =
        r#"{"id":"r-1","inputs":[{"name":"in","datatype":"FP32","shape":[2],"data":[1.5,-2]}]}"#;
    camera
        .send("$infer/double", QoS::AtLeastOnce, request, asking("json"))
        .await;
    let (payload, user) = camera.answer("json").await;
    assert_eq!(said(&user, "status"), Some("OK"), "{user:?}");
    assert_eq!(said(&user, "tier"), Some("edge"));
    let answer: serde_json::Value = serde_json::from_str(&payload).unwrap();
    assert_eq!(answer["id"], "r-1");
    assert_eq!(answer["outputs"][0]["data"], serde_json::json!([3.0, -4.0]));

    let mut raw = asking("raw");
    raw.content_type = Some("text/plain".into());
    camera
        .send("$infer/double", QoS::AtLeastOnce, "as it is", raw)
        .await;
    let (payload, user) = camera.answer("raw").await;
    assert_eq!(
        (payload.as_str(), said(&user, "status")),
        ("as it is", Some("OK"))
    );
    assert_eq!(
        said(&user, "worker"),
        Some("spiffe://test.example/acme/plant-1/edge-1")
    );

    for (payload, name, value, status) in [
        ("{}", "x", "y", "INVALID_ARGUMENT"),
        (request, "residency", "elsewhere", "INVALID_ARGUMENT"),
        (request, "deadline-ms", "soon", "INVALID_ARGUMENT"),
        (request, "version", "2", "NOT_FOUND"),
    ] {
        let mut properties = asking(name);
        properties.user_properties = vec![(name.into(), value.into())];
        camera
            .send("$infer/double", QoS::AtMostOnce, payload, properties)
            .await;
        let (_, user) = camera.answer(name).await;
        assert_eq!(said(&user, "status"), Some(status), "{name}: {user:?}");
    }
}
