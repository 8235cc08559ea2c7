//! What is looked at only at the scrape: events, the busiest of them, the pool and the runtime.

use std::time::Duration;

use strum::VariantArray;

use crate::{
    invalidation::Tally,
    telemetry::metrics::{
        CounterOpen, Gauge, GaugeBy, GaugeOpen, NumberOpen, Registry, SecondsCounter, count,
    },
};

/// The label of the events that have no series of their own.
pub(super) const OTHER_EVENTS: &str = "other";

/// What a session of the pool does.
#[derive(Debug, Clone, Copy, VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
enum PoolSession {
    Idle,
    Used,
}

/// The room's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Events that are live.
    pub(super) events_live: Gauge,
    /// Events that are muted.
    pub(super) events_muted: Gauge,
    /// Events with viewers that nothing was ever published for and the database does not know.
    pub(super) events_never_published: Gauge,
    /// Invalidations that wait for their window.
    pub(super) invalidations_pending: Gauge,
    /// Viewers of each of the busiest events, and of all others.
    event_viewers: GaugeOpen,
    /// Invalidations that came for each.
    event_notifications: CounterOpen,
    /// Frames of invalidations to whole events.
    event_deliveries: CounterOpen,
    /// Invalidations of each that left as part of another.
    event_merged: CounterOpen,
    /// When one last came for each of the busiest, seconds since 1970.
    event_last_notification: NumberOpen,
    /// Sessions of the pool.
    pool: GaugeBy<PoolSession>,
    /// Sessions that the pool may have.
    pub(crate) pool_max: Gauge,
    /// Threads that run tasks.
    tokio_workers: Gauge,
    /// Tasks that have not ended.
    tokio_tasks: Gauge,
    /// Tasks that are ready and that no worker has taken yet.
    tokio_global_queue: Gauge,
    /// Time that all workers were busy.
    tokio_busy: SecondsCounter,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        let metrics = Self {
            events_live: registry
                .gauge("events_live", "Events that somebody has joined, or that are listened to."),
            events_muted: registry.gauge("events_muted", "Events that are muted."),
            events_never_published: registry.gauge(
                "events_never_published",
                "Events with viewers that nothing was ever published for.",
            ),
            invalidations_pending: registry
                .gauge("invalidations_pending", "Invalidations that wait for their window."),
            event_viewers: registry.gauge_open(
                "event_viewers",
                ["eid"],
                "Channels of an event, of the busiest ones and of all others.",
            ),
            event_notifications: registry.counter_open(
                "event_notifications_total",
                ["eid"],
                "Invalidations that came for an event, from wherever.",
            ),
            event_deliveries: registry.counter_open(
                "event_deliveries_total",
                ["eid"],
                "Frames put into outboxes by invalidations of a whole event.",
            ),
            event_merged: registry.counter_open(
                "event_merged_total",
                ["eid"],
                "Invalidations of an event that left as part of another.",
            ),
            event_last_notification: registry.number_open(
                "event_last_notification_timestamp_seconds",
                "eid",
                "When an invalidation last came for one of the busiest events; 0 if never.",
            ),
            pool: registry.gauge_by(
                "database_pool_connections",
                ["state"],
                "Sessions of the pool, by state.",
            ),
            pool_max: registry.gauge("database_pool_max", "Sessions that the pool may have."),
            tokio_workers: registry.gauge("tokio_workers", "Threads that run tasks."),
            tokio_tasks: registry.gauge("tokio_tasks", "Tasks that have not ended."),
            tokio_global_queue: registry.gauge(
                "tokio_global_queue_tasks",
                "Tasks that are ready and that no worker has taken yet.",
            ),
            tokio_busy: registry.seconds_counter(
                "tokio_busy_seconds_total",
                "Time that workers were busy, of all of them.",
            ),
        };
        metrics.count_event(OTHER_EVENTS, Tally::default());
        metrics.show_viewers(OTHER_EVENTS, 0);
        metrics
    }

    /// Counts what has come for an event, or for [`OTHER_EVENTS`], and what has become of it.
    pub(super) fn count_event(&self, eid: &str, tally: Tally) {
        self.event_notifications.with_label_values(&[eid]).inc_by(tally.notifications);
        self.event_deliveries.with_label_values(&[eid]).inc_by(tally.deliveries);
        self.event_merged.with_label_values(&[eid]).inc_by(tally.merged);
    }

    /// Shows one of the busiest events, if it was not shown before with counters at zero.
    pub(super) fn show_event(&self, eid: &str, viewers: usize, last_notification: f64) {
        self.count_event(eid, Tally::default());
        self.show_viewers(eid, viewers);
        self.event_last_notification.with_label_values(&[eid]).set(last_notification);
    }

    /// Shows how many viewers an event, or [`OTHER_EVENTS`], has.
    pub(super) fn show_viewers(&self, eid: &str, viewers: usize) {
        self.event_viewers.with_label_values(&[eid]).set(count(viewers));
    }

    /// Removes an event's series.
    pub(super) fn forget_event(&self, eid: &str) {
        // It fails for what is not shown.
        let _ = self.event_viewers.remove_label_values(&[eid]);
        let _ = self.event_last_notification.remove_label_values(&[eid]);
        for counter in [&self.event_notifications, &self.event_deliveries, &self.event_merged] {
            let _ = counter.remove_label_values(&[eid]);
        }
    }

    /// Shows the pool's sessions, `idle` of `size` idle.
    pub(super) fn show_pool(&self, size: u32, idle: usize) {
        let idle = count(idle);
        self.pool.of(PoolSession::Idle).set(idle);
        // The two are read one after the other.
        self.pool.of(PoolSession::Used).set((i64::from(size) - idle).max(0));
    }

    /// Shows what the runtime reports of itself; `busy` is what all workers were busy since it
    /// began.
    pub(super) fn show_runtime(&self, workers: usize, tasks: usize, queued: usize, busy: Duration) {
        self.tokio_workers.set(count(workers));
        self.tokio_tasks.set(count(tasks));
        self.tokio_global_queue.set(count(queued));
        self.tokio_busy.inc_by((busy.as_secs_f64() - self.tokio_busy.get()).max(0.0));
    }
}
