//! What operators are told of the database: whether it has its triggers and functions, what is
//! written to it and what of that is told, how full its queue is.
//!
//! Invariants: it is looked at over the pool, each time within a deadline. Counts are compared with
//! those of the same run of the same server and of late, so that a counter neither goes back nor
//! jumps where a server was away, was restored, or has forgotten its statistics. The log says what
//! is missing once, and again when that changes.

use std::{error::Error, sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::clock::unix_seconds;
use crate::{
    db::{
        catalog::{self, Recorded},
        deployed::{Deployed, Migrations, TRIGGERS, Table},
    },
    metrics::Metrics,
    server::Services,
};

/// What was counted longer ago is not compared with: the counters go on from where they are.
const COMPARED: Duration = Duration::from_secs(300);

/// What stands for a table in the metrics of the history, besides those that have triggers: what
/// operators invalidate, and what other programs have written into it.
pub(crate) const MANUAL: &str = "manual";
pub(crate) const OTHER: &str = "other";

/// Looks at the database until the server stops.
pub(crate) async fn run(services: Arc<Services>, pool: PgPool) {
    let pool_max = i64::from(pool.options().get_max_connections());
    services.metrics.database_pool_max.set(pool_max);
    let rounds = async {
        let mut ticks = interval(services.config.metrics.database_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut survey = Survey::default();
        loop {
            ticks.tick().await;
            survey.round(&services, &pool).await;
        }
    };
    services.stopped.run_until_cancelled(rounds).await;
}

#[derive(Default)]
struct Survey {
    counted: Option<Counted>,
    /// What the log has said of it: missing triggers, functions, migrations.
    told: Option<[String; 3]>,
    has_failed: bool,
}

/// What the counters have counted.
struct Counted {
    run: String,
    at: Instant,
    tables: Vec<Table>,
    /// What triggers have written down, as `pg_snapshot` writes it; none if there is no history.
    recorded: Option<String>,
}

impl Counted {
    /// Whether what is counted in this run goes on from here.
    fn is_comparable(&self, run: &str) -> bool {
        self.run == run && self.at.elapsed() < COMPARED
    }
}

impl Survey {
    async fn round(&mut self, services: &Services, pool: &PgPool) {
        let limit = services.config.relay.connect_timeout;
        let failure: Box<dyn Error> = match timeout(limit, self.look(services, pool, limit)).await {
            Ok(Ok(())) => {
                services.metrics.database_last_look.set(unix_seconds());
                self.has_failed = false;
                return;
            }
            Ok(Err(error)) => error.into(),
            Err(elapsed) => elapsed.into(),
        };
        services.metrics.database_look_failures.inc();
        if self.has_failed {
            tracing::debug!(error = &*failure, "the database cannot be looked at");
        } else {
            tracing::warn!(error = &*failure, "the database cannot be looked at");
        }
        self.has_failed = true;
    }

    async fn look(
        &mut self,
        services: &Services,
        pool: &PgPool,
        limit: Duration,
    ) -> Result<(), sqlx::Error> {
        let metrics = &services.metrics;
        let mut session = catalog::begin_reading(pool, limit).await?;
        let deployed = Deployed::read(&mut session).await?;
        let server = catalog::server_state(&mut session).await?;
        show(metrics, &deployed);
        self.tell(&deployed);
        metrics.database_notify_queue.set(server.notify_queue);

        let before = self.counted.as_ref();
        let before = before.filter(|it| it.is_comparable(&server.run));
        // After the statistics, which are late: what they count has been written down by now.
        let since = before.and_then(|it| it.recorded.as_deref());
        let recorded = match catalog::recorded(&mut session, since).await {
            Err(sqlx::Error::Database(error)) if is_absent(&*error) => None,
            recorded => Some(recorded?),
        };
        session.rollback().await?;
        if let Some(recorded) = &recorded {
            count_recorded(metrics, recorded);
        }
        let oldest = recorded.as_ref().and_then(|it| it.oldest);
        metrics.database_history_oldest.set(oldest.unwrap_or_default());
        if let Some(before) = before {
            count_writes(metrics, &before.tables, &deployed.tables);
        }
        self.counted = Some(Counted {
            run: server.run,
            at: Instant::now(),
            tables: deployed.tables,
            recorded: recorded.map(|it| it.seen),
        });
        Ok(())
    }

    /// Logs what is missing, if that is not what was logged last.
    fn tell(&mut self, deployed: &Deployed) {
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
        let told = [triggers.collect::<Vec<_>>().join(", "), functions, migrations];
        if self.told.as_ref() == Some(&told) {
            return;
        }
        let [triggers, functions, migrations] = &told;
        if told.iter().all(String::is_empty) {
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
        self.told = Some(told);
    }
}

/// Whether a table or the schema is not there: what does not exist has no rows.
fn is_absent(error: &dyn sqlx::error::DatabaseError) -> bool {
    matches!(error.code().as_deref(), Some("42P01" | "3F000"))
}

fn show(metrics: &Metrics, deployed: &Deployed) {
    for trigger in TRIGGERS {
        let table = deployed.tables.iter().find(|it| it.name == trigger.table);
        for operation in trigger.operations {
            let labels = [trigger.table, operation.label()];
            match table {
                Some(table) => {
                    let is_present = !table.missing.contains(operation);
                    metrics.database_triggers.with_label_values(&labels).set(is_present.into());
                }
                // It may not have been there before, either.
                None => drop(metrics.database_triggers.remove_label_values(&labels)),
            }
        }
    }
    for (name, drift) in &deployed.functions {
        metrics.database_drift.with_label_values(&[*name]).set(drift.is_some().into());
    }
    let pending = i64::try_from(deployed.migrations.pending_count()).unwrap_or(i64::MAX);
    metrics.database_migrations_pending.set(pending);
}

fn count_recorded(metrics: &Metrics, recorded: &Recorded) {
    for (table, rows) in &recorded.history {
        let mut known = TRIGGERS.iter().map(|it| it.table).chain([MANUAL]);
        let label = known.find(|it| Some(*it) == table.as_deref()).unwrap_or(OTHER);
        metrics.database_history_rows.with_label_values(&[label]).inc_by(*rows);
    }
    metrics.database_trigger_failures.inc_by(recorded.failures);
}

fn count_writes(metrics: &Metrics, before: &[Table], tables: &[Table]) {
    for table in tables {
        // Another table of the name, or one with other partitions, has counted others' rows.
        let is_it = |it: &&Table| it.name == table.name && it.relations == table.relations;
        if let Some(before) = before.iter().find(is_it) {
            let counter = metrics.database_writes.with_label_values(&[table.name]);
            counter.inc_by(table.writes.saturating_sub(before.writes));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn counts_go_on_in_the_same_run_and_not_after_five_minutes() {
        let counted =
            Counted { run: "a".to_owned(), at: Instant::now(), tables: Vec::new(), recorded: None };
        assert!(counted.is_comparable("a") && !counted.is_comparable("b"));
        advance(COMPARED - Duration::from_millis(1)).await;
        assert!(counted.is_comparable("a"));
        advance(Duration::from_millis(1)).await;
        assert!(!counted.is_comparable("a"));
    }
}
