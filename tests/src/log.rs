//! Log output of the tests: shown by `RUST_LOG`, attached to the test that failed.

use std::sync::Once;

use tracing_subscriber::EnvFilter;

static INIT: Once = Once::new();

/// Sends log lines to the test's output, filtered by `RUST_LOG` (default: errors). Call it as often
/// as you like.
pub fn init() {
    INIT.call_once(|| {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
        // A subscriber that another harness has already set serves as well.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_test_writer()
            .try_init();
    });
}
