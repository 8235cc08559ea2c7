//! Rates as buckets that are compared before anything is taken from them.
//!
//! Invariant: a bucket that was asked and not replaced has not changed, so that several of them are
//! taken from together or not at all. `governor`, which the other rates use, takes when it is asked.

use std::time::Duration;

use tokio::time::Instant;

/// Why something goes too fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TooFast {
    /// The batch does not fit; a smaller one would.
    Batch,
    /// Not even one fits.
    One,
}

/// A rate, and how much of it passes at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quota {
    /// In which one comes back.
    each: Duration,
    /// In which an empty bucket is full again.
    whole: Duration,
}

impl Quota {
    /// Creates a rate with a burst of `burst_seconds`, at least `burst_min`.
    ///
    /// Returns `None` if `per_second` is 0, which means no limit.
    pub(super) fn new(per_second: u32, burst_seconds: u32, burst_min: usize) -> Option<Self> {
        let each = Duration::from_secs(1).checked_div(per_second)?;
        let burst_min = u32::try_from(burst_min).unwrap_or(u32::MAX);
        let burst = per_second.saturating_mul(burst_seconds).max(burst_min);
        Some(Self { each, whole: each.saturating_mul(burst) })
    }
}

/// What has been taken of a rate.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bucket {
    /// When everything has come back.
    full_at: Option<Instant>,
}

impl Bucket {
    /// The bucket after so many have been taken from it.
    ///
    /// # Errors
    /// [`TooFast`] if it does not have so many.
    pub(super) fn after(
        self,
        quota: Option<Quota>,
        count: usize,
        now: Instant,
    ) -> Result<Self, TooFast> {
        let Some(Quota { each, whole }) = quota.filter(|_| count > 0) else {
            return Ok(self);
        };
        let taken = self.full_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let all = each.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX));
        let after = taken.saturating_add(all);
        if after <= whole {
            Ok(Self { full_at: Some(now + after) })
        } else if taken.saturating_add(each) <= whole {
            Err(TooFast::Batch)
        } else {
            Err(TooFast::One)
        }
    }

    /// Whether everything has come back.
    pub(super) fn is_full(self, now: Instant) -> bool {
        self.full_at.is_none_or(|at| at <= now)
    }
}
