//! Metrics of the database, which the survey updates.

use crate::{
    db::deployed::TRIGGERS,
    telemetry::metrics::{Counter, CounterBy, Gauge, GaugeOpen, Label, NumberGauge, Registry},
};

/// Label of the messages in the history that an operator's invalidation has caused.
const MANUAL: &str = "manual";
/// Label of the messages in the history that other programs have written.
const OTHER: &str = "other";

/// What is measured of the database.
#[derive(Debug)]
pub struct Metrics {
    /// 1 where a trigger covers an operation on a table, 0 where it is missing. A table that does
    /// not exist has no series.
    pub triggers: GaugeOpen,
    /// 1 where a function is missing or differs from this version's, 0 where it is the same.
    pub drift: GaugeOpen,
    /// Migrations of this version that the database lacks.
    pub(crate) migrations_pending: Gauge,
    /// Rows written since the gateway has started, as counted by Postgres.
    pub(crate) writes: CounterBy<WrittenTable>,
    /// Rows added to the history since the gateway has started.
    pub(crate) history_rows: CounterBy<HistorySource>,
    /// Failures that triggers have recorded since the gateway has started.
    pub(crate) trigger_failures: Counter,
    /// Usage of the notification queue, from 0 to 1.
    pub(crate) notify_queue: NumberGauge,
    /// Time of the oldest message in the history, seconds since 1970; 0 if there is none.
    pub(crate) history_oldest: NumberGauge,
    /// Time of the last successful survey, seconds since 1970; 0 before the first.
    pub(crate) last_look: NumberGauge,
    /// Surveys that failed.
    pub(crate) look_failures: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            triggers: registry.gauge_open(
                "database_trigger_present",
                ["table", "operation"],
                "1 where a trigger tells of the operation on the table, 0 where it is missing.",
            ),
            drift: registry.gauge_open(
                "database_function_drift",
                ["function"],
                "1 where the database's function is missing or not this version's.",
            ),
            migrations_pending: registry.gauge(
                "database_migrations_pending",
                "Migrations of this version that the database lacks.",
            ),
            writes: registry.counter_by(
                "database_writes_total",
                ["table"],
                "Rows written to a table, as Postgres counts them.",
            ),
            history_rows: registry.counter_by(
                "database_history_rows_total",
                ["table"],
                "Messages in the history, by the table that caused them.",
            ),
            trigger_failures: registry.counter(
                "database_trigger_failures_total",
                "Failures that triggers have recorded.",
            ),
            notify_queue: registry.number(
                "database_notify_queue_ratio",
                "How full the server's queue of notifications is, from 0 to 1.",
            ),
            history_oldest: registry.number(
                "database_history_oldest_timestamp_seconds",
                "When the oldest message in the history was written; 0 if there is none.",
            ),
            last_look: registry.number(
                "database_last_look_timestamp_seconds",
                "When triggers, functions, tables and queue were last looked at; 0 if never.",
            ),
            look_failures: registry
                .counter("database_look_failures_total", "Looks at the database that failed."),
        }
    }
}

/// Name of a table of [`TRIGGERS`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrittenTable(pub(crate) &'static str);

impl Label for WrittenTable {
    fn all() -> impl Iterator<Item = [&'static str; 1]> {
        TRIGGERS.iter().map(|trigger| [trigger.table])
    }

    fn values(&self) -> [&'static str; 1] {
        [self.0]
    }
}

/// Origin of a row in the history: a table of [`TRIGGERS`], `manual` or `other`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HistorySource(&'static str);

impl HistorySource {
    /// Returns the origin of a row with this `table_name`.
    pub(crate) fn of(table: Option<&str>) -> Self {
        let mut known = Self::all().map(|[label]| label);
        Self(known.find(|label| Some(*label) == table).unwrap_or(OTHER))
    }
}

impl Label for HistorySource {
    fn all() -> impl Iterator<Item = [&'static str; 1]> {
        WrittenTable::all().chain([[MANUAL], [OTHER]])
    }

    fn values(&self) -> [&'static str; 1] {
        [self.0]
    }
}
