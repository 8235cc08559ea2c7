//! What fan-outs come to, and how much waits for clients.

use std::time::Duration;

use super::held::OutboxBounds;
use crate::telemetry::metrics::{Counter, CounterBy, Gauge, Histogram, Registry, count};

/// Receivers of one fan-out.
const RECEIVERS_BUCKETS: [f64; 11] =
    [0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0];

/// Where a broadcast comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum BroadcastSource {
    /// A client, over its socket.
    Socket,
    /// A client, over REST.
    Rest,
    /// A notification.
    Database,
    /// A feed: one invalidation for one or more.
    Merged,
}

/// The room's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    broadcasts: CounterBy<BroadcastSource>,
    deliveries: Counter,
    fanout_seconds: Histogram,
    fanout_receivers: Histogram,
    topics: Gauge,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            broadcasts: registry.counter_by(
                "broadcasts_total",
                ["source"],
                "Broadcasts, by source.",
            ),
            deliveries: registry
                .counter("deliveries_total", "Frames put into outboxes by fan-outs."),
            fanout_seconds: registry
                .latency("fanout_seconds", "One fan-out, from encoding to the last push."),
            fanout_receivers: registry.histogram(
                "fanout_receivers",
                "Sockets that one fan-out reaches.",
                &RECEIVERS_BUCKETS,
            ),
            topics: registry.gauge("topics", "Topics with at least one subscriber."),
        }
    }

    /// Counts broadcasts that were fanned out together and took `duration`.
    pub(super) fn count(
        &self,
        source: BroadcastSource,
        broadcasts: usize,
        subscribers: usize,
        deliveries: usize,
        duration: Duration,
    ) {
        self.fanout_seconds.observe(duration.as_secs_f64());
        self.broadcasts.of(source).inc_by(broadcasts as u64);
        self.deliveries.inc_by(deliveries as u64);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 subscribers")]
        self.fanout_receivers.observe(subscribers as f64);
    }

    /// Shows what is looked at only when somebody asks.
    pub(super) fn show(&self, topics: usize) {
        self.topics.set(count(topics));
    }
}

/// The metrics of sockets' outboxes.
#[derive(Debug)]
pub(super) struct OutboxMetrics {
    high_water: Gauge,
    held: Gauge,
}

impl OutboxMetrics {
    /// Registers the metrics, and shows the bounds that were set.
    pub(super) fn new(registry: &Registry, connections_max: usize, bounds: &OutboxBounds) -> Self {
        let bound = registry
            .gauge("outbox_max_bytes", "The largest backlog of a socket: limits.outbox_bytes_max.");
        bound.set(count(bounds.bytes_max()));
        let bound = registry.gauge(
            "outboxes_max_bytes",
            "What all outboxes may hold together: limits.outboxes_bytes_max.",
        );
        bound.set(count(bounds.all_bytes_max()));
        let bound = registry
            .gauge("connections_max", "Sockets that may be open at once: limits.connections_max.");
        bound.set(count(connections_max));
        Self {
            high_water: registry.gauge(
                "outbox_high_water_bytes",
                "The largest backlog of one socket within the last minute or two.",
            ),
            held: registry.gauge(
                "outboxes_bytes",
                "What all outboxes hold; a message that many sockets wait for counts once.",
            ),
        }
    }

    /// Sets the gauges.
    pub(super) fn show(&self, bounds: &OutboxBounds) {
        self.held.set(count(bounds.held()));
        self.high_water.set(count(bounds.highest()));
    }
}
