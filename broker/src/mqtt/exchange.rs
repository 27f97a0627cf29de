//! Calls and inferences over one MQTT 5.0 connection, under topic names that are no topics: publishing
//! to `$call/` and `$infer/` asks, subscribing to `$serve/` answers.
//!
//! Nothing under these names is routed, retained or kept. Policy asks for `call`, `infer` and `serve`,
//! whatever `publish` and `subscribe` say.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use selvedge_proto::message::{Properties, Qos};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use tokio::sync::mpsc;

use crate::calls::Caller;
use crate::clock;
use crate::mqtt::output::{Alias, Outgoing, Output};
use crate::mqtt::packet::Version;
use crate::mqtt::requests::Asking;
use crate::mqtt::responder::Serving;
use crate::session::Session;

/// A service that is called.
pub(super) const CALL: &str = "$call/";

/// A model that is asked.
pub(super) const INFER: &str = "$infer/";

/// A service that is served.
pub(super) const SERVE: &str = "$serve/";

/// Where an answer goes.
pub(super) const REPLY: &str = "$reply/";

/// User property that names the code of how a request ended. Only the last message of an answer has
/// it.
pub(super) const STATUS: &str = "status";

/// User property with the words to [`STATUS`].
pub(super) const MESSAGE: &str = "message";

/// User property that says when to try again.
pub(super) const RETRY_AFTER: &str = "retry-after-ms";

/// User property of an answer that others follow: `true`.
pub(super) const MORE: &str = "more";

/// User property with the time that an answer may take, where a second is too coarse.
pub(super) const DEADLINE: &str = "deadline-ms";

/// Messages that wait to be written to the client. When there are more, answers wait where they
/// come from.
const MESSAGES: usize = 32;

/// Whether a topic is one of these names.
pub(super) fn is_reserved(topic: &str) -> bool {
    topic.starts_with('$')
        && [CALL, INFER, SERVE, REPLY]
            .iter()
            .any(|prefix| topic.starts_with(prefix))
}

/// Whether a filter, with or without a share group, asks for some of these names.
pub(super) fn is_reserved_filter(filter: &str) -> bool {
    let shared = filter.strip_prefix("$share/");
    let inner = shared.and_then(|rest| rest.split_once('/'));
    is_reserved(inner.map_or(filter, |(_, inner)| inner))
}

/// A message to the client that takes no part in queues: it is worthless on another connection.
#[derive(Debug)]
pub(crate) struct Message {
    pub(super) topic: Arc<str>,
    pub(super) properties: Properties,
    /// Time until the answer is due.
    pub(super) expiry: Option<Duration>,
    pub(super) subscription_ids: Vec<u32>,
    pub(super) payload: Bytes,
    /// The call that it asks the client to answer.
    pub(super) asks: Option<u128>,
}

/// The requests of one connection, each way.
pub(crate) struct Exchange {
    version: Version,
    pub(super) caller: Caller,
    pub(super) session: Arc<Session>,
    /// Largest packet that the client takes.
    limit: usize,
    /// Calls that the client takes at once.
    at_once: u32,
    /// Made when it is first needed: most connections never are.
    inner: Option<Box<Inner>>,
}

pub(super) struct Inner {
    /// What is to be written to the client, from the tasks of requests.
    pub(super) messages: mpsc::Sender<Message>,
    outgoing: mpsc::Receiver<Message>,
    pub(super) asking: Asking,
    pub(super) serving: Serving,
}

impl Exchange {
    /// For a client that takes packets of `limit` bytes, and `receive_maximum` messages at once.
    pub(super) fn new(
        version: Version,
        caller: Caller,
        session: Arc<Session>,
        limit: usize,
        receive_maximum: u16,
    ) -> Self {
        let at_once = caller.fabric.limits.calls_per_connection;
        Self {
            version,
            caller,
            session,
            limit,
            at_once: at_once.min(receive_maximum.into()),
            inner: None,
        }
    }

    pub(super) fn inner(&mut self) -> &mut Inner {
        self.inner.get_or_insert_with(|| {
            let (messages, outgoing) = mpsc::channel(MESSAGES);
            let most = self.limit.min(self.caller.fabric.limits.max_frame_bytes);
            Box::new(Inner {
                messages,
                outgoing,
                asking: Asking::default(),
                serving: Serving::new(most, self.at_once),
            })
        })
    }

    /// Takes a message to one of the reserved names.
    ///
    /// # Errors
    /// It asks for nothing, or for what cannot be had. Where it says where to answer, the answer says
    /// so, too.
    pub(super) fn publish(
        &mut self,
        topic: &TopicName,
        properties: Properties,
        payload: Bytes,
        retain: bool,
    ) -> Result<(), Status> {
        self.check_version()?;
        if retain {
            return Err(invalid("a request or an answer cannot be retained"));
        }
        let name = topic.as_str();
        if let Some(service) = name.strip_prefix(CALL) {
            self.call(service, properties, payload)
        } else if let Some(model) = name.strip_prefix(INFER) {
            self.infer(model, properties, payload)
        } else if let Some(token) = name.strip_prefix(REPLY) {
            let serving = self.inner.as_deref_mut().map(|inner| &mut inner.serving);
            match serving {
                Some(serving) => serving.answer(token, &properties, payload),
                None => Err(Serving::no_call()),
            }
        } else {
            Err(invalid(
                "nothing is published to $serve/: subscribe to it to serve, and publish to $call/ to \
                 call",
            ))
        }
    }

    /// Takes a subscription to one of the reserved names.
    ///
    /// # Errors
    /// It is none to `$serve/` and a name, or the client may not serve that.
    pub(super) fn subscribe(
        &mut self,
        filter: &str,
        identifier: Option<u32>,
    ) -> Result<(), Status> {
        self.check_version()?;
        let service = filter.strip_prefix(SERVE).ok_or_else(|| {
            let why = "only $serve/ and the name of a service can be subscribed to, without a group: \
                       answers come to the response topic of a request";
            Status::new(Code::PermissionDenied, why)
        })?;
        self.serve(service, identifier)
    }

    /// Withdraws a subscription to one of the reserved names. Whether there was one.
    pub(super) fn unsubscribe(&mut self, filter: &str) -> bool {
        let Some(inner) = &mut self.inner else {
            return false;
        };
        let service = filter.strip_prefix(SERVE);
        service.is_some_and(|service| inner.serving.withdraw(&self.caller.tenant, service))
    }

    /// The client leaves of itself: nobody needs to wait for it to come back.
    pub(super) fn leave(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.serving.withdraw_all(&self.caller.tenant, None);
        }
    }

    /// The next message to the client. May be cancelled without loss.
    pub(super) async fn next(&mut self) -> Message {
        let Some(inner) = &mut self.inner else {
            return std::future::pending().await;
        };
        loop {
            tokio::select! {
                Some(message) = inner.outgoing.recv() => return message,
                Some(job) = inner.serving.arriving() => {
                    if let Some(message) = inner.serving.begin(job) {
                        return message;
                    }
                }
            }
        }
    }

    /// Writes a message, or what stands in for one that is too large.
    pub(super) fn write(&mut self, message: &Message, output: &mut Output) {
        if self.try_write(message, output) {
            return;
        }
        let status = Status::new(
            Code::ResourceExhausted,
            format!(
                "a message of {} bytes is more than the client takes, which is packets of {}",
                message.payload.len(),
                self.limit
            ),
        );
        match (message.asks, &mut self.inner) {
            (Some(token), Some(inner)) => inner.serving.fail(token, status),
            _ => {
                let mut user = Vec::new();
                put_status(&mut user, &status);
                let short = Message {
                    topic: Arc::clone(&message.topic),
                    properties: Properties {
                        correlation_data: message.properties.correlation_data.clone(),
                        user,
                        ..Properties::default()
                    },
                    expiry: None,
                    subscription_ids: message.subscription_ids.clone(),
                    payload: Bytes::new(),
                    asks: None,
                };
                self.try_write(&short, output);
            }
        }
    }

    fn try_write(&self, message: &Message, output: &mut Output) -> bool {
        let header = message.properties.encode();
        let outgoing = Outgoing {
            alias: Alias::None,
            topic: &message.topic,
            packet_id: 0,
            qos: Qos::AtMostOnce,
            duplicate: false,
            retain: false,
            header: header.as_deref(),
            expiry: message.expiry,
            subscription_ids: &message.subscription_ids,
            payload: &message.payload,
        };
        output.publish(self.version, &outgoing, self.limit).is_ok()
    }

    /// 3.1.1 has neither response topics nor words for errors.
    fn check_version(&self) -> Result<(), Status> {
        match self.version {
            Version::V5 => Ok(()),
            Version::V3 => {
                let why = "calls, inferences and services take MQTT 5.0, found an older version";
                let status = Status::new(Code::Unimplemented, why);
                self.caller.tenant.refused(&self.caller.identity, &status);
                Err(status)
            }
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // What was served may be served again in a moment, so callers wait for it a little.
        if let Some(inner) = &mut self.inner {
            inner
                .serving
                .withdraw_all(&self.caller.tenant, Some(clock::now()));
        }
    }
}

/// Adds what a status says to the user properties of a message.
pub(super) fn put_status(user: &mut Vec<(String, String)>, status: &Status) {
    user.push((STATUS.to_owned(), status.code.as_str().to_owned()));
    if !status.message.is_empty() {
        user.push((MESSAGE.to_owned(), status.message.clone()));
    }
    if let Some(after) = status.retry_after {
        user.push((RETRY_AFTER.to_owned(), after.as_millis().to_string()));
    }
}

pub(super) fn invalid(why: impl Into<String>) -> Status {
    Status::new(Code::InvalidArgument, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_names_are_known_in_every_form() {
        for reserved in ["$call/a", "$call/#", "$infer/+", "$serve/a/b", "$reply/0"] {
            assert!(
                is_reserved(reserved) && is_reserved_filter(reserved),
                "{reserved}"
            );
            assert!(
                is_reserved_filter(&format!("$share/group/{reserved}")),
                "{reserved}"
            );
        }
        for free in ["#", "+/a", "call/a", "$calls/a", "$SYS/call/a", "a/$call/b"] {
            assert!(!is_reserved(free) && !is_reserved_filter(free), "{free}");
        }
    }
}
