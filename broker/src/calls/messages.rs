//! Responders that take a request as one message and answer in messages: MQTT clients.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use selvedge_proto::frame::{self, FrameDecoder, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;
use tokio::sync::mpsc;

use super::exchange::{Leg, Sink, Source};
use super::{end_with, interruption};
use crate::calls::exchange::Interrupted;

/// Requests that wait for a responder's connection to take them. They are taken as fast as it
/// writes; when there are more the call waits, within its deadline.
const JOBS: usize = 16;

/// Messages of one answer that wait for the caller. A responder that sends them faster than the
/// caller takes them has its call ended: it cannot be asked to wait.
pub(crate) const PARTS: usize = 64;

/// The way to a responder's connection.
#[derive(Debug, Clone)]
pub struct MessageLink {
    jobs: mpsc::Sender<Job>,
    /// Largest request that the responder takes.
    most: usize,
}

/// A request for a responder.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) header: wire::CallHeader,
    pub(crate) payload: Bytes,
    pub(crate) due: Instant,
    /// Where the answer goes. Its other end is dropped when nobody waits for it any more; dropping
    /// this one without an end means that the responder is lost.
    pub(crate) answer: mpsc::Sender<Part>,
}

/// A piece of an answer.
#[derive(Debug)]
pub(crate) enum Part {
    /// A message, with others to follow.
    More(Bytes),
    /// The last, with a message if there is one.
    End(Option<Bytes>, Status),
}

/// A link that carries requests of at most `most` bytes, and the end at which they arrive.
pub(crate) fn link(most: usize) -> (MessageLink, mpsc::Receiver<Job>) {
    let (jobs, arriving) = mpsc::channel(JOBS);
    (MessageLink { jobs, most }, arriving)
}

/// What became of asking a responder.
pub(crate) enum Asked {
    /// The call has ended, and the caller knows it.
    Ended(Code),
    /// The responder was gone before it got the request, whose bytes these are.
    NotTaken(Bytes),
}

/// Asks a responder: reads the request, which begins with `rest`, to its end and hands it over, then
/// passes on what is answered. An error is a status that nothing was answered before.
pub(crate) async fn ask(
    caller: &mut Leg<impl Sink, impl Source>,
    link: &MessageLink,
    header: wire::CallHeader,
    rest: Bytes,
    due: Instant,
    limit: usize,
) -> Result<Asked, Status> {
    let stopped = caller.send.stopped();
    tokio::pin!(stopped);
    let deadline = tokio::time::sleep_until(due.into());
    tokio::pin!(deadline);
    let payload = tokio::select! {
        payload = read(&mut caller.recv, rest, limit.min(link.most)) => match payload? {
            Some(payload) => payload,
            None => return Ok(Asked::Ended(caller.abandon(Code::Cancelled))),
        },
        code = &mut stopped => return Ok(Asked::Ended(caller.abandon(code))),
        () = &mut deadline => return Err(interruption(Interrupted::DeadlineExceeded)),
    };
    let (answer, mut parts) = mpsc::channel(PARTS);
    let job = Job {
        header,
        payload,
        due,
        answer,
    };
    let sent = tokio::select! {
        sent = link.jobs.send(job) => sent,
        code = &mut stopped => return Ok(Asked::Ended(caller.abandon(code))),
        () = &mut deadline => {
            return Err(Status::new(
                Code::DeadlineExceeded,
                "the responder took no further call in time",
            ));
        }
    };
    if let Err(mpsc::error::SendError(job)) = sent {
        let mut bytes = BytesMut::from(frame::head(Kind::DATA, job.payload.len()));
        bytes.extend_from_slice(&job.payload);
        return Ok(Asked::NotTaken(bytes.freeze()));
    }
    let mut answered = false;
    loop {
        let part = tokio::select! {
            part = parts.recv() => part,
            code = &mut stopped => return Ok(Asked::Ended(caller.abandon(code))),
            () = &mut deadline => {
                Some(Part::End(None, interruption(Interrupted::DeadlineExceeded)))
            }
        };
        let (message, end) = match part {
            Some(Part::More(message)) => (Some(message), None),
            Some(Part::End(message, status)) => (message, Some(status)),
            None => {
                let why = "the responder was lost after it got the call";
                (None, Some(Status::new(Code::Unavailable, why)))
            }
        };
        if let Some(message) = message {
            let mut pieces = [frame::head(Kind::DATA, message.len()), message];
            let written = tokio::select! {
                written = caller.send.write(&mut pieces) => written.is_ok(),
                () = &mut deadline => return Ok(Asked::Ended(caller.abandon(Code::DeadlineExceeded))),
            };
            if !written {
                return Ok(Asked::Ended(caller.abandon(Code::Cancelled)));
            }
            answered = true;
        }
        match end {
            None => {}
            Some(status) if !answered && !status.is_ok() => return Err(status),
            Some(status) => {
                let code = status.code;
                end_with(&mut caller.send, status).await;
                caller.recv.stop(Code::Ok);
                return Ok(Asked::Ended(code));
            }
        }
    }
}

/// The only message of a request, at most `most` bytes; `None` when the caller gave up. A request
/// without a message is an empty one.
async fn read(from: &mut impl Source, rest: Bytes, most: usize) -> Result<Option<Bytes>, Status> {
    let invalid = |why: String| Status::new(Code::InvalidArgument, why);
    let mut decoder = FrameDecoder::new(most);
    decoder.push(rest);
    let mut message = None;
    loop {
        while let Some(frame) = decoder
            .next_frame()
            .map_err(|error| invalid(format!("the request: {error}")))?
        {
            if frame.kind == Kind::DATA && message.replace(frame.body).is_some() {
                return Err(Status::new(
                    Code::Unimplemented,
                    "the responder takes requests of one message, found a second one",
                ));
            }
        }
        let mut chunk = [Bytes::new()];
        match from.read(&mut chunk).await {
            Ok(Some(_)) => {
                let [chunk] = chunk;
                decoder.push(chunk);
            }
            Ok(None) => {
                decoder
                    .finish()
                    .map_err(|error| invalid(format!("the request: {error}")))?;
                return Ok(Some(message.unwrap_or_default()));
            }
            Err(_) => return Ok(None),
        }
    }
}
