//! One rule: as the file has it, and compiled for one identity.

use std::fmt;
use std::sync::Arc;

use selvedge_certs::Identity;
use selvedge_proto::topic::TopicFilter;

use super::pattern::{IdentityPattern, SubjectTemplate};
use super::verb::Verb;

/// What a rule does with the requests it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Lets them through unless another rule denies them.
    Allow,
    /// Refuses them, whatever other rules allow.
    Deny,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// A rule of the policy file; none of its lists is empty.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) name: Arc<str>,
    pub(super) effect: Effect,
    pub(super) verbs: Arc<[Verb]>,
    pub(super) identities: Vec<IdentityPattern>,
    pub(super) subjects: Vec<SubjectTemplate>,
}

impl Rule {
    /// The first pattern that names the identity.
    pub(super) fn names(&self, identity: &Identity) -> Option<&IdentityPattern> {
        self.identities
            .iter()
            .find(|pattern| pattern.matches(identity))
    }

    /// The rule with the identity's own names for the placeholders, without asking whether the
    /// rule names the identity. `None` when a subject cannot be had for it.
    pub(super) fn compile(&self, identity: &Identity) -> Option<CompiledRule> {
        let subjects: Option<Vec<TopicFilter>> = self
            .subjects
            .iter()
            .map(|subject| subject.for_identity(identity))
            .collect();
        Some(CompiledRule {
            name: self.name.clone(),
            effect: self.effect,
            verbs: self.verbs.clone(),
            subjects: subjects?,
        })
    }
}

/// A rule that names one identity, with that identity's subjects.
#[derive(Clone, Debug)]
pub(super) struct CompiledRule {
    pub(super) name: Arc<str>,
    pub(super) effect: Effect,
    verbs: Arc<[Verb]>,
    pub(super) subjects: Vec<TopicFilter>,
}

impl CompiledRule {
    pub(super) fn has(&self, verb: Verb) -> bool {
        self.verbs.contains(&verb)
    }

    /// How much of a filter the subjects of this rule take in, each by itself.
    pub(super) fn reach(&self, filter: &TopicFilter) -> Reach<'_> {
        if let Some(subject) = self.subjects.iter().find(|subject| subject.covers(filter)) {
            return Reach::Whole(subject);
        }
        let part: Vec<&TopicFilter> = self
            .subjects
            .iter()
            .filter(|subject| subject.overlaps(filter))
            .collect();
        if part.is_empty() {
            Reach::Nothing
        } else {
            Reach::Part(part)
        }
    }
}

/// How much of a filter a rule is about.
pub(super) enum Reach<'a> {
    /// All of it, by this subject.
    Whole(&'a TopicFilter),
    /// Some of it, by each of these subjects.
    Part(Vec<&'a TopicFilter>),
    /// None of it.
    Nothing,
}
