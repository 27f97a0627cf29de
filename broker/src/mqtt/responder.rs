//! What an MQTT 5.0 client answers: requests come as messages, each with a response topic that nobody
//! can guess and that only answers this request.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use selvedge_proto::message::{Properties, from_wire_properties};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use tokio::sync::mpsc;

use crate::calls::left_ms;
use crate::calls::messages::{self, Job, Part};
use crate::mqtt::exchange::{
    DEADLINE, Exchange, MESSAGE, MORE, Message, REPLY, RETRY_AFTER, SERVE, STATUS, invalid,
};
use crate::policy::Verb;
use crate::services::{Link, MessageLink, Responder};
use crate::system;
use crate::tenant::Tenant;

/// User property of a request that names its verified caller. A caller cannot set it.
const CALLER: &str = "caller";

/// Room that the head of a PUBLISH and its properties are given beside a request.
const OVERHEAD: usize = 1024;

/// Calls in progress beyond which those are looked for that have ended without the client's doing.
const SWEEP_AT: usize = 64;

/// The services of one client.
#[derive(Debug)]
pub(super) struct Serving {
    services: HashMap<TopicName, Service>,
    link: MessageLink,
    jobs: mpsc::Receiver<Job>,
    /// Calls at once of each service.
    at_once: u32,
    registrations: u32,
    /// What the client has been asked, by the token of its response topic.
    calls: HashMap<u128, mpsc::Sender<Part>>,
    sweep_at: usize,
}

#[derive(Debug)]
struct Service {
    responder: Arc<Responder>,
    /// Of the subscription.
    identifier: Option<u32>,
}

impl Serving {
    /// For a client that takes packets of `most` bytes, and `at_once` calls of each service.
    pub(super) fn new(most: usize, at_once: u32) -> Self {
        let (link, jobs) = messages::link(most.saturating_sub(OVERHEAD).max(1));
        Self {
            services: HashMap::new(),
            link,
            jobs,
            at_once,
            registrations: 0,
            calls: HashMap::new(),
            sweep_at: SWEEP_AT,
        }
    }

    /// The next request for the client. May be cancelled without loss.
    pub(super) async fn arriving(&mut self) -> Option<Job> {
        self.jobs.recv().await
    }

    /// What to send the client for a request, unless nobody waits for its answer any more.
    pub(super) fn begin(&mut self, job: Job) -> Option<Message> {
        if job.answer.is_closed() {
            return None;
        }
        if self.calls.len() >= self.sweep_at {
            self.calls.retain(|_, answer| !answer.is_closed());
            self.sweep_at = SWEEP_AT.max(2 * self.calls.len());
        }
        let identifier = self.services.get(job.header.service.as_str());
        let identifier = identifier.and_then(|service| service.identifier);
        let left = left_ms(job.due);
        let mut user = from_wire_properties(job.header.properties);
        // A caller must not speak for the broker.
        user.retain(|(name, _)| name != CALLER && name != DEADLINE);
        user.push((CALLER.to_owned(), job.header.caller));
        user.push((DEADLINE.to_owned(), left.to_string()));
        let token: u128 = rand::random();
        self.calls.insert(token, job.answer);
        Some(Message {
            topic: format!("{SERVE}{}", job.header.service).into(),
            properties: Properties {
                response_topic: format!("{REPLY}{token:032x}"),
                correlation_data: Bytes::copy_from_slice(&token.to_be_bytes()),
                traceparent: job.header.traceparent,
                user,
                ..Properties::default()
            },
            expiry: Some(Duration::from_millis(left.into())),
            subscription_ids: identifier.into_iter().collect(),
            payload: job.payload,
            asks: Some(token),
        })
    }

    /// Takes an answer to the response topic of this token.
    ///
    /// # Errors
    /// The client was not asked so, or the call has ended.
    pub(super) fn answer(
        &mut self,
        token: &str,
        properties: &Properties,
        payload: Bytes,
    ) -> Result<(), Status> {
        let token = (token.len() == 32)
            .then(|| u128::from_str_radix(token, 16).ok())
            .flatten()
            .ok_or_else(Self::no_call)?;
        let call = self.calls.get(&token).ok_or_else(Self::no_call)?;
        let said = |wanted: &str| {
            let mut user = properties.user.iter();
            user.find(|(name, _)| name == wanted)
                .map(|(_, value)| value.as_str())
        };
        let part = match said(STATUS) {
            None if said(MORE) == Some("true") => Part::More(payload),
            None => Part::End(Some(payload), Status::ok()),
            Some(name) => {
                let known = Code::ALL.iter().find(|code| code.as_str() == name);
                let code = known.copied().unwrap_or(Code::Unknown);
                let mut status = Status::new(code, said(MESSAGE).unwrap_or_default());
                if let Some(ms) = said(RETRY_AFTER).and_then(|text| text.parse().ok()) {
                    status = status.retry_after(Duration::from_millis(ms));
                }
                let message = (status.is_ok() || !payload.is_empty()).then_some(payload);
                Part::End(message, status)
            }
        };
        // The last place is kept for the end.
        let overrun = matches!(part, Part::More(_)) && call.capacity() <= 1;
        if call.is_closed() {
            self.calls.remove(&token);
            return Err(Self::no_call());
        }
        if overrun {
            let status = Status::new(
                Code::ResourceExhausted,
                format!(
                    "the answer has more than {} messages that the caller has not taken",
                    messages::PARTS
                ),
            );
            self.fail(token, status.clone());
            return Err(status);
        }
        let ends = matches!(part, Part::End(..));
        let _ = call.try_send(part);
        if ends {
            self.calls.remove(&token);
        }
        Ok(())
    }

    /// Ends a call with an error.
    pub(super) fn fail(&mut self, token: u128, status: Status) {
        if let Some(call) = self.calls.remove(&token) {
            let _ = call.try_send(Part::End(None, status));
        }
    }

    /// What a client is told whose answer is to nothing.
    pub(super) fn no_call() -> Status {
        Status::new(
            Code::NotFound,
            "no call in progress has this response topic: it may have ended by its deadline",
        )
    }

    /// Withdraws a service. Whether there was one.
    pub(super) fn withdraw(&mut self, tenant: &Tenant, service: &str) -> bool {
        let Some((name, held)) = self.services.remove_entry(service) else {
            return false;
        };
        tenant.services.remove(&name, &held.responder, None);
        true
    }

    /// Withdraws every service. `lost`: the client may come back with them.
    pub(super) fn withdraw_all(&mut self, tenant: &Tenant, lost: Option<Instant>) {
        for (name, held) in self.services.drain() {
            tenant.services.remove(&name, &held.responder, lost);
        }
    }
}

impl Exchange {
    /// Registers the client as a responder.
    pub(super) fn serve(&mut self, service: &str, identifier: Option<u32>) -> Result<(), Status> {
        self.try_serve(service, identifier)
            .inspect_err(|status| self.caller.refused(Verb::Serve, service, status))
    }

    fn try_serve(&mut self, service: &str, identifier: Option<u32>) -> Result<(), Status> {
        let service = TopicName::parse(service).map_err(|error| invalid(error.to_string()))?;
        self.caller.allow(Verb::Serve, &service)?;
        system::check_unreserved(&service)?;
        let most = self.caller.fabric.limits.registrations_per_session;
        let (identity, tenant) = (
            self.caller.identity.clone(),
            Arc::clone(&self.caller.tenant),
        );
        let serving = &mut self.inner().serving;
        if let Some(held) = serving.services.get_mut(&service) {
            held.identifier = identifier;
            return Ok(());
        }
        if serving.services.len() >= most {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("the connection has {most} registrations, the most it may"),
            ));
        }
        serving.registrations = serving.registrations.wrapping_add(1);
        let link = Link::Messages(serving.link.clone());
        let responder = Responder::new(identity, serving.registrations, link, serving.at_once);
        let responder = tenant.services.insert(service.clone(), responder);
        let held = Service {
            responder,
            identifier,
        };
        serving.services.insert(service, held);
        Ok(())
    }
}
