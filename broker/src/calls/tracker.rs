//! Follows the frames of a response without holding them: where it may be cut, and how it ended.

use bytes::BytesMut;
use prost::Message as _;
use selvedge_proto::frame::{self, FrameError, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;

#[cfg(test)]
mod tests;

/// Reads along with a response that is passed on.
#[derive(Debug)]
pub(crate) struct ResponseTracker {
    limit: usize,
    /// Bytes of a frame head that is not whole yet.
    head: BytesMut,
    /// Bytes of the current frame's body still to come.
    remaining: usize,
    kind: Kind,
    /// Body of a STATUS frame.
    status: BytesMut,
    ended: Option<Status>,
}

impl ResponseTracker {
    /// For a response whose payload frames are at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            head: BytesMut::new(),
            remaining: 0,
            kind: Kind::DATA,
            status: BytesMut::new(),
            ended: None,
        }
    }

    /// Follows more bytes of the response.
    ///
    /// # Errors
    /// The bytes are no frames; the response cannot be passed on.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            if self.remaining == 0 {
                self.head.extend_from_slice(&bytes[..1]);
                bytes = &bytes[1..];
                let Some(head) = frame::peek(&self.head, self.limit)? else {
                    continue;
                };
                self.head.clear();
                self.remaining = head.body;
                self.kind = head.kind;
            } else {
                let take = self.remaining.min(bytes.len());
                if self.kind == Kind::STATUS {
                    self.status.extend_from_slice(&bytes[..take]);
                }
                self.remaining -= take;
                bytes = &bytes[take..];
            }
            if self.remaining == 0 && self.kind == Kind::STATUS && self.ended.is_none() {
                let status =
                    wire::Status::decode(self.status.split().freeze()).map_err(|error| {
                        FrameError::Malformed {
                            what: "status",
                            reason: error.to_string(),
                        }
                    })?;
                self.ended = Some(status.into());
            }
        }
        Ok(())
    }

    /// Whether a frame may begin here.
    pub(crate) fn is_at_boundary(&self) -> bool {
        self.remaining == 0 && self.head.is_empty()
    }

    /// The status that ended the response, once it has passed.
    pub(crate) fn ended(&self) -> Option<&Status> {
        self.ended.as_ref()
    }

    /// The code of [`Self::ended`].
    pub(crate) fn code(&self) -> Option<Code> {
        self.ended.as_ref().map(|status| status.code)
    }
}
