//! Reading one X.509 certificate: its identity and the few facts messages are made of.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::objects::oid_registry;
use x509_parser::prelude::{ASN1Time, FromDer, X509Name};

#[cfg(feature = "authority")]
use crate::identity::TrustDomain;
use crate::identity::{Identity, IdentityError};

/// How much of a text of unknown origin is repeated in a message.
const MAX_PRINTED: usize = 200;
/// The tag of a URI among the general names of RFC 5280.
const URI_TAG: u32 = 6;

/// Parses a whole certificate; trailing bytes are an error.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(IdentityError::Malformed {
            reason: format!("{} bytes after its end", rest.len()),
        }),
        Err(error) => Err(IdentityError::Malformed {
            reason: printable(&error.to_string()),
        }),
    }
}

/// The identity in the subject alternative name, which must hold exactly one URI.
pub(crate) fn identity(certificate: &X509Certificate<'_>) -> Result<Identity, IdentityError> {
    single_uri(certificate)?.parse()
}

fn single_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, IdentityError> {
    let names =
        certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Malformed {
                reason: printable(&error.to_string()),
            })?;
    let Some(names) = names else {
        return Err(IdentityError::Missing);
    };
    let mut uris = Vec::new();
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            // A URI with bytes outside ASCII: it counts, so that it cannot hide beside a good one.
            GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => uris.push("\u{fffd}"),
            _ => {}
        }
    }
    match uris.as_slice() {
        [] => Err(IdentityError::Missing),
        [uri] => Ok(uri),
        many => Err(IdentityError::Ambiguous { found: many.len() }),
    }
}

/// The trust domain an authority signs for: `spiffe://<trust-domain>`, its only URI.
#[cfg(feature = "authority")]
pub(crate) fn authority_trust_domain(
    certificate: &X509Certificate<'_>,
) -> Result<TrustDomain, IdentityError> {
    let uri = single_uri(certificate)?;
    let Some(name) = uri.strip_prefix("spiffe://") else {
        return Err(IdentityError::Scheme {
            found: printable(uri),
        });
    };
    name.parse()
}

/// The certificate in a few words: its identity or, without one, its subject; and its serial.
pub(crate) fn title(certificate: &X509Certificate<'_>) -> String {
    let serial = serial(certificate);
    match identity(certificate) {
        Ok(identity) => format!("{} (serial {serial})", printable(identity.uri())),
        Err(_) => format!(
            "with subject {} (serial {serial})",
            subject(certificate.subject())
        ),
    }
}

/// A distinguished name for people.
pub(crate) fn subject(name: &X509Name<'_>) -> String {
    match name.to_string_with_registry(oid_registry()) {
        Ok(text) if text.is_empty() => "(empty)".into(),
        Ok(text) => printable(&text),
        Err(_) => "(unreadable)".into(),
    }
}

/// The serial number in lower-case hex without leading zero bytes.
pub(crate) fn serial(certificate: &X509Certificate<'_>) -> String {
    let raw = certificate.raw_serial();
    let start = raw.iter().take_while(|byte| **byte == 0).count();
    // RFC 5280 allows 20 bytes; whoever sends more is not quoted in full.
    let digits = &raw[start.min(raw.len().saturating_sub(1))..];
    hex(&digits[..digits.len().min(32)])
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A point in time of a certificate; what the clock cannot express ends up at its nearest end.
pub(crate) fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = time.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 {
        UNIX_EPOCH.checked_sub(distance).unwrap_or(UNIX_EPOCH)
    } else {
        UNIX_EPOCH.checked_add(distance).unwrap_or(UNIX_EPOCH)
    }
}

/// A point in time as calendar date, or `None` before the year -9999 and after 9999.
pub(crate) fn calendar(time: SystemTime) -> Option<OffsetDateTime> {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).ok()?,
        Err(before) => -i64::try_from(before.duration().as_secs()).ok()?,
    };
    OffsetDateTime::from_unix_timestamp(seconds).ok()
}

/// A point in time for people, in UTC and to the minute.
pub(crate) fn date(time: SystemTime) -> String {
    match calendar(time) {
        Some(date) => format!(
            "{:04}-{:02}-{:02} {:02}:{:02} UTC",
            date.year(),
            u8::from(date.month()),
            date.day(),
            date.hour(),
            date.minute()
        ),
        None => "a date outside the calendar".into(),
    }
}

/// Text of unknown origin made safe for logs and terminals: one line, ASCII, bounded.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars() {
        if shown.len() >= MAX_PRINTED {
            shown.push_str("...");
            break;
        }
        if character.is_ascii_graphic() || character == ' ' {
            shown.push(character);
        } else {
            shown.extend(character.escape_default());
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_unknown_origin_stays_one_short_line() {
        assert_eq!(printable("a\nb\u{1b}[31m"), "a\\nb\\u{1b}[31m");
        assert_eq!(
            printable(&"x".repeat(500)),
            format!("{}...", "x".repeat(200))
        );
    }

    #[test]
    fn dates_far_away_do_not_panic() {
        assert_eq!(date(UNIX_EPOCH), "1970-01-01 00:00 UTC");
        assert_eq!(
            date(UNIX_EPOCH - Duration::from_secs(60)),
            "1969-12-31 23:59 UTC"
        );
        let far = UNIX_EPOCH + Duration::from_secs(1 << 50);
        assert_eq!(date(far), "a date outside the calendar");
    }
}
