//! Going on with an answer that broke off midway, at a worker that would have given the same messages. Only
//! for requests that may be made twice and are held whole.

use std::pin::pin;

use bytes::Bytes;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::inference::Tier;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;

use super::race::begin;
use super::{
    Checked, REPETITIONS, Unanswered, Whole, blame, is_the_workers_fault, onward, place, settle,
};
use crate::calls::exchange::{self, Exchange, Leg, ResponseEnd, Sink, Source};
use crate::calls::tracker::ResponseTracker;
use crate::calls::{Caller, end_with};
use crate::models::{Excluded, Slot};
use crate::quic::{FrameReader, ReadFrameError};

/// An answer whose first frame was read.
pub(super) struct Begun {
    pub(super) slot: Slot,
    pub(super) worker: Leg,
    /// What was read after the first frame.
    pub(super) rest: Bytes,
}

/// What the requester has of an answer.
struct Passed {
    tracker: ResponseTracker,
    messages: u64,
    /// The worker's word that it leaves, which was kept back in case another goes on.
    leaving: Option<Status>,
}

/// Passes an answer on message by message. When its worker is lost, another goes on after the last message
/// that was whole.
pub(super) async fn pass_on(
    caller: &Caller,
    request: &Checked,
    leg: &mut Leg<impl Sink, impl Source>,
    payload: &Whole,
    answer: &wire::InferAnswer,
    begun: Begun,
    tier: &mut Option<Tier>,
) -> Code {
    let mut passed = Passed {
        tracker: ResponseTracker::new(caller.fabric.limits.max_frame_bytes),
        messages: 0,
        leaving: None,
    };
    let mut lost: Vec<Excluded> = Vec::new();
    let mut head = Some(frame::encode(Kind::ANSWER, answer));
    let Begun {
        mut slot,
        mut worker,
        mut rest,
    } = begun;
    loop {
        let outcome = {
            let mut exchange = Exchange {
                stopped: pin!(leg.send.stopped()),
                request: pin!(std::future::pending()),
                deadline: pin!(tokio::time::sleep_until(request.due.into())),
                forwarding: false,
            };
            let limit = caller.fabric.limits.max_frame_bytes;
            let reader = FrameReader::with(&mut worker.recv, limit, rest);
            let copying = copy(head.take(), reader, &mut leg.send, &mut passed);
            exchange.during(copying).await
        };
        let is_lost = match &outcome {
            Ok(ResponseEnd::Lost) => true,
            Ok(ResponseEnd::Reset(code)) => is_the_workers_fault(*code),
            _ => false,
        };
        // After its status there is nothing to go on with.
        if is_lost
            && passed.tracker.ended().is_none()
            && lost.len() < REPETITIONS
            && caller.tenant.models.spend_repetition(&request.model)
        {
            worker.abandon(Code::Unavailable);
            let version = slot.worker.version.clone();
            let gone = blame(caller, slot);
            let from = gone.identity.clone();
            lost.push(Excluded(gone));
            let next = go_on(caller, request, payload, &lost, version, passed.messages);
            let next = tokio::select! {
                next = next => next,
                code = leg.send.stopped() => return leg.abandon(code),
                () = tokio::time::sleep_until(request.due.into()) => {
                    Err(Status::new(Code::DeadlineExceeded, "the deadline has passed"))
                }
            };
            match next {
                Ok(begun) => {
                    tracing::info!(
                        request = request.header.request_id,
                        %from,
                        to = %begun.slot.worker.identity,
                        messages = passed.messages,
                        "an answer goes on at another worker"
                    );
                    caller.fabric.metrics.continuations.inc();
                    *tier = Some(begun.slot.worker.tier);
                    passed.leaving = None;
                    Begun { slot, worker, rest } = begun;
                    continue;
                }
                Err(status) => {
                    let code = status.code;
                    end_with(&mut leg.send, status).await;
                    leg.recv.stop(code);
                    return code;
                }
            }
        }
        let code = match passed.leaving.take() {
            Some(status) => {
                let code = worker.abandon(status.code);
                end_with(&mut leg.send, status).await;
                leg.recv.stop(code);
                code
            }
            None => exchange::conclude(leg, &mut worker, &passed.tracker, outcome).await,
        };
        settle(caller, slot, code);
        return code;
    }
}

/// Passes on whole frames only, so that an answer can always go on where it broke off.
async fn copy(
    head: Option<Bytes>,
    mut from: FrameReader<&mut quinn::RecvStream>,
    to: &mut impl Sink,
    passed: &mut Passed,
) -> ResponseEnd {
    if let Some(head) = head
        && to.write(&mut [head]).await.is_err()
    {
        return ResponseEnd::CallerGone;
    }
    loop {
        let frame = match from.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return ResponseEnd::Finished,
            Err(ReadFrameError::Read(quinn::ReadError::Reset(code))) => {
                return ResponseEnd::Reset(Code::from_quic(code.into_inner()));
            }
            Err(ReadFrameError::Read(_)) => return ResponseEnd::Lost,
            Err(ReadFrameError::Frame(error)) => return ResponseEnd::Malformed(error.to_string()),
        };
        if frame.kind == Kind::STATUS
            && let Ok(status) = frame::decode::<wire::Status>("status", frame.body.clone())
            && let status = Status::from(status)
            && status.code == Code::Unavailable
        {
            passed.leaving = Some(status);
            return ResponseEnd::Lost;
        }
        let mut chunks = [frame::head(frame.kind, frame.body.len()), frame.body];
        for chunk in &chunks {
            if let Err(error) = passed.tracker.feed(chunk) {
                return ResponseEnd::Malformed(error.to_string());
            }
        }
        if to.write(&mut chunks).await.is_err() {
            return ResponseEnd::CallerGone;
        }
        passed.messages += u64::from(frame.kind == Kind::DATA);
    }
}

/// Has another worker of the same version go on after so many messages.
async fn go_on(
    caller: &Caller,
    request: &Checked,
    payload: &Whole,
    lost: &[Excluded],
    version: String,
    messages: u64,
) -> Result<Begun, Status> {
    let mut exclude = lost.to_vec();
    let workers = caller.tenant.models.workers(&request.model).into_iter();
    exclude.extend(workers.filter(|worker| !worker.continues).map(Excluded));
    let request = Checked {
        header: wire::InferHeader {
            version,
            ..request.header.clone()
        },
        ..request.clone()
    };
    let broke_off = |why: String| {
        let message = format!("the answer broke off after {messages} messages, and {why}");
        Status::new(Code::Unavailable, message)
    };
    let slot = place(caller, &request, None, &exclude)
        .await
        .map_err(|status| broke_off(format!("no other worker can go on: {}", status.message)))?;
    let onward = wire::InferHeader {
        resume_from: messages,
        ..onward(caller, &request, &slot.worker)
    };
    match begin(caller, &onward, payload, &slot.worker).await {
        Ok((worker, _, rest)) => Ok(Begun { slot, worker, rest }),
        Err(Unanswered::Lost) => {
            let next = blame(caller, slot);
            Err(broke_off(format!("{} was lost as well", next.identity)))
        }
        Err(Unanswered::Status(status)) => {
            let why = format!("{} answered {status}", slot.worker.identity);
            settle(caller, slot, status.code);
            Err(broke_off(why))
        }
    }
}
