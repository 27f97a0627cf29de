//! Measures embedded stores side by side with the broker's workload, and tries damaged files on them.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use selvedge_bench::engine::Contender;
use selvedge_bench::workload::{Holding, Workload};

const MEASURED: [Contender; 4] = [
    Contender::Log,
    Contender::Fjall,
    Contender::Redb,
    Contender::RedbQuick,
];
/// What the others are compared with.
const BASE: usize = 2;
/// A probe that takes longer is counted as hung.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Commit, acknowledge, restart; all contenders in turn, for several rounds.
    Measure {
        /// Where the stores are made: on the disk to measure, not in memory.
        #[arg(long, default_value = ".")]
        directory: PathBuf,
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Runs, each as COMMITSxENTRIES.
        #[arg(long, value_delimiter = ',', default_value = "2000x1,2000x16,1000x256")]
        shapes: Vec<String>,
    },
    /// Flip bits of a store's files and cut them, and see what opens.
    Damage {
        #[arg(long, default_value = ".")]
        directory: PathBuf,
        /// Bits flipped per file, evenly spread over the bytes in use.
        #[arg(long, default_value_t = 60)]
        flips: u64,
    },
    /// Write the workload, print seconds and bytes written, and end without closing the store.
    #[command(hide = true)]
    Fill {
        contender: Contender,
        directory: PathBuf,
        commits: usize,
        size: usize,
    },
    /// Open a store, read it, and print what it holds.
    #[command(hide = true)]
    Probe {
        contender: Contender,
        directory: PathBuf,
    },
}

/// One run of one contender.
#[derive(Debug, Clone, Copy)]
struct Figures {
    commits_per_second: f64,
    entries_per_second: f64,
    bytes_on_disk: f64,
    /// Sent to the disk while committing, in bytes per byte appended.
    write_amplification: f64,
    /// Open and read all, after the process died.
    after_kill: f64,
    /// Open and read all, after an orderly end.
    after_close: f64,
}

fn main() -> Result<()> {
    match Arguments::parse().action {
        Action::Measure {
            directory,
            rounds,
            shapes,
        } => {
            for shape in shapes {
                let (commits, size) = shape
                    .split_once('x')
                    .context("expected a shape like 2000x16")?;
                measure(&directory, rounds, commits.parse()?, size.parse()?)?;
            }
            Ok(())
        }
        Action::Damage { directory, flips } => damage(&directory, flips),
        Action::Fill {
            contender,
            directory,
            commits,
            size,
        } => {
            let workload = Workload::new(commits, size);
            let mut engine = contender.open(&directory)?;
            let written = bytes_written()?;
            let start = Instant::now();
            for commit in &workload.commits {
                engine.commit(commit)?;
            }
            let elapsed = start.elapsed().as_secs_f64();
            say(&format!("{elapsed} {}", bytes_written()? - written))?;
            // Drops nothing, so the files are those of a process that was killed.
            std::process::exit(0)
        }
        Action::Probe {
            contender,
            directory,
        } => {
            let engine = contender.open(&directory).context("open")?;
            say(&describe(&engine.scan().context("scan")?))
        }
    }
}

fn measure(directory: &Path, rounds: usize, commits: usize, size: usize) -> Result<()> {
    let workload = Workload::new(commits, size);
    let mut rows: Vec<Vec<Figures>> = vec![Vec::new(); MEASURED.len()];
    for round in 0..rounds {
        for turn in 0..MEASURED.len() {
            // Each round begins with another contender, so that none always follows the same one.
            let position = (round + turn) % MEASURED.len();
            rows[position].push(run(MEASURED[position], directory, &workload)?);
        }
    }
    say(&format!(
        "\n{commits} commits of {size}, {} bytes left in {} entries; {rounds} rounds: min / median / max",
        workload.left.bytes, workload.left.entries
    ))?;
    for (contender, figures) in MEASURED.iter().zip(&rows) {
        for (name, of) in COLUMNS {
            let base: Vec<f64> = rows[BASE].iter().map(of).collect();
            let own: Vec<f64> = figures.iter().map(of).collect();
            let ratio: Vec<f64> = own
                .iter()
                .zip(&base)
                .map(|(own, base)| own / base)
                .collect();
            say(&format!(
                "{contender:<11} {name:<22} {:>40}   to {}: {}",
                spread(&own),
                MEASURED[BASE],
                spread(&ratio)
            ))?;
        }
    }
    Ok(())
}

type Column = (&'static str, fn(&Figures) -> f64);

const COLUMNS: [Column; 6] = [
    ("commits/s", |figures| figures.commits_per_second),
    ("entries/s", |figures| figures.entries_per_second),
    ("bytes on disk", |figures| figures.bytes_on_disk),
    ("written per byte", |figures| figures.write_amplification),
    ("seconds after kill", |figures| figures.after_kill),
    ("seconds after close", |figures| figures.after_close),
];

fn run(contender: Contender, parent: &Path, workload: &Workload) -> Result<Figures> {
    let home = tempfile::tempdir_in(parent)?;
    let printed = fill(contender, home.path(), workload)?;
    let bytes_on_disk = disk_usage(home.path())? as f64;
    let restart = || -> Result<f64> {
        let start = Instant::now();
        let engine = contender.open(home.path())?;
        let holding = engine.scan()?;
        let elapsed = start.elapsed().as_secs_f64();
        ensure!(
            holding == workload.left,
            "{contender} holds {holding:?} after a restart, not {:?}",
            workload.left
        );
        Ok(elapsed)
    };
    let after_kill = restart()?;
    let after_close = restart()?;
    let (elapsed, written) = printed
        .trim()
        .split_once(' ')
        .context("expected seconds and bytes")?;
    let elapsed: f64 = elapsed.parse()?;
    let written: f64 = written.parse()?;
    Ok(Figures {
        commits_per_second: workload.commits.len() as f64 / elapsed,
        entries_per_second: workload.entries() as f64 / elapsed,
        bytes_on_disk,
        write_amplification: written / workload.bytes() as f64,
        after_kill,
        after_close,
    })
}

/// Has another process write the workload and end without closing the store.
fn fill(contender: Contender, directory: &Path, workload: &Workload) -> Result<String> {
    let output = Command::new(std::env::current_exe()?)
        .arg("fill")
        .arg(contender.to_string())
        .arg(directory)
        .arg(workload.commits.len().to_string())
        .arg(workload.commits[0].appended.len().to_string())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "{contender} could not be filled");
    Ok(String::from_utf8(output.stdout)?)
}

/// Damages copies of one store in every way, and counts what each contender makes of them.
fn damage(parent: &Path, flips: u64) -> Result<()> {
    // Enough for fjall to have tables beside its journal.
    let workload = Workload::new(150, 256);
    for (contender, readers) in [
        (Contender::Fjall, &[Contender::Fjall][..]),
        (
            Contender::Redb,
            &[Contender::Redb, Contender::RedbChecked][..],
        ),
    ] {
        let killed = tempfile::tempdir_in(parent)?;
        fill(contender, killed.path(), &workload)?;
        let closed = tempfile::tempdir_in(parent)?;
        copy(killed.path(), closed.path())?;
        drop(contender.open(closed.path())?);
        for &reader in readers {
            for (state, store) in [("closed", closed.path()), ("killed", killed.path())] {
                for file in files(store)? {
                    try_file(reader, state, store, &file, flips, &workload.left)?;
                }
            }
        }
    }
    Ok(())
}

fn try_file(
    reader: Contender,
    state: &str,
    store: &Path,
    file: &Path,
    flips: u64,
    expected: &Holding,
) -> Result<()> {
    let name = file.strip_prefix(store)?.display().to_string();
    let used = used(file)?;
    let mut outcomes: Vec<(String, usize)> = Vec::new();
    for flip in 0..flips.min(used) {
        let position = used * flip / flips.min(used);
        let outcome = probe(reader, store, expected, |copy| {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(copy.join(&name))?;
            let mut byte = [0];
            file.seek(SeekFrom::Start(position))?;
            file.read_exact(&mut byte)?;
            byte[0] ^= 1 << (flip % 8);
            file.seek(SeekFrom::Start(position))?;
            Ok(file.write_all(&byte)?)
        })?;
        match outcomes.iter_mut().find(|(known, _)| *known == outcome) {
            Some((_, count)) => *count += 1,
            None => outcomes.push((outcome, 1)),
        }
    }
    outcomes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    say(&format!("\n{reader}, {state}, {name}, {used} bytes used"))?;
    for (outcome, count) in outcomes {
        say(&format!("  flip  {count:>4} x {outcome}"))?;
    }
    for length in [used.saturating_sub(1), used / 2, 0] {
        let outcome = probe(reader, store, expected, |copy| {
            let file = OpenOptions::new().write(true).open(copy.join(&name))?;
            Ok(file.set_len(length)?)
        })?;
        say(&format!("  cut to {length}: {outcome}"))?;
    }
    Ok(())
}

/// Damages a copy of a store and says what a process that opens it and reads it makes of it.
fn probe(
    reader: Contender,
    store: &Path,
    expected: &Holding,
    damage: impl FnOnce(&Path) -> Result<()>,
) -> Result<String> {
    let copied = tempfile::tempdir_in(store.parent().context("the store has a parent")?)?;
    copy(store, copied.path())?;
    damage(copied.path())?;
    let mut child = Command::new(std::env::current_exe()?)
        .arg("probe")
        .arg(reader.to_string())
        .arg(copied.path())
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Ok("hangs".to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let (mut output, mut errors) = (String::new(), String::new());
    child
        .stdout
        .context("stdout is piped")?
        .read_to_string(&mut output)?;
    child
        .stderr
        .context("stderr is piped")?
        .read_to_string(&mut errors)?;
    if !status.success() {
        let first = errors.lines().filter(|line| !line.trim().is_empty());
        let words: Vec<&str> = first.take(5).map(str::trim).collect();
        let text: String = words
            .join(" ")
            .chars()
            .map(|letter| if letter.is_ascii_digit() { '#' } else { letter })
            .take(170)
            .collect();
        return Ok(if errors.contains("panicked at") {
            format!("PANIC {text}")
        } else {
            format!("refused ({status}): {text}")
        });
    }
    let held = output.trim();
    if held == describe(expected) {
        return Ok("opens, nothing missing".to_owned());
    }
    let entries: u64 = held
        .split_whitespace()
        .next()
        .context("a number of entries")?
        .parse()?;
    Ok(if entries < expected.entries {
        "OPENS WITHOUT A WORD, entries missing".to_owned()
    } else if entries > expected.entries {
        "OPENS WITHOUT A WORD, acknowledged entries are back".to_owned()
    } else {
        "OPENS WITHOUT A WORD, an entry is wrong".to_owned()
    })
}

fn describe(holding: &Holding) -> String {
    format!(
        "{} entries, {} bytes, digest {:x}",
        holding.entries, holding.bytes, holding.digest
    )
}

fn spread(values: &[f64]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let show = |value: f64| match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.4}"),
    };
    format!(
        "{} / {} / {}",
        show(sorted[0]),
        show(sorted[sorted.len() / 2]),
        show(sorted[sorted.len() - 1])
    )
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Bytes up to the last one that is not zero.
fn used(file: &Path) -> Result<u64> {
    let bytes = fs::read(file)?;
    Ok(bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last as u64 + 1))
}

/// What this process has caused to be written to disk so far.
fn bytes_written() -> Result<u64> {
    let io = fs::read_to_string("/proc/self/io").context("read this process's counters")?;
    let line = io
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.context("expected a line write_bytes")?.parse()?)
}

/// Blocks in use, for fjall's journals are mostly holes.
fn disk_usage(directory: &Path) -> Result<u64> {
    let mut sum = 0;
    for file in files(directory)? {
        sum += fs::metadata(file)?.blocks() * 512;
    }
    Ok(sum)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    for file in files(from)? {
        let target = to.join(file.strip_prefix(from)?);
        fs::create_dir_all(target.parent().context("the target is below a directory")?)?;
        fs::copy(&file, &target)?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{line}")?)
}
