//! Where did my message go: what the broker tells of a message, a client and a topic.

use std::time::Duration;

use selvedge_broker::MqttConfig;
use selvedge_client::{
    CallError, Client, Code, Properties, Publish, PublishError, Qos, ServeError, Status,
};
use selvedge_proto::status::Denial;
use selvedge_proto::wire;
use selvedge_proto::wire::control::Frame;
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{MqttOptions, MqttPeer, MqttVersion, RawQuic, TestBroker, broker, raw};
use serde_json::{Value, json};

use super::pubsub::next;

/// Everyone works on the line, and operators of every tenant may ask.
const RULES: &str = r#"
[[rule]]
name = "line work"
identities = ["*/*/*"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["line/#"]

[[rule]]
name = "no secrets"
identities = ["*/*/*"]
deny = ["publish", "subscribe", "call", "infer"]
subjects = ["line/secret/#"]

[[rule]]
name = "operators may ask where messages went"
identities = ["*/*/operator"]
allow = ["call", "serve"]
subjects = ["$SYS/#"]
"#;

const PRESS: &str = "spiffe://test.example/acme/plant-1/press-7";
const PANEL: &str = "spiffe://test.example/acme/plant-1/panel-1";

/// What the broker says.
async fn ask(client: &Client, question: Value) -> Value {
    let answer = within(
        "the explanation",
        client.call("$SYS/explain", question.to_string()),
    );
    serde_json::from_slice(&answer.await.unwrap()).unwrap()
}

async fn explain(client: &Client, query: &str) -> Value {
    ask(client, json!({ "query": query })).await
}

/// The only record about a query, however it is asked for.
async fn only_record(client: &Client, queries: &[(&str, &str)]) -> Value {
    let mut records = Vec::new();
    for (query, matched) in queries {
        let answer = explain(client, query).await;
        assert_eq!(answer["found"], true, "{query}");
        assert_eq!(answer["record_count"], 1, "{query}: {answer}");
        let mut record = answer["records"][0].clone();
        let why = record.as_object_mut().unwrap().remove("matched");
        assert_eq!(why.unwrap(), *matched, "{query}");
        records.push(record);
    }
    assert!(
        records.windows(2).all(|two| two[0] == two[1]),
        "{records:?}"
    );
    records.remove(0)
}

/// A tenant that has nothing of all that, and so is told nothing, whatever it asks for.
async fn others_see_nothing(broker: &TestBroker, queries: &[(&str, &str)]) {
    let stranger = broker.client("globex/plant-1/operator").await;
    for (query, _) in queries {
        let answer = explain(&stranger, query).await;
        assert_eq!(answer["found"], false, "{query}: {answer}");
        assert_eq!(answer["records"], json!([]), "{query}");
        assert_eq!(answer["now"]["sessions"], json!([]), "{query}");
        assert_eq!(answer["now"]["topic"], Value::Null, "{query}");
        assert_eq!(answer["now"]["message"], Value::Null, "{query}");
    }
}

fn named(topic: &str, id: &str) -> Publish {
    let properties = Properties {
        message_id: bytes::Bytes::copy_from_slice(id.as_bytes()),
        ..Properties::default()
    };
    Publish::new(topic, "x").properties(properties)
}

/// A session that is kept, without its client, that subscribes to `filter`.
async fn absent(broker: &TestBroker, filter: &str) {
    let panel = broker.connect(kept(broker)).await;
    let _subscription = panel.subscribe(filter).await.unwrap();
    panel.close().await;
}

fn kept(broker: &TestBroker) -> selvedge_client::Options {
    let options = broker.options(broker.device("panel-1")).session("main");
    options.session_expiry(Duration::from_secs(600))
}

#[tokio::test]
async fn a_message_of_quality_0_for_who_is_offline() {
    let broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    absent(&broker, "line/7/#").await;
    let press = broker.client("press-7").await;
    press
        .publish_message(named("line/7/temp", "order-1"))
        .await
        .unwrap();
    press.flush().await.unwrap();

    let queries = [
        ("order-1", "message_id"),
        (PRESS, "publisher"),
        ("press-7", "publisher"),
        ("acme/plant-1/panel-1", "receiver"),
        ("main", "receiver"),
        ("line/7/temp", "topic"),
    ];
    let record = only_record(&operator, &queries).await;
    assert_eq!(record["what"], "dropped");
    assert_eq!(record["reason"], "offline");
    assert_eq!(record["count"], 1);
    assert_eq!(record["publisher"], PRESS);
    assert_eq!(
        record["receiver"],
        json!({ "identity": PANEL, "session": "main" })
    );
    assert_eq!(record["topic"], "line/7/temp");
    assert_eq!(record["message_id"], "order-1");
    assert_eq!(record["status"], Value::Null);
    others_see_nothing(&broker, &queries).await;

    // Ten more without an id are one record more.
    for _ in 0..10 {
        press.publish("line/7/temp", "x").await.unwrap();
    }
    press.flush().await.unwrap();
    let answer = explain(&operator, "line/7/temp").await;
    assert_eq!(answer["record_count"], 2, "{answer}");
    assert_eq!(answer["records"][0]["count"], 10);
    assert_eq!(answer["records"][1]["count"], 1);
    let one = ask(&operator, json!({ "query": "line/7/temp", "limit": 1 })).await;
    assert_eq!(one["records"].as_array().unwrap().len(), 1);
    assert_eq!(one["record_count"], 2);
}

#[tokio::test]
async fn a_message_that_expires_while_its_receiver_is_away() {
    let broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    absent(&broker, "line/7/#").await;
    let press = broker.client("press-7").await;
    let message = named("line/7/temp", "order-2").qos(Qos::AtLeastOnce);
    let properties = Properties {
        message_id: "order-2".into(),
        expiry: Some(Duration::from_millis(1)),
        ..Properties::default()
    };
    press
        .publish_message(message.properties(properties))
        .await
        .unwrap();
    // It still waits, since nobody has come for it.
    let answer = explain(&operator, "order-2").await;
    let now = &answer["now"]["message"];
    assert_eq!(now["waiting"][0]["identity"], PANEL, "{answer}");
    assert_eq!(now["waiting"][0]["session"], "main");
    assert_eq!(now["waiting"][0]["online"], false);
    assert_eq!(now["waiting"][0]["in_flight"], false);
    assert_eq!(now["waiting"][0]["topic"], "line/7/temp");
    assert_eq!(now["taken_from"], json!([PRESS]));
    assert_eq!(now["complete"], true);

    let _panel = broker.connect(kept(&broker)).await;
    let expired = [("reason", "expired")];
    broker
        .metric_reaches("selvedge_dropped_messages_total", &expired, 1)
        .await;
    let queries = [
        ("order-2", "message_id"),
        ("press-7", "publisher"),
        ("panel-1", "receiver"),
        ("line/7/temp", "topic"),
    ];
    let record = only_record(&operator, &queries).await;
    assert_eq!(record["reason"], "expired");
    let now = &explain(&operator, "order-2").await["now"]["message"];
    assert_eq!(now["waiting"], json!([]));
    others_see_nothing(&broker, &queries).await;
}

#[tokio::test]
async fn a_message_for_a_queue_that_is_full() {
    let broker = TestBroker::with(RULES, |config, _| config.limits.queue_bytes = 1 << 20).await;
    let operator = broker.client("operator").await;
    let config = raw::quic_config(broker.device("deaf"), &broker.pki.anchors());
    let deaf = RawQuic::connect(broker.quic(), config).await.unwrap();
    let mut control = deaf.greet("deaf-session").await.unwrap();
    let subscribe = wire::Subscribe {
        request_id: 1,
        subscriptions: vec![wire::Subscription {
            id: 1,
            filter: "line/#".into(),
            max_qos: 1,
            ..Default::default()
        }],
    };
    let frame = raw::control_frame(Frame::Subscribe(subscribe));
    control.write(&frame).await.unwrap();
    assert!(matches!(control.read().await.unwrap(), Frame::Reply(_)));

    let press = broker.client("press-7").await;
    // Far more than a connection's flow control and a queue hold together.
    let image = bytes::Bytes::from(vec![7; 256 << 10]);
    for number in 0..64 {
        let properties = Properties {
            message_id: format!("image-{number}").into(),
            ..Properties::default()
        };
        let message = Publish::new("line/images", image.clone())
            .qos(Qos::AtLeastOnce)
            .properties(properties);
        within("the acknowledgement", press.publish_message(message))
            .await
            .unwrap();
    }
    let answer = explain(&operator, "line/images").await;
    let dropped = answer["record_count"].as_u64().unwrap();
    let full = [("reason", "queue_full")];
    let counted = broker
        .metric("selvedge_dropped_messages_total", &full)
        .await;
    assert!(dropped > 0, "{answer}");
    assert_eq!(dropped, counted, "each has an id, and so a record");
    // QoS 1 drops the newest.
    let last = answer["records"][0]["message_id"].as_str().unwrap();
    let queries = [(last, "message_id")];
    let record = only_record(&operator, &queries).await;
    assert_eq!(record["reason"], "queue_full");
    assert_eq!(record["receiver"]["session"], "deaf-session");
    others_see_nothing(&broker, &queries).await;
    for (query, matched) in [("deaf", "receiver"), ("press-7", "publisher")] {
        let answer = explain(&operator, query).await;
        assert_eq!(answer["record_count"], dropped, "{query}");
        assert_eq!(answer["records"][0]["matched"], matched);
        assert_eq!(answer["records"][0]["message_id"], last);
    }

    // Both sides of it now.
    let session = &explain(&operator, "deaf").await["now"]["sessions"][0];
    assert_eq!(session["session"], "deaf-session");
    assert_eq!(session["online"], true);
    assert_eq!(session["subscriptions"][0]["filter"], "line/#");
    let queue = &session["queues"][0];
    assert_eq!(queue["class"], "normal");
    let bytes = |part: &str| queue[part].as_u64().unwrap();
    let held = bytes("waiting_bytes") + bytes("in_flight_bytes");
    assert!((1..=1 << 20).contains(&held), "{session}");
    let receiver = &answer["now"]["topic"]["receivers"][0];
    assert_eq!(receiver["session"], "deaf-session");
    assert_eq!(receiver["filter"], "line/#");
    // An early message is still on its way, since nothing is acknowledged.
    let early = explain(&operator, "image-0").await;
    assert_eq!(
        early["now"]["message"]["waiting"][0]["session"],
        "deaf-session"
    );
    assert_eq!(early["record_count"], 0);
    assert_eq!(early["found"], true);
}

#[tokio::test]
async fn what_policy_denies_names_its_rule() {
    let broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    let press = broker.client("press-7").await;
    let message = named("line/secret/1", "order-3").qos(Qos::AtLeastOnce);
    let error = press.publish_message(message).await.unwrap_err();
    assert!(matches!(error, PublishError::Refused(_)), "{error}");
    let queries = [
        ("order-3", "message_id"),
        ("press-7", "publisher"),
        ("line/secret/1", "topic"),
    ];
    let record = only_record(&operator, &queries).await;
    assert_eq!(record["what"], "denied");
    assert_eq!(record["reason"], "PERMISSION_DENIED");
    assert_eq!(record["verb"], "publish");
    assert_eq!(record["topic"], "line/secret/1");
    assert_eq!(record["receiver"], Value::Null);
    assert_eq!(
        record["status"],
        json!({
            "code": "PERMISSION_DENIED",
            "message": "publish on \"line/secret/1\" denied by rule \"no secrets\"",
            "rule": "no secrets",
        })
    );
    others_see_nothing(&broker, &queries).await;

    // Every other verb, each asked about its own subject.
    press.call("line/secret/call", "x").await.unwrap_err();
    press.subscribe("line/secret/sub").await.unwrap_err();
    press.serve("other/serve").await.unwrap_err();
    let infer = selvedge_client::Infer::new("line/secret/model");
    press.infer(infer).await.unwrap_err();
    for (subject, verb, rule) in [
        ("line/secret/call", "call", json!("no secrets")),
        ("line/secret/sub", "subscribe", json!("no secrets")),
        ("other/serve", "serve", Value::Null),
        ("line/secret/model", "infer", json!("no secrets")),
    ] {
        let queries = [(subject, "topic")];
        let record = only_record(&operator, &queries).await;
        assert_eq!(record["what"], "denied", "{record}");
        assert_eq!(record["verb"], verb);
        assert_eq!(record["publisher"], PRESS);
        assert_eq!(record["status"]["rule"], rule);
    }

    // A call that nobody answers was not denied, and is known as well.
    let error = press.call("line/nobody", "x").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    let record = only_record(&operator, &[("line/nobody", "topic")]).await;
    assert_eq!(record["what"], "refused");
    assert_eq!(record["reason"], "NOT_FOUND");
    assert_eq!(record["verb"], "call");
}

#[tokio::test]
async fn a_message_that_was_sent_twice() {
    let broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    let panel = broker.client("panel-1").await;
    let mut line = panel.subscribe("line/#").await.unwrap();
    let press = broker.client("press-7").await;
    let message = || named("line/7", "order-4").qos(Qos::AtLeastOnce);
    press.publish_message(message()).await.unwrap();
    next(&mut line).await;

    // Taken and delivered: there is no record, and yet something to tell.
    let taken = explain(&operator, "order-4").await;
    assert_eq!(taken["found"], true);
    assert_eq!(taken["record_count"], 0);
    assert_eq!(taken["now"]["message"]["taken_from"], json!([PRESS]));

    press.publish_message(message()).await.unwrap();
    let queries = [
        ("order-4", "message_id"),
        (PRESS, "publisher"),
        ("line/7", "topic"),
    ];
    let record = only_record(&operator, &queries).await;
    assert_eq!(record["what"], "dropped");
    assert_eq!(record["reason"], "duplicate");
    assert_eq!(record["receiver"], Value::Null);
    others_see_nothing(&broker, &queries).await;
}

#[tokio::test]
async fn what_is_known_now_of_a_client_and_a_topic() {
    let broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    absent(&broker, "line/#").await;
    let press = broker.client("press-7").await;
    let kept = named("line/7", "order-5")
        .qos(Qos::AtLeastOnce)
        .retain(true);
    press.publish_message(kept).await.unwrap();
    let served = press.serve("line/7").await.unwrap();

    let answer = explain(&operator, "panel-1").await;
    assert_eq!(answer["found"], true);
    let session = &answer["now"]["sessions"][0];
    assert_eq!(session["identity"], PANEL);
    assert_eq!(session["online"], false);
    assert!(session["since_ms"].as_u64() >= answer["complete_since_ms"].as_u64());
    let subscription = &session["subscriptions"][0];
    assert_eq!(subscription["filter"], "line/#");
    assert_eq!(subscription["own_lane"], false);
    assert_eq!(subscription["denied"], json!(["line/secret/#"]));

    let topic = &explain(&operator, "line/7").await["now"]["topic"];
    assert_eq!(topic["receiver_count"], 1);
    assert_eq!(topic["receivers"][0]["identity"], PANEL);
    assert_eq!(topic["receivers"][0]["denied"], false);
    assert!(topic["receivers"][0]["queues"][0]["waiting_bytes"].as_u64() > Some(0));
    assert_eq!(topic["retained"]["publisher"], PRESS);
    assert_eq!(topic["retained"]["message_id"], "order-5");
    assert_eq!(topic["history"], false);
    assert_eq!(topic["responders"], 1);
    let secret = &explain(&operator, "line/secret/7").await["now"]["topic"];
    assert_eq!(secret["receivers"][0]["denied"], true);
    drop(served);

    // Asked for as something else, it is not found.
    let question = json!({ "query": "panel-1", "kind": "topic" });
    let answer = ask(&operator, question).await;
    assert_eq!(answer["found"], false);
    assert_eq!(answer["now"]["sessions"], json!([]));
    assert_eq!(answer["now"]["topic"]["receivers"], json!([]));
    let unknown = explain(&operator, "nobody/knows").await;
    assert_eq!(unknown["found"], false);
}

#[tokio::test]
async fn who_may_not_ask_is_told_the_rule() {
    let broker = TestBroker::governed(RULES).await;
    let press = broker.client("press-7").await;
    let question = json!({ "query": "press-7" }).to_string();
    let denied = |rule: Option<&str>| {
        CallError::Status(Status::denied(Denial {
            verb: "call".into(),
            subject: "$SYS/explain".into(),
            rule: rule.map(Into::into),
        }))
    };
    let error = press.call("$SYS/explain", question.clone()).await;
    assert_eq!(error.unwrap_err(), denied(None));

    let mut broker = broker;
    broker.reload(&format!(
        "{RULES}\n[[rule]]\nname = \"presses ask nothing\"\nidentities = [\"*/*/press-*\"]\n\
         deny = [\"call\"]\nsubjects = [\"$SYS/#\"]\n"
    ));
    let error = press.call("$SYS/explain", question).await;
    assert_eq!(error.unwrap_err(), denied(Some("presses ask nothing")));
    // That was remembered, too: twice the same but for the rule.
    let operator = broker.client("operator").await;
    let answer = explain(&operator, "$SYS/explain").await;
    let rules: Vec<&Value> = (0..2)
        .map(|index| &answer["records"][index]["status"]["rule"])
        .collect();
    assert_eq!(rules, [&json!("presses ask nothing"), &Value::Null]);
}

#[tokio::test]
async fn names_of_the_broker_are_its_own() {
    let broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    for service in ["$SYS/explain", "$SYS/other"] {
        let ServeError::Refused(status) = operator.serve(service).await.unwrap_err() else {
            panic!("{service}");
        };
        assert_eq!(status.code, Code::PermissionDenied);
        assert_eq!(
            status.message,
            format!(
                "expected a service that does not begin with $SYS/, found {service:?}: such names \
                 are the broker's own"
            )
        );
    }
    let CallError::Status(status) = operator.call("$SYS/other", "x").await.unwrap_err() else {
        panic!("it has no such service");
    };
    assert_eq!(status.code, Code::NotFound);
    assert_eq!(
        status.message,
        "the broker has no service \"$SYS/other\": expected one of $SYS/explain, $SYS/services"
    );
    for (question, expected) in [
        ("", "EOF while parsing"),
        ("{}", "missing field `query`"),
        (r#"{"query": ""}"#, "query of 0 bytes: expected 1 to 65535"),
        (r#"{"query": "x", "limt": 1}"#, "unknown field `limt`"),
        (r#"{"query": "x", "kind": "sms"}"#, "unknown variant `sms`"),
        (r#"{"query": "a/#/b", "kind": "topic"}"#, "expected a topic"),
    ] {
        let answer = operator.call("$SYS/explain", question).await;
        let CallError::Status(status) = answer.unwrap_err() else {
            panic!("{question}");
        };
        assert_eq!(status.code, Code::InvalidArgument, "{question}");
        assert!(status.message.contains(expected), "{}", status.message);
    }
    let long = vec![b' '; 300 << 10];
    let error = operator.call("$SYS/explain", long).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
}

#[tokio::test]
async fn mqtt_clients_are_known_by_their_denials_too() {
    let broker = TestBroker::with(RULES, |config, pki| {
        let sensors = pki.device("acme", "plant-1", "sensors").identity().clone();
        config.mqtt = MqttConfig {
            danger_plaintext: Some((([127, 0, 0, 1], 0).into(), sensors)),
            ..MqttConfig::default()
        };
    })
    .await;
    let operator = broker.client("operator").await;
    let options = MqttOptions::new(MqttVersion::V311, broker.mqtt(), "meter-1");
    let mut meter = MqttPeer::connect(options).await.unwrap();
    // 3.1.1 has no word for it, so this is the only place to see it.
    meter.publish("line/secret/2", 1, "x").await;
    meter.subscribe("line/secret/3", 1).await;
    let (publish, subscribe) = ("line/secret/2", "line/secret/3");
    for (topic, verb) in [(publish, "publish"), (subscribe, "subscribe")] {
        let record = only_record(&operator, &[(topic, "topic")]).await;
        assert_eq!(record["verb"], verb);
        assert_eq!(record["status"]["rule"], "no secrets");
        assert_eq!(
            record["publisher"],
            "spiffe://test.example/acme/plant-1/sensors"
        );
    }
    let session = &explain(&operator, "meter-1").await["now"]["sessions"][0];
    assert_eq!(session["online"], true);
}

#[tokio::test]
async fn a_subscription_that_a_new_policy_ends_is_explained() {
    let mut broker = TestBroker::governed(RULES).await;
    let operator = broker.client("operator").await;
    let panel = broker.client("panel-1").await;
    let _line = panel.subscribe("line/9/#").await.unwrap();
    broker.reload(&format!(
        "{RULES}\n[[rule]]\nname = \"line 9 is closed\"\nidentities = [\"*/*/*\"]\n\
         deny = [\"subscribe\"]\nsubjects = [\"line/9/#\"]\n"
    ));
    let record = eventually("the end to be known", || async {
        let answer = explain(&operator, "line/9/temp").await;
        answer["records"].get(0).cloned()
    })
    .await;
    assert_eq!(record["publisher"], PANEL);
    assert_eq!(record["verb"], "subscribe");
    assert_eq!(record["topic"], "line/9/#");
    assert_eq!(record["status"]["rule"], "line 9 is closed");
}

#[tokio::test]
async fn a_long_answer_is_cut_to_what_a_frame_takes() {
    let broker = TestBroker::with(RULES, |config, _| config.limits.max_frame_bytes = 65_536).await;
    let operator = broker.client("operator").await;
    let press = broker.client("press-7").await;
    let long = "x".repeat(1000);
    for number in 0..300 {
        let message = named(&format!("line/secret/{long}"), &format!("order-{number}"));
        press.publish_message(message).await.unwrap();
    }
    press.flush().await.unwrap_err();
    let question = json!({ "query": "press-7", "limit": 1000 });
    let answer = ask(&operator, question).await;
    assert_eq!(answer["record_count"], 300, "{answer}");
    let shown = answer["records"].as_array().unwrap();
    assert!((1..300).contains(&shown.len()));
    assert_eq!(shown[0]["message_id"], "order-299");
    let open = broker::OPEN;
    assert!(
        !open.contains("$SYS"),
        "the open policy of tests allows no question"
    );
}
