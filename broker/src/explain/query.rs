//! What somebody wants to know about, and which records are about that.

use std::borrow::Cow;

use selvedge_certs::Identity;
use selvedge_proto::topic::TopicFilter;
use serde::{Deserialize, Serialize};

use super::ring::{Fate, Record};
use crate::session::SessionKey;

/// Longest text to ask for, in bytes: the longest topic.
const LONGEST: usize = 65_535;

/// What a query may mean. Without one, everything that fits is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The id of a message.
    Message,
    /// An identity, the last parts of one, or the name of a session.
    Client,
    /// A topic, a filter, a service or a model.
    Topic,
}

/// Why a record was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// The message has this id.
    MessageId,
    /// This client published the message or made the request.
    Publisher,
    /// This client did not get the message.
    Receiver,
    /// It was about this topic, service or model.
    Topic,
}

/// What to look for.
#[derive(Debug, Clone)]
pub struct Query {
    text: Box<str>,
    id: Box<[u8]>,
    filter: Option<TopicFilter>,
    kind: Option<Kind>,
}

/// Nothing can be looked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// It is empty or endless.
    #[error("query of {found} bytes: expected 1 to {LONGEST}")]
    Length {
        /// Bytes found.
        found: usize,
    },
    /// It was said to be a topic.
    #[error("expected a topic: {0}")]
    Topic(#[from] selvedge_proto::topic::TopicError),
}

impl Query {
    /// Reads a query: a message id as text or as `hex:…`, a client or a topic.
    ///
    /// # Errors
    /// It cannot be what it is said to be.
    pub fn new(text: &str, kind: Option<Kind>) -> Result<Self, QueryError> {
        if text.is_empty() || text.len() > LONGEST {
            return Err(QueryError::Length { found: text.len() });
        }
        let filter = match (TopicFilter::parse(text), kind) {
            (Ok(filter), _) => Some(filter),
            (Err(error), Some(Kind::Topic)) => return Err(error.into()),
            (Err(_), _) => None,
        };
        Ok(Self {
            id: text
                .strip_prefix("hex:")
                .and_then(unhex)
                .unwrap_or_else(|| text.as_bytes().into()),
            text: text.into(),
            filter,
            kind,
        })
    }

    /// The id to look for, unless the query means something else.
    pub fn message_id(&self) -> Option<&[u8]> {
        self.may_mean(Kind::Message).then_some(&*self.id)
    }

    /// The topics to look for, unless the query means something else.
    pub fn filter(&self) -> Option<&TopicFilter> {
        self.filter.as_ref().filter(|_| self.may_mean(Kind::Topic))
    }

    /// What the query was said to mean.
    pub fn kind(&self) -> Option<Kind> {
        self.kind
    }

    /// Whether the query names a client: by its whole URI, by the last parts of it, or just its name.
    pub fn names(&self, client: &Identity) -> bool {
        self.may_mean(Kind::Client)
            && (client.uri().strip_suffix(&*self.text))
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
    }

    /// Whether the query names a session or its owner.
    pub fn names_session(&self, session: &SessionKey) -> bool {
        self.names(&session.identity)
            || (self.may_mean(Kind::Client) && *session.name == *self.text)
    }

    /// The records that the query is about, the most recent first, and why.
    pub fn find<'a>(&self, records: &'a [Record]) -> Vec<(&'a Record, Match)> {
        let mut found: Vec<_> = records
            .iter()
            .filter_map(|record| Some((record, self.matches(&record.fate)?)))
            .collect();
        // Records are in the order in which they began.
        found.reverse();
        found.sort_by_key(|(record, _)| std::cmp::Reverse(record.last));
        found
    }

    fn matches(&self, fate: &Fate) -> Option<Match> {
        if self.message_id().is_some() && fate.message_id() == self.message_id() {
            return Some(Match::MessageId);
        }
        if self.names(fate.sender()) {
            return Some(Match::Publisher);
        }
        if fate.receiver().is_some_and(|key| self.names_session(key)) {
            return Some(Match::Receiver);
        }
        let (filter, subject) = (self.filter()?, fate.subject()?);
        // A subscription that was denied says why a message of its topics did not arrive. A single word
        // may well not be a topic, and a filter such as # is about every word there is.
        let is_topic = self.kind.is_some() || filter.levels().nth(1).is_some();
        let about = subject == filter.as_str()
            || (is_topic
                && TopicFilter::parse(subject).is_ok_and(|subject| subject.overlaps(filter)));
        about.then_some(Match::Topic)
    }

    fn may_mean(&self, kind: Kind) -> bool {
        self.kind.is_none_or(|meant| meant == kind)
    }
}

/// A message id as text, or as `hex:…` when it is none.
pub(super) fn printable(id: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(id) {
        Ok(text) if !text.chars().any(char::is_control) => Cow::Borrowed(text),
        _ => {
            let hex = id.iter().map(|byte| format!("{byte:02x}"));
            Cow::Owned(std::iter::once("hex:".to_owned()).chain(hex).collect())
        }
    }
}

fn unhex(text: &str) -> Option<Box<[u8]>> {
    let digits = text.as_bytes();
    if digits.is_empty() || !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    digits
        .chunks(2)
        .map(|pair| u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok())
        .collect()
}
