//! What time it is, for deadlines and expiry.

use std::time::Instant;

/// Now, by the clock that the runtime's timers follow. In a simulation that is not the machine's, and
/// an instant of one clock means nothing to the other.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
