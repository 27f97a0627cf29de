//! Running the binary: to its end, or until a test is done with it.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

/// Longer than anything takes on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command of the binary, without flags from the environment of whoever runs the tests.
pub(crate) fn selvedge<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
    command.args(args).stdin(Stdio::null());
    for name in ["BROKER", "PKI", "AS", "LOG"] {
        command.env_remove(format!("SELVEDGE_{name}"));
    }
    command
}

/// What a command wrote, and its exit code.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// The standard output of a command that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// The standard error of a command that must have failed, not by wrong usage.
    #[track_caller]
    pub(crate) fn failed(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        self.stderr
    }

    /// The lines of standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<serde_json::Value> {
        let lines = self.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {self:?}")))
            .collect()
    }
}

/// Runs a command to its end.
pub(crate) fn run(mut command: Command) -> Done {
    done(command.output().expect("the binary runs"))
}

/// Runs a command to its end with this on its standard input.
pub(crate) fn run_with_input(mut command: Command, input: &[u8]) -> Done {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut stdin = child.stdin.take().expect("it was asked for");
    stdin.write_all(input).expect("it reads its input");
    drop(stdin);
    done(child.wait_with_output().expect("it ends"))
}

fn done(output: Output) -> Done {
    Done {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("output is text"),
        stderr: String::from_utf8(output.stderr).expect("output is text"),
    }
}

/// A command that runs until it is told to stop; killed with the test if it was not.
pub(crate) struct Running {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Running {
    /// Starts a command.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let stdout: ChildStdout = child.stdout.take().expect("it was asked for");
        let stderr = child.stderr.take().expect("it was asked for");
        Self {
            child,
            stdout: lines(stdout),
            stderr: lines(stderr),
        }
    }

    /// The lines of standard output up to and with the one that is `last`.
    #[track_caller]
    pub(crate) fn lines_to(&self, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().map(String::as_str) != Some(last) {
            match self.stdout.recv_timeout(PATIENCE) {
                Ok(line) => seen.push(line),
                Err(error) => {
                    let complaints: Vec<String> = self.stderr.try_iter().collect();
                    panic!("waiting for {last:?}: {error}; saw {seen:#?} and {complaints:#?}");
                }
            }
        }
        seen
    }

    /// The next line of standard output.
    #[track_caller]
    pub(crate) fn line(&self) -> String {
        self.stdout
            .recv_timeout(PATIENCE)
            .expect("a line of output")
    }

    /// Waits until standard error has a line that contains this.
    #[track_caller]
    pub(crate) fn wait_for_note(&self, text: &str) {
        let mut seen = Vec::new();
        loop {
            match self.stderr.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(text) => return,
                Ok(line) => seen.push(line),
                Err(error) => panic!("waiting for {text:?}: {error}; saw {seen:#?}"),
            }
        }
    }

    /// Sends a signal such as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status()
            .expect("kill runs");
        assert!(sent.success(), "the process is there");
    }

    /// Waits for its end, and gives it with the rest of its output.
    #[track_caller]
    pub(crate) fn wait(mut self) -> (ExitStatus, Vec<String>) {
        let deadline = Instant::now() + PATIENCE;
        // Output ends when the process does, so there is nothing to poll.
        let mut rest = Vec::new();
        while let Ok(line) = self.stdout.recv_timeout(deadline - Instant::now()) {
            rest.push(line);
        }
        assert!(
            Instant::now() < deadline,
            "it did not end; it said {rest:#?}"
        );
        (self.child.wait().expect("it was started"), rest)
    }

    /// Asks it to stop, as a person or a service manager does, and sees that it does so well.
    #[track_caller]
    pub(crate) fn stop(self) {
        self.signal("TERM");
        let (status, _) = self.wait();
        assert_eq!(status.code(), Some(0));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    // More than any test leaves unread; beyond it the program would wait.
    let (sender, receiver) = sync_channel(10_000);
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("temporary paths are text").to_owned()
}
