//! The `selvedge` binary as people and scripts use it: arguments in, output and exit code out.
#![allow(clippy::unwrap_used)]

#[cfg(target_os = "linux")]
mod bench;
#[cfg(target_os = "linux")]
mod bridge_soak;
mod certs;
mod config;
mod crash;
mod demo;
mod dev;
mod explain;
mod program;
mod services;
#[cfg(target_os = "linux")]
mod soak;
mod store;
