//! Clients that may be deaf, and what came of telling them to join again.

use crate::telemetry::metrics::{Counter, Gauge, Registry};

/// The room's metrics.
#[derive(Debug)]
pub(super) struct Metrics {
    pub(super) deaf_suspects: Gauge,
    pub(super) heals_sent: Counter,
    pub(super) healed: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            deaf_suspects: registry.gauge("deaf_suspects", "Open sockets that may be deaf."),
            heals_sent: registry
                .counter("heals_sent_total", "Topics that suspects were told to join."),
            healed: registry
                .counter("healed_total", "Topics that suspects joined after being told."),
        }
    }
}
