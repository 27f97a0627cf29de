//! An engine that asks a server of the Open Inference Protocol over gRPC: Triton, KServe, MLServer.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use selvedge_client::{Code, Status, Tensor, TensorSpec};
use selvedge_proto::elements::from_contents;
use selvedge_proto::inference::{decode_tensors, encode_tensors};
use selvedge_proto::open_inference as oip;
use selvedge_proto::open_inference::infer_parameter::ParameterChoice;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic_prost::ProstCodec;
use tonic_prost::prost::Message;

use super::{Endpoint, LARGEST, Sign, UpstreamError, Watched};
use crate::config::UpstreamConfig;
use crate::engine::{Answering, Capacity, Engine, Reply, Request};

#[cfg(test)]
mod tests;

/// Time between two looks at a server that is not there yet, while it is waited for at the start.
const AGAIN: Duration = Duration::from_millis(250);

/// Time that a question about readiness may take.
const POLL: Duration = Duration::from_secs(5);

/// A model of a server elsewhere.
pub struct OpenInference {
    channel: Channel,
    model: String,
    version: String,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    watched: Arc<Watched>,
    _polling: AbortOnDropHandle<()>,
}

impl OpenInference {
    /// Connects, asks what the model takes, and looks after the server from then on. Waits up to
    /// `time` for the model to be ready.
    ///
    /// # Errors
    /// The configuration is no good, or the model is not ready in time.
    pub async fn load(
        config: &UpstreamConfig,
        slots: u32,
        time: Duration,
    ) -> Result<Arc<Self>, UpstreamError> {
        let channel = Channel::new(Endpoint::new(config, b"h2")?);
        let until = Instant::now() + time;
        let metadata = loop {
            let last = match channel.describe(config).await {
                Ok(metadata) => break metadata,
                Err(status) => status,
            };
            if Instant::now() + AGAIN > until {
                return Err(UpstreamError::NotReady {
                    url: config.url.clone(),
                    model: config.model.clone(),
                    time,
                    last: Box::new(last),
                });
            }
            tokio::time::sleep(AGAIN).await;
        };
        let watched = Arc::new(Watched::new(slots));
        watched.see(Sign::Ready);
        let specs = |list: Vec<oip::model_metadata_response::TensorMetadata>| {
            let list = list.into_iter().map(|tensor| TensorSpec {
                name: tensor.name,
                datatype: tensor.datatype,
                shape: tensor.shape,
            });
            list.collect()
        };
        let polling = poll(channel.clone(), config.clone(), Arc::downgrade(&watched));
        Ok(Arc::new(Self {
            channel,
            model: config.model.clone(),
            version: config.version.clone(),
            inputs: specs(metadata.inputs),
            outputs: specs(metadata.outputs),
            watched,
            _polling: AbortOnDropHandle::new(tokio::spawn(polling)),
        }))
    }

    async fn ask(&self, request: Request) -> Result<Bytes, Status> {
        let deadline = request.deadline;
        let message = to_proto(&self.model, &self.version, request)?;
        let answer: oip::ModelInferResponse =
            self.channel.call("ModelInfer", message, deadline).await?;
        from_proto(answer)
    }
}

impl Engine for OpenInference {
    fn inputs(&self) -> Vec<TensorSpec> {
        self.inputs.clone()
    }

    fn outputs(&self) -> Vec<TensorSpec> {
        self.outputs.clone()
    }

    fn capacity(&self) -> watch::Receiver<Capacity> {
        self.watched.subscribe()
    }

    fn answer(self: Arc<Self>, request: Request, reply: Reply) -> Answering {
        Box::pin(async move {
            let answer = self.ask(request).await;
            let outcome = answer.as_ref().map(|_| ()).map_err(Clone::clone);
            self.watched.see_outcome(&outcome);
            Ok(reply.send(answer?).await?)
        })
    }
}

async fn poll(channel: Channel, config: UpstreamConfig, watched: Weak<Watched>) {
    let mut ticks = tokio::time::interval(config.poll);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let ready = channel.is_ready(&config).await;
        let Some(watched) = watched.upgrade() else {
            return;
        };
        watched.see(match ready {
            Ok(true) => Sign::Ready,
            Ok(false) | Err(_) => Sign::NotReady,
        });
    }
}

/// A request as the server reads it: contents raw.
fn to_proto(
    model: &str,
    version: &str,
    request: Request,
) -> Result<oip::ModelInferRequest, Status> {
    let tensors = decode_tensors(request.payload).map_err(|error| {
        Status::new(
            Code::InvalidArgument,
            format!("the request is no tensors: {error}"),
        )
    })?;
    let mut raw_input_contents = Vec::with_capacity(tensors.len());
    let mut inputs = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        raw_input_contents.push(tensor.data);
        inputs.push(oip::model_infer_request::InferInputTensor {
            name: tensor.name,
            datatype: tensor.datatype,
            shape: tensor.shape,
            ..Default::default()
        });
    }
    let parameters = request.parameters.into_iter();
    let parameters = parameters.map(|(name, value)| {
        // Servers take this one as a number only.
        let choice = match (name.as_str(), value.parse()) {
            ("priority", Ok(number)) => ParameterChoice::Uint64Param(number),
            _ => ParameterChoice::StringParam(value),
        };
        let parameter_choice = Some(choice);
        (name, oip::InferParameter { parameter_choice })
    });
    Ok(oip::ModelInferRequest {
        model_name: model.to_owned(),
        model_version: version.to_owned(),
        id: request.id,
        parameters: parameters.collect(),
        inputs,
        outputs: Vec::new(),
        raw_input_contents,
    })
}

/// The tensors of an answer, with raw contents or typed ones.
fn from_proto(answer: oip::ModelInferResponse) -> Result<Bytes, Status> {
    let broken =
        |why: String| Status::new(Code::Internal, format!("the model server's answer: {why}"));
    let raw = !answer.raw_output_contents.is_empty();
    if raw && answer.raw_output_contents.len() != answer.outputs.len() {
        return Err(broken(format!(
            "expected contents of {} outputs, found {}",
            answer.outputs.len(),
            answer.raw_output_contents.len()
        )));
    }
    let mut contents = answer.raw_output_contents.into_iter();
    let mut tensors = Vec::with_capacity(answer.outputs.len());
    for output in answer.outputs {
        let data = match contents.next() {
            Some(raw) => raw,
            None => from_contents(&output.datatype, output.contents.unwrap_or_default())
                .map_err(|error| broken(format!("output {:?}: {error}", output.name)))?,
        };
        tensors.push(Tensor {
            name: output.name,
            datatype: output.datatype,
            shape: output.shape,
            data,
        });
    }
    Ok(encode_tensors(tensors))
}

/// One HTTP/2 connection to a server, made anew when it is lost.
#[derive(Clone)]
struct Channel {
    endpoint: Arc<Endpoint>,
    sender: Arc<tokio::sync::Mutex<Option<http2::SendRequest<Body>>>>,
}

impl Channel {
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint: Arc::new(endpoint),
            sender: Arc::default(),
        }
    }

    async fn describe(
        &self,
        config: &UpstreamConfig,
    ) -> Result<oip::ModelMetadataResponse, Status> {
        if !self.is_ready(config).await? {
            let message = format!("the model {} is not ready", config.model);
            return Err(Status::new(Code::Unavailable, message));
        }
        let asked = oip::ModelMetadataRequest {
            name: config.model.clone(),
            version: config.version.clone(),
        };
        self.call("ModelMetadata", asked, Instant::now() + POLL)
            .await
    }

    async fn is_ready(&self, config: &UpstreamConfig) -> Result<bool, Status> {
        let asked = oip::ModelReadyRequest {
            name: config.model.clone(),
            version: config.version.clone(),
        };
        let answer: oip::ModelReadyResponse = self
            .call("ModelReady", asked, Instant::now() + POLL)
            .await?;
        Ok(answer.ready)
    }

    /// Makes one call. Dropping the future resets it.
    async fn call<Q, A>(&self, method: &str, message: Q, deadline: Instant) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let calling = async {
            let sender = self.sender().await?;
            let mut grpc = tonic::client::Grpc::new(Sender {
                endpoint: Arc::clone(&self.endpoint),
                sender,
            })
            .max_decoding_message_size(LARGEST);
            let path = format!("/inference.GRPCInferenceService/{method}");
            let path = path.parse().map_err(|_| {
                Status::new(Code::Internal, format!("{path} is no path of a method"))
            })?;
            let mut request = tonic::Request::new(message);
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
            if let Some(value) = &self.endpoint.authorization
                && let Ok(value) = value.parse()
            {
                request.metadata_mut().insert("authorization", value);
            }
            grpc.ready()
                .await
                .map_err(|error| self.endpoint.unreachable(&error.to_string()))?;
            let answer = grpc.unary(request, path, ProstCodec::default()).await;
            answer
                .map(tonic::Response::into_inner)
                .map_err(|status| of_tonic(&status))
        };
        match tokio::time::timeout_at(deadline, calling).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::new(
                Code::DeadlineExceeded,
                format!(
                    "the model server {} did not answer in time",
                    self.endpoint.url
                ),
            )),
        }
    }

    async fn sender(&self) -> Result<http2::SendRequest<Body>, Status> {
        let mut held = self.sender.lock().await;
        if let Some(sender) = held.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = self.endpoint.connect().await?;
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(20))
            .adaptive_window(true);
        let handshake = tokio::time::timeout(POLL, builder.handshake(stream)).await;
        let (sender, connection) = match handshake {
            Ok(Ok(made)) => made,
            Ok(Err(error)) => return Err(self.endpoint.unreachable(&error.to_string())),
            Err(_) => return Err(self.endpoint.unreachable("no HTTP/2 there")),
        };
        // It ends with the last of its senders.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a model server ended");
            }
        });
        *held = Some(sender.clone());
        Ok(sender)
    }
}

/// A status of the server. That it does not let this worker in is not the requester's doing.
fn of_tonic(status: &tonic::Status) -> Status {
    let code = match Code::from_number(status.code() as i32) {
        Code::Unauthenticated | Code::PermissionDenied => Code::Internal,
        code => code,
    };
    Status::new(
        code,
        format!("the model server answered: {}", status.message()),
    )
}

/// One connection, as tonic asks for it.
struct Sender {
    endpoint: Arc<Endpoint>,
    sender: http2::SendRequest<Body>,
}

impl tower_service::Service<hyper::Request<Body>> for Sender {
    type Response = hyper::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, mut request: hyper::Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let (scheme, authority) = (self.endpoint.scheme(), self.endpoint.authority());
        // HTTP/2 asks for scheme and authority, which tonic leaves to its own transport.
        if let Ok(uri) = format!("{scheme}://{authority}{path}").parse() {
            *request.uri_mut() = uri;
        }
        Box::pin(self.sender.send_request(request))
    }
}
