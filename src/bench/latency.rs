//! How long things took: a histogram of fixed size for the durations of many tasks.
//!
//! A percentile is at most 0.05 % from the true value, and the maximum is exact: the histogram
//! keeps three significant digits, in 1,024 buckets or more to each doubling of the value. Nothing
//! is sampled, and nothing allocates after the start.

use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;

/// The largest value that has a bucket of its own: 18 minutes in nanoseconds.
const NANOSECONDS_MAX: u64 = (1 << 40) - 1;
/// Decimal digits that a percentile keeps.
const DIGITS: u8 = 3;

/// A histogram of durations.
#[derive(Debug)]
pub(super) struct Latencies(Mutex<Recorded>);

/// The lock is never contended: the bench has one thread.
#[derive(Debug)]
struct Recorded {
    nanoseconds: Histogram<u64>,
    /// The largest value to the nanosecond, also one that has no bucket of its own.
    max: u64,
}

/// What a report shows of a histogram, in microseconds with one decimal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "bounds and digits are constants")]
        let nanoseconds =
            Histogram::new_with_max(NANOSECONDS_MAX, DIGITS).expect("1 < max, 3 <= 5");
        Self(Mutex::new(Recorded { nanoseconds, max: 0 }))
    }
}

impl Latencies {
    /// Records one duration.
    pub(super) fn record(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let mut recorded = self.0.lock();
        recorded.nanoseconds.saturating_record(nanoseconds);
        recorded.max = recorded.max.max(nanoseconds);
    }

    /// Returns percentiles of everything that was recorded; `None` if nothing was.
    pub(super) fn percentiles(&self) -> Option<Percentiles> {
        let recorded = self.0.lock();
        if recorded.nanoseconds.is_empty() {
            return None;
        }
        let of = |quantile| microseconds(recorded.quantile(quantile));
        let max = microseconds(recorded.max);
        Some(Percentiles { p50: of(0.5), p95: of(0.95), p99: of(0.99), max })
    }
}

impl Recorded {
    /// Returns the middle of the bucket that holds the smallest value with this part of all values
    /// at or below it.
    fn quantile(&self, quantile: f64) -> u64 {
        let end_of_bucket = self.nanoseconds.value_at_quantile(quantile);
        self.nanoseconds.median_equivalent(end_of_bucket).min(self.max)
    }
}

/// Nanoseconds as microseconds with one decimal.
fn microseconds(nanoseconds: u64) -> f64 {
    ((nanoseconds + 50) / 100) as f64 / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= expected * 0.01 + 0.05
    }

    /// As what this value is told where it is not the largest.
    fn told_as(histogram: &Histogram<u64>, value: u64) -> u64 {
        histogram.median_equivalent(value)
    }

    fn empty() -> Histogram<u64> {
        Latencies::default().0.into_inner().nanoseconds
    }

    #[test]
    fn buckets_are_in_order_without_a_gap() {
        let histogram = empty();
        let mut last = 0;
        for value in (0..5_000).chain((5_000..NANOSECONDS_MAX).step_by(777_777_777)) {
            let told = told_as(&histogram, value);
            assert!(told >= last, "{value} is told as {told}, after {last}");
            let width = histogram.equivalent_range(value);
            assert!(value > 5_000 || told - last <= width, "a gap before {value}");
            last = told;
        }
        assert_eq!(histogram.high(), NANOSECONDS_MAX);
    }

    #[test]
    fn the_middle_of_a_bucket_is_within_half_a_percent() {
        let histogram = empty();
        for value in (1..100_000).chain((1..NANOSECONDS_MAX).step_by(333_333_333)) {
            let told = told_as(&histogram, value);
            assert!(told.abs_diff(value) * 2_000 <= value, "{value} is told as {told}");
        }
    }

    #[test]
    fn percentiles_of_a_thousand_even_steps() {
        let latencies = Latencies::default();
        for step in 1..=1_000 {
            latencies.record(Duration::from_micros(step * 10));
        }
        let found = latencies.percentiles().unwrap();
        assert!(near(found.p50, 5_000.0), "{found:?}");
        assert!(near(found.p95, 9_500.0), "{found:?}");
        assert!(near(found.p99, 9_900.0), "{found:?}");
        assert_eq!(found.max, 10_000.0);
    }

    #[test]
    fn a_percentile_never_exceeds_the_maximum() {
        let latencies = Latencies::default();
        latencies.record(Duration::from_nanos(1_000_100));
        let found = latencies.percentiles().unwrap();
        assert_eq!([found.p50, found.p99, found.max], [1_000.1; 3]);
    }

    #[test]
    fn a_rare_outlier_moves_only_the_maximum() {
        let latencies = Latencies::default();
        for _ in 0..999 {
            latencies.record(Duration::from_micros(100));
        }
        latencies.record(Duration::from_secs(7_200));
        let found = latencies.percentiles().unwrap();
        assert!(near(found.p99, 100.0), "{found:?}");
        assert_eq!(found.max, 7_200_000_000.0);
    }

    #[test]
    fn without_values_there_are_no_percentiles() {
        assert_eq!(Latencies::default().percentiles(), None);
    }
}
