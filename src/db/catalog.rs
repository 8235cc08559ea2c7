//! Statements that read the catalogs, the statistics, and what triggers have recorded.
//!
//! Invariants: the gateway's own role may run all of them; none writes; none reads a row of the
//! application's tables.

use std::time::Duration;

use sqlx::{PgConnection, PgPool, Postgres, Row, Transaction, postgres::types::Oid};

/// Begins a read-only transaction. Each of its statements may run, or wait for a lock, for `limit`.
pub(crate) async fn begin_reading(
    pool: &PgPool,
    limit: Duration,
) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query(
        "SELECT set_config('transaction_read_only', 'on', true),
            set_config('statement_timeout', $1, true), set_config('lock_timeout', $1, true)",
    )
    .bind(limit.as_millis().max(1).to_string())
    .execute(&mut *transaction)
    .await?;
    Ok(transaction)
}

/// Identity and state of the running server.
#[derive(Debug)]
pub(crate) struct ServerState {
    /// Changes with the database, with each start of the server, and with each reset of the
    /// statistics.
    pub(crate) run: String,
    /// Usage of the notification queue, from 0 to 1.
    pub(crate) notify_queue: f64,
}

/// Returns the identity and state of the server.
pub(crate) async fn server_state(session: &mut PgConnection) -> Result<ServerState, sqlx::Error> {
    let row = sqlx::query(
        "SELECT concat_ws(' ', d.oid, pg_postmaster_start_time(), pg_stat_get_db_stat_reset_time(d.oid)),
            pg_notification_queue_usage()
        FROM pg_database d WHERE d.datname = current_database()",
    )
    .fetch_one(session)
    .await?;
    Ok(ServerState { run: row.try_get(0)?, notify_queue: row.try_get(1)? })
}

/// Rows that triggers have recorded.
#[derive(Debug)]
pub(crate) struct Recorded {
    /// Snapshot in which the rows were counted, in the text form of `pg_snapshot`.
    pub(crate) seen: String,
    /// Number of new rows in the history, by the table whose trigger wrote them.
    pub(crate) history: Vec<(Option<String>, u64)>,
    /// Number of new failures.
    pub(crate) failures: u64,
    /// Time of the oldest row in the history, seconds since 1970.
    pub(crate) oldest: Option<f64>,
}

/// Counts the rows that triggers have recorded and that are not visible in the snapshot `since`,
/// given in the text form of `pg_snapshot`. Successive calls count each row once, also when ids are
/// committed out of order. Without `since` all counts are zero.
pub(crate) async fn recorded(
    session: &mut PgConnection,
    since: Option<&str>,
) -> Result<Recorded, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT pg_current_snapshot()::text, h.table_name, count(h.id),
            (SELECT count(*) FROM tidegate.trigger_failures f
                WHERE f.xact >= pg_snapshot_xmin($1::pg_snapshot)
                    AND NOT pg_visible_in_snapshot(f.xact, $1::pg_snapshot)),
            (SELECT extract(epoch FROM min(at))::float8 FROM tidegate.broadcast_history)
        FROM (VALUES (1)) AS always LEFT JOIN tidegate.broadcast_history h
            ON h.xact >= pg_snapshot_xmin($1::pg_snapshot)
                AND NOT pg_visible_in_snapshot(h.xact, $1::pg_snapshot)
        GROUP BY h.table_name",
    )
    .bind(since)
    .fetch_all(session)
    .await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let count = |row: &sqlx::postgres::PgRow, index: usize| {
        Ok::<_, sqlx::Error>(u64::try_from(row.try_get::<i64, _>(index)?).unwrap_or(0))
    };
    Ok(Recorded {
        seen: first.try_get(0)?,
        history: rows
            .iter()
            .map(|row| Ok((row.try_get(1)?, count(row, 2)?)))
            .collect::<Result<_, sqlx::Error>>()?,
        failures: count(first, 3)?,
        oldest: first.try_get(4)?,
    })
}

/// A table, the operations that the gateway's triggers cover, and the writes that Postgres counts.
#[derive(Debug)]
pub(crate) struct FoundTable {
    pub(crate) name: String,
    /// The table and its partitions.
    pub(crate) relations: Vec<Oid>,
    /// Operations for which the table and each of its partitions have a trigger, as bits of
    /// `tgtype`.
    pub(crate) covered: i32,
    /// Rows inserted.
    pub(crate) inserted: i64,
    /// Rows updated.
    pub(crate) updated: i64,
    /// Rows deleted.
    pub(crate) deleted: i64,
}

/// Returns those of the named tables that exist in schema `public`. Postgres counts writes and
/// fires triggers per partition: an operation is covered if every partition has a trigger for it,
/// and the counts of all partitions are added.
pub(crate) async fn tables(
    session: &mut PgConnection,
    names: &[&str],
) -> Result<Vec<FoundTable>, sqlx::Error> {
    let rows = sqlx::query(
        "WITH RECURSIVE part AS (
            SELECT c.relname::text AS name, c.oid, c.relkind
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = 'public' AND c.relname = ANY ($1) AND c.relkind IN ('r', 'p')
            UNION ALL
            SELECT p.name, c.oid, c.relkind
            FROM part p
            JOIN pg_inherits i ON i.inhparent = p.oid AND p.relkind = 'p'
            JOIN pg_class c ON c.oid = i.inhrelid
        )
        SELECT p.name, array_agg(p.oid ORDER BY p.oid), bit_and(coalesce((
                SELECT bit_or(t.tgtype::integer)
                FROM pg_trigger t
                JOIN pg_proc f ON f.oid = t.tgfoid
                JOIN pg_namespace n ON n.oid = f.pronamespace
                WHERE t.tgrelid = p.oid AND n.nspname = 'tidegate' AND f.proname = 'cache_invalidation'
                    -- Enabled, for each row, after it, whatever its columns and values.
                    AND t.tgenabled IN ('O', 'A') AND t.tgtype::integer & 67 = 1
                    AND t.tgattr::text = '' AND t.tgqual IS NULL
            ), 0)),
            sum(pg_stat_get_tuples_inserted(p.oid))::bigint,
            sum(pg_stat_get_tuples_updated(p.oid))::bigint,
            sum(pg_stat_get_tuples_deleted(p.oid))::bigint
        FROM part p
        GROUP BY p.name",
    )
    .bind(names)
    .fetch_all(session)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(FoundTable {
                name: row.try_get(0)?,
                relations: row.try_get(1)?,
                covered: row.try_get(2)?,
                inserted: row.try_get(3)?,
                updated: row.try_get(4)?,
                deleted: row.try_get(5)?,
            })
        })
        .collect()
}

/// A function of the database.
#[derive(Debug)]
pub(crate) struct FoundFunction {
    /// Name with schema: `tidegate.publish`.
    pub(crate) name: String,
    /// Types of the arguments: `text, text, jsonb`.
    pub(crate) arguments: String,
    /// Source text.
    pub(crate) body: String,
    /// Whether the function is SECURITY DEFINER.
    pub(crate) is_definer: bool,
    /// Settings that hold while the function runs: `name=value`.
    pub(crate) settings: Vec<String>,
}

/// Returns all functions with one of these names (`schema.name`), whatever their arguments.
pub(crate) async fn functions(
    session: &mut PgConnection,
    names: &[&str],
) -> Result<Vec<FoundFunction>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT n.nspname || '.' || p.proname, oidvectortypes(p.proargtypes), p.prosrc, p.prosecdef,
            coalesce(p.proconfig, '{}')
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname IN ('tidegate', 'public') AND n.nspname || '.' || p.proname = ANY ($1)",
    )
    .bind(names)
    .fetch_all(session)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(FoundFunction {
                name: row.try_get(0)?,
                arguments: row.try_get(1)?,
                body: row.try_get(2)?,
                is_definer: row.try_get(3)?,
                settings: row.try_get(4)?,
            })
        })
        .collect()
}

/// Returns number and checksum of each migration that has run; `None` if the role may not read the
/// table of migrations.
pub(crate) async fn applied_migrations(
    session: &mut PgConnection,
) -> Result<Option<Vec<(i64, Vec<u8>)>>, sqlx::Error> {
    let is_readable = sqlx::query_scalar(
        "SELECT has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'tidegate' AND c.relname = 'migrations'",
    )
    .fetch_optional(&mut *session)
    .await?;
    match is_readable {
        None => Ok(Some(Vec::new())),
        Some(false) => Ok(None),
        Some(true) => {
            let rows =
                sqlx::query("SELECT version, checksum FROM tidegate.migrations WHERE success")
                    .fetch_all(session)
                    .await?;
            rows.iter()
                .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
                .collect::<Result<_, _>>()
                .map(Some)
        }
    }
}
