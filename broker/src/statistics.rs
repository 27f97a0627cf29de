//! What became of the requests to one responder or worker: how many, how many failed, how long they took.

use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use selvedge_proto::status::Code;
use serde::Serialize;

/// Longest time that is told apart from longer ones: a day, the longest deadline.
const LONGEST_US: u64 = 24 * 3600 * 1_000_000;

/// Counts and times since its owner registered.
#[derive(Debug, Default)]
pub struct Statistics {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    calls: u64,
    errors: u64,
    /// In microseconds, to one digit. Made for the first request, so that who never gets one costs little.
    times: Option<Histogram<u32>>,
}

/// What [`Statistics`] held at one moment. Times are in microseconds, right to one part in ten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Requests that have ended.
    pub calls: u64,
    /// Those of them that ended with another code than OK or CANCELLED.
    pub errors: u64,
    /// Half of them took no longer than this; zero before the first.
    pub p50_us: u64,
    /// Nine of ten took no longer than this.
    pub p90_us: u64,
    /// 99 of 100 took no longer than this.
    pub p99_us: u64,
}

impl Statistics {
    /// Counts a request that ended with this code after this time.
    pub fn record(&self, code: Code, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let mut inner = self.inner.lock();
        inner.calls += 1;
        inner.errors += u64::from(!matches!(code, Code::Ok | Code::Cancelled));
        if inner.times.is_none() {
            inner.times = Histogram::new_with_max(LONGEST_US, 1).ok();
        }
        if let Some(times) = &mut inner.times {
            times.saturating_record(micros);
        }
    }

    /// What is known now.
    pub fn summary(&self) -> Summary {
        let inner = self.inner.lock();
        let quantile = |share| {
            let times = inner.times.as_ref();
            times.map_or(0, |times| times.value_at_quantile(share))
        };
        Summary {
            calls: inner.calls,
            errors: inner.errors,
            p50_us: quantile(0.5),
            p90_us: quantile(0.9),
            p99_us: quantile(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn quantiles_are_right_to_a_tenth(mut times in proptest::collection::vec(1u64..100_000_000, 1..200)) {
            let statistics = Statistics::default();
            for &time in &times {
                statistics.record(Code::Ok, Duration::from_micros(time));
            }
            times.sort_unstable();
            let summary = statistics.summary();
            prop_assert_eq!(summary.calls, times.len() as u64);
            for (share, found) in [(50, summary.p50_us), (90, summary.p90_us), (99, summary.p99_us)] {
                let rank = (times.len() * share).div_ceil(100).max(1);
                let exact = times[rank - 1];
                prop_assert!(found >= exact && found - exact <= exact / 10 + 1, "{found} for {exact}");
            }
        }
    }

    #[test]
    fn failures_are_counted_and_giving_up_is_none() {
        let statistics = Statistics::default();
        assert_eq!(statistics.summary(), Summary::default());
        for code in [
            Code::Ok,
            Code::Cancelled,
            Code::Internal,
            Code::DeadlineExceeded,
        ] {
            statistics.record(code, Duration::MAX);
        }
        let summary = statistics.summary();
        assert_eq!((summary.calls, summary.errors), (4, 2));
    }
}
