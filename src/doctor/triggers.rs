//! Triggers: whether they exist and run as they should, and what they notify of a change that is
//! tried in a transaction and rolled back.

use std::{collections::BTreeMap, io, time::Duration};

use super::{
    context::Context,
    database::Database,
    report::{Check, Report, Seen, said},
    session::{Session, StatementError},
};
use crate::db::{
    self,
    deployed::{Deployed, Drift, Migrations},
    doctor::{Tried, TriedOutcome},
};

/// Longest wait for the dry run of all tables together; the server ends each statement earlier.
const DRY_RUN_TIMEOUT: Duration = Duration::from_secs(6);
const MIGRATE: &str = "run `tidegate migrate` with TIDEGATE_MIGRATE_DATABASE_URL";

/// The table of each check.
const DRY_RUNS: [(Check, &str); 9] = [
    (Check::DryRunVotes, "votes"),
    (Check::DryRunBids, "bids"),
    (Check::DryRunMedia, "art_media"),
    (Check::DryRunArt, "art"),
    (Check::DryRunEventArtists, "event_artists"),
    (Check::DryRunRoundContestants, "round_contestants"),
    (Check::DryRunArtworkOffers, "artwork_offers"),
    (Check::DryRunPaymentProcessing, "payment_processing"),
    (Check::DryRunEvents, "events"),
];

/// Examines the triggers.
pub(super) async fn examine(
    context: &Context,
    report: &mut Report<'_>,
    database: &mut Database,
) -> io::Result<()> {
    let dry_runs = DRY_RUNS.map(|(check, _)| check);
    if database.session.is_none() {
        let others = [
            Check::TriggerCoverage,
            Check::FunctionDrift,
            Check::FunctionSafety,
            Check::TriggerFailures,
        ];
        report.skip(&others, "there is no session with the database")?;
        return report.skip(&dry_runs, "there is no session with the database");
    }
    match database.query(async |session| Deployed::read(session).await).await {
        Ok(deployed) => {
            report.note(Check::TriggerCoverage, coverage(&deployed))?;
            report.note(Check::FunctionDrift, drift(&deployed))?;
            let neighbours =
                database.query(async |session| db::doctor::unpinned_neighbours(session).await);
            report.note(Check::FunctionSafety, safety(&deployed, neighbours.await))?;
        }
        Err(error) => {
            let seen = error.seen("look at the server's log");
            for check in [Check::TriggerCoverage, Check::FunctionDrift, Check::FunctionSafety] {
                report.note(check, seen.clone())?;
            }
        }
    }
    let seen = failures(database).await;
    report.note(Check::TriggerFailures, seen)?;
    match dry_run(context, database).await {
        Ok((role, tried)) => {
            for (check, table) in DRY_RUNS {
                let tried = tried.get(table);
                let seen =
                    tried.map_or(Seen::skipped("it was not tried"), |tried| told(tried, role));
                report.note(check, seen)?;
            }
            Ok(())
        }
        Err(seen) => dry_runs.iter().try_for_each(|check| report.note(*check, seen.clone())),
    }
}

fn coverage(deployed: &Deployed) -> Seen {
    let tables: Vec<_> = deployed.tables.iter().map(|table| table.name).collect();
    let missing: Vec<_> = deployed
        .missing_triggers()
        .map(|(table, operation)| format!("{table} {}", operation.label()))
        .collect();
    if tables.is_empty() {
        return Seen::warning(
            "none of the tables exists in schema public: art, votes, bids, art_media …",
            "name the application's database in TIDEGATE_DATABASE_URL",
        );
    }
    if missing.is_empty() {
        return Seen::ok(format!("triggers on {}", tables.join(", ")));
    }
    Seen::failed(
        format!("no trigger tells of {}: missing, disabled or another's", missing.join(", ")),
        format!("{MIGRATE}, or as the owner: SELECT enable_cache_invalidation()"),
    )
}

fn drift(deployed: &Deployed) -> Seen {
    let is_other = |drift: &Drift| matches!(drift, Drift::Missing | Drift::Body);
    let drifted: Vec<_> = deployed
        .drifted()
        .filter(|(_, drift)| is_other(drift))
        .map(|(name, drift)| format!("{name}: {drift}"))
        .collect();
    if !drifted.is_empty() {
        return Seen::failed(
            format!("not this version's functions: {}", said(&drifted.join("; "))),
            MIGRATE,
        );
    }
    match &deployed.migrations {
        Migrations::Known { pending, .. } if !pending.is_empty() => Seen::failed(
            format!("migrations that have not run, or ran with another text: {pending:?}"),
            MIGRATE,
        ),
        Migrations::Known { is_newer: true, .. } => Seen::warning(
            "the database's migrations are newer than this program",
            "run the newer tidegate",
        ),
        Migrations::Unreadable => Seen::warning(
            "the functions are this version's; which migrations have run cannot be read",
            format!("{MIGRATE}, which lets the role tidegate read them"),
        ),
        Migrations::Known { .. } => {
            Seen::ok(format!("{} functions, all this version's", deployed.functions.len()))
        }
    }
}

fn safety(deployed: &Deployed, neighbours: Result<Vec<String>, StatementError>) -> Seen {
    let wrong: Vec<_> = deployed
        .drifted()
        .filter(|(_, drift)| matches!(drift, Drift::Security | Drift::Settings))
        .map(|(name, drift)| format!("{name}: {drift}"))
        .collect();
    if !wrong.is_empty() {
        return Seen::failed(said(&wrong.join("; ")), MIGRATE);
    }
    match neighbours {
        Ok(open) if open.is_empty() => Seen::ok(
            "functions run with SECURITY DEFINER only where they must, all with a pinned search_path",
        ),
        Ok(open) => Seen::warning(
            format!(
                "other triggers of the same tables call SECURITY DEFINER functions without a pinned \
                 search_path: {}",
                said(&open.join(", "))
            ),
            "as their owner, once their bodies name every schema: ALTER FUNCTION … SET search_path = ''",
        ),
        Err(error) => error.seen("look at the server's log"),
    }
}

async fn failures(database: &mut Database) -> Seen {
    match database.query(async |session| db::doctor::recent_failures(session).await).await {
        Ok(None) => Seen::ok("the triggers have recorded no failure within 24 hours"),
        Ok(Some((count, last))) => Seen::warning(
            format!("{count} failures within 24 hours, the last: {}", said(&last)),
            "SELECT * FROM tidegate.trigger_failures ORDER BY id DESC LIMIT 20",
        ),
        Err(error) => error.seen("look at the server's log"),
    }
}

/// Tries a change of each table as the role that may write. Returns the setting of that role, and
/// the outcome for each table.
async fn dry_run(
    context: &Context,
    database: &mut Database,
) -> Result<(&'static str, BTreeMap<String, Tried>), Seen> {
    if !database.is_migrated {
        return Err(Seen::skipped("the migrations have not run: see role-rights"));
    }
    let config = &context.config;
    let is_same = config.migrate_url().is(config.pool_url().expose());
    let (mut owner, setting) = if is_same {
        (None, "TIDEGATE_DATABASE_URL")
    } else {
        let setting = "TIDEGATE_MIGRATE_DATABASE_URL";
        (Some(Session::connect(config.migrate_url(), setting).await?.0), setting)
    };
    let session = owner.as_mut().or(database.session.as_mut());
    let Some(session) = session else { return Err(Seen::skipped("there is no session")) };
    match session.query(DRY_RUN_TIMEOUT, async |session| db::doctor::dry_run(session).await).await {
        Ok(tried) => {
            Ok((setting, tried.into_iter().map(|tried| (tried.table.clone(), tried)).collect()))
        }
        Err(StatementError::Closed(why)) => Err(Seen::skipped(format!(
            "the role of {setting} may not try it ({why}): set TIDEGATE_MIGRATE_DATABASE_URL to one that may write"
        ))),
        Err(error) => Err(error.seen("look at the server's log")),
    }
}

/// Returns the result of the change that was tried, by what it has notified.
fn told(tried: &Tried, setting: &str) -> Seen {
    let Tried { table, outcome, operation, told, message } = tried;
    let operation = operation.as_deref().unwrap_or("change");
    let message = message.as_deref().unwrap_or_default();
    match outcome {
        TriedOutcome::Told => {
            let words: Vec<_> = told
                .iter()
                .map(|message| {
                    let kind = message.kind.as_deref().unwrap_or("message");
                    format!("{kind} of {} for {}", message.eid, message.endpoints.join(" "))
                })
                .collect();
            let saw = format!("{operation} would tell {}", said(&words.join(", ")));
            let is_of = |endpoint: &String, eid: &str| {
                let rest =
                    endpoint.strip_prefix("/live/event/").and_then(|rest| rest.strip_prefix(eid));
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '-']))
            };
            let mut endpoints = told.iter().flat_map(|message| {
                message.endpoints.iter().map(|endpoint| (endpoint, &*message.eid))
            });
            if !endpoints.all(|(endpoint, eid)| is_of(endpoint, eid)) {
                Seen::failed(format!("{saw}: endpoints of another event"), MIGRATE)
            } else if message.is_empty() {
                Seen::ok(saw)
            } else {
                Seen::warning(
                    format!("{saw}, and records: {}", said(message)),
                    "SELECT * FROM tidegate.trigger_failures ORDER BY id DESC LIMIT 20",
                )
            }
        }
        TriedOutcome::Silent if message.is_empty() => Seen::failed(
            format!("{operation} of {table} tells nobody: the trigger is missing or disabled"),
            MIGRATE,
        ),
        TriedOutcome::Silent => Seen::failed(
            format!("{operation} of {table} tells nobody: {}", said(message)),
            "mend what the trigger names; rows without an event tell nobody",
        ),
        TriedOutcome::Refused if message.starts_with("55P03") => {
            Seen::skipped(format!("{table} is locked by another session (55P03)"))
        }
        TriedOutcome::Refused => Seen::skipped(format!(
            "Postgres refuses what was tried ({}), and there is no row to update",
            said(message)
        )),
        TriedOutcome::Empty => Seen::skipped(format!("{table} has no row that could be changed")),
        TriedOutcome::Absent => Seen::skipped(format!("there is no table public.{table}")),
        TriedOutcome::Closed => Seen::skipped(format!(
            "the role of {setting} may not write {table}: set TIDEGATE_MIGRATE_DATABASE_URL to one that may"
        )),
        TriedOutcome::Outside => Seen::skipped(format!(
            "trigger {} of {table} may do what no rollback undoes",
            said(message)
        )),
    }
}
