//! What feeds send, and what it is made from.

use super::{
    payload::BadEndpoint,
    reason::{CatchUpCause, Coverage, SendReason},
};
use crate::telemetry::metrics::{Counter, CounterBy, Histogram, Registry};

/// Waits for a window, three seconds unless set: finer around that.
const WINDOW_BUCKETS: [f64; 15] =
    [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.25, 3.5, 4.0, 5.0, 10.0];

/// The room's metrics.
#[derive(Debug)]
pub(super) struct Metrics {
    pub(super) sent: CounterBy<SendReason>,
    pub(super) merged: Counter,
    pub(super) window_wait: Histogram,
    pub(super) endpoints_dropped: CounterBy<BadEndpoint>,
    pub(super) catch_ups: CounterBy<(CatchUpCause, Coverage), 2>,
}

impl Metrics {
    /// Registers the metrics.
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            sent: registry.counter_by(
                "invalidations_sent_total",
                ["reason"],
                "Invalidations sent to events and to single clients, by reason.",
            ),
            merged: registry.counter(
                "invalidations_merged_total",
                "Invalidations that left as part of another.",
            ),
            window_wait: registry.histogram(
                "window_wait_seconds",
                "How long a window has made a union wait, from its first invalidation to its departure.",
                &WINDOW_BUCKETS,
            ),
            endpoints_dropped: registry.counter_by(
                "endpoints_dropped_total",
                ["reason"],
                "Elements of invalidations' lists that are no endpoints, by reason.",
            ),
            catch_ups: registry.counter_by(
                "catch_ups_total",
                ["cause", "method"],
                "Catch-ups of events and of single clients, by cause and method.",
            ),
        }
    }
}
