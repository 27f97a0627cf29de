//! The messages of an answer, as clients of the OpenAI API read them. Pure.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::request::{Asked, Operation, Stream};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model or a stop sequence ended it.
    Stop,
    /// It reached the most tokens asked for, or the end of the context.
    Length,
}

impl Finish {
    fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// How many tokens a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of the prompt, with what was begun.
    pub(crate) prompt: usize,
    /// Of the answer.
    pub(crate) answer: usize,
}

impl Usage {
    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
        })
    }
}

/// Writes the messages of one answer.
#[derive(Debug)]
pub(crate) struct Writer {
    operation: Operation,
    id: String,
    model: String,
    /// Seconds since 1970.
    created: u64,
    stream: Stream,
    has_begun: bool,
}

impl Writer {
    pub(crate) fn new(operation: Operation, id: String, asked: &Asked, created: u64) -> Self {
        Writer {
            operation,
            id,
            model: asked.model.clone(),
            created,
            stream: asked.stream.unwrap_or_default(),
            has_begun: false,
        }
    }

    /// The whole answer.
    pub(crate) fn whole(&self, text: &str, finish: Finish, usage: Usage) -> Bytes {
        let (object, mut choice) = match self.operation {
            Operation::Chat => (
                "chat.completion",
                json!({"message": {"role": "assistant", "content": text}}),
            ),
            Operation::Completion => ("text_completion", json!({"text": text})),
        };
        choice["finish_reason"] = finish.name().into();
        self.message(object, Some(choice), Some(usage.json()))
    }

    /// The next part of an answer in parts.
    pub(crate) fn part(&mut self, text: &str, usage: Usage) -> Bytes {
        self.chunk(Some(text), None, usage)
    }

    /// The part that says why there are no more. Its text may be empty.
    pub(crate) fn end(&mut self, text: &str, finish: Finish, usage: Usage) -> Bytes {
        let text = Some(text).filter(|text| !text.is_empty());
        self.chunk(text, Some(finish), usage)
    }

    /// The part after the end that says how many tokens there were, if that is wanted.
    pub(crate) fn usage(&self, usage: Usage) -> Option<Bytes> {
        let object = self.object();
        self.stream
            .usage
            .then(|| self.message(object, None, Some(usage.json())))
    }

    fn chunk(&mut self, text: Option<&str>, finish: Option<Finish>, usage: Usage) -> Bytes {
        let mut choice = match self.operation {
            Operation::Chat => {
                let mut delta = Map::new();
                if !self.has_begun {
                    delta.insert("role".to_owned(), "assistant".into());
                }
                if let Some(text) = text {
                    delta.insert("content".to_owned(), text.into());
                }
                json!({"delta": delta})
            }
            Operation::Completion => json!({"text": text.unwrap_or_default()}),
        };
        self.has_begun = true;
        choice["finish_reason"] = finish.map_or(Value::Null, |finish| finish.name().into());
        let usage = match self.stream {
            Stream {
                running_usage: true,
                ..
            } => Some(usage.json()),
            // The API has the key in every part, if the last is to have a value in it.
            Stream { usage: true, .. } => Some(Value::Null),
            _ => None,
        };
        self.message(self.object(), Some(choice), usage)
    }

    fn object(&self) -> &'static str {
        match self.operation {
            Operation::Chat => "chat.completion.chunk",
            Operation::Completion => "text_completion",
        }
    }

    fn message(&self, object: &str, choice: Option<Value>, usage: Option<Value>) -> Bytes {
        let choices: Vec<Value> = choice
            .into_iter()
            .map(|mut choice| {
                choice["index"] = 0.into();
                choice["logprobs"] = Value::Null;
                choice
            })
            .collect();
        let mut message = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            message["usage"] = usage;
        }
        message.to_string().into()
    }
}

#[cfg(test)]
mod tests;
