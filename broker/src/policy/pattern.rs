//! The patterns of a rule: which identities it names, and which subjects it is about.

use std::sync::Arc;

use selvedge_certs::Identity;
use selvedge_proto::topic::{TopicError, TopicFilter};

const SCHEME: &str = "spiffe://";

/// `tenant/site/name` or `spiffe://trust-domain/tenant/site/name`, where `*` stands for any
/// characters within its segment.
///
/// The short form names the identities of every trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityPattern {
    text: Arc<str>,
    trust_domain: Option<Glob>,
    tenant: Glob,
    site: Glob,
    name: Glob,
}

impl IdentityPattern {
    /// The pattern that `text` is.
    ///
    /// # Errors
    /// It has other segments than an identity, or characters that no identity has.
    pub fn parse(text: &str) -> Result<Self, IdentityPatternError> {
        let path = text.strip_prefix(SCHEME);
        let segments: Vec<&str> = path.unwrap_or(text).split('/').collect();
        let (trust_domain, tenant, site, name) = match (path, segments.as_slice()) {
            (None, [tenant, site, name]) => (None, tenant, site, name),
            (Some(_), [domain, tenant, site, name]) => (Some(domain), tenant, site, name),
            _ => return Err(IdentityPatternError::Segments),
        };
        Ok(Self {
            text: text.into(),
            trust_domain: trust_domain
                .map(|domain| Glob::parse("trust domain", domain))
                .transpose()?,
            tenant: Glob::parse("tenant", tenant)?,
            site: Glob::parse("site", site)?,
            name: Glob::parse("name", name)?,
        })
    }

    /// Whether it names this identity.
    pub fn matches(&self, identity: &Identity) -> bool {
        self.trust_domain
            .as_ref()
            .is_none_or(|domain| domain.matches(identity.trust_domain()))
            && self.tenant.matches(identity.tenant())
            && self.site.matches(identity.site())
            && self.name.matches(identity.name())
    }

    pub(super) fn text(&self) -> &Arc<str> {
        &self.text
    }
}

/// Why something is not a pattern of identities.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityPatternError {
    /// It has too few or too many segments.
    #[error(
        "expected tenant/site/name or spiffe://trust-domain/tenant/site/name; \
         a `*` stands for characters within one segment, so write */*/* for everyone"
    )]
    Segments,
    /// A segment is empty and could match no identity.
    #[error("expected a {segment}, found an empty segment; write `*` for any {segment}")]
    EmptySegment {
        /// Which segment it is.
        segment: &'static str,
    },
    /// A segment holds a character that no identity has.
    #[error(
        "expected letters, digits, `.`, `-`, `_` and the wildcard `*` in the {segment}, \
         found {character:?}"
    )]
    Character {
        /// Which segment it is.
        segment: &'static str,
        /// The first such character.
        character: char,
    },
    /// A segment has two wildcards in a row, as if one could reach into the next segment.
    #[error("expected `*` in the {segment}, found `**`; no wildcard crosses a `/`")]
    DoubleWildcard {
        /// Which segment it is.
        segment: &'static str,
    },
}

/// Text where `*` stands for any characters, none included.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Glob(Box<str>);

impl Glob {
    fn parse(segment: &'static str, text: &str) -> Result<Self, IdentityPatternError> {
        if text.is_empty() {
            return Err(IdentityPatternError::EmptySegment { segment });
        }
        if text.contains("**") {
            return Err(IdentityPatternError::DoubleWildcard { segment });
        }
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '*');
        match text.chars().find(|c| !known(*c)) {
            Some(character) => Err(IdentityPatternError::Character { segment, character }),
            None => Ok(Self(text.into())),
        }
    }

    fn matches(&self, text: &str) -> bool {
        let Some((head, rest)) = self.0.split_once('*') else {
            return *self.0 == *text;
        };
        let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
        let inner = text.strip_prefix(head);
        let Some(mut inner) = inner.and_then(|text| text.strip_suffix(tail)) else {
            return false;
        };
        // Taking each part where it first occurs leaves the most room for those after it.
        for part in middle.split('*') {
            let Some(at) = inner.find(part) else {
                return false;
            };
            inner = &inner[at + part.len()..];
        }
        true
    }
}

/// A topic filter in which `{tenant}`, `{site}` and `{name}` stand for those of the identity that asks.
#[derive(Clone, Debug)]
pub(super) struct SubjectTemplate {
    pieces: Box<[Piece]>,
}

#[derive(Clone, Debug)]
enum Piece {
    Text(Box<str>),
    Tenant,
    Site,
    Name,
}

impl SubjectTemplate {
    pub(super) fn parse(text: &str) -> Result<Self, SubjectError> {
        // Braces are ordinary text in a filter and a placeholder never holds a `/`, so what is
        // wrong with the filter shows before anything is replaced.
        TopicFilter::parse(text)?;
        let first_level = text.split('/').next().unwrap_or(text);
        if first_level.starts_with('$') && first_level.contains('{') {
            return Err(SubjectError::SystemPlaceholder);
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, brace) = rest.split_at(at);
            if !before.is_empty() {
                pieces.push(Piece::Text(before.into()));
            }
            let Some((inside, after)) = brace.strip_prefix('{').and_then(|b| b.split_once('}'))
            else {
                return Err(SubjectError::UnmatchedBrace);
            };
            pieces.push(match inside {
                "tenant" => Piece::Tenant,
                "site" => Piece::Site,
                "name" => Piece::Name,
                other => {
                    return Err(SubjectError::UnknownPlaceholder {
                        found: other.to_owned(),
                    });
                }
            });
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.into()));
        }
        Ok(Self {
            pieces: pieces.into(),
        })
    }

    /// The filter for one identity.
    ///
    /// `None` when it would be no filter, because it is too long, or when the identity could
    /// widen it. The latter no identity can, and this is the last line that makes sure.
    pub(super) fn for_identity(&self, identity: &Identity) -> Option<TopicFilter> {
        let mut filter = String::new();
        for piece in &self.pieces {
            let own = match piece {
                Piece::Text(text) => {
                    filter.push_str(text);
                    continue;
                }
                Piece::Tenant => identity.tenant(),
                Piece::Site => identity.site(),
                Piece::Name => identity.name(),
            };
            if own.is_empty() || own.contains(['/', '+', '#', '$']) {
                return None;
            }
            filter.push_str(own);
        }
        TopicFilter::parse(filter).ok()
    }
}

/// Why something is not a subject of a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// It is not a topic filter.
    #[error(transparent)]
    Filter(#[from] TopicError),
    /// A placeholder that does not exist.
    #[error("expected {{tenant}}, {{site}} or {{name}}, found {{{}}}", found.escape_debug())]
    UnknownPlaceholder {
        /// What the braces hold.
        found: String,
    },
    /// A brace without its other half.
    #[error(
        "expected braces only around a placeholder, as in {{name}}, found one without the other"
    )]
    UnmatchedBrace,
    /// An identity would choose which system topics are meant.
    #[error(
        "expected no placeholder in a first level that starts with `$`; move it to a later level"
    )]
    SystemPlaceholder,
}
