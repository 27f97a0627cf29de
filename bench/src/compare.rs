//! This broker beside its peers, in one run: `selvedge bench compare`.
//!
//! Every system is a process of its own, started with the same certificates. All clients of a
//! measurement are in one load process, which reads the CPU time of the server. Systems take turns, so
//! that whatever else happens on the machine happens to all of them, and ratios are formed within a
//! turn.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;

pub use self::job::{Job, Outcome};
pub use self::report::{Ratio, Report, Row, Spread};
pub use self::system::About;

use self::job::Protocol;
use self::pki::Pki;
use self::report::{Measurements, Sample};
use self::shape::Shape;
use self::system::{Running, System};

mod chart;
mod job;
pub mod load;
pub(crate) mod machine;
pub(crate) mod pki;
pub mod process;
pub mod relay;
mod report;
mod shape;
pub(crate) mod system;
mod table;

/// Time for a quick run.
const QUICK: Duration = Duration::from_secs(200);
/// What a turn takes besides warming up and measuring, before that is known, in seconds.
const FIRST_OVERHEAD: f64 = 0.4;
/// Bounds of the time that is measured in each turn of a quick run, in seconds.
const QUICK_TURN: (f64, f64) = (0.25, 2.0);
/// Time for a measurement beyond its own, after which it is given up. Ten thousand handshakes take a
/// while.
const GRACE: Duration = Duration::from_secs(120);
/// Time for a server to come to rest after a measurement.
const REST: Duration = Duration::from_secs(5);

/// What is compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// Messages from publishers to subscribers: `selvedge bench compare`.
    #[default]
    Messages,
    /// Requests that are answered: `selvedge bench rpc`.
    Calls,
}

/// What to compare, and how long.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What is sent.
    pub subject: Subject,
    /// The shapes that goals are set for, in less than four minutes.
    pub quick: bool,
    /// Turns of each shape. Default 5, quick 3.
    pub rounds: Option<usize>,
    /// Names of shapes or of their families; none for all.
    pub shapes: Vec<String>,
    /// Names of systems; none for all that are on the machine.
    pub systems: Vec<String>,
    /// Time that is measured in each turn. Default 2 s; quick: what the time allows.
    pub seconds: Option<f64>,
    /// Further peers.
    pub peers: Option<PathBuf>,
    /// Further NATS servers.
    pub nats: Vec<PathBuf>,
    /// Where servers keep their files. Default: the system's temporary folder.
    pub dir: Option<PathBuf>,
    /// Largest UDP payload of this broker and the relay. Default: the broker's.
    pub packet_bytes: Option<u16>,
}

/// Compares. `program` is the `selvedge` binary; `progress` is told each line of progress.
///
/// # Errors
/// An unknown name, or a system that was asked for by name and cannot be measured.
pub async fn run(
    options: &Options,
    program: &Path,
    progress: &(dyn Fn(&str) + Sync),
) -> anyhow::Result<Report> {
    let files = process::raise_file_limit();
    let (systems, missing) = system::find(
        options.peers.as_deref(),
        &options.nats,
        options.packet_bytes,
    )?;
    let mut left_out = Vec::new();
    for line in missing {
        progress(&line);
        left_out.push(line);
    }
    let systems = chosen(systems, &options.systems, "system", |system, name| {
        system.name == name
    })?;
    let all = match options.subject {
        Subject::Messages => shape::all(),
        Subject::Calls => shape::calls(),
    };
    let mut shapes = chosen(all, &options.shapes, "shape", Shape::is_called)?;
    if options.quick && options.shapes.is_empty() {
        shapes.retain(|shape| shape.quick);
    }
    let most_rounds = options.rounds.unwrap_or(if options.quick { 3 } else { 5 });
    ensure!(most_rounds > 0, "expected one round at least");

    let folder = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let folder = folder.context("make a temporary folder")?;
    let root = folder.path().canonicalize()?;
    let pki = Pki::make(&root.join("pki"))?;
    let mut budget = (options.quick && options.seconds.is_none()).then(|| {
        let busy = shapes.iter().filter(|shape| !shape.is_idle());
        let turns = busy.map(|shape| most_rounds * suited(shape, &systems).len());
        Budget::new(QUICK, turns.sum())
    });
    let mut seconds = options.seconds.unwrap_or(2.0);
    let machine = machine::describe(&root);
    let mut measurements = Measurements::default();
    for (place, shape) in shapes.iter().enumerate() {
        let mut leave_out = |why: &str| {
            let line = format!("{} is left out: {why}", shape.name);
            progress(&line);
            left_out.push(line);
        };
        if shape.files() > files {
            let needed = shape.files();
            leave_out(&format!(
                "it needs {needed} open files and the limit is {files}"
            ));
            continue;
        }
        let suited = suited(shape, &systems);
        let mut rounds = most_rounds;
        if shape.is_idle() && options.quick {
            // Starting a thousand connections again tells nothing that is worth the time.
            rounds = 1;
            if budget.as_ref().is_some_and(Budget::is_spent) {
                leave_out("there was no time for it");
                continue;
            }
        } else if let Some(budget) = &budget {
            (rounds, seconds) = budget.share(rounds);
        }
        let bench = Bench {
            program,
            pki: &pki,
            root: &root,
            shape,
            warm_up: (seconds / 3.0).min(1.0),
            seconds,
            progress,
        };
        bench
            .measure(place, &suited, rounds, &mut measurements)
            .await;
        if let Some(budget) = &mut budget {
            let (planned, taken) = (most_rounds * suited.len(), rounds * suited.len());
            budget.spent(planned, taken, bench.warm_up + seconds);
        }
    }
    // Who does none of the shapes has nothing to do with the report.
    let about = (systems.iter())
        .filter(|system| shapes.iter().any(|shape| shape.suits(system.protocol)))
        .map(|system| system.about(program))
        .collect();
    let what = (options.subject, most_rounds, seconds);
    let report = Report::new(measurements, about, machine, left_out, what);
    folder.close().context("remove the temporary folder")?;
    Ok(report)
}

/// The items that are called by one of these names, or all.
fn chosen<T>(
    mut all: Vec<T>,
    names: &[String],
    what: &str,
    is_called: impl Fn(&T, &str) -> bool,
) -> anyhow::Result<Vec<T>> {
    for name in names {
        if !all.iter().any(|item| is_called(item, name)) {
            bail!("there is no {what} {name:?} here: see `selvedge bench compare --help`");
        }
    }
    if !names.is_empty() {
        all.retain(|item| names.iter().any(|name| is_called(item, name)));
    }
    Ok(all)
}

/// The systems that can do a shape.
fn suited<'a>(shape: &Shape, systems: &'a [System]) -> Vec<&'a System> {
    let systems = systems.iter();
    systems
        .filter(|system| shape.suits(system.protocol))
        .collect()
}

/// Divides the time of a quick run among its turns, and learns from each shape what a turn takes besides
/// the time that is measured.
#[derive(Debug)]
struct Budget {
    start: Instant,
    time: Duration,
    /// Turns to come, if none is saved.
    turns: usize,
    /// Turns so far.
    taken: usize,
    /// Time measured so far, in seconds.
    measured: f64,
}

impl Budget {
    fn new(time: Duration, turns: usize) -> Self {
        Self {
            start: Instant::now(),
            time,
            turns,
            taken: 0,
            measured: 0.0,
        }
    }

    fn is_spent(&self) -> bool {
        self.start.elapsed() >= self.time
    }

    /// How many rounds the next shape gets, and how many seconds each of its turns.
    fn share(&self, rounds: usize) -> (usize, f64) {
        let elapsed = self.start.elapsed().as_secs_f64();
        let overhead = if self.taken == 0 {
            FIRST_OVERHEAD
        } else {
            (elapsed - self.measured).max(0.0) / self.taken as f64
        };
        let left = (self.time.as_secs_f64() - elapsed).max(0.0);
        let each = left / self.turns.max(1) as f64;
        let (least, most) = QUICK_TURN;
        // A third more is for warming up.
        let seconds = ((each - overhead) * 0.75).clamp(least, most);
        let fitting = rounds as f64 * each / (seconds / 0.75 + overhead);
        // A little too much at one shape is made up for by the next.
        ((fitting.round() as usize).clamp(1, rounds), seconds)
    }

    /// Of so many turns these were taken, each with this much time.
    fn spent(&mut self, planned: usize, taken: usize, seconds: f64) {
        self.turns = self.turns.saturating_sub(planned);
        self.taken += taken;
        self.measured += taken as f64 * seconds;
    }
}

/// One shape of work.
struct Bench<'a> {
    program: &'a Path,
    pki: &'a Pki,
    root: &'a Path,
    shape: &'a Shape,
    warm_up: f64,
    seconds: f64,
    progress: &'a (dyn Fn(&str) + Sync),
}

impl Bench<'_> {
    /// Measures all systems in turns. What fails is noted, and the rest goes on.
    async fn measure(
        &self,
        place: usize,
        systems: &[&System],
        rounds: usize,
        measurements: &mut Measurements,
    ) {
        let name = &self.shape.name;
        let mut running: Vec<(&System, Option<Running>)> = Vec::new();
        // One that was never idle has no memory to compare with, so each turn needs a new server.
        let afresh = self.shape.is_idle();
        for system in systems {
            let server = match afresh {
                true => None,
                false => match self.start(system, &format!("{place}")).await {
                    Ok(server) => Some(server),
                    Err(error) => {
                        self.fail(measurements, system, &error);
                        continue;
                    }
                },
            };
            running.push((system, server));
        }
        for round in 0..rounds {
            for (system, server) in &running {
                let own;
                let server = match server {
                    Some(server) => server,
                    None => match self.start(system, &format!("{place}-{round}")).await {
                        Ok(server) => {
                            own = server;
                            &own
                        }
                        Err(error) => {
                            self.fail(measurements, system, &error);
                            continue;
                        }
                    },
                };
                let outcome = self.once(system.protocol, server, round).await;
                match outcome {
                    Ok(outcome) if outcome.count > 0 => {
                        let sample = Sample::new(&outcome, self.shape);
                        (self.progress)(&format!(
                            "{name} {}/{rounds} {}: {sample}",
                            round + 1,
                            system.name
                        ));
                        measurements.add(self.shape, &system.name, round, sample);
                    }
                    Ok(_) => {
                        let error = anyhow::anyhow!("nothing was delivered");
                        self.fail(measurements, system, &error);
                    }
                    Err(error) => self.fail(measurements, system, &error),
                }
            }
        }
    }

    fn fail(&self, measurements: &mut Measurements, system: &System, error: &anyhow::Error) {
        let line = format!("{} {} failed: {error:#}", self.shape.name, system.name);
        (self.progress)(&line);
        measurements.failures.push(line);
    }

    async fn start(&self, system: &System, place: &str) -> anyhow::Result<Running> {
        let dir = self.root.join(format!("{}-{place}", system.name));
        system.start(self.program, self.pki, &dir).await
    }

    /// One measurement by a load process of its own.
    async fn once(
        &self,
        protocol: Protocol,
        server: &Running,
        round: usize,
    ) -> anyhow::Result<Outcome> {
        // Whoever has a protocol of its own has a port of its own for MQTT.
        let (protocol, address) = match server.mqtt.filter(|_| self.shape.mqtt) {
            Some(address) => (Protocol::Mqtt, address),
            None => (protocol, server.address),
        };
        let job = Job {
            protocol,
            address,
            server: server.id(),
            pki: self.pki.folder.clone(),
            run: format!("r{round}"),
            task: self.shape.task(self.warm_up, self.seconds),
        };
        let own = self.program.display().to_string();
        let command = process::guarded(self.program, &[own, "bench".into(), "load".into()]);
        let mut load = tokio::process::Command::from(command)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start a load process")?;
        let mut stdin = load.stdin.take().context("it has no input")?;
        stdin.write_all(&serde_json::to_vec(&job)?).await?;
        drop(stdin);
        let patience = GRACE + Duration::from_secs_f64(self.warm_up + self.seconds);
        let done = tokio::time::timeout(patience, load.wait_with_output())
            .await
            .context("the load process did not end in time")??;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            bail!(
                "{}",
                said.lines().last().unwrap_or("it said nothing").trim()
            );
        }
        let outcome = serde_json::from_slice(&done.stdout).context("read the load's result")?;
        process::settle(server.id(), REST).await?;
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_refused() {
        let error = chosen(vec!["a"], &["b".into()], "shape", |item, name| {
            *item == name
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "there is no shape \"b\" here: see `selvedge bench compare --help`"
        );
    }

    #[test]
    fn time_is_shared_among_turns() {
        let budget = |seconds, turns| Budget::new(Duration::from_secs(seconds), turns);
        // 1.6 s each, of which 0.4 s are overhead and 0.3 s warming up.
        let (rounds, seconds) = budget(160, 100).share(3);
        assert_eq!(rounds, 3);
        assert!((seconds - 0.9).abs() < 0.01, "{seconds}");
        assert_eq!(budget(10_000, 100).share(3), (3, QUICK_TURN.1));
        // Too little even for short turns: fewer rounds, but never none.
        assert_eq!(budget(50, 100).share(3), (2, QUICK_TURN.0));
        assert_eq!(budget(0, 100).share(3), (1, QUICK_TURN.0));
        assert!(budget(0, 0).is_spent());
    }

    #[test]
    fn overhead_is_learned() {
        let mut budget = Budget::new(Duration::from_secs(100), 100);
        // Nothing took any time besides what was measured.
        budget.spent(50, 50, 1.0);
        let (_, seconds) = budget.share(3);
        assert!((seconds - 1.5).abs() < 0.01, "{seconds}");
    }
}
