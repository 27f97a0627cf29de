//! The inference worker: the `Model` trait, the ONNX engine, and the loop that answers a broker.

pub mod config;
pub mod model;
pub mod onnx;
mod worker;

pub use config::{ConfigError, WorkerConfig};
pub use model::Model;
pub use onnx::OnnxModel;
pub use worker::{DEFAULT_DRAIN, ModelSpec, StartError, Worker, WorkerOptions, WorkerStats};
