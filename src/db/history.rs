//! What triggers have written down: the history of broadcasts, and what they could not do.

use std::time::Duration;

use sqlx::{
    PgPool, Row,
    postgres::{PgExecutor, PgListener},
};

/// More changed endpoints than this are not told one by one.
const CHANGED_MAX: usize = 100_000;

/// Under which gateways take turns in deleting what is over: `tidegate` in ASCII.
const FORGET_LOCK: i64 = 0x7469_6465_6761_7465;
/// Rows of the history that are deleted at a time.
pub(crate) const FORGET_BATCH: i32 = 1_000;

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
