//! Outcomes: the status codes of gRPC, a sentence, and what a program may act on.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::wire;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $wire:ident, $text:literal;)*) => {
        /// Outcome of an operation, with the names and numbers of gRPC.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $name = wire::Code::$wire as isize,)* }

        impl Code {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The code's name as gRPC writes it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The code of this number; numbers that are not known mean [`Code::Unknown`].
            pub fn from_number(number: i32) -> Self {
                match number { $(n if n == wire::Code::$wire as i32 => Self::$name,)* _ => Self::Unknown }
            }
        }
    };
}

codes! {
    /// It worked.
    Ok = Ok, "OK";
    /// The caller gave up.
    Cancelled = Cancelled, "CANCELLED";
    /// Anything else.
    Unknown = Unknown, "UNKNOWN";
    /// The request is wrong whatever the state.
    InvalidArgument = InvalidArgument, "INVALID_ARGUMENT";
    /// Time ran out.
    DeadlineExceeded = DeadlineExceeded, "DEADLINE_EXCEEDED";
    /// Nobody serves that, or it does not exist.
    NotFound = NotFound, "NOT_FOUND";
    /// It exists already.
    AlreadyExists = AlreadyExists, "ALREADY_EXISTS";
    /// Policy says no.
    PermissionDenied = PermissionDenied, "PERMISSION_DENIED";
    /// A limit is reached; later may do.
    ResourceExhausted = ResourceExhausted, "RESOURCE_EXHAUSTED";
    /// The state does not allow it.
    FailedPrecondition = FailedPrecondition, "FAILED_PRECONDITION";
    /// Another operation took precedence.
    Aborted = Aborted, "ABORTED";
    /// Past the valid range.
    OutOfRange = OutOfRange, "OUT_OF_RANGE";
    /// Not supported here.
    Unimplemented = Unimplemented, "UNIMPLEMENTED";
    /// A fault on the answering side.
    Internal = Internal, "INTERNAL";
    /// The peer is gone; trying again may work.
    Unavailable = Unavailable, "UNAVAILABLE";
    /// Data was lost.
    DataLoss = DataLoss, "DATA_LOSS";
    /// Who asks is not known.
    Unauthenticated = Unauthenticated, "UNAUTHENTICATED";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Code {
    /// QUIC application error code (RESET_STREAM, STOP_SENDING, CONNECTION_CLOSE) that carries it.
    pub fn to_quic(self) -> u32 {
        0x100 + self as u32
    }

    /// The code that a QUIC application error code carries; others mean [`Code::Cancelled`], which
    /// is what a bare reset says.
    pub fn from_quic(code: u64) -> Self {
        match code {
            0x100..=0x110 => Self::from_number((code - 0x100) as i32),
            _ => Self::Cancelled,
        }
    }
}

/// A denial by policy: what was asked, and the rule that decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// `publish`, `subscribe`, `call`, `serve`, `infer` or `work`.
    pub verb: Arc<str>,
    /// Topic, filter, service or model.
    pub subject: Arc<str>,
    /// Name of the rule that denies, or `None` when no rule allows.
    pub rule: Option<Arc<str>>,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {:?} denied", self.verb, self.subject)?;
        match &self.rule {
            Some(rule) => write!(f, " by rule {rule:?}"),
            None => f.write_str(": no rule allows it"),
        }
    }
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The code a program acts on.
    pub code: Code,
    /// A sentence for a person.
    pub message: String,
    /// Set when policy denied.
    pub denial: Option<Denial>,
    /// When set, trying again sooner is pointless.
    pub retry_after: Option<Duration>,
}

impl Status {
    /// A status with a message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            denial: None,
            retry_after: None,
        }
    }

    /// Success.
    pub fn ok() -> Self {
        Self::new(Code::Ok, "")
    }

    /// A denial by policy, with its own words as the message.
    pub fn denied(denial: Denial) -> Self {
        Self {
            code: Code::PermissionDenied,
            message: denial.to_string(),
            denial: Some(denial),
            retry_after: None,
        }
    }

    /// The same status with a time before which trying again is pointless.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Whether this is success.
    pub fn is_ok(&self) -> bool {
        self.code == Code::Ok
    }

    /// `Ok(())` on success, otherwise the status as the error.
    ///
    /// # Errors
    /// The status itself, when it is not success.
    pub fn into_result(self) -> Result<(), Self> {
        if self.is_ok() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Status {}

impl From<Status> for wire::Status {
    fn from(status: Status) -> Self {
        Self {
            code: status.code as i32,
            message: clip(status.message),
            denial: status.denial.map(|denial| wire::Denial {
                verb: denial.verb.to_string(),
                subject: denial.subject.to_string(),
                rule: denial.rule.map(|rule| rule.to_string()),
            }),
            retry_after_ms: status
                .retry_after
                .map(|after| u32::try_from(after.as_millis()).unwrap_or(u32::MAX)),
        }
    }
}

/// Longest message of a status on the wire, in bytes. What it is about, such as a topic, has fields
/// of its own.
const MAX_MESSAGE: usize = 4096;

fn clip(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        let end = message.floor_char_boundary(MAX_MESSAGE - '…'.len_utf8());
        message.truncate(end);
        message.push('…');
    }
    message
}

impl From<wire::Status> for Status {
    fn from(status: wire::Status) -> Self {
        Self {
            code: Code::from_number(status.code),
            message: status.message,
            denial: status.denial.map(|denial| Denial {
                verb: denial.verb.into(),
                subject: denial.subject.into(),
                rule: denial.rule.map(Into::into),
            }),
            retry_after: status
                .retry_after_ms
                .map(|ms| Duration::from_millis(ms.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_wire_and_quic() {
        for &code in Code::ALL {
            let status = Status::new(code, "why").retry_after(Duration::from_millis(5));
            assert_eq!(Status::from(wire::Status::from(status.clone())), status);
            assert_eq!(Code::from_quic(code.to_quic().into()), code);
        }
        assert_eq!(Code::from_number(99), Code::Unknown);
        assert_eq!(Code::from_quic(0), Code::Cancelled);
    }

    #[test]
    fn a_message_without_end_is_cut_on_the_wire() {
        let wire = wire::Status::from(Status::new(Code::Internal, "é".repeat(MAX_MESSAGE)));
        assert!(wire.message.len() <= MAX_MESSAGE && wire.message.ends_with("é…"));
    }

    #[test]
    fn a_denial_reads_as_a_sentence() {
        let denial = Denial {
            verb: "publish".into(),
            subject: "a/b".into(),
            rule: None,
        };
        assert_eq!(
            denial.to_string(),
            r#"publish on "a/b" denied: no rule allows it"#
        );
        let named = Denial {
            rule: Some("quiet hours".into()),
            ..denial
        };
        assert_eq!(
            Status::denied(named).to_string(),
            r#"PERMISSION_DENIED: publish on "a/b" denied by rule "quiet hours""#
        );
    }
}
