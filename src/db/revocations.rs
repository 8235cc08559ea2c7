//! Statements about revocations, which all gateways of one database share.

use sqlx::{PgPool, Row};

/// The NOTIFY channel on which gateways hear that the revocations have changed.
pub(crate) const REVOCATIONS_CHANNEL: &str = "tidegate_revocations";

/// A row of `tidegate.revocations`.
#[derive(Debug)]
pub(crate) struct RevocationRow {
    /// The name of the claim: `sub`, `session_id` or `jti`.
    pub(crate) claim: String,
    /// The claim's value.
    pub(crate) value: String,
    /// Time of the revocation, seconds since 1970.
    pub(crate) at: i64,
    /// Time at which the revocation ends, seconds since 1970.
    pub(crate) until: i64,
}

/// Stores a revocation for the other gateways and for the next process, and notifies the other
/// gateways, in one transaction.
pub(crate) async fn revoke(pool: &PgPool, revocation: &RevocationRow) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query(
        "INSERT INTO tidegate.revocations (claim, value, at, until)
        VALUES ($1, $2, to_timestamp($3), to_timestamp($4))
        ON CONFLICT (claim, value) DO UPDATE SET at = excluded.at, until = excluded.until",
    )
    .bind(&revocation.claim)
    .bind(&revocation.value)
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

/// Returns the revocations in force, at most `max`: those that end last come first.
pub(crate) async fn revocations(
    pool: &PgPool,
    max: usize,
) -> Result<Vec<RevocationRow>, sqlx::Error> {
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
    rows.iter()
        .map(|row| {
            Ok(RevocationRow {
                claim: row.try_get(0)?,
                value: row.try_get(1)?,
                at: row.try_get(2)?,
                until: row.try_get(3)?,
            })
        })
        .collect()
}

/// Converts a time to the number that `to_timestamp` takes, at most the end of the year 9999.
#[expect(clippy::cast_precision_loss, reason = "exact up to the bound")]
fn seconds(unix: i64) -> f64 {
    unix.clamp(0, 253_402_300_799) as f64
}
