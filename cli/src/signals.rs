//! SIGTERM and SIGINT: the first asks a service to stop, the second ends it at once. SIGHUP asks it to
//! read its configuration again; a service that cannot goes on as it is.

use std::process;

use anyhow::Context as _;

/// What a process that is ended by its second signal exits with.
const ENDED_AT_ONCE: i32 = 130;

/// What a signal asks of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Stop in good order.
    Stop,
    /// Read the configuration again.
    Reload,
}

/// The signals that ask a process to stop.
#[derive(Debug)]
pub(crate) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    /// Listens from now on.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self {
                terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
                interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
                hangup: signal(SignalKind::hangup()).context("listen for SIGHUP")?,
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits for the next signal: whether it asks to read the configuration again.
    pub(crate) async fn next_or_reload(&mut self) -> Asked {
        #[cfg(unix)]
        tokio::select! {
            _ = self.hangup.recv() => return Asked::Reload,
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        #[cfg(not(unix))]
        self.next().await;
        Asked::Stop
    }

    /// Waits for `stopping` to be done; the next signal ends the process meanwhile.
    pub(crate) async fn or_end_at_once<T>(&mut self, stopping: impl Future<Output = T>) -> T {
        tokio::select! {
            done = stopping => done,
            () = self.next() => {
                crate::output::note("stopped at once: what was under way is lost");
                process::exit(ENDED_AT_ONCE);
            }
        }
    }
}
