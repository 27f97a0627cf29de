//! The inference worker: the `Model` trait, the ONNX engine, and the loop that answers a broker.

pub mod model;
pub mod onnx;
