//! What the tour tells while it goes, and its summary.

use std::fmt;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::output::{self, Format};

/// Columns that are used. What is longer goes on below.
const WIDTH: usize = 100;
/// Before what was seen in a step.
const INDENT: &str = "        ";

/// What a step found: one line, and the figures behind it.
#[derive(Debug)]
pub(super) struct Finding {
    detail: String,
    figures: Map<String, Value>,
}

impl Finding {
    /// A line for people and an object of figures for programs.
    pub(super) fn new(detail: impl Into<String>, figures: Value) -> Self {
        let figures = match figures {
            Value::Object(figures) => figures,
            other => Map::from_iter([("value".to_owned(), other)]),
        };
        Self {
            detail: detail.into(),
            figures,
        }
    }
}

/// Where lines go while the tour is under way. Nobody being there to read them is no failure.
#[derive(Debug, Clone, Copy)]
pub(super) enum Progress {
    /// Standard output, for people.
    Output,
    /// Standard error, since standard output is for the summary alone.
    Error,
}

impl Progress {
    pub(super) fn for_format(format: Format) -> Self {
        match format {
            Format::Text => Self::Output,
            Format::Json => Self::Error,
        }
    }

    /// Something that was seen in a step. What is too long for a line goes on below.
    pub(super) fn seen(self, text: impl fmt::Display) {
        let text = text.to_string();
        if INDENT.len() + text.chars().count() <= WIDTH {
            return self.line(format_args!("{INDENT}{text}").to_string().trim_end());
        }
        for (number, line) in wrapped(&text, WIDTH - INDENT.len() - 2).iter().enumerate() {
            let hanging = if number == 0 { "" } else { "  " };
            self.line(format_args!("{INDENT}{hanging}{line}"));
        }
    }

    fn line(self, text: impl fmt::Display) {
        match self {
            Self::Output => {
                let _ = output::line(text);
            }
            Self::Error => output::note(text),
        }
    }
}

/// The steps that were taken.
#[derive(Debug)]
pub(super) struct Tour {
    progress: Progress,
    begun: Instant,
    /// How many steps there are.
    count: usize,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    name: &'static str,
    ok: bool,
    detail: String,
    figures: Map<String, Value>,
    took: Duration,
}

impl Tour {
    /// Greets.
    pub(super) fn begin(progress: Progress, count: usize) -> Self {
        progress.line(
            "Selvedge demo: a plant with its devices, a cloud, and the fabric between them.\n\
             All of it runs in this process, over real sockets, and everything shown is checked.",
        );
        Self {
            progress,
            begun: Instant::now(),
            count,
            steps: Vec::new(),
        }
    }

    /// Takes a step, and keeps what it found or how it failed.
    pub(super) async fn step(
        &mut self,
        name: &'static str,
        what: &str,
        limit: Duration,
        work: Pin<Box<impl Future<Output = anyhow::Result<Finding>>>>,
    ) {
        let number = self.steps.len() + 1;
        let count = self.count;
        self.progress
            .line(format_args!("\n[{number:>2}/{count}] {name}: {what}"));
        let begun = Instant::now();
        let found = match tokio::time::timeout(limit, work).await {
            Ok(found) => found,
            Err(_) => Err(anyhow::anyhow!("expected an end within {limit:?}")),
        };
        let took = begun.elapsed();
        let (ok, finding) = match found {
            Ok(finding) => (true, finding),
            Err(error) => (
                false,
                Finding::new(output::chain(error.as_ref()), json!({})),
            ),
        };
        let word = word(ok);
        let detail = output::escaped(&finding.detail);
        self.progress
            .line(format_args!("  {word:<6} {detail} ({})", shown(took)));
        self.steps.push(Step {
            name,
            ok,
            detail,
            figures: finding.figures,
            took,
        });
    }

    /// Writes the summary, and gives the exit code that goes with it.
    pub(super) fn summary(self, format: Format) -> anyhow::Result<ExitCode> {
        let failed = self.steps.iter().filter(|step| !step.ok).count();
        let took = self.begun.elapsed();
        match format {
            Format::Text => {
                output::line(format_args!("\n{}", self.table()))?;
                let (count, took) = (self.steps.len(), shown(took));
                output::line(if failed == 0 {
                    format!(
                        "All {count} steps went as they should, in {took}. To try things yourself: \
                         selvedge dev"
                    )
                } else {
                    format!("{failed} of {count} steps failed, in {took}.")
                })?;
            }
            Format::Json => output::line(self.json(failed == 0, took))?,
        }
        Ok(if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn json(&self, ok: bool, took: Duration) -> Value {
        let steps: Value = (self.steps.iter())
            .map(|step| {
                let mut figures = step.figures.clone();
                figures.insert("seconds".to_owned(), seconds(step.took));
                json!({
                    "name": step.name,
                    "ok": step.ok,
                    "detail": step.detail,
                    "figures": figures,
                })
            })
            .collect();
        json!({ "ok": ok, "seconds": seconds(took), "steps": steps })
    }

    /// Name, result, time and detail in columns.
    fn table(&self) -> String {
        let names = self.steps.iter().map(|step| step.name.len());
        let name = names.fold("step".len(), usize::max);
        let indent = name + 18;
        let mut table = format!(
            "{:name$}  {:<6}  {:>6}  what was seen\n",
            "step", "", "time"
        );
        for step in &self.steps {
            let took = shown(step.took);
            let detail = wrapped(&step.detail, WIDTH.saturating_sub(indent));
            let detail = detail.join(&format!("\n{:indent$}", ""));
            let word = word(step.ok);
            table += &format!("{:name$}  {word:<6}  {took:>6}  {detail}\n", step.name);
        }
        table
    }
}

fn word(ok: bool) -> &'static str {
    if ok { "ok" } else { "FAILED" }
}

/// A duration for people.
pub(super) fn shown(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

/// Seconds, rounded to milliseconds.
fn seconds(duration: Duration) -> Value {
    Value::from((duration.as_secs_f64() * 1000.0).round() / 1000.0)
}

/// Text in lines of at most `width` characters, as far as its words allow.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tour(steps: Vec<Step>) -> Tour {
        Tour {
            progress: Progress::Error,
            begun: Instant::now(),
            count: steps.len(),
            steps,
        }
    }

    #[tokio::test]
    async fn a_step_that_fails_or_takes_too_long_is_told_apart() {
        let mut tour = tour(Vec::new());
        let second = Duration::from_secs(1);
        let good = async { Ok(Finding::new("seen", json!({ "n": 1 }))) };
        tour.step("good", "", second, Box::pin(good)).await;
        let bad = async { Err(anyhow::anyhow!("inner").context("outer")) };
        tour.step("bad", "", second, Box::pin(bad)).await;
        let slow = std::future::pending();
        tour.step("slow", "", Duration::from_millis(1), Box::pin(slow))
            .await;
        let json = tour.json(false, second);
        assert_eq!(json["ok"], false);
        assert_eq!(json["steps"][0]["ok"], true);
        assert_eq!(json["steps"][0]["figures"]["n"], 1);
        assert_eq!(json["steps"][1]["detail"], "outer: inner");
        assert_eq!(json["steps"][2]["detail"], "expected an end within 1ms");
        assert_eq!(tour.summary(Format::Text).unwrap(), ExitCode::FAILURE);
    }

    #[test]
    fn the_table_is_aligned_and_wraps() {
        let step = |name, ok, detail: &str| Step {
            name,
            ok,
            detail: detail.to_owned(),
            figures: Map::new(),
            took: Duration::from_millis(1234),
        };
        let long = "word ".repeat(20);
        let table = tour(vec![step("a", true, "fine"), step("bcd", false, &long)]).table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "step            time  what was seen");
        assert_eq!(lines[1], "a     ok       1.2 s  fine");
        assert!(
            lines[2].starts_with("bcd   FAILED   1.2 s  word word"),
            "{table}"
        );
        assert!(
            lines[3].starts_with("                      word"),
            "{table}"
        );
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{table}");
    }
}
