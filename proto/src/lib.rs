//! The wire protocol `selvedge/1`, without I/O: messages, frame codec, lanes, topic names and filters.
//!
//! docs/protocol.md is the specification; this crate is its reference implementation. Bytes go in
//! and values come out; nothing here opens a socket, reads a clock or blocks.

pub mod datagram;
#[cfg(feature = "open-inference")]
pub mod elements;
pub mod frame;
pub mod inference;
pub mod lane;
pub mod message;
#[cfg(feature = "open-inference")]
pub mod sse;
pub mod status;
pub mod topic;

/// The prost messages of `proto/selvedge.proto`, one to one with the wire.
#[allow(missing_docs, clippy::all, unreachable_pub, rustdoc::all)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/selvedge.v1.rs"));
}

/// The prost messages of the Open Inference Protocol v2, as in `proto/open_inference.proto`.
#[cfg(feature = "open-inference")]
#[allow(missing_docs, clippy::all, unreachable_pub, rustdoc::all)]
pub mod open_inference {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

/// Revision of `selvedge/1` that this crate speaks.
pub const REVISION: u32 = 1;

/// ALPN protocol name of native connections.
pub const ALPN: &[u8] = b"selvedge/1";

/// Largest UDP payload, in bytes, that either side takes and, where the path allows it, sends. With IP and
/// UDP headers such a packet needs a path of 6,598 bytes; a path of 1,500 has packets of about 1,450.
///
/// A QUIC implementation hands up to ten packets of one size to the kernel at once (UDP segmentation
/// offload), and ten of these are what one UDP send may hold: 65,507 bytes.
pub const MAX_UDP_PAYLOAD: u16 = 6_550;

/// The search for the largest packet of a path ends when its steps are smaller than this, in bytes. Each
/// step is a packet, and three where it fails; a path of 1,500 bytes still ends at 1,449.
pub const UDP_PAYLOAD_STEP: u16 = 64;

/// Smallest UDP payload that a QUIC path must allow, in bytes (RFC 9000 section 14).
pub const MIN_UDP_PAYLOAD: u16 = 1_200;

/// Largest header frame (everything but message and data frames) that either side accepts, in bytes.
///
/// A topic has up to 65,535 bytes. The largest frame names it twice and says why it is denied.
pub const MAX_HEADER_FRAME: usize = 256 * 1024;

/// Smallest limit that either side may set for message and data frames, in bytes.
pub const MIN_MAX_FRAME: usize = 64 * 1024;

/// Frame limit offered in `Hello` and `Welcome` unless configured otherwise, in bytes.
pub const DEFAULT_MAX_FRAME: usize = 16 * 1024 * 1024;

/// Name of a session within its identity: at most this many bytes.
pub const MAX_SESSION_NAME: usize = 128;
