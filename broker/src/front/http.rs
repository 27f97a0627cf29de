//! What the HTTP side of the front door shares: bodies, read within bounds, and answers.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use selvedge_proto::status::{Code, Status};

/// The body of every answer of the front door.
pub(crate) type Body = tonic::body::Body;

/// Where the JSON of a body ends and binary tensors begin.
pub(crate) const JSON_BYTES: HeaderName =
    HeaderName::from_static("inference-header-content-length");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A whole body in memory.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Body::new(Full::new(bytes.into()))
}

/// An answer in JSON.
pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// The HTTP status that says the same.
pub(crate) fn http_status(status: &Status) -> StatusCode {
    match status.code {
        Code::Ok => StatusCode::OK,
        // What nginx calls "client closed request"; nobody reads it.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::OutOfRange => StatusCode::PAYLOAD_TOO_LARGE,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        // A residency that no worker satisfies: asking again changes nothing, and clients of OpenAI
        // ask again after 409 and from 500 on.
        Code::FailedPrecondition => StatusCode::UNPROCESSABLE_ENTITY,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Says in headers whether and when to ask again: only when nothing was begun and a time is known.
pub(crate) fn retry_advice(status: &Status, headers: &mut HeaderMap) {
    let again = status.retry_after.is_some();
    headers.insert(
        HeaderName::from_static("x-should-retry"),
        HeaderValue::from_static(if again { "true" } else { "false" }),
    );
    if let Some(after) = status.retry_after {
        let ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        headers.insert(header::RETRY_AFTER, ms.div_ceil(1000).max(1).into());
        headers.insert(HeaderName::from_static("retry-after-ms"), ms.max(1).into());
    }
    if status.code == Code::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
}

/// Reads a body of at most `limit` bytes within `time`. One that says it is longer is refused before
/// anything of it is read.
pub(crate) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    limit: usize,
    time: Duration,
) -> Result<Bytes, Status> {
    let too_large = || {
        Status::new(
            Code::OutOfRange,
            format!("the request is over {limit} bytes"),
        )
    };
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING)
        && encoding != "identity"
    {
        return Err(Status::new(
            Code::InvalidArgument,
            "compressed requests are not taken: send it without Content-Encoding",
        ));
    }
    let length = headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(time, Limited::new(body, limit).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Status::new(
            Code::Cancelled,
            format!("the request broke off: {error}"),
        )),
        Err(_) => Err(Status::new(
            Code::DeadlineExceeded,
            "the request did not arrive in time",
        )),
    }
}
