//! What a client can ask to do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Something a client asks to do with a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Send a message to a topic.
    Publish,
    /// Receive the messages of a topic.
    Subscribe,
    /// Call a service.
    Call,
    /// Answer the calls to a service.
    Serve,
    /// Ask a model for an inference.
    Infer,
    /// Run a model for others.
    Work,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Self; 6] = [
        Self::Publish,
        Self::Subscribe,
        Self::Call,
        Self::Serve,
        Self::Infer,
        Self::Work,
    ];

    /// The verb as policy files write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Call => "call",
            Self::Serve => "serve",
            Self::Infer => "infer",
            Self::Work => "work",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Verb {
    type Err = VerbError;

    fn from_str(text: &str) -> Result<Self, VerbError> {
        Self::ALL
            .into_iter()
            .find(|verb| verb.as_str() == text)
            .ok_or_else(|| VerbError {
                found: text.to_owned(),
            })
    }
}

/// Something that is not a verb.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected one of publish, subscribe, call, serve, infer and work, found {found:?}")]
pub struct VerbError {
    /// What was found.
    pub found: String,
}
