//! What came of a comparison: rows, and ratios that were formed within a round.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::job::Outcome;
use super::machine::Machine;
use super::shape::Shape;
use super::system::{About, NATS, SELVEDGE};
use super::{Subject, chart, table};

/// Name in ratios of the NATS server that is faster at a shape, when there are several.
const NATS_BEST: &str = "nats-best";

/// Everything that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// What was sent. A call that was answered counts as a delivery.
    #[serde(default)]
    pub subject: Subject,
    /// Where.
    pub machine: Machine,
    /// Turns of each shape.
    pub rounds: usize,
    /// Time measured in each turn, in seconds.
    pub seconds: f64,
    /// What was compared.
    pub systems: Vec<About>,
    /// One for each shape and system.
    pub rows: Vec<Row>,
    /// This broker in relation to each other system.
    pub ratios: Vec<Ratio>,
    /// Systems and shapes that this machine does not allow.
    pub left_out: Vec<String>,
    /// Measurements that failed.
    pub failures: Vec<String>,
}

/// The least, the middle and the largest of several values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The middle one, or what is between the two in the middle.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

/// A system at a shape. What a shape does not measure is absent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// The shape.
    pub shape: String,
    /// The system.
    pub system: String,
    /// Messages delivered in a second, to all subscribers together.
    pub deliveries_per_s: Option<Spread>,
    /// CPU time of the server for each delivery, in microseconds.
    pub cpu_us: Option<Spread>,
    /// Half of the messages are delivered sooner after they were due, in microseconds.
    pub p50_us: Option<Spread>,
    /// All but one in a hundred.
    pub p99_us: Option<Spread>,
    /// All but one in a thousand.
    pub p999_us: Option<Spread>,
    /// Memory of the server, in KiB.
    pub rss_kib: Option<Spread>,
    /// Memory of the server for each idle connection, in KiB.
    pub idle_kib: Option<Spread>,
    /// Connections opened in a second, each with a handshake and a subscription.
    pub handshakes_per_s: Option<Spread>,
    /// CPU time of the server for each of them, in microseconds.
    pub handshake_cpu_us: Option<Spread>,
    /// Deliveries and acknowledgements that never came, in all rounds.
    pub lost: u64,
}

/// This broker's figures divided by another system's, within a round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ratio {
    /// The shape.
    pub shape: String,
    /// The other system.
    pub against: String,
    /// Deliveries in a second; more than 1 is better.
    pub deliveries: Option<Spread>,
    /// CPU time for each delivery; less than 1 is better.
    pub cpu: Option<Spread>,
    /// The middle of the latency; less than 1 is better.
    #[serde(default)]
    pub p50: Option<Spread>,
    /// The 99th percentile of the latency; less than 1 is better.
    pub p99: Option<Spread>,
    /// Memory for each idle connection; less than 1 is better.
    pub idle_kib: Option<Spread>,
    /// CPU time for each handshake; less than 1 is better.
    pub handshake_cpu: Option<Spread>,
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sample {
    deliveries_per_s: Option<f64>,
    cpu_us: Option<f64>,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    p999_us: Option<f64>,
    rss_kib: Option<f64>,
    idle_kib: Option<f64>,
    handshakes_per_s: Option<f64>,
    handshake_cpu_us: Option<f64>,
    lost: u64,
}

/// All samples of a run.
#[derive(Debug, Default)]
pub(super) struct Measurements {
    /// Shape, system, round, sample; in the order they were taken.
    samples: Vec<(String, String, usize, Sample)>,
    /// What could not be measured, and why.
    pub(super) failures: Vec<String>,
}

impl Sample {
    pub(super) fn new(outcome: &Outcome, shape: &Shape) -> Self {
        let count = outcome.count as f64;
        let per_second = Some(count / outcome.seconds);
        let cpu = Some(outcome.cpu_seconds * 1e6 / count);
        let rss_kib = Some(outcome.rss_kib as f64);
        if shape.is_idle() {
            return Self {
                handshakes_per_s: per_second,
                handshake_cpu_us: cpu,
                idle_kib: outcome.idle_kib,
                rss_kib,
                ..Self::default()
            };
        }
        Self {
            deliveries_per_s: per_second,
            cpu_us: cpu,
            p50_us: outcome.latency.map(|latency| latency.p50_us),
            p99_us: outcome.latency.map(|latency| latency.p99_us),
            p999_us: outcome.latency.map(|latency| latency.p999_us),
            rss_kib,
            lost: outcome.lost,
            ..Self::default()
        }
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(rate), Some(cpu)) = (self.deliveries_per_s, self.cpu_us) {
            write!(f, "{}/s, {cpu:.2} us of CPU", table::count(rate))?;
        }
        if let (Some(rate), Some(cpu), Some(kib)) =
            (self.handshakes_per_s, self.handshake_cpu_us, self.idle_kib)
        {
            write!(
                f,
                "{} handshakes/s, {cpu:.0} us of CPU, {kib:.1} KiB",
                table::count(rate)
            )?;
        }
        if let (Some(p50), Some(p99)) = (self.p50_us, self.p99_us) {
            write!(f, ", p50 {p50:.0} us, p99 {p99:.0} us")?;
        }
        if self.lost > 0 {
            write!(f, ", LOST {}", self.lost)?;
        }
        Ok(())
    }
}

impl Measurements {
    pub(super) fn add(&mut self, shape: &Shape, system: &str, round: usize, sample: Sample) {
        self.samples
            .push((shape.name.clone(), system.to_owned(), round, sample));
    }

    /// The samples of a system at a shape, with their rounds.
    fn of(&self, shape: &str, system: &str) -> Vec<(usize, Sample)> {
        let samples = self.samples.iter();
        samples
            .filter(|(of, by, ..)| of == shape && by == system)
            .map(|(_, _, round, sample)| (*round, *sample))
            .collect()
    }

    /// Pairs of shape and system, in the order they were first measured.
    fn pairs(&self) -> Vec<(&str, &str)> {
        let mut pairs = Vec::new();
        for (shape, system, ..) in &self.samples {
            let pair = (shape.as_str(), system.as_str());
            if !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs
    }
}

impl Spread {
    /// `None` of no values.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            (values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0
        } else {
            *values.get(middle)?
        };
        Some(Self {
            min: *values.first()?,
            median,
            max: *values.last()?,
        })
    }
}

fn row(shape: &str, system: &str, samples: &[(usize, Sample)]) -> Row {
    let spread = |value: fn(&Sample) -> Option<f64>| {
        let values = samples.iter().filter_map(|(_, sample)| value(sample));
        Spread::of(values.collect())
    };
    Row {
        shape: shape.to_owned(),
        system: system.to_owned(),
        deliveries_per_s: spread(|sample| sample.deliveries_per_s),
        cpu_us: spread(|sample| sample.cpu_us),
        p50_us: spread(|sample| sample.p50_us),
        p99_us: spread(|sample| sample.p99_us),
        p999_us: spread(|sample| sample.p999_us),
        rss_kib: spread(|sample| sample.rss_kib),
        idle_kib: spread(|sample| sample.idle_kib),
        handshakes_per_s: spread(|sample| sample.handshakes_per_s),
        handshake_cpu_us: spread(|sample| sample.handshake_cpu_us),
        lost: samples.iter().map(|(_, sample)| sample.lost).sum(),
    }
}

fn ratio(
    shape: &str,
    against: &str,
    ours: &[(usize, Sample)],
    theirs: &[(usize, Sample)],
) -> Ratio {
    let spread = |value: fn(&Sample) -> Option<f64>| {
        let ratios = ours.iter().filter_map(|(round, sample)| {
            let (_, other) = theirs.iter().find(|(other, _)| other == round)?;
            // A clock that did not tick gives no ratio.
            let (ours, theirs) = (value(sample)?, value(other)?);
            (theirs > 0.0).then(|| ours / theirs)
        });
        Spread::of(ratios.collect())
    };
    Ratio {
        shape: shape.to_owned(),
        against: against.to_owned(),
        deliveries: spread(|sample| sample.deliveries_per_s),
        cpu: spread(|sample| sample.cpu_us),
        p50: spread(|sample| sample.p50_us),
        p99: spread(|sample| sample.p99_us),
        idle_kib: spread(|sample| sample.idle_kib),
        handshake_cpu: spread(|sample| sample.handshake_cpu_us),
    }
}

/// The best NATS server at a shape, when there are several.
fn best_nats(rows: &[Row], shape: &str) -> Option<String> {
    let is_nats =
        |row: &&Row| row.shape == shape && (row.system == NATS || row.system.starts_with("nats-"));
    let mut nats: Vec<&Row> = rows.iter().filter(is_nats).collect();
    if nats.len() < 2 {
        return None;
    }
    // Larger is better.
    let merit = |row: &Row| {
        let latency = row.p99_us.map(|p99| -p99.median);
        let memory = row.idle_kib.map(|kib| -kib.median);
        let rate = row.deliveries_per_s.map(|rate| rate.median);
        latency.or(memory).or(rate).unwrap_or(f64::NEG_INFINITY)
    };
    nats.sort_by(|a, b| merit(b).total_cmp(&merit(a)));
    nats.first().map(|row| row.system.clone())
}

impl Report {
    pub(super) fn new(
        measurements: Measurements,
        systems: Vec<About>,
        machine: Machine,
        left_out: Vec<String>,
        (subject, rounds, seconds): (Subject, usize, f64),
    ) -> Self {
        let pairs = measurements.pairs();
        let rows: Vec<Row> = pairs
            .iter()
            .map(|(shape, system)| row(shape, system, &measurements.of(shape, system)))
            .collect();
        let mut ratios = Vec::new();
        for (shape, system) in &pairs {
            if *system != SELVEDGE {
                continue;
            }
            let ours = measurements.of(shape, SELVEDGE);
            for (_, other) in pairs
                .iter()
                .filter(|(of, by)| of == shape && *by != SELVEDGE)
            {
                ratios.push(ratio(shape, other, &ours, &measurements.of(shape, other)));
            }
            if let Some(best) = best_nats(&rows, shape) {
                ratios.push(ratio(
                    shape,
                    NATS_BEST,
                    &ours,
                    &measurements.of(shape, &best),
                ));
            }
        }
        Self {
            subject,
            machine,
            rounds,
            seconds,
            systems,
            rows,
            ratios,
            left_out,
            failures: measurements.failures,
        }
    }

    /// Medians alone, in few fields: `rows` and `ratios` of messages, and `idle` of connections.
    pub fn brief(&self) -> serde_json::Value {
        let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
        let busy = self
            .rows
            .iter()
            .filter(|row| row.deliveries_per_s.is_some());
        let (rate, counted) = match self.subject {
            Subject::Messages => ("deliveries_per_s", "deliveries"),
            Subject::Calls => ("calls_per_s", "calls"),
        };
        let rows = busy.map(|row| {
            json!({
                "shape": row.shape,
                "system": row.system,
                rate: median(row.deliveries_per_s),
                "cpu_us": median(row.cpu_us),
                "p50_us": median(row.p50_us),
                "p99_us": median(row.p99_us),
            })
        });
        let busy = self
            .ratios
            .iter()
            .filter(|ratio| ratio.deliveries.is_some());
        let ratios = busy.map(|ratio| {
            json!({
                "shape": ratio.shape,
                "against": ratio.against,
                counted: median(ratio.deliveries),
                "cpu": median(ratio.cpu),
                "p50": median(ratio.p50),
                "p99": median(ratio.p99),
            })
        });
        let idle = self.rows.iter().filter(|row| row.idle_kib.is_some());
        let idle = idle.map(|row| {
            json!({
                "system": row.system,
                "kib_per_connection": median(row.idle_kib),
                "handshakes_per_s": median(row.handshakes_per_s),
                "handshake_cpu_us": median(row.handshake_cpu_us),
            })
        });
        json!({
            "rows": rows.collect::<Vec<_>>(),
            "ratios": ratios.collect::<Vec<_>>(),
            "idle": idle.collect::<Vec<_>>(),
            "lost": self.rows.iter().map(|row| row.lost).sum::<u64>(),
            "versions": self.versions(),
            "machine": self.machine,
            "left_out": self.left_out,
            "failures": self.failures,
        })
    }

    fn versions(&self) -> serde_json::Value {
        let systems = self.systems.iter();
        systems
            .map(|system| (system.name.clone(), system.version.clone().into()))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// Tables for a person, in Markdown.
    pub fn table(&self) -> String {
        table::write(self)
    }

    /// Writes the report as JSON, as tables and as charts into a folder; gives the files.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let date = self.machine.date.split('T').next().unwrap_or_default();
        let name = match self.subject {
            Subject::Messages => "compare",
            Subject::Calls => "rpc",
        };
        let mut files = vec![
            (
                format!("{name}-{date}.json"),
                serde_json::to_string_pretty(self)?,
            ),
            (format!("{name}-{date}.md"), self.table()),
        ];
        if self.subject == Subject::Messages {
            for (what, chart) in chart::draw(self) {
                files.push((format!("{name}-{date}-{what}.svg"), chart));
            }
        }
        let mut written = Vec::new();
        for (name, mut text) in files {
            let path = folder.join(name);
            text.truncate(text.trim_end().len());
            text.push('\n');
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            written.push(path);
        }
        Ok(written)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn outcome(count: u64, cpu_seconds: f64) -> Outcome {
        Outcome {
            count,
            seconds: 2.0,
            cpu_seconds,
            ..Outcome::default()
        }
    }

    /// Two rounds of one shape with four systems.
    pub(in crate::compare) fn report() -> Report {
        let shapes = super::super::shape::all();
        let shape = shapes.first().expect("there are shapes");
        let mut measurements = Measurements::default();
        for (round, factor) in [(0, 1), (1, 2)] {
            for (system, count) in [
                (SELVEDGE, 600),
                ("relay", 800),
                (NATS, 300),
                ("nats-2.15", 200),
            ] {
                let sample = Sample::new(&outcome(count * factor, 0.5), shape);
                measurements.add(shape, system, round, sample);
            }
        }
        let machine = super::super::machine::describe(Path::new("/"));
        Report::new(
            measurements,
            Vec::new(),
            machine,
            Vec::new(),
            (Subject::Messages, 2, 2.0),
        )
    }

    #[test]
    fn ratios_are_formed_within_a_round() {
        let report = report();
        let against = |name: &str| {
            let mut ratios = report.ratios.iter();
            ratios.find(|ratio| ratio.against == name).unwrap()
        };
        let relay = against("relay").deliveries.unwrap();
        assert_eq!((relay.min, relay.median, relay.max), (0.75, 0.75, 0.75));
        let cpu = against("relay").cpu.unwrap().median;
        assert!((cpu - 800.0 / 600.0).abs() < 1e-9, "{cpu}");
        // The faster one counts.
        assert_eq!(against(NATS_BEST).deliveries.unwrap().median, 2.0);
        assert!(report.ratios.iter().all(|ratio| ratio.against != SELVEDGE));
    }

    #[test]
    fn the_brief_form_has_the_fields_that_are_promised() {
        let brief = report().brief();
        assert_eq!(
            brief["rows"][0],
            json!({
                "shape": "1:1/64B", "system": "selvedge", "deliveries_per_s": 450.0,
                "cpu_us": 625.0, "p50_us": null, "p99_us": null,
            })
        );
        assert_eq!(brief["ratios"][0]["against"], "relay");
        assert_eq!(brief["ratios"][0]["deliveries"], 0.75);
    }

    #[test]
    fn a_spread_has_a_middle() {
        let spread = |values: &[f64]| Spread::of(values.to_vec()).map(|spread| spread.median);
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0]), Some(3.0));
        assert_eq!(spread(&[9.0, 1.0]), Some(5.0));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), Some(2.0));
    }

    #[test]
    fn a_report_is_saved_whole() {
        let folder = tempfile::tempdir().unwrap();
        let files = report().save(folder.path()).unwrap();
        let names: Vec<String> = files
            .iter()
            .map(|file| file.extension().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["json", "md", "svg", "svg"]);
        let text = fs::read_to_string(&files[0]).unwrap();
        let read: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(read.rows.len(), 4);
    }
}
