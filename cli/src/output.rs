//! What commands write: results to standard output, notes and failures to standard error.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::process::ExitCode;

use selvedge_client::{Bytes, Status};
use serde_json::{Map, Value, json};

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON object on each line, for programs.
    Json,
}

impl Format {
    /// The format that a flag `--json` stands for.
    pub(crate) fn from_flag(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }
}

/// Writes one line to standard output, at once.
pub(crate) fn line(text: impl fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes bytes to standard output as they are, at once.
pub(crate) fn raw(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// Writes one line to standard error for a person. Nobody being there to read it is no failure.
pub(crate) fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes a failure, and gives the exit code that tells of it.
pub(crate) fn failure(error: &anyhow::Error, format: Format) -> ExitCode {
    let gone = |cause: &(dyn Error + 'static)| {
        (cause.downcast_ref::<io::Error>())
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    // Whoever read our output has seen enough, as in `selvedge sub … | head`.
    if error.chain().any(gone) {
        return ExitCode::SUCCESS;
    }
    let text = chain(error.as_ref());
    note(format_args!("error: {text}"));
    if format == Format::Json {
        let mut object = Map::new();
        object.insert("ok".into(), false.into());
        object.insert("error".into(), text.into());
        if let Some(refused) = error
            .chain()
            .find_map(|cause| cause.downcast_ref::<Refused>())
        {
            object.insert("status".into(), status(&refused.status));
        }
        if let Some(problems) = error
            .chain()
            .find_map(|cause| cause.downcast_ref::<Problems>())
        {
            object.insert("problems".into(), problems.json());
        }
        let _ = line(Value::Object(object));
    }
    ExitCode::FAILURE
}

/// Rows as lines whose columns are aligned, each as wide as its widest cell.
pub(crate) fn table<Row: AsRef<[String]>>(rows: &[Row]) -> Vec<String> {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (column, cell) in row.as_ref().iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(column) {
                Some(held) => *held = width.max(*held),
                None => widths.push(width),
            }
        }
    }
    let lines = rows.iter().map(|row| {
        let cells = row.as_ref().iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, &width)| format!("{cell:<width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    });
    lines.collect()
}

/// An identity without its trust domain, which is the same for all.
pub(crate) fn short(uri: &str) -> String {
    let path = uri
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.split_once('/'));
    escaped(path.map_or(uri, |(_, path)| path))
}

/// An error and its causes on one line. Causes that a message before them quotes are left out.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            let _ = write!(text, ": {message}");
        }
        cause = error.source();
    }
    text
}

/// An operation that the other side ended with a status.
#[derive(Debug)]
pub(crate) struct Refused {
    /// What was asked for, such as `publish to a/b`.
    pub(crate) what: String,
    /// How it ended.
    pub(crate) status: Status,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.status)?;
        if let Some(denial) = &self.status.denial
            && !self.status.message.contains(&denial.to_string())
        {
            write!(f, " ({denial})")?;
        }
        if let Some(after) = self.status.retry_after {
            write!(f, " (try again after {after:?})")?;
        }
        Ok(())
    }
}

impl Error for Refused {}

/// A file with everything that is wrong with it.
#[derive(Debug)]
pub(crate) struct Problems {
    /// The file.
    pub(crate) file: String,
    /// Each key, and what is wrong there.
    pub(crate) problems: Vec<(String, String)>,
}

impl Problems {
    fn json(&self) -> Value {
        (self.problems.iter())
            .map(|(key, problem)| json!({ "key": key, "problem": problem }))
            .collect()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.problems.len() == 1 { "" } else { "s" };
        write!(f, "{}: {} problem{plural}", self.file, self.problems.len())?;
        for (key, problem) in &self.problems {
            write!(f, "\n  {key}: {problem}")?;
        }
        Ok(())
    }
}

impl Error for Problems {}

/// A status as JSON.
pub(crate) fn status(status: &Status) -> Value {
    let mut object = Map::new();
    object.insert("code".into(), status.code.as_str().into());
    object.insert("message".into(), status.message.as_str().into());
    if let Some(denial) = &status.denial {
        object.insert(
            "denial".into(),
            json!({
                "verb": &*denial.verb,
                "subject": &*denial.subject,
                "rule": denial.rule.as_deref(),
            }),
        );
    }
    if let Some(after) = status.retry_after {
        object.insert("retry_after_ms".into(), crate::duration::millis(after));
    }
    Value::Object(object)
}

/// A payload for one line of a terminal: text with its control characters escaped, other bytes as
/// `hex:…`. Nothing that a peer sends can move the cursor or end the line.
pub(crate) fn printable(payload: &[u8]) -> String {
    match std::str::from_utf8(payload) {
        Ok(text) => escaped(text),
        Err(_) => format!("hex:{}", hex(payload)),
    }
}

/// Text with its control characters escaped.
pub(crate) fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Adds a payload to a JSON object: as `payload` when it is text, else as `payload_hex`.
pub(crate) fn insert_payload(object: &mut Map<String, Value>, payload: &Bytes) {
    match std::str::from_utf8(payload) {
        Ok(text) => object.insert("payload".into(), text.into()),
        Err(_) => object.insert("payload_hex".into(), hex(payload).into()),
    };
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use selvedge_client::{Code, Denial};

    use super::*;

    #[test]
    fn payloads_stay_on_their_line() {
        assert_eq!(printable(b"21.5"), "21.5");
        assert_eq!(printable("für\u{1b}[2J\nx".as_bytes()), "für\\u{1b}[2J\\nx");
        assert_eq!(printable(&[0xff, 0x00]), "hex:ff00");
        let mut object = Map::new();
        insert_payload(&mut object, &Bytes::from_static(&[0xff]));
        assert_eq!(Value::Object(object), json!({ "payload_hex": "ff" }));
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = anyhow::Error::new(io::Error::other("disk full"))
            .context("cannot write x: disk full")
            .context("issue a certificate");
        assert_eq!(
            chain(error.as_ref()),
            "issue a certificate: cannot write x: disk full"
        );
    }

    #[test]
    fn a_refusal_names_its_denial() {
        let denial = Denial {
            verb: "call".into(),
            subject: "x".into(),
            rule: None,
        };
        let mut refusal = Refused {
            what: "call x".into(),
            status: Status::denied(denial),
        };
        assert_eq!(
            refusal.to_string(),
            "call x: PERMISSION_DENIED: call on \"x\" denied: no rule allows it"
        );
        refusal.status.message = "no".into();
        assert_eq!(
            refusal.to_string(),
            "call x: PERMISSION_DENIED: no (call on \"x\" denied: no rule allows it)"
        );
        assert_eq!(
            status(&Status::new(Code::NotFound, "nobody")),
            json!({ "code": "NOT_FOUND", "message": "nobody" })
        );
    }
}
