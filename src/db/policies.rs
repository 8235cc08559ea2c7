//! The statements of a question to the policies on `realtime.messages`.

use std::time::Duration;

use sqlx::{Executor, PgConnection, Row};
use uuid::Uuid;

/// What a role is to the policies on `realtime.messages`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PolicyRole {
    /// Postgres knows none of this name.
    Unknown,
    /// Bound by nothing, and nobody's role in a token.
    Superuser,
    /// Policies do not bind it: `service_role`.
    Bypasses,
    /// Policies decide.
    Bound,
}

/// Begins a question to the policies, each of whose statements may take `limit`. Gives what the
/// role is, and whether `realtime.messages` is there.
pub(crate) async fn begin_question(
    session: &mut PgConnection,
    role: &str,
    limit: Duration,
) -> Result<(PolicyRole, bool), sqlx::Error> {
    session.execute("BEGIN").await?;
    // A name is compared as text: cast to a name it would be cut to 63 bytes.
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

/// Inserts a row of the topic for each extension, as the owner of the table. Gives their ids.
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

/// In whose name the policies are asked, and what they may look at.
#[derive(Debug)]
pub(crate) struct PolicyContext<'a> {
    /// `role` of the token.
    pub(crate) role: &'a str,
    /// `sub` of the token, or nothing.
    pub(crate) sub: &'a str,
    /// All claims, as JSON.
    pub(crate) claims: &'a str,
    /// Headers of the request, as a JSON object.
    pub(crate) headers: &'a str,
    /// The topic without its prefix.
    pub(crate) sub_topic: &'a str,
}

/// Becomes the token's role until the transaction ends.
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

/// The extensions of those probes that the role may see.
pub(crate) async fn visible_probes(
    session: &mut PgConnection,
    probes: &[Uuid],
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT extension FROM realtime.messages WHERE id = ANY ($1)")
        .bind(probes)
        .fetch_all(session)
        .await
}

/// Inserts a broadcast's row as the role. Nothing is returned, so that only the policies for
/// inserting are asked.
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

/// Undoes everything since [`begin_question`], the role too.
pub(crate) async fn end_question(session: &mut PgConnection) -> Result<(), sqlx::Error> {
    session.execute("ROLLBACK").await.map(drop)
}
