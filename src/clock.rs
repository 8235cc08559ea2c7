//! The time: seconds since 1970, the runtime's clock for rates, durations as people write them,
//! waits after failures, and what tells that a file has changed.
//!
//! Invariant: deadlines and rates are by the runtime's clock, which tests can pause; only what is
//! shown, stored or compared with a token is by the system's.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use governor::clock::Clock;
use serde::{Deserialize, Deserializer, de};
use tokio::time::Instant;

/// Whole seconds since 1970.
#[must_use]
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Seconds since 1970 with their fraction, as timestamps of metrics are.
pub(crate) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Reads a duration as people write it: `3s`, `500ms`.
///
/// # Errors
/// The deserializer's, for a text that is no duration.
pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map_err(|_no_more_to_tell| de::Error::custom("expected a duration such as 500ms, 3s, 10m"))
}

/// The runtime's clock for `governor`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TokioClock;

impl Clock for TokioClock {
    type Instant = std::time::Instant;

    fn now(&self) -> Self::Instant {
        Instant::now().into_std()
    }
}

/// One rate on the runtime's clock.
pub(crate) type Limiter = governor::RateLimiter<
    governor::state::NotKeyed,
    governor::state::InMemoryState,
    TokioClock,
    governor::middleware::NoOpMiddleware<std::time::Instant>,
>;

/// Waits after failures: each twice as long as the one before, up to a bound.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    next: Duration,
}

impl Backoff {
    /// Begins with `first`.
    pub(crate) fn new(first: Duration) -> Self {
        Self { first, next: first }
    }

    /// Returns the next wait, `max` at most.
    pub(crate) fn next(&mut self, max: Duration) -> Duration {
        let wait = self.next.min(max);
        self.next = (self.next * 2).min(max);
        wait
    }

    /// Begins again, after a success.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// What tells a file from the one that was there before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileStamp {
    modified: (i64, i64),
    bytes: u64,
    inode: u64,
}

impl FileStamp {
    /// The stamp of the file at `path`; `None` while there is none that can be looked at.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().as_ref().map(Self::from)
    }
}

impl From<&Metadata> for FileStamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            bytes: metadata.len(),
            inode: metadata.ino(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_doubles_up_to_its_bound_and_begins_again() {
        let (second, max) = (Duration::from_secs(1), Duration::from_secs(3));
        let mut backoff = Backoff::new(second);
        let waits: Vec<_> = (0..4).map(|_| backoff.next(max).as_secs()).collect();
        assert_eq!(waits, [1, 2, 3, 3]);
        backoff.reset();
        assert_eq!(backoff.next(max), second);
    }

    #[test]
    fn a_file_that_is_replaced_has_another_stamp() {
        let file = std::env::temp_dir().join(format!("tidegate-{}", uuid::Uuid::new_v4()));
        assert_eq!(FileStamp::of(&file), None);
        fs::write(&file, "a").unwrap();
        let first = FileStamp::of(&file);
        assert_eq!(first, FileStamp::of(&file));
        fs::write(&file, "bc").unwrap();
        assert_ne!(first, FileStamp::of(&file));
        fs::remove_file(&file).unwrap();
    }
}
