//! The database's clock and this machine's: how far they are apart, and how long ago by the one a
//! message was stamped by the other.
//!
//! The stamp is a payload's `timestamp`, in seconds since 1970. Our triggers take it from
//! `clock_timestamp()` when a row is written, so that it is earlier than the commit by what the rest
//! of the transaction takes; triggers of other systems take `NOW()`, which is when the transaction
//! began. So the time since then is that of the commit at most, and what a viewer waits for.
//!
//! Invariant: a stamp that cannot be right is not measured, and no measurement is negative.

use std::{collections::VecDeque, time::Duration};

use serde::Deserialize;

/// Most samples that count: with the heartbeats' default interval those of 40 seconds.
const SAMPLES_MAX: usize = 8;
/// An older stamp is the time of something else.
const AGE_MAX: f64 = 3_600.0;
/// A stamp further ahead is, too; one less far ahead is by a clock that nobody has compared yet.
const AHEAD_MAX: f64 = 60.0;

/// The samples of the database's clock of one session.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    samples: VecDeque<ClockSample>,
}

#[derive(Debug, Clone, Copy)]
struct ClockSample {
    took: Duration,
    offset: f64,
}

impl Clocks {
    /// Takes a sample: the database was asked for its time and answered `theirs`, which took `took`
    /// and ended at `ours`, both in seconds since 1970. Returns the database's clock less the
    /// gateway's by the quickest of the last samples, each of which is wrong by at most half of what
    /// it took.
    pub(super) fn compare(&mut self, theirs: f64, ours: f64, took: Duration) -> f64 {
        if self.samples.len() >= SAMPLES_MAX {
            self.samples.pop_front();
        }
        let offset = theirs - (ours - took.as_secs_f64() / 2.0);
        self.samples.push_back(ClockSample { took, offset });
        self.samples.iter().min_by_key(|sample| sample.took).map_or(offset, |sample| sample.offset)
    }
}

/// Returns how long before `received`, by the gateway's clock, a payload was stamped by the
/// database's, which is ahead by `offset`; `None` if it has no stamp that can be believed.
pub(super) fn age(payload: &str, received: f64, offset: f64) -> Option<Duration> {
    #[derive(Deserialize)]
    struct Stamped {
        timestamp: f64,
    }
    let Stamped { timestamp } = serde_json::from_str(payload).ok()?;
    let age = received + offset - timestamp;
    let is_believable = (-AHEAD_MAX..=AGE_MAX).contains(&age);
    is_believable.then(|| Duration::from_secs_f64(age.max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: f64 = 1_790_000_000.0;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn is_about(seconds: f64, expected: f64) {
        assert!((seconds - expected).abs() < 1e-6, "{seconds} and not {expected}");
    }

    #[test]
    fn the_database_is_taken_to_have_looked_at_its_clock_half_way() {
        for offset in [-3.5, 0.0, 0.000_25, 7.0] {
            let mut clocks = Clocks::default();
            // Asked at `NOW`, looked at 2 ms later, heard of after 4 ms.
            is_about(clocks.compare(NOW + 0.002 + offset, NOW + 0.004, millis(4)), offset);
        }
    }

    #[test]
    fn of_the_last_looks_the_quickest_counts() {
        let mut clocks = Clocks::default();
        // The answer was held up: as if the database were behind.
        is_about(clocks.compare(NOW, NOW + 1.0, millis(1_000)), -0.5);
        is_about(clocks.compare(NOW + 2.0, NOW + 2.0, millis(2)), 0.001);
        for _ in 1..SAMPLES_MAX {
            is_about(clocks.compare(NOW, NOW + 1.0, millis(1_000)), 0.001);
        }
        is_about(clocks.compare(NOW, NOW + 1.0, millis(1_000)), -0.5);
    }

    #[test]
    fn a_stamp_is_as_old_as_the_two_clocks_say() {
        let age = |payload: &str, offset| age(payload, NOW, offset).map(|age| age.as_secs_f64());
        is_about(age(r#"{"timestamp":1789999999.75}"#, 0.0).unwrap(), 0.25);
        // The database is five seconds ahead, and then behind.
        is_about(age(r#"{"a":[],"timestamp":1790000004.75}"#, 5.0).unwrap(), 0.25);
        is_about(age(r#"{"timestamp":1789999994.75}"#, -5.0).unwrap(), 0.25);
        is_about(age(r#"{"timestamp":1790000000}"#, 0.0).unwrap(), 0.0);
    }

    #[test]
    fn what_seems_to_come_from_the_future_has_taken_no_time() {
        assert_eq!(age(r#"{"timestamp":1790000000.001}"#, NOW, 0.0), Some(Duration::ZERO));
        assert_eq!(age(r#"{"timestamp":1790000060}"#, NOW, 0.0), Some(Duration::ZERO));
    }

    #[test]
    fn a_payload_without_a_believable_stamp_has_no_age() {
        for payload in [
            "{}",
            "[]",
            "",
            r#"{"timestamp":null}"#,
            r#"{"timestamp":"1790000000"}"#,
            // Milliseconds, as pages write them.
            r#"{"timestamp":1790000000000}"#,
            r#"{"timestamp":1e999}"#,
            r#"{"timestamp":-1790000000}"#,
            r#"{"timestamp":0}"#,
            r#"{"timestamp":1790000061}"#,
            r#"{"timestamp":1789996399}"#,
        ] {
            assert_eq!(age(payload, NOW, 0.0), None, "{payload}");
        }
        let offset = f64::NAN;
        assert_eq!(age(r#"{"timestamp":1790000000}"#, NOW, offset), None);
    }
}
