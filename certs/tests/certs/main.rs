//! Tests of the public interface: issuing, explaining, refusing, reloading.

#![allow(clippy::unwrap_used)]

mod authority;
mod hostile;
mod pki;
mod quic;
mod revocation;
mod tcp;
