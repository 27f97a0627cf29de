//! The vocabulary of a model file: text to tokens, tokens to bytes, and which tokens are no text.

use std::collections::HashSet;

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

#[cfg(test)]
mod tests;

/// How Llama 3 splits text.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Kinds of tokens, as model files number them. All others are text.
mod kind {
    /// Stands for text that no token is for.
    pub(super) const UNKNOWN: u64 = 2;
    /// Separates messages and texts.
    pub(super) const CONTROL: u64 = 3;
    /// A text that is one token whatever stands around it.
    pub(super) const USER_DEFINED: u64 = 4;
    /// Was never trained.
    pub(super) const UNUSED: u64 = 5;
}

/// Byte-level pairs, as GPT-2 and most models since have them.
pub(crate) struct Vocabulary {
    tokenizer: Tokenizer,
    /// What each token stands for; nothing for those that are no text.
    bytes: Vec<Box<[u8]>>,
    /// Tokens that end an answer.
    ends: HashSet<u32>,
    /// The tokens that separate messages and texts, as they are written.
    controls: Vec<String>,
    /// The token before every text, where there is one.
    bos: Option<u32>,
    /// Most bytes of one token.
    longest: usize,
}

impl Vocabulary {
    /// Reads the vocabulary of a file, or says what is wrong with it.
    pub(crate) fn read(content: &Content) -> Result<Self, String> {
        let model = text(content, "tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(format!(
                "tokenizer.ggml.model: expected gpt2, found {model}; only byte-level vocabularies are read"
            ));
        }
        let tokens = texts(content, "tokenizer.ggml.tokens")?;
        let merges = texts(content, "tokenizer.ggml.merges")?
            .into_iter()
            .map(|merge| {
                let pair = merge.split_once(' ');
                pair.map(|(left, right)| (left.to_owned(), right.to_owned()))
                    .ok_or_else(|| {
                        format!("tokenizer.ggml.merges: expected two tokens, found {merge:?}")
                    })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let kinds = kinds(content, tokens.len())?;

        let numbered = (0u32..).zip(&tokens);
        let vocabulary: Vocab = numbered
            .clone()
            .map(|(id, token)| (token.clone(), id))
            .collect();
        let pairs = BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .ignore_merges(flag(content, "tokenizer.ggml.ignore_merges"))
            .build()
            .map_err(|error| format!("tokenizer.ggml.merges: {error}"))?;
        let mut tokenizer = Tokenizer::new(pairs);
        tokenizer.with_pre_tokenizer(Some(splits(content)?));

        let mut bytes = Vec::with_capacity(tokens.len());
        let mut ends = HashSet::new();
        let mut controls = Vec::new();
        let (mut special, mut whole) = (Vec::new(), Vec::new());
        for ((id, token), kind) in numbered.zip(&kinds) {
            bytes.push(match *kind {
                kind::UNKNOWN | kind::UNUSED => Box::default(),
                kind::CONTROL => {
                    // A control token is never text. Whichever a model says, its answer is over.
                    ends.insert(id);
                    controls.push(token.clone());
                    special.push(AddedToken::from(token.clone(), true));
                    Box::default()
                }
                kind::USER_DEFINED => {
                    whole.push(AddedToken::from(token.clone(), false));
                    token.as_bytes().into()
                }
                _ => bytes_of(token).ok_or_else(|| {
                    format!("tokenizer.ggml.tokens: expected bytes as GPT-2 writes them, found {token:?} as token {id}")
                })?,
            });
        }
        let added = tokenizer.add_special_tokens(special);
        let added = added.and_then(|_| tokenizer.add_tokens(whole));
        added.map_err(|error| format!("tokenizer.ggml.token_type: {error}"))?;
        for key in ["eos", "eot"] {
            ends.extend(token(content, key, tokens.len())?);
        }
        let bos = token(content, "bos", tokens.len())?;
        let adds_bos = flag(content, "tokenizer.ggml.add_bos_token");
        Ok(Vocabulary {
            tokenizer,
            longest: bytes
                .iter()
                .map(|bytes| bytes.len())
                .max()
                .unwrap_or(0)
                .max(1),
            bytes,
            ends,
            controls,
            bos: bos.filter(|_| adds_bos),
        })
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The tokens of a text, with those that separate messages where they are written.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let encoded = self.tokenizer.encode_fast(text, false);
        let encoded = encoded.map_err(|error| error.to_string())?;
        let mut tokens = encoded.get_ids().to_vec();
        // A template may have written it already.
        if let Some(bos) = self.bos
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    /// The least number of tokens that a text of this many bytes can have.
    pub(crate) fn at_least(&self, bytes: usize) -> usize {
        let longest = self.controls.iter().map(String::len).max();
        bytes / longest.unwrap_or(0).max(self.longest)
    }

    /// What a token stands for; nothing when it is no text.
    pub(crate) fn bytes(&self, token: u32) -> &[u8] {
        let bytes = usize::try_from(token).ok();
        bytes
            .and_then(|token| self.bytes.get(token))
            .map_or(&[], |bytes| bytes)
    }

    /// Whether an answer is over with this token.
    pub(crate) fn ends(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// A token in this text that separates messages. Whoever wrote it could speak for others.
    pub(crate) fn control_in(&self, text: &str) -> Option<&str> {
        let mut controls = self.controls.iter();
        controls
            .find(|control| text.contains(control.as_str()))
            .map(String::as_str)
    }
}

/// The token that a file names for an end (`bos`, `eos`, `eot`), as it is written; empty if it names none.
pub(crate) fn written(content: &Content, which: &str) -> Result<String, String> {
    let mut tokens = texts(content, "tokenizer.ggml.tokens")?;
    Ok(match token(content, which, tokens.len())? {
        Some(token) => tokens.swap_remove(token as usize),
        None => String::new(),
    })
}

/// How text is split before pairs are looked for. A wrong way would only make answers worse, so an unknown one
/// is refused.
fn splits(content: &Content) -> Result<PreTokenizerWrapper, String> {
    let gpt2 = ByteLevel::new(false, false, true);
    match text(content, "tokenizer.ggml.pre").unwrap_or("default") {
        "default" | "gpt-2" => Ok(gpt2.into()),
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into()),
        "llama-bpe" | "llama3" | "llama-v3" => {
            let pattern = SplitPattern::Regex(LLAMA3.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            let split = split.map_err(|error| error.to_string())?;
            let bytes = ByteLevel::new(false, false, false);
            Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
        }
        other => Err(format!(
            "tokenizer.ggml.pre: expected gpt-2, smollm or llama-bpe, found {other}"
        )),
    }
}

/// The bytes that a token of GPT-2's alphabet stands for: printable characters of Latin-1 are themselves, and
/// the other bytes count up from U+0100.
fn bytes_of(token: &str) -> Option<Box<[u8]>> {
    let byte = |c: char| match u32::from(c) {
        printable @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(printable).ok(),
        moved @ 0x100..=0x120 => u8::try_from(moved - 0x100).ok(),
        moved @ 0x121..=0x142 => u8::try_from(moved - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    };
    token.chars().map(byte).collect()
}

fn text<'a>(content: &'a Content, key: &str) -> Result<&'a str, String> {
    match content.metadata.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!(
            "{key}: expected a text, found {:?}",
            other.value_type()
        )),
        None => Err(format!("{key}: expected a text, found none")),
    }
}

fn texts(content: &Content, key: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("{key}: expected an array of texts");
    let Some(Value::Array(values)) = content.metadata.get(key) else {
        return Err(wrong());
    };
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(wrong()),
    };
    values.iter().map(text).collect()
}

fn kinds(content: &Content, tokens: usize) -> Result<Vec<u64>, String> {
    let key = "tokenizer.ggml.token_type";
    let values = match content.metadata.get(key) {
        Some(Value::Array(values)) if values.len() == tokens => values,
        Some(Value::Array(values)) => {
            let found = values.len();
            return Err(format!(
                "{key}: expected {tokens}, one for each token, found {found}"
            ));
        }
        _ => return Err(format!("{key}: expected an array of numbers")),
    };
    let number = |value: &Value| {
        number(value).ok_or_else(|| format!("{key}: expected an array of whole numbers"))
    };
    values.iter().map(number).collect()
}

fn flag(content: &Content, key: &str) -> bool {
    matches!(content.metadata.get(key), Some(Value::Bool(true)))
}

fn token(content: &Content, which: &str, tokens: usize) -> Result<Option<u32>, String> {
    let key = format!("tokenizer.ggml.{which}_token_id");
    let Some(value) = content.metadata.get(&key) else {
        return Ok(None);
    };
    let token = number(value).filter(|&token| token < tokens as u64);
    let token = token.and_then(|token| u32::try_from(token).ok());
    token
        .map(Some)
        .ok_or_else(|| format!("{key}: expected a token under {tokens}, found {value:?}"))
}

/// A whole number that is not under zero, of whichever size a file has it.
fn number(value: &Value) -> Option<u64> {
    match *value {
        Value::U8(number) => Some(number.into()),
        Value::U16(number) => Some(number.into()),
        Value::U32(number) => Some(number.into()),
        Value::U64(number) => Some(number),
        Value::I8(number) => u64::try_from(number).ok(),
        Value::I16(number) => u64::try_from(number).ok(),
        Value::I32(number) => u64::try_from(number).ok(),
        Value::I64(number) => u64::try_from(number).ok(),
        _ => None,
    }
}
