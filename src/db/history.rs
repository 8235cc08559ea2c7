//! Statements about the messages that triggers have sent: snapshots and canaries, the history of
//! messages, the failures of triggers, retention.
//!
//! Invariant: a row is newer than a snapshot if its transaction is not visible in it; ids are not
//! compared, because transactions commit in another order than they take ids.

use std::time::Duration;

use sqlx::{
    PgPool, Row,
    postgres::{PgExecutor, PgListener},
};

/// Most changed endpoints that [`changed_since`] returns; its statement reads one more.
const CHANGED_MAX: usize = 100_000;

/// Advisory lock that one gateway at a time holds while it prunes the history: `tidegate` in ASCII.
const PRUNE_LOCK: i64 = 0x7469_6465_6761_7465;
/// Most rows that one call of [`prune_history`] deletes.
pub(crate) const PRUNE_BATCH: i32 = 1_000;

/// The transactions that were committed at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// In the text form of `pg_snapshot`: `xmin:xmax:xip,…`.
    pub(crate) xacts: String,
    /// The server's clock at that moment, in the text form of `timestamptz`.
    pub(crate) at: String,
}

impl Snapshot {
    /// Returns the first transaction id that was not yet assigned.
    pub(crate) fn xmax(&self) -> Option<u64> {
        self.xacts.split(':').nth(1)?.parse().ok()
    }
}

/// Takes a snapshot.
pub(crate) async fn snapshot(listener: &mut PgListener) -> Result<Snapshot, sqlx::Error> {
    let row = sqlx::query("SELECT pg_current_snapshot()::text, clock_timestamp()::text")
        .fetch_one(listener)
        .await?;
    Ok(Snapshot { xacts: row.try_get(0)?, at: row.try_get(1)? })
}

/// Notifies `nonce` on `channel`. Returns the snapshot that was taken before.
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

/// A message that a trigger failed to send.
#[derive(Debug)]
pub(crate) struct TriggerFailure {
    /// The event, if the trigger knew it.
    pub(crate) eid: Option<String>,
    /// Whether the message is in the history: only the notification failed, because the queue was
    /// too full.
    pub(crate) is_in_history: bool,
}

/// Returns the failures of triggers that were recorded after `since` and by which a viewer may have
/// missed something, with the snapshot in which they were read. Both snapshots are in the text form
/// of `pg_snapshot`.
///
/// Left out are failures without an event to notify, failures after which the message was sent and
/// only the history lacks it, and failures that concern `auction_winner` alone. A transaction records
/// at most ten failures and the table holds about a thousand: where failures may have been cut off,
/// a failure without an event is returned, because any event may be affected.
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

/// Returns whether the history may lack a message that was committed after `since`, because a trigger
/// could not write it or because it is older than `keep`.
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

/// An endpoint of an event that the history names.
#[derive(Debug)]
pub(crate) struct Changed {
    /// The event.
    pub(crate) eid: String,
    /// `None` stands for a message without endpoints.
    pub(crate) endpoint: Option<String>,
    /// Whether one of the messages is a pointer, which stands for all endpoints of the event.
    pub(crate) is_pointer: bool,
}

/// Returns the endpoints of these events that the history names in messages committed after `since`
/// or within the 60 seconds before it.
///
/// # Errors
/// [`sqlx::Error::Protocol`] if there are more than 100,000; then the caller resends everything.
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

/// Returns the endpoints that the events have, and those that the history names within 24 hours:
/// `(eid, endpoint)`.
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

/// Returns at most `max` events that the database knows: those with a row of `events`, which those
/// with artworks have, and those of the history.
pub(crate) async fn known_events(pool: &PgPool, max: i32) -> Result<Vec<String>, sqlx::Error> {
    // The index is searched once for each event of the history, however many rows that has.
    sqlx::query_scalar(
        "WITH RECURSIVE told AS (
            (SELECT eid FROM tidegate.broadcast_history ORDER BY eid LIMIT 1)
            UNION ALL
            SELECT (SELECT h.eid FROM tidegate.broadcast_history h
                WHERE h.eid > told.eid ORDER BY h.eid LIMIT 1)
            FROM told WHERE told.eid IS NOT NULL
        )
        SELECT eid FROM (
            SELECT eid FROM tidegate.known_events($1) AS eid
            UNION
            (SELECT eid FROM told WHERE eid IS NOT NULL LIMIT $1)
        ) AS known LIMIT $1",
    )
    .bind(max)
    .fetch_all(pool)
    .await
}

/// Invalidates one endpoint of an event, or the event and its media, for the viewers of every
/// gateway. Returns the payload that was notified.
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

/// Deletes at most [`PRUNE_BATCH`] rows of the history that are older than `keep`, unless another
/// gateway is pruning. Returns the number of deleted rows.
pub(crate) async fn prune_history(pool: &PgPool, keep: Duration) -> Result<i32, sqlx::Error> {
    let pruned = sqlx::query_scalar::<_, Option<i32>>(
        "SELECT CASE WHEN pg_try_advisory_xact_lock($1)
            THEN tidegate.forget_history(make_interval(secs => $2), $3) END",
    )
    .bind(PRUNE_LOCK)
    .bind(keep.as_secs_f64())
    .bind(PRUNE_BATCH)
    .fetch_one(pool)
    .await?;
    Ok(pruned.unwrap_or(0))
}
