//! The OpenAI API: chat completions, completions, embeddings and models.
//!
//! A request is passed on to the worker as it came, and what the worker answers is passed back: one
//! JSON object, or for a stream one object for each event. Only the name of the model, and whether a
//! stream is wanted, is read here.

use std::convert::Infallible;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream;
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use selvedge_proto::status::{Code, Status};
use serde::Deserialize;
use serde_json::{Value, json};

use super::ask::{Answer, ask};
use super::http::{self, Body};
use super::known::Known;
use super::path::{Operation, Route};
use super::request::{Bounds, Invalid, Parameter, explained_headers};
use super::rest::invalid;
use super::visitor::Visitor;
use crate::calls::Caller;
use crate::placement::affinity::MAX_ROUTING_KEY;

#[cfg(test)]
mod tests;

/// The parameter of a request that names its operation to the worker.
const OPERATION: &str = "operation";

/// The end of a stream.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// What is read of a request; everything else is the worker's.
#[derive(Debug, Deserialize, PartialEq, Eq)]
pub(crate) struct Head {
    /// The model.
    pub(crate) model: String,
    /// Events, rather than one answer.
    #[serde(default)]
    stream: Option<bool>,
    /// Requests with the same one share a prompt that a worker may have kept.
    #[serde(default)]
    prompt_cache_key: Option<String>,
}

impl Head {
    /// Reads the head of a request.
    ///
    /// # Errors
    /// It is no JSON object that names a model.
    pub(crate) fn read(body: &[u8]) -> Result<Self, Invalid> {
        serde_json::from_slice(body)
            .map_err(|error| Invalid(format!("the body is no request of the OpenAI API: {error}")))
    }

    /// The routing key that comes of the prompt's; empty when there is none, or one that is too long.
    fn affinity(&self) -> String {
        let key = self.prompt_cache_key.clone();
        key.filter(|key| key.len() <= MAX_ROUTING_KEY)
            .unwrap_or_default()
    }

    /// Whether events are wanted, rather than one answer.
    pub(crate) fn is_stream(&self) -> bool {
        self.stream == Some(true)
    }
}

/// One event of a stream.
pub(crate) fn event(message: &[u8]) -> Bytes {
    let mut event = BytesMut::with_capacity(message.len() + 16);
    // A line break in the middle, of any kind, would end the field.
    for line in message.split(|&byte| byte == b'\n' || byte == b'\r') {
        if !line.is_empty() {
            event.put_slice(b"data: ");
            event.put_slice(line);
            event.put_u8(b'\n');
        }
    }
    event.put_u8(b'\n');
    event.freeze()
}

/// Answers one request of the API.
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

async fn answer(
    visitor: &Visitor,
    route: Route,
    request: Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let caller = visitor.caller(request.headers())?;
    let ok = |value: Value| Ok(http::json(StatusCode::OK, value.to_string()));
    match (route, request.method()) {
        (Route::List, &Method::GET) => {
            let models: Vec<Value> = Known::all(&caller)
                .iter()
                .map(|known| model(&caller, known))
                .collect();
            ok(json!({"object": "list", "data": models}))
        }
        (Route::Listed(name), &Method::GET) => {
            ok(model(&caller, &Known::find(&caller, &name, "")?))
        }
        (Route::Operation(operation), &Method::POST) => operate(&caller, operation, request).await,
        (_, method) => Err(Status::new(
            Code::Unimplemented,
            format!("{method} is nothing that this path takes"),
        )),
    }
}

fn model(caller: &Caller, known: &Known) -> Value {
    json!({
        "id": known.name,
        "object": "model",
        "created": 0,
        "owned_by": &*caller.tenant.name,
        "versions": known.versions(),
        "ready": known.is_ready(),
        "operations": known.operations(),
    })
}

async fn operate(
    caller: &Caller,
    operation: Operation,
    request: Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let limits = &caller.fabric.limits;
    let (parts, body) = request.into_parts();
    let mut bounds = Bounds::of_headers(&parts.headers).map_err(invalid)?;
    let time = bounds.deadline.unwrap_or(limits.default_deadline);
    let body = http::read(&parts.headers, body, limits.max_frame_bytes, time).await?;
    let head = Head::read(&body).map_err(invalid)?;
    if let Ok(known) = Known::find(caller, &head.model, "")
        && known.refuses(operation)
    {
        let what = match known.operations() {
            none if none.is_empty() => "tensors, over the Open Inference Protocol".to_owned(),
            some => some.join(", "),
        };
        return Err(Status::new(
            Code::InvalidArgument,
            format!(
                "the model {} does not answer {}: it answers {what}",
                head.model,
                operation.as_str()
            ),
        ));
    }
    let operation = Parameter::Text(operation.as_str().to_owned());
    bounds
        .take(vec![(OPERATION.to_owned(), operation)])
        .map_err(invalid)?;
    if bounds.routing_key.is_empty() {
        bounds.routing_key = head.affinity();
    }
    let header = bounds.header(&head.model, "", "", body.len());
    let mut answer = ask(caller, header, body)?.answer().await?;
    let id = HeaderValue::from_str(&answer.info.request_id);
    let mut response = if head.is_stream() {
        // Before the first event, so that a refusal still has a status of its own.
        let first = answer.next().await?;
        let info = answer.info.clone();
        let mut response = Response::new(events(first, answer));
        explained_headers(&info, response.headers_mut());
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    } else {
        let body = answer.only().await?;
        let mut response = http::json(StatusCode::OK, body);
        explained_headers(&answer.info, response.headers_mut());
        response
    };
    if let Ok(id) = id {
        response.headers_mut().insert("x-request-id", id);
    }
    Ok(response)
}

/// The events of an answer. Dropping them, as when the client is gone, cancels the request.
fn events(first: Option<Bytes>, answer: Answer) -> Body {
    enum Next {
        Event(Bytes, Answer),
        More(Answer),
        Done,
    }
    let begin = match first {
        Some(first) => Next::Event(first, answer),
        None => Next::Done,
    };
    let begin = (begin, false);
    let events = stream::unfold(begin, |(next, ended)| async move {
        if ended {
            return None;
        }
        let frame = |bytes| Ok::<_, Infallible>(Frame::data(bytes));
        let (message, answer) = match next {
            Next::Event(message, answer) => (Ok(Some(message)), Some(answer)),
            Next::More(mut answer) => (answer.next().await, Some(answer)),
            Next::Done => (Ok(None), None),
        };
        Some(match (message, answer) {
            (Ok(Some(message)), Some(answer)) => {
                (frame(event(&message)), (Next::More(answer), false))
            }
            (Ok(_), _) => (frame(Bytes::from_static(DONE)), (Next::Done, true)),
            // The status line is gone; clients read an error from an event.
            (Err(status), _) => (
                frame(event(error(&status).to_string().as_bytes())),
                (Next::Done, true),
            ),
        })
    });
    Body::new(StreamBody::new(events))
}

/// A status as clients of the API read it.
pub(crate) fn problem(status: &Status) -> Response<Body> {
    let mut response = http::json(http::http_status(status), error(status).to_string());
    http::retry_advice(status, response.headers_mut());
    response
}

fn error(status: &Status) -> Value {
    let kind = match status.code {
        Code::Unauthenticated => "authentication_error",
        Code::PermissionDenied => "permission_error",
        Code::ResourceExhausted => "rate_limit_error",
        Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition | Code::OutOfRange => {
            "invalid_request_error"
        }
        _ => "server_error",
    };
    let code = match status.code {
        Code::NotFound => "model_not_found".to_owned(),
        code => code.as_str().to_ascii_lowercase(),
    };
    json!({"error": {"message": status.message, "type": kind, "param": null, "code": code}})
}
