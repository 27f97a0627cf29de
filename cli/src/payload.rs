//! Where a command takes its payload from, and how it writes the payloads it gets.

use std::io::{self, BufRead as _, Read as _};
use std::path::PathBuf;

use anyhow::Context as _;
use selvedge_client::Bytes;
use tokio::sync::mpsc;

/// Lines that are read ahead of what was sent; when full, reading waits.
const LINES_AHEAD: usize = 64;

/// A payload from the command line, a file or standard input.
#[derive(Debug, Default, clap::Args)]
#[group(id = "source", multiple = false)]
pub(crate) struct Args {
    /// The payload as text.
    payload: Option<String>,
    /// Take the payload from a file.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Take the payload from standard input.
    #[arg(long)]
    stdin: bool,
}

impl Args {
    /// Whether any was named.
    pub(crate) fn is_given(&self) -> bool {
        self.payload.is_some() || self.file.is_some() || self.stdin
    }

    /// The payload; empty when none was named.
    pub(crate) fn read(self) -> anyhow::Result<Bytes> {
        if let Some(file) = self.file {
            let read = std::fs::read(&file);
            return Ok(read
                .with_context(|| format!("read {}", file.display()))?
                .into());
        }
        if self.stdin {
            let mut payload = Vec::new();
            io::stdin()
                .lock()
                .read_to_end(&mut payload)
                .context("read standard input")?;
            return Ok(payload.into());
        }
        Ok(self.payload.unwrap_or_default().into())
    }
}

/// The lines of standard input, without their ends, as they come.
pub(crate) fn lines() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(LINES_AHEAD);
    // A thread of its own, since reading from a terminal blocks and cannot be given up.
    std::thread::spawn(move || {
        for line in io::stdin().lock().split(b'\n') {
            let line = line.map(|mut line| {
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                Bytes::from(line)
            });
            let failed = line.is_err();
            if sender.blocking_send(line).is_err() || failed {
                return;
            }
        }
    });
    receiver
}
