//! The front door: inference by the Open Inference Protocol and the OpenAI API.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use selvedge_broker::front::token::{self, Tokens};
use selvedge_client::{
    AnswerInfo, Client, IncomingInference, ModelRegistration, Tier, WorkerHandle,
};
use selvedge_proto::inference::{TensorSpec, decode_tensors};
use selvedge_proto::open_inference as oip;
use selvedge_tests::broker::OPEN;
use selvedge_tests::wait::{eventually, within};
use selvedge_tests::{GrpcPeer, HttpPeer, TestBroker};
use selvedge_worker::config::UpstreamConfig;
use selvedge_worker::model::ConfidenceRule;
use selvedge_worker::upstream::open_inference::OpenInference;
use selvedge_worker::upstream::openai::OpenAi;
use selvedge_worker::{ModelSpec, OnnxModel, Worker, WorkerOptions};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::task::AbortOnDropHandle;
use tonic::client::Grpc;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::revocation::{Device, revoke};

/// A broker with every listener of the front door, and tokens.
struct Front {
    broker: TestBroker,
    folder: TempDir,
    token: String,
    addresses: selvedge_broker::Addresses,
}

impl Front {
    async fn open() -> Self {
        Self::with(OPEN, |_| {}).await
    }

    async fn with(policy: &str, change: impl FnOnce(&mut selvedge_broker::Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokens.toml");
        let identity = "spiffe://test.example/acme/plant-1/notebook"
            .parse()
            .unwrap();
        let token = token::create(&file, "notebook", &identity).unwrap();
        let tokens = Tokens::load(&file).unwrap();
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let broker = TestBroker::with(policy, |config, _| {
            let front = &mut config.front;
            front.grpc = Some(any);
            front.http = Some(any);
            front.danger_plaintext_grpc = Some(any);
            front.danger_plaintext_http = Some(any);
            front.tokens = Some(tokens);
            change(config);
        })
        .await;
        Self {
            addresses: broker.addresses(),
            broker,
            folder,
            token,
        }
    }

    async fn http(&self) -> HttpPeer {
        let address = self.addresses.http.unwrap();
        HttpPeer::connect(address, None).await.unwrap()
    }

    async fn grpc(&self) -> Grpc<GrpcPeer> {
        let address = self.addresses.grpc.unwrap();
        Grpc::new(GrpcPeer::connect(address, None).await.unwrap())
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    /// A token for another identity.
    fn another(&mut self, name: &str, identity: &str) -> String {
        let file = self.folder.path().join("tokens.toml");
        let identity = format!("spiffe://test.example/{identity}").parse().unwrap();
        let token = token::create(&file, name, &identity).unwrap();
        self.reload();
        token
    }

    fn reload(&mut self) {
        let file = self.folder.path().join("tokens.toml");
        self.broker.config.front.tokens = Some(Tokens::load(&file).unwrap());
        self.broker.reload_config();
    }

    /// A request with the token of this door.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let bearer = self.bearer().parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        request
    }
}

async fn call<Q, A>(
    grpc: &mut Grpc<GrpcPeer>,
    method: &str,
    request: Request<Q>,
) -> Result<A, Status>
where
    Q: tonic_prost::prost::Message + 'static,
    A: tonic_prost::prost::Message + Default + 'static,
{
    let path = format!("/inference.GRPCInferenceService/{method}");
    grpc.ready().await.unwrap();
    let codec = ProstCodec::default();
    let answer = grpc.unary(request, path.parse().unwrap(), codec);
    within(method, answer)
        .await
        .map(tonic::Response::into_inner)
}

fn registration(model: &str, tier: Tier, slots: u32) -> ModelRegistration {
    ModelRegistration {
        model: model.into(),
        version: "1".into(),
        tier,
        slots,
        inputs: Vec::new(),
        outputs: Vec::new(),
        loaded: true,
        service_time: Some(Duration::from_millis(1)),
        continues: false,
    }
}

fn chat(model: &str) -> ModelRegistration {
    let operation = TensorSpec {
        name: "chat.completions".into(),
        datatype: "JSON".into(),
        shape: Vec::new(),
    };
    ModelRegistration {
        inputs: vec![operation],
        ..registration(model, Tier::Edge, 2)
    }
}

async fn incoming(worker: &mut WorkerHandle) -> IncomingInference {
    within("an inference", worker.next())
        .await
        .expect("the model is registered")
}

fn float(model: &str, values: &[f32]) -> oip::ModelInferRequest {
    oip::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![oip::model_infer_request::InferInputTensor {
            name: "input".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, values.len() as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        ],
        ..Default::default()
    }
}

fn text(response: &oip::ModelInferResponse, parameter: &str) -> String {
    match &response.parameters[parameter].parameter_choice {
        Some(oip::infer_parameter::ParameterChoice::StringParam(text)) => text.clone(),
        other => panic!("{parameter}: {other:?}"),
    }
}

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/digits");

/// A zero, from the images that no model was trained on.
fn digit() -> (String, Vec<f32>) {
    let images = std::fs::read_to_string(format!("{MODELS}/test.csv")).unwrap();
    let line = images.lines().nth(1).unwrap();
    let (label, pixels) = line.split_once(',').unwrap();
    let pixels = pixels.split(',').map(|pixel| pixel.parse().unwrap());
    (label.to_owned(), pixels.collect())
}

async fn digits(front: &Front, identity: &str, file: &str, tier: Tier) -> Worker {
    let file = format!("{MODELS}/{file}");
    let confidence = ConfidenceRule::Max {
        output: "probabilities".to_owned(),
    };
    let load = move || OnnxModel::load(file, Some(confidence), Duration::from_secs(60));
    let model = tokio::task::spawn_blocking(load).await.unwrap().unwrap();
    let client = front.broker.options(front.broker.device(identity));
    let options = WorkerOptions::new(client, tier).model(ModelSpec::new("digits"), Arc::new(model));
    Worker::start(options).await.unwrap()
}

fn most_likely(values: &[f32]) -> usize {
    let best = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0
}

#[tokio::test]
async fn a_digit_is_read_by_every_protocol() {
    let front = Front::open().await;
    let edge = digits(&front, "edge-1", "digits-edge.onnx", Tier::Edge).await;
    let cloud = digits(&front, "acme/cloud/gpu-1", "digits-cloud.onnx", Tier::Cloud).await;
    let (label, pixels) = digit();

    let mut grpc = front.grpc().await;
    let mut asked = float("digits", &pixels);
    let sure = oip::InferParameter {
        parameter_choice: Some(oip::infer_parameter::ParameterChoice::DoubleParam(0.9)),
    };
    asked.parameters.insert("min_confidence".to_owned(), sure);
    asked.id = "r-1".to_owned();
    let answer: oip::ModelInferResponse = call(&mut grpc, "ModelInfer", front.request(asked))
        .await
        .unwrap();
    assert_eq!(
        (answer.id.as_str(), answer.outputs[0].shape.as_slice()),
        ("r-1", &[1, 10][..])
    );
    let (values, _) = answer.raw_output_contents[0].as_chunks::<4>();
    let values: Vec<f32> = values
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect();
    assert_eq!(most_likely(&values).to_string(), label);
    // The edge model takes it for a six, and is unsure.
    assert_eq!(text(&answer, "tier"), "cloud");
    assert_eq!(
        text(&answer, "worker"),
        "spiffe://test.example/acme/cloud/gpu-1"
    );
    assert!(text(&answer, "reason").starts_with("escalated"));

    let bearer = front.bearer();
    let mut http = front.http().await;
    let body = json!({
        "id": "r-2",
        "parameters": {"prefer": "cloud"},
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 64], "data": pixels}],
    });
    let path = "/v2/models/digits/infer";
    let headers = [("authorization", bearer.as_str())];
    let answer = http
        .ask("POST", path, &headers, body.to_string())
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["x-selvedge-tier"], "cloud");
    let answer: Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(
        (&answer["id"], &answer["parameters"]["tier"]),
        (&json!("r-2"), &json!("cloud"))
    );
    let data: Vec<f32> = serde_json::from_value(answer["outputs"][0]["data"].clone()).unwrap();
    assert_eq!(data, values);

    let head = json!({
        "parameters": {"binary_data_output": true, "residency": "site"},
        "inputs": [{
            "name": "input", "datatype": "FP32", "shape": [1, 64],
            "parameters": {"binary_data_size": 256},
        }],
    })
    .to_string();
    let raw: Vec<u8> = pixels
        .iter()
        .flat_map(|pixel| pixel.to_le_bytes())
        .collect();
    let length = head.len().to_string();
    let headers = [
        headers[0],
        ("inference-header-content-length", length.as_str()),
    ];
    let body = [head.as_bytes(), &raw].concat();
    let answer = http.ask("POST", path, &headers, body).await.unwrap();
    assert_eq!(answer.headers()["x-selvedge-tier"], "edge");
    let end = answer.headers()["inference-header-content-length"]
        .to_str()
        .unwrap();
    let end: usize = end.parse().unwrap();
    let (head, raw) = answer.body().split_at(end);
    let head: Value = serde_json::from_slice(head).unwrap();
    assert_eq!(
        head["outputs"][0]["parameters"]["binary_data_size"],
        json!(40)
    );
    assert_eq!(raw.len(), 40);
    edge.shutdown().await;
    cloud.shutdown().await;
}

#[tokio::test]
async fn the_door_says_what_there_is_to_those_who_may_ask() {
    let policy = r##"
        [[rule]]
        name = "workers"
        identities = ["*/*/edge-1"]
        allow = ["work"]
        subjects = ["#"]
        [[rule]]
        name = "notebooks"
        identities = ["acme/*/notebook"]
        allow = ["infer"]
        subjects = ["open/#"]
    "##;
    let mut front = Front::with(policy, |_| {}).await;
    let edge = front.broker.client("edge-1").await;
    let _open = edge
        .work(registration("open/digits", Tier::Edge, 1))
        .await
        .unwrap();
    let _closed = edge
        .work(registration("closed/digits", Tier::Edge, 1))
        .await
        .unwrap();

    let mut grpc = front.grpc().await;
    let live: oip::ServerLiveResponse = call(
        &mut grpc,
        "ServerLive",
        Request::new(oip::ServerLiveRequest {}),
    )
    .await
    .unwrap();
    assert!(live.live);
    let index = oip::RepositoryIndexRequest::default();
    let index: oip::RepositoryIndexResponse =
        call(&mut grpc, "RepositoryIndex", front.request(index))
            .await
            .unwrap();
    let names: Vec<&str> = index
        .models
        .iter()
        .map(|model| model.name.as_str())
        .collect();
    assert_eq!(names, ["open/digits"]);
    let ready = |name: &str| {
        front.request(oip::ModelReadyRequest {
            name: name.to_owned(),
            version: String::new(),
        })
    };
    let denied =
        call::<_, oip::ModelReadyResponse>(&mut grpc, "ModelReady", ready("closed/digits"));
    let denied = denied.await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert_eq!(
        denied.message(),
        r#"infer on "closed/digits" denied: no rule allows it"#
    );
    let answer: oip::ModelReadyResponse = call(&mut grpc, "ModelReady", ready("open/digits"))
        .await
        .unwrap();
    assert!(answer.ready);
    let answer: oip::ModelReadyResponse = call(&mut grpc, "ModelReady", ready("open/nothing"))
        .await
        .unwrap();
    assert!(!answer.ready);
    let unknown = call::<_, oip::ModelReadyResponse>(&mut grpc, "Shutdown", ready("x"));
    assert_eq!(unknown.await.unwrap_err().code(), Code::Unimplemented);

    let bearer = front.bearer();
    let headers = [("authorization", bearer.as_str())];
    let mut http = front.http().await;
    for (path, expected) in [
        ("/v2/models/open/digits/ready", StatusCode::OK),
        ("/v2/models/closed/digits/ready", StatusCode::FORBIDDEN),
        ("/v2/models/open/nothing/ready", StatusCode::NOT_FOUND),
        (
            "/v2/models/open/digits/versions/2/ready",
            StatusCode::NOT_FOUND,
        ),
        ("/v2/health/ready", StatusCode::OK),
        ("/v3", StatusCode::NOT_FOUND),
        ("/v1/models/closed/digits", StatusCode::FORBIDDEN),
    ] {
        let answer = http.ask("GET", path, &headers, "").await.unwrap();
        assert_eq!(answer.status(), expected, "{path}");
    }
    // Of another tenant nothing is there at all.
    let other = front.another("other", "umbrella/plant-1/notebook");
    let bearer = format!("Bearer {other}");
    let headers = [("authorization", bearer.as_str())];
    let answer = http.ask("GET", "/v1/models", &headers, "").await.unwrap();
    assert_eq!(answer.body(), r#"{"data":[],"object":"list"}"#);
}

#[tokio::test]
async fn nobody_gets_in_without_a_good_token_or_certificate() {
    let mut front = Front::open().await;
    let mut grpc = front.grpc().await;
    let refused = call::<_, oip::ServerMetadataResponse>(
        &mut grpc,
        "ServerMetadata",
        Request::new(oip::ServerMetadataRequest {}),
    );
    assert_eq!(refused.await.unwrap_err().code(), Code::Unauthenticated);

    let mut http = front.http().await;
    for header in [
        "",
        "Bearer",
        "Bearer svt_0123456789abcdef_00",
        "Basic x",
        "é",
    ] {
        let headers = [("authorization", header)];
        let answer = http.ask("GET", "/v2", &headers, "").await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{header}");
        assert_eq!(answer.headers()["www-authenticate"], "Bearer");
    }
    // A token that is taken out of the file is refused on connections that are open.
    let bearer = front.bearer();
    let headers = [("authorization", bearer.as_str())];
    assert_eq!(
        http.ask("GET", "/v2", &headers, "").await.unwrap().status(),
        StatusCode::OK
    );
    token::remove(&front.folder.path().join("tokens.toml"), "notebook").unwrap();
    front.reload();
    let answer = http.ask("GET", "/v1/models", &headers, "").await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    let answer: Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(
        answer["error"]["message"],
        "the bearer token is not known here"
    );
}

#[tokio::test]
async fn a_client_certificate_is_an_identity_until_it_is_revoked() {
    let mut front = Front::open().await;
    let device = Device::new(&front.broker.pki, "camera-3");
    let camera = device.credentials.clone();
    let edge = front.broker.client("edge-1").await;
    let mut worker = edge
        .work(registration("digits", Tier::Edge, 1))
        .await
        .unwrap();
    let address = front.addresses.grpcs.unwrap();
    let tls = front.broker.pki.http_client(Some(&camera), b"h2");
    let mut grpc = Grpc::new(GrpcPeer::connect(address, Some(tls)).await.unwrap());
    let asked = call::<_, oip::ModelInferResponse>(
        &mut grpc,
        "ModelInfer",
        Request::new(float("digits", &[1.0])),
    );
    let (answer, ()) = tokio::join!(asked, async {
        let mut asked = incoming(&mut worker).await;
        assert_eq!(
            asked.caller(),
            "spiffe://test.example/acme/plant-1/camera-3"
        );
        let payload = asked.request().await.unwrap();
        asked.reply(AnswerInfo::default(), payload).await.unwrap();
    });
    assert_eq!(answer.unwrap().outputs[0].name, "input");

    // Without a certificate a token will do, over TLS as well.
    let bearer = front.bearer();
    let address = front.addresses.https.unwrap();
    let tls = front.broker.pki.http_client(None, b"http/1.1");
    let mut http = HttpPeer::connect(address, Some(tls)).await.unwrap();
    let answer = http
        .ask("GET", "/v2", &[("authorization", &bearer)], "")
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::OK);

    let tls = front.broker.pki.http_client(Some(&camera), b"http/1.1");
    let mut http = HttpPeer::connect(address, Some(tls)).await.unwrap();
    assert_eq!(
        http.ask("GET", "/v2", &[], "").await.unwrap().status(),
        StatusCode::OK
    );
    revoke(&mut front.broker, &[&device]);
    within("the connection to end", async {
        while http.ask("GET", "/v2", &[], "").await.is_ok() {}
    })
    .await;
}

#[tokio::test]
async fn deadlines_and_cancelling_reach_the_worker() {
    let front = Front::open().await;
    let edge = front.broker.client("edge-1").await;
    let mut worker = edge
        .work(registration("slow", Tier::Edge, 8))
        .await
        .unwrap();

    // The deadline of gRPC.
    let mut grpc = front.grpc().await;
    let mut request = front.request(float("slow", &[1.0]));
    request.set_timeout(Duration::from_millis(300));
    let asked = call::<_, oip::ModelInferResponse>(&mut grpc, "ModelInfer", request);
    let (answer, ()) = tokio::join!(asked, async {
        let asked = incoming(&mut worker).await;
        assert!(asked.deadline() <= tokio::time::Instant::now() + Duration::from_millis(300));
        within("the deadline", asked.cancelled()).await;
    });
    let refused = answer.unwrap_err();
    // Whichever of client and broker looks at the clock first.
    assert!(
        matches!(refused.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{refused}"
    );

    // Triton's request parameter, and the header of the OpenAI client.
    let bearer = front.bearer();
    let mut http = front.http().await;
    let body = json!({"parameters": {"timeout": 200_000}, "inputs": []});
    let headers = [("authorization", bearer.as_str())];
    let asked = http.ask("POST", "/v2/models/slow/infer", &headers, body.to_string());
    let (answer, _held) = tokio::join!(asked, incoming(&mut worker));
    assert_eq!(answer.unwrap().status(), StatusCode::GATEWAY_TIMEOUT);
    let headers = [headers[0], ("x-stainless-read-timeout", "0.2")];
    let asked = http.ask(
        "POST",
        "/v1/chat/completions",
        &headers,
        r#"{"model":"slow"}"#,
    );
    let (answer, _held) = tokio::join!(asked, incoming(&mut worker));
    let answer = answer.unwrap();
    assert_eq!(answer.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(answer.headers()["x-should-retry"], "false");

    // A call that is given up, and a connection that is closed.
    let request = front.request(float("slow", &[1.0]));
    let given_up = AbortOnDropHandle::new(tokio::spawn(async move {
        call::<_, oip::ModelInferResponse>(&mut grpc, "ModelInfer", request).await
    }));
    let asked = incoming(&mut worker).await;
    drop(given_up);
    within(
        "the worker to hear that a call is given up",
        asked.cancelled(),
    )
    .await;
    let given_up = AbortOnDropHandle::new(tokio::spawn(async move {
        let headers = [("authorization", bearer.as_str())];
        http.ask(
            "POST",
            "/v2/models/slow/infer",
            &headers,
            r#"{"inputs":[]}"#,
        )
        .await
    }));
    let asked = incoming(&mut worker).await;
    drop(given_up);
    within(
        "the worker to hear that a connection is closed",
        asked.cancelled(),
    )
    .await;
}

#[tokio::test]
async fn overload_is_refused_with_a_time() {
    let front = Front::with(OPEN, |config| config.limits.waiting_per_model = 0).await;
    let edge = front.broker.client("edge-1").await;
    let mut worker = edge
        .work(registration("busy", Tier::Edge, 1))
        .await
        .unwrap();
    let bearer = front.bearer();
    let headers = [("authorization", bearer.as_str())];
    let mut first = front.http().await;
    let taking = first.ask(
        "POST",
        "/v2/models/busy/infer",
        &headers,
        r#"{"inputs":[]}"#,
    );
    let (answer, ()) = tokio::join!(taking, async {
        let asked = incoming(&mut worker).await;
        let mut grpc = front.grpc().await;
        let request = front.request(float("busy", &[1.0]));
        let refused = call::<_, oip::ModelInferResponse>(&mut grpc, "ModelInfer", request).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert_eq!(refused.message(), "every worker for busy is busy");
        assert!(refused.metadata().contains_key("retry-after-ms"));

        let mut http = front.http().await;
        let body = r#"{"model":"busy","messages":[]}"#;
        let refused = http
            .ask("POST", "/v1/chat/completions", &headers, body)
            .await
            .unwrap();
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
        for (name, expected) in [("retry-after", "1"), ("x-should-retry", "true")] {
            assert_eq!(refused.headers()[name], expected);
        }
        assert!(refused.headers().contains_key("retry-after-ms"));
        let refused: Value = serde_json::from_slice(refused.body()).unwrap();
        assert_eq!(refused["error"]["type"], "rate_limit_error");
        asked
            .reply(AnswerInfo::default(), Bytes::new())
            .await
            .unwrap();
    });
    assert_eq!(answer.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn a_request_bound_to_its_site_is_refused_rather_than_sent_away() {
    let front = Front::open().await;
    let cloud = front.broker.client("acme/cloud/gpu-1").await;
    let mut worker = cloud
        .work(registration("digits", Tier::Cloud, 1))
        .await
        .unwrap();
    let bearer = front.bearer();
    let mut http = front.http().await;
    let here = ("x-selvedge-residency", "site");
    let headers = [("authorization", bearer.as_str()), here];
    let body = r#"{"model":"digits","messages":[]}"#;
    let refused = http
        .ask("POST", "/v1/chat/completions", &headers, body)
        .await
        .unwrap();
    assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(refused.headers()["x-should-retry"], "false");
    assert!(!refused.headers().contains_key("retry-after"));
    let misspelt = [headers[0], ("x-selvedge-residencey", "site")];
    let refused = http
        .ask("POST", "/v1/chat/completions", &misspelt, body)
        .await
        .unwrap();
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);

    let mut grpc = front.grpc().await;
    let mut request = front.request(float("digits", &[1.0]));
    request
        .metadata_mut()
        .insert("x-selvedge-residency", "site".parse().unwrap());
    let refused = call::<_, oip::ModelInferResponse>(&mut grpc, "ModelInfer", request).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);
    let arrived = tokio::time::timeout(Duration::from_millis(50), worker.next()).await;
    assert!(arrived.is_err(), "the payload left its site");
}

#[tokio::test]
async fn a_chat_is_streamed_as_events() {
    let front = Front::open().await;
    let edge = front.broker.client("edge-1").await;
    let mut worker = edge.work(chat("smol")).await.unwrap();
    let bearer = front.bearer();
    let headers = [("authorization", bearer.as_str())];
    let mut http = front.http().await;
    let body =
        json!({"model": "smol", "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    let asked = http.begin("POST", "/v1/chat/completions", &headers, body.to_string());
    let (answer, mut asked) = tokio::join!(asked, async {
        let mut asked = incoming(&mut worker).await;
        // What the worker gets is what the client sent.
        let payload: Value = serde_json::from_slice(&asked.request().await.unwrap()).unwrap();
        assert_eq!(payload, body);
        let operation = ("operation".to_owned(), "chat.completions".to_owned());
        assert!(asked.parameters().contains(&operation));
        asked.send("{\"n\":1}").await.unwrap();
        asked
    });
    let answer = answer.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    assert_eq!(answer.headers()["x-selvedge-tier"], "edge");
    let mut events = answer.into_body().into_data_stream();
    // Each event is there before the next one is made.
    assert_eq!(
        within("an event", events.next()).await.unwrap().unwrap(),
        "data: {\"n\":1}\n\n"
    );
    asked.send("{\"n\":2}").await.unwrap();
    assert_eq!(
        within("an event", events.next()).await.unwrap().unwrap(),
        "data: {\"n\":2}\n\n"
    );
    asked.finish().await.unwrap();
    assert_eq!(
        within("the end", events.next()).await.unwrap().unwrap(),
        "data: [DONE]\n\n"
    );
    assert!(within("the end", events.next()).await.is_none());

    // A worker that fails midway is an event, too.
    let mut http = front.http().await;
    let asked = http.begin("POST", "/v1/chat/completions", &headers, body.to_string());
    let (answer, asked) = tokio::join!(asked, async {
        let mut asked = incoming(&mut worker).await;
        asked.send("{\"n\":1}").await.unwrap();
        asked
    });
    let mut events = answer.unwrap().into_body().into_data_stream();
    within("an event", events.next()).await.unwrap().unwrap();
    let failed = selvedge_client::Status::new(selvedge_client::Code::Internal, "out of memory");
    asked.fail(failed).await.unwrap();
    let event = within("an event", events.next()).await.unwrap().unwrap();
    let error: Value = serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["message"], "out of memory");

    // Closing the connection in the middle stops the worker.
    let mut http = front.http().await;
    let asked = http.begin("POST", "/v1/chat/completions", &headers, body.to_string());
    let (answer, asked) = tokio::join!(asked, async {
        let mut asked = incoming(&mut worker).await;
        asked.send("{\"n\":1}").await.unwrap();
        asked
    });
    drop((answer, http));
    within("the worker to hear of it", asked.cancelled()).await;
}

#[tokio::test]
async fn a_stream_answers_each_request_in_turn() {
    let front = Front::open().await;
    let edge = front.broker.client("edge-1").await;
    let _worker = echo(&edge).await;
    let mut grpc = front.grpc().await;
    let mut requests: Vec<oip::ModelInferRequest> = (0..20)
        .map(|n| oip::ModelInferRequest {
            id: n.to_string(),
            ..float("echo", &[n as f32])
        })
        .collect();
    requests[7].raw_input_contents[0] = Bytes::from_static(b"abc");
    let request = front.request(futures_util::stream::iter(requests));
    grpc.ready().await.unwrap();
    let path = "/inference.GRPCInferenceService/ModelStreamInfer"
        .parse()
        .unwrap();
    let answers = grpc.streaming(request, path, ProstCodec::default());
    let mut answers = within("the stream", answers).await.unwrap().into_inner();
    for n in 0..20 {
        let answer: oip::ModelStreamInferResponse = within("an answer", answers.message())
            .await
            .unwrap()
            .unwrap();
        let response = answer.infer_response.unwrap();
        assert_eq!(response.id, n.to_string());
        if n == 7 {
            assert!(
                answer
                    .error_message
                    .starts_with("INVALID_ARGUMENT: tensor \"input\"")
            );
        } else {
            assert_eq!(answer.error_message, "");
            assert_eq!(
                response.raw_output_contents[0],
                (n as f32).to_le_bytes()[..]
            );
        }
    }
    assert!(
        within("the end", answers.message())
            .await
            .unwrap()
            .is_none()
    );
}

/// Answers every request with its own tensors.
async fn echo(client: &Client) -> AbortOnDropHandle<()> {
    let mut worker = client
        .work(registration("echo", Tier::Edge, 4))
        .await
        .unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(mut asked) = worker.next().await {
            if let Ok(payload) = asked.request().await {
                assert!(decode_tensors(payload.clone()).is_ok());
                let _ = asked.reply(AnswerInfo::default(), payload).await;
            }
        }
    }))
}

#[tokio::test]
async fn what_is_too_large_or_wrong_is_refused_before_a_worker_sees_it() {
    let front = Front::with(OPEN, |config| config.limits.max_frame_bytes = 1 << 16).await;
    let edge = front.broker.client("edge-1").await;
    let mut worker = edge.work(chat("smol")).await.unwrap();
    let bearer = front.bearer();
    let headers = [("authorization", bearer.as_str())];
    let refused = async |path: &str, headers: &[(&str, &str)], body: Bytes| {
        let mut http = front.http().await;
        let answer = http.ask("POST", path, headers, body).await.unwrap();
        let body: Value = serde_json::from_slice(answer.body()).unwrap();
        (answer.status().as_u16(), body["error"].clone())
    };
    let large = Bytes::from(vec![b' '; (1 << 16) + 1]);
    let (status, _) = refused("/v2/models/smol/infer", &headers, large.clone()).await;
    assert_eq!(status, 413);
    let (status, error) = refused("/v1/chat/completions", &headers, large).await;
    assert_eq!(
        (status, error["message"].as_str()),
        (413, Some("the request is over 65536 bytes"))
    );
    let zipped = [headers[0], ("content-encoding", "gzip")];
    let (status, error) = refused("/v2/models/smol/infer", &zipped, Bytes::from("x")).await;
    assert_eq!(
        (status, error.as_str().unwrap().starts_with("compressed")),
        (400, true)
    );
    let (status, error) = refused(
        "/v2/models/smol/infer",
        &headers,
        Bytes::from(r#"{"inputs":[]}"#),
    )
    .await;
    let expected = "the model smol takes no tensors: it answers chat.completions of the OpenAI API";
    assert_eq!((status, error.as_str()), (400, Some(expected)));
    let (status, error) = refused(
        "/v1/embeddings",
        &headers,
        Bytes::from(r#"{"model":"smol"}"#),
    )
    .await;
    let expected = "the model smol does not answer embeddings: it answers chat.completions";
    assert_eq!((status, error["message"].as_str()), (400, Some(expected)));
    let arrived = tokio::time::timeout(Duration::from_millis(50), worker.next()).await;
    assert!(arrived.is_err(), "the worker was asked");
}

/// Where and as whom to ask a door as a model server.
fn upstream(front: &Front, url: String, model: &str) -> UpstreamConfig {
    let token_file = front.folder.path().join("token");
    std::fs::write(&token_file, &front.token).unwrap();
    UpstreamConfig {
        url,
        model: model.to_owned(),
        version: String::new(),
        ca: None,
        token_file: Some(token_file),
        operations: Vec::new(),
        poll: Duration::from_millis(20),
    }
}

/// A door to a fabric whose workers ask another door, by both protocols.
async fn chained(there: &Front) -> (Front, Worker) {
    let here = Front::open().await;
    let grpc = format!("http://{}", there.addresses.grpc.unwrap());
    let http = format!("http://{}/v1", there.addresses.http.unwrap());
    let echo = upstream(there, grpc, "echo");
    let loading = OpenInference::load(&echo, 4, Duration::from_secs(20));
    let tensors = within("the model's signature", loading).await.unwrap();
    let chat = OpenAi::new(&upstream(there, http, "smol"), 4).unwrap();
    let client = here.broker.options(here.broker.device("adapter"));
    let four = NonZeroU32::new(4).unwrap();
    let options = WorkerOptions::new(client, Tier::Cloud)
        .engine(ModelSpec::new("far/echo").slots(four), tensors)
        .engine(ModelSpec::new("far/smol").slots(four), chat);
    let worker = Worker::start(options).await.unwrap();
    (here, worker)
}

#[tokio::test]
async fn a_worker_may_ask_a_model_server_elsewhere() {
    let there = Front::open().await;
    let edge = there.broker.client("edge-1").await;
    let _echo = echo(&edge).await;
    let mut smol = edge.work(chat("smol")).await.unwrap();
    let (here, worker) = chained(&there).await;

    let mut grpc = here.grpc().await;
    let request = here.request(float("far/echo", &[1.0, 2.5]));
    let answer: oip::ModelInferResponse = call(&mut grpc, "ModelInfer", request).await.unwrap();
    let expected = float("", &[1.0, 2.5]).raw_input_contents;
    assert_eq!(answer.raw_output_contents, expected);
    assert_eq!(
        text(&answer, "worker"),
        "spiffe://test.example/acme/plant-1/adapter"
    );

    // A stream comes through event by event, with the server's name for the model.
    let bearer = here.bearer();
    let headers = [("authorization", bearer.as_str())];
    let body = json!({"model": "far/smol", "stream": true, "messages": []}).to_string();
    let mut http = here.http().await;
    let asked = http.begin("POST", "/v1/chat/completions", &headers, body.clone());
    let (answer, mut asked) = tokio::join!(asked, async {
        let mut asked = incoming(&mut smol).await;
        let payload: Value = serde_json::from_slice(&asked.request().await.unwrap()).unwrap();
        assert_eq!(payload["model"], "smol");
        asked.send("{\"n\":1}").await.unwrap();
        asked
    });
    let mut events = answer.unwrap().into_body().into_data_stream();
    assert_eq!(
        within("an event", events.next()).await.unwrap().unwrap(),
        "data: {\"n\":1}\n\n"
    );
    asked.send("{\"n\":2}").await.unwrap();
    assert_eq!(
        within("an event", events.next()).await.unwrap().unwrap(),
        "data: {\"n\":2}\n\n"
    );
    asked.finish().await.unwrap();
    assert_eq!(
        within("the end", events.next()).await.unwrap().unwrap(),
        "data: [DONE]\n\n"
    );

    // One answer, and a refusal with its code and words.
    let body = json!({"model": "far/smol", "messages": []}).to_string();
    let whole = http.ask("POST", "/v1/chat/completions", &headers, body.clone());
    let (answer, ()) = tokio::join!(whole, async {
        let mut asked = incoming(&mut smol).await;
        asked.request().await.unwrap();
        asked
            .reply(AnswerInfo::default(), "{\"choices\":[]}")
            .await
            .unwrap();
    });
    assert_eq!(answer.unwrap().body(), "{\"choices\":[]}");
    let refused = http.ask("POST", "/v1/chat/completions", &headers, body.clone());
    let (answer, ()) = tokio::join!(refused, async {
        let asked = incoming(&mut smol).await;
        let wrong =
            selvedge_client::Status::new(selvedge_client::Code::InvalidArgument, "no messages");
        asked.fail(wrong).await.unwrap();
    });
    let answer = answer.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    let error: Value = serde_json::from_slice(answer.body()).unwrap();
    let said = error["error"]["message"].as_str().unwrap();
    assert!(said.ends_with("400 Bad Request: no messages"), "{said}");

    // Who gives up stops the work at the far end.
    let mut http = here.http().await;
    let given_up = AbortOnDropHandle::new(tokio::spawn(async move {
        let headers = [("authorization", bearer.as_str())];
        http.ask("POST", "/v1/chat/completions", &headers, body)
            .await
    }));
    let asked = incoming(&mut smol).await;
    drop(given_up);
    within(
        "the far worker to hear that nobody waits",
        asked.cancelled(),
    )
    .await;
    worker.shutdown().await;
}

#[tokio::test]
async fn a_model_server_that_is_gone_gets_no_requests_until_it_is_back() {
    let mut there = Front::open().await;
    let edge = there.broker.client("edge-1").await;
    let echoing = echo(&edge).await;
    let _smol = edge.work(chat("smol")).await.unwrap();
    let (here, worker) = chained(&there).await;
    let slots = async || {
        let status: Value = serde_json::from_str(&here.broker.get("/api/status").await).unwrap();
        let models = status["tenants"][0]["models"].as_array().unwrap().clone();
        let slots = |name: &str| {
            let found = models.iter().find(|model| model["model"] == name).unwrap();
            found["slots"].as_u64().unwrap()
        };
        (slots("far/echo"), slots("far/smol"))
    };
    let reach = async |expected: (u64, u64)| {
        eventually("the slots to follow the servers", || async {
            (slots().await == expected).then_some(())
        })
        .await;
    };
    reach((4, 4)).await;
    // The model is withdrawn at the server, which is still there.
    drop(echoing);
    reach((0, 4)).await;
    let _echoing = echo(&edge).await;
    reach((4, 4)).await;
    there.broker.stop().await;
    reach((0, 0)).await;
    worker.shutdown().await;
}
