//! A program of its own process, to be killed, stopped, held and started again.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// Longer than any start or stop takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What of the log an error shows.
const LOG_TAIL: usize = 20;

/// A program with its arguments. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Process {
    binary: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    running: Option<Child>,
    /// Kept open, since nobody may write to a closed pipe.
    stdout: Option<Lines<BufReader<ChildStdout>>>,
}

impl Process {
    /// Nothing is started yet. The log of every start is appended to the file `log`.
    pub(crate) fn new(binary: &Path, arguments: &[&str], config: &Path, log: &Path) -> Self {
        let arguments = arguments.iter().map(OsString::from);
        Self {
            binary: binary.to_owned(),
            arguments: arguments.chain([config.into()]).collect(),
            log: log.to_owned(),
            running: None,
            stdout: None,
        }
    }

    /// Starts the process.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let mut child = Command::new(&self.binary)
            .args(&self.arguments)
            .env_remove("SELVEDGE_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().expect("it was asked for");
        self.stdout = Some(BufReader::new(stdout).lines());
        self.running = Some(child);
        Ok(())
    }

    /// Waits for a line of standard output that starts so, and answers with what follows.
    pub(crate) async fn line(&mut self, start: &str) -> io::Result<String> {
        let Some(lines) = &mut self.stdout else {
            return Err(io::Error::other("it does not run"));
        };
        let found = tokio::time::timeout(PATIENCE, async {
            while let Some(line) = lines.next_line().await? {
                if let Some(rest) = line.strip_prefix(start) {
                    return Ok(rest.to_owned());
                }
            }
            Err(io::Error::other("it ended before"))
        });
        match found.await {
            Ok(Ok(rest)) => Ok(rest),
            Ok(Err(error)) => Err(self.failed(&format!("no line {start:?}: {error}"))),
            Err(_) => Err(self.failed(&format!("no line {start:?} in time"))),
        }
    }

    /// Sends SIGKILL and waits for the end.
    pub(crate) async fn kill(&mut self) -> io::Result<()> {
        self.signal(Signal::KILL)?;
        self.ended().await
    }

    /// Asks it to stop, and waits for the end.
    pub(crate) async fn terminate(&mut self) -> io::Result<()> {
        self.signal(Signal::TERM)?;
        self.ended().await
    }

    /// Lets it stand still.
    pub(crate) fn pause(&self) -> io::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Fails if it has ended although nobody asked it to.
    pub(crate) fn check(&mut self) -> io::Result<()> {
        match &mut self.running {
            Some(child) => match child.try_wait()? {
                None => Ok(()),
                Some(status) => Err(self.failed(&format!("it ended by itself with {status}"))),
            },
            None => Err(io::Error::other("it does not run")),
        }
    }

    async fn ended(&mut self) -> io::Result<()> {
        let Some(child) = &mut self.running else {
            return Err(io::Error::other("it does not run"));
        };
        match tokio::time::timeout(PATIENCE, child.wait()).await {
            Ok(status) => {
                self.running = None;
                status.map(drop)
            }
            Err(_) => Err(self.failed("it did not end in time")),
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        let id = self.running.as_ref().and_then(Child::id);
        let id = id.and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let id = id.ok_or_else(|| self.failed("it does not run"))?;
        Ok(kill_process(id, signal)?)
    }

    fn failed(&self, why: &str) -> io::Error {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n");
        let program = self.binary.display();
        io::Error::other(format!("{program}: {why}; its log ends with\n{tail}"))
    }
}

/// Where mosquitto is, if it is installed.
pub fn mosquitto() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join("mosquitto"))
        .find(|program| program.is_file())
}
