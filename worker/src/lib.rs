//! The inference worker: the `Model` and `Engine` traits, the ONNX engine, small language models (feature
//! `llm`), adapters to model servers elsewhere, and the loop that answers a broker.

pub mod batch;
pub mod config;
pub mod engine;
#[cfg(feature = "llm")]
pub mod llm;
mod load;
pub mod model;
pub mod onnx;
pub mod upstream;
mod worker;

pub use batch::Batched;
pub use config::{ConfigError, WorkerConfig};
pub use engine::Engine;
#[cfg(feature = "llm")]
pub use llm::Llm;
pub use model::Model;
pub use onnx::OnnxModel;
pub use worker::{DEFAULT_DRAIN, ModelSpec, StartError, Worker, WorkerOptions, WorkerStats};
