//! `$SYS/explain`: the question and the answer, as JSON.

use std::time::SystemTime;

use selvedge_proto::status::{Code, Status};
use serde::{Deserialize, Serialize};

use super::now::Now;
use super::query::{Kind, Match, Query, printable};
use super::ring::{Fate, Record};
use crate::calls::Caller;
use crate::store::unix_ms;

/// Records in an answer, unless the question says otherwise.
const DEFAULT_LIMIT: usize = 50;
/// Most records in an answer.
const LIMIT: usize = 1000;
/// Most bytes of an answer. Less of each list is sent when it would be more.
const ANSWER: usize = 256 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    query: String,
    #[serde(default)]
    kind: Option<Kind>,
    #[serde(default)]
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Answer {
    /// Whether anything is known.
    found: bool,
    /// Everything that happened after this is still known, if there was anything.
    complete_since_ms: u64,
    /// Most recent first.
    records: Vec<Shown>,
    /// How many there are in all.
    record_count: usize,
    now: Now,
}

#[derive(Debug, Serialize)]
struct Shown {
    what: &'static str,
    reason: &'static str,
    matched: Match,
    count: u64,
    first_ms: u64,
    last_ms: u64,
    publisher: String,
    receiver: Option<Receiver>,
    verb: Option<&'static str>,
    topic: Option<String>,
    message_id: Option<String>,
    status: Option<Outcome>,
}

#[derive(Debug, Serialize)]
struct Receiver {
    identity: String,
    session: String,
}

#[derive(Debug, Serialize)]
struct Outcome {
    code: &'static str,
    message: String,
    rule: Option<String>,
}

/// Answers about the caller's own tenant.
///
/// # Errors
/// The question is not one.
pub(crate) fn answer(caller: &Caller, question: &[u8]) -> Result<Vec<u8>, Status> {
    let invalid = |found: String| {
        let message = format!(
            "expected a JSON object such as {{\"query\": \"press-7\", \"limit\": 50}}: {found}"
        );
        Status::new(Code::InvalidArgument, message)
    };
    let question: Question =
        serde_json::from_slice(question).map_err(|error| invalid(error.to_string()))?;
    let query =
        Query::new(&question.query, question.kind).map_err(|error| invalid(error.to_string()))?;
    let mut limit = question.limit.unwrap_or(DEFAULT_LIMIT).clamp(1, LIMIT);
    let room = caller.fabric.limits.max_frame_bytes.min(ANSWER);
    let known = caller.tenant.explain.snapshot();
    let complete_since = known
        .complete_since
        .unwrap_or_else(|| started(caller))
        .max(started(caller));
    let found = query.find(&known.records);
    loop {
        let now = Now::look(&caller.tenant, &query, &known.records, limit);
        let answer = Answer {
            found: !found.is_empty() || !now.is_empty(),
            complete_since_ms: unix_ms(complete_since),
            records: found.iter().take(limit).map(Shown::of).collect(),
            record_count: found.len(),
            now,
        };
        let answer = serde_json::to_vec(&answer)
            .map_err(|error| Status::new(Code::Internal, error.to_string()))?;
        if answer.len() <= room {
            return Ok(answer);
        }
        if limit == 1 {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("the answer has more than {room} bytes: ask for something less long"),
            ));
        }
        limit /= 4;
        limit = limit.max(1);
    }
}

fn started(caller: &Caller) -> SystemTime {
    let up = crate::clock::now().saturating_duration_since(caller.fabric.started);
    SystemTime::now()
        .checked_sub(up)
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Shown {
    fn of((record, matched): &(&Record, Match)) -> Self {
        let fate = &*record.fate;
        let (reason, status) = match fate {
            Fate::Dropped { reason, .. } => (reason.as_str(), None),
            Fate::Refused { status, .. } => (status.code.as_str(), Some(status)),
        };
        Self {
            what: fate.what(),
            reason,
            matched: *matched,
            count: record.count,
            first_ms: unix_ms(record.first),
            last_ms: unix_ms(record.last),
            publisher: fate.sender().uri().to_owned(),
            receiver: fate.receiver().map(|key| Receiver {
                identity: key.identity.uri().to_owned(),
                session: key.name.to_string(),
            }),
            verb: fate.verb().map(crate::policy::Verb::as_str),
            topic: fate.subject().map(str::to_owned),
            message_id: fate.message_id().map(|id| printable(id).into_owned()),
            status: status.map(|status| Outcome {
                code: status.code.as_str(),
                message: status.message.clone(),
                rule: (status.denial.as_ref())
                    .and_then(|denial| Some(denial.rule.as_ref()?.to_string())),
            }),
        }
    }
}
