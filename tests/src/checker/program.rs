//! The broker as a process of its own, to be killed and held.

use std::fs::OpenOptions;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// Longer than any start or stop takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than the kernel takes to end a process that was killed.
const BURIAL: Duration = Duration::from_secs(5);
/// What of the log an error shows.
const LOG_TAIL: usize = 20;

/// `selvedge broker` with its configuration. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Program {
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    running: Option<Child>,
    /// Kept open, since nobody may write to a closed pipe.
    stdout: Option<Lines<BufReader<ChildStdout>>>,
}

impl Program {
    /// Nothing is started yet. The log of every start is appended to the file `log`.
    pub(crate) fn new(binary: &Path, config: &Path, log: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
            config: config.to_owned(),
            log: log.to_owned(),
            running: None,
            stdout: None,
        }
    }

    /// Starts the process and answers with the address of its native listener once it is ready.
    pub(crate) async fn start(&mut self) -> io::Result<SocketAddr> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let mut command = Command::new(&self.binary);
        command
            .arg("broker")
            .arg("--config")
            .arg(&self.config)
            .env_remove("SELVEDGE_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().expect("it was asked for");
        // Known from now on, so that it is found if the start is given up.
        self.running = Some(child);
        let lines = self.stdout.insert(BufReader::new(stdout).lines());
        let mut quic = None;
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if let Some(address) = line.strip_prefix("quic=") {
                    quic = address.parse().ok();
                }
                if line == "ready" {
                    return Ok(());
                }
            }
            Err(io::Error::other("it ended before it was ready"))
        };
        let ready = tokio::time::timeout(PATIENCE, ready).await;
        match (ready, quic) {
            (Ok(Ok(())), Some(quic)) => Ok(quic),
            (Ok(Ok(())), None) => Err(self.failed("it names no address for quic")),
            (Ok(Err(error)), _) => Err(self.failed(&error.to_string())),
            (Err(_), _) => Err(self.failed("it was not ready in time")),
        }
    }

    /// Sends SIGKILL. The process may still be there afterwards: see [`Program::ended`].
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Asks it to stop.
    pub(crate) fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Lets it stand still.
    pub(crate) fn pause(&self) -> io::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Waits until it is gone.
    pub(crate) async fn ended(&mut self) -> io::Result<ExitStatus> {
        let status = match &mut self.running {
            Some(child) => tokio::time::timeout(PATIENCE, child.wait()).await,
            None => return Err(io::Error::other("it does not run")),
        };
        match status {
            Ok(status) => {
                self.running = None;
                status
            }
            Err(_) => Err(self.failed("it did not end in time")),
        }
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

    /// Waits a little until a process that was killed is gone, where nothing can be awaited.
    pub(crate) fn bury(&mut self) {
        let deadline = Instant::now() + BURIAL;
        if let Some(mut child) = self.running.take() {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
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
        io::Error::other(format!("{why}; its log ends with\n{tail}"))
    }
}
