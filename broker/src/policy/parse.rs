//! Policy files: TOML to rules, with every problem of the file reported at once.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::{Table, Value};

use super::Policy;
use super::pattern::{IdentityPattern, IdentityPatternError, SubjectError, SubjectTemplate};
use super::rule::{Effect, Rule};
use super::verb::{Verb, VerbError};

/// The longest rule name in bytes; denials carry it to clients.
const MAX_RULE_NAME: usize = 256;

impl Policy {
    /// Reads the text of a policy file.
    ///
    /// Fails with everything that is wrong with it; a policy is never used in part.
    pub fn parse(text: &str) -> Result<Self, PolicyErrors> {
        let file: Table = text.parse().map_err(|error: toml::de::Error| {
            PolicyErrors(vec![PolicyError {
                rule: None,
                problem: PolicyProblem::Syntax(error.to_string()),
            }])
        })?;
        let mut errors = Vec::new();
        let mut rules = Vec::new();
        for (key, value) in &file {
            match (key.as_str(), value) {
                ("rule", Value::Array(values)) => rules = read_rules(values, &mut errors),
                ("rule", other) => errors.push(PolicyError {
                    rule: None,
                    problem: PolicyProblem::WrongType {
                        key: "rule",
                        expected: "tables, each under its own [[rule]]",
                        found: other.type_str(),
                    },
                }),
                _ => errors.push(PolicyError {
                    rule: None,
                    problem: PolicyProblem::UnknownKey {
                        key: key.clone(),
                        expected: "[[rule]] and nothing else",
                    },
                }),
            }
        }
        if errors.is_empty() {
            Ok(Self {
                rules: rules.into(),
            })
        } else {
            Err(PolicyErrors(errors))
        }
    }

    /// Reads a policy file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, PolicyLoadError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| PolicyLoadError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|errors| PolicyLoadError::Invalid {
            path: path.to_owned(),
            errors,
        })
    }
}

impl FromStr for Policy {
    type Err = PolicyErrors;

    fn from_str(text: &str) -> Result<Self, PolicyErrors> {
        Self::parse(text)
    }
}

/// Why a policy file could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyLoadError {
    /// The file could not be read.
    #[error("cannot read the policy file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a policy.
    #[error("the policy file {} is refused: {errors}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong with it.
        errors: PolicyErrors,
    },
}

/// Everything that is wrong with a policy, in the order of the file; at least one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyErrors(Vec<PolicyError>);

impl PolicyErrors {
    /// The problems one by one.
    pub fn iter(&self) -> impl Iterator<Item = &PolicyError> {
        self.0.iter()
    }
}

impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = self.0.as_slice() {
            return only.fmt(f);
        }
        write!(f, "{} problems", self.0.len())?;
        for error in &self.0 {
            write!(f, "\n  {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PolicyErrors {}

/// One thing that is wrong with a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// The rule as `1 "name"`, counted from 1, without the name if it has none; `None` when it
    /// is about the file.
    pub rule: Option<String>,
    /// What is wrong.
    pub problem: PolicyProblem,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rule) = &self.rule {
            write!(f, "rule {rule}: ")?;
        }
        self.problem.fmt(f)
    }
}

impl std::error::Error for PolicyError {}

/// What is wrong with a rule or a policy file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyProblem {
    /// The file is not TOML; the text says where.
    #[error("expected TOML: {}", .0.trim_end())]
    Syntax(String),
    /// A key that means nothing here, perhaps a misspelt one.
    #[error("expected {expected}, found the unknown key {key:?}; correct or remove it")]
    UnknownKey {
        /// The key found.
        key: String,
        /// The keys that are known.
        expected: &'static str,
    },
    /// A required key is not there.
    #[error("expected the key `{key}`, found none; add {example}")]
    MissingKey {
        /// The key.
        key: &'static str,
        /// How it may look.
        example: &'static str,
    },
    /// A value has another type.
    #[error("expected `{key}` to be {expected}, found {found}")]
    WrongType {
        /// The key.
        key: &'static str,
        /// What it is to be.
        expected: &'static str,
        /// The TOML type found.
        found: &'static str,
    },
    /// A list without entries, with which the rule would never match.
    #[error("expected at least one entry in `{key}`, found none; add one or remove the rule")]
    EmptyList {
        /// The key of the list.
        key: &'static str,
    },
    /// A rule that allows and denies.
    #[error("expected either `allow` or `deny`, found both; split the rule in two")]
    AllowAndDeny,
    /// A rule that neither allows nor denies.
    #[error("expected either `allow` or `deny`, found neither; add allow = [\"publish\"]")]
    NeitherAllowNorDeny,
    /// The name of the rule is empty or too long.
    #[error("expected a `name` of 1 to {MAX_RULE_NAME} bytes, found {bytes}")]
    NameLength {
        /// Its length.
        bytes: usize,
    },
    /// Another rule has the same name, so a denial could not tell them apart.
    #[error("expected a `name` of its own, found that of rule {first}; rename one of them")]
    DuplicateName {
        /// The rule that has it first, counted from 1.
        first: usize,
    },
    /// An entry of `allow` or `deny` is not a verb.
    #[error("in `{key}`: {error}")]
    Verb {
        /// `allow` or `deny`.
        key: &'static str,
        /// What was found.
        error: VerbError,
    },
    /// An entry of `identities` is not a pattern.
    #[error("in `identities`, {pattern:?}: {error}")]
    Identity {
        /// The entry.
        pattern: String,
        /// What is wrong with it.
        error: IdentityPatternError,
    },
    /// An entry of `subjects` is not a subject.
    #[error("in `subjects`, {subject:?}: {error}")]
    Subject {
        /// The entry.
        subject: String,
        /// What is wrong with it.
        error: SubjectError,
    },
}

/// Reads the rules, and leaves out those with a problem.
fn read_rules(values: &[Value], errors: &mut Vec<PolicyError>) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut first_with_name: HashMap<&str, usize> = HashMap::new();
    for (index, value) in values.iter().enumerate() {
        let number = index + 1;
        let name = value.get("name").and_then(Value::as_str);
        let mut problems = Vec::new();
        match value {
            Value::Table(table) => rules.extend(read_rule(table, &mut problems)),
            other => problems.push(PolicyProblem::WrongType {
                key: "rule",
                expected: "tables, each under its own [[rule]]",
                found: other.type_str(),
            }),
        }
        if let Some(name) = name {
            let first = *first_with_name.entry(name).or_insert(number);
            if first != number {
                problems.push(PolicyProblem::DuplicateName { first });
            }
        }
        errors.extend(problems.into_iter().map(|problem| PolicyError {
            rule: Some(match name {
                Some(name) => format!("{number} {name:?}"),
                None => number.to_string(),
            }),
            problem,
        }));
    }
    rules
}

/// Reads one rule; `None` goes with at least one problem.
fn read_rule(table: &Table, problems: &mut Vec<PolicyProblem>) -> Option<Rule> {
    for key in table.keys() {
        if !["name", "identities", "allow", "deny", "subjects"].contains(&key.as_str()) {
            problems.push(PolicyProblem::UnknownKey {
                key: key.clone(),
                expected: "the keys name, identities, allow or deny, and subjects",
            });
        }
    }
    let name = read_name(table, problems);
    let identities = read_list(
        table,
        "identities",
        r#"identities = ["tenant/site/*"]"#,
        problems,
        |text| {
            IdentityPattern::parse(text).map_err(|error| PolicyProblem::Identity {
                pattern: text.to_owned(),
                error,
            })
        },
    );
    let read_verbs = |key, problems: &mut _| {
        read_list(table, key, "", problems, |text| {
            Verb::from_str(text).map_err(|error| PolicyProblem::Verb { key, error })
        })
    };
    let (effect, verbs) = match (table.contains_key("allow"), table.contains_key("deny")) {
        (true, false) => (Effect::Allow, read_verbs("allow", problems)),
        (false, true) => (Effect::Deny, read_verbs("deny", problems)),
        (true, true) => {
            problems.push(PolicyProblem::AllowAndDeny);
            read_verbs("allow", problems);
            read_verbs("deny", problems);
            (Effect::Deny, None)
        }
        (false, false) => {
            problems.push(PolicyProblem::NeitherAllowNorDeny);
            (Effect::Deny, None)
        }
    };
    let subjects = read_list(
        table,
        "subjects",
        r#"subjects = ["sites/{site}/{name}/#"]"#,
        problems,
        |text| {
            SubjectTemplate::parse(text).map_err(|error| PolicyProblem::Subject {
                subject: text.to_owned(),
                error,
            })
        },
    );
    Some(Rule {
        name: name?.into(),
        effect,
        verbs: verbs?.into(),
        identities: identities?,
        subjects: subjects?,
    })
}

fn read_name<'a>(table: &'a Table, problems: &mut Vec<PolicyProblem>) -> Option<&'a str> {
    let problem = match table.get("name") {
        Some(Value::String(name)) if (1..=MAX_RULE_NAME).contains(&name.len()) => {
            return Some(name);
        }
        Some(Value::String(name)) => PolicyProblem::NameLength { bytes: name.len() },
        Some(other) => PolicyProblem::WrongType {
            key: "name",
            expected: "a string",
            found: other.type_str(),
        },
        None => PolicyProblem::MissingKey {
            key: "name",
            example: r#"name = "what the rule is for""#,
        },
    };
    problems.push(problem);
    None
}

/// Reads a list of strings through `parse`; `None` when anything in it is wrong.
fn read_list<T>(
    table: &Table,
    key: &'static str,
    example: &'static str,
    problems: &mut Vec<PolicyProblem>,
    parse: impl Fn(&str) -> Result<T, PolicyProblem>,
) -> Option<Vec<T>> {
    let before = problems.len();
    let mut list = Vec::new();
    match table.get(key) {
        Some(Value::Array(values)) => {
            if values.is_empty() {
                problems.push(PolicyProblem::EmptyList { key });
            }
            for value in values {
                let parsed = match value {
                    Value::String(text) => parse(text),
                    other => Err(PolicyProblem::WrongType {
                        key,
                        expected: "a list of strings",
                        found: other.type_str(),
                    }),
                };
                match parsed {
                    Ok(entry) => list.push(entry),
                    Err(problem) => problems.push(problem),
                }
            }
        }
        Some(other) => problems.push(PolicyProblem::WrongType {
            key,
            expected: "a list of strings",
            found: other.type_str(),
        }),
        None => problems.push(PolicyProblem::MissingKey { key, example }),
    }
    (problems.len() == before).then_some(list)
}
