//! Benchmarks: this broker beside its peers, and the engines that could carry its store.

#[cfg(target_os = "linux")]
pub mod compare;
#[cfg(feature = "store")]
pub mod engine;
#[cfg(target_os = "linux")]
pub mod infer;
pub mod placement;
#[cfg(feature = "store")]
pub mod workload;
