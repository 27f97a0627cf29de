#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_request_gets_the_servers_name_for_the_model() {
    let body = with_model(br#"{"model":"a","stream":true,"messages":[]}"#, "b").unwrap();
    let value: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        value,
        serde_json::json!({"model": "b", "stream": true, "messages": []})
    );
    for wrong in [&b"[]"[..], b"{", b"\xff"] {
        assert_eq!(
            with_model(wrong, "b").unwrap_err().code,
            Code::InvalidArgument
        );
    }
}

#[test]
fn refusals_are_typed_and_say_what_the_server_said() {
    for (status, body, code, message) in [
        (
            429,
            r#"{"error":{"message":"slow down"}}"#,
            Code::ResourceExhausted,
            "slow down",
        ),
        (503, "busy", Code::Unavailable, "503 Service Unavailable: "),
        (
            401,
            r#"{"error":"no key"}"#,
            Code::FailedPrecondition,
            "no key",
        ),
        (400, r#"{"detail":"bad"}"#, Code::InvalidArgument, "bad"),
        (500, "", Code::Internal, "500 Internal Server Error: "),
    ] {
        let refusal = refusal(StatusCode::from_u16(status).unwrap(), body.as_bytes());
        assert_eq!(refusal.code, code);
        assert!(refusal.message.ends_with(message), "{refusal}");
    }
    let mut headers = hyper::HeaderMap::new();
    assert_eq!(retry_after(&headers), None);
    headers.insert("retry-after", "2".parse().unwrap());
    assert_eq!(retry_after(&headers), Some(Duration::from_secs(2)));
    headers.insert("retry-after-ms", "150".parse().unwrap());
    assert_eq!(retry_after(&headers), Some(Duration::from_millis(150)));
}

#[test]
fn an_error_within_a_stream_is_told_from_text_about_errors() {
    let error = error_in(br#"{"error":{"message":"out of memory"}}"#).unwrap();
    assert!(error.message.ends_with("out of memory"));
    assert_eq!(
        error_in(br#"{"choices":[{"delta":{"content":"\"error\""}}]}"#),
        None
    );
    assert_eq!(error_in(b"{}"), None);
}
