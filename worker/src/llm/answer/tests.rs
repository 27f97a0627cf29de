//! Messages as the API has them.

#![allow(clippy::unwrap_used)]

use super::*;

fn writer(operation: Operation, request: &Value) -> Writer {
    let asked = Asked::read(operation, request.to_string().as_bytes()).unwrap();
    Writer::new(operation, "r-1".to_owned(), &asked, 17)
}

fn json(message: &[u8]) -> Value {
    serde_json::from_slice(message).unwrap()
}

const USAGE: Usage = Usage {
    prompt: 3,
    answer: 2,
};

#[test]
fn a_whole_answer_is_one_object() {
    let counted = json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5});
    let asked = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(
        json(&writer(Operation::Chat, &asked).whole("yes", Finish::Stop, USAGE)),
        json!({
            "id": "r-1", "object": "chat.completion", "created": 17, "model": "m", "usage": counted,
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "yes"},
                "logprobs": null, "finish_reason": "stop",
            }],
        })
    );
    let asked = json!({"model": "m", "prompt": "hi"});
    assert_eq!(
        json(&writer(Operation::Completion, &asked).whole("yes", Finish::Length, USAGE)),
        json!({
            "id": "r-1", "object": "text_completion", "created": 17, "model": "m", "usage": counted,
            "choices": [{"index": 0, "text": "yes", "logprobs": null, "finish_reason": "length"}],
        })
    );
}

#[test]
fn an_answer_in_parts_names_its_role_first_and_its_end_last() {
    let asked = json!({"messages": [{"role": "user", "content": "hi"}], "stream": true});
    let mut writer = writer(Operation::Chat, &asked);
    let choices = |message: Bytes| json(&message)["choices"][0].clone();
    assert_eq!(
        choices(writer.part("a", USAGE)),
        json!({
            "index": 0, "delta": {"role": "assistant", "content": "a"},
            "logprobs": null, "finish_reason": null,
        })
    );
    assert_eq!(
        choices(writer.part("b", USAGE))["delta"],
        json!({"content": "b"})
    );
    let end = writer.end("", Finish::Length, USAGE);
    assert_eq!(json(&end)["object"], "chat.completion.chunk");
    assert_eq!(json(&end).get("usage"), None);
    let end = choices(end);
    assert_eq!(
        (&end["delta"], &end["finish_reason"]),
        (&json!({}), &json!("length"))
    );
    assert_eq!(writer.usage(USAGE), None);
}

#[test]
fn tokens_are_counted_where_that_is_wanted() {
    let counted = json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5});
    let asked = |options: Value| json!({"prompt": "hi", "stream": true, "stream_options": options});
    let mut last = writer(
        Operation::Completion,
        &asked(json!({"include_usage": true})),
    );
    assert_eq!(
        json(&last.part("a", USAGE)).get("usage"),
        Some(&Value::Null)
    );
    let usage = json(&last.usage(USAGE).unwrap());
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &counted));

    let running = asked(json!({"continuous_usage_stats": true}));
    let mut running = writer(Operation::Completion, &running);
    assert_eq!(json(&running.part("a", USAGE))["usage"], counted);
    assert_eq!(running.usage(USAGE), None);
}
