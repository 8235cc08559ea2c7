//! Revocations that all gateways of one database know of.

use sqlx::{PgPool, Row, postgres::PgRow};

use crate::auth::revocations::{By, Revocation};

/// Tells gateways that the revocations have changed.
pub(crate) const REVOCATIONS_CHANNEL: &str = "tidegate_revocations";

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
