//! Parses the database's URL and creates pools.
//!
//! Invariant: a URL with a parameter that the library does not know is refused, because the library
//! would log the parameter's value.

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::secret::Secret;

/// Parameters of a URL that the library reads. The library logs any other parameter with its value,
/// which may be a secret.
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

/// Most connections of the pool, and the time after which it closes an idle one.
const POOL_MAX: u32 = 3;
const POOL_IDLE: Duration = Duration::from_secs(60);

/// Parses the URL and sets `tidegate` as the application's name.
///
/// # Errors
/// The URL does not begin with `postgres://` or `postgresql://`, has an unknown parameter, or cannot
/// be parsed.
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

/// Creates a pool of one connection for one listening session. A session never uses the pool of the
/// one before, so each resolves the host again and inherits no state.
pub(crate) fn single(options: PgConnectOptions, connect_timeout: Duration) -> PgPool {
    PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(connect_timeout)
        .test_before_acquire(false)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options)
}

/// Creates the pool for everything but the listening session and the policies' sessions. It connects
/// when a connection is first needed.
///
/// # Errors
/// As [`options`].
pub(crate) fn pool(url: &Secret, connect_timeout: Duration) -> Result<PgPool, sqlx::Error> {
    Ok(PgPoolOptions::new()
        .max_connections(POOL_MAX)
        .acquire_timeout(connect_timeout)
        .idle_timeout(POOL_IDLE)
        .connect_lazy_with(options(url)?))
}
