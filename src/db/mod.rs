//! Pools, migrations, and every SQL statement of the gateway.

mod catalog;
pub mod deployed;
pub(crate) mod doctor;

pub(crate) use catalog::{
    FoundFunction, FoundTable, Recorded, applied_migrations, begin_reading, functions, recorded,
    server, tables,
};

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Connection, Executor, PgConnection, PgPool, Row, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
    postgres::{PgConnectOptions, PgExecutor, PgListener, PgPoolOptions, PgRow},
};

use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    auth::revocations::{By, Revocation},
    recovery::{ClientKey, Record},
    secret::Secret,
};

/// The re-runnable file of triggers and functions.
pub const SYSTEM_SQL: &str =
    include_str!("../../migrations/broadcast_cache_invalidation_system.sql");

/// The re-runnable file that takes everything of ours away.
const UNINSTALL_SQL: &str = include_str!("../../migrations/uninstall.sql");

/// The parameters of a URL that the library reads. It warns of others with their values, which may
/// be secrets.
const PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// How long `migrate` waits for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections for what the listening session is not for, and how long one is kept unused.
const POOL_MAX: u32 = 3;
const POOL_IDLE: Duration = Duration::from_secs(60);

/// More changed endpoints than this are not told one by one.
const CHANGED_MAX: usize = 100_000;

/// Tells gateways that the revocations have changed.
pub(crate) const REVOCATIONS_CHANNEL: &str = "tidegate_revocations";

/// Under which gateways take turns in deleting what is over: `tidegate` in ASCII.
const FORGET_LOCK: i64 = 0x7469_6465_6761_7465;
/// Rows of the history that are deleted at a time.
pub(crate) const FORGET_BATCH: i32 = 1_000;

/// The gateway's own schema, one migration after the other.
const SCHEMA: [(i64, &str, &str); 6] = [
    (1, "gateway schema", include_str!("../../migrations/schema/0001_gateway_schema.sql")),
    (2, "broadcast history", include_str!("../../migrations/schema/0002_broadcast_history.sql")),
    (3, "gateways", include_str!("../../migrations/schema/0003_gateways.sql")),
    (4, "private channels", include_str!("../../migrations/schema/0004_private_channels.sql")),
    (5, "revocations", include_str!("../../migrations/schema/0005_revocations.sql")),
    (6, "forget person", include_str!("../../migrations/schema/0006_forget_person.sql")),
];

/// Why `migrate` or `migrate --uninstall` could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// No database was named.
    #[error("no database: set TIDEGATE_MIGRATE_DATABASE_URL or TIDEGATE_DATABASE_URL")]
    NoUrl,
    /// The URL cannot be read or nobody answers.
    #[error("no connection to the database")]
    Connect(#[source] sqlx::Error),
    /// Somebody took the connection and said nothing in time.
    #[error("the database does not answer")]
    Unanswered,
    /// The gateway's schema.
    #[error("the migrations of schema tidegate failed")]
    Schema(#[source] sqlx::migrate::MigrateError),
    /// The system file.
    #[error("migrations/broadcast_cache_invalidation_system.sql failed")]
    System(#[source] sqlx::Error),
    /// The file that takes everything away.
    #[error("migrations/uninstall.sql failed, and nothing was taken away")]
    Uninstall(#[source] sqlx::Error),
}

/// What the URL says, and our name.
///
/// # Errors
/// The URL is not one of Postgres, or cannot be read.
pub(crate) fn options(url: &Secret) -> Result<PgConnectOptions, sqlx::Error> {
    let text = url.expose();
    if !["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme)) {
        return Err(sqlx::Error::Configuration("expected postgres://".into()));
    }
    let query = text.split_once('?').map_or("", |(_, query)| query);
    let is_known = |pair: &str| {
        let key = pair.split('=').next().unwrap_or_default();
        PARAMETERS.contains(&key) || key.starts_with("options[")
    };
    if !query.split('&').filter(|pair| !pair.is_empty()).all(is_known) {
        return Err(sqlx::Error::Configuration("a parameter of the URL is unknown".into()));
    }
    let options = PgConnectOptions::from_str(text)?;
    Ok(options.application_name("tidegate").disable_statement_logging())
}

/// A pool of one connection, made anew for each session: fresh DNS, nothing left over.
pub(crate) fn single(options: PgConnectOptions, connect_timeout: Duration) -> PgPool {
    PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(connect_timeout)
        .test_before_acquire(false)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options)
}

/// Whether the server is a standby, asked over a connection of its own.
pub(crate) async fn is_in_recovery(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut connection = options.connect().await?;
    let answer = connection.fetch_one("SELECT pg_is_in_recovery()").await?.try_get(0);
    connection.close().await?;
    answer
}

/// Asks the session for a sign of life: the server's clock, in seconds since 1970.
pub(crate) async fn heartbeat(listener: &mut PgListener) -> Result<f64, sqlx::Error> {
    // One exchange, the first time, too: a prepared statement would take two.
    listener.fetch_one("SELECT extract(epoch FROM clock_timestamp())::float8").await?.try_get(0)
}

/// A pool for what the listening session is not for.
///
/// # Errors
/// The URL cannot be read.
pub(crate) fn pool(url: &Secret, connect_timeout: Duration) -> Result<PgPool, sqlx::Error> {
    Ok(PgPoolOptions::new()
        .max_connections(POOL_MAX)
        .acquire_timeout(connect_timeout)
        .idle_timeout(POOL_IDLE)
        .connect_lazy_with(options(url)?))
}

/// Bounds what a statement of the session may take, so that a locked table ends the statement and
/// not the session.
pub(crate) async fn bound(listener: &mut PgListener, limit: Duration) -> Result<(), sqlx::Error> {
    let limit = limit.as_millis().to_string();
    sqlx::query(
        "SELECT set_config('statement_timeout', $1, false), set_config('lock_timeout', $1, false)",
    )
    .bind(limit)
    .execute(listener)
    .await
    .map(drop)
}

/// What tells one database from another and from what it was before it was restored: the server's
/// system identifier and timeline, and its own oid. The timeline is that of the log being written:
/// the control file has the old one until the first checkpoint after a promotion. Where a provider
/// has closed these functions, the time of the server's start instead.
pub(crate) async fn identity(listener: &mut PgListener) -> Result<String, sqlx::Error> {
    let identity = sqlx::query_scalar(
        "SELECT concat_ws(' ', d.oid, (SELECT system_identifier FROM pg_control_system()),
            left(pg_walfile_name(pg_current_wal_lsn()), 8))
        FROM pg_database d WHERE d.datname = current_database()",
    )
    .fetch_one(&mut *listener)
    .await;
    match identity {
        Err(sqlx::Error::Database(_)) => {
            sqlx::query_scalar(
                "SELECT concat_ws(' ', d.oid, pg_postmaster_start_time())
                FROM pg_database d WHERE d.datname = current_database()",
            )
            .fetch_one(listener)
            .await
        }
        Ok(_) | Err(_) => identity,
    }
}

/// What the database had committed at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// As `pg_snapshot` writes it: `xmin:xmax:xip,…`.
    pub(crate) xacts: String,
    /// The server's clock.
    pub(crate) at: String,
}

impl Snapshot {
    /// The first transaction that had not begun.
    pub(crate) fn xmax(&self) -> Option<u64> {
        self.xacts.split(':').nth(1)?.parse().ok()
    }
}

/// What the database has committed at this moment.
pub(crate) async fn snapshot(listener: &mut PgListener) -> Result<Snapshot, sqlx::Error> {
    let row = sqlx::query("SELECT pg_current_snapshot()::text, clock_timestamp()::text")
        .fetch_one(listener)
        .await?;
    Ok(Snapshot { xacts: row.try_get(0)?, at: row.try_get(1)? })
}

/// Notifies `nonce` on this gateway's own channel, and gives what had been committed before.
pub(crate) async fn send_canary(
    pool: &PgPool,
    channel: &str,
    nonce: &str,
) -> Result<Snapshot, sqlx::Error> {
    let row = sqlx::query(
        "SELECT pg_current_snapshot()::text, clock_timestamp()::text, pg_notify($1, $2)::text",
    )
    .bind(channel)
    .bind(nonce)
    .fetch_one(pool)
    .await?;
    Ok(Snapshot { xacts: row.try_get(0)?, at: row.try_get(1)? })
}

/// What a trigger could not do.
#[derive(Debug)]
pub(crate) struct TriggerFailure {
    /// The event, if it was known.
    pub(crate) eid: Option<String>,
    /// Whether the message is in the history all the same: the queue was too full to notify.
    pub(crate) is_in_history: bool,
}

/// What triggers could not do and had not recorded at `since`, where a viewer may have missed
/// something: not where there is no event to tell of, nor where the message was sent and only the
/// history lacks it, nor what concerns `auction_winner` alone. A transaction records ten failures
/// and the table about a thousand: beyond, anything may have failed. Gives them with what was seen,
/// as `pg_snapshot` writes it; so is `since`.
pub(crate) async fn trigger_failures(
    pool: &PgPool,
    since: &str,
) -> Result<(String, Vec<TriggerFailure>), sqlx::Error> {
    let rows = sqlx::query(
        "WITH newer AS (
            SELECT id, event_eid, sqlstate, message,
                count(*) OVER (PARTITION BY xact) >= 10
                    OR id > 1 AND id = (SELECT min(id) FROM tidegate.trigger_failures) AS is_cut
            FROM tidegate.trigger_failures
            WHERE xact >= pg_snapshot_xmin($1::pg_snapshot)
                AND NOT pg_visible_in_snapshot(xact, $1::pg_snapshot)
        )
        SELECT pg_current_snapshot()::text, f.eid, f.is_in_history
        FROM (VALUES (1)) AS always LEFT JOIN (
            SELECT CASE WHEN NOT is_cut THEN event_eid END AS eid,
                sqlstate IS NOT DISTINCT FROM '53000' AND NOT is_cut AS is_in_history
            FROM newer
            WHERE is_cut
                OR coalesce(sqlstate, '') NOT IN ('P0002', '22023')
                    AND coalesce(message, '') NOT LIKE 'writing the history%'
                    AND coalesce(message, '') NOT LIKE 'looking up the winn%'
            GROUP BY 1, 2
        ) f ON true",
    )
    .bind(since)
    .fetch_all(pool)
    .await?;
    let (mut seen, mut failures) = (String::new(), Vec::new());
    for row in &rows {
        seen = row.try_get(0)?;
        if let Some(is_in_history) = row.try_get(2)? {
            failures.push(TriggerFailure { eid: row.try_get(1)?, is_in_history });
        }
    }
    Ok((seen, failures))
}

/// Whether the history lacks something that was committed after `since`: it was not written, or is
/// no longer kept.
pub(crate) async fn has_holes(
    listener: &mut PgListener,
    since: &Snapshot,
    keep: Duration,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "WITH newer AS (
            SELECT id, sqlstate, count(*) OVER (PARTITION BY xact) >= 10
                    OR id > 1 AND id = (SELECT min(id) FROM tidegate.trigger_failures) AS is_cut
            FROM tidegate.trigger_failures
            WHERE xact >= pg_snapshot_xmin($1::pg_snapshot)
                AND NOT pg_visible_in_snapshot(xact, $1::pg_snapshot)
        )
        SELECT $2::timestamptz < clock_timestamp() - make_interval(secs => $3) OR EXISTS (
            SELECT FROM newer
            WHERE is_cut OR coalesce(sqlstate, '') NOT IN ('P0002', '22023', '53000'))",
    )
    .bind(&since.xacts)
    .bind(&since.at)
    .bind(keep.as_secs_f64())
    .fetch_one(listener)
    .await
}

/// An endpoint of an event in the history.
#[derive(Debug)]
pub(crate) struct Changed {
    pub(crate) eid: String,
    /// None for a message without any.
    pub(crate) endpoint: Option<String>,
    /// Whether it stands for everything of the event.
    pub(crate) is_pointer: bool,
}

/// What the history says has changed of these events since `since`, and within the minute before.
pub(crate) async fn changed_since(
    listener: &mut PgListener,
    since: &Snapshot,
    eids: &[String],
) -> Result<Vec<Changed>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT h.eid, e.endpoint, bool_or(h.payload LIKE '%\"pointer\": true%')
        FROM tidegate.broadcast_history h LEFT JOIN LATERAL unnest(h.endpoints) e (endpoint) ON true
        WHERE h.eid = ANY ($3)
            AND (h.xact >= pg_snapshot_xmin($1::pg_snapshot)
                    AND NOT pg_visible_in_snapshot(h.xact, $1::pg_snapshot)
                OR h.at >= $2::timestamptz - interval '60 seconds')
        GROUP BY 1, 2
        ORDER BY min(h.id)
        LIMIT 100001",
    )
    .bind(&since.xacts)
    .bind(&since.at)
    .bind(eids)
    .fetch_all(listener)
    .await?;
    if rows.len() > CHANGED_MAX {
        return Err(sqlx::Error::Protocol("too much has changed".into()));
    }
    rows.iter()
        .map(|row| {
            Ok(Changed {
                eid: row.try_get(0)?,
                endpoint: row.try_get(1)?,
                is_pointer: row.try_get(2)?,
            })
        })
        .collect()
}

/// The endpoints that the events have, and those that changed within a day: `(eid, endpoint)`.
pub(crate) async fn endpoints(
    listener: &mut PgListener,
    eids: &[String],
) -> Result<Vec<(String, String)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT e.eid, l.endpoint
        FROM unnest($1::text[]) e (eid), LATERAL tidegate.event_endpoints(e.eid) l (endpoint)
        UNION
        SELECT h.eid, unnest(h.endpoints)
        FROM tidegate.broadcast_history h
        WHERE h.eid = ANY ($1) AND h.at > clock_timestamp() - interval '24 hours'",
    )
    .bind(eids)
    .fetch_all(listener)
    .await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get::<Option<String>, _>(1)?.unwrap_or_default())))
        .collect()
}

/// Says that this gateway lives, and asks whether another one does, or died within a day without
/// an orderly end.
pub(crate) async fn sign_of_life(pool: &PgPool, gateway: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "WITH me AS (
            INSERT INTO tidegate.gateways (id) VALUES ($1)
            ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp()
        )
        SELECT EXISTS (
            SELECT FROM tidegate.gateways
            WHERE id <> $1 AND ended_at IS NULL
                AND seen_at > clock_timestamp() - interval '24 hours')",
    )
    .bind(gateway)
    .fetch_one(pool)
    .await
}

/// What other gateways wrote at their end, within so long.
pub(crate) async fn lost_sockets(
    pool: &PgPool,
    gateway: Uuid,
    within: Duration,
) -> Result<Vec<Record>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT client, topic, extract(epoch FROM clock_timestamp() - min(last_data_at))::float8
        FROM tidegate.lost_sockets
        WHERE gateway <> $1 AND at > clock_timestamp() - make_interval(secs => $2)
        GROUP BY 1, 2",
    )
    .bind(gateway)
    .bind(within.as_secs_f64())
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            let seconds = row.try_get::<f64, _>(2)?.max(0.0);
            Ok(Record {
                client: ClientKey::from_uuid(row.try_get(0)?),
                topic: row.try_get::<String, _>(1)?.into(),
                age: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX),
            })
        })
        .collect()
}

/// Writes this gateway's records and, if they are all, that it has ended, at once.
pub(crate) async fn end_gateway(
    pool: &PgPool,
    gateway: Uuid,
    is_orderly: bool,
    records: &[Record],
) -> Result<(), sqlx::Error> {
    let clients: Vec<_> = records.iter().map(|it| it.client.uuid()).collect();
    let topics: Vec<_> = records.iter().map(|it| it.topic.to_string()).collect();
    let ages: Vec<_> = records.iter().map(|it| it.age.as_secs_f64()).collect();
    let mut transaction = pool.begin().await?;
    sqlx::query(
        "INSERT INTO tidegate.lost_sockets (gateway, client, topic, last_data_at)
        SELECT $1, client, topic, clock_timestamp() - make_interval(secs => age)
        FROM unnest($2::uuid[], $3::text[], $4::float8[]) r (client, topic, age)",
    )
    .bind(gateway)
    .bind(clients)
    .bind(topics)
    .bind(ages)
    .execute(&mut *transaction)
    .await?;
    sqlx::query(
        "INSERT INTO tidegate.gateways (id, ended_at)
        VALUES ($1, CASE WHEN $2 THEN clock_timestamp() END)
        ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp(), ended_at = excluded.ended_at",
    )
    .bind(gateway)
    .bind(is_orderly)
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await
}

/// The topics that were joined within a day, and how long ago.
pub(crate) async fn recent_topics(
    pool: &PgPool,
    limit: usize,
) -> Result<Vec<(String, Duration)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT topic, extract(epoch FROM clock_timestamp() - seen_at)::float8
        FROM tidegate.recent_topics
        WHERE seen_at > clock_timestamp() - interval '24 hours'
        ORDER BY seen_at DESC
        LIMIT $1",
    )
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            let seconds = row.try_get::<f64, _>(1)?.max(0.0);
            let age = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            Ok((row.try_get(0)?, age))
        })
        .collect()
}

/// Remembers that these topics were joined.
pub(crate) async fn note_recent_topics(
    pool: &PgPool,
    topics: &[String],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO tidegate.recent_topics (topic)
        SELECT DISTINCT topic FROM unnest($1::text[]) t (topic) ORDER BY topic
        ON CONFLICT (topic) DO UPDATE SET seen_at = clock_timestamp()",
    )
    .bind(topics)
    .execute(pool)
    .await
    .map(drop)
}

/// Deletes a batch of the history that is older than `keep`, if no other gateway is at it. Gives
/// how many rows.
pub(crate) async fn forget_history(pool: &PgPool, keep: Duration) -> Result<i32, sqlx::Error> {
    let forgotten = sqlx::query_scalar::<_, Option<i32>>(
        "SELECT CASE WHEN pg_try_advisory_xact_lock($1)
            THEN tidegate.forget_history(make_interval(secs => $2), $3) END",
    )
    .bind(FORGET_LOCK)
    .bind(keep.as_secs_f64())
    .bind(FORGET_BATCH)
    .fetch_one(pool)
    .await?;
    Ok(forgotten.unwrap_or(0))
}

/// Deletes what gateways have shared and no longer need.
pub(crate) async fn forget_shared(pool: &PgPool) -> Result<(), sqlx::Error> {
    for statement in [
        "DELETE FROM tidegate.lost_sockets WHERE at < clock_timestamp() - interval '24 hours'",
        "DELETE FROM tidegate.recent_topics WHERE seen_at < clock_timestamp() - interval '24 hours'",
        "DELETE FROM tidegate.gateways WHERE seen_at < clock_timestamp() - interval '48 hours'",
        "DELETE FROM tidegate.revocations WHERE until < clock_timestamp()",
    ] {
        sqlx::query(statement).execute(pool).await?;
    }
    Ok(())
}

/// What a role is to the policies on `realtime.messages`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PolicyRole {
    /// Postgres knows none of this name.
    Unknown,
    /// Bound by nothing, and nobody's role in a token.
    Superuser,
    /// Policies do not bind it: `service_role`.
    Bypasses,
    /// Policies decide.
    Bound,
}

/// Begins a question to the policies, each of whose statements may take `limit`. Gives what the
/// role is, and whether `realtime.messages` is there.
pub(crate) async fn begin_question(
    session: &mut PgConnection,
    role: &str,
    limit: Duration,
) -> Result<(PolicyRole, bool), sqlx::Error> {
    session.execute("BEGIN").await?;
    // A name is compared as text: cast to a name it would be cut to 63 bytes.
    let row = sqlx::query(
        "SELECT r.rolsuper, r.rolbypassrls, EXISTS (
                SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'realtime' AND c.relname = 'messages'),
            set_config('statement_timeout', $2, true)
        FROM (VALUES (1)) AS always LEFT JOIN pg_roles r ON r.rolname::text = $1",
    )
    .bind(role)
    .bind(limit.as_millis().max(1).to_string())
    .fetch_one(session)
    .await?;
    let role = match (row.try_get(0)?, row.try_get(1)?) {
        (None, _) => PolicyRole::Unknown,
        (Some(true), _) => PolicyRole::Superuser,
        (Some(false), Some(true)) => PolicyRole::Bypasses,
        (Some(false), Some(false) | None) => PolicyRole::Bound,
    };
    Ok((role, row.try_get(2)?))
}

/// Inserts a row of the topic for each extension, as the owner of the table. Gives their ids.
pub(crate) async fn insert_probes(
    session: &mut PgConnection,
    sub_topic: &str,
    extensions: &[&str],
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar("SELECT probe_id FROM tidegate.insert_probes($1, $2)")
        .bind(sub_topic)
        .bind(extensions)
        .fetch_all(session)
        .await
}

/// In whose name the policies are asked, and what they may look at.
#[derive(Debug)]
pub(crate) struct PolicyContext<'a> {
    /// `role` of the token.
    pub(crate) role: &'a str,
    /// `sub` of the token, or nothing.
    pub(crate) sub: &'a str,
    /// All claims, as JSON.
    pub(crate) claims: &'a str,
    /// Headers of the request, as a JSON object.
    pub(crate) headers: &'a str,
    /// The topic without its prefix.
    pub(crate) sub_topic: &'a str,
}

/// Becomes the token's role until the transaction ends.
pub(crate) async fn take_role(
    session: &mut PgConnection,
    context: &PolicyContext<'_>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "SELECT set_config('realtime.topic', $1, true), set_config('request.jwt.claims', $2, true),
            set_config('request.jwt.claim.sub', $3, true),
            set_config('request.jwt.claim.role', $4, true),
            set_config('request.headers', $5, true), set_config('role', $4, true)",
    )
    .bind(context.sub_topic)
    .bind(context.claims)
    .bind(context.sub)
    .bind(context.role)
    .bind(context.headers)
    .execute(session)
    .await
    .map(drop)
}

/// The extensions of those probes that the role may see.
pub(crate) async fn visible_probes(
    session: &mut PgConnection,
    probes: &[Uuid],
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT extension FROM realtime.messages WHERE id = ANY ($1)")
        .bind(probes)
        .fetch_all(session)
        .await
}

/// Inserts a broadcast's row as the role. Nothing is returned, so that only the policies for
/// inserting are asked.
pub(crate) async fn insert_broadcast(
    session: &mut PgConnection,
    sub_topic: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO realtime.messages (topic, extension) VALUES ($1, 'broadcast')")
        .bind(sub_topic)
        .execute(session)
        .await
        .map(drop)
}

/// Undoes everything since [`begin_question`], the role too.
pub(crate) async fn end_question(session: &mut PgConnection) -> Result<(), sqlx::Error> {
    session.execute("ROLLBACK").await.map(drop)
}

/// Invalidates an endpoint of an event, or the event and its media, for the viewers of every
/// gateway. Gives the payload.
pub(crate) async fn invalidate(
    database: impl PgExecutor<'_>,
    eid: &str,
    endpoint: Option<&str>,
) -> Result<String, sqlx::Error> {
    sqlx::query_scalar("SELECT public.manual_cache_invalidation($1, $2)::text")
        .bind(eid)
        .bind(endpoint)
        .fetch_one(database)
        .await
}

/// Keeps a revocation for the other gateways and the next process, and tells them.
pub(crate) async fn revoke(pool: &PgPool, revocation: &Revocation) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query(
        "INSERT INTO tidegate.revocations (claim, value, at, until)
        VALUES ($1, $2, to_timestamp($3), to_timestamp($4))
        ON CONFLICT (claim, value) DO UPDATE SET at = excluded.at, until = excluded.until",
    )
    .bind(revocation.by.claim())
    .bind(&*revocation.value)
    .bind(seconds(revocation.at))
    .bind(seconds(revocation.until))
    .execute(&mut *transaction)
    .await?;
    sqlx::query("SELECT pg_notify($1, '')")
        .bind(REVOCATIONS_CHANNEL)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await
}

/// The revocations that hold, those that hold longest first, at most so many.
pub(crate) async fn revocations(pool: &PgPool, max: usize) -> Result<Vec<Revocation>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT claim, value, extract(epoch FROM at)::bigint, ceil(extract(epoch FROM until))::bigint
        FROM tidegate.revocations
        WHERE until > clock_timestamp()
        ORDER BY until DESC
        LIMIT $1",
    )
    .bind(i64::try_from(max).unwrap_or(i64::MAX))
    .fetch_all(pool)
    .await?;
    let revocation = |row: &PgRow| {
        let by = By::named(row.get(0))?;
        let value: String = row.get(1);
        Some(Revocation { by, value: value.into(), at: row.get(2), until: row.get(3) })
    };
    Ok(rows.iter().filter_map(revocation).collect())
}

/// As a number that `to_timestamp` takes: not beyond the year 9999.
#[expect(clippy::cast_precision_loss, reason = "exact up to the bound")]
fn seconds(unix: i64) -> f64 {
    unix.clamp(0, 253_402_300_799) as f64
}

/// The text of each migration of the gateway's own schema, in order.
pub(crate) fn schema_files() -> impl Iterator<Item = &'static str> {
    SCHEMA.into_iter().map(|(_, _, sql)| sql)
}

/// The migrations of the gateway's own schema, in order.
pub(crate) fn migrations() -> Vec<Migration> {
    SCHEMA
        .into_iter()
        .map(|(version, description, sql)| {
            let kind = MigrationType::Simple;
            Migration::new(version, description.into(), kind, sql.into_sql_str(), false)
        })
        .collect()
}

/// Brings schema `tidegate` up to date, then runs the system file.
///
/// # Errors
/// [`MigrateError`]; what was done before stays, and running again goes on from there.
pub async fn migrate(url: &Secret) -> Result<(), MigrateError> {
    let mut connection = connect(url).await?;
    let mut migrator = Migrator::with_migrations(migrations());
    // In a schema of our own: nothing is left in `public` but what the system file names.
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    migrator.run(&mut connection).await.map_err(MigrateError::Schema)?;
    sqlx::raw_sql(SYSTEM_SQL).execute(&mut connection).await.map_err(MigrateError::System)?;
    connection.close().await.map_err(MigrateError::Connect)
}

/// Takes away what [`migrate`] has made, the history too; the role `tidegate` stays.
///
/// # Errors
/// [`MigrateError`]; nothing was taken away, unless only the end of the session failed.
pub async fn uninstall(url: &Secret) -> Result<(), MigrateError> {
    let mut connection = connect(url).await?;
    sqlx::raw_sql(UNINSTALL_SQL).execute(&mut connection).await.map_err(MigrateError::Uninstall)?;
    connection.close().await.map_err(MigrateError::Connect)
}

/// A session as the role that owns the tables.
async fn connect(url: &Secret) -> Result<PgConnection, MigrateError> {
    if url.is_empty() {
        return Err(MigrateError::NoUrl);
    }
    let options = options(url).map_err(MigrateError::Connect)?;
    timeout(CONNECT_TIMEOUT, options.connect())
        .await
        .map_err(|_elapsed| MigrateError::Unanswered)?
        .map_err(MigrateError::Connect)
}
