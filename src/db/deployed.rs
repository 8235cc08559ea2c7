//! What the database has of ours, and what Postgres counts: statements that read catalogs and
//! statistics.
//!
//! Invariants: they take no lock on a table, and need no right but to connect.

use sqlx::{PgConnection, Row, postgres::types::Oid};

/// A table, what triggers of ours tell of it, and what has been written to it.
#[derive(Debug)]
pub(crate) struct FoundTable {
    pub(crate) name: String,
    pub(crate) oid: Oid,
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
            SELECT c.relname::text AS name, c.oid AS root, c.oid, c.relkind
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = 'public' AND c.relname = ANY ($1) AND c.relkind IN ('r', 'p')
            UNION ALL
            SELECT p.name, p.root, c.oid, c.relkind
            FROM part p
            JOIN pg_inherits i ON i.inhparent = p.oid AND p.relkind = 'p'
            JOIN pg_class c ON c.oid = i.inhrelid
        )
        SELECT p.name, p.root, bit_and(coalesce((
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
        GROUP BY 1, 2",
    )
    .bind(names)
    .fetch_all(session)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(FoundTable {
                name: row.try_get(0)?,
                oid: row.try_get(1)?,
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
