//! What an MQTT 5.0 client asks for: calls and inferences, answered at the response topic it names.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::message::{Properties, to_wire_properties};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::calls::local::Response;
use crate::calls::{self, Caller};
use crate::front::ask::ask;
use crate::front::request::{Bounds, InferResponse, Parameter, explained};
use crate::front::{json, rest};
use crate::inference;
use crate::mqtt::exchange::{DEADLINE, Exchange, MORE, Message, invalid, is_reserved, put_status};
use crate::policy::Verb;

/// User property that names the version of a model.
const VERSION: &str = "version";

/// User property that names a request.
const REQUEST_ID: &str = "request-id";

/// Content type of tensors in the JSON of the Open Inference Protocol.
const JSON: &str = "application/json";

/// What is asked and not answered yet.
#[derive(Debug, Default)]
pub(super) struct Asking {
    /// Dropping one gives its request up.
    tasks: JoinSet<()>,
    /// Bytes of the requests.
    held: Arc<AtomicUsize>,
}

/// Bytes of one request, counted until dropped.
struct Held {
    all: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Where an answer goes.
struct Reply {
    topic: Arc<str>,
    correlation: Bytes,
    /// Of the subscriptions that the topic matches.
    subscription_ids: Vec<u32>,
    messages: mpsc::Sender<Message>,
}

impl Reply {
    fn message(&self, payload: Bytes, content_type: &str, user: Vec<(String, String)>) -> Message {
        Message {
            topic: Arc::clone(&self.topic),
            properties: Properties {
                content_type: content_type.to_owned(),
                correlation_data: self.correlation.clone(),
                user,
                ..Properties::default()
            },
            expiry: None,
            subscription_ids: self.subscription_ids.clone(),
            payload,
            asks: None,
        }
    }

    fn end(&self, status: &Status) -> Message {
        let mut user = Vec::new();
        put_status(&mut user, status);
        self.message(Bytes::new(), "", user)
    }

    async fn send(&self, message: Message) {
        // The connection is gone when it takes none, and with it whoever waits.
        let _ = self.messages.send(message).await;
    }

    /// Passes a response on: each of its messages as one, and its status with the last.
    async fn pass(&self, mut response: Response) {
        let mut held: Option<Bytes> = None;
        let mut explanation = Vec::new();
        let status = loop {
            let frame = match response.next().await {
                Ok(Some(frame)) => frame,
                Ok(None) => break broken("it ended without a status"),
                Err(status) => break status,
            };
            match frame.kind {
                Kind::DATA => {
                    if let Some(before) = held.replace(frame.body) {
                        let more = vec![(MORE.to_owned(), "true".to_owned())];
                        self.send(self.message(before, "", more)).await;
                    }
                }
                Kind::ANSWER => match frame::decode::<wire::InferAnswer>("answer", frame.body) {
                    Ok(answer) => explanation = in_words(&answer),
                    Err(error) => break broken(&error.to_string()),
                },
                Kind::STATUS => match frame::decode::<wire::Status>("status", frame.body) {
                    Ok(status) => break status.into(),
                    Err(error) => break broken(&error.to_string()),
                },
                _ => {}
            }
        };
        let mut user = explanation;
        put_status(&mut user, &status);
        let last = self.message(held.unwrap_or_default(), "", user);
        self.send(last).await;
    }
}

fn broken(why: &str) -> Status {
    Status::new(Code::Internal, format!("the answer is malformed: {why}"))
}

/// Where an answer ran and why.
fn in_words(answer: &wire::InferAnswer) -> Vec<(String, String)> {
    let named = explained(answer).into_iter();
    named
        .map(|(name, value)| (name, value.into_text()))
        .collect()
}

impl Exchange {
    /// Calls a service.
    pub(super) fn call(
        &mut self,
        service: &str,
        properties: Properties,
        payload: Bytes,
    ) -> Result<(), Status> {
        let reply = self.reply(&properties)?;
        let (service, held) = self.admit(Verb::Call, service, &reply, payload.len())?;
        let mut idempotent = false;
        let mut deadline = Deadline::of(&properties);
        let mut passed_on = Vec::new();
        for (name, value) in properties.user {
            match name.as_str() {
                DEADLINE => deadline.hurry(&value, &reply)?,
                "idempotent" => idempotent = value == "true",
                _ => passed_on.push((name, value)),
            }
        }
        let header = wire::CallHeader {
            service: service.as_str().to_owned(),
            deadline_ms: deadline.0,
            idempotent,
            properties: to_wire_properties(passed_on),
            traceparent: properties.traceparent,
            caller: String::new(),
            registration: 0,
        };
        let caller = self.caller.clone();
        self.inner().asking.tasks.spawn(async move {
            let _held = held;
            reply.pass(calls::request(&caller, header, payload)).await;
        });
        Ok(())
    }

    /// Asks a model.
    pub(super) fn infer(
        &mut self,
        model: &str,
        properties: Properties,
        payload: Bytes,
    ) -> Result<(), Status> {
        let reply = self.reply(&properties)?;
        let (model, held) = self.admit(Verb::Infer, model, &reply, payload.len())?;
        let mut deadline = Deadline::of(&properties);
        let (mut version, mut request_id) = (String::new(), String::new());
        let mut bounds = Bounds::default();
        let mut parameters = Vec::new();
        for (name, value) in properties.user {
            match name.as_str() {
                DEADLINE => deadline.hurry(&value, &reply)?,
                VERSION => version = value,
                REQUEST_ID => request_id = value,
                "min-confidence" => {
                    parameters.push(("min_confidence".to_owned(), Parameter::Text(value)));
                }
                _ => parameters.push((name, Parameter::Text(value))),
            }
        }
        if deadline.0 > 0 {
            let ms = Parameter::Int(deadline.0.into());
            parameters.push(("deadline_ms".to_owned(), ms));
        }
        bounds.take(parameters).map_err(|error| {
            let status = invalid(error.0);
            reply.inform(&status);
            status
        })?;
        bounds.traceparent = properties.traceparent;
        let as_json = matches!(&*properties.content_type, "" | JSON);
        let caller = self.caller.clone();
        self.inner().asking.tasks.spawn(async move {
            let _held = held;
            if !as_json {
                let header = bounds.header(model.as_str(), &version, &request_id, payload.len());
                let response = inference::request(&caller, header, payload);
                return reply.pass(response).await;
            }
            let answered = infer_json(&caller, &model, &version, request_id, bounds, &payload);
            let message = match Box::pin(answered).await {
                Ok((body, mut user)) => {
                    put_status(&mut user, &Status::ok());
                    reply.message(body, JSON, user)
                }
                Err(status) => reply.end(&status),
            };
            reply.send(message).await;
        });
        Ok(())
    }

    /// Where the client wants its answer: a topic that the session is subscribed to, so that nobody is
    /// sent anything that it may not have, and the answer goes to nobody else.
    fn reply(&mut self, properties: &Properties) -> Result<Reply, Status> {
        let name = properties.response_topic.as_str();
        if name.is_empty() {
            return Err(invalid("expected a response topic, found none"));
        }
        let topic = TopicName::parse(name).map_err(|error| invalid(error.to_string()))?;
        if is_reserved(name) {
            return Err(invalid(format!(
                "the response topic {name:?} is no topic: expected one of the client's own"
            )));
        }
        let subscriptions = self.session.subscriptions();
        let mut matching = subscriptions.iter().filter(|held| {
            let target = &held.target;
            target.share.is_none()
                && target.filter.matches(&topic)
                && !held.residual.iter().any(|denied| denied.matches(&topic))
        });
        let Some(first) = matching.next() else {
            return Err(Status::new(
                Code::FailedPrecondition,
                format!(
                    "the session is not subscribed to the response topic {name:?}: subscribe to it first"
                ),
            ));
        };
        let mut subscription_ids: Vec<u32> = std::iter::once(first)
            .chain(matching)
            .filter_map(|held| held.identifier)
            .collect();
        subscription_ids.sort_unstable();
        subscription_ids.dedup();
        Ok(Reply {
            topic: name.into(),
            correlation: properties.correlation_data.clone(),
            subscription_ids,
            messages: self.inner().messages.clone(),
        })
    }

    /// Whether a request may begin. A refusal is answered, too.
    fn admit(
        &mut self,
        verb: Verb,
        subject: &str,
        reply: &Reply,
        bytes: usize,
    ) -> Result<(TopicName, Held), Status> {
        self.try_admit(verb, subject, bytes).inspect_err(|status| {
            self.caller.refused(verb, subject, status);
            reply.inform(status);
        })
    }

    fn try_admit(
        &mut self,
        verb: Verb,
        subject: &str,
        bytes: usize,
    ) -> Result<(TopicName, Held), Status> {
        let subject = TopicName::parse(subject).map_err(|error| invalid(error.to_string()))?;
        self.caller.allow(verb, &subject)?;
        let limits = &self.caller.fabric.limits;
        let (frame, most, most_bytes) = (
            limits.max_frame_bytes,
            limits.calls_per_connection as usize,
            limits.queue_bytes,
        );
        if bytes >= frame {
            let why = format!("the request has {bytes} bytes: expected less than {frame}");
            return Err(Status::new(Code::OutOfRange, why));
        }
        let asking = &mut self.inner().asking;
        while asking.tasks.try_join_next().is_some() {}
        if asking.tasks.len() >= most {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("the connection has {most} requests in progress, the most it may"),
            ));
        }
        let held = asking.held.load(Ordering::Relaxed);
        if held > 0 && held + bytes > most_bytes {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!(
                    "the requests in progress have {held} bytes: expected at most {most_bytes}"
                ),
            ));
        }
        asking.held.fetch_add(bytes, Ordering::Relaxed);
        let all = Arc::clone(&asking.held);
        Ok((subject, Held { all, bytes }))
    }
}

impl Reply {
    /// Says at once why a request does not begin, unless the client leaves its answers unread.
    fn inform(&self, status: &Status) {
        let _ = self.messages.try_send(self.end(status));
    }
}

/// Milliseconds that an answer may take; zero for the broker's default.
struct Deadline(u32);

impl Deadline {
    /// What the message expiry interval says.
    fn of(properties: &Properties) -> Self {
        let ms = properties.expiry.map(|expiry| expiry.as_millis());
        Self(ms.map_or(0, |ms| u32::try_from(ms).unwrap_or(u32::MAX).max(1)))
    }

    /// What the user property says, if that is sooner.
    fn hurry(&mut self, text: &str, reply: &Reply) -> Result<(), Status> {
        match text.parse() {
            Ok(ms @ 1..) => {
                self.0 = if self.0 == 0 { ms } else { self.0.min(ms) };
                Ok(())
            }
            _ => {
                let status = invalid(format!(
                    "user property {DEADLINE}: expected a whole number from 1, found {text:?}"
                ));
                reply.inform(&status);
                Err(status)
            }
        }
    }
}

/// Asks with tensors in JSON, and answers so.
async fn infer_json(
    caller: &Caller,
    model: &TopicName,
    version: &str,
    request_id: String,
    mut bounds: Bounds,
    body: &Bytes,
) -> Result<(Bytes, Vec<(String, String)>), Status> {
    let mut request = json::decode(body, None).map_err(rest::invalid)?;
    bounds
        .take(std::mem::take(&mut request.parameters))
        .map_err(rest::invalid)?;
    let payload = rest::payload(caller, model.as_str(), version, request.inputs)?;
    let id = if request.id.is_empty() {
        request_id
    } else {
        request.id
    };
    let header = bounds.header(model.as_str(), version, &id, payload.len());
    let mut answer = ask(caller, header, payload)?.answer().await?;
    let outputs = rest::outputs(answer.only().await?)?;
    let response = InferResponse {
        model: answer.info.model.clone(),
        version: answer.info.version.clone(),
        id,
        parameters: explained(&answer.info),
        outputs: json::select(outputs, &request.outputs).map_err(rest::invalid)?,
    };
    let (body, _) = json::encode(response, |_| false).map_err(rest::invalid)?;
    Ok((body, in_words(&answer.info)))
}
