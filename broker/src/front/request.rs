//! An inference as the Open Inference Protocol asks for it and answers it, whatever it is written in,
//! and the bounds that come with a request.

use std::time::Duration;

use hyper::HeaderMap;
use selvedge_proto::inference::{Preference, Residency, Tensor, Tier};
use selvedge_proto::message::{Class, to_wire_properties};
use selvedge_proto::wire;

#[cfg(test)]
mod tests;

/// What every header of ours begins with. One that is not known is refused: a bound that is
/// misspelt must not be ignored.
const PREFIX: &str = "x-selvedge-";

/// Largest deadline of `grpc-timeout`: eight digits of hours, which is more than a day is kept of.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Why a request cannot be understood, in words for whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

impl Invalid {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// The value of a request's or answer's parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Parameter {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A whole number above what [`Parameter::Int`] holds.
    Uint(u64),
    /// A number.
    Double(f64),
    /// Text.
    Text(String),
}

impl Parameter {
    /// The value as properties of the fabric hold it.
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Uint(value) => value.to_string(),
            Self::Double(value) => value.to_string(),
            Self::Text(value) => value,
        }
    }

    fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Int(value) => u64::try_from(*value).ok(),
            Self::Uint(value) => Some(*value),
            Self::Text(text) => text.parse().ok(),
            _ => None,
        }
    }
}

/// A request for an inference with tensors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InferRequest {
    /// Names the request; may be empty.
    pub id: String,
    /// What the requester says besides.
    pub parameters: Vec<(String, Parameter)>,
    /// The tensors, each as long as its shape and datatype say.
    pub inputs: Vec<Tensor>,
    /// The outputs wanted; empty for all.
    pub outputs: Vec<Wanted>,
    /// Outputs that say nothing else are wanted in binary.
    pub binary: bool,
}

/// An output that is asked for by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// In binary, or not; [`InferRequest::binary`] decides when it is not said.
    pub binary: Option<bool>,
}

/// An answer with tensors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InferResponse {
    /// The model.
    pub model: String,
    /// Its version.
    pub version: String,
    /// The request's id.
    pub id: String,
    /// Where it ran and why, and what the model says besides.
    pub parameters: Vec<(String, Parameter)>,
    /// The tensors.
    pub outputs: Vec<Tensor>,
}

/// What bounds a request, from its headers and parameters. Where both say something, the stricter
/// holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Bounds {
    /// How long the answer may take.
    pub deadline: Option<Duration>,
    /// How far the payload may travel.
    pub residency: Option<Residency>,
    /// Which worker to favour.
    pub preference: Preference,
    /// Escalate an edge answer that is less sure than this.
    pub min_confidence: Option<f32>,
    /// The request may be made again on another worker.
    pub idempotent: bool,
    /// W3C trace context.
    pub traceparent: String,
    /// Who goes first of those who wait.
    pub class: Class,
    /// Requests with the same one go to the same worker; empty for any.
    pub routing_key: String,
    /// Parameters for the model.
    pub parameters: Vec<(String, String)>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            deadline: None,
            residency: None,
            preference: Preference::Fastest,
            min_confidence: None,
            idempotent: false,
            traceparent: String::new(),
            class: Class::Normal,
            routing_key: String::new(),
            parameters: Vec::new(),
        }
    }
}

impl Bounds {
    /// The bounds in the headers of a request, or the metadata of a call.
    ///
    /// # Errors
    /// A header does not read as it should, or is one of ours that is not known.
    pub fn of_headers(headers: &HeaderMap) -> Result<Self, Invalid> {
        let mut bounds = Self::default();
        for (name, value) in headers {
            let name = name.as_str();
            let ours = name.strip_prefix(PREFIX);
            if ours.is_none()
                && !matches!(
                    name,
                    "grpc-timeout"
                        | "x-stainless-read-timeout"
                        | "x-stainless-timeout"
                        | "traceparent"
                )
            {
                continue;
            }
            let text = value
                .to_str()
                .map_err(|_| Invalid(format!("{name}: expected printable ASCII")))?;
            match (ours, name) {
                (
                    Some(
                        key @ ("residency" | "prefer" | "min-confidence" | "idempotent"
                        | "routing-key"),
                    ),
                    _,
                ) => {
                    bounds.set(
                        &key.replace('-', "_"),
                        name,
                        &Parameter::Text(text.to_owned()),
                    )?;
                }
                (Some("deadline-ms"), _) => {
                    let ms = text.parse().map_err(|_| {
                        Invalid(format!("{name}: expected milliseconds, found {text:?}"))
                    })?;
                    bounds.hurry(Duration::from_millis(ms));
                }
                (Some("priority"), _) => {
                    bounds.set("priority", name, &Parameter::Text(text.to_owned()))?;
                }
                (Some(_), _) => {
                    return Err(Invalid(format!(
                        "{name} is not known: expected one of {PREFIX}deadline-ms, residency, \
                         prefer, min-confidence, idempotent, routing-key and priority"
                    )));
                }
                (None, "grpc-timeout") => {
                    let timeout = grpc_timeout(text).ok_or_else(|| {
                        Invalid(format!(
                            "{name}: expected up to eight digits and one of H, M, S, m, u, n, \
                             found {text:?}"
                        ))
                    })?;
                    bounds.hurry(timeout);
                }
                (None, "traceparent") => bounds.traceparent = text.to_owned(),
                // What a client library says of its own patience, in seconds, is taken if it reads.
                (None, _) => {
                    let seconds = text.parse().ok().filter(|seconds: &f64| *seconds > 0.0);
                    let timeout = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
                    timeout
                        .into_iter()
                        .for_each(|timeout| bounds.hurry(timeout));
                }
            }
        }
        Ok(bounds)
    }

    /// Takes the parameters of a request: those that are bounds, those of the protocol, and the
    /// others for the model.
    ///
    /// # Errors
    /// A bound does not read as it should.
    pub fn take(&mut self, parameters: Vec<(String, Parameter)>) -> Result<(), Invalid> {
        for (name, value) in parameters {
            match name.as_str() {
                "residency" | "prefer" | "min_confidence" | "idempotent" | "priority"
                | "routing_key" => {
                    self.set(&name, &format!("parameter {name:?}"), &value)?;
                }
                "deadline_ms" | "timeout" => {
                    let number = value.as_u64().ok_or_else(|| {
                        Invalid(format!("parameter {name:?}: expected a whole number"))
                    })?;
                    match (name.as_str(), number) {
                        // Triton: in microseconds, and none when zero.
                        ("timeout", 0) => {}
                        ("timeout", us) => self.hurry(Duration::from_micros(us)),
                        (_, ms) => self.hurry(Duration::from_millis(ms)),
                    }
                }
                _ => self.parameters.push((name, value.into_text())),
            }
        }
        Ok(())
    }

    fn set(&mut self, key: &str, at: &str, value: &Parameter) -> Result<(), Invalid> {
        let text = value.clone().into_text();
        let invalid = |why: String| Invalid(format!("{at}: {why}"));
        match key {
            "residency" => {
                let residency = text.parse().map_err(|error| invalid(format!("{error}")))?;
                self.residency = Some(match self.residency {
                    Some(held) => narrower(held, residency),
                    None => residency,
                });
            }
            "prefer" => {
                self.preference = text.parse().map_err(|error| invalid(format!("{error}")))?;
            }
            "min_confidence" => {
                let least = text
                    .parse()
                    .ok()
                    .filter(|least| (0.0..=1.0).contains(least));
                let least: f32 = least.ok_or_else(|| {
                    invalid(format!("expected a number from 0 to 1, found {text:?}"))
                })?;
                self.min_confidence =
                    Some(self.min_confidence.map_or(least, |held| held.max(least)));
            }
            "routing_key" => self.routing_key = text,
            "idempotent" => {
                self.idempotent = match text.as_str() {
                    "true" | "1" => true,
                    "false" | "0" => false,
                    _ => return Err(invalid(format!("expected true or false, found {text:?}"))),
                };
            }
            // Of Triton's requests: 1 is the highest level, 0 the model's default. Workers hear of it too.
            _ => {
                let priority: u64 = value
                    .as_u64()
                    .ok_or_else(|| invalid(format!("expected a whole number, found {text:?}")))?;
                self.class = match priority {
                    1 => Class::Alarm,
                    0 | 2 => Class::Normal,
                    _ => Class::Bulk,
                };
                self.parameters
                    .push(("priority".to_owned(), priority.to_string()));
            }
        }
        Ok(())
    }

    fn hurry(&mut self, deadline: Duration) {
        self.deadline = Some(self.deadline.map_or(deadline, |held| held.min(deadline)));
    }

    /// The header of the request to the fabric.
    pub(crate) fn header(
        self,
        model: &str,
        version: &str,
        id: &str,
        payload: usize,
    ) -> wire::InferHeader {
        wire::InferHeader {
            model: model.to_owned(),
            version: version.to_owned(),
            request_id: id.to_owned(),
            deadline_ms: self.deadline.map_or(0, |deadline| {
                // Zero would be the broker's default; a deadline that short is over in any case.
                u32::try_from(deadline.as_millis())
                    .unwrap_or(u32::MAX)
                    .max(1)
            }),
            residency: self.residency.unwrap_or(Residency::Tenant).to_wire(),
            preference: self.preference.to_wire(),
            min_confidence: self.min_confidence,
            idempotent: self.idempotent,
            parameters: to_wire_properties(self.parameters),
            traceparent: self.traceparent,
            payload_bytes: payload as u64,
            caller: String::new(),
            registration: 0,
            resume_from: 0,
            class: wire::Class::from(self.class).into(),
            routing_key: self.routing_key,
        }
    }
}

fn narrower(a: Residency, b: Residency) -> Residency {
    match (a, b) {
        (Residency::Site, _) | (_, Residency::Site) => Residency::Site,
        (Residency::Tenant, _) | (_, Residency::Tenant) => Residency::Tenant,
        (Residency::Any, Residency::Any) => Residency::Any,
    }
}

/// Reads `grpc-timeout`.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Some(timeout.min(LONGEST))
}

/// Where an answer ran and why, by name, and after that what the model says besides.
pub(crate) fn explained(answer: &wire::InferAnswer) -> Vec<(String, Parameter)> {
    let number = |value: u64| i64::try_from(value).map_or(Parameter::Uint(value), Parameter::Int);
    let text = |text: &str| Parameter::Text(text.to_owned());
    let tier = Tier::from_wire(answer.tier).map_or("unknown", Tier::as_str);
    let mut named = vec![
        ("worker", text(&answer.worker)),
        ("tier", text(tier)),
        ("reason", text(&answer.reason)),
        ("queue_us", number(answer.queue_us)),
        ("compute_us", number(answer.compute_us)),
        ("placement_us", number(answer.placement_us)),
        ("estimate_us", number(answer.estimate_us)),
        ("escalated", Parameter::Bool(answer.escalated)),
        ("hedged", Parameter::Bool(answer.hedged)),
    ];
    let confidence = |value: f32| Parameter::Double(f64::from(value));
    named.extend(
        answer
            .confidence
            .map(|value| ("confidence", confidence(value))),
    );
    named.extend(
        answer
            .edge_confidence
            .map(|value| ("edge_confidence", confidence(value))),
    );
    let mut all: Vec<(String, Parameter)> = named
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    for property in &answer.parameters {
        // What the broker knows cannot be forged by a worker.
        if !all.iter().any(|(name, _)| *name == property.name) {
            all.push((property.name.clone(), text(&property.value)));
        }
    }
    all
}

/// The same as headers of an answer, without what the model says. Text is cut to what a header may
/// hold.
pub(crate) fn explained_headers(answer: &wire::InferAnswer, headers: &mut HeaderMap) {
    let mut ours = answer.clone();
    ours.parameters.clear();
    for (name, value) in explained(&ours) {
        let text: String = value
            .into_text()
            .chars()
            .map(|c| {
                if c.is_ascii_graphic() || c == ' ' {
                    c
                } else {
                    '?'
                }
            })
            .take(512)
            .collect();
        let name = format!("{PREFIX}{}", name.replace('_', "-"));
        let name = hyper::header::HeaderName::try_from(name);
        if let (Ok(name), Ok(value)) = (name, text.parse()) {
            headers.insert(name, value);
        }
    }
}
