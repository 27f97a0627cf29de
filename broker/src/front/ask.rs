//! An inference on its way through the front door: asked by the same path as any other, and read back
//! frame by frame.

use bytes::Bytes;
use selvedge_proto::frame::{self, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::wire;

use crate::calls::Caller;
use crate::calls::local::Response;
use crate::inference;

/// An answer that has begun. Dropping it cancels the request.
pub(crate) struct Answer {
    /// Where it runs and why.
    pub(crate) info: wire::InferAnswer,
    response: Response,
}

/// Sends a request off. Dropping what it returns cancels it.
///
/// # Errors
/// The payload is too large for one frame.
pub(crate) fn ask(
    caller: &Caller,
    header: wire::InferHeader,
    payload: Bytes,
) -> Result<Asked, Status> {
    let limit = caller.fabric.limits.max_frame_bytes;
    if payload.len() >= limit {
        return Err(Status::new(
            Code::OutOfRange,
            format!(
                "the request has {} bytes: expected less than {limit}",
                payload.len()
            ),
        ));
    }
    Ok(Asked(inference::request(caller, header, payload)))
}

/// A request without an answer yet.
pub(crate) struct Asked(Response);

impl Asked {
    /// Waits until the answer begins.
    ///
    /// # Errors
    /// The status that the request ended with.
    pub(crate) async fn answer(self) -> Result<Answer, Status> {
        let Self(mut response) = self;
        loop {
            let frame = response.next().await?;
            let frame = frame.ok_or_else(|| broken("it ended without an answer"))?;
            match frame.kind {
                Kind::ANSWER => {
                    let info = frame::decode("answer", frame.body)
                        .map_err(|error| broken(&error.to_string()))?;
                    return Ok(Answer { info, response });
                }
                Kind::STATUS => {
                    return Err(match status(frame.body)? {
                        status if status.is_ok() => broken("it ended without an answer"),
                        status => status,
                    });
                }
                // Kinds that are not known are skipped.
                _ => {}
            }
        }
    }
}

impl Answer {
    /// The next message of the answer, or `None` when it ended well.
    ///
    /// # Errors
    /// The status that it ended with.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            let frame = self.response.next().await?;
            let frame = frame.ok_or_else(|| broken("it ended without a status"))?;
            match frame.kind {
                Kind::DATA => return Ok(Some(frame.body)),
                Kind::STATUS => {
                    status(frame.body)?.into_result()?;
                    return Ok(None);
                }
                _ => {}
            }
        }
    }

    /// The only message of an answer.
    ///
    /// # Errors
    /// There is none or more than one, or the answer failed.
    pub(crate) async fn only(&mut self) -> Result<Bytes, Status> {
        let first = self.next().await?;
        let first = first.ok_or_else(|| broken("it is empty: expected one message"))?;
        match self.next().await? {
            None => Ok(first),
            Some(_) => Err(broken(
                "it has several messages: ask for a stream, which this answer is",
            )),
        }
    }
}

fn status(body: Bytes) -> Result<Status, Status> {
    frame::decode::<wire::Status>("status", body)
        .map(Status::from)
        .map_err(|error| broken(&error.to_string()))
}

fn broken(why: &str) -> Status {
    Status::new(Code::Internal, format!("the model's answer: {why}"))
}
