//! Statements of `tidegate doctor`.
//!
//! Invariant: none leaves a row behind, except an invalidation of the doctor's own event, which is
//! deleted from the history if the role has the right.

use std::time::Duration;

use serde::Deserialize;
use sqlx::{Executor, PgConnection, Row};

use super::deployed::TRIGGERS;

/// Tries to change each table. The caller's transaction rolls the changes back.
const DRY_RUN: &str = include_str!("dry_run.sql");

/// Version, role and state of a server.
#[derive(Debug)]
pub(crate) struct DatabaseServer {
    /// `150004`.
    pub(crate) version_number: i32,
    /// `15.4 (Debian …)`.
    pub(crate) version: String,
    /// Whether the server is a standby.
    pub(crate) is_in_recovery: bool,
    /// `replica`, `logical` or `minimal`.
    pub(crate) wal_level: String,
    /// Usage of the notification queue, from 0 to 1.
    pub(crate) queue: f64,
    /// The session's role.
    pub(crate) role: String,
    /// The session's database.
    pub(crate) database: String,
}

/// Returns version, role and state of the server.
pub(crate) async fn server(session: &mut PgConnection) -> Result<DatabaseServer, sqlx::Error> {
    let row = session
        .fetch_one(
            "SELECT current_setting('server_version_num')::integer, current_setting('server_version'),
                pg_is_in_recovery(), current_setting('wal_level'),
                pg_notification_queue_usage()::float8, current_user::text, current_database()::text",
        )
        .await?;
    Ok(DatabaseServer {
        version_number: row.try_get(0)?,
        version: row.try_get(1)?,
        is_in_recovery: row.try_get(2)?,
        wal_level: row.try_get(3)?,
        queue: row.try_get(4)?,
        role: row.try_get(5)?,
        database: row.try_get(6)?,
    })
}

/// Returns the server's clock, seconds since 1970.
pub(crate) async fn clock(session: &mut PgConnection) -> Result<f64, sqlx::Error> {
    session.fetch_one("SELECT extract(epoch FROM clock_timestamp())::float8").await?.try_get(0)
}

/// Limits the time that each statement of the session may run to `limit`, and the time that it may
/// wait for a lock to 500 ms.
pub(crate) async fn limit(session: &mut PgConnection, limit: Duration) -> Result<(), sqlx::Error> {
    let limit = limit.as_millis().to_string();
    sqlx::query(
        "SELECT set_config('statement_timeout', $1, false), set_config('lock_timeout', '500ms', false)",
    )
    .bind(limit)
    .execute(session)
    .await
    .map(drop)
}

/// A database object that the gateway needs and the role cannot use.
#[derive(Debug)]
pub(crate) struct Need {
    /// `tidegate.gateways`
    pub(crate) object: String,
    /// The missing rights, in the form that GRANT takes: `SELECT, INSERT ON
    /// tidegate.lost_sockets`.
    pub(crate) grant: String,
    /// Whether the object does not exist. If it exists, the role lacks rights.
    pub(crate) is_absent: bool,
}

/// Returns the gateway's objects that do not exist or to which the role lacks rights.
pub(crate) async fn needs(session: &mut PgConnection) -> Result<Vec<Need>, sqlx::Error> {
    let rows = session
        .fetch_all(
            "WITH needs (schema, name, kind, right_to) AS (VALUES
                ('tidegate', 'tidegate', 'schema', 'USAGE'),
                ('tidegate', 'trigger_failures', 'table', 'SELECT'),
                ('tidegate', 'broadcast_history', 'table', 'SELECT'),
                ('tidegate', 'gateways', 'table', 'SELECT'), ('tidegate', 'gateways', 'table', 'INSERT'),
                ('tidegate', 'gateways', 'table', 'UPDATE'), ('tidegate', 'gateways', 'table', 'DELETE'),
                ('tidegate', 'lost_sockets', 'table', 'SELECT'),
                ('tidegate', 'lost_sockets', 'table', 'INSERT'),
                ('tidegate', 'lost_sockets', 'table', 'DELETE'),
                ('tidegate', 'recent_topics', 'table', 'SELECT'),
                ('tidegate', 'recent_topics', 'table', 'INSERT'),
                ('tidegate', 'recent_topics', 'table', 'UPDATE'),
                ('tidegate', 'recent_topics', 'table', 'DELETE'),
                ('tidegate', 'revocations', 'table', 'SELECT'),
                ('tidegate', 'revocations', 'table', 'INSERT'),
                ('tidegate', 'revocations', 'table', 'UPDATE'),
                ('tidegate', 'revocations', 'table', 'DELETE'),
                ('public', 'manual_cache_invalidation', 'function', 'EXECUTE'),
                ('public', 'get_cache_invalidation_stats', 'function', 'EXECUTE'),
                ('tidegate', 'event_endpoints', 'function', 'EXECUTE'),
                ('tidegate', 'event_standings', 'function', 'EXECUTE'),
                ('tidegate', 'known_events', 'function', 'EXECUTE'),
                ('tidegate', 'forget_history', 'function', 'EXECUTE'),
                ('tidegate', 'insert_probes', 'function', 'EXECUTE')
            ), found AS (
                SELECT needs.*, CASE kind
                    WHEN 'schema' THEN (
                        SELECT has_schema_privilege(n.oid, right_to)
                        FROM pg_namespace n WHERE n.nspname = schema)
                    WHEN 'table' THEN (
                        SELECT has_table_privilege(c.oid, right_to)
                        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                        WHERE n.nspname = schema AND c.relname = needs.name)
                    ELSE (
                        SELECT bool_and(has_function_privilege(p.oid, right_to))
                        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                        WHERE n.nspname = schema AND p.proname = needs.name)
                END AS has
                FROM needs
            )
            SELECT CASE kind WHEN 'schema' THEN name ELSE schema || '.' || name END,
                string_agg(right_to, ', ') || ' ON '
                    || CASE kind WHEN 'table' THEN '' ELSE upper(kind) || ' ' END
                    || CASE kind WHEN 'schema' THEN name ELSE schema || '.' || name END,
                bool_or(has IS NULL)
            FROM found WHERE has IS NOT TRUE
            GROUP BY kind, schema, name
            ORDER BY kind, schema, name",
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Need { object: row.try_get(0)?, grant: row.try_get(1)?, is_absent: row.try_get(2)? })
        })
        .collect()
}

/// Returns the rights of the role that a gateway does not need, each as the end of a sentence that
/// begins with the role's name. For a superuser that is the only one.
pub(crate) async fn powers(session: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "WITH me AS (SELECT * FROM pg_roles WHERE rolname = current_user),
        tables (name) AS (SELECT unnest($1::text[]))
        SELECT 'is a superuser' FROM me WHERE me.rolsuper
        UNION ALL SELECT 'bypasses row-level security' FROM me WHERE rolbypassrls AND NOT me.rolsuper
        UNION ALL SELECT 'may make roles' FROM me WHERE rolcreaterole AND NOT me.rolsuper
        UNION ALL SELECT 'may make databases' FROM me WHERE rolcreatedb AND NOT me.rolsuper
        UNION ALL SELECT 'may replicate' FROM me WHERE rolreplication AND NOT me.rolsuper
        UNION ALL SELECT 'owns ' || string_agg(t.name, ', ' ORDER BY t.name)
            FROM me, tables t JOIN pg_class c ON c.relname = t.name
            JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'public'
            WHERE c.relowner = me.oid AND NOT me.rolsuper HAVING count(*) > 0
        UNION ALL SELECT 'may write ' || string_agg(t.name, ', ' ORDER BY t.name)
            FROM me, tables t JOIN pg_class c ON c.relname = t.name
            JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'public'
            WHERE c.relowner <> me.oid AND NOT me.rolsuper
                AND has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
            HAVING count(*) > 0
        UNION ALL SELECT 'may change what the history says' FROM me
            WHERE NOT me.rolsuper AND (
                EXISTS (
                    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                    WHERE n.nspname = 'tidegate' AND c.relname = 'broadcast_history'
                        AND has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE'))
                OR EXISTS (
                    SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                    WHERE n.nspname = 'tidegate' AND p.proname = 'forget_person'
                        AND has_function_privilege(p.oid, 'EXECUTE')))
        UNION ALL SELECT 'is a member of ' || string_agg(r.rolname, ', ' ORDER BY r.rolname)
            FROM me JOIN pg_auth_members m ON m.member = me.oid JOIN pg_roles r ON r.oid = m.roleid
            WHERE NOT me.rolsuper AND r.rolname NOT IN ('anon', 'authenticated') HAVING count(*) > 0
        UNION ALL SELECT 'has the rights of ' || string_agg(r.rolname, ', ' ORDER BY r.rolname)
                || ' all the time'
            FROM me JOIN pg_auth_members m ON m.member = me.oid JOIN pg_roles r ON r.oid = m.roleid
            WHERE NOT me.rolsuper AND r.rolname IN ('anon', 'authenticated')
                AND pg_has_role(r.oid, 'USAGE')
            HAVING count(*) > 0",
    )
    .bind(TRIGGERS.map(|trigger| trigger.table))
    .fetch_all(session)
    .await
}

/// Returns the rights that roles of browsers have to the gateway's objects, at most 20: `anon may
/// call tidegate.forget_history`.
pub(crate) async fn browser_rights(session: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "WITH browsers (name) AS (
            VALUES ('public'::name)
            UNION ALL SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated')
        )
        SELECT b.name || ' may use schema tidegate'
        FROM browsers b, pg_namespace n
        WHERE n.nspname = 'tidegate' AND has_schema_privilege(b.name, n.oid, 'USAGE, CREATE')
        UNION ALL
        SELECT b.name || ' may use tidegate.' || c.relname
        FROM browsers b, pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'tidegate' AND c.relkind IN ('r', 'p', 'v', 'm')
            AND has_table_privilege(b.name, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')
        UNION ALL
        SELECT b.name || ' may call ' || n.nspname || '.' || p.proname
        FROM browsers b, pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE (n.nspname = 'tidegate' OR n.nspname = 'public' AND p.proname IN (
                'manual_cache_invalidation', 'get_cache_invalidation_stats',
                'enable_cache_invalidation', 'disable_cache_invalidation'))
            AND has_function_privilege(b.name, p.oid, 'EXECUTE')
        LIMIT 20",
    )
    .fetch_all(session)
    .await
}

/// Returns the functions of other programs' triggers on the same tables that are SECURITY DEFINER and
/// do not pin their `search_path`, at most 20.
pub(crate) async fn unpinned_neighbours(
    session: &mut PgConnection,
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT DISTINCT n.nspname || '.' || p.proname
        FROM pg_trigger t
        JOIN pg_class c ON c.oid = t.tgrelid
        JOIN pg_namespace s ON s.oid = c.relnamespace
        JOIN pg_proc p ON p.oid = t.tgfoid
        JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE s.nspname = 'public' AND c.relname = ANY ($1) AND n.nspname <> 'tidegate'
            AND NOT t.tgisinternal AND p.prosecdef
            AND NOT EXISTS (SELECT FROM unnest(p.proconfig) s WHERE s LIKE 'search_path=%')
        LIMIT 20",
    )
    .bind(TRIGGERS.map(|trigger| trigger.table))
    .fetch_all(session)
    .await
}

/// Returns other programs' triggers on the same tables that seem to send the same notifications, at
/// most 20: `public.f on votes`.
pub(crate) async fn doubles(session: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT DISTINCT n.nspname || '.' || p.proname || ' on ' || c.relname
        FROM pg_trigger t
        JOIN pg_class c ON c.oid = t.tgrelid
        JOIN pg_namespace s ON s.oid = c.relnamespace
        JOIN pg_proc p ON p.oid = t.tgfoid
        JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE s.nspname = 'public' AND c.relname = ANY ($1) AND n.nspname <> 'tidegate'
            AND NOT t.tgisinternal AND t.tgenabled NOT IN ('D', 'R')
            AND p.prosrc LIKE '%pg_notify%' AND p.prosrc LIKE '%cache_invalidate%'
        LIMIT 20",
    )
    .bind(TRIGGERS.map(|trigger| trigger.table))
    .fetch_all(session)
    .await
}

/// Returns the number of failures that triggers have recorded within 24 hours and a description of
/// the last one; `None` if there is none.
pub(crate) async fn recent_failures(
    session: &mut PgConnection,
) -> Result<Option<(i64, String)>, sqlx::Error> {
    let row = session
        .fetch_optional(
            "SELECT count(*) OVER (),
                concat_ws(' ', table_name, operation, event_eid, sqlstate, message)
                    || ', ' || date_trunc('second', clock_timestamp() - at) || ' ago'
            FROM tidegate.trigger_failures
            WHERE at > clock_timestamp() - interval '24 hours'
            ORDER BY id DESC
            LIMIT 1",
        )
        .await?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose()
}

/// Contents of the history.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Age of the oldest message, in seconds; `None` if the history is empty.
    pub(crate) oldest: Option<f64>,
    /// Age of the newest message that is not the doctor's own, in seconds.
    pub(crate) newest: Option<f64>,
    /// Number of messages within the last hour.
    pub(crate) in_an_hour: i64,
    /// The event with the most messages within one minute of the last hour, and their number.
    pub(crate) busiest: Option<(String, i64)>,
    /// Event and endpoint of a message that names an endpoint of another event.
    pub(crate) foreign: Option<(String, String)>,
}

/// Returns the contents of the history; `canary` is the doctor's own event.
pub(crate) async fn kept(session: &mut PgConnection, canary: &str) -> Result<Kept, sqlx::Error> {
    let row = sqlx::query(
        "WITH latest AS MATERIALIZED (
            SELECT eid, type, endpoints, at FROM tidegate.broadcast_history
            WHERE at > clock_timestamp() - interval '1 hour' AND eid <> $1
        ), busiest AS (
            SELECT eid, count(*) AS count FROM latest
            GROUP BY eid, date_trunc('minute', at) ORDER BY 2 DESC LIMIT 1
        ), alien AS (
            SELECT eid, endpoint FROM latest, unnest(endpoints) e (endpoint)
            -- What an operator names is the operator's own.
            WHERE type IS DISTINCT FROM 'manual_invalidation'
                AND endpoint !~ ('^/live/event/' || eid || '([/-]|$)')
            LIMIT 1
        )
        SELECT
            (SELECT extract(epoch FROM clock_timestamp() - min(at)) FROM tidegate.broadcast_history)::float8,
            (SELECT extract(epoch FROM clock_timestamp() - max(at))
                FROM tidegate.broadcast_history WHERE eid <> $1)::float8,
            (SELECT count(*) FROM latest),
            (SELECT eid FROM busiest), (SELECT count FROM busiest),
            (SELECT eid FROM alien), (SELECT endpoint FROM alien)",
    )
    .bind(canary)
    .fetch_one(session)
    .await?;
    let busiest = row.try_get::<Option<String>, _>(3)?.zip(row.try_get::<Option<i64>, _>(4)?);
    let foreign = row.try_get::<Option<String>, _>(5)?.zip(row.try_get::<Option<String>, _>(6)?);
    Ok(Kept {
        oldest: row.try_get(0)?,
        newest: row.try_get(1)?,
        in_an_hour: row.try_get(2)?,
        busiest,
        foreign,
    })
}

/// TriedOutcome of a change that was tried on one table.
#[derive(Debug, Deserialize)]
pub(crate) struct Tried {
    /// The table in schema `public`.
    pub(crate) table: String,
    /// Result of the attempt.
    pub(crate) outcome: TriedOutcome,
    /// `INSERT` or `UPDATE`; `None` if nothing was tried.
    pub(crate) operation: Option<String>,
    /// Messages that the triggers would have sent.
    pub(crate) told: Vec<Told>,
    /// The failure that a trigger has recorded, the error of Postgres, or the name of the trigger
    /// because of which nothing was tried.
    pub(crate) message: Option<String>,
}

/// A message that a trigger would have sent.
#[derive(Debug, Deserialize)]
pub(crate) struct Told {
    /// The event.
    pub(crate) eid: String,
    /// The message's type.
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    /// The endpoints to fetch again.
    pub(crate) endpoints: Vec<String>,
}

/// Result of an attempt, in the words of `dry_run.sql`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TriedOutcome {
    /// A trigger would have sent a message.
    Told,
    /// The change would have sent no message.
    Silent,
    /// Postgres refused every attempt.
    Refused,
    /// The table has no row to update.
    Empty,
    /// The table does not exist.
    Absent,
    /// The role lacks rights to the table.
    Closed,
    /// Nothing was tried: another trigger may have effects that no rollback undoes.
    Outside,
}

/// Tries a change of each table in a transaction that is rolled back. If the session is dropped
/// before its end, the server rolls back.
pub(crate) async fn dry_run(session: &mut PgConnection) -> Result<Vec<Tried>, sqlx::Error> {
    session.execute("BEGIN").await?;
    let tried = async {
        session.execute(DRY_RUN).await?;
        session.fetch_one("SELECT current_setting('tidegate.doctor')").await?.try_get(0)
    };
    let tried: Result<String, _> = tried.await;
    session.execute("ROLLBACK").await?;
    serde_json::from_str(&tried?).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// Sends a notification.
pub(crate) async fn notify(
    session: &mut PgConnection,
    channel: &str,
    payload: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT pg_notify($1, $2)")
        .bind(channel)
        .bind(payload)
        .execute(session)
        .await
        .map(drop)
}

/// Deletes the messages of the doctor's own event from the history. Returns their number.
pub(crate) async fn forget_event(
    session: &mut PgConnection,
    eid: &str,
) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query("DELETE FROM tidegate.broadcast_history WHERE eid = $1")
        .bind(eid)
        .execute(session)
        .await?;
    Ok(deleted.rows_affected())
}
