//! Services that the broker answers itself, under names that nobody else may serve.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use selvedge_proto::frame::{self, FrameDecoder, FrameError, Kind};
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use selvedge_proto::wire;

use crate::calls::Caller;
use crate::calls::exchange::{Leg, Sink, Source};
use crate::explain;
use crate::services::overview;

/// How every name that is the broker's own begins.
const PREFIX: &str = "$SYS/";

/// Most bytes of a request to the broker. Topics are the longest thing that one can hold.
const REQUEST: usize = 256 * 1024;

/// Answers one request.
type Handler = fn(&Caller, &[u8]) -> Result<Vec<u8>, Status>;

/// Every service of the broker.
const SERVICES: [(&str, Handler); 2] = [
    ("$SYS/explain", explain::answer::answer),
    ("$SYS/services", overview::answer),
];

/// Whether a service of this name is the broker's own, whether or not there is one.
pub(crate) fn is_reserved(service: &TopicName) -> bool {
    service.as_str().starts_with(PREFIX)
}

/// What a client is told that wants to serve such a name.
///
/// # Errors
/// The name is reserved.
pub(crate) fn check_unreserved(service: &TopicName) -> Result<(), Status> {
    if !is_reserved(service) {
        return Ok(());
    }
    Err(Status::new(
        Code::PermissionDenied,
        format!(
            "expected a service that does not begin with {PREFIX}, found {:?}: such names are the \
             broker's own",
            service.as_str()
        ),
    ))
}

/// Answers a call that policy allows. An error is a status that nothing was answered before.
pub(crate) async fn call(
    caller: &Caller,
    service: &TopicName,
    leg: &mut Leg<impl Sink, impl Source>,
    rest: Bytes,
    due: Instant,
) -> Result<Code, Status> {
    let known = SERVICES.iter().find(|(name, _)| *name == service.as_str());
    let Some((_, handler)) = known else {
        let names: Vec<&str> = SERVICES.iter().map(|(name, _)| *name).collect();
        return Err(Status::new(
            Code::NotFound,
            format!(
                "the broker has no service {:?}: expected one of {}",
                service.as_str(),
                names.join(", ")
            ),
        ));
    };
    let request = tokio::time::timeout_at(due.into(), read(&mut leg.recv, rest)).await;
    let request = request.unwrap_or_else(|_| {
        Err(Status::new(
            Code::DeadlineExceeded,
            "the request did not arrive in time",
        ))
    })?;
    let answer = Bytes::from(handler(caller, &request)?);
    let mut pieces = [
        frame::head(Kind::DATA, answer.len()),
        answer,
        frame::encode(Kind::STATUS, &wire::Status::from(Status::ok())),
    ];
    let written = tokio::time::timeout_at(due.into(), leg.send.write(&mut pieces));
    match written.await {
        Ok(Ok(())) => {
            leg.send.finish();
            Ok(Code::Ok)
        }
        Ok(Err(_)) => Ok(leg.abandon(Code::Cancelled)),
        // Some of it may be on its way, so no status can follow.
        Err(_) => Ok(leg.abandon(Code::DeadlineExceeded)),
    }
}

/// The payload of a request, which begins with `rest`.
async fn read(from: &mut impl Source, rest: Bytes) -> Result<BytesMut, Status> {
    let malformed =
        |error: FrameError| Status::new(Code::InvalidArgument, format!("the request: {error}"));
    let mut decoder = FrameDecoder::new(REQUEST);
    decoder.push(rest);
    let mut request = BytesMut::new();
    loop {
        while let Some(frame) = decoder.next_frame().map_err(malformed)? {
            if frame.kind != Kind::DATA {
                continue;
            }
            if request.len() + frame.body.len() > REQUEST {
                return Err(Status::new(
                    Code::InvalidArgument,
                    format!("the request: expected at most {REQUEST} bytes, found more"),
                ));
            }
            request.extend_from_slice(&frame.body);
        }
        let mut chunk = [Bytes::new()];
        match from.read(&mut chunk).await {
            Ok(Some(_)) => {
                let [chunk] = chunk;
                decoder.push(chunk);
            }
            Ok(None) => {
                decoder.finish().map_err(malformed)?;
                return Ok(request);
            }
            Err(_) => return Err(Status::new(Code::Cancelled, "the caller gave up")),
        }
    }
}
