//! The database: whether it is there, what the gateway's role may in it, what it holds.

use std::{
    io,
    time::{Duration, Instant},
};

use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;

use super::{
    CANARY_EID, Check, Patient, Report, Seen,
    report::said,
    target::{ReachError, reach},
};
use crate::{
    clock::unix_seconds,
    db::{
        self,
        doctor::{Kept, Server},
    },
    secret::Secret,
};

/// For a server that has taken the connection to let somebody in.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// For a statement; the server ends it a little earlier by itself.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
const STATEMENT_LIMIT: Duration = Duration::from_secs(4);

/// The first version with what the triggers and the gateway use: `xid8` and its functions.
const VERSION_MIN: i32 = 130_000;
/// The oldest version that is tested.
const VERSION_TESTED: i32 = 150_000;
/// A clock that is off by more spoils what is measured from commit to client.
const SKEW_MAX: f64 = 0.5;
/// A clock that is off by more has tokens expire at the wrong time.
const SKEW_FAILED: f64 = 5.0;
/// At this the triggers notify no longer; at this somebody should look.
const QUEUE_FULL: f64 = 0.5;
const QUEUE_FILLING: f64 = 0.1;
/// So long after its time a message may still be in the history: it is deleted every few minutes.
const RETENTION_SLACK: f64 = 3600.0;

/// A session that is lost at the first statement that is not answered.
pub(super) struct Session(Option<PgConnection>);

/// Why a statement has given nothing.
#[derive(Debug)]
pub(super) enum Unasked {
    /// The role may not, or the thing is not there.
    Closed(String),
    /// It did not work.
    Failed(String),
}

impl Unasked {
    fn of(error: &sqlx::Error) -> Self {
        let text = |it: &str| said(it);
        match error.as_database_error() {
            Some(refused) => {
                let code = refused.code().unwrap_or_default();
                match &*code {
                    // No right, no table, no schema, no function.
                    "42501" | "42P01" | "3F000" | "42883" => Self::Closed(text(refused.message())),
                    _ => Self::Failed(format!("{} ({code})", text(refused.message()))),
                }
            }
            None => Self::Failed(text(&error.to_string())),
        }
    }

    /// A check that needs what was asked for.
    pub(super) fn seen(self, fix: &str) -> Seen {
        match self {
            Self::Closed(why) => Seen::skipped(format!("cannot be looked at: {why}")),
            Self::Failed(why) => Seen::failed(why, fix),
        }
    }
}

impl Session {
    /// Asks something.
    ///
    /// # Errors
    /// [`Unasked`]; the session is lost if there was no answer.
    pub(super) async fn ask<T>(
        &mut self,
        limit: Duration,
        question: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Unasked> {
        let Some(session) = &mut self.0 else {
            return Err(Unasked::Failed("the session was lost".to_owned()));
        };
        match timeout(limit, question(session)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                if error.as_database_error().is_none() {
                    self.0 = None;
                }
                Err(Unasked::of(&error))
            }
            Err(_elapsed) => {
                self.0 = None;
                Err(Unasked::Failed("the database does not answer".to_owned()))
            }
        }
    }
}

/// What is known of the database.
pub(super) struct Database {
    pub(super) session: Option<Session>,
    pub(super) server: Option<Server>,
    pub(super) kept: Option<Kept>,
    /// The database's clock less ours.
    pub(super) clock: Option<f64>,
    /// Whether the migrations have made everything that they should.
    pub(super) is_migrated: bool,
}

impl Database {
    /// Asks something of the session.
    ///
    /// # Errors
    /// [`Unasked`].
    pub(super) async fn ask<T>(
        &mut self,
        question: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Unasked> {
        match &mut self.session {
            Some(session) => session.ask(STATEMENT_TIMEOUT, question).await,
            None => Err(Unasked::Failed("there is no session".to_owned())),
        }
    }
}

/// A session, or what stands in its way: `setting` is what names the URL.
pub(super) async fn connect(url: &Secret, setting: &str) -> Result<(Session, String), Seen> {
    let options = match db::options(url) {
        Ok(options) => options,
        Err(_may_quote_it) => {
            return Err(Seen::failed(
                "the URL cannot be read",
                format!("set {setting} to postgres://USER:PASSWORD@HOST/DATABASE"),
            ));
        }
    };
    let (host, port) = (options.get_host().to_owned(), options.get_port());
    let place = format!("{host}:{port}");
    let is_socket = options.get_socket().is_some() || host.starts_with('/');
    if !is_socket && let Err(error) = reach(&host, port).await {
        return Err(unreached(&error, setting));
    }
    let begun = Instant::now();
    match timeout(LOGIN_TIMEOUT, options.connect()).await {
        Ok(Ok(connection)) => {
            let mut session = Session(Some(connection));
            let limit = async |it: &mut PgConnection| db::doctor::limit(it, STATEMENT_LIMIT).await;
            if let Err(unasked) = session.ask(STATEMENT_TIMEOUT, limit).await {
                return Err(unasked.seen(&format!("look at the server behind {setting}")));
            }
            let took = begun.elapsed().as_secs_f64() * 1000.0;
            Ok((session, format!("{place}, {took:.0} ms to let {} in", options.get_username())))
        }
        Ok(Err(error)) => Err(not_let_in(&error, &options, &place, setting)),
        Err(_elapsed) => Err(Seen::failed(
            format!("{place} takes the connection and says nothing: it may be no Postgres"),
            format!("look at what {setting} names"),
        )),
    }
}

fn unreached(error: &ReachError, setting: &str) -> Seen {
    let fix = match error {
        ReachError::Name(_) => format!("correct the host in {setting}"),
        ReachError::OnlyIpv6(_) => {
            format!("set {setting} to the pooler's session mode (port 5432), or add IPv4")
        }
        ReachError::Refused(_) => format!("start Postgres, or correct the port in {setting}"),
        ReachError::Silent(_) | ReachError::Other(..) | ReachError::Tls(..) => {
            format!("open the way from here to there, or correct {setting}")
        }
    };
    Seen::failed(error.to_string(), fix)
}

/// Why the server has not let us in, by the code of its answer.
fn not_let_in(error: &sqlx::Error, options: &PgConnectOptions, place: &str, setting: &str) -> Seen {
    let user = options.get_username();
    if let Some(refused) = error.as_database_error() {
        let code = refused.code().unwrap_or_default();
        let words = said(refused.message());
        let fix = match &*code {
            "28P01" => format!("correct the password of {user} in {setting}"),
            "28000" => {
                format!("let {user} in (pg_hba.conf, TLS, or the role is missing), see {setting}")
            }
            "3D000" => format!("correct the database's name in {setting}"),
            "53300" => "end sessions, or raise max_connections".to_owned(),
            "57P03" => "wait until Postgres has started".to_owned(),
            // A pooler that serves many projects knows them by the role's name.
            _ if words.contains("Tenant or user not found") => {
                format!("name the role as the pooler wants it in {setting}: {user}.PROJECT")
            }
            _ => format!("look at the server's log, and at {setting}"),
        };
        let what = if code == "28P01" { "the password is wrong: " } else { "" };
        return Seen::failed(format!("{place} refuses {user}: {what}{words} ({code})"), fix);
    }
    match error {
        sqlx::Error::Tls(error) => Seen::failed(
            format!("no TLS with {place}: {}", said(&error.to_string())),
            format!("correct sslmode and sslrootcert in {setting}"),
        ),
        error => Seen::failed(
            format!("{place} does not speak as Postgres does: {}", said(&error.to_string())),
            format!("look at what {setting} names"),
        ),
    }
}

/// Looks at the database.
pub(super) async fn examine(patient: &Patient, report: &mut Report<'_>) -> io::Result<Database> {
    let mut database =
        Database { session: None, server: None, kept: None, clock: None, is_migrated: false };
    let url = patient.config.pool_url();
    let all = Check::ALL;
    let of_session: Vec<_> =
        all.iter().filter(|it| it.group() == Check::WalLevel.group()).skip(1).copied().collect();
    if url.is_empty() {
        let none = "no database is set: clients are served among themselves";
        report.note(
            Check::DatabaseReachable,
            Seen::warning(none, "set TIDEGATE_DATABASE_URL, or pass --database-url"),
        )?;
        report.skip(&of_session, "no database is set")?;
        return Ok(database);
    }
    match connect(url, "TIDEGATE_DATABASE_URL").await {
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
    match database.ask(async |it| db::doctor::server(it).await).await {
        Ok(server) => {
            report.note(Check::DatabaseVersion, version(&server))?;
            report.note(Check::DatabasePrimary, primary(&server))?;
            database.server = Some(server);
        }
        Err(unasked) => {
            report.note(Check::DatabaseVersion, unasked.seen("look at the server's log"))?;
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
    let seen = retention(patient, &mut database).await;
    report.note(Check::HistoryRetention, seen)?;
    let (queue, wal) = match &database.server {
        Some(server) => (queue(server), wal_level(server)),
        None => (Seen::skipped("the server did not say"), Seen::skipped("the server did not say")),
    };
    report.note(Check::NotifyQueue, queue)?;
    report.note(Check::WalLevel, wal)?;
    Ok(database)
}

fn version(server: &Server) -> Seen {
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

fn primary(server: &Server) -> Seen {
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
    let theirs = match database.ask(async |it| db::doctor::clock(it).await).await {
        Ok(theirs) => theirs,
        Err(unasked) => return unasked.seen("look at the server's log"),
    };
    let answered = unix_seconds();
    let offset = theirs - f64::midpoint(asked, answered);
    database.clock = Some(offset);
    skew("the database's clock", offset, (answered - asked) / 2.0)
}

/// What is said of a clock that is off by `offset` seconds, or by `uncertainty` less.
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
    let needs = match database.ask(async |it| db::doctor::needs(it).await).await {
        Ok(needs) => needs,
        Err(unasked) => return unasked.seen("look at the server's log"),
    };
    let (absent, closed): (Vec<_>, Vec<_>) = needs.iter().partition(|need| need.is_absent);
    database.is_migrated = absent.is_empty();
    let role = database.server.as_ref().map_or("the role", |it| &it.role);
    if !closed.is_empty() {
        let grants: Vec<_> = closed.iter().map(|it| &*it.grant).collect();
        return Seen::failed(
            format!("{role} lacks {}", grants.join("; ")),
            format!(
                "run `tidegate migrate`, which grants to the role tidegate, or as the owner: {}",
                grants
                    .iter()
                    .map(|it| format!("GRANT {it} TO {role}"))
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
    let powers = match database.ask(async |it| db::doctor::powers(it).await).await {
        Ok(powers) => powers,
        Err(unasked) => return unasked.seen("look at the server's log"),
    };
    let role = database.server.as_ref().map_or("the role", |it| &it.role);
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
    match database.ask(async |it| db::doctor::browser_rights(it).await).await {
        Ok(open) if open.is_empty() => {
            Seen::ok("anon, authenticated and public may use nothing of schema tidegate")
        }
        Ok(open) => Seen::failed(
            format!("{}: PostgREST shows it to browsers", open.join(", ")),
            "run `tidegate migrate`, or as the owner: SELECT tidegate.grant_access()",
        ),
        Err(unasked) => unasked.seen("look at the server's log"),
    }
}

async fn retention(patient: &Patient, database: &mut Database) -> Seen {
    let kept = match database.ask(async |it| db::doctor::kept(it, CANARY_EID).await).await {
        Ok(kept) => kept,
        Err(unasked) => return unasked.seen("look at the server's log"),
    };
    let keep = patient.config.history.keep;
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

/// `3h 5m`, of seconds.
pub(super) fn ago(seconds: f64) -> String {
    // Whole, so that nothing but what a person reads is left.
    let whole = Duration::try_from_secs_f64(seconds.max(0.0).round()).unwrap_or_default();
    humantime::format_duration(whole).to_string()
}

fn queue(server: &Server) -> Seen {
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

/// NOTIFY is not replication.
fn wal_level(server: &Server) -> Seen {
    Seen::ok(format!(
        "{}: it does not matter here, NOTIFY and the history need none (`logical` is for \
         Supabase's Postgres changes, which the gateway does not offer)",
        said(&server.wal_level)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn server(version_number: i32, queue: f64) -> Server {
        Server {
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

    /// A queue of 8 GiB is not filled by a test.
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
