//! `selvedge policy`: check a policy file and ask it what it allows, without a broker.

use std::path::PathBuf;
use std::process::ExitCode;

use selvedge_broker::policy::{
    Explanation, FilterDecision, Policy, PolicyLoadError, RuleOutcome, RuleVerdict, Verb,
};
use selvedge_certs::Identity;
use selvedge_proto::topic::{SubscribeTarget, TopicFilter};
use serde_json::{Value, json};

use crate::output::{self, Problems};

/// `selvedge policy`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge policy check policy.toml
  selvedge policy explain --policy policy.toml \\
    --identity spiffe://example.org/acme/plant-1/press-7 \\
    publish sites/plant-1/press-7/temperature")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

impl Args {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            Command::Check(args) => args.json,
            Command::Explain(args) => args.json,
        }
    }
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Say everything that is wrong with a policy file.
    Check(Check),
    /// Say whether an identity may do something, and what each rule had to do with it.
    ///
    /// The exit code is 0 when it is allowed and 1 when it is denied.
    Explain(Explain),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  selvedge policy check policy.toml")]
struct Check {
    /// The policy.
    file: PathBuf,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge policy explain --policy policy.toml \\
    --identity spiffe://example.org/acme/plant-1/press-7 \\
    subscribe 'sites/plant-1/#'")]
struct Explain {
    /// The policy.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// Who asks.
    #[arg(long, value_name = "URI")]
    identity: Identity,
    /// What for: publish, subscribe, call, serve, infer or work.
    verb: Verb,
    /// On what: a topic, a filter, a service or a model.
    subject: Subject,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
}

/// A subject of the command line; of a shared subscription, policy sees the filter alone.
#[derive(Debug, Clone)]
struct Subject(TopicFilter);

impl std::str::FromStr for Subject {
    type Err = selvedge_proto::topic::TopicError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        SubscribeTarget::parse(text).map(|target| Self(target.filter))
    }
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Check(args) => {
            load(&args.file)?;
            if args.json {
                output::line(json!({ "ok": true }))?;
            } else {
                output::line("ok")?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Explain(args) => {
            let policy = load(&args.policy)?;
            let explanation = policy.explain(&args.identity, args.verb, &args.subject.0);
            if args.json {
                output::line(json(&explanation))?;
            } else {
                output::line(&explanation)?;
            }
            Ok(if explanation.decision.is_allowed() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
    }
}

fn load(file: &PathBuf) -> anyhow::Result<Policy> {
    Policy::load(file).map_err(|error| match error {
        PolicyLoadError::Invalid { path, errors } => anyhow::Error::new(Problems {
            file: path.display().to_string(),
            problems: (errors.iter())
                .map(|error| {
                    let key = match &error.rule {
                        Some(rule) => format!("rule {rule}"),
                        None => "file".to_owned(),
                    };
                    (key, error.problem.to_string())
                })
                .collect(),
        }),
        other => other.into(),
    })
}

fn json(explanation: &Explanation) -> Value {
    let (rule, except): (Option<&str>, Vec<&str>) = match &explanation.decision {
        FilterDecision::Allowed { rule, residual } => (
            Some(rule),
            residual.iter().map(TopicFilter::as_str).collect(),
        ),
        FilterDecision::Denied(denial) => (denial.rule.as_deref(), Vec::new()),
    };
    json!({
        "allowed": explanation.decision.is_allowed(),
        "identity": explanation.identity.to_string(),
        "verb": explanation.verb.as_str(),
        "subject": explanation.subject.as_str(),
        "rule": rule,
        "except": except,
        "rules": explanation.rules.iter().map(outcome).collect::<Vec<_>>(),
    })
}

fn outcome(rule: &RuleOutcome) -> Value {
    let verdict = match &rule.verdict {
        RuleVerdict::Matches { .. } => "matches",
        RuleVerdict::MatchesInPart { .. } => "matches in part",
        RuleVerdict::OtherIdentity => "other identity",
        RuleVerdict::OtherVerb => "other verb",
        RuleVerdict::OtherSubject { .. } => "other subject",
        RuleVerdict::Unusable => "unusable",
    };
    json!({
        "name": &*rule.name,
        "effect": rule.effect.to_string(),
        "verdict": verdict,
        "detail": rule.verdict.to_string(),
    })
}
