//! Pools, migrations, and every SQL statement of the gateway.

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Connection, Executor, PgConnection, PgPool, Row, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};

use tokio::time::timeout;

use crate::auth::jwt::Secret;

/// The re-runnable file of triggers and functions.
pub const SYSTEM_SQL: &str = include_str!("../migrations/broadcast_cache_invalidation_system.sql");

/// The re-runnable file that takes everything of ours away.
const UNINSTALL_SQL: &str = include_str!("../migrations/uninstall.sql");

/// The parameters of a URL that the library reads. It warns of others with their values, which may
/// be secrets.
const PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// How long `migrate` waits for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The gateway's own schema, one migration after the other.
const SCHEMA: [(i64, &str, &str); 3] = [
    (1, "gateway schema", include_str!("../migrations/schema/0001_gateway_schema.sql")),
    (2, "broadcast history", include_str!("../migrations/schema/0002_broadcast_history.sql")),
    (3, "gateways", include_str!("../migrations/schema/0003_gateways.sql")),
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

/// What the URL says, and our name.
///
/// # Errors
/// The URL is not one of Postgres, or cannot be read.
pub(crate) fn options(url: &Secret) -> Result<PgConnectOptions, sqlx::Error> {
    let text = url.expose();
    if !["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme)) {
        return Err(sqlx::Error::Configuration("expected postgres://".into()));
    }
    let query = text.split_once('?').map_or("", |(_, query)| query);
    let is_known = |pair: &str| {
        let key = pair.split('=').next().unwrap_or_default();
        PARAMETERS.contains(&key) || key.starts_with("options[")
    };
    if !query.split('&').filter(|pair| !pair.is_empty()).all(is_known) {
        return Err(sqlx::Error::Configuration("a parameter of the URL is unknown".into()));
    }
    let options = PgConnectOptions::from_str(text)?;
    Ok(options.application_name("tidegate").disable_statement_logging())
}

/// A pool of one connection, made anew for each session: fresh DNS, nothing left over.
pub(crate) fn single(options: PgConnectOptions, connect_timeout: Duration) -> PgPool {
    PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(connect_timeout)
        .test_before_acquire(false)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options)
}

/// Whether the server is a standby, asked over a connection of its own.
pub(crate) async fn is_in_recovery(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut connection = options.connect().await?;
    let answer = connection.fetch_one("SELECT pg_is_in_recovery()").await?.try_get(0);
    connection.close().await?;
    answer
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
    let mut connection = connect(url).await?;
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
