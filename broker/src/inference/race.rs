//! Asking a second worker while the first does not answer: whoever answers first is heard, and the other
//! is told to stop. Only for requests that may be made twice and are held whole.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::inference::Tier;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;

use super::{Checked, Unanswered, Whole, blame, first_frame, forward, onward, place, read_answer};
use crate::calls::Caller;
use crate::calls::exchange::{Leg, Sink, Source};
use crate::clock;
use crate::models::{Excluded, Slot, WorkerModel};
use crate::placement::hedge::{Watch, Why, is_due};

/// How often a worker that does not answer is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// What came of asking one worker, or two.
pub(super) enum Raced {
    /// The first frame of an answer, and what was read after it.
    Answered {
        slot: Slot,
        worker: Leg,
        answer: Box<wire::InferAnswer>,
        rest: Bytes,
        /// Why this is the second worker, in words.
        hedged: Option<String>,
    },
    /// Nobody answered; this was the last.
    Unanswered(Slot, Unanswered),
    /// The caller gave up.
    Gone(Code),
}

/// A worker's stream, which is reset unless it is taken.
struct Asked(Option<Leg>);

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(leg) = &mut self.0 {
            leg.abandon(Code::Cancelled);
        }
    }
}

/// Asks the worker of `slot`, and another when that is due.
///
/// # Errors
/// The deadline has passed.
pub(super) async fn race(
    caller: &Caller,
    request: &Checked,
    leg: &mut Leg<impl Sink, impl Source>,
    payload: &Whole,
    slot: Slot,
) -> Result<Raced, Status> {
    let first = Arc::clone(&slot.worker);
    let (begun, heard) = (clock::now(), received(&first));
    let estimate = slot.choice.estimate;
    let mut contenders = FuturesUnordered::new();
    contenders.push(contend(caller, request, payload, 0, Arc::clone(&first)));
    let mut slots = [Some(slot), None];
    let mut why = None;
    let mut stopped = pin!(leg.send.stopped());
    let mut deadline = pin!(tokio::time::sleep_until(request.due.into()));
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            biased;
            code = &mut stopped => return Ok(Raced::Gone(code)),
            Some((place, came)) = contenders.next() => {
                let Some(slot) = slots[place].take() else {
                    continue;
                };
                match came {
                    Ok((worker, answer, rest)) => {
                        if why.is_some() {
                            let outcome = if place == 1 { "won" } else { "lost" };
                            caller.fabric.metrics.hedge_ended(outcome);
                        }
                        let hedged = (why.filter(|_| place == 1)).map(|why| reason(&first, why));
                        if let Some(loser) = slots[0].take()
                            && (why == Some(Why::Silent) || loser.is_overdue())
                        {
                            blame(caller, loser);
                        }
                        let answer = Box::new(answer);
                        return Ok(Raced::Answered { slot, worker, answer, rest, hedged });
                    }
                    Err(unanswered) if contenders.is_empty() => {
                        if why.is_some() {
                            caller.fabric.metrics.hedge_ended("none");
                        }
                        return Ok(Raced::Unanswered(slot, unanswered));
                    }
                    // The other is still at it.
                    Err(_) => drop(blame(caller, slot)),
                }
            }
            () = &mut deadline => {
                if why.is_some() {
                    caller.fabric.metrics.hedge_ended("none");
                }
                for slot in slots.into_iter().flatten().filter(Slot::is_overdue) {
                    blame(caller, slot);
                }
                return Err(Status::new(Code::DeadlineExceeded, "the deadline has passed"));
            }
            _ = look.tick(), if why.is_none() => {
                let watch = Watch {
                    elapsed: clock::now().saturating_duration_since(begun),
                    heard: received(&first) != heard,
                    rtt: first.connection.rtt(),
                    estimate,
                };
                if let Some(due) = is_due(&watch)
                    && let Some(slot) = second(caller, request, &first).await
                {
                    why = Some(due);
                    let worker = Arc::clone(&slot.worker);
                    slots[1] = Some(slot);
                    contenders.push(contend(caller, request, payload, 1, worker));
                }
            }
        }
    }
}

/// Datagrams that came from a worker's host.
fn received(worker: &WorkerModel) -> u64 {
    worker.connection.stats().udp_rx.datagrams
}

fn reason(first: &WorkerModel, why: Why) -> String {
    let what = match why {
        Why::Silent => "was silent",
        Why::Late => "took too long",
    };
    format!("hedged, {} {what}", first.identity)
}

/// A worker that is free now, of the other tier rather than of the same, within the budget of repetitions.
/// Whom policy and residency keep from the request they keep from this, too.
async fn second(caller: &Caller, request: &Checked, first: &Arc<WorkerModel>) -> Option<Slot> {
    let other = match first.tier {
        Tier::Edge => Tier::Cloud,
        _ => Tier::Edge,
    };
    let exclude = [Excluded(Arc::clone(first))];
    for tier in [other, first.tier] {
        if let Ok(slot) = place(caller, request, Some(tier), &exclude).await {
            let affordable = caller.tenant.models.spend_repetition(&request.model);
            return affordable.then_some(slot);
        }
    }
    None
}

/// Gives a contender the request, and says whose place it has.
async fn contend(
    caller: &Caller,
    request: &Checked,
    payload: &Whole,
    place: usize,
    worker: Arc<WorkerModel>,
) -> (usize, Result<(Leg, wire::InferAnswer, Bytes), Unanswered>) {
    let header = onward(caller, request, &worker);
    (place, begin(caller, &header, payload, &worker).await)
}

/// Gives a worker a request that is held whole, and reads the first frame of its response. The worker is told
/// to stop when this is dropped.
pub(super) async fn begin(
    caller: &Caller,
    header: &wire::InferHeader,
    payload: &Whole,
    worker: &WorkerModel,
) -> Result<(Leg, wire::InferAnswer, Bytes), Unanswered> {
    let header = frame::encode(Kind::INFER, header);
    let mut asked = Asked(Leg::open(&worker.connection, header).await);
    let Some(Leg { send, recv }) = &mut asked.0 else {
        return Err(Unanswered::Lost);
    };
    let limit = caller.fabric.limits.max_frame_bytes;
    // A worker may answer before it has the whole request.
    let sending = async {
        forward(&mut Nothing, send, payload).await;
        std::future::pending::<()>().await;
    };
    let first = tokio::select! {
        first = first_frame(recv, limit) => first,
        () = sending => return Err(Unanswered::Lost),
    };
    let (answer, rest) = read_answer(first)?;
    let worker = asked.0.take().ok_or(Unanswered::Lost)?;
    Ok((worker, answer, rest))
}

/// The source of a request that is held whole.
struct Nothing;

impl Source for Nothing {
    async fn read(
        &mut self,
        _chunks: &mut [Bytes],
    ) -> Result<Option<usize>, crate::calls::exchange::Gone> {
        Ok(None)
    }

    fn stop(&mut self, _code: Code) {}
}
