//! Loading a model file on a thread of its own, behind a deadline.

use std::any::Any;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// Why there is neither a model nor the engine's own error.
#[derive(Debug)]
pub(crate) enum Unloaded {
    /// The system gives no thread.
    Thread(io::Error),
    /// It took too long. Analysis cannot be interrupted, so the thread goes on until it ends or the
    /// process does.
    Late,
    /// The thread panicked.
    Panicked,
}

/// Runs `load` on its own thread and waits for it until the deadline.
pub(crate) fn within<T: Send + 'static>(
    deadline: Duration,
    load: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unloaded> {
    // One place: a result that comes too late is put there and dropped, and the thread ends.
    let (sender, receiver) = sync_channel(1);
    thread::Builder::new()
        .name("load-model".to_owned())
        .spawn(move || {
            let _ = sender.send(load());
        })
        .map_err(Unloaded::Thread)?;
    receiver
        .recv_timeout(deadline)
        .map_err(|error| match error {
            RecvTimeoutError::Timeout => Unloaded::Late,
            RecvTimeoutError::Disconnected => Unloaded::Panicked,
        })
}

/// What a panic of an engine said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    format!("the engine panicked: {message}")
}
