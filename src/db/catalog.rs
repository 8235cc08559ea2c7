//! What the database has of ours, and what it counts: statements that only read.
//!
//! Invariant: the gateway's own role may run them all, and of the application's tables they read
//! what catalogs and statistics say.

use std::time::Duration;

use sqlx::{PgConnection, PgPool, Postgres, Row, Transaction, postgres::types::Oid};

/// A transaction that reads, each of whose statements may take `limit` and wait for no lock longer.
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

/// The server as it runs.
#[derive(Debug)]
pub(crate) struct Server {
    /// Tells this run of this database from any other, and the statistics from those after a reset.
    pub(crate) run: String,
    /// How full the queue of notifications is, from 0 to 1.
    pub(crate) notify_queue: f64,
}

/// Which server this is, and how it fares.
pub(crate) async fn server(session: &mut PgConnection) -> Result<Server, sqlx::Error> {
    let row = sqlx::query(
        "SELECT concat_ws(' ', d.oid, pg_postmaster_start_time(), pg_stat_get_db_stat_reset_time(d.oid)),
            pg_notification_queue_usage()
        FROM pg_database d WHERE d.datname = current_database()",
    )
    .fetch_one(session)
    .await?;
    Ok(Server { run: row.try_get(0)?, notify_queue: row.try_get(1)? })
}

/// What triggers have written down.
#[derive(Debug)]
pub(crate) struct Recorded {
    /// What this has counted, as `pg_snapshot` writes it.
    pub(crate) seen: String,
    /// New rows of the history, by the table that caused them.
    pub(crate) history: Vec<(Option<String>, u64)>,
    /// New failures.
    pub(crate) failures: u64,
    /// When the oldest row of the history was written, seconds since 1970.
    pub(crate) oldest: Option<f64>,
}

/// What triggers have written down that `since` had not seen, as `pg_snapshot` writes it: each row
/// once, whatever the order of ids and commits; nothing if there is no `since`.
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

/// A table, what triggers of ours tell of it, and what has been written to it.
#[derive(Debug)]
pub(crate) struct FoundTable {
    pub(crate) name: String,
    /// Itself and its partitions.
    pub(crate) relations: Vec<Oid>,
    /// The operations that it and each of its partitions have a trigger for, as bits of `tgtype`.
    pub(crate) told: i32,
    pub(crate) inserted: i64,
    pub(crate) updated: i64,
    pub(crate) deleted: i64,
}

/// Those of the tables in schema `public` that exist. A partition's rows are written and told of by
/// itself, so all must have the triggers, and their counts are summed.
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
                told: row.try_get(2)?,
                inserted: row.try_get(3)?,
                updated: row.try_get(4)?,
                deleted: row.try_get(5)?,
            })
        })
        .collect()
}

/// A function as the catalog has it.
#[derive(Debug)]
pub(crate) struct FoundFunction {
    /// With its schema.
    pub(crate) name: String,
    /// The types of its arguments.
    pub(crate) arguments: String,
    pub(crate) body: String,
    pub(crate) is_definer: bool,
    /// `name=value`.
    pub(crate) settings: Vec<String>,
}

/// The functions of these names, with their schemas, whatever their arguments.
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

/// The migrations that have run, number and checksum; none if the role may not read them.
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
