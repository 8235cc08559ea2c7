//! Pools, migrations, and every SQL statement of the gateway.

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Executor, PgPool, Row, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};

use crate::auth::jwt::Secret;

/// The re-runnable file of triggers and functions.
pub const SYSTEM_SQL: &str = include_str!("../migrations/broadcast_cache_invalidation_system.sql");

/// The gateway's own schema, one migration after the other.
const SCHEMA: [(i64, &str, &str); 1] =
    [(1, "gateway schema", include_str!("../migrations/schema/0001_gateway_schema.sql"))];

/// Why `migrate` could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The URL cannot be read or nobody answers.
    #[error("no connection to the database")]
    Connect(#[source] sqlx::Error),
    /// The gateway's schema.
    #[error("the migrations of schema tidegate failed")]
    Schema(#[source] sqlx::migrate::MigrateError),
    /// The system file.
    #[error("migrations/broadcast_cache_invalidation_system.sql failed")]
    System(#[source] sqlx::Error),
}

/// A pool of one connection, made anew for each session: fresh DNS, nothing left over.
///
/// # Errors
/// The URL cannot be read.
pub(crate) fn single(url: &Secret, connect_timeout: Duration) -> Result<PgPool, sqlx::Error> {
    let options = PgConnectOptions::from_str(url.expose())?
        .application_name("tidegate")
        .disable_statement_logging();
    Ok(PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(connect_timeout)
        .test_before_acquire(false)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options))
}

/// Whether the server is a standby.
pub(crate) async fn is_in_recovery(listener: &mut PgListener) -> Result<bool, sqlx::Error> {
    listener.fetch_one("SELECT pg_is_in_recovery()").await?.try_get(0)
}

/// Asks the session for a sign of life.
pub(crate) async fn heartbeat(listener: &mut PgListener) -> Result<(), sqlx::Error> {
    listener.execute("SELECT 1").await.map(drop)
}

/// Brings schema `tidegate` up to date, then runs the system file.
///
/// # Errors
/// [`MigrateError`]; what was done before stays, and running again goes on from there.
pub async fn migrate(url: &Secret) -> Result<(), MigrateError> {
    let pool = single(url, Duration::from_secs(10)).map_err(MigrateError::Connect)?;
    let mut connection = pool.acquire().await.map_err(MigrateError::Connect)?;
    let mut migrator = Migrator::with_migrations(
        SCHEMA
            .into_iter()
            .map(|(version, description, sql)| {
                let kind = MigrationType::Simple;
                Migration::new(version, description.into(), kind, sql.into_sql_str(), false)
            })
            .collect(),
    );
    // In a schema of our own: nothing is left in `public` but what the system file names.
    migrator.dangerous_set_table_name("tidegate.migrations");
    migrator.create_schema("tidegate");
    migrator.run(&mut *connection).await.map_err(MigrateError::Schema)?;
    sqlx::raw_sql(SYSTEM_SQL).execute(&mut *connection).await.map_err(MigrateError::System)?;
    Ok(())
}
