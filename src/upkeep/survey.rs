//! Surveys the database: are triggers and functions in place, what is written, and which of it is
//! recorded in the history?
//!
//! Invariants: a survey uses the pool and has a deadline. Counters continue only from a baseline of
//! the same run of the same server that is younger than [`BASELINE_AGE_MAX`], so that none goes back
//! or jumps when a server was away, was restored, or has reset its statistics. The log names missing
//! objects once, and again when the set changes.

use std::{error::Error, sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::metrics::{HistorySource, Metrics, WrittenTable};
use crate::{
    db::{
        Pool,
        catalog::{self, Recorded},
        deployed::{Deployed, Migrations, TRIGGERS, Table},
    },
    telemetry::metrics::{count, set_now},
};

/// A baseline that is older is not compared with.
const BASELINE_AGE_MAX: Duration = Duration::from_secs(300);

/// The task that surveys the database at an interval.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) pool: Pool,
    pub(crate) metrics: Arc<Metrics>,
    /// Time between two surveys.
    pub(crate) interval: Duration,
    /// For one survey.
    pub(crate) timeout: Duration,
}

/// What a survey compares with.
#[derive(Default)]
struct State {
    baseline: Option<Baseline>,
    /// The missing triggers, functions and migrations that were logged last.
    logged: Option<[String; 3]>,
    /// Whether the last survey failed.
    has_failed: bool,
}

/// The counts of one survey, from which the next continues.
struct Baseline {
    /// Identifies the run of the server.
    run: String,
    at: Instant,
    tables: Vec<Table>,
    /// Snapshot in which the rows of triggers were counted, in the text form of `pg_snapshot`;
    /// `None` if there is no history.
    recorded: Option<String>,
}

impl Baseline {
    /// Whether counts of this run of the server continue from here.
    fn is_comparable(&self, run: &str) -> bool {
        self.run == run && self.at.elapsed() < BASELINE_AGE_MAX
    }
}

impl Survey {
    /// Surveys until the server stops.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let rounds = async {
            let mut ticks = interval(self.interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut state = State::default();
            loop {
                ticks.tick().await;
                self.round(&mut state).await;
            }
        };
        stop.run_until_cancelled(rounds).await;
    }

    /// Surveys once, and logs a failure: the first as a warning, those that follow it at debug.
    async fn round(&self, state: &mut State) {
        let failure: Box<dyn Error> = match timeout(self.timeout, self.survey(state)).await {
            Ok(Ok(())) => {
                set_now(&self.metrics.last_look);
                state.has_failed = false;
                return;
            }
            Ok(Err(error)) => error.into(),
            Err(elapsed) => elapsed.into(),
        };
        self.metrics.look_failures.inc();
        if state.has_failed {
            tracing::debug!(error = &*failure, "the database cannot be looked at");
        } else {
            tracing::warn!(error = &*failure, "the database cannot be looked at");
        }
        state.has_failed = true;
    }

    async fn survey(&self, state: &mut State) -> Result<(), sqlx::Error> {
        let metrics = &*self.metrics;
        let mut session = catalog::begin_reading(&self.pool, self.timeout).await?;
        let deployed = Deployed::read(&mut session).await?;
        let server = catalog::server_state(&mut session).await?;
        show(metrics, &deployed);
        state.log(&deployed);
        metrics.notify_queue.set(server.notify_queue);

        let before = state.baseline.as_ref();
        let before = before.filter(|baseline| baseline.is_comparable(&server.run));
        // After the statistics, which lag behind: the rows that they count are recorded by now.
        let since = before.and_then(|baseline| baseline.recorded.as_deref());
        let recorded = match catalog::recorded(&mut session, since).await {
            Err(sqlx::Error::Database(error)) if is_absent(&*error) => None,
            recorded => Some(recorded?),
        };
        session.rollback().await?;
        if let Some(recorded) = &recorded {
            count_recorded(metrics, recorded);
        }
        let oldest = recorded.as_ref().and_then(|recorded| recorded.oldest);
        metrics.history_oldest.set(oldest.unwrap_or_default());
        if let Some(before) = before {
            count_writes(metrics, &before.tables, &deployed.tables);
        }
        state.baseline = Some(Baseline {
            run: server.run,
            at: Instant::now(),
            tables: deployed.tables,
            recorded: recorded.map(|recorded| recorded.seen),
        });
        Ok(())
    }
}

impl State {
    /// Logs which objects are missing, unless the same were logged last.
    fn log(&mut self, deployed: &Deployed) {
        let triggers = deployed.missing_triggers();
        let triggers = triggers.map(|(table, operation)| format!("{table} {}", operation.label()));
        let functions = if deployed.drifted().count() == deployed.functions.len() {
            "all".to_owned()
        } else {
            let functions = deployed.drifted().map(|(name, drift)| format!("{name} ({drift})"));
            functions.collect::<Vec<_>>().join(", ")
        };
        let (migrations, is_newer) = match &deployed.migrations {
            Migrations::Known { pending, is_newer } => {
                let pending: Vec<_> = pending.iter().map(ToString::to_string).collect();
                (pending.join(", "), *is_newer)
            }
            Migrations::Unreadable => ("cannot be read".to_owned(), false),
        };
        let missing = [triggers.collect::<Vec<_>>().join(", "), functions, migrations];
        if self.logged.as_ref() == Some(&missing) {
            return;
        }
        let [triggers, functions, migrations] = &missing;
        if missing.iter().all(String::is_empty) {
            let tables = deployed.tables.len();
            tracing::info!(tables, "the database has every trigger, function and migration");
        } else if is_newer {
            tracing::warn!(
                triggers,
                functions,
                migrations,
                "a newer version has migrated the database: these are not as this one knows them"
            );
        } else {
            tracing::warn!(
                triggers,
                functions,
                migrations,
                "missing in the database, or not this version's: run `tidegate migrate`"
            );
        }
        self.logged = Some(missing);
    }
}

/// Whether a table or the schema does not exist, which is as good as an empty table.
fn is_absent(error: &dyn sqlx::error::DatabaseError) -> bool {
    matches!(error.code().as_deref(), Some("42P01" | "3F000"))
}

/// Shows which triggers, functions and migrations are missing.
fn show(metrics: &Metrics, deployed: &Deployed) {
    for trigger in TRIGGERS {
        let table = deployed.tables.iter().find(|table| table.name == trigger.table);
        for operation in trigger.operations {
            let labels = [trigger.table, operation.label()];
            match table {
                Some(table) => {
                    let is_present = !table.missing.contains(operation);
                    metrics.triggers.with_label_values(&labels).set(is_present.into());
                }
                // Removing fails for a series that never existed.
                None => drop(metrics.triggers.remove_label_values(&labels)),
            }
        }
    }
    for (name, drift) in &deployed.functions {
        metrics.drift.with_label_values(&[*name]).set(drift.is_some().into());
    }
    metrics.migrations_pending.set(count(deployed.migrations.pending_count()));
}

/// Counts the rows that triggers have recorded since the baseline.
fn count_recorded(metrics: &Metrics, recorded: &Recorded) {
    for (table, rows) in &recorded.history {
        metrics.history_rows.of(HistorySource::of(table.as_deref())).inc_by(*rows);
    }
    metrics.trigger_failures.inc_by(recorded.failures);
}

/// Counts the rows that were written since the baseline.
fn count_writes(metrics: &Metrics, before: &[Table], tables: &[Table]) {
    for table in tables {
        // A table that was created again, or has other partitions, has counted other rows.
        let is_same =
            |before: &&Table| before.name == table.name && before.relations == table.relations;
        if let Some(before) = before.iter().find(is_same) {
            let writes = metrics.writes.of(WrittenTable(table.name));
            writes.inc_by(table.writes.saturating_sub(before.writes));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn counts_go_on_in_the_same_run_and_not_after_five_minutes() {
        let baseline = Baseline {
            run: "a".to_owned(),
            at: Instant::now(),
            tables: Vec::new(),
            recorded: None,
        };
        assert!(baseline.is_comparable("a") && !baseline.is_comparable("b"));
        advance(BASELINE_AGE_MAX - Duration::from_millis(1)).await;
        assert!(baseline.is_comparable("a"));
        advance(Duration::from_millis(1)).await;
        assert!(!baseline.is_comparable("a"));
    }
}
