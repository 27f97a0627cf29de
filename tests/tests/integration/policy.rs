//! Denials are answers: each names verb, subject and the rule that decided.

use std::sync::Arc;

use selvedge_client::{
    CallError, Client, Code, Denial, FlushError, Infer, ModelRegistration, Publish, PublishError,
    Qos, ServeError, Status, SubscribeError, Tier, WorkError,
};
use selvedge_tests::TestBroker;

const RULES: &str = r#"
[[rule]]
name = "line work"
identities = ["acme/*/*"]
allow = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["line/#"]

[[rule]]
name = "no secrets"
identities = ["*/*/*"]
deny = ["publish", "subscribe", "call", "serve", "infer", "work"]
subjects = ["line/secret/#"]
"#;

/// Every operation is asked about a subject that a rule denies and one that no rule allows.
const CASES: [(&str, Option<&str>); 2] = [("line/secret/x", Some("no secrets")), ("other", None)];

async fn setting() -> (TestBroker, Client) {
    let broker = TestBroker::governed(RULES).await;
    let client = broker.client("press-7").await;
    (broker, client)
}

fn denial(verb: &str, subject: &str, rule: Option<&str>) -> Status {
    Status::denied(Denial {
        verb: verb.into(),
        subject: subject.into(),
        rule: rule.map(Arc::from),
    })
}

async fn counted(broker: &TestBroker, verb: &str) {
    let labels = [("verb", verb)];
    broker
        .metric_reaches("selvedge_denied_requests_total", &labels, 2)
        .await;
}

#[tokio::test]
async fn denied_publish() {
    let (broker, client) = setting().await;
    for (topic, rule) in CASES {
        let message = Publish::new(topic, "x").qos(Qos::AtLeastOnce);
        let error = client.publish_message(message).await.unwrap_err();
        assert_eq!(error, PublishError::Refused(denial("publish", topic, rule)));
    }
    counted(&broker, "publish").await;
}

#[tokio::test]
async fn denied_publish_of_quality_0_shows_at_the_next_flush() {
    let (broker, client) = setting().await;
    for (topic, rule) in CASES {
        client.publish(topic, "x").await.unwrap();
        let error = client.flush().await.unwrap_err();
        assert_eq!(error, FlushError::Refused(denial("publish", topic, rule)));
    }
    client.publish("line/1", "x").await.unwrap();
    client.flush().await.unwrap();
    counted(&broker, "publish").await;
}

#[tokio::test]
async fn denied_subscribe() {
    let (broker, client) = setting().await;
    for (filter, rule) in CASES {
        let error = client.subscribe(filter).await.unwrap_err();
        assert_eq!(
            error,
            SubscribeError::Refused(denial("subscribe", filter, rule))
        );
    }
    counted(&broker, "subscribe").await;
}

#[tokio::test]
async fn a_wide_subscription_leaves_out_what_is_denied() {
    let broker = TestBroker::governed(&format!(
        "{RULES}\n[[rule]]\nname = \"keeper\"\nidentities = [\"acme/plant-1/keeper\"]\n\
         allow = [\"publish\"]\nsubjects = [\"line/vault/#\"]\n\
         [[rule]]\nname = \"sealed\"\nidentities = [\"acme/plant-1/press-7\"]\n\
         deny = [\"subscribe\"]\nsubjects = [\"line/vault/#\"]\n"
    ))
    .await;
    let (press, keeper) = (
        broker.client("press-7").await,
        broker.client("keeper").await,
    );
    let mut line = press.subscribe("line/#").await.unwrap();
    for topic in ["line/vault/gold", "line/1"] {
        keeper.publish(topic, topic).await.unwrap();
    }
    assert_eq!(
        super::pubsub::next(&mut line).await.topic.as_str(),
        "line/1"
    );
}

#[tokio::test]
async fn denied_call() {
    let (broker, client) = setting().await;
    for (service, rule) in CASES {
        let error = client.call(service, "x").await.unwrap_err();
        assert_eq!(error, CallError::Status(denial("call", service, rule)));
    }
    counted(&broker, "call").await;
}

#[tokio::test]
async fn denied_serve() {
    let (broker, client) = setting().await;
    for (service, rule) in CASES {
        let error = client.serve(service).await.unwrap_err();
        assert_eq!(error, ServeError::Refused(denial("serve", service, rule)));
    }
    counted(&broker, "serve").await;
}

#[tokio::test]
async fn denied_infer() {
    let (broker, client) = setting().await;
    for (model, rule) in CASES {
        let error = client.infer(Infer::new(model)).await.unwrap_err();
        assert_eq!(error, CallError::Status(denial("infer", model, rule)));
        assert_eq!(error.code(), Code::PermissionDenied);
    }
    counted(&broker, "infer").await;
}

#[tokio::test]
async fn denied_work() {
    let (broker, client) = setting().await;
    for (model, rule) in CASES {
        let registration = ModelRegistration {
            model: model.into(),
            version: "1".into(),
            tier: Tier::Edge,
            slots: 1,
            inputs: Vec::new(),
            outputs: Vec::new(),
            loaded: true,
            service_time: None,
            continues: false,
        };
        let error = client.work(registration).await.unwrap_err();
        assert_eq!(error, WorkError::Refused(denial("work", model, rule)));
    }
    counted(&broker, "work").await;
}
