//! Waiting for an event with an overall limit; nothing in the tests ever sleeps blindly.

use std::fmt::Debug;
use std::future::Future;
use std::panic::Location;
use std::time::Duration;

use tokio::sync::watch;

/// How long any single expectation may take. Generous, because a busy machine is not a bug; a test
/// that passes never waits for it.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How often a condition without an event behind it is looked at again.
const PROBE_INTERVAL: Duration = Duration::from_millis(5);

/// The output of `future`, or a panic that names `what` was awaited and where.
#[track_caller]
pub fn within<F: Future>(what: &str, future: F) -> impl Future<Output = F::Output> {
    let at = Location::caller();
    async move {
        match tokio::time::timeout(LIMIT, Box::pin(future)).await {
            Ok(output) => output,
            Err(_) => panic!("{at}: waited {LIMIT:?} for {what}"),
        }
    }
}

/// The first value of a watch channel that meets the condition.
#[track_caller]
pub fn wait_for<T: Clone + Debug>(
    what: &str,
    receiver: &mut watch::Receiver<T>,
    mut condition: impl FnMut(&T) -> bool,
) -> impl Future<Output = T> {
    let at = Location::caller();
    async move {
        let search = receiver.wait_for(|value| condition(value));
        let problem = match tokio::time::timeout(LIMIT, search).await {
            Ok(Ok(value)) => return value.clone(),
            Ok(Err(_)) => format!("waited for {what}, but its sender is gone"),
            Err(_) => format!("waited {LIMIT:?} for {what}"),
        };
        let last = receiver.borrow().clone();
        panic!("{at}: {problem}; last seen: {last:?}")
    }
}

/// The first answer of a probe, for conditions such as counters that no event announces.
#[track_caller]
pub fn eventually<T, F>(what: &str, mut probe: impl FnMut() -> F) -> impl Future<Output = T>
where
    F: Future<Output = Option<T>>,
{
    let at = Location::caller();
    async move {
        let search = async {
            loop {
                if let Some(found) = probe().await {
                    return found;
                }
                tokio::time::sleep(PROBE_INTERVAL).await;
            }
        };
        match tokio::time::timeout(LIMIT, search).await {
            Ok(found) => found,
            Err(_) => panic!("{at}: waited {LIMIT:?} for {what}"),
        }
    }
}
