//! Statements of the listening session.

use std::{sync::Arc, time::Duration};

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Executor, Row,
    postgres::{PgConnectOptions, PgListener},
};

/// Returns whether the server is a standby. Opens a connection for this statement alone.
pub(crate) async fn is_in_recovery(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut connection = options.connect().await?;
    let answer = connection.fetch_one("SELECT pg_is_in_recovery()").await?.try_get(0);
    connection.close().await?;
    answer
}

/// Checks that the session answers. Returns the server's clock, seconds since 1970.
pub(crate) async fn heartbeat(listener: &mut PgListener) -> Result<f64, sqlx::Error> {
    // An unprepared statement takes one exchange; preparing one would add another the first time.
    listener.fetch_one("SELECT extract(epoch FROM clock_timestamp())::float8").await?.try_get(0)
}

/// Listens to these channels, in one exchange. The library's own function would remember each, for a
/// connection that it is never asked to make.
pub(crate) async fn listen(
    listener: &mut PgListener,
    channels: &[Arc<str>],
) -> Result<(), sqlx::Error> {
    each(listener, "LISTEN", channels).await
}

/// Ends the LISTENs on these channels, in one exchange.
pub(crate) async fn unlisten(
    listener: &mut PgListener,
    channels: &[Arc<str>],
) -> Result<(), sqlx::Error> {
    each(listener, "UNLISTEN", channels).await
}

async fn each(
    listener: &mut PgListener,
    statement: &str,
    channels: &[Arc<str>],
) -> Result<(), sqlx::Error> {
    // Channels cannot be bound, so they are quoted as identifiers.
    let quoted = channels.iter().map(|channel| channel.replace('"', "\"\""));
    let statements: String = quoted.map(|channel| format!("{statement} \"{channel}\";")).collect();
    listener.execute(AssertSqlSafe(statements)).await.map(drop)
}

/// Limits the time that each statement of the session may run or wait for a lock, so that a locked
/// table ends the statement and not the session.
pub(crate) async fn bound(listener: &mut PgListener, limit: Duration) -> Result<(), sqlx::Error> {
    let limit = limit.as_millis().to_string();
    sqlx::query(
        "SELECT set_config('statement_timeout', $1, false), set_config('lock_timeout', $1, false)",
    )
    .bind(limit)
    .execute(listener)
    .await
    .map(drop)
}

/// Returns a text that differs for each database, and for one database before and after it was
/// restored: the database's oid with the server's system identifier and timeline. The timeline is
/// that of the log being written, because the control file keeps the old one until the first
/// checkpoint after a promotion. Where a provider has closed these functions, the time of the
/// server's start takes their place.
pub(crate) async fn identity(listener: &mut PgListener) -> Result<String, sqlx::Error> {
    let identity = sqlx::query_scalar(
        "SELECT concat_ws(' ', d.oid, (SELECT system_identifier FROM pg_control_system()),
            left(pg_walfile_name(pg_current_wal_lsn()), 8))
        FROM pg_database d WHERE d.datname = current_database()",
    )
    .fetch_one(&mut *listener)
    .await;
    match identity {
        Err(sqlx::Error::Database(_)) => {
            sqlx::query_scalar(
                "SELECT concat_ws(' ', d.oid, pg_postmaster_start_time())
                FROM pg_database d WHERE d.datname = current_database()",
            )
            .fetch_one(listener)
            .await
        }
        Ok(_) | Err(_) => identity,
    }
}
