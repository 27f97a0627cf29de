//! The Open Inference Protocol v2 over HTTP.

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use selvedge_proto::inference::{TensorSpec, decode_tensors, encode_tensors};
use selvedge_proto::status::{Code, Status};
use serde_json::{Value, json};

use super::ask::ask;
use super::http::{self, Body, JSON_BYTES};
use super::json;
use super::known::Known;
use super::path::{OfModel, Route};
use super::request::{Bounds, InferResponse, Invalid, explained, explained_headers};
use super::visitor::Visitor;
use crate::calls::Caller;

/// What the front door speaks beyond the protocol itself.
pub(crate) const EXTENSIONS: [&str; 3] = ["binary_tensor_data", "model_repository", "parameters"];

/// The largest binary part of a request that is not a number is no number.
fn json_bytes(value: Option<&HeaderValue>) -> Result<Option<usize>, Invalid> {
    let Some(value) = value else {
        return Ok(None);
    };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number
        .map(Some)
        .ok_or_else(|| Invalid::new("Inference-Header-Content-Length: expected a number of bytes"))
}

/// Answers one request of the protocol.
pub(crate) async fn serve(
    visitor: &Visitor,
    route: Route,
    request: Request<Incoming>,
) -> Response<Body> {
    match answer(visitor, route, request).await {
        Ok(response) => response,
        Err(status) => problem(&status),
    }
}

/// A status as clients of the protocol read it.
pub(crate) fn problem(status: &Status) -> Response<Body> {
    let body = json!({"error": status.message, "code": status.code.as_str()});
    let mut response = http::json(http::http_status(status), body.to_string());
    http::retry_advice(status, response.headers_mut());
    response
}

async fn answer(
    visitor: &Visitor,
    route: Route,
    request: Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let fabric = &visitor.door.fabric;
    let ok = |value: Value| Ok(http::json(StatusCode::OK, value.to_string()));
    let method = request.method().clone();
    let get = method == Method::GET || method == Method::HEAD;
    match route {
        // Whoever watches the broker need not be let in.
        Route::Live if get => return ok(json!({"live": true})),
        Route::Ready if get => {
            let ready = !fabric.shutdown.is_cancelled();
            let status = if ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            return Ok(http::json(status, json!({"ready": ready}).to_string()));
        }
        _ => {}
    }
    let caller = visitor.caller(request.headers())?;
    match route {
        Route::Server if get => ok(json!({
            "name": &*fabric.name,
            "version": env!("CARGO_PKG_VERSION"),
            "extensions": EXTENSIONS,
        })),
        Route::Index if get || method == Method::POST => {
            let models = Known::all(&caller);
            let index = models.iter().flat_map(|model| {
                let state = if model.is_ready() {
                    "READY"
                } else {
                    "UNAVAILABLE"
                };
                let versions = model.versions().into_iter();
                versions.map(move |version| {
                    json!({"name": model.name, "version": version, "state": state, "reason": ""})
                })
            });
            ok(index.collect())
        }
        Route::Model {
            model,
            version,
            what: OfModel::Infer,
        } if method == Method::POST => infer(&caller, &model, &version, request).await,
        Route::Model {
            model,
            version,
            what,
        } if get && what != OfModel::Infer => {
            let known = Known::find(&caller, &model, &version)?;
            match what {
                OfModel::Ready if known.is_ready() => ok(json!({"name": model, "ready": true})),
                OfModel::Ready => Err(Status::new(
                    Code::Unavailable,
                    format!("no worker for {model} has it loaded"),
                )),
                OfModel::Config => ok(config(&known)),
                OfModel::Metadata | OfModel::Infer => ok(json!({
                    "name": known.name,
                    "versions": known.versions(),
                    "platform": PLATFORM,
                    "inputs": tensors(known.inputs()),
                    "outputs": tensors(known.outputs()),
                })),
            }
        }
        _ => Err(Status::new(
            Code::Unimplemented,
            format!("{method} is nothing that this path takes"),
        )),
    }
}

/// What runs models, as metadata names it: the fabric does, and a worker is chosen with each request.
pub(crate) const PLATFORM: &str = "selvedge";

fn tensors(specs: &[TensorSpec]) -> Value {
    let list = specs
        .iter()
        .map(|spec| json!({"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}));
    list.collect()
}

/// Triton's model configuration, as far as the fabric knows it.
fn config(known: &Known) -> Value {
    let list = |specs: &[TensorSpec]| -> Value {
        let list = specs.iter().map(|spec| {
            let datatype = super::grpc::data_type(&spec.datatype).as_str_name();
            json!({"name": spec.name, "data_type": datatype, "dims": spec.shape})
        });
        list.collect()
    };
    json!({
        "name": known.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": 0,
        "input": list(known.inputs()),
        "output": list(known.outputs()),
    })
}

async fn infer(
    caller: &Caller,
    model: &str,
    version: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let limits = &caller.fabric.limits;
    let (parts, body) = request.into_parts();
    let mut bounds = Bounds::of_headers(&parts.headers).map_err(invalid)?;
    let time = bounds.deadline.unwrap_or(limits.default_deadline);
    let body = http::read(&parts.headers, body, limits.max_frame_bytes, time).await?;
    let json_bytes = json_bytes(parts.headers.get(JSON_BYTES)).map_err(invalid)?;
    let mut request = json::decode(&body, json_bytes).map_err(invalid)?;
    drop(body);
    bounds
        .take(std::mem::take(&mut request.parameters))
        .map_err(invalid)?;
    let payload = payload(caller, model, version, request.inputs)?;
    let header = bounds.header(model, version, &request.id, payload.len());
    let mut answer = ask(caller, header, payload)?.answer().await?;
    let payload = answer.only().await?;
    let response = InferResponse {
        model: answer.info.model.clone(),
        version: answer.info.version.clone(),
        id: request.id,
        parameters: explained(&answer.info),
        outputs: outputs(payload)?,
    };
    let response = InferResponse {
        outputs: json::select(response.outputs, &request.outputs).map_err(invalid)?,
        ..response
    };
    let (wanted, binary) = (request.outputs, request.binary);
    let is_binary = |name: &str| {
        let said = wanted.iter().find(|wanted| wanted.name == name);
        said.and_then(|wanted| wanted.binary).unwrap_or(binary)
    };
    let (body, json_bytes) = json::encode(response, is_binary).map_err(invalid)?;
    let mut response = http::json(StatusCode::OK, body);
    let headers = response.headers_mut();
    explained_headers(&answer.info, headers);
    if let Some(json_bytes) = json_bytes {
        headers.insert(JSON_BYTES, json_bytes.into());
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
    }
    Ok(response)
}

/// The payload of a request with tensors, for a model that takes some.
pub(crate) fn payload(
    caller: &Caller,
    model: &str,
    version: &str,
    inputs: Vec<selvedge_proto::inference::Tensor>,
) -> Result<Bytes, Status> {
    // A model that nobody runs now may be back in a moment: placement waits for it.
    if let Ok(known) = Known::find(caller, model, version)
        && known.refuses_tensors()
    {
        return Err(Status::new(
            Code::InvalidArgument,
            format!(
                "the model {model} takes no tensors: it answers {} of the OpenAI API",
                known.operations().join(", ")
            ),
        ));
    }
    Ok(encode_tensors(inputs))
}

/// The tensors of an answer.
pub(crate) fn outputs(payload: Bytes) -> Result<Vec<selvedge_proto::inference::Tensor>, Status> {
    decode_tensors(payload).map_err(|error| {
        Status::new(
            Code::Internal,
            format!("the model's answer is no tensors: {error}"),
        )
    })
}

pub(crate) fn invalid(error: Invalid) -> Status {
    Status::new(Code::InvalidArgument, error.0)
}
