//! How long things took: a histogram of fixed size that many tasks fill at once.
//!
//! Buckets grow with their values: 128 to each doubling, so that a percentile is at most 0.4 %
//! from the true value. Nothing is sampled, and nothing allocates after the start.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use serde::Serialize;

/// Buckets to each doubling of the value, a power of two.
const BUCKETS_PER_DOUBLING: u64 = 128;
/// `BUCKETS_PER_DOUBLING` is two to this power.
const BUCKET_BITS: u32 = BUCKETS_PER_DOUBLING.ilog2();
/// The largest value that has a bucket of its own: 18 minutes in nanoseconds.
const NANOSECONDS_MAX: u64 = (1 << 40) - 1;
const BUCKET_COUNT: usize = bucket_of(NANOSECONDS_MAX) + 1;

/// A histogram of durations.
#[derive(Debug)]
pub(super) struct Latencies {
    buckets: Vec<AtomicU64>,
    max: AtomicU64,
}

/// What is told of a histogram, in microseconds with one decimal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: (0..BUCKET_COUNT).map(|_| AtomicU64::new(0)).collect(), max: 0.into() }
    }
}

impl Latencies {
    /// Counts one duration.
    pub(super) fn record(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket_of(nanoseconds.min(NANOSECONDS_MAX));
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Relaxed);
        }
        self.max.fetch_max(nanoseconds, Relaxed);
    }

    /// Percentiles of all that was recorded; `None` when nothing was.
    pub(super) fn percentiles(&self) -> Option<Percentiles> {
        let count: u64 = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum();
        if count == 0 {
            return None;
        }
        let max = self.max.load(Relaxed);
        let of = |percent| microseconds(self.percentile(percent, count).min(max));
        Some(Percentiles { p50: of(50), p95: of(95), p99: of(99), max: microseconds(max) })
    }

    /// The middle of the bucket that holds the smallest value with `percent` of `count` values
    /// at or below it.
    fn percentile(&self, percent: u64, count: u64) -> u64 {
        let rank = (count * percent).div_ceil(100);
        let mut seen = 0;
        for (index, bucket) in (0..).zip(&self.buckets) {
            seen += bucket.load(Relaxed);
            if seen >= rank {
                return middle_of(index);
            }
        }
        NANOSECONDS_MAX
    }
}

/// Nanoseconds as microseconds with one decimal.
fn microseconds(nanoseconds: u64) -> f64 {
    ((nanoseconds + 50) / 100) as f64 / 10.0
}

/// The bucket of a value: its leading eight bits and how far they are shifted.
#[expect(clippy::cast_possible_truncation, reason = "the largest value is in bucket 4,351")]
const fn bucket_of(value: u64) -> usize {
    if value < BUCKETS_PER_DOUBLING {
        return value as usize;
    }
    let shift = value.ilog2() - BUCKET_BITS;
    (shift as u64 * BUCKETS_PER_DOUBLING + (value >> shift)) as usize
}

/// The value in the middle of a bucket.
const fn middle_of(bucket: u64) -> u64 {
    if bucket < 2 * BUCKETS_PER_DOUBLING {
        return bucket;
    }
    let shift = bucket / BUCKETS_PER_DOUBLING - 1;
    let low = (bucket - shift * BUCKETS_PER_DOUBLING) << shift;
    low + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= expected * 0.01 + 0.05
    }

    #[test]
    fn buckets_are_in_order_without_a_gap() {
        let mut last = 0;
        for value in (0..5_000).chain((5_000..NANOSECONDS_MAX).step_by(777_777_777)) {
            let bucket = bucket_of(value);
            assert!(bucket >= last, "{value} is in {bucket}, after {last}");
            assert!(value > 5_000 || bucket - last <= 1, "a gap before {value}");
            last = bucket;
        }
        assert_eq!(BUCKET_COUNT, 4_352);
    }

    #[test]
    fn the_middle_of_a_bucket_is_within_half_a_percent() {
        for value in (1..100_000).chain((1..NANOSECONDS_MAX).step_by(333_333_333)) {
            let middle = middle_of(bucket_of(value) as u64);
            assert!(middle.abs_diff(value) * 200 <= value, "{value} is told as {middle}");
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
