//! Calls: from the caller's stream to a responder's and back, with deadline and cancellation.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use selvedge_certs::Identity;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

use crate::clock;
use crate::fabric::Fabric;
use crate::inference;
use crate::policy::{Decision, LivePolicy, Verb};
use crate::quic::FrameReader;
use crate::services::NoResponder;
use crate::system;
use crate::tenant::Tenant;

pub(crate) mod exchange;
pub(crate) mod local;
pub(crate) mod messages;
pub(crate) mod tracker;

use self::exchange::{Exchange, Interrupted, Leg, Sink, Source};
use self::messages::Asked;
use crate::services::Link;

/// Who opened a stream, and where.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) tenant: Arc<Tenant>,
    /// From the certificate.
    pub(crate) identity: Identity,
    pub(crate) policy: LivePolicy,
}

/// Longest deadline that is kept; a longer one is cut to it.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Caller {
    /// When a request with `deadline_ms` left is due.
    pub(crate) fn due(&self, deadline_ms: u32, now: Instant) -> Instant {
        let left = match deadline_ms {
            0 => self.fabric.limits.default_deadline,
            ms => Duration::from_millis(ms.into()),
        };
        now + left.min(LONGEST)
    }

    /// The denial, counted, when policy does not allow it.
    pub(crate) fn allow(&self, verb: Verb, subject: &TopicName) -> Result<(), Status> {
        match self.policy.now().decide(verb, subject) {
            Decision::Allowed { .. } => Ok(()),
            Decision::Denied(denial) => {
                self.fabric.metrics.deny(verb.as_str());
                Err(denial.into())
            }
        }
    }

    /// Remembers, for `selvedge explain`, a request that ended before anything was answered.
    pub(crate) fn refused(&self, verb: Verb, subject: &str, status: &Status) {
        // Who gives up knows it.
        if status.code != Code::Cancelled {
            let explain = &self.tenant.explain;
            explain.request_refused(&self.identity, verb, subject, status);
        }
    }
}

/// Serves one stream that a client opened: a call or an inference.
pub(crate) async fn serve(caller: Caller, send: SendStream, recv: RecvStream) {
    let metrics = Arc::clone(&caller.fabric.metrics);
    let mut reader = FrameReader::new(recv, caller.fabric.limits.max_frame_bytes);
    let first = tokio::time::timeout(caller.fabric.limits.handshake_timeout, reader.next()).await;
    let (recv, rest, frame) = match first {
        Ok(Ok(Some(frame))) => {
            let (recv, rest) = reader.into_parts();
            (recv, rest, frame)
        }
        Ok(Ok(None)) => return refuse(&caller, send, "the stream ended before its header").await,
        Ok(Err(error)) => return refuse(&caller, send, &error.to_string()).await,
        Err(_) => return refuse(&caller, send, "no header arrived in time").await,
    };
    let leg = Leg { send, recv };
    metrics.calls_in_flight.inc();
    match frame.kind {
        Kind::CALL => match frame::decode("call header", frame.body) {
            Ok(header) => {
                let code = call(&caller, header, leg, rest).await;
                metrics.call_ended(code);
            }
            Err(error) => refuse(&caller, leg.send, &error.to_string()).await,
        },
        Kind::INFER => match frame::decode("inference header", frame.body) {
            Ok(header) => {
                // Its future is by far the larger, and every call would move one of its size.
                let infer = Box::pin(inference::infer(&caller, header, leg, rest));
                let (tier, code) = infer.await;
                metrics.inference_ended(tier.map_or("none", |tier| tier.as_str()), code);
            }
            Err(error) => refuse(&caller, leg.send, &error.to_string()).await,
        },
        Kind(other) => {
            let message =
                format!("first frame of a stream has kind {other}: expected CALL or INFER");
            refuse(&caller, leg.send, &message).await;
        }
    }
    metrics.calls_in_flight.dec();
}

async fn refuse(caller: &Caller, mut send: SendStream, why: &str) {
    caller.fabric.metrics.protocol_error("quic", "call");
    let status = Status::new(Code::InvalidArgument, why);
    caller.tenant.refused(&caller.identity, &status);
    end_with(&mut send, status).await;
}

/// Writes the status as the last frame.
pub(crate) async fn end_with(send: &mut impl Sink, status: Status) {
    let frame = frame::encode(Kind::STATUS, &wire::Status::from(status));
    if send.write(&mut [frame]).await.is_ok() {
        send.finish();
    }
}

/// Asks for a call from within this process, as [`serve`] does for those that come over a stream.
/// Dropping the response cancels it. The payload has to fit one frame.
pub(crate) fn request(
    caller: &Caller,
    header: wire::CallHeader,
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
        let code = call(&caller, header, leg, Bytes::new()).await;
        metrics.call_ended(code);
        metrics.calls_in_flight.dec();
    });
    response
}

async fn call(
    caller: &Caller,
    header: wire::CallHeader,
    mut leg: Leg<impl Sink, impl Source>,
    rest: Bytes,
) -> Code {
    let service = header.service.clone();
    let status = match place_and_relay(caller, header, &mut leg, rest).await {
        Ok(code) => return code,
        Err(status) => status,
    };
    caller.refused(Verb::Call, &service, &status);
    let code = status.code;
    end_with(&mut leg.send, status).await;
    leg.recv.stop(code);
    code
}

/// Finds a responder and runs the call. An error is a status that nothing was answered before.
async fn place_and_relay(
    caller: &Caller,
    header: wire::CallHeader,
    leg: &mut Leg<impl Sink, impl Source>,
    mut rest: Bytes,
) -> Result<Code, Status> {
    let due = caller.due(header.deadline_ms, clock::now());
    let service = TopicName::parse(header.service.as_str())
        .map_err(|error| Status::new(Code::InvalidArgument, error.to_string()))?;
    caller.allow(Verb::Call, &service)?;
    if system::is_reserved(&service) {
        return Box::pin(system::call(caller, &service, leg, rest, due)).await;
    }
    let fabric = &caller.fabric;
    let cancelled = leg.send.stopped();
    tokio::pin!(cancelled);
    let (placed, mut callee) = loop {
        let place = caller.tenant.services.place(
            &service,
            caller.identity.site(),
            fabric.start_grace(clock::now()),
            fabric.limits.resume_grace,
            due,
        );
        let placed = tokio::select! {
            placed = place => placed,
            code = &mut cancelled => return Ok(leg.abandon(code)),
        };
        let placed = placed.map_err(|error| match error {
            NoResponder::NotFound if clock::now() >= due => Status::new(
                Code::DeadlineExceeded,
                format!("no responder for {service} came in time"),
            ),
            NoResponder::NotFound => {
                Status::new(Code::NotFound, format!("nobody serves {service}"))
            }
            NoResponder::Full { service_time } => Status::new(
                Code::ResourceExhausted,
                format!("every responder for {service} has as many calls as it takes"),
            )
            .retry_after(service_time.max(Duration::from_millis(1))),
        })?;
        let onward = wire::CallHeader {
            deadline_ms: left_ms(due),
            caller: caller.identity.uri().to_owned(),
            registration: placed.responder.registration,
            ..header.clone()
        };
        let connection = match &placed.responder.link {
            Link::Quic(connection) => connection,
            Link::Messages(link) => {
                let limit = fabric.limits.max_frame_bytes;
                match Box::pin(messages::ask(leg, link, onward, rest, due, limit)).await {
                    Ok(Asked::Ended(code)) => {
                        placed.end(code);
                        return Ok(code);
                    }
                    Ok(Asked::NotTaken(request)) => rest = request,
                    Err(status) => {
                        placed.end(status.code);
                        return Err(status);
                    }
                }
                let (services, lost) = (&caller.tenant.services, Some(clock::now()));
                services.remove(&service, &placed.responder, lost);
                continue;
            }
        };
        let opened = tokio::select! {
            opened = Leg::open(connection, frame::encode(Kind::CALL, &onward)) => opened,
            code = &mut cancelled => return Ok(leg.abandon(code)),
            () = tokio::time::sleep_until(due.into()) => {
                return Err(Status::new(Code::DeadlineExceeded, "the responder took no further call in time"));
            }
        };
        // A responder that was lost before it got the header has not begun: another may.
        match opened {
            Some(callee) => break (placed, callee),
            None => {
                caller
                    .tenant
                    .services
                    .remove(&service, &placed.responder, Some(clock::now()));
            }
        }
    };
    let code = relay(leg, &mut callee, rest, due, fabric.limits.max_frame_bytes).await;
    placed.end(code);
    Ok(code)
}

/// Forwards a call both ways to its end.
async fn relay(
    caller: &mut Leg<impl Sink, impl Source>,
    callee: &mut Leg,
    rest: Bytes,
    due: Instant,
    limit: usize,
) -> Code {
    let mut tracker = tracker::ResponseTracker::new(limit);
    let outcome = {
        let stopped = std::pin::pin!(caller.send.stopped());
        let request = std::pin::pin!(exchange::forward_request(
            &mut caller.recv,
            &mut callee.send,
            rest
        ));
        let deadline = std::pin::pin!(tokio::time::sleep_until(due.into()));
        let mut exchange = Exchange {
            stopped,
            request,
            deadline,
            forwarding: true,
        };
        exchange
            .during(exchange::copy_response(
                &mut callee.recv,
                &mut caller.send,
                &mut tracker,
            ))
            .await
    };
    exchange::conclude(caller, callee, &tracker, outcome).await
}

/// Time left until `due`, at least a millisecond since zero means none given.
pub(crate) fn left_ms(due: Instant) -> u32 {
    let left = due.saturating_duration_since(clock::now());
    u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1)
}

/// What a status says of an interruption.
pub(crate) fn interruption(interrupted: Interrupted) -> Status {
    match interrupted {
        Interrupted::Cancelled => Status::new(Code::Cancelled, "the caller gave up"),
        Interrupted::DeadlineExceeded => {
            Status::new(Code::DeadlineExceeded, "the deadline has passed")
        }
    }
}
