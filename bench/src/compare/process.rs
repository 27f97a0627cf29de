//! Processes: what they use, and that they end with the one that started them.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Resource, Rlimit, Signal};

/// CPU time that a process has used so far, all its threads together.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(process: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = cpu_ticks(&stat).with_context(|| format!("{path} has no CPU times"))?;
    let hertz = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64(ticks as f64 / hertz as f64))
}

/// User and system time in a line of `/proc/<pid>/stat`, fields 14 and 15.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The second field is the program's name in brackets, and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Resident memory of a process, in KiB.
///
/// # Errors
/// There is no such process.
pub fn memory_kib(process: u32) -> anyhow::Result<u64> {
    status_kib(process, "VmRSS:")
}

/// The most resident memory that a process has had, in KiB.
///
/// # Errors
/// There is no such process.
pub fn peak_kib(process: u32) -> anyhow::Result<u64> {
    status_kib(process, "VmHWM:")
}

fn status_kib(process: u32, name: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .with_context(|| format!("{path} has no {name}"))
}

/// Waits until a process uses next to no CPU time, or this long.
///
/// # Errors
/// There is no such process.
pub async fn settle(process: u32, patience: Duration) -> anyhow::Result<()> {
    const LOOK: Duration = Duration::from_millis(50);
    let mut before = cpu_time(process)?;
    for _ in 0..patience.as_millis() / LOOK.as_millis() {
        tokio::time::sleep(LOOK).await;
        let now = cpu_time(process)?;
        // One tick of the clock that this is counted in.
        if now - before <= Duration::from_millis(10) {
            return Ok(());
        }
        before = now;
    }
    Ok(())
}

/// Lets this process, and those it starts, open as many files as the system allows. Gives the number.
pub fn raise_file_limit() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // What cannot be raised is left: shapes that need more are left out.
    let _ = rustix::process::setrlimit(Resource::Nofile, wanted);
    let now = rustix::process::getrlimit(Resource::Nofile);
    now.current.unwrap_or(u64::MAX)
}

/// A command that ends with this process, however that ends: `program` is this binary, whose hidden
/// command `bench guard` asks the kernel for it and then becomes the command.
pub fn guarded(program: &Path, command: &[String]) -> Command {
    let mut guard = Command::new(program);
    guard
        .args(["bench", "guard", "--parent"])
        .arg(std::process::id().to_string())
        .arg("--")
        .args(command)
        .stdin(Stdio::null());
    guard
}

/// Becomes `command`, which the kernel will end with the process `parent` that started this one.
///
/// # Errors
/// Why it could not; there is no other return.
pub fn become_guarded(parent: u32, command: &[String]) -> anyhow::Result<()> {
    let (program, args) = command
        .split_first()
        .context("expected a command after --")?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("ask to end with the harness")?;
    // It may have ended before we asked.
    let found = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if u32::try_from(found) != Ok(parent) {
        bail!("the harness is gone");
    }
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("run {program}"))
}

/// A server process, which ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
}

impl Server {
    /// Starts a command with its standard error, and its output unless that is read, in a file.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command, log: &Path, read_output: bool) -> io::Result<Self> {
        let log = File::create(log)?;
        command.stdout(if read_output {
            Stdio::piped()
        } else {
            log.try_clone()?.into()
        });
        command.stderr(log);
        Ok(Self {
            child: command.spawn()?,
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output, if it was to be read and was not taken before.
    pub fn output(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as well. Its folder is removed after this, so it must
        // be gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) (b 1) S 1 7 7 0 -1 4194560 9 0 0 0 120 30 5 6 20 0 1 0 99 1 2";
        assert_eq!(cpu_ticks(stat), Some(150));
        assert_eq!(cpu_ticks("7 (a) S 1"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn this_process_has_memory_and_used_time() {
        let us = std::process::id();
        assert!(memory_kib(us).unwrap() > 100);
        assert!(peak_kib(us).unwrap() > 100);
        assert!(cpu_time(us).is_ok());
        assert!(cpu_time(u32::MAX).is_err());
    }
}
