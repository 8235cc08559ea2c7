//! Installs and removes the gateway's database objects: the migrations of schema `tidegate` and the
//! system file of triggers and functions.
//!
//! Invariant: every file may be run again.

use std::time::Duration;

use sqlx::{
    ConnectOptions, Connection, PgConnection, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use tokio::time::timeout;

use super::connect::options;
use crate::secret::Secret;

/// The system file: triggers and functions. It may be run again.
pub(super) const SYSTEM_SQL: &str =
    include_str!("../../migrations/broadcast_cache_invalidation_system.sql");

/// The file that removes all database objects of the gateway. It may be run again.
const UNINSTALL_SQL: &str = include_str!("../../migrations/uninstall.sql");

/// Time that [`migrate`] and [`uninstall`] wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Advisory lock that one session at a time holds while it executes a file: `tidemigr` in ASCII.
const FILE_LOCK: i64 = 0x7469_6465_6d69_6772;

/// Migrations of the gateway's own schema, in the order in which they run: number, description,
/// text.
const SCHEMA: [(i64, &str, &str); 7] = [
    (1, "gateway schema", include_str!("../../migrations/schema/0001_gateway_schema.sql")),
    (2, "broadcast history", include_str!("../../migrations/schema/0002_broadcast_history.sql")),
    (3, "gateways", include_str!("../../migrations/schema/0003_gateways.sql")),
    (4, "private channels", include_str!("../../migrations/schema/0004_private_channels.sql")),
    (5, "revocations", include_str!("../../migrations/schema/0005_revocations.sql")),
    (6, "forget person", include_str!("../../migrations/schema/0006_forget_person.sql")),
    (7, "history read only", include_str!("../../migrations/schema/0007_history_read_only.sql")),
];

/// Why [`migrate`] or [`uninstall`] failed.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// No URL is set.
    #[error("no database: set TIDEGATE_MIGRATE_DATABASE_URL or TIDEGATE_DATABASE_URL")]
    NoUrl,
    /// The URL cannot be parsed, or the server cannot be reached or refuses the session.
    #[error("no connection to the database")]
    Connect(#[source] sqlx::Error),
    /// The server accepted the connection and did not answer in time.
    #[error("the database does not answer")]
    Unanswered,
    /// A migration of schema `tidegate` failed.
    #[error("the migrations of schema tidegate failed")]
    Schema(#[source] sqlx::migrate::MigrateError),
    /// The system file failed.
    #[error("migrations/broadcast_cache_invalidation_system.sql failed")]
    System(#[source] sqlx::Error),
    /// The file that removes the database objects failed.
    #[error("migrations/uninstall.sql failed, and nothing was taken away")]
    Uninstall(#[source] sqlx::Error),
}

/// Returns the text of each migration, in the order in which they run.
pub(super) fn schema_files() -> impl Iterator<Item = &'static str> {
    SCHEMA.into_iter().map(|(_, _, sql)| sql)
}

/// Returns the migrations in the order in which they run.
pub(super) fn migrations() -> Vec<Migration> {
    SCHEMA
        .into_iter()
        .map(|(version, description, sql)| {
            let kind = MigrationType::Simple;
            Migration::new(version, description.into(), kind, sql.into_sql_str(), false)
        })
        .collect()
}

/// Runs the pending migrations of schema `tidegate`, then the system file.
///
/// # Errors
/// [`MigrateError`]; the migrations that have run stay, and the next run continues after them.
pub async fn migrate(url: &Secret) -> Result<(), MigrateError> {
    let mut connection = connect(url).await?;
    let mut migrator = Migrator::with_migrations(migrations());
    // The table of migrations stands in schema `tidegate`, so that `public` contains only the
    // objects that the system file names.
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    migrator.run(&mut connection).await.map_err(MigrateError::Schema)?;
    execute(&mut connection, SYSTEM_SQL).await.map_err(MigrateError::System)?;
    connection.close().await.map_err(MigrateError::Connect)
}

/// Removes everything that [`migrate`] has created, the history too, except the role `tidegate`.
///
/// # Errors
/// [`MigrateError`]; nothing was removed, unless only closing the session failed.
pub async fn uninstall(url: &Secret) -> Result<(), MigrateError> {
    let mut connection = connect(url).await?;
    execute(&mut connection, UNINSTALL_SQL).await.map_err(MigrateError::Uninstall)?;
    connection.close().await.map_err(MigrateError::Connect)
}

/// Executes a file in one transaction. Another session that does the same waits, because Postgres
/// fails two that change the same function or right at once.
async fn execute(connection: &mut PgConnection, file: &'static str) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(FILE_LOCK)
        .execute(&mut *transaction)
        .await?;
    sqlx::raw_sql(file).execute(&mut *transaction).await?;
    transaction.commit().await
}

/// Connects as the role that owns the tables.
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
