//! Inference: from a request to a worker that may answer it, and on to the cloud when it is unsure.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use selvedge_proto::frame::{self, Frame, Kind};
use selvedge_proto::inference::{Preference, Residency, Tier};
use selvedge_proto::message::Class;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

use crate::calls::exchange::{self, Exchange, Interrupted, Leg, ResponseEnd, Sink, Source};
use crate::calls::local;
use crate::calls::tracker::ResponseTracker;
use crate::calls::{Caller, end_with, interruption, left_ms};
use crate::clock;
use crate::metrics::TierLabel;
use crate::models::{Excluded, Patience, Slot, WorkerModel};
use crate::placement::affinity::{MAX_ROUTING_KEY, fingerprint};
use crate::placement::{Refusal, Request};
use crate::policy::Verb;
use crate::quic::{FrameReader, ReadFrameError};

mod continuation;
mod race;

use self::continuation::Begun;
use self::race::{Raced, race};

/// An edge answer is not given up when less than this share of the deadline is left.
const CASCADE_SHARE: u32 = 10;

/// How often a request is made again at most.
const REPETITIONS: usize = 2;

/// Kept back of a cloud worker's time, for the edge answer to arrive in its place.
const RESERVE: Duration = Duration::from_millis(50);

/// A request that was read and checked.
#[derive(Clone)]
struct Checked {
    model: TopicName,
    residency: Residency,
    preference: Preference,
    class: Class,
    affinity: Option<u64>,
    due: Instant,
    begun: Instant,
    header: wire::InferHeader,
}

/// An edge answer that is held back while the cloud is asked.
struct Held {
    answer: wire::InferAnswer,
    leg: Leg,
    rest: Bytes,
    slot: Slot,
}

/// What came of asking one worker.
enum Attempt {
    /// The response was passed on to its end.
    Done(Code),
    /// The answer's confidence is too low; nothing of it was passed on.
    Unsure(Box<Held>),
    /// The worker answered with a status and nothing else.
    Refused(Status),
    /// The worker was lost before it answered anything.
    Lost(Arc<WorkerModel>),
}

/// Asks for an inference from within this process, as [`infer`] serves those that come over a stream.
/// Dropping the response cancels it. The payload has to fit one frame.
pub(crate) fn request(
    caller: &Caller,
    header: wire::InferHeader,
    payload: Bytes,
) -> local::Response {
    let limit = caller.fabric.limits.max_frame_bytes;
    let request = VecDeque::from([frame::head(Kind::DATA, payload.len()), payload]);
    let (leg, response) = local::pair(request, limit);
    let caller = caller.clone();
    let tasks = caller.fabric.tasks.clone();
    tasks.spawn(async move {
        let metrics = &caller.fabric.metrics;
        metrics.calls_in_flight.inc();
        let (tier, code) = infer(&caller, header, leg, Bytes::new()).await;
        metrics.inference_ended(tier.map_or("none", |tier| tier.as_str()), code);
        metrics.calls_in_flight.dec();
    });
    response
}

/// Serves one inference. Returns where it ran and how it ended.
pub(crate) async fn infer(
    caller: &Caller,
    header: wire::InferHeader,
    mut leg: Leg<impl Sink, impl Source>,
    rest: Bytes,
) -> (Option<Tier>, Code) {
    let mut tier = None;
    let model = header.model.clone();
    let status = match run(caller, header, &mut leg, rest, &mut tier).await {
        Ok(code) => return (tier, code),
        Err(status) => status,
    };
    caller.refused(Verb::Infer, &model, &status);
    let code = status.code;
    end_with(&mut leg.send, status).await;
    leg.recv.stop(code);
    (tier, code)
}

/// An error is a status that nothing was answered before.
async fn run(
    caller: &Caller,
    header: wire::InferHeader,
    leg: &mut Leg<impl Sink, impl Source>,
    rest: Bytes,
    tier: &mut Option<Tier>,
) -> Result<Code, Status> {
    let request = check(caller, header)?;
    caller.allow(Verb::Infer, &request.model)?;
    let may_repeat = request.header.min_confidence.is_some() || request.header.idempotent;
    // Only a request that can be sent twice is read whole first, and only up to the bound.
    let limit = if may_repeat {
        caller.fabric.limits.cascade_bytes
    } else {
        0
    };
    let mut payload = Whole {
        bytes: rest,
        ended: false,
    };
    if may_repeat {
        payload.read(leg, limit, request.due).await?;
    }
    caller.tenant.models.earn_repetition(&request.model);
    let mut lost: Vec<Excluded> = Vec::new();
    loop {
        let asked_for = clock::now();
        let slot = tokio::select! {
            slot = place(caller, &request, None, &lost) => slot?,
            code = leg.send.stopped() => return Ok(leg.abandon(code)),
        };
        *tier = Some(slot.worker.tier);
        let label = TierLabel {
            tier: slot.worker.tier.as_str(),
        };
        let wait = &caller.fabric.metrics.slot_wait;
        wait.get_or_create(&label)
            .observe(asked_for.elapsed().as_secs_f64());
        let threshold = request
            .header
            .min_confidence
            .filter(|_| payload.ended && slot.worker.tier == Tier::Edge);
        let reason = match (request.header.min_confidence, payload.ended) {
            (Some(_), false) => format!(
                "{}; the request is over {limit} bytes and cannot be escalated",
                slot.choice.reason
            ),
            _ => slot.choice.reason.clone(),
        };
        // What may be made twice and is held whole may be given to two workers.
        let attempt = if request.header.idempotent && payload.ended {
            hedge(caller, &request, leg, &payload, slot, reason, tier).await?
        } else {
            ask(
                caller, &request, leg, &payload, slot, reason, threshold, None,
            )
            .await?
        };
        match attempt {
            Attempt::Done(code) => return Ok(code),
            Attempt::Refused(status) => return Err(status),
            Attempt::Unsure(held) => {
                return escalate(caller, &request, leg, &payload, *held, tier).await;
            }
            Attempt::Lost(worker)
                if request.header.idempotent
                    && payload.ended
                    && lost.len() < REPETITIONS
                    && caller.tenant.models.spend_repetition(&request.model) =>
            {
                lost.push(Excluded(worker));
            }
            Attempt::Lost(worker) => {
                return Err(Status::new(
                    Code::Unavailable,
                    format!(
                        "worker {} was lost after it got the request",
                        worker.identity
                    ),
                ));
            }
        }
    }
}

/// Asks one worker, or two when the first does not answer, and says in `tier` whose answer it is.
async fn hedge(
    caller: &Caller,
    request: &Checked,
    leg: &mut Leg<impl Sink, impl Source>,
    payload: &Whole,
    slot: Slot,
    reason: String,
    tier: &mut Option<Tier>,
) -> Result<Attempt, Status> {
    match Box::pin(race(caller, request, leg, payload, slot)).await? {
        Raced::Gone(code) => Ok(Attempt::Done(leg.abandon(code))),
        Raced::Unanswered(slot, Unanswered::Lost) => Ok(Attempt::Lost(blame(caller, slot))),
        Raced::Unanswered(slot, Unanswered::Status(status)) => {
            settle(caller, slot, status.code);
            Ok(Attempt::Refused(status))
        }
        Raced::Answered {
            slot,
            worker,
            answer,
            rest,
            hedged,
        } => {
            *tier = Some(slot.worker.tier);
            let least = (request.header.min_confidence)
                .filter(|_| slot.worker.tier == Tier::Edge && hedged.is_none());
            let mut worker = worker;
            if least.is_some_and(|least| answer.confidence.unwrap_or(1.0) < least) {
                return Ok(Attempt::Unsure(Box::new(Held {
                    answer: *answer,
                    leg: worker,
                    rest,
                    slot,
                })));
            }
            let is_hedged = hedged.is_some();
            let reason = match hedged {
                Some(hedged) => format!("{hedged}; {}", slot.choice.reason),
                None => reason,
            };
            let answer = wire::InferAnswer {
                hedged: is_hedged,
                ..complete_answer(caller, *answer, request, &slot, reason, None)
            };
            let code = if slot.worker.continues {
                let begun = Begun { slot, worker, rest };
                let passing =
                    continuation::pass_on(caller, request, leg, payload, &answer, begun, tier);
                Box::pin(passing).await
            } else {
                pass_on(caller, leg, &mut worker, &answer, rest, slot, request.due).await
            };
            Ok(Attempt::Done(code))
        }
    }
}

/// Asks a cloud worker in place of an unsure edge answer, which is used after all when that fails.
async fn escalate(
    caller: &Caller,
    request: &Checked,
    leg: &mut Leg<impl Sink, impl Source>,
    payload: &Whole,
    mut held: Held,
    tier: &mut Option<Tier>,
) -> Result<Code, Status> {
    let confidence = held.answer.confidence.unwrap_or_default();
    let left = request.due.saturating_duration_since(clock::now());
    let total = request.due.saturating_duration_since(request.begun);
    let kept = if left < total / CASCADE_SHARE {
        format!("edge answer of confidence {confidence:.3} kept: too little time to escalate")
    } else {
        match place(caller, request, Some(Tier::Cloud), &[]).await {
            Err(status) => format!(
                "edge answer of confidence {confidence:.3} kept: no cloud worker ({})",
                status.message
            ),
            Ok(slot) => {
                let reason = format!(
                    "escalated, edge confidence {confidence:.3} was too low; {}",
                    slot.choice.reason
                );
                let hurried = Checked {
                    due: request.due - RESERVE.min(total / 20),
                    ..request.clone()
                };
                let asked = ask(
                    caller,
                    &hurried,
                    leg,
                    payload,
                    slot,
                    reason,
                    None,
                    Some(confidence),
                );
                match asked.await {
                    Err(status) if status.code == Code::DeadlineExceeded => format!(
                        "edge answer of confidence {confidence:.3} kept: the cloud did not answer in time"
                    ),
                    Err(status) => return Err(status),
                    Ok(Attempt::Done(code)) => {
                        *tier = Some(Tier::Cloud);
                        caller.fabric.metrics.escalations.inc();
                        // The edge has nothing more to say; its slot is free again.
                        held.leg.abandon(Code::Ok);
                        held.slot.complete();
                        return Ok(code);
                    }
                    Ok(Attempt::Refused(status)) => format!(
                        "edge answer of confidence {confidence:.3} kept: the cloud answered {status}"
                    ),
                    Ok(Attempt::Lost(_) | Attempt::Unsure(_)) => {
                        format!(
                            "edge answer of confidence {confidence:.3} kept: the cloud worker was lost"
                        )
                    }
                }
            }
        }
    };
    let Held {
        answer,
        leg: mut edge,
        rest,
        slot,
    } = held;
    let answer = complete_answer(caller, answer, request, &slot, kept, None);
    Ok(pass_on(caller, leg, &mut edge, &answer, rest, slot, request.due).await)
}

/// Asks one worker. An error is an interruption after which nothing else may be tried.
#[allow(
    clippy::too_many_arguments,
    reason = "one request, one worker, and how to treat the answer"
)]
async fn ask(
    caller: &Caller,
    request: &Checked,
    leg: &mut Leg<impl Sink, impl Source>,
    payload: &Whole,
    slot: Slot,
    reason: String,
    threshold: Option<f32>,
    edge_confidence: Option<f32>,
) -> Result<Attempt, Status> {
    let onward = onward(caller, request, &slot.worker);
    let opened = tokio::time::timeout_at(
        request.due.into(),
        Leg::open(&slot.worker.connection, frame::encode(Kind::INFER, &onward)),
    );
    let mut worker = match opened.await {
        Ok(Some(worker)) => worker,
        Ok(None) => return Ok(Attempt::Lost(blame(caller, slot))),
        Err(_) => {
            if slot.is_overdue() {
                blame(caller, slot);
            }
            return Err(Status::new(
                Code::DeadlineExceeded,
                "the worker took no request in time",
            ));
        }
    };
    let limit = caller.fabric.limits.max_frame_bytes;
    let mut tracker = ResponseTracker::new(limit);
    let came = {
        let Leg {
            send: worker_send,
            recv: worker_recv,
        } = &mut worker;
        let stopped = std::pin::pin!(leg.send.stopped());
        let pump = std::pin::pin!(forward(&mut leg.recv, worker_send, payload));
        let deadline = std::pin::pin!(tokio::time::sleep_until(request.due.into()));
        let mut exchange = Exchange {
            stopped,
            request: pump,
            deadline,
            forwarding: true,
        };
        match exchange.during(first_frame(worker_recv, limit)).await {
            Err(interrupted) => Came::Nothing(interrupted),
            Ok(first) => match read_answer(first) {
                Err(unanswered) => Came::Unanswered(unanswered),
                Ok((answer, rest))
                    if threshold.is_some_and(|least| answer.confidence.unwrap_or(1.0) < least) =>
                {
                    Came::Unsure(answer, rest)
                }
                Ok((answer, rest)) => {
                    let answer =
                        complete_answer(caller, answer, request, &slot, reason, edge_confidence);
                    let sent = send_answer(worker_recv, &mut leg.send, &answer, rest, &mut tracker);
                    Came::Answer(exchange.during(sent).await)
                }
            },
        }
    };
    match came {
        Came::Nothing(interrupted) => {
            let status = interruption(interrupted);
            worker.abandon(status.code);
            if status.code == Code::DeadlineExceeded && slot.is_overdue() {
                blame(caller, slot);
            }
            Err(status)
        }
        Came::Unanswered(Unanswered::Lost) => {
            worker.abandon(Code::Unavailable);
            Ok(Attempt::Lost(blame(caller, slot)))
        }
        Came::Unanswered(Unanswered::Status(status)) => {
            worker.abandon(status.code);
            settle(caller, slot, status.code);
            Ok(Attempt::Refused(status))
        }
        Came::Unsure(answer, rest) => Ok(Attempt::Unsure(Box::new(Held {
            answer,
            leg: worker,
            rest,
            slot,
        }))),
        Came::Answer(outcome) => {
            let code = exchange::conclude(leg, &mut worker, &tracker, outcome).await;
            settle(caller, slot, code);
            Ok(Attempt::Done(code))
        }
    }
}

/// The header of a request as this worker gets it.
fn onward(caller: &Caller, request: &Checked, worker: &WorkerModel) -> wire::InferHeader {
    wire::InferHeader {
        deadline_ms: left_ms(request.due),
        caller: caller.identity.uri().to_owned(),
        registration: worker.registration,
        ..request.header.clone()
    }
}

/// Whether an answer with this code says that something is wrong with the worker rather than with the
/// request, or with how many there are.
fn is_the_workers_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Internal | Code::Unavailable | Code::Unknown | Code::DataLoss
    )
}

/// Frees a worker's slot after a response that ended so, which counts for the worker or against it.
fn settle(caller: &Caller, slot: Slot, code: Code) {
    if code == Code::Ok {
        slot.complete();
    } else if is_the_workers_fault(code) {
        blame(caller, slot);
    }
}

/// Counts a failure against the worker, which may be given no more requests for a while.
fn blame(caller: &Caller, slot: Slot) -> Arc<WorkerModel> {
    let worker = Arc::clone(&slot.worker);
    if slot.fail() {
        caller.fabric.metrics.ejections.inc();
        tracing::warn!(worker = %worker.identity, "a worker fails and is given no requests for a while");
    }
    worker
}

/// What came back from a worker.
enum Came {
    /// Nothing before the exchange was interrupted.
    Nothing(Interrupted),
    /// No answer.
    Unanswered(Unanswered),
    /// An answer below the confidence wanted, and what was read after it.
    Unsure(wire::InferAnswer, Bytes),
    /// An answer, which was passed on to this end.
    Answer(Result<ResponseEnd, Interrupted>),
}

/// Why a worker's response has no answer.
enum Unanswered {
    /// The worker is gone.
    Lost,
    /// It says so itself, or broke the protocol.
    Status(Status),
}

/// Reads the first frame of a worker's response.
fn read_answer(
    first: Result<Option<(Frame, Bytes)>, ReadFrameError>,
) -> Result<(wire::InferAnswer, Bytes), Unanswered> {
    let broken = |why: String| {
        Unanswered::Status(Status::new(
            Code::Internal,
            format!("the worker broke the protocol: {why}"),
        ))
    };
    let (frame, rest) = match first {
        Ok(Some(first)) => first,
        Ok(None) | Err(ReadFrameError::Read(_)) => return Err(Unanswered::Lost),
        Err(ReadFrameError::Frame(error)) => return Err(broken(error.to_string())),
    };
    match frame.kind {
        Kind::ANSWER => match frame::decode("answer", frame.body) {
            Ok(answer) => Ok((answer, rest)),
            Err(error) => Err(broken(error.to_string())),
        },
        Kind::STATUS => match frame::decode::<wire::Status>("status", frame.body).map(Status::from)
        {
            Ok(status) if status.is_ok() => Err(broken("it ended without an answer".to_owned())),
            Ok(status) => Err(Unanswered::Status(status)),
            Err(error) => Err(broken(error.to_string())),
        },
        Kind(other) => Err(broken(format!(
            "first frame of kind {other}: expected ANSWER or STATUS"
        ))),
    }
}

/// Passes on an answer that was held back.
async fn pass_on(
    caller: &Caller,
    leg: &mut Leg<impl Sink, impl Source>,
    worker: &mut Leg,
    answer: &wire::InferAnswer,
    rest: Bytes,
    slot: Slot,
    due: Instant,
) -> Code {
    let mut tracker = ResponseTracker::new(caller.fabric.limits.max_frame_bytes);
    let outcome = {
        let stopped = std::pin::pin!(leg.send.stopped());
        let nothing = std::pin::pin!(std::future::pending());
        let deadline = std::pin::pin!(tokio::time::sleep_until(due.into()));
        let mut exchange = Exchange {
            stopped,
            request: nothing,
            deadline,
            forwarding: false,
        };
        exchange
            .during(send_answer(
                &mut worker.recv,
                &mut leg.send,
                answer,
                rest,
                &mut tracker,
            ))
            .await
    };
    let code = exchange::conclude(leg, worker, &tracker, outcome).await;
    settle(caller, slot, code);
    code
}

async fn send_answer(
    from: &mut quinn::RecvStream,
    to: &mut impl Sink,
    answer: &wire::InferAnswer,
    rest: Bytes,
    tracker: &mut ResponseTracker,
) -> ResponseEnd {
    if let Err(error) = tracker.feed(&rest) {
        return ResponseEnd::Malformed(error.to_string());
    }
    let mut chunks = [frame::encode(Kind::ANSWER, answer), rest];
    if to.write(&mut chunks).await.is_err() {
        return ResponseEnd::CallerGone;
    }
    exchange::copy_response(from, to, tracker).await
}

/// Fills in what only the broker knows.
fn complete_answer(
    caller: &Caller,
    answer: wire::InferAnswer,
    request: &Checked,
    slot: &Slot,
    reason: String,
    edge_confidence: Option<f32>,
) -> wire::InferAnswer {
    let compute = Duration::from_micros(answer.compute_us.saturating_add(answer.queue_us));
    let elapsed = request.begun.elapsed();
    let overhead = elapsed.saturating_sub(compute);
    let metrics = &caller.fabric.metrics;
    let tier = TierLabel {
        tier: slot.worker.tier.as_str(),
    };
    for (times, time) in [
        (&metrics.overhead, overhead),
        (&metrics.first_answer, elapsed),
    ] {
        times.get_or_create(&tier).observe(time.as_secs_f64());
    }
    let answer = wire::InferAnswer {
        model: request.model.as_str().to_owned(),
        version: slot.worker.version.clone(),
        request_id: request.header.request_id.clone(),
        worker: slot.worker.identity.uri().to_owned(),
        tier: slot.worker.tier.to_wire(),
        placement_us: u64::try_from(overhead.as_micros()).unwrap_or(u64::MAX),
        reason,
        escalated: edge_confidence.is_some(),
        edge_confidence,
        estimate_us: u64::try_from(slot.choice.estimate.as_micros()).unwrap_or(u64::MAX),
        hedged: false,
        ..answer
    };
    tracing::debug!(
        request = answer.request_id,
        traceparent = request.header.traceparent,
        caller = %caller.identity,
        model = answer.model,
        version = answer.version,
        worker = answer.worker,
        tier = tier.tier,
        queue_us = answer.queue_us,
        compute_us = answer.compute_us,
        placement_us = answer.placement_us,
        estimate_us = answer.estimate_us,
        escalated = answer.escalated,
        reason = answer.reason,
        "an inference is answered"
    );
    answer
}

async fn first_frame(
    recv: &mut quinn::RecvStream,
    limit: usize,
) -> Result<Option<(Frame, Bytes)>, ReadFrameError> {
    let mut reader = FrameReader::new(recv, limit);
    let frame = reader.next().await?;
    let (_, rest) = reader.into_parts();
    Ok(frame.map(|frame| (frame, rest)))
}

async fn forward(
    from: &mut impl Source,
    to: &mut quinn::SendStream,
    payload: &Whole,
) -> exchange::RequestEnd {
    if !payload.ended {
        return exchange::forward_request(from, to, payload.bytes.clone()).await;
    }
    if to.write_chunk(payload.bytes.clone()).await.is_err() {
        return exchange::RequestEnd::CalleeStopped;
    }
    let _ = to.finish();
    exchange::RequestEnd::Finished
}

/// The request's payload as far as it was read.
struct Whole {
    bytes: Bytes,
    /// There is no more of it.
    ended: bool,
}

impl Whole {
    /// Reads to the end, or until more than `limit` bytes are held.
    async fn read(
        &mut self,
        leg: &mut Leg<impl Sink, impl Source>,
        limit: usize,
        due: Instant,
    ) -> Result<(), Status> {
        let mut held = BytesMut::from(std::mem::take(&mut self.bytes));
        while held.len() <= limit {
            let mut chunk = [Bytes::new()];
            match tokio::time::timeout_at(due.into(), leg.recv.read(&mut chunk)).await {
                Ok(Ok(Some(_))) => held.extend_from_slice(&chunk[0]),
                Ok(Ok(None)) => {
                    self.ended = true;
                    break;
                }
                Ok(Err(_)) => return Err(Status::new(Code::Cancelled, "the caller gave up")),
                Err(_) => {
                    return Err(Status::new(
                        Code::DeadlineExceeded,
                        "the request did not arrive in time",
                    ));
                }
            }
        }
        self.bytes = held.freeze();
        Ok(())
    }
}

fn check(caller: &Caller, header: wire::InferHeader) -> Result<Checked, Status> {
    let invalid = |message: String| Status::new(Code::InvalidArgument, message);
    let begun = clock::now();
    if let Some(least) = header.min_confidence
        && !(0.0..=1.0).contains(&least)
    {
        return Err(invalid(format!(
            "minimum confidence {least}: expected 0 to 1"
        )));
    }
    let key = &header.routing_key;
    if key.len() > MAX_ROUTING_KEY {
        return Err(invalid(format!(
            "a routing key of {} bytes: expected up to {MAX_ROUTING_KEY}",
            key.len()
        )));
    }
    let affinity = (!key.is_empty()).then(|| fingerprint(key));
    let header = wire::InferHeader {
        // Nobody but a broker leaves out messages.
        resume_from: 0,
        ..header
    };
    // Named here when the requester gave no name, so that an escalation keeps it.
    let header = match header.request_id.as_str() {
        "" => wire::InferHeader {
            request_id: format!("{:032x}", rand::random::<u128>()),
            ..header
        },
        _ => header,
    };
    Ok(Checked {
        model: TopicName::parse(header.model.as_str())
            .map_err(|error| invalid(error.to_string()))?,
        residency: Residency::from_wire(header.residency)
            .map_err(|error| invalid(error.to_string()))?,
        preference: Preference::from_wire(header.preference)
            .map_err(|error| invalid(error.to_string()))?,
        class: wire::Class::try_from(header.class)
            .map_err(|_| {
                let class = header.class;
                invalid(format!(
                    "class {class}: expected 0 normal, 1 alarm or 2 bulk"
                ))
            })?
            .into(),
        affinity,
        due: caller.due(header.deadline_ms, begun),
        begun,
        header,
    })
}

async fn place(
    caller: &Caller,
    request: &Checked,
    tier: Option<Tier>,
    exclude: &[Excluded],
) -> Result<Slot, Status> {
    let fabric = &caller.fabric;
    let bounds = Request {
        site: caller.identity.site(),
        version: &request.header.version,
        residency: request.residency,
        preference: if request.header.min_confidence.is_some()
            && request.preference == Preference::Fastest
        {
            // A cascade begins where it is cheap.
            Preference::Edge
        } else {
            request.preference
        },
        tier,
        affinity: request.affinity,
        payload_bytes: request.header.payload_bytes,
        deadline: Duration::ZERO,
    };
    let patience = Patience {
        // The cloud is asked instead of using an answer that is there: it must be free now.
        waiting: if tier.is_some() {
            0
        } else {
            fabric.limits.waiting_per_model
        },
        class: request.class,
        start_grace: if tier.is_some() {
            Duration::ZERO
        } else {
            fabric.start_grace(clock::now())
        },
        resume_grace: if tier.is_some() {
            Duration::ZERO
        } else {
            fabric.limits.resume_grace
        },
        deadline: request.due,
    };
    let model = &request.model;
    caller
        .tenant
        .models
        .place(model, &bounds, exclude, patience)
        .await
        .map_err(|refusal| match refusal {
            Refusal::NotFound if request.header.version.is_empty() => {
                Status::new(Code::NotFound, format!("no worker runs the model {model}"))
            }
            Refusal::NotFound => Status::new(
                Code::NotFound,
                format!("no worker runs version {:?} of the model {model}", request.header.version),
            ),
            Refusal::Residency => {
                fabric.metrics.privacy_refusals.inc();
                Status::new(
                    Code::FailedPrecondition,
                    format!(
                        "no worker at site {:?} runs the model {model}, and residency {} keeps the request there",
                        caller.identity.site(),
                        request.residency
                    ),
                )
            }
            Refusal::Busy { .. } if clock::now() >= request.due => {
                Status::new(Code::DeadlineExceeded, format!("no worker for {model} was free in time"))
            }
            Refusal::Busy { retry_after } => {
                Status::new(Code::ResourceExhausted, format!("every worker for {model} is busy"))
                    .retry_after(retry_after)
            }
            Refusal::TooLate { estimate } => Status::new(
                Code::DeadlineExceeded,
                format!("no worker for {model} can answer in time: the best would take {estimate:.1?}"),
            ),
        })
}
