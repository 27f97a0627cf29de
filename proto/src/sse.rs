//! Server-sent events: the data of each, out of bytes that come in pieces.

use bytes::{Bytes, BytesMut};

#[cfg(test)]
mod tests;

/// An event is longer than may be buffered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is over {0} bytes")]
pub struct TooLong(usize);

/// Cuts a stream into events.
#[derive(Debug)]
pub struct Events {
    /// The line that is not whole yet.
    line: BytesMut,
    /// What of `line` is known to have no end.
    searched: usize,
    /// The data of the event that is not whole yet.
    data: BytesMut,
    has_data: bool,
    /// The last line ended with a carriage return, and a line feed that follows belongs to it.
    after_return: bool,
    limit: usize,
}

impl Events {
    /// For events of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            line: BytesMut::new(),
            searched: 0,
            data: BytesMut::new(),
            has_data: false,
            after_return: false,
            limit,
        }
    }

    /// Adds bytes that came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.line.extend_from_slice(bytes);
    }

    /// The data of the next whole event, or `None` when more bytes are needed. Comments, and events
    /// without data, are skipped.
    ///
    /// # Errors
    /// An event is too long; the stream cannot be read further.
    pub fn next_event(&mut self) -> Result<Option<Bytes>, TooLong> {
        loop {
            if self.after_return && !self.line.is_empty() {
                self.after_return = false;
                if self.line[0] == b'\n' {
                    let _ = self.line.split_to(1);
                }
            }
            let end = self.line[self.searched..]
                .iter()
                .position(|&byte| byte == b'\n' || byte == b'\r');
            let Some(end) = end.map(|end| end + self.searched) else {
                self.searched = self.line.len();
                if self.line.len() + self.data.len() > self.limit {
                    return Err(TooLong(self.limit));
                }
                return Ok(None);
            };
            let line = self.line.split_to(end);
            self.searched = 0;
            self.after_return = self.line.split_to(1)[0] == b'\r';
            if line.is_empty() {
                if std::mem::take(&mut self.has_data) {
                    return Ok(Some(self.data.split().freeze()));
                }
                continue;
            }
            // Other fields say nothing that is needed here.
            let Some(value) = line.strip_prefix(b"data").and_then(|rest| match rest {
                [] => Some(rest),
                [b':', b' ', rest @ ..] | [b':', rest @ ..] => Some(rest),
                _ => None,
            }) else {
                continue;
            };
            if self.has_data {
                self.data.extend_from_slice(b"\n");
            }
            self.has_data = true;
            self.data.extend_from_slice(value);
            if self.data.len() > self.limit {
                return Err(TooLong(self.limit));
            }
        }
    }
}
