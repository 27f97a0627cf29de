//! The Selvedge device library: publish, subscribe, call, serve and infer over one connection that
//! is authenticated both ways, encrypted, and restored by itself when the network fails.
//!
//! A [`Client`] is a cheap handle. Behind it one task owns the connection: it reconnects with
//! back-off, puts subscriptions and registrations back in place, and sends unacknowledged QoS 1
//! messages again. An application never writes retry code.

mod ack;
mod backoff;
mod call;
mod client;
mod control;
mod datagram;
mod delivery;
mod driver;
mod exchange;
mod framed;
mod infer;
mod lane;
mod options;
mod outbox;
mod publish;
mod receipts;
mod serve;
mod state;
mod stats;
mod subscription;
mod sync;
mod work;

pub use backoff::Backoff;
pub use bytes::Bytes;
pub use selvedge_certs::{Credentials, Identity, ReloadableCredentials, TrustAnchors};
pub use selvedge_proto::inference::{Preference, Residency, Tensor, TensorSpec, Tier};
pub use selvedge_proto::message::{Class, Durability, Properties, Qos};
pub use selvedge_proto::status::{Code, Denial, Status};
pub use selvedge_proto::topic::{SubscribeTarget, TopicError, TopicFilter, TopicName};

pub use call::{Call, CallError, CallReceiver, CallSender, CallStream};
pub use client::Client;
pub use driver::ConnectError;
pub use infer::{Answer, Infer, InferStream, Inference};
pub use options::{Options, OptionsError, Reconnect, Will};
pub use publish::{FlushError, IntoTopic, Publish, PublishAck, PublishError};
pub use serve::{IncomingCall, Responder, ServeError, ServeOptions};
pub use state::State;
pub use stats::ClientStats;
pub use subscription::{
    Message, Overflow, Replay, RetainHandling, SubscribeError, SubscribeOptions, Subscription,
};
pub use work::{
    AnswerInfo, IncomingInference, LoadReport, ModelRegistration, WorkError, WorkerHandle,
};
