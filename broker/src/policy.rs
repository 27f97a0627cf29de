//! Who may do what: rules from a TOML file, compiled for one identity, deciding without I/O.
//!
//! Everything is denied unless a rule allows it, and one rule that denies wins over any number
//! that allow. A decision depends on the policy, the identity, the verb and the subject alone.

mod explain;
mod live;
mod parse;
mod pattern;
mod rule;
mod verb;

use std::fmt;
use std::sync::Arc;

use selvedge_certs::Identity;
use selvedge_proto::topic::{TopicFilter, TopicName};

pub use self::explain::{Explanation, RuleOutcome, RuleVerdict};
pub use self::live::LivePolicy;
pub use self::parse::{PolicyError, PolicyErrors, PolicyLoadError, PolicyProblem};
pub use self::pattern::{IdentityPattern, IdentityPatternError, SubjectError};
pub use self::rule::Effect;
pub use self::verb::{Verb, VerbError};

use self::rule::{CompiledRule, Reach, Rule};

/// The rules of one policy file, in its order.
///
/// Cheap to clone. The default has no rules and so denies everything.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    rules: Arc<[Rule]>,
}

impl Policy {
    /// The policy as one identity sees it: rules about others dropped, placeholders replaced.
    pub fn for_identity(&self, identity: &Identity) -> IdentityPolicy {
        let rules: Option<Vec<CompiledRule>> = self
            .rules
            .iter()
            .filter(|rule| rule.names(identity).is_some())
            .map(|rule| rule.compile(identity))
            .collect();
        // A rule that cannot be compiled must not vanish, since it may be one that denies.
        // Without rules, everything is denied.
        IdentityPolicy {
            rules: rules.unwrap_or_default().into(),
        }
    }
}

/// What one identity may do.
///
/// Cheap to clone. A decision takes one pass over the rules that name the identity.
#[derive(Clone, Debug, Default)]
pub struct IdentityPolicy {
    rules: Arc<[CompiledRule]>,
}

impl IdentityPolicy {
    /// Decides about one subject: a topic, or the name of a service or model.
    ///
    /// The first rule, in the order of the file, that denies decides; else the first that allows.
    pub fn decide(&self, verb: Verb, subject: &TopicName) -> Decision {
        match self.evaluate(verb, &TopicFilter::from(subject.clone())) {
            FilterDecision::Allowed { rule, .. } => Decision::Allowed { rule },
            FilterDecision::Denied(denial) => Decision::Denied(denial),
        }
    }

    /// Decides about a subscription to many topics at once.
    ///
    /// It is denied when one subject of a denying rule covers the filter, and allowed when one
    /// subject of an allowing rule covers it. Unions are not considered: `a` and `a/+/#` together
    /// cover `a/#` and neither does alone, so the subscription is denied. When denying subjects
    /// cover only part of the filter it is allowed, and they are the `residual`.
    pub fn decide_filter(&self, filter: &TopicFilter) -> FilterDecision {
        self.evaluate(Verb::Subscribe, filter)
    }

    fn evaluate(&self, verb: Verb, filter: &TopicFilter) -> FilterDecision {
        let mut allowed = None;
        let mut residual: Vec<TopicFilter> = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.has(verb)) {
            match (rule.effect, rule.reach(filter)) {
                (Effect::Allow, Reach::Whole(_)) => {
                    allowed.get_or_insert(&rule.name);
                }
                (Effect::Deny, Reach::Whole(_)) => {
                    return FilterDecision::Denied(Denial::new(verb, filter, Some(&rule.name)));
                }
                (Effect::Deny, Reach::Part(subjects)) => {
                    for subject in subjects {
                        if !residual.contains(subject) {
                            residual.push(subject.clone());
                        }
                    }
                }
                (Effect::Allow, Reach::Part(_)) | (_, Reach::Nothing) => {}
            }
        }
        match allowed {
            Some(rule) => FilterDecision::Allowed {
                rule: rule.clone(),
                residual: residual.into(),
            },
            None => FilterDecision::Denied(Denial::new(verb, filter, None)),
        }
    }
}

/// The answer about one subject.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// Go ahead.
    Allowed {
        /// The name of the first rule that allows it.
        rule: Arc<str>,
    },
    /// Refuse, and tell the caller why.
    Denied(Denial),
}

impl Decision {
    /// Whether the answer is yes.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allowed { .. })
    }
}

/// The answer about a subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum FilterDecision {
    /// Subscribe, and deliver no topic that a residual filter matches.
    Allowed {
        /// The name of the first rule that allows it.
        rule: Arc<str>,
        /// The denied subjects that overlap the filter without covering it, each once, in the
        /// order of the file. Usually empty.
        residual: Arc<[TopicFilter]>,
    },
    /// Refuse, and tell the caller why.
    Denied(Denial),
}

impl FilterDecision {
    /// Whether the answer is yes, perhaps with a residual.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allowed { .. })
    }
}

/// A refusal, fit to be sent to whoever asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// What was asked for.
    pub verb: Verb,
    /// The topic, filter, service or model it was asked for.
    pub subject: Arc<str>,
    /// The rule that denies it; `None` when no rule allows it.
    pub rule: Option<Arc<str>>,
}

impl Denial {
    fn new(verb: Verb, subject: &TopicFilter, rule: Option<&Arc<str>>) -> Self {
        Self {
            verb,
            subject: subject.clone().into(),
            rule: rule.cloned(),
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            verb,
            subject,
            rule,
        } = self;
        match rule {
            Some(rule) => write!(f, "{verb} on {subject:?} denied by rule {rule:?}"),
            None => write!(f, "{verb} on {subject:?} denied: no rule allows it"),
        }
    }
}

impl std::error::Error for Denial {}

#[cfg(test)]
mod tests;

impl From<Denial> for selvedge_proto::status::Status {
    fn from(denial: Denial) -> Self {
        Self::denied(selvedge_proto::status::Denial {
            verb: denial.verb.as_str().into(),
            subject: denial.subject,
            rule: denial.rule,
        })
    }
}
