//! Durations on the command line and in JSON.

use std::time::Duration;

use serde_json::Value;

/// Reads a number with a unit: `250ms`, `1.5s`, `5m`, `2h`, `7d`.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!("expected a number and a unit such as 250ms, 1.5s, 5m, 2h or 7d, found {text:?}")
    };
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(wrong)?;
    let (number, unit) = text.split_at(unit_at);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())
}

/// A duration in milliseconds, rounded to microseconds.
pub(crate) fn millis(duration: Duration) -> Value {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    Value::from(micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(parse("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in [
            "",
            "10",
            "s",
            "-1s",
            "1..5s",
            "1w",
            "9e9s",
            &format!("{}d", "9".repeat(400)),
        ] {
            let error = parse(bad).expect_err(bad);
            assert!(error.starts_with("expected a number and a unit"), "{error}");
        }
    }
}
