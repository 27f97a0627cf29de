//! Topic names, topic filters and shared subscriptions, as MQTT 5.0 sections 4.7 and 4.8.2 define them.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The longest topic name, topic filter or share group, in bytes of UTF-8.
pub const MAX_TOPIC_BYTES: usize = 65_535;

/// The most levels of a topic name or topic filter; it bounds the depth of every walk over a topic tree.
pub const MAX_TOPIC_LEVELS: usize = 128;

/// The first level that marks a shared subscription, and that no topic name or filter may start with.
pub const SHARE_LEVEL: &str = "$share";

const SEPARATOR: char = '/';
const ONE_LEVEL: &str = "+";
const ALL_LEVELS: &str = "#";

/// The name a message is published to: levels separated by `/`, without wildcards.
///
/// Cloning is cheap. Names compare byte by byte: case matters and nothing is normalised.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicName(Arc<str>);

impl TopicName {
    /// Checks a topic name.
    ///
    /// Fails when it is empty, longer than [`MAX_TOPIC_BYTES`], deeper than [`MAX_TOPIC_LEVELS`],
    /// holds U+0000, `+` or `#`, or starts with the reserved level `$share`.
    pub fn parse(name: impl Into<Arc<str>>) -> Result<Self, TopicError> {
        let name = name.into();
        check_shape(TopicKind::Name, &name)?;
        for (index, level) in name.split(SEPARATOR).enumerate() {
            if let Some(wildcard) = level.chars().find(|c| is_wildcard(*c)) {
                return Err(TopicError::WildcardInName {
                    level: index + 1,
                    wildcard,
                    found: excerpt(level),
                });
            }
        }
        Ok(Self(name))
    }

    /// The name as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The levels from left to right; there is at least one, and any may be empty.
    pub fn levels(&self) -> impl Iterator<Item = &str> + Clone {
        self.0.split(SEPARATOR)
    }

    /// Whether the name starts with `$`, so that no filter starting with a wildcard matches it.
    pub fn is_system(&self) -> bool {
        is_system(&self.0)
    }
}

/// Which topics a subscriber, or a rule, wants: a topic name whose levels may be wildcards.
///
/// `+` stands for exactly one level and `#`, only as the last level, for any number of them,
/// none included: `a/#` matches `a`. A wildcard in the first level matches no topic that starts with `$`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicFilter(Arc<str>);

impl TopicFilter {
    /// Checks a topic filter.
    ///
    /// Fails when it is empty, longer than [`MAX_TOPIC_BYTES`], deeper than [`MAX_TOPIC_LEVELS`],
    /// holds U+0000, has a wildcard that is not a whole level or a `#` before the last level, or
    /// starts with `$share`, which only [`SubscribeTarget`] understands.
    pub fn parse(filter: impl Into<Arc<str>>) -> Result<Self, TopicError> {
        let filter = filter.into();
        check_shape(TopicKind::Filter, &filter)?;
        let levels = filter.split(SEPARATOR).count();
        for (index, level) in filter.split(SEPARATOR).enumerate() {
            match FilterLevel::of(level) {
                FilterLevel::One => {}
                FilterLevel::Rest if index + 1 == levels => {}
                FilterLevel::Rest => {
                    return Err(TopicError::RestNotLast {
                        level: index + 1,
                        levels,
                    });
                }
                FilterLevel::Literal(text) => {
                    if let Some(wildcard) = text.chars().find(|c| is_wildcard(*c)) {
                        return Err(TopicError::PartialWildcard {
                            level: index + 1,
                            wildcard,
                            found: excerpt(text),
                        });
                    }
                }
            }
        }
        Ok(Self(filter))
    }

    /// The filter as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The levels from left to right; there is at least one, and [`FilterLevel::Rest`] can only be the last.
    pub fn levels(&self) -> impl Iterator<Item = FilterLevel<'_>> + Clone {
        self.0.split(SEPARATOR).map(FilterLevel::of)
    }

    /// Whether the filter has no wildcard, and so matches exactly the topic spelled the same.
    pub fn is_literal(&self) -> bool {
        !self.0.contains(is_wildcard)
    }

    /// The one topic a literal filter matches; `None` when the filter has a wildcard.
    pub fn as_topic(&self) -> Option<TopicName> {
        self.is_literal().then(|| TopicName(self.0.clone()))
    }

    /// Whether messages published to `topic` are wanted.
    pub fn matches(&self, topic: &TopicName) -> bool {
        if self.starts_with_wildcard() && topic.is_system() {
            return false;
        }
        let mut names = topic.levels();
        for level in self.levels() {
            match (level, names.next()) {
                (FilterLevel::Rest, _) => return true,
                (FilterLevel::One, Some(_)) => {}
                (FilterLevel::Literal(wanted), Some(name)) if wanted == name => {}
                _ => return false,
            }
        }
        names.next().is_none()
    }

    /// Whether this filter matches every topic that `other` matches.
    pub fn covers(&self, other: &Self) -> bool {
        if self.starts_with_wildcard() && is_system(&other.0) {
            return false;
        }
        let mut wider = self.normalised();
        let mut narrower = other.normalised();
        loop {
            match (wider.next(), narrower.next()) {
                (Some(FilterLevel::Rest), _) | (None, None) => return true,
                // A `#` of the narrower filter wants topics of more than one depth, and only a
                // `#` gives those.
                (_, Some(FilterLevel::Rest)) => return false,
                (Some(FilterLevel::One), Some(_)) => {}
                (Some(FilterLevel::Literal(a)), Some(FilterLevel::Literal(b))) if a == b => {}
                _ => return false,
            }
        }
    }

    /// Whether at least one topic is matched by both filters.
    pub fn overlaps(&self, other: &Self) -> bool {
        if self.starts_with_wildcard() && is_system(&other.0)
            || other.starts_with_wildcard() && is_system(&self.0)
        {
            return false;
        }
        let mut left = self.normalised();
        let mut right = other.normalised();
        // The shortest topic both could match. Two long literals in different levels may
        // ask for one that is longer than a topic can be.
        let mut bytes: usize = 0;
        loop {
            let level = match (left.next(), right.next()) {
                (None, None) => break,
                // What follows is up to the filter that goes on.
                (Some(FilterLevel::Rest), level) | (level, Some(FilterLevel::Rest)) => {
                    let levels = level.into_iter().chain(left).chain(right);
                    bytes += levels.map(FilterLevel::bytes_with_separator).sum::<usize>();
                    break;
                }
                (None, _) | (_, None) => return false,
                (Some(FilterLevel::Literal(a)), Some(FilterLevel::Literal(b))) if a != b => {
                    return false;
                }
                (Some(FilterLevel::One), Some(level)) | (Some(level), Some(_)) => level,
            };
            bytes += level.bytes_with_separator();
        }
        // Every level was counted with a separator, and the first has none.
        bytes.saturating_sub(1) <= MAX_TOPIC_BYTES
    }

    /// Whether the first level is `+` or `#`.
    fn starts_with_wildcard(&self) -> bool {
        self.0.starts_with(is_wildcard)
    }

    /// The levels, where `#` and `/#` say that they match no empty topic, since there is none.
    fn normalised(&self) -> impl Iterator<Item = FilterLevel<'_>> + Clone {
        let text = match &*self.0 {
            "#" => "+/#",
            "/#" => "/+/#",
            text => text,
        };
        text.split(SEPARATOR).map(FilterLevel::of)
    }
}

/// A literal filter: it matches that topic and no other.
impl From<TopicName> for TopicFilter {
    fn from(name: TopicName) -> Self {
        Self(name.0)
    }
}

/// One level of a [`TopicFilter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FilterLevel<'a> {
    /// This text, byte by byte; it may be empty.
    Literal(&'a str),
    /// `+`: any one level.
    One,
    /// `#`: any number of levels, none included.
    Rest,
}

impl<'a> FilterLevel<'a> {
    fn of(level: &'a str) -> Self {
        match level {
            ONE_LEVEL => Self::One,
            ALL_LEVELS => Self::Rest,
            text => Self::Literal(text),
        }
    }

    /// What the shortest topic that fits spends on this level and the separator before it.
    fn bytes_with_separator(self) -> usize {
        match self {
            Self::Literal(text) => 1 + text.len(),
            Self::One => 1,
            Self::Rest => 0,
        }
    }
}

/// The name of a group of subscribers who share the messages of one filter, each going to one of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShareGroup(Arc<str>);

impl ShareGroup {
    /// Checks the name of a share group.
    ///
    /// Fails when it is empty, longer than [`MAX_TOPIC_BYTES`], or holds U+0000, `/`, `+` or `#`.
    pub fn parse(group: impl Into<Arc<str>>) -> Result<Self, TopicError> {
        let group = group.into();
        if group.is_empty() {
            return Err(TopicError::Empty(TopicKind::ShareGroup));
        }
        if group.len() > MAX_TOPIC_BYTES {
            return Err(TopicError::TooLong {
                kind: TopicKind::ShareGroup,
                bytes: group.len(),
            });
        }
        let forbidden = |c: char| c == '\0' || c == SEPARATOR || is_wildcard(c);
        if let Some(character) = group.chars().find(|c| forbidden(*c)) {
            return Err(TopicError::ShareGroupCharacter {
                character,
                found: excerpt(&group),
            });
        }
        Ok(Self(group))
    }

    /// The name as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a subscription asks for: a filter, by itself or shared in a group.
///
/// Written `<filter>` or `$share/<group>/<filter>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscribeTarget {
    /// The group that shares the messages; `None` when this subscriber gets every one.
    pub share: Option<ShareGroup>,
    /// The topics wanted.
    pub filter: TopicFilter,
}

impl SubscribeTarget {
    /// Checks a subscription as MQTT writes it.
    ///
    /// Fails as [`TopicFilter::parse`] and [`ShareGroup::parse`] do, and when something that
    /// starts with the level `$share` has no group or no filter. Levels are counted within the filter.
    pub fn parse(target: &str) -> Result<Self, TopicError> {
        let mut parts = target.splitn(3, SEPARATOR);
        if parts.next() != Some(SHARE_LEVEL) {
            return Ok(Self {
                share: None,
                filter: TopicFilter::parse(target)?,
            });
        }
        let (Some(group), Some(filter)) = (parts.next(), parts.next()) else {
            return Err(TopicError::ShareIncomplete {
                found: excerpt(target),
            });
        };
        Ok(Self {
            share: Some(ShareGroup::parse(group)?),
            filter: TopicFilter::parse(filter)?,
        })
    }
}

impl From<TopicFilter> for SubscribeTarget {
    fn from(filter: TopicFilter) -> Self {
        Self {
            share: None,
            filter,
        }
    }
}

impl fmt::Display for SubscribeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(group) = &self.share {
            write!(f, "{SHARE_LEVEL}/{group}/")?;
        }
        self.filter.fmt(f)
    }
}

impl FromStr for SubscribeTarget {
    type Err = TopicError;

    fn from_str(target: &str) -> Result<Self, TopicError> {
        Self::parse(target)
    }
}

/// Which of the strings of this module an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicKind {
    /// A [`TopicName`].
    Name,
    /// A [`TopicFilter`].
    Filter,
    /// A [`ShareGroup`].
    ShareGroup,
}

impl fmt::Display for TopicKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "topic name",
            Self::Filter => "topic filter",
            Self::ShareGroup => "share group",
        })
    }
}

/// Why a topic name, a topic filter or a shared subscription was refused.
///
/// Levels are counted from 1. What was found is quoted, escaped and cut to a readable length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopicError {
    /// There was nothing.
    #[error("expected a {0} of 1 to {MAX_TOPIC_BYTES} bytes, found an empty one")]
    Empty(TopicKind),
    /// It does not fit the length field of MQTT.
    #[error("expected a {kind} of 1 to {MAX_TOPIC_BYTES} bytes, found {bytes} bytes")]
    TooLong {
        /// What it was to be.
        kind: TopicKind,
        /// Its length.
        bytes: usize,
    },
    /// It is deeper than the broker's topic tree.
    #[error("expected a {kind} of at most {MAX_TOPIC_LEVELS} levels, found {levels}")]
    TooManyLevels {
        /// What it was to be.
        kind: TopicKind,
        /// How many levels it has.
        levels: usize,
    },
    /// The bytes are not text.
    #[error("expected a {kind} in UTF-8, found an invalid sequence at byte {at}")]
    NotUtf8 {
        /// What it was to be.
        kind: TopicKind,
        /// The offset of the first byte that is not UTF-8.
        at: usize,
    },
    /// It holds U+0000, which MQTT forbids.
    #[error("expected a {kind} without U+0000, found one in level {level}")]
    Nul {
        /// What it was to be.
        kind: TopicKind,
        /// The level that holds it.
        level: usize,
    },
    /// It starts with the level that marks a shared subscription.
    #[error(
        "expected a {0} that does not start with the level `$share`, \
         which is reserved for subscriptions of the form $share/<group>/<filter>"
    )]
    ReservedShare(TopicKind),
    /// A topic name holds a wildcard.
    #[error(
        "expected a topic name without wildcards, found `{wildcard}` in level {level} {found}; \
         publish to one topic, wildcards are for subscriptions"
    )]
    WildcardInName {
        /// The level that holds it.
        level: usize,
        /// `+` or `#`.
        wildcard: char,
        /// The level, quoted.
        found: String,
    },
    /// A filter holds a wildcard that shares its level with other text.
    #[error("expected `{wildcard}` to be a whole level, found level {level} {found}")]
    PartialWildcard {
        /// The level that holds it.
        level: usize,
        /// `+` or `#`.
        wildcard: char,
        /// The level, quoted.
        found: String,
    },
    /// A filter goes on after `#`.
    #[error("expected `#` only as the last level, found it as level {level} of {levels}")]
    RestNotLast {
        /// The level that is `#`.
        level: usize,
        /// How many levels the filter has.
        levels: usize,
    },
    /// The name of a share group holds a character with a meaning in filters.
    #[error(
        "expected a share group without `/`, `+`, `#` and U+0000, found {character:?} in {found}"
    )]
    ShareGroupCharacter {
        /// The first such character.
        character: char,
        /// The group, quoted.
        found: String,
    },
    /// A shared subscription lacks its group or its filter.
    #[error("expected $share/<group>/<filter>, found {found}")]
    ShareIncomplete {
        /// The subscription, quoted.
        found: String,
    },
}

/// What every checked string of this module gives: its text, and parsing from text and bytes.
macro_rules! checked_text {
    ($($type:ident is $kind:ident),*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl From<$type> for Arc<str> {
            fn from(text: $type) -> Self {
                text.0
            }
        }

        impl FromStr for $type {
            type Err = TopicError;

            fn from_str(text: &str) -> Result<Self, TopicError> {
                Self::parse(text)
            }
        }

        impl TryFrom<&str> for $type {
            type Error = TopicError;

            fn try_from(text: &str) -> Result<Self, TopicError> {
                Self::parse(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = TopicError;

            fn try_from(text: String) -> Result<Self, TopicError> {
                Self::parse(text)
            }
        }

        impl TryFrom<&[u8]> for $type {
            type Error = TopicError;

            fn try_from(bytes: &[u8]) -> Result<Self, TopicError> {
                let text = std::str::from_utf8(bytes).map_err(|error| TopicError::NotUtf8 {
                    kind: TopicKind::$kind,
                    at: error.valid_up_to(),
                })?;
                Self::parse(text)
            }
        }
    )*};
}

checked_text!(TopicName is Name, TopicFilter is Filter, ShareGroup is ShareGroup);

/// The rules that names and filters have in common.
fn check_shape(kind: TopicKind, text: &str) -> Result<(), TopicError> {
    if text.is_empty() {
        return Err(TopicError::Empty(kind));
    }
    if text.len() > MAX_TOPIC_BYTES {
        return Err(TopicError::TooLong {
            kind,
            bytes: text.len(),
        });
    }
    let levels = text.split(SEPARATOR).count();
    if levels > MAX_TOPIC_LEVELS {
        return Err(TopicError::TooManyLevels { kind, levels });
    }
    if let Some(index) = text.split(SEPARATOR).position(|level| level.contains('\0')) {
        return Err(TopicError::Nul {
            kind,
            level: index + 1,
        });
    }
    if text.split(SEPARATOR).next() == Some(SHARE_LEVEL) {
        return Err(TopicError::ReservedShare(kind));
    }
    Ok(())
}

fn is_wildcard(c: char) -> bool {
    c == '+' || c == '#'
}

fn is_system(text: &str) -> bool {
    text.starts_with('$')
}

/// Text a peer sent, fit for one line of a log.
fn excerpt(text: &str) -> String {
    const MAX_CHARS: usize = 48;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests;
