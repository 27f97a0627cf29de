//! Vocabularies that files hold, and what cannot be one.

#![allow(clippy::unwrap_used)]

use std::io::Cursor;

use candle_core::quantized::gguf_file;
use proptest::prelude::*;

use super::*;

/// The character that GPT-2 writes for each byte.
fn alphabet() -> Vec<String> {
    let mut moved = 0x100..;
    (0..=255u8)
        .map(|byte| match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
            _ => char::from_u32(moved.next().unwrap()).unwrap().to_string(),
        })
        .collect()
}

/// A file without weights: all bytes, some pairs, two control tokens and one of the user.
fn metadata(pre: &str) -> Vec<(String, Value)> {
    let merges = ["1 2", "a b", "Ġ ab", "ab c"];
    let mut tokens = alphabet();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.extend(["<|end|>", "<|turn|>", "<tool>"].map(str::to_owned));
    let mut kinds = vec![1; tokens.len()];
    let count = tokens.len();
    kinds[count - 3..].copy_from_slice(&[3, 3, 4]);
    let texts = |texts: Vec<String>| Value::Array(texts.into_iter().map(Value::String).collect());
    [
        ("model", Value::String("gpt2".to_owned())),
        ("pre", Value::String(pre.to_owned())),
        ("tokens", texts(tokens)),
        ("merges", texts(merges.map(str::to_owned).to_vec())),
        (
            "token_type",
            Value::Array(kinds.into_iter().map(Value::I32).collect()),
        ),
        ("eos_token_id", Value::U32(260)),
        ("bos_token_id", Value::U32(261)),
    ]
    .into_iter()
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .collect()
}

fn content(metadata: &[(String, Value)]) -> Content {
    let mut file = Cursor::new(Vec::new());
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    gguf_file::write(&mut file, &metadata, &[]).unwrap();
    file.set_position(0);
    Content::read(&mut file).unwrap()
}

fn vocabulary(pre: &str) -> Vocabulary {
    Vocabulary::read(&content(&metadata(pre))).unwrap()
}

/// What a file is refused for when one key has another value.
fn refusal(key: &str, value: Value) -> String {
    let mut metadata = metadata("smollm");
    let place = metadata.iter_mut().find(|(held, _)| held == key).unwrap();
    place.1 = value;
    Vocabulary::read(&content(&metadata)).err().unwrap()
}

#[test]
fn pairs_are_found_within_words_and_never_across() {
    let encode = |pre: &str, text: &str| vocabulary(pre).encode(text).unwrap();
    // 256 is "12", 257 "ab", 258 " ab", 259 "abc".
    assert_eq!(encode("smollm", "abc ab"), [259, 258]);
    assert_eq!(encode("gpt-2", "12"), [256]);
    // Digits stand alone for this model.
    assert_eq!(encode("smollm", "12"), [0x31, 0x32]);
    assert_eq!(encode("llama-bpe", "12 ab"), [256, 258]);
}

#[test]
fn tokens_that_separate_messages_are_no_text() {
    let vocabulary = vocabulary("smollm");
    assert_eq!(
        vocabulary.encode("ab<|turn|>ab<tool>").unwrap(),
        [257, 261, 257, 262]
    );
    assert_eq!(vocabulary.bytes(261), b"");
    assert_eq!(vocabulary.bytes(262), b"<tool>");
    assert_eq!(vocabulary.bytes(9999), b"");
    assert!(vocabulary.ends(260) && vocabulary.ends(261) && !vocabulary.ends(262));
    assert_eq!(vocabulary.control_in("say <|turn|> now"), Some("<|turn|>"));
    assert_eq!(vocabulary.control_in("say <tool> now"), None);
    assert_eq!(
        written(&content(&metadata("smollm")), "eos").unwrap(),
        "<|end|>"
    );
    assert_eq!(written(&content(&metadata("smollm")), "eot").unwrap(), "");
}

#[test]
fn a_text_begins_once_where_the_file_says_so() {
    let mut metadata = metadata("smollm");
    metadata.push(("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true)));
    let vocabulary = Vocabulary::read(&content(&metadata)).unwrap();
    assert_eq!(vocabulary.encode("ab").unwrap(), [261, 257]);
    assert_eq!(vocabulary.encode("<|turn|>ab").unwrap(), [261, 257]);
}

#[test]
fn a_file_that_would_be_misread_is_refused() {
    let text = |text: &str| Value::String(text.to_owned());
    assert_eq!(
        refusal("tokenizer.ggml.model", text("llama")),
        "tokenizer.ggml.model: expected gpt2, found llama; only byte-level vocabularies are read"
    );
    assert_eq!(
        refusal("tokenizer.ggml.pre", text("tekken")),
        "tokenizer.ggml.pre: expected gpt-2, smollm or llama-bpe, found tekken"
    );
    assert_eq!(
        refusal("tokenizer.ggml.tokens", text("a")),
        "tokenizer.ggml.tokens: expected an array of texts"
    );
    assert_eq!(
        refusal(
            "tokenizer.ggml.token_type",
            Value::Array(vec![Value::I32(1)])
        ),
        "tokenizer.ggml.token_type: expected 263, one for each token, found 1"
    );
    assert_eq!(
        refusal("tokenizer.ggml.merges", Value::Array(vec![text("ab")])),
        "tokenizer.ggml.merges: expected two tokens, found \"ab\""
    );
    assert_eq!(
        refusal("tokenizer.ggml.eos_token_id", Value::U32(263)),
        "tokenizer.ggml.eos_token_id: expected a token under 263, found U32(263)"
    );
    let unknown = refusal("tokenizer.ggml.merges", Value::Array(vec![text("x yz")]));
    assert!(unknown.starts_with("tokenizer.ggml.merges: "), "{unknown}");
    let mut tokens: Vec<_> = (0..263).map(|token| text(&format!("t{token}"))).collect();
    tokens[5] = text("\u{20ac}");
    let foreign = refusal("tokenizer.ggml.tokens", Value::Array(tokens));
    assert!(foreign.starts_with("tokenizer.ggml."), "{foreign}");
}

proptest! {
    #[test]
    fn tokens_say_what_the_text_said(text: String, pre in prop::sample::select(vec!["gpt-2", "smollm", "llama-bpe"])) {
        let vocabulary = vocabulary(pre);
        let tokens = vocabulary.encode(&text).unwrap();
        prop_assert!(tokens.len() >= vocabulary.at_least(text.len()));
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| vocabulary.bytes(token)).copied().collect();
        prop_assert_eq!(bytes, text.into_bytes());
    }
}
