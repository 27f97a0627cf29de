//! Requests that are understood, and those that are not.

#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn read(operation: Operation, request: &Value) -> Result<Asked, String> {
    Asked::read(operation, request.to_string().as_bytes()).map_err(|unfit| unfit.to_string())
}

fn chat(keys: Value) -> Result<Asked, String> {
    let mut request = json!({"model": "smol", "messages": [{"role": "user", "content": "hi"}]});
    let keys = keys.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(keys);
    read(Operation::Chat, &request)
}

fn said(role: &'static str, content: &str) -> Message {
    Message {
        role,
        content: content.to_owned(),
    }
}

#[test]
fn what_is_left_out_has_the_defaults_of_the_api() {
    let expected = Asked {
        model: "smol".to_owned(),
        prompt: Prompt::Chat {
            messages: vec![said("user", "hi")],
            begun: None,
        },
        stream: None,
        most: None,
        sampling: Sampling {
            temperature: 1.0,
            top_p: 1.0,
            seed: None,
        },
        stops: Vec::new(),
    };
    assert_eq!(chat(json!({})).unwrap(), expected);
    let nulls = json!({
        "stream": null, "stream_options": null, "max_tokens": null, "temperature": null,
        "top_p": null, "seed": null, "stop": null, "n": null, "tools": null, "logprobs": null,
    });
    assert_eq!(chat(nulls).unwrap(), expected);
    let neutral = json!({
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": false, "tools": [],
        "logit_bias": {}, "response_format": {"type": "text"}, "user": "ann", "store": false,
    });
    assert_eq!(chat(neutral).unwrap(), expected);
}

#[test]
fn everything_that_can_be_said_is_taken() {
    let asked = chat(json!({
        "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        "max_tokens": 5, "max_completion_tokens": 7,
        "temperature": 0, "top_p": 0.5, "seed": -1, "stop": ["a", "bc"],
    }))
    .unwrap();
    let stream = Stream {
        usage: true,
        running_usage: true,
    };
    let sampling = Sampling {
        temperature: 0.0,
        top_p: 0.5,
        seed: Some(u64::MAX),
    };
    assert_eq!(asked.stream, Some(stream));
    assert_eq!(asked.most, Some(7));
    assert_eq!(asked.sampling, sampling);
    assert_eq!(asked.stops, ["a", "bc"]);
    assert_eq!(chat(json!({"stop": "end"})).unwrap().stops, ["end"]);
}

#[test]
fn a_last_message_of_the_assistant_is_continued_unless_told_otherwise() {
    let messages = json!([
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "so far"},
    ]);
    let before = vec![said("system", "be brief"), said("user", "ab")];
    let continued = chat(json!({"messages": messages})).unwrap();
    assert_eq!(
        continued.prompt,
        Prompt::Chat {
            messages: before.clone(),
            begun: Some("so far".to_owned()),
        }
    );
    let all = [before, vec![said("assistant", "so far")]].concat();
    let told = json!({"messages": messages, "continue_final_message": false});
    assert_eq!(
        chat(told).unwrap().prompt,
        Prompt::Chat {
            messages: all,
            begun: None,
        }
    );
}

#[test]
fn a_completion_goes_on_from_one_text() {
    for prompt in [json!("once"), json!(["once"])] {
        let asked = read(Operation::Completion, &json!({"prompt": prompt})).unwrap();
        assert_eq!(asked.prompt, Prompt::Text("once".to_owned()));
    }
    for (prompt, found) in [
        (json!(null), "none"),
        (json!(""), "\"\""),
        (json!([1, 2]), "an array of 2"),
        (json!(["a", "b"]), "an array of 2"),
    ] {
        let error = read(Operation::Completion, &json!({"prompt": prompt})).unwrap_err();
        let expected = format!("expected one text that is not empty as prompt, found {found}");
        assert_eq!(error, expected);
    }
}

#[test]
fn what_is_not_understood_is_named() {
    let cases = [
        (
            json!({"messages": []}),
            "expected an array of at least one message as messages, found an array of 0",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "expected system, developer, user or assistant as messages[0].role, found \"tool\"",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "expected text, or parts of type text as messages[0].content, found an object of type \"image_url\"",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "so"}]}),
            "expected a message before the one to be continued as messages, found none",
        ),
        (
            json!({"temperature": 2.5}),
            "expected a number from 0 to 2 as temperature, found 2.5",
        ),
        (
            json!({"top_p": -0.1}),
            "expected a number from 0 to 1 as top_p, found -0.1",
        ),
        (
            json!({"max_tokens": 0}),
            "expected a whole number over 0 as max_tokens, found 0",
        ),
        (
            json!({"seed": 0.5}),
            "expected a whole number as seed, found 0.5",
        ),
        (
            json!({"stop": ["a", ""]}),
            "expected up to 16 texts of 1 to 256 bytes as stop, found \"\"",
        ),
        (
            json!({"stop": vec!["a"; 17]}),
            "expected up to 16 texts of 1 to 256 bytes as stop, found an array of 17",
        ),
        (
            json!({"stream": "yes"}),
            "expected true or false as stream, found \"yes\"",
        ),
        (
            json!({"stream": true, "stream_options": 1}),
            "expected an object as stream_options, found 1",
        ),
        (
            json!({"n": 2}),
            "n is not supported by this model; leave it out",
        ),
        (
            json!({"tools": [{"type": "function"}]}),
            "tools is not supported by this model; leave it out",
        ),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format is not supported by this model; leave it out",
        ),
    ];
    for (keys, expected) in cases {
        assert_eq!(chat(keys).unwrap_err(), expected);
    }
    let error = Asked::read(Operation::Chat, b"[]").unwrap_err().to_string();
    assert!(
        error.starts_with("the request is no JSON object: "),
        "{error}"
    );
}

proptest! {
    #[test]
    fn hostile_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        prop_assert!(Asked::read(Operation::Chat, &bytes).is_err());
        prop_assert!(Asked::read(Operation::Completion, &bytes).is_err());
    }
}
