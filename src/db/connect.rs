//! How the database's URL is read, and what connects by it.

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::secret::Secret;

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

/// Connections for what the listening session is not for, and how long one is kept unused.
const POOL_MAX: u32 = 3;
const POOL_IDLE: Duration = Duration::from_secs(60);

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

/// A pool for what the listening session is not for.
///
/// # Errors
/// The URL cannot be read.
pub(crate) fn pool(url: &Secret, connect_timeout: Duration) -> Result<PgPool, sqlx::Error> {
    Ok(PgPoolOptions::new()
        .max_connections(POOL_MAX)
        .acquire_timeout(connect_timeout)
        .idle_timeout(POOL_IDLE)
        .connect_lazy_with(options(url)?))
}
