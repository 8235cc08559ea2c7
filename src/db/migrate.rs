//! The migrations of schema `tidegate` and the system file: made, and taken away.

use std::time::Duration;

use sqlx::{
    ConnectOptions, Connection, PgConnection, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use tokio::time::timeout;

use super::connect::options;
use crate::secret::Secret;

/// The re-runnable file of triggers and functions.
pub(super) const SYSTEM_SQL: &str =
    include_str!("../../migrations/broadcast_cache_invalidation_system.sql");

/// The re-runnable file that takes everything of ours away.
const UNINSTALL_SQL: &str = include_str!("../../migrations/uninstall.sql");

/// How long `migrate` waits for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The gateway's own schema, one migration after the other.
const SCHEMA: [(i64, &str, &str); 6] = [
    (1, "gateway schema", include_str!("../../migrations/schema/0001_gateway_schema.sql")),
    (2, "broadcast history", include_str!("../../migrations/schema/0002_broadcast_history.sql")),
    (3, "gateways", include_str!("../../migrations/schema/0003_gateways.sql")),
    (4, "private channels", include_str!("../../migrations/schema/0004_private_channels.sql")),
    (5, "revocations", include_str!("../../migrations/schema/0005_revocations.sql")),
    (6, "forget person", include_str!("../../migrations/schema/0006_forget_person.sql")),
];

/// Why `migrate` or `migrate --uninstall` could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// No database was named.
    #[error("no database: set TIDEGATE_MIGRATE_DATABASE_URL or TIDEGATE_DATABASE_URL")]
    NoUrl,
    /// The URL cannot be read or nobody answers.
    #[error("no connection to the database")]
    Connect(#[source] sqlx::Error),
    /// Somebody took the connection and said nothing in time.
    #[error("the database does not answer")]
    Unanswered,
    /// The gateway's schema.
    #[error("the migrations of schema tidegate failed")]
    Schema(#[source] sqlx::migrate::MigrateError),
    /// The system file.
    #[error("migrations/broadcast_cache_invalidation_system.sql failed")]
    System(#[source] sqlx::Error),
    /// The file that takes everything away.
    #[error("migrations/uninstall.sql failed, and nothing was taken away")]
    Uninstall(#[source] sqlx::Error),
}

/// The text of each migration of the gateway's own schema, in order.
pub(super) fn schema_files() -> impl Iterator<Item = &'static str> {
    SCHEMA.into_iter().map(|(_, _, sql)| sql)
}

/// The migrations of the gateway's own schema, in order.
pub(super) fn migrations() -> Vec<Migration> {
    SCHEMA
        .into_iter()
        .map(|(version, description, sql)| {
            let kind = MigrationType::Simple;
            Migration::new(version, description.into(), kind, sql.into_sql_str(), false)
        })
        .collect()
}

/// Brings schema `tidegate` up to date, then runs the system file.
///
/// # Errors
/// [`MigrateError`]; what was done before stays, and running again goes on from there.
pub async fn migrate(url: &Secret) -> Result<(), MigrateError> {
    let mut connection = connect(url).await?;
    let mut migrator = Migrator::with_migrations(migrations());
    // In a schema of our own: nothing is left in `public` but what the system file names.
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    migrator.run(&mut connection).await.map_err(MigrateError::Schema)?;
    sqlx::raw_sql(SYSTEM_SQL).execute(&mut connection).await.map_err(MigrateError::System)?;
    connection.close().await.map_err(MigrateError::Connect)
}

/// Takes away what [`migrate`] has made, the history too; the role `tidegate` stays.
///
/// # Errors
/// [`MigrateError`]; nothing was taken away, unless only the end of the session failed.
pub async fn uninstall(url: &Secret) -> Result<(), MigrateError> {
    let mut connection = connect(url).await?;
    sqlx::raw_sql(UNINSTALL_SQL).execute(&mut connection).await.map_err(MigrateError::Uninstall)?;
    connection.close().await.map_err(MigrateError::Connect)
}

/// A session as the role that owns the tables.
async fn connect(url: &Secret) -> Result<PgConnection, MigrateError> {
    if url.is_empty() {
        return Err(MigrateError::NoUrl);
    }
    let options = options(url).map_err(MigrateError::Connect)?;
    timeout(CONNECT_TIMEOUT, options.connect())
        .await
        .map_err(|_elapsed| MigrateError::Unanswered)?
        .map_err(MigrateError::Connect)
}
