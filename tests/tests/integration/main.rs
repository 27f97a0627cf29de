//! The fabric as its users see it: each test makes its own authority, broker and clients, and tells
//! one story.

#![allow(clippy::unwrap_used)]

mod sim;
