//! Why a request is allowed or denied, rule by rule.

use std::fmt;
use std::sync::Arc;

use selvedge_certs::Identity;
use selvedge_proto::topic::TopicFilter;

use super::rule::{Effect, Reach, Rule};
use super::verb::Verb;
use super::{FilterDecision, Policy};

impl Policy {
    /// Decides like [`IdentityPolicy`](super::IdentityPolicy) does, and says what each rule had to do with it.
    ///
    /// The subject may be a filter with any verb: the question is then whether all of it is allowed.
    pub fn explain(&self, identity: &Identity, verb: Verb, subject: &TopicFilter) -> Explanation {
        Explanation {
            identity: identity.clone(),
            verb,
            subject: subject.clone(),
            decision: self.for_identity(identity).evaluate(verb, subject),
            rules: self
                .rules
                .iter()
                .map(|rule| RuleOutcome {
                    name: rule.name.clone(),
                    effect: rule.effect,
                    verdict: verdict(rule, identity, verb, subject),
                })
                .collect(),
        }
    }
}

/// A decision and its reasons; `Display` gives one line for the decision and one for each rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Who asks.
    pub identity: Identity,
    /// What for.
    pub verb: Verb,
    /// On which topic, topics, service or model.
    pub subject: TopicFilter,
    /// The answer.
    pub decision: FilterDecision,
    /// Every rule of the policy, in the order of the file.
    pub rules: Vec<RuleOutcome>,
}

/// What one rule had to do with a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleOutcome {
    /// The name of the rule.
    pub name: Arc<str>,
    /// Whether it allows or denies.
    pub effect: Effect,
    /// Whether it matched, or why not.
    pub verdict: RuleVerdict,
}

/// Whether a rule matched a request, or why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleVerdict {
    /// Identity, verb and subject match.
    Matches {
        /// The pattern that names the identity.
        identity: Arc<str>,
        /// The rule's subject for this identity that covers the one asked for.
        subject: TopicFilter,
    },
    /// Identity and verb match, and the subjects some of the filter asked for.
    MatchesInPart {
        /// The rule's subjects for this identity that overlap the filter.
        subjects: Vec<TopicFilter>,
    },
    /// The rule does not name the identity.
    OtherIdentity,
    /// The rule names the identity and is not about this verb.
    OtherVerb,
    /// The rule names identity and verb, and no subject matches.
    OtherSubject {
        /// The rule's subjects for this identity.
        subjects: Vec<TopicFilter>,
    },
    /// A subject of the rule grows too long with this identity's names, so that the identity is
    /// denied everything.
    Unusable,
}

fn verdict(rule: &Rule, identity: &Identity, verb: Verb, subject: &TopicFilter) -> RuleVerdict {
    let Some(pattern) = rule.names(identity) else {
        return RuleVerdict::OtherIdentity;
    };
    let Some(rule) = rule.compile(identity) else {
        return RuleVerdict::Unusable;
    };
    if !rule.has(verb) {
        return RuleVerdict::OtherVerb;
    }
    match rule.reach(subject) {
        Reach::Whole(subject) => RuleVerdict::Matches {
            identity: pattern.text().clone(),
            subject: subject.clone(),
        },
        Reach::Part(subjects) => RuleVerdict::MatchesInPart {
            subjects: subjects.into_iter().cloned().collect(),
        },
        Reach::Nothing => RuleVerdict::OtherSubject {
            subjects: rule.subjects.clone(),
        },
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            identity,
            verb,
            subject,
            decision,
            rules,
        } = self;
        write!(f, "{identity}: ")?;
        match decision {
            FilterDecision::Allowed { rule, residual } => {
                write!(
                    f,
                    "{verb} on {:?} allowed by rule {rule:?}",
                    subject.as_str()
                )?;
                if !residual.is_empty() {
                    write!(f, ", except {}", Listed(residual))?;
                }
            }
            FilterDecision::Denied(denial) => write!(f, "{denial}")?,
        }
        if rules.is_empty() {
            write!(f, "\n  the policy has no rules")?;
        }
        for (
            index,
            RuleOutcome {
                name,
                effect,
                verdict,
            },
        ) in rules.iter().enumerate()
        {
            write!(f, "\n  rule {} {name:?} ({effect}): {verdict}", index + 1)?;
        }
        Ok(())
    }
}

impl fmt::Display for RuleVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Matches { identity, subject } => {
                write!(
                    f,
                    "matches identity {identity:?} and subject {:?}",
                    subject.as_str()
                )
            }
            Self::MatchesInPart { subjects } => {
                write!(f, "matches a part of the filter by {}", Listed(subjects))
            }
            Self::OtherIdentity => f.write_str("does not name this identity"),
            Self::OtherVerb => f.write_str("is not about this verb"),
            Self::OtherSubject { subjects } => {
                write!(f, "is about other subjects: {}", Listed(subjects))
            }
            Self::Unusable => f.write_str(
                "has a subject that is too long with the names of this identity, \
                 which is therefore denied everything; shorten the subject",
            ),
        }
    }
}

/// Filters, quoted and separated by commas.
struct Listed<'a>(&'a [TopicFilter]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, filter) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{:?}", filter.as_str())?;
        }
        Ok(())
    }
}
