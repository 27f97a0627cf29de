//! The inference worker: the `Model` and `Engine` traits, the ONNX engine, adapters to model servers
//! elsewhere, and the loop that answers a broker.

pub mod config;
pub mod engine;
pub mod model;
pub mod onnx;
pub mod upstream;
mod worker;

pub use config::{ConfigError, WorkerConfig};
pub use engine::Engine;
pub use model::Model;
pub use onnx::OnnxModel;
pub use worker::{DEFAULT_DRAIN, ModelSpec, StartError, Worker, WorkerOptions, WorkerStats};
