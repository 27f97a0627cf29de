#![allow(clippy::unwrap_used)]

use std::time::Duration;

use proptest::prelude::*;

use super::*;

#[test]
fn only_model_and_stream_are_read() {
    let head =
        Head::read(br#"{"messages":[{"role":"user","content":"hi"}],"model":"a/b","stream":true}"#);
    let head = head.unwrap();
    assert_eq!((head.model.as_str(), head.is_stream()), ("a/b", true));
    assert!(
        !Head::read(br#"{"model":"m","stream":null}"#)
            .unwrap()
            .is_stream()
    );
    assert!(!Head::read(br#"{"model":"m"}"#).unwrap().is_stream());
    let key = |body: &str| Head::read(body.as_bytes()).unwrap().affinity();
    assert_eq!(
        key(r#"{"model":"m","prompt_cache_key":"chat-7"}"#),
        "chat-7"
    );
    let long = "k".repeat(MAX_ROUTING_KEY + 1);
    assert_eq!(
        key(&format!(r#"{{"model":"m","prompt_cache_key":"{long}"}}"#)),
        ""
    );
    assert_eq!(key(r#"{"model":"m"}"#), "");
    for (body, expected) in [
        (&b"{}"[..], "missing field `model`"),
        (b"{\"model\":1}", "invalid type"),
        (b"{\"model\":\"m\"", "EOF"),
        (b"\xff", "no request of the OpenAI API"),
        (br#"{"model":"a","model":"b"}"#, "duplicate field `model`"),
    ] {
        let error = Head::read(body).unwrap_err().0;
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_event_is_one_whatever_line_breaks_its_json_has() {
    assert_eq!(event(b"{\"a\":1}"), "data: {\"a\":1}\n\n");
    assert_eq!(
        event(b"{\r\n\"a\":1\n}"),
        "data: {\ndata: \"a\":1\ndata: }\n\n"
    );
}

#[test]
fn a_refusal_says_whether_to_ask_again() {
    let busy =
        Status::new(Code::ResourceExhausted, "busy").retry_after(Duration::from_millis(1500));
    let response = problem(&busy);
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["retry-after"], "2");
    assert_eq!(response.headers()["retry-after-ms"], "1500");
    assert_eq!(response.headers()["x-should-retry"], "true");
    let private = problem(&Status::new(Code::FailedPrecondition, "site"));
    assert_eq!(private.status(), 422);
    assert_eq!(private.headers()["x-should-retry"], "false");
    assert!(!private.headers().contains_key("retry-after"));
    assert_eq!(
        error(&Status::new(Code::NotFound, "m")),
        json!({"error": {"message": "m", "type": "invalid_request_error", "param": null, "code": "model_not_found"}})
    );
}

proptest! {
    #[test]
    fn an_event_reads_back_as_the_message(message in "[ -~\\n]{0,60}") {
        let event = event(message.as_bytes());
        let text = std::str::from_utf8(&event).unwrap();
        prop_assert!(text.ends_with("\n\n") || text == "\n");
        prop_assert!(!text.trim_end_matches('\n').contains("\n\n"));
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty())
            .map(|line| line.strip_prefix("data: ").unwrap()).collect();
        let expected: Vec<&str> = message.split('\n').filter(|line| !line.is_empty()).collect();
        prop_assert_eq!(lines, expected);
    }

    #[test]
    fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..100)) {
        let _ = Head::read(&body);
    }
}
