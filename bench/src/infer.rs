//! What the fabric adds to an inference, and what it does under load and loss: `selvedge bench infer`.
//!
//! The broker is a process of its own, over mutual TLS. Whoever asks and whoever works are in this
//! process, so that the moments at both ends are told by the same clock.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::Serialize;

use crate::compare::machine::{self, Machine};

use self::figure::Figure;
use self::scene::Ground;

mod burst;
mod cancel;
mod figure;
mod link;
mod loss;
mod overhead;
mod residency;
mod scene;
mod streams;

/// What can be measured, in the order of the report.
pub const SHAPES: [&str; 6] = ["added", "bodies", "cancel", "burst", "loss", "residency"];

/// What to measure, and how long.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A tenth of the requests; writes no files.
    pub quick: bool,
    /// Names of shapes; none for all.
    pub shapes: Vec<String>,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// In the order they were measured.
    pub figures: Vec<Figure>,
    /// Shapes that could not be measured, and why.
    pub failures: Vec<String>,
}

/// Measures. `program` is the `selvedge` binary; `progress` is told each line of progress.
///
/// # Errors
/// An unknown name, or no temporary folder. What fails later is in the report.
pub async fn run(
    options: &Options,
    program: &Path,
    progress: &(dyn Fn(&str) + Sync),
) -> anyhow::Result<Report> {
    for name in &options.shapes {
        ensure!(
            SHAPES.contains(&name.as_str()),
            "there is no shape {name:?}: expected one of {}",
            SHAPES.join(", ")
        );
    }
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let mut report = Report {
        machine: machine::describe(folder.path()),
        figures: Vec::new(),
        failures: Vec::new(),
    };
    let wanted = |name: &&str| {
        options.shapes.is_empty() || options.shapes.iter().any(|wanted| wanted == name)
    };
    let ground = Ground {
        program,
        root: folder.path(),
    };
    for name in SHAPES.into_iter().filter(wanted) {
        let quick = options.quick;
        let measured = match name {
            "added" => Box::pin(overhead::measure(&ground, quick, progress)).await,
            "bodies" => Box::pin(streams::measure(&ground, quick, progress)).await,
            "cancel" => Box::pin(cancel::measure(&ground, quick)).await,
            "burst" => Box::pin(burst::measure(&ground, quick)).await,
            "loss" => Box::pin(loss::measure(&ground, quick)).await,
            _ => Box::pin(residency::measure(&ground, quick)).await,
        };
        match measured {
            Ok(figures) => {
                for figure in &figures {
                    progress(&format!("{name}: {figure}"));
                }
                report.figures.extend(figures);
            }
            Err(error) => {
                let line = format!("{name} failed: {error:#}");
                progress(&line);
                report.failures.push(line);
            }
        }
    }
    Ok(report)
}

impl Report {
    /// A table in Markdown.
    pub fn table(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "{}, {} cores, Linux {}, load {} at the start.\n\n",
            machine.processor, machine.cores, machine.kernel, machine.load
        );
        if !machine.optimised {
            text.push_str("**Not an optimised build: these figures mean nothing.**\n\n");
        }
        text.push_str("| | figure | goal | |\n|---|---|---|---|\n");
        for figure in &self.figures {
            text.push_str(&figure.row());
        }
        for line in &self.failures {
            text.push_str(&format!("\n{line}\n"));
        }
        text
    }

    /// Writes `infer-DATE.json` and `.md` into a folder, which is made if need be.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let date = self.machine.date.split('T').next().unwrap_or_default();
        let json = format!("{}\n", serde_json::to_string_pretty(self)?);
        let mut written = Vec::new();
        for (end, text) in [("json", json), ("md", self.table())] {
            let path = folder.join(format!("infer-{date}.{end}"));
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            written.push(path);
        }
        Ok(written)
    }
}
