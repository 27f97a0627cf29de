//! An engine that asks an OpenAI-compatible server over HTTP: vLLM, llama.cpp, Ollama, or another front
//! door of this fabric.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Response, StatusCode};
use parking_lot::Mutex;
use selvedge_client::{Code, Status, TensorSpec};
use selvedge_proto::sse::Events;
use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{Endpoint, LARGEST, Sign, UpstreamError, Watched};
use crate::config::UpstreamConfig;
use crate::engine::{Answering, Capacity, Engine, JSON, OPERATION, Reply, Request};

#[cfg(test)]
mod tests;

/// Time that a question about readiness may take.
const POLL: Duration = Duration::from_secs(5);

/// Largest answer that says what went wrong.
const REFUSAL: usize = 64 << 10;

/// The operations of the API, with their paths.
const OPERATIONS: [(&str, &str); 3] = [
    ("chat.completions", "/chat/completions"),
    ("completions", "/completions"),
    ("embeddings", "/embeddings"),
];

/// A model of an OpenAI-compatible server.
pub struct OpenAi {
    server: Arc<Server>,
    model: String,
    operations: Vec<String>,
    watched: Arc<Watched>,
    _polling: AbortOnDropHandle<()>,
}

impl OpenAi {
    /// Looks after the server from now on. One that is not there yet is no error: it gets requests
    /// when it is.
    ///
    /// # Errors
    /// The configuration is no good.
    pub fn new(config: &UpstreamConfig, slots: u32) -> Result<Arc<Self>, UpstreamError> {
        let server = Arc::new(Server {
            endpoint: Endpoint::new(config, b"http/1.1")?,
            idle: Mutex::default(),
            most: slots as usize,
        });
        let watched = Arc::new(Watched::new(slots));
        let polling = poll(Arc::clone(&server), config.poll, Arc::downgrade(&watched));
        let operations = if config.operations.is_empty() {
            vec![OPERATIONS[0].0.to_owned()]
        } else {
            config.operations.clone()
        };
        Ok(Arc::new(Self {
            server,
            model: config.model.clone(),
            operations,
            watched,
            _polling: AbortOnDropHandle::new(tokio::spawn(polling)),
        }))
    }

    /// Whether the API has an operation of this name.
    pub(crate) fn knows(operation: &str) -> bool {
        OPERATIONS.iter().any(|(name, _)| *name == operation)
    }

    async fn ask(&self, request: Request, reply: &Reply) -> Result<(), Status> {
        let operation = request.parameter(OPERATION).unwrap_or(&self.operations[0]);
        let known = OPERATIONS.iter().find(|(name, _)| *name == operation);
        let Some((_, path)) = known.filter(|(name, _)| self.operations.iter().any(|o| o == name))
        else {
            return Err(Status::new(
                Code::InvalidArgument,
                format!(
                    "expected one of {}, found the operation {operation:?}",
                    self.operations.join(", ")
                ),
            ));
        };
        let body = with_model(&request.payload, &self.model)?;
        let headers = [("traceparent", request.traceparent.as_str())];
        let mut exchange = self.server.ask(Method::POST, path, &headers, body).await?;
        let status = exchange.response.status();
        if !status.is_success() {
            let retry_after = retry_after(exchange.response.headers());
            let body = exchange.body(REFUSAL).await.unwrap_or_default();
            let refusal = refusal(status, &body);
            return Err(match retry_after {
                Some(after) => refusal.retry_after(after),
                None => refusal,
            });
        }
        let kind = exchange.response.headers().get(hyper::header::CONTENT_TYPE);
        let is_stream = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        if !is_stream {
            let body = exchange.body(LARGEST).await?;
            return Ok(reply.send(body).await?);
        }
        let mut events = Events::new(LARGEST);
        loop {
            let event = events
                .next_event()
                .map_err(|error| self.server.broken(&error.to_string()))?;
            match event {
                Some(event) if event.as_ref() == b"[DONE]" => {
                    exchange.reuse().await;
                    return Ok(());
                }
                Some(event) => match error_in(&event) {
                    Some(error) => return Err(error),
                    None => reply.send(event).await?,
                },
                None => match exchange.chunk().await? {
                    Some(chunk) => events.push(&chunk),
                    None => return Err(self.server.broken("the stream ended before [DONE]")),
                },
            }
        }
    }
}

impl Engine for OpenAi {
    fn inputs(&self) -> Vec<TensorSpec> {
        let operations = self.operations.iter();
        operations
            .map(|operation| TensorSpec {
                name: operation.clone(),
                datatype: JSON.to_owned(),
                shape: Vec::new(),
            })
            .collect()
    }

    fn outputs(&self) -> Vec<TensorSpec> {
        self.inputs()
    }

    fn capacity(&self) -> watch::Receiver<Capacity> {
        self.watched.subscribe()
    }

    fn answer(self: Arc<Self>, request: Request, reply: Reply) -> Answering {
        Box::pin(async move {
            let deadline = request.deadline;
            let outcome = tokio::time::timeout_at(deadline, self.ask(request, &reply)).await;
            let outcome = outcome.unwrap_or_else(|_| {
                Err(Status::new(
                    Code::DeadlineExceeded,
                    format!(
                        "the model server {} did not answer in time",
                        self.server.endpoint.url
                    ),
                ))
            });
            self.watched.see_outcome(&outcome);
            outcome
        })
    }
}

async fn poll(server: Arc<Server>, every: Duration, watched: Weak<Watched>) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asked = async {
            let asked = server.ask(Method::GET, "/models", &[], Bytes::new()).await;
            let mut exchange = asked.ok()?;
            let status = exchange.response.status();
            exchange.body(LARGEST).await.ok()?;
            Some(status)
        };
        let status = tokio::time::timeout(POLL, asked).await.ok().flatten();
        let Some(watched) = watched.upgrade() else {
            return;
        };
        // A server that does not list its models is there all the same.
        watched.see(match status {
            Some(status) if status.is_success() || status == StatusCode::NOT_FOUND => Sign::Ready,
            Some(StatusCode::TOO_MANY_REQUESTS) => Sign::Overloaded,
            _ => Sign::NotReady,
        });
    }
}

/// The request with the name that the server has for the model.
fn with_model(payload: &[u8], model: &str) -> Result<Bytes, Status> {
    let mut object: Map<String, Value> = serde_json::from_slice(payload).map_err(|error| {
        Status::new(
            Code::InvalidArgument,
            format!("the request is no JSON object: {error}"),
        )
    })?;
    object.insert("model".to_owned(), model.into());
    Ok(Value::from(object).to_string().into())
}

fn retry_after(headers: &hyper::HeaderMap) -> Option<Duration> {
    let number = |name| headers.get(name)?.to_str().ok()?.trim().parse::<u32>().ok();
    let ms = number("retry-after-ms").map(|ms| Duration::from_millis(ms.into()));
    ms.or_else(|| number("retry-after").map(|seconds| Duration::from_secs(seconds.into())))
}

/// The status that says the same as an answer of HTTP.
fn refusal(status: StatusCode, body: &[u8]) -> Status {
    let code = match status.as_u16() {
        400 | 405 | 415 | 422 => Code::InvalidArgument,
        // That the server does not let this worker in, or lacks the model, is not the requester's doing.
        401 | 403 | 404 => Code::FailedPrecondition,
        408 | 504 => Code::DeadlineExceeded,
        413 => Code::OutOfRange,
        429 => Code::ResourceExhausted,
        501 => Code::Unimplemented,
        502 | 503 => Code::Unavailable,
        _ => Code::Internal,
    };
    let said = serde_json::from_slice::<Value>(body).ok();
    let said = said.as_ref().and_then(message_of).unwrap_or_default();
    Status::new(code, format!("the model server answered {status}: {said}"))
}

fn message_of(value: &Value) -> Option<&str> {
    let error = value.get("error").or_else(|| value.get("detail"))?;
    error.get("message").unwrap_or(error).as_str()
}

/// The error that an event of a stream is.
fn error_in(event: &[u8]) -> Option<Status> {
    // Most are none, and need not be parsed.
    if !event
        .windows(7)
        .take(64)
        .any(|window| window == b"\"error\"")
    {
        return None;
    }
    let value: Value = serde_json::from_slice(event).ok()?;
    let said = message_of(&value)?;
    Some(Status::new(
        Code::Internal,
        format!("the model server broke off: {said}"),
    ))
}

/// Connections to one server.
struct Server {
    endpoint: Endpoint,
    /// Connections without a request; at most as many as requests at once.
    idle: Mutex<Vec<http1::SendRequest<Full<Bytes>>>>,
    most: usize,
}

/// A request and its answer. Dropping it closes the connection, by which the server learns that nobody
/// waits any more.
struct Exchange {
    server: Arc<Server>,
    sender: Option<http1::SendRequest<Full<Bytes>>>,
    response: Response<Incoming>,
}

impl Server {
    async fn ask(
        self: &Arc<Self>,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Exchange, Status> {
        loop {
            let held = self.idle.lock().pop();
            let is_new = held.is_none();
            let mut sender = match held {
                Some(sender) => sender,
                None => self.connect().await?,
            };
            if !is_new && (sender.is_closed() || sender.ready().await.is_err()) {
                continue;
            }
            let path = format!("{}{path}", self.endpoint.prefix);
            let mut request = hyper::Request::builder()
                .method(method.clone())
                .uri(path)
                .header(hyper::header::HOST, self.endpoint.authority())
                .header(hyper::header::CONTENT_TYPE, "application/json");
            if let Some(authorization) = &self.endpoint.authorization {
                request = request.header(hyper::header::AUTHORIZATION, authorization);
            }
            for (name, value) in headers.iter().filter(|(_, value)| !value.is_empty()) {
                request = request.header(*name, *value);
            }
            let request = request.body(Full::new(body.clone())).map_err(|error| {
                Status::new(Code::InvalidArgument, format!("the request: {error}"))
            })?;
            match sender.try_send_request(request).await {
                Ok(response) => {
                    return Ok(Exchange {
                        server: Arc::clone(self),
                        sender: Some(sender),
                        response,
                    });
                }
                // The server closed an idle connection, and nothing of the request was sent on it:
                // then the request comes back, and another connection is tried.
                Err(mut error) => {
                    if !is_new && error.take_message().is_some() {
                        continue;
                    }
                    let error = error.into_error();
                    return Err(self.endpoint.unreachable(&error.to_string()));
                }
            }
        }
    }

    async fn connect(&self) -> Result<http1::SendRequest<Full<Bytes>>, Status> {
        let stream = self.endpoint.connect().await?;
        let handshake = http1::handshake(stream).await;
        let (sender, connection) =
            handshake.map_err(|error| self.endpoint.unreachable(&error.to_string()))?;
        // It ends with its sender, or with an answer that nobody reads.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a model server ended");
            }
        });
        Ok(sender)
    }

    fn broken(&self, why: &str) -> Status {
        Status::new(
            Code::Unavailable,
            format!("the model server {} broke off: {why}", self.endpoint.url),
        )
    }
}

impl Exchange {
    /// The next bytes of the answer.
    async fn chunk(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            match self.response.body_mut().frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(self.server.broken(&error.to_string())),
            }
        }
    }

    /// The rest of the answer, of up to `limit` bytes.
    async fn body(&mut self, limit: usize) -> Result<Bytes, Status> {
        let body = Limited::new(self.response.body_mut(), limit)
            .collect()
            .await;
        let body = body.map_err(|error| self.server.broken(&error.to_string()))?;
        self.put_back();
        Ok(body.to_bytes())
    }

    /// Reads what little is left, so that the connection serves another request.
    async fn reuse(&mut self) {
        let rest = Limited::new(self.response.body_mut(), REFUSAL).collect();
        let rest = tokio::time::timeout(Duration::from_millis(100), rest).await;
        if matches!(rest, Ok(Ok(_))) {
            self.put_back();
        }
    }

    fn put_back(&mut self) {
        if let Some(sender) = self.sender.take() {
            let mut idle = self.server.idle.lock();
            if idle.len() < self.server.most {
                idle.push(sender);
            }
        }
    }
}
