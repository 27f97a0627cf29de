//! What a request of the OpenAI API asks of a language model, checked before any work is done for it. Pure.

use serde_json::{Map, Value};

use super::sampling::Sampling;

#[cfg(test)]
mod tests;

/// Most stop sequences of one request.
const MAX_STOPS: usize = 16;

/// Longest stop sequence, in bytes. This much of an answer is held back at most, since it may become one.
const MAX_STOP_BYTES: usize = 256;

/// Whether a value asks for nothing.
type IsNeutral = fn(&Value) -> bool;

/// What would change the answer and is not done here, with the values that ask for nothing.
const UNSUPPORTED: [(&str, IsNeutral); 12] = [
    ("n", |value| value.as_u64() == Some(1)),
    ("best_of", |value| value.as_u64() == Some(1)),
    ("frequency_penalty", is_zero),
    ("presence_penalty", is_zero),
    ("logprobs", |value| value == &Value::Bool(false)),
    ("top_logprobs", is_zero),
    ("logit_bias", is_empty),
    ("tools", is_empty),
    ("functions", is_empty),
    ("response_format", |value| value["type"] == "text"),
    ("suffix", |value| value == ""),
    ("echo", |value| value == &Value::Bool(false)),
];

/// An operation of the API that a language model answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// `chat.completions`.
    Chat,
    /// `completions`.
    Completion,
}

impl Operation {
    /// The name that requests and registrations have for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Operation::Chat => "chat.completions",
            Operation::Completion => "completions",
        }
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Asked {
    /// The requester's name for the model, which the answer repeats.
    pub(crate) model: String,
    /// What the answer goes on from.
    pub(crate) prompt: Prompt,
    /// Whether the answer comes in parts.
    pub(crate) stream: Option<Stream>,
    /// Most tokens of the answer; `None` for what the context holds.
    pub(crate) most: Option<usize>,
    /// How tokens are chosen.
    pub(crate) sampling: Sampling,
    /// Text that ends the answer and is no part of it.
    pub(crate) stops: Vec<String>,
}

/// What an answer goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// A conversation, which the model's template makes a text of.
    Chat {
        /// What was said.
        messages: Vec<Message>,
        /// The beginning of the answer, which is continued.
        begun: Option<String>,
    },
    /// A text as it is.
    Text(String),
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// `system`, `user` or `assistant`.
    pub(crate) role: &'static str,
    /// What was said.
    pub(crate) content: String,
}

/// How an answer comes in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stream {
    /// A last message says how many tokens there were.
    pub(crate) usage: bool,
    /// Each message says how many tokens there were so far.
    pub(crate) running_usage: bool,
}

/// Why a request cannot be answered. The requester is to blame.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    /// It does not read.
    #[error("the request is no JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// A key has a wrong value, or is missing.
    #[error("expected {expected} as {key}, found {found}")]
    Value {
        /// Where.
        key: String,
        /// What is taken.
        expected: &'static str,
        /// What came, or what kind of thing.
        found: String,
    },
    /// A key that nothing here follows.
    #[error("{key} is not supported by this model; leave it out")]
    Unsupported {
        /// The key.
        key: &'static str,
    },
}

impl Asked {
    /// Reads a request.
    ///
    /// # Errors
    /// It is not understood, or asks for what is not done here.
    pub(crate) fn read(operation: Operation, payload: &[u8]) -> Result<Self, Unfit> {
        let object: Map<String, Value> = serde_json::from_slice(payload)?;
        let object = Object(&object);
        for (key, is_neutral) in UNSUPPORTED {
            if object.get(key).is_some_and(|value| !is_neutral(value)) {
                return Err(Unfit::Unsupported { key });
            }
        }
        let prompt = match operation {
            Operation::Chat => object.chat()?,
            Operation::Completion => object.text()?,
        };
        let model = object.get("model").and_then(Value::as_str);
        Ok(Asked {
            model: model.unwrap_or_default().to_owned(),
            prompt,
            stream: object.stream()?,
            most: match object.most("max_completion_tokens")? {
                None => object.most("max_tokens")?,
                most => most,
            },
            sampling: object.sampling()?,
            stops: object.stops()?,
        })
    }
}

/// The object of a request. A key that is null counts as left out.
struct Object<'a>(&'a Map<String, Value>);

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn chat(&self) -> Result<Prompt, Unfit> {
        let expected = "an array of at least one message";
        let Some(Value::Array(values)) = self.get("messages").filter(|value| !is_empty(value))
        else {
            return Err(wrong("messages", expected, self.get("messages")));
        };
        let mut messages = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            messages.push(message(index, value)?);
        }
        let continues = self.get("continue_final_message") != Some(&Value::Bool(false));
        let begun = match messages.pop() {
            Some(last) if last.role == "assistant" && continues => Some(last.content),
            Some(last) => {
                messages.push(last);
                None
            }
            None => None,
        };
        if messages.is_empty() {
            return Err(Unfit::Value {
                key: "messages".to_owned(),
                expected: "a message before the one to be continued",
                found: "none".to_owned(),
            });
        }
        Ok(Prompt::Chat { messages, begun })
    }

    fn text(&self) -> Result<Prompt, Unfit> {
        let prompt = match self.get("prompt") {
            Some(Value::Array(prompts)) if prompts.len() == 1 => prompts.first(),
            prompt => prompt,
        };
        match prompt.and_then(Value::as_str) {
            Some(text) if !text.is_empty() => Ok(Prompt::Text(text.to_owned())),
            _ => Err(wrong("prompt", "one text that is not empty", prompt)),
        }
    }

    fn stream(&self) -> Result<Option<Stream>, Unfit> {
        if !self.flag("stream")? {
            return Ok(None);
        }
        let Some(options) = self.get("stream_options") else {
            return Ok(Some(Stream::default()));
        };
        let Value::Object(options) = options else {
            return Err(wrong("stream_options", "an object", Some(options)));
        };
        let options = Object(options);
        Ok(Some(Stream {
            usage: options.flag("include_usage")?,
            running_usage: options.flag("continuous_usage_stats")?,
        }))
    }

    fn flag(&self, key: &str) -> Result<bool, Unfit> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            other => Err(wrong(key, "true or false", other)),
        }
    }

    fn most(&self, key: &str) -> Result<Option<usize>, Unfit> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            // More than this machine can count is more than any context holds.
            Some(most) if most > 0 => Ok(Some(usize::try_from(most).unwrap_or(usize::MAX))),
            _ => Err(wrong(key, "a whole number over 0", Some(value))),
        }
    }

    fn sampling(&self) -> Result<Sampling, Unfit> {
        let within = |key, greatest, expected| match self.get(key) {
            None => Ok(1.0),
            Some(value) => match value.as_f64() {
                Some(number) if (0.0..=greatest).contains(&number) => Ok(number),
                _ => Err(wrong(key, expected, Some(value))),
            },
        };
        let temperature = within("temperature", 2.0, "a number from 0 to 2")?;
        let top_p = within("top_p", 1.0, "a number from 0 to 1")?;
        let seed = match self.get("seed") {
            None => None,
            Some(value) => match (value.as_u64(), value.as_i64()) {
                (Some(seed), _) => Some(seed),
                (None, Some(seed)) => Some(seed.cast_unsigned()),
                (None, None) => return Err(wrong("seed", "a whole number", Some(value))),
            },
        };
        Ok(Sampling {
            temperature,
            top_p,
            seed,
        })
    }

    fn stops(&self) -> Result<Vec<String>, Unfit> {
        let expected = "up to 16 texts of 1 to 256 bytes";
        let values = match self.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) if values.len() <= MAX_STOPS => values.as_slice(),
            Some(value @ Value::String(_)) => std::slice::from_ref(value),
            other => return Err(wrong("stop", expected, other)),
        };
        let text = |value: &Value| match value.as_str() {
            Some(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text.to_owned()),
            _ => Err(wrong("stop", expected, Some(value))),
        };
        values.iter().map(text).collect()
    }
}

fn message(index: usize, value: &Value) -> Result<Message, Unfit> {
    let key = |key: &str| format!("messages[{index}].{key}");
    let role = match value["role"].as_str() {
        // The newer name for what models were trained to know as the older.
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        _ => {
            let expected = "system, developer, user or assistant";
            return Err(wrong(key("role"), expected, value.get("role")));
        }
    };
    let expected = "text, or parts of type text";
    let content = match &value["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let mut content = String::new();
            for part in parts {
                match part["text"].as_str().filter(|_| part["type"] == "text") {
                    Some(text) => content.push_str(text),
                    None => return Err(wrong(key("content"), expected, Some(part))),
                }
            }
            content
        }
        _ => return Err(wrong(key("content"), expected, value.get("content"))),
    };
    Ok(Message { role, content })
}

fn wrong(key: impl Into<String>, expected: &'static str, found: Option<&Value>) -> Unfit {
    let found = match found {
        None | Some(Value::Null) => "none".to_owned(),
        Some(value @ (Value::Bool(_) | Value::Number(_))) => value.to_string(),
        Some(Value::String(text)) if text.len() <= 40 => format!("{text:?}"),
        Some(Value::String(text)) => format!("a text of {} bytes", text.len()),
        Some(Value::Array(values)) => format!("an array of {}", values.len()),
        Some(Value::Object(part)) => match part.get("type").and_then(Value::as_str) {
            Some(kind) if kind.len() <= 40 => format!("an object of type {kind:?}"),
            _ => "an object".to_owned(),
        },
    };
    Unfit::Value {
        key: key.into(),
        expected,
        found,
    }
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}
