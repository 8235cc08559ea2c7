//! Rates of governor on the runtime's clock.

use std::{num::NonZeroU32, time::Duration};

use governor::{Quota, RateLimiter};

use crate::clock::{Limiter, TokioClock};

/// Burst of an address or a socket, in seconds of its rate.
pub(super) const BURST_SECONDS: u32 = 10;
/// Burst of the project's joins and broadcasts, in seconds of its rate; the reference server averages over the same
/// time.
pub(super) const PROJECT_BURST_SECONDS: u32 = 60;
/// Between two sweeps. By then every burst has come back, so that a sweep forgets nothing that
/// counts.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Creates a limiter of `per_second` with a burst of `burst_seconds`, at least `burst_min`.
///
/// Returns `None` if `per_second` is 0, which means no limit.
pub(super) fn limiter(per_second: u32, burst_seconds: u32, burst_min: usize) -> Option<Limiter> {
    let rate = NonZeroU32::new(per_second)?;
    let burst_min = u32::try_from(burst_min).unwrap_or(u32::MAX);
    let burst = per_second.saturating_mul(burst_seconds).max(burst_min);
    let quota = Quota::per_second(rate).allow_burst(NonZeroU32::new(burst).unwrap_or(rate));
    Some(RateLimiter::direct_with_clock(quota, TokioClock))
}
