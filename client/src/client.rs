//! The handle that an application holds.

use bytes::Bytes;
use selvedge_certs::Identity;
use tokio::sync::watch;

use crate::call::{Call, CallError, CallStream};
use crate::driver::ConnectError;
use crate::infer::{Infer, InferStream, Inference};
use crate::options::Options;
use crate::publish::{FlushError, IntoTopic, Publish, PublishAck, PublishError};
use crate::serve::{Responder, ServeError, ServeOptions};
use crate::state::State;
use crate::stats::ClientStats;
use crate::subscription::{SubscribeError, SubscribeOptions, Subscription};
use crate::work::{ModelRegistration, WorkError, WorkerHandle};

/// A connection to a broker that restores itself. Clones are cheap and share it; it is closed when
/// the last clone, subscription, responder and worker handle is dropped.
#[derive(Debug, Clone)]
pub struct Client {}

impl Client {
    /// Connects, and returns once the broker has welcomed the client. Attempts that nobody answers
    /// are repeated within [`Options::connect_timeout`].
    ///
    /// # Errors
    /// A refusal is returned at once with the broker's reason.
    pub async fn connect(_options: Options) -> Result<Self, ConnectError> {
        todo!()
    }

    /// What the connection is doing, now and in future.
    pub fn state(&self) -> watch::Receiver<State> {
        todo!()
    }

    /// The client's own identity.
    pub fn identity(&self) -> &Identity {
        todo!()
    }

    /// Publishes with QoS 0; returns when the message is queued, and waits for room if need be.
    ///
    /// While disconnected, messages are queued for the next connection as far as
    /// [`Options::outbox_bytes`] goes. A refusal is reported by later publishes to the same topic,
    /// and by [`Self::flush`].
    ///
    /// # Errors
    /// As [`PublishError`].
    pub async fn publish(
        &self,
        _topic: impl IntoTopic,
        _payload: impl Into<Bytes>,
    ) -> Result<(), PublishError> {
        todo!()
    }

    /// Publishes a message. With QoS 1 it returns when the broker has it as safe as demanded,
    /// across reconnects if need be; giving up the wait does not take the message back. With QoS 0
    /// it is as [`Self::publish`].
    ///
    /// # Errors
    /// As [`PublishError`].
    pub async fn publish_message(&self, _message: Publish) -> Result<PublishAck, PublishError> {
        todo!()
    }

    /// Waits until the broker has processed everything published before.
    ///
    /// # Errors
    /// [`FlushError::Refused`] when QoS 0 messages before it were refused.
    pub async fn flush(&self) -> Result<(), FlushError> {
        todo!()
    }

    /// Subscribes to a topic filter, or to `$share/<group>/<filter>`. Returns when the broker has
    /// accepted; while disconnected that is after the reconnect.
    ///
    /// # Errors
    /// As [`SubscribeError`].
    pub async fn subscribe(&self, _filter: &str) -> Result<Subscription, SubscribeError> {
        todo!()
    }

    /// Subscribes as told.
    ///
    /// # Errors
    /// As [`SubscribeError`].
    pub async fn subscribe_with(
        &self,
        _filter: &str,
        _options: SubscribeOptions,
    ) -> Result<Subscription, SubscribeError> {
        todo!()
    }

    /// Calls a service: one message each way, within 30 s.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn call(
        &self,
        _service: &str,
        _request: impl Into<Bytes>,
    ) -> Result<Bytes, CallError> {
        todo!()
    }

    /// Makes a call with one message each way; one that is idempotent is made again when the
    /// connection is lost, as long as the deadline allows.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn request(&self, _call: Call) -> Result<Bytes, CallError> {
        todo!()
    }

    /// Makes a call that streams both ways.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn call_with(&self, _call: Call) -> Result<CallStream, CallError> {
        todo!()
    }

    /// Registers a service that this client answers.
    ///
    /// # Errors
    /// As [`ServeError`].
    pub async fn serve(&self, _service: &str) -> Result<Responder, ServeError> {
        todo!()
    }

    /// Registers a service as told.
    ///
    /// # Errors
    /// As [`ServeError`].
    pub async fn serve_with(
        &self,
        _service: &str,
        _options: ServeOptions,
    ) -> Result<Responder, ServeError> {
        todo!()
    }

    /// Asks for an inference and waits for the whole answer.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn infer(&self, _request: Infer) -> Result<Inference, CallError> {
        todo!()
    }

    /// Asks for an inference and returns when the answer begins.
    ///
    /// # Errors
    /// As [`CallError`].
    pub async fn infer_stream(&self, _request: Infer) -> Result<InferStream, CallError> {
        todo!()
    }

    /// Registers a model that this client runs.
    ///
    /// # Errors
    /// As [`WorkError`].
    pub async fn work(&self, _registration: ModelRegistration) -> Result<WorkerHandle, WorkError> {
        todo!()
    }

    /// Counters since the client was made.
    pub fn stats(&self) -> ClientStats {
        todo!()
    }

    /// Sends what is queued, says goodbye and closes, for every clone. Takes a few seconds at most.
    pub async fn close(&self) {
        todo!()
    }
}
