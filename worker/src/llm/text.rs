//! Tokens' bytes as text for the requester: whole characters only, and nothing of a stop sequence. Pure.

use std::mem;

#[cfg(test)]
mod tests;

/// The text of one answer, as it comes in.
#[derive(Debug)]
pub(crate) struct Text {
    stops: Vec<String>,
    /// The beginning of a character.
    unread: Vec<u8>,
    /// Text that may be the beginning of a stop sequence.
    held: String,
}

/// What may be told after some bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// This, and there may be more. May be empty.
    More(String),
    /// This, and nothing after it: a stop sequence follows.
    Last(String),
}

impl Text {
    /// Ends before the first of `stops` to be complete, none of which is empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Text {
            stops,
            unread: Vec::new(),
            held: String::new(),
        }
    }

    /// Takes bytes in, and gives what is sure to be part of the answer.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Piece {
        self.unread.extend_from_slice(bytes);
        let seen = self.held.len();
        let unread = mem::take(&mut self.unread);
        self.unread = read(&unread, &mut self.held);
        self.release(seen)
    }

    /// What was held back, now that nothing follows. Half a character becomes a replacement character.
    pub(crate) fn finish(mut self) -> String {
        let seen = self.held.len();
        self.held.push_str(&String::from_utf8_lossy(&self.unread));
        match self.release(seen) {
            Piece::Last(text) => text,
            Piece::More(text) => text + &self.held,
        }
    }

    /// Takes out of `held` what is no beginning of a stop sequence. Up to `seen` it was looked at before.
    fn release(&mut self, seen: usize) -> Piece {
        // A stop sequence that is complete only now ends behind what was seen.
        let ends = |stop: &String| {
            let from = (seen + 1).saturating_sub(stop.len());
            let held = self.held.as_bytes();
            let mut windows = held.get(from..)?.windows(stop.len());
            let start = from + windows.position(|window| window == stop.as_bytes())?;
            Some((start + stop.len(), start))
        };
        // The first to be complete; of those that end together the longest.
        if let Some((_, start)) = self.stops.iter().filter_map(ends).min() {
            self.held.truncate(start);
            return Piece::Last(mem::take(&mut self.held));
        }
        let begins = |stop: &String| {
            let longest = stop.len().saturating_sub(1).min(self.held.len());
            (1..=longest)
                .rev()
                .find(|&length| self.held.as_bytes().ends_with(&stop.as_bytes()[..length]))
        };
        let kept = self.stops.iter().filter_map(begins).max().unwrap_or(0);
        // It begins where a stop sequence does, which is where a character does.
        let rest = self.held.split_off(self.held.len() - kept);
        Piece::More(mem::replace(&mut self.held, rest))
    }
}

/// Appends the characters in `bytes` to `text`, and gives the beginning of one that is not whole yet. What is
/// no character becomes a replacement character.
fn read(mut bytes: &[u8], text: &mut String) -> Vec<u8> {
    loop {
        match str::from_utf8(bytes) {
            Ok(rest) => {
                text.push_str(rest);
                return Vec::new();
            }
            Err(error) => {
                let (good, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(good));
                match error.error_len() {
                    None => return rest.to_vec(),
                    Some(length) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        bytes = &rest[length..];
                    }
                }
            }
        }
    }
}
