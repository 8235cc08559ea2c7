//! Statements of one query to the policies on `realtime.messages`.
//!
//! Invariant: a query is one transaction, from [`begin`] to [`roll_back`], and leaves no row behind.

use std::time::Duration;

use sqlx::{Executor, PgConnection, Row};
use uuid::Uuid;

/// How the policies on `realtime.messages` apply to a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PolicyRole {
    /// No role has this name.
    Unknown,
    /// A superuser, which nothing restricts and which no token may name.
    Superuser,
    /// The role bypasses row-level security: `service_role`.
    Bypasses,
    /// The policies apply.
    Bound,
}

/// Begins the transaction of a query, each of whose statements may run for `limit`. Returns how the
/// policies apply to the role, and whether the table `realtime.messages` exists.
pub(crate) async fn begin(
    session: &mut PgConnection,
    role: &str,
    limit: Duration,
) -> Result<(PolicyRole, bool), sqlx::Error> {
    session.execute("BEGIN").await?;
    // The statement compares names as text: a cast to `name` would cut the parameter to 63 bytes.
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

/// Inserts a row of the topic for each extension, with the rights of the table's owner. Returns the
/// ids of the rows.
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

/// The values of a token and a request that policies can read.
#[derive(Debug)]
pub(crate) struct PolicyContext<'a> {
    /// Claim `role` of the token.
    pub(crate) role: &'a str,
    /// Claim `sub` of the token, or an empty text.
    pub(crate) sub: &'a str,
    /// All claims of the token, as a JSON object.
    pub(crate) claims: &'a str,
    /// Headers of the request, as a JSON object.
    pub(crate) headers: &'a str,
    /// The topic without `realtime:`.
    pub(crate) sub_topic: &'a str,
}

/// Switches to the token's role, with its claims, headers and topic as settings, until the
/// transaction ends.
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

/// Returns the extensions of those probes that the policies let the role see.
pub(crate) async fn visible_probes(
    session: &mut PgConnection,
    probes: &[Uuid],
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT extension FROM realtime.messages WHERE id = ANY ($1)")
        .bind(probes)
        .fetch_all(session)
        .await
}

/// Inserts the row of a broadcast as the token's role. The statement has no RETURNING, so that only
/// the policies for INSERT apply.
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

/// Rolls the transaction back, and with it the role and the settings.
pub(crate) async fn roll_back(session: &mut PgConnection) -> Result<(), sqlx::Error> {
    session.execute("ROLLBACK").await.map(drop)
}
