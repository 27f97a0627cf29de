//! The Open Inference Protocol v2 over gRPC, with the extensions that Triton's clients use.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response};
use prost::Message;
use selvedge_proto::inference::TensorSpec;
use selvedge_proto::open_inference as oip;
use selvedge_proto::status::{Code, Status};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::codec::Streaming;
use tonic::metadata::MetadataValue;
use tonic::server::{Grpc, StreamingService, UnaryService};
use tonic_prost::ProstCodec;

use super::ask::{Answer, Asked, ask};
use super::http::Body;
use super::json;
use super::known::Known;
use super::request::{Bounds, InferResponse, Parameter, Wanted, explained};
use super::rest::{EXTENSIONS, PLATFORM, invalid, outputs, payload};
use super::tensors::{from_proto, to_proto, to_proto_parameter};
use super::visitor::Visitor;
use crate::calls::Caller;

/// What the paths of the service begin with.
const SERVICE: &str = "/inference.GRPCInferenceService/";

/// Requests of one stream whose answers are not sent yet. Beyond it nothing more is read from the
/// stream until the first of them is.
const PIPELINED: usize = 64;

/// Set in a request by clients that wait for the last answer of each.
const WANTS_FINAL: &str = "triton_enable_empty_final_response";
/// Set in answers for such clients.
const IS_FINAL: &str = "triton_final_response";

/// Answers one call.
pub(crate) async fn serve(visitor: &Visitor, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let Some(method) = path.strip_prefix(SERVICE) else {
        return refused(&Status::new(
            Code::Unimplemented,
            format!("expected a method of inference.GRPCInferenceService, found {path:?}"),
        ));
    };
    let fabric = &visitor.door.fabric;
    match method {
        // Whoever watches the broker need not be let in.
        "ServerLive" => {
            let live =
                |_: oip::ServerLiveRequest, _| async { Ok(oip::ServerLiveResponse { live: true }) };
            return unary(visitor, request, live).await;
        }
        "ServerReady" => {
            let ready = !fabric.shutdown.is_cancelled();
            let answer = move |_: oip::ServerReadyRequest, _| async move {
                Ok(oip::ServerReadyResponse { ready })
            };
            return unary(visitor, request, answer).await;
        }
        _ => {}
    }
    let caller = match visitor.caller(request.headers()) {
        Ok(caller) => caller,
        Err(status) => return refused(&status),
    };
    match method {
        "ServerMetadata" => {
            let metadata = oip::ServerMetadataResponse {
                name: (*fabric.name).to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                extensions: EXTENSIONS.map(str::to_owned).to_vec(),
            };
            let answer = move |_: oip::ServerMetadataRequest, _| async move { Ok(metadata) };
            unary(visitor, request, answer).await
        }
        "ModelReady" => {
            let answer = move |asked: oip::ModelReadyRequest, _| async move {
                match Known::find(&caller, &asked.name, &asked.version) {
                    Ok(known) => Ok(oip::ModelReadyResponse {
                        ready: known.is_ready(),
                    }),
                    Err(status) if status.code == Code::NotFound => {
                        Ok(oip::ModelReadyResponse { ready: false })
                    }
                    Err(status) => Err(status),
                }
            };
            unary(visitor, request, answer).await
        }
        "ModelMetadata" => {
            let answer = move |asked: oip::ModelMetadataRequest, _| async move {
                Known::find(&caller, &asked.name, &asked.version).map(|known| metadata(&known))
            };
            unary(visitor, request, answer).await
        }
        "ModelConfig" => {
            let answer = move |asked: oip::ModelConfigRequest, _| async move {
                Known::find(&caller, &asked.name, &asked.version).map(|known| {
                    oip::ModelConfigResponse {
                        config: Some(config(&known)),
                    }
                })
            };
            unary(visitor, request, answer).await
        }
        "RepositoryIndex" => {
            let answer = move |asked: oip::RepositoryIndexRequest, _| async move {
                Ok(index(&Known::all(&caller), asked.ready))
            };
            unary(visitor, request, answer).await
        }
        "ModelInfer" => {
            let answer = move |asked: oip::ModelInferRequest, headers: HeaderMap| async move {
                let bounds = Bounds::of_headers(&headers).map_err(invalid)?;
                let asked = Inference::begin(&caller, bounds, asked)?;
                let (mut answer, request) = asked.answer().await?;
                let payload = answer.only().await?;
                request.response(&answer, payload)
            };
            unary(visitor, request, answer).await
        }
        "ModelStreamInfer" => {
            let limit = fabric.limits.max_frame_bytes;
            grpc(limit).streaming(Streams { caller }, request).await
        }
        other => refused(&Status::new(
            Code::Unimplemented,
            format!("the method {other:?} is not supported here"),
        )),
    }
}

fn grpc<Q, A>(limit: usize) -> Grpc<ProstCodec<A, Q>>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
{
    Grpc::new(ProstCodec::default())
        .max_decoding_message_size(limit)
        .max_encoding_message_size(usize::MAX)
}

/// Answers a call of one request and one answer.
async fn unary<Q, A, F, Fut>(
    visitor: &Visitor,
    request: Request<Incoming>,
    answer: F,
) -> Response<Body>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
    F: FnOnce(Q, HeaderMap) -> Fut + Send + 'static,
    Fut: Future<Output = Result<A, Status>> + Send + 'static,
{
    let limit = visitor.door.fabric.limits.max_frame_bytes;
    grpc(limit).unary(Unary(Some(answer)), request).await
}

/// A method made of a function, which is called once.
struct Unary<F>(Option<F>);

impl<Q, A, F, Fut> UnaryService<Q> for Unary<F>
where
    Q: Send + 'static,
    A: 'static,
    F: FnOnce(Q, HeaderMap) -> Fut + Send + 'static,
    Fut: Future<Output = Result<A, Status>> + Send + 'static,
{
    type Response = A;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<A>, tonic::Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<Q>) -> Self::Future {
        let answer = self.0.take();
        Box::pin(async move {
            let answer = answer.expect("tonic calls a unary method once for each request");
            let (metadata, _, message) = request.into_parts();
            match answer(message, metadata.into_headers()).await {
                Ok(answer) => Ok(tonic::Response::new(answer)),
                Err(status) => Err(to_tonic(&status)),
            }
        })
    }
}

/// A request with tensors that was sent off.
struct Inference {
    asked: Asked,
    request: Expected,
}

/// What of a request its answer needs.
struct Expected {
    id: String,
    outputs: Vec<Wanted>,
    /// The last answer is to be told apart.
    wants_final: bool,
}

impl Inference {
    fn begin(
        caller: &Caller,
        mut bounds: Bounds,
        asked: oip::ModelInferRequest,
    ) -> Result<Self, Status> {
        let (model, version) = (asked.model_name.clone(), asked.model_version.clone());
        let mut request = from_proto(asked).map_err(invalid)?;
        let mut wants_final = false;
        request.parameters.retain(|(name, value)| {
            let taken = name == WANTS_FINAL;
            if taken {
                wants_final = *value == Parameter::Bool(true);
            }
            !taken
        });
        bounds.take(request.parameters).map_err(invalid)?;
        let payload = payload(caller, &model, &version, request.inputs)?;
        let header = bounds.header(&model, &version, &request.id, payload.len());
        Ok(Self {
            asked: ask(caller, header, payload)?,
            request: Expected {
                id: request.id,
                outputs: request.outputs,
                wants_final,
            },
        })
    }

    async fn answer(self) -> Result<(Answer, Expected), Status> {
        Ok((self.asked.answer().await?, self.request))
    }
}

impl Expected {
    fn response(&self, answer: &Answer, payload: Bytes) -> Result<oip::ModelInferResponse, Status> {
        let outputs = outputs(payload)?;
        Ok(to_proto(InferResponse {
            model: answer.info.model.clone(),
            version: answer.info.version.clone(),
            id: self.id.clone(),
            parameters: explained(&answer.info),
            outputs: json::select(outputs, &self.outputs).map_err(invalid)?,
        }))
    }
}

/// Triton's stream of requests and answers.
struct Streams {
    caller: Caller,
}

type Answers =
    Pin<Box<dyn Stream<Item = Result<oip::ModelStreamInferResponse, tonic::Status>> + Send>>;

impl StreamingService<oip::ModelInferRequest> for Streams {
    type Response = oip::ModelStreamInferResponse;
    type ResponseStream = Answers;
    type Future = std::future::Ready<Result<tonic::Response<Answers>, tonic::Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<oip::ModelInferRequest>>) -> Self::Future {
        let (metadata, _, requests) = request.into_parts();
        let bounds = Bounds::of_headers(&metadata.into_headers()).map_err(invalid);
        std::future::ready(match bounds {
            Ok(bounds) => Ok(tonic::Response::new(answers(
                self.caller.clone(),
                bounds,
                requests,
            ))),
            Err(status) => Err(to_tonic(&status)),
        })
    }
}

/// One request of a stream on its way, or why it is not.
type Begun = Result<(Box<Inference>, String), (String, Status)>;

/// Answers in the order of the requests, which run at the same time. Dropping them, as when the call
/// is cancelled, cancels every request of the stream.
fn answers(
    caller: Caller,
    bounds: Bounds,
    mut requests: Streaming<oip::ModelInferRequest>,
) -> Answers {
    let (sender, receiver) = mpsc::channel::<Begun>(PIPELINED);
    let reading = AbortOnDropHandle::new(tokio::spawn(async move {
        // What cannot be read ends the stream; the client knows why.
        while let Ok(Some(request)) = requests.message().await {
            let id = request.id.clone();
            // A deadline in the metadata is that of the stream, in parameters that of a request.
            let begun = match Inference::begin(&caller, bounds.clone(), request) {
                Ok(inference) => Ok((Box::new(inference), id)),
                Err(status) => Err((id, status)),
            };
            if sender.send(begun).await.is_err() {
                return;
            }
        }
    }));
    struct State {
        requests: mpsc::Receiver<Begun>,
        current: Option<(Answer, Expected)>,
        _reading: Arc<AbortOnDropHandle<()>>,
    }
    let state = State {
        requests: receiver,
        current: None,
        _reading: Arc::new(reading),
    };
    Box::pin(stream::unfold(state, |mut state| async move {
        loop {
            let Some((answer, request)) = &mut state.current else {
                let outcome = match state.requests.recv().await? {
                    Ok((inference, id)) => inference.answer().await.map_err(|status| (id, status)),
                    Err(refused) => Err(refused),
                };
                match outcome {
                    Ok(current) => {
                        state.current = Some(current);
                        continue;
                    }
                    Err((id, status)) => return Some((Ok(failed(id, &status)), state)),
                }
            };
            let id = request.id.clone();
            let message = match answer.next().await {
                Ok(Some(payload)) => request.response(answer, payload).map(|mut response| {
                    if request.wants_final {
                        set_final(&mut response, false);
                    }
                    response
                }),
                Ok(None) if request.wants_final => {
                    let mut last = oip::ModelInferResponse {
                        model_name: answer.info.model.clone(),
                        model_version: answer.info.version.clone(),
                        id: id.clone(),
                        ..Default::default()
                    };
                    set_final(&mut last, true);
                    state.current = None;
                    Ok(last)
                }
                Ok(None) => {
                    state.current = None;
                    continue;
                }
                Err(status) => Err(status),
            };
            let item = match message {
                Ok(response) => oip::ModelStreamInferResponse {
                    error_message: String::new(),
                    infer_response: Some(response),
                },
                Err(status) => {
                    state.current = None;
                    failed(id, &status)
                }
            };
            return Some((Ok(item), state));
        }
    }))
}

fn set_final(response: &mut oip::ModelInferResponse, is_final: bool) {
    response.parameters.insert(
        IS_FINAL.to_owned(),
        to_proto_parameter(Parameter::Bool(is_final)),
    );
}

/// A request of a stream that failed; the stream goes on.
fn failed(id: String, status: &Status) -> oip::ModelStreamInferResponse {
    oip::ModelStreamInferResponse {
        error_message: status.to_string(),
        infer_response: Some(oip::ModelInferResponse {
            id,
            ..Default::default()
        }),
    }
}

fn metadata(known: &Known) -> oip::ModelMetadataResponse {
    let list = |specs: &[TensorSpec]| {
        let list = specs
            .iter()
            .map(|spec| oip::model_metadata_response::TensorMetadata {
                name: spec.name.clone(),
                datatype: spec.datatype.clone(),
                shape: spec.shape.clone(),
            });
        list.collect()
    };
    oip::ModelMetadataResponse {
        name: known.name.clone(),
        versions: known.versions(),
        platform: PLATFORM.to_owned(),
        inputs: list(known.inputs()),
        outputs: list(known.outputs()),
    }
}

fn config(known: &Known) -> oip::ModelConfig {
    let input = known.inputs().iter().map(|spec| oip::ModelInput {
        name: spec.name.clone(),
        data_type: data_type(&spec.datatype).into(),
        dims: spec.shape.clone(),
    });
    let output = known.outputs().iter().map(|spec| oip::ModelOutput {
        name: spec.name.clone(),
        data_type: data_type(&spec.datatype).into(),
        dims: spec.shape.clone(),
    });
    oip::ModelConfig {
        name: known.name.clone(),
        platform: PLATFORM.to_owned(),
        max_batch_size: 0,
        input: input.collect(),
        output: output.collect(),
        backend: PLATFORM.to_owned(),
    }
}

/// The datatype as Triton's configuration names it.
pub(crate) fn data_type(datatype: &str) -> oip::DataType {
    let name = match datatype {
        "BYTES" => "TYPE_STRING".to_owned(),
        other => format!("TYPE_{other}"),
    };
    oip::DataType::from_str_name(&name).unwrap_or(oip::DataType::TypeInvalid)
}

fn index(models: &[Known], only_ready: bool) -> oip::RepositoryIndexResponse {
    let models = models
        .iter()
        .filter(|known| !only_ready || known.is_ready())
        .flat_map(|known| {
            let state = if known.is_ready() {
                "READY"
            } else {
                "UNAVAILABLE"
            };
            let versions = known.versions().into_iter();
            versions.map(move |version| oip::repository_index_response::ModelIndex {
                name: known.name.clone(),
                version,
                state: state.to_owned(),
                reason: String::new(),
            })
        });
    oip::RepositoryIndexResponse {
        models: models.collect(),
    }
}

/// A status as an answer of its own.
fn refused(status: &Status) -> Response<Body> {
    to_tonic(status).into_http()
}

/// The same status for gRPC, with the time to wait where its clients look for it.
fn to_tonic(status: &Status) -> tonic::Status {
    let mut answer = tonic::Status::new(tonic::Code::from(status.code as i32), &*status.message);
    if let Some(after) = status.retry_after {
        let ms = after.max(Duration::from_millis(1)).as_millis().to_string();
        if let Ok(ms) = MetadataValue::try_from(ms) {
            let metadata = answer.metadata_mut();
            metadata.insert("grpc-retry-pushback-ms", ms.clone());
            metadata.insert("retry-after-ms", ms);
        }
    }
    answer
}
