//! `$SYS/services`: who serves what in the caller's tenant, and how it goes.

use std::sync::Arc;

use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::{TopicFilter, TopicName};
use serde::{Deserialize, Serialize};

use super::Responder;
use crate::calls::Caller;
use crate::clock;
use crate::models::WorkerModel;
use crate::placement::health::Standing;
use crate::statistics::Summary;

/// Entries of each list, unless the question says otherwise.
const DEFAULT_LIMIT: usize = 50;
/// Most entries of a list.
const LIMIT: usize = 1000;
/// Most bytes of an answer. Less of each list is sent when it would be more.
const ANSWER: usize = 256 * 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    #[serde(default)]
    pattern: Option<String>,
    #[serde(default)]
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Answer {
    /// By name.
    services: Vec<ServiceRow>,
    /// How many there are in all.
    service_count: usize,
    /// By name.
    models: Vec<ModelRow>,
    /// How many there are in all.
    model_count: usize,
}

#[derive(Debug, Serialize)]
struct ServiceRow {
    service: String,
    responders: Vec<ResponderRow>,
    responder_count: usize,
}

#[derive(Debug, Serialize)]
struct ResponderRow {
    identity: String,
    in_flight: u32,
    /// Zero is no bound.
    max_in_flight: u32,
    /// Smoothed; what the choice goes by.
    service_time_us: u64,
    #[serde(flatten)]
    summary: Summary,
}

#[derive(Debug, Serialize)]
struct ModelRow {
    model: String,
    workers: Vec<WorkerRow>,
    worker_count: usize,
}

#[derive(Debug, Serialize)]
struct WorkerRow {
    identity: String,
    version: String,
    tier: &'static str,
    loaded: bool,
    standing: &'static str,
    slots: u32,
    in_flight: u32,
    service_time_us: u64,
    #[serde(flatten)]
    summary: Summary,
}

/// Answers about the caller's own tenant. An empty question asks for everything.
///
/// # Errors
/// The question is not one.
pub(crate) fn answer(caller: &Caller, question: &[u8]) -> Result<Vec<u8>, Status> {
    let invalid = |found: String| {
        let message = format!(
            "expected a JSON object such as {{\"pattern\": \"press-7/#\", \"limit\": 50}}: {found}"
        );
        Status::new(Code::InvalidArgument, message)
    };
    let question: Question = match question {
        [] => Question::default(),
        _ => serde_json::from_slice(question).map_err(|error| invalid(error.to_string()))?,
    };
    let pattern = question.pattern.map(TopicFilter::parse).transpose();
    let pattern = pattern.map_err(|error| invalid(format!("pattern: {error}")))?;
    let wanted = |name: &TopicName| (pattern.as_ref()).is_none_or(|pattern| pattern.matches(name));
    let mut services = caller.tenant.services.responders();
    services.retain(|(name, _)| wanted(name));
    let mut models = caller.tenant.models.list();
    models.retain(|(name, _)| wanted(name));
    let room = caller.fabric.limits.max_frame_bytes.min(ANSWER);
    let mut limit = question.limit.unwrap_or(DEFAULT_LIMIT).clamp(1, LIMIT);
    loop {
        let answer = Answer {
            services: (services.iter().take(limit))
                .map(|(name, responders)| ServiceRow::new(name, responders, limit))
                .collect(),
            service_count: services.len(),
            models: (models.iter().take(limit))
                .map(|(name, workers)| ModelRow::new(name, workers, limit))
                .collect(),
            model_count: models.len(),
        };
        let answer = serde_json::to_vec(&answer)
            .map_err(|error| Status::new(Code::Internal, error.to_string()))?;
        if answer.len() <= room {
            return Ok(answer);
        }
        if limit == 1 {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("the answer has more than {room} bytes: ask with a narrower pattern"),
            ));
        }
        limit = (limit / 4).max(1);
    }
}

impl ServiceRow {
    fn new(name: &TopicName, responders: &[Arc<Responder>], limit: usize) -> Self {
        let rows = responders.iter().take(limit).map(|responder| ResponderRow {
            identity: responder.identity.uri().to_owned(),
            in_flight: responder.load.outstanding(),
            max_in_flight: responder.max_in_flight,
            service_time_us: super::micros(responder.load.service_time()),
            summary: responder.statistics.summary(),
        });
        Self {
            service: name.as_str().to_owned(),
            responders: rows.collect(),
            responder_count: responders.len(),
        }
    }
}

impl ModelRow {
    fn new(name: &TopicName, workers: &[Arc<WorkerModel>], limit: usize) -> Self {
        let now = clock::now();
        let rows = workers.iter().take(limit).map(|worker| WorkerRow {
            identity: worker.identity.uri().to_owned(),
            version: worker.version.clone(),
            tier: worker.tier.as_str(),
            loaded: worker.is_loaded(),
            standing: match worker.standing(now) {
                Standing::Well => "well",
                Standing::Probe => "probe",
                Standing::Ejected => "ejected",
            },
            slots: worker.slots(),
            in_flight: worker.load().outstanding(),
            service_time_us: super::micros(worker.load().service_time()),
            summary: worker.statistics().summary(),
        });
        Self {
            model: name.as_str().to_owned(),
            workers: rows.collect(),
            worker_count: workers.len(),
        }
    }
}
