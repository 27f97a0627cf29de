//! The `Engine` trait: what answers requests in its own time, such as a server elsewhere or a model that
//! streams.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use selvedge_client::{Status, TensorSpec};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Messages of one answer that wait to be sent. When there are more, the engine waits.
pub(crate) const MESSAGES: usize = 4;

/// Datatype of an input that is no tensor but the JSON of an operation of the OpenAI API, which is then
/// the input's name: `chat.completions`, `completions` or `embeddings`.
pub const JSON: &str = "JSON";

/// The parameter of a request that names its operation of the OpenAI API.
pub const OPERATION: &str = "operation";

/// An answer that is under way.
pub type Answering = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// Something that answers requests as they come in, without a thread for each.
///
/// A request's payload and the messages of its answer are tensors as `selvedge_proto::inference`
/// encodes them, or the JSON of the OpenAI API: the request object, and one object for each message.
pub trait Engine: Send + Sync + 'static {
    /// What it takes, as it is registered.
    fn inputs(&self) -> Vec<TensorSpec>;

    /// What it gives.
    fn outputs(&self) -> Vec<TensorSpec>;

    /// What it can take, now and as it changes. The worker passes it on to the broker.
    fn capacity(&self) -> watch::Receiver<Capacity>;

    /// Whether it answers the same request with the same messages as every other worker of this version
    /// that says so, lots drawn by the request's id: one may then go on where another was lost.
    fn continues(&self) -> bool {
        false
    }

    /// Answers one request. The future is dropped when nobody waits for the answer any more, and has
    /// to stop all work for it then.
    fn answer(self: Arc<Self>, request: Request, reply: Reply) -> Answering;
}

/// What an engine can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Requests at once; what the configuration grants bounds it. Zero takes it out of the choice.
    pub slots: u32,
    /// It can answer without loading first.
    pub loaded: bool,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names the request.
    pub id: String,
    /// Tensors, or JSON.
    pub payload: Bytes,
    /// What the requester says besides.
    pub parameters: Vec<(String, String)>,
    /// When the requester stops waiting.
    pub deadline: Instant,
    /// W3C trace context of the requester; empty when not given.
    pub traceparent: String,
}

impl Request {
    /// The value of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let mut parameters = self.parameters.iter();
        parameters
            .find(|(held, _)| held == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Where the messages of an answer go.
#[derive(Clone, Debug)]
pub struct Reply(pub(crate) mpsc::Sender<Bytes>);

/// Nobody waits for the answer any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody waits for the answer any more")]
pub struct Gone;

impl From<Gone> for Status {
    fn from(gone: Gone) -> Self {
        Status::new(selvedge_client::Code::Cancelled, gone.to_string())
    }
}

impl Reply {
    /// Sends one message, no faster than the requester takes them.
    ///
    /// # Errors
    /// Nobody waits for it any more.
    pub async fn send(&self, message: impl Into<Bytes>) -> Result<(), Gone> {
        self.0.send(message.into()).await.map_err(|_| Gone)
    }

    /// As [`Self::send`], from a blocking thread.
    ///
    /// # Errors
    /// Nobody waits for it any more.
    pub fn blocking_send(&self, message: impl Into<Bytes>) -> Result<(), Gone> {
        self.0.blocking_send(message.into()).map_err(|_| Gone)
    }
}
