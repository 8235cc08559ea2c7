//! The database: whether it can be reached, the rights of the gateway's role, what it holds.

use std::{io, time::Duration};

use sqlx::PgConnection;

use super::{
    context::{CANARY_EID, Context},
    report::{Check, Report, Seen, said},
    session::{STATEMENT_TIMEOUT, Session, StatementError},
};
use crate::{
    clock::unix_seconds,
    db::{
        self,
        doctor::{DatabaseServer, Kept},
    },
};

/// The first version with `xid8` and its functions, which the triggers and the gateway use.
const VERSION_MIN: i32 = 130_000;
/// The oldest version that is tested.
const VERSION_TESTED: i32 = 150_000;
/// With a larger offset of the clocks, times from commit to client mislead. Seconds.
const SKEW_MAX: f64 = 0.5;
/// With a larger offset of the clocks, tokens expire at the wrong time. Seconds.
const SKEW_FAILED: f64 = 5.0;
/// Above this part of the notification queue the triggers no longer notify.
const QUEUE_FULL: f64 = 0.5;
/// Above this part an operator should look for the session that does not read.
const QUEUE_FILLING: f64 = 0.1;
/// How long a message may stay in the history after its time, which ends between two deletions.
/// Seconds.
const RETENTION_SLACK: f64 = 3600.0;

/// The session with the database, and what the examination has read.
pub(super) struct Database {
    pub(super) session: Option<Session>,
    pub(super) server: Option<DatabaseServer>,
    pub(super) kept: Option<Kept>,
    /// The database's clock minus ours, in seconds.
    pub(super) clock: Option<f64>,
    /// Whether every object that the migrations create exists.
    pub(super) is_migrated: bool,
}

impl Database {
    /// Runs a statement in the session.
    ///
    /// # Errors
    /// [`StatementError`], also where there is no session.
    pub(super) async fn query<T>(
        &mut self,
        statement: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StatementError> {
        match &mut self.session {
            Some(session) => session.query(STATEMENT_TIMEOUT, statement).await,
            None => Err(StatementError::Failed("there is no session".to_owned())),
        }
    }
}

/// Examines the database.
pub(super) async fn examine(context: &Context, report: &mut Report<'_>) -> io::Result<Database> {
    let mut database =
        Database { session: None, server: None, kept: None, clock: None, is_migrated: false };
    let url = context.config.pool_url();
    let all = Check::ALL;
    let of_session: Vec<_> = all
        .iter()
        .filter(|check| check.group() == Check::WalLevel.group())
        .skip(1)
        .copied()
        .collect();
    if url.is_empty() {
        let none = "no database is set: clients are served among themselves";
        report.note(
            Check::DatabaseReachable,
            Seen::warning(none, "set TIDEGATE_DATABASE_URL, or pass --database-url"),
        )?;
        report.skip(&of_session, "no database is set")?;
        return Ok(database);
    }
    match Session::connect(url, "TIDEGATE_DATABASE_URL").await {
        Ok((session, saw)) => {
            database.session = Some(session);
            report.note(Check::DatabaseReachable, Seen::ok(saw))?;
        }
        Err(seen) => {
            report.note(Check::DatabaseReachable, seen)?;
            report.skip(&of_session, "the database cannot be reached")?;
            return Ok(database);
        }
    }
    match database.query(async |session| db::doctor::server(session).await).await {
        Ok(server) => {
            report.note(Check::DatabaseVersion, version(&server))?;
            report.note(Check::DatabasePrimary, primary(&server))?;
            database.server = Some(server);
        }
        Err(error) => {
            report.note(Check::DatabaseVersion, error.seen("look at the server's log"))?;
            report.skip(&[Check::DatabasePrimary], "the server did not say")?;
        }
    }
    let seen = clock(&mut database).await;
    report.note(Check::DatabaseClock, seen)?;
    let seen = rights(&mut database).await;
    report.note(Check::RoleRights, seen)?;
    let seen = least_privilege(&mut database).await;
    report.note(Check::RoleLeastPrivilege, seen)?;
    let seen = browsers(&mut database).await;
    report.note(Check::BrowserRights, seen)?;
    let seen = retention(context, &mut database).await;
    report.note(Check::HistoryRetention, seen)?;
    let (queue, wal) = match &database.server {
        Some(server) => (queue(server), wal_level(server)),
        None => (Seen::skipped("the server did not say"), Seen::skipped("the server did not say")),
    };
    report.note(Check::NotifyQueue, queue)?;
    report.note(Check::WalLevel, wal)?;
    Ok(database)
}

fn version(server: &DatabaseServer) -> Seen {
    let saw = format!("Postgres {}, database {}", said(&server.version), server.database);
    if server.version_number < VERSION_MIN {
        Seen::failed(
            format!("{saw}: the triggers and the gateway need Postgres 13"),
            "upgrade Postgres",
        )
    } else if server.version_number < VERSION_TESTED {
        Seen::warning(format!("{saw}: 15 is the oldest version that is tested"), "upgrade Postgres")
    } else {
        Seen::ok(saw)
    }
}

fn primary(server: &DatabaseServer) -> Seen {
    if server.is_in_recovery {
        return Seen::failed(
            "the server is a standby (in recovery): it refuses LISTEN and writes",
            "set TIDEGATE_DATABASE_URL and TIDEGATE_NOTIFY_DATABASE_URL to the primary",
        );
    }
    Seen::ok("not in recovery: LISTEN and writes work")
}

async fn clock(database: &mut Database) -> Seen {
    let asked = unix_seconds();
    let theirs = match database.query(async |session| db::doctor::clock(session).await).await {
        Ok(theirs) => theirs,
        Err(error) => return error.seen("look at the server's log"),
    };
    let answered = unix_seconds();
    let offset = theirs - f64::midpoint(asked, answered);
    database.clock = Some(offset);
    skew("the database's clock", offset, (answered - asked) / 2.0)
}

/// Returns the result of a clock that is `offset` seconds ahead of ours, give or take
/// `uncertainty`.
pub(super) fn skew(whose: &str, offset: f64, uncertainty: f64) -> Seen {
    let by = offset.abs() - uncertainty;
    let direction = if offset > 0.0 { "ahead of" } else { "behind" };
    let saw = format!("{whose} is {:.3} s {direction} ours", offset.abs());
    if by > SKEW_FAILED {
        Seen::failed(saw, "run NTP (chrony, systemd-timesyncd) on both machines")
    } else if by > SKEW_MAX {
        Seen::warning(
            format!("{saw}: times from commit to client are wrong by as much"),
            "run NTP (chrony, systemd-timesyncd) on both machines",
        )
    } else {
        Seen::ok(saw)
    }
}

async fn rights(database: &mut Database) -> Seen {
    let needs = match database.query(async |session| db::doctor::needs(session).await).await {
        Ok(needs) => needs,
        Err(error) => return error.seen("look at the server's log"),
    };
    let (absent, closed): (Vec<_>, Vec<_>) = needs.iter().partition(|need| need.is_absent);
    database.is_migrated = absent.is_empty();
    let role = database.server.as_ref().map_or("the role", |server| &server.role);
    if !closed.is_empty() {
        let grants: Vec<_> = closed.iter().map(|need| &*need.grant).collect();
        return Seen::failed(
            format!("{role} lacks {}", grants.join("; ")),
            format!(
                "run `tidegate migrate`, which grants to the role tidegate, or as the owner: {}",
                grants
                    .iter()
                    .map(|grant| format!("GRANT {grant} TO {role}"))
                    .collect::<Vec<_>>()
                    .join("; ")
            ),
        );
    }
    if let Some(first) = absent.first() {
        return Seen::failed(
            format!(
                "{} of what the gateway needs does not exist, such as {}",
                absent.len(),
                first.object
            ),
            "run `tidegate migrate` with TIDEGATE_MIGRATE_DATABASE_URL",
        );
    }
    Seen::ok(format!("{role} may all that the gateway needs"))
}

async fn least_privilege(database: &mut Database) -> Seen {
    let powers = match database.query(async |session| db::doctor::powers(session).await).await {
        Ok(powers) => powers,
        Err(error) => return error.seen("look at the server's log"),
    };
    let role = database.server.as_ref().map_or("the role", |server| &server.role);
    if powers.is_empty() {
        return Seen::ok(format!("{role} may no more than a gateway needs"));
    }
    Seen::warning(
        format!("{role} {}: whoever takes the gateway over has that, too", powers.join(", ")),
        "connect as the role that `tidegate migrate` makes: \
         TIDEGATE_DATABASE_URL=postgres://tidegate:PASSWORD@HOST/DATABASE",
    )
}

async fn browsers(database: &mut Database) -> Seen {
    match database.query(async |session| db::doctor::browser_rights(session).await).await {
        Ok(open) if open.is_empty() => {
            Seen::ok("anon, authenticated and public may use nothing of schema tidegate")
        }
        Ok(open) => Seen::failed(
            format!("{}: PostgREST shows it to browsers", open.join(", ")),
            "run `tidegate migrate`, or as the owner: SELECT tidegate.grant_access()",
        ),
        Err(error) => error.seen("look at the server's log"),
    }
}

async fn retention(context: &Context, database: &mut Database) -> Seen {
    let kept =
        match database.query(async |session| db::doctor::kept(session, CANARY_EID).await).await {
            Ok(kept) => kept,
            Err(error) => return error.seen("look at the server's log"),
        };
    let keep = context.config.history.keep;
    let is_late = kept.oldest.is_some_and(|age| age > keep.as_secs_f64() + RETENTION_SLACK);
    let oldest =
        kept.oldest.map_or("is empty".to_owned(), |age| format!("reaches back {}", ago(age)));
    let seen = if is_late {
        Seen::warning(
            format!(
                "the history {oldest}, and history.keep is {}",
                humantime::format_duration(keep)
            ),
            "start a gateway, which deletes old rows, or run: SELECT tidegate.forget_history('72 hours')",
        )
    } else {
        Seen::ok(format!(
            "the history {oldest}, {} messages within an hour; history.keep is {}",
            kept.in_an_hour,
            humantime::format_duration(keep)
        ))
    };
    database.kept = Some(kept);
    seen
}

/// Formats seconds: `3h 5m`.
pub(super) fn ago(seconds: f64) -> String {
    // Whole seconds: the fraction would be written out to the nanosecond.
    let whole = Duration::try_from_secs_f64(seconds.max(0.0).round()).unwrap_or_default();
    humantime::format_duration(whole).to_string()
}

fn queue(server: &DatabaseServer) -> Seen {
    let saw = format!("the notification queue is {:.0} % full", server.queue * 100.0);
    let fix = "end the listening session with the oldest transaction: SELECT pid, application_name, \
               xact_start FROM pg_stat_activity ORDER BY xact_start LIMIT 5";
    if server.queue > QUEUE_FULL {
        Seen::failed(format!("{saw}: the triggers notify no longer"), fix)
    } else if server.queue > QUEUE_FILLING {
        Seen::warning(format!("{saw}: some session listens and does not read"), fix)
    } else {
        Seen::ok(saw)
    }
}

/// Reports the level; every level will do, since NOTIFY is not replication.
fn wal_level(server: &DatabaseServer) -> Seen {
    Seen::ok(format!(
        "{}: it does not matter here, NOTIFY and the history need none (`logical` is for \
         Supabase's Postgres changes, which the gateway does not offer)",
        said(&server.wal_level)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Status;

    fn server(version_number: i32, queue: f64) -> DatabaseServer {
        DatabaseServer {
            version_number,
            version: "x".to_owned(),
            is_in_recovery: false,
            wal_level: "replica".to_owned(),
            queue,
            role: "tidegate".to_owned(),
            database: "d".to_owned(),
        }
    }

    #[test]
    fn an_old_version_is_warned_of_and_a_too_old_one_fails() {
        for (number, status) in [
            (129_999, Status::Failed),
            (130_000, Status::Warning),
            (149_999, Status::Warning),
            (150_000, Status::Ok),
            (180_001, Status::Ok),
        ] {
            assert_eq!(version(&server(number, 0.0)).status, status, "{number}");
        }
    }

    /// No test fills a queue of 8 GiB.
    #[test]
    fn a_queue_that_fills_is_named_before_the_triggers_give_up() {
        for (full, status) in
            [(0.0, Status::Ok), (0.1, Status::Ok), (0.11, Status::Warning), (0.51, Status::Failed)]
        {
            assert_eq!(queue(&server(150_000, full)).status, status, "{full}");
        }
    }

    #[test]
    fn a_clock_is_off_by_what_the_round_trip_does_not_explain() {
        for (offset, uncertainty, status) in [
            (0.4, 0.0, Status::Ok),
            (-0.6, 0.0, Status::Warning),
            (0.6, 0.2, Status::Ok),
            (5.1, 0.0, Status::Failed),
            (-5.1, 0.2, Status::Warning),
        ] {
            assert_eq!(skew("x", offset, uncertainty).status, status, "{offset}");
        }
        assert!(skew("x", -0.6, 0.0).saw.contains("0.600 s behind ours"));
    }
}
