//! Statements about what the gateways of one database share: heartbeats, sockets that stopped
//! gateways have lost, topics that were joined recently.

use std::time::Duration;

use sqlx::{PgPool, Row};
use uuid::Uuid;

/// A topic that a client held when its socket ended.
#[derive(Debug)]
pub(crate) struct LostSocket {
    /// Hash of the client's address and `User-Agent`.
    pub(crate) client: Uuid,
    /// Without `realtime:`.
    pub(crate) topic: String,
    /// Time since the socket's last data frame.
    pub(crate) age: Duration,
}

/// Records that this gateway is alive. Returns whether another gateway is alive, or has died within
/// 24 hours without an orderly end.
pub(crate) async fn heartbeat(pool: &PgPool, gateway: Uuid) -> Result<bool, sqlx::Error> {
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

/// Returns the lost sockets that other gateways have recorded within the last `within`.
pub(crate) async fn lost_sockets(
    pool: &PgPool,
    gateway: Uuid,
    within: Duration,
) -> Result<Vec<LostSocket>, sqlx::Error> {
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
            Ok(LostSocket {
                client: row.try_get(0)?,
                topic: row.try_get(1)?,
                age: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX),
            })
        })
        .collect()
}

/// Records this gateway's lost sockets and, if `is_orderly`, its end, in one transaction.
pub(crate) async fn deregister(
    pool: &PgPool,
    gateway: Uuid,
    is_orderly: bool,
    records: &[LostSocket],
) -> Result<(), sqlx::Error> {
    let clients: Vec<_> = records.iter().map(|lost| lost.client).collect();
    let topics: Vec<_> = records.iter().map(|lost| &*lost.topic).collect();
    let ages: Vec<_> = records.iter().map(|lost| lost.age.as_secs_f64()).collect();
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

/// Returns the topics that were joined within 24 hours, at most `limit`, the latest first, each with
/// the time since then.
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

/// Records that these topics have been joined.
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

/// Returns those of the events that the database has, each with whether everybody may know it.
pub(crate) async fn event_standings(
    pool: &PgPool,
    eids: &[&str],
) -> Result<Vec<(String, bool)>, sqlx::Error> {
    sqlx::query_as("SELECT event_eid, is_public FROM tidegate.event_standings($1)")
        .bind(eids)
        .fetch_all(pool)
        .await
}

/// Deletes lost sockets, recent topics, gateways and revocations that are past their time.
pub(crate) async fn prune_shared(pool: &PgPool) -> Result<(), sqlx::Error> {
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
