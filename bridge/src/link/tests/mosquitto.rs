//! A mosquitto of the test's own, on a free port of the loopback interface.

use std::io::{BufRead, BufReader, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// Whether there is a mosquitto to test with. Says so when there is none, since the test is skipped.
pub(crate) fn is_installed() -> bool {
    let found = program().is_some();
    if !found {
        let test = std::thread::current();
        let test = test.name().unwrap_or("a test");
        // Written past the capture of the test runner, which hides what a test that passes prints.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED {test}: mosquitto is not installed (Debian package mosquitto)"
        );
    }
    found
}

/// A running mosquitto; it ends with this value.
pub(crate) struct Mosquitto {
    process: Child,
    /// Its port on 127.0.0.1.
    pub(crate) port: u16,
    _dir: TempDir,
}

impl Mosquitto {
    /// Starts one that lets everybody in, or with `extra` lines of configuration for its listener.
    pub(crate) fn start(extra: &str) -> Self {
        // The port is free when it is looked for; should another take it first, mosquitto says so
        // and the next port is tried.
        for _ in 0..5 {
            if let Some(started) = Self::try_start(extra) {
                return started;
            }
        }
        panic!("mosquitto found no port to listen on");
    }

    fn try_start(extra: &str) -> Option<Self> {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        Self::start_on(port, extra)
    }

    /// Starts one on a port that an earlier one has left.
    pub(crate) fn start_on(port: u16, extra: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let config = dir.path().join("mosquitto.conf");
        let text = format!(
            "user root\nlog_dest stderr\npersistence false\nlistener {port} 127.0.0.1\n\
             allow_anonymous true\n{extra}\n"
        );
        std::fs::write(&config, text).unwrap();
        let mut process = Command::new(program().expect("the test asked `is_installed` first"))
            .arg("-c")
            .arg(&config)
            .stderr(Stdio::piped())
            .spawn()
            .expect("mosquitto starts");
        let log = BufReader::new(process.stderr.take().expect("stderr is piped"));
        let mut lines = log.lines().map_while(Result::ok);
        let running = lines.any(|line| line.contains("running"));
        // What follows must be read, or the pipe fills and mosquitto stands still.
        std::thread::spawn(move || lines.for_each(drop));
        let mut started = Self {
            process,
            port,
            _dir: dir,
        };
        if !running {
            let _status = started.process.wait();
            return None;
        }
        Some(started)
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _gone = self.process.kill();
        let _status = self.process.wait();
    }
}

fn program() -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|dir| dir.join("mosquitto"))
        .find(|program| program.is_file())
}
