//! What the benchmarks share: the broker's storage workload, and the engines that could carry it.

pub mod engine;
pub mod workload;
