//! A session with Postgres: connecting, why that has failed, and statements with a deadline.

use std::time::{Duration, Instant};

use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;

use super::{
    report::{Seen, said},
    target::{ReachError, reach},
};
use crate::{db, secret::Secret};

/// How long a server that has accepted the connection may take to let the role in.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a statement; the server ends it a little earlier by itself.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
const STATEMENT_LIMIT: Duration = Duration::from_secs(4);

/// A session, which is lost at the first statement that is not answered.
pub(super) struct Session(Option<PgConnection>);

/// Why a statement has returned nothing.
#[derive(Debug)]
pub(super) enum StatementError {
    /// The role has no right to what the statement reads, or that does not exist.
    Closed(String),
    /// The statement failed.
    Failed(String),
}

impl StatementError {
    fn of(error: &sqlx::Error) -> Self {
        match error.as_database_error() {
            Some(refused) => {
                let code = refused.code().unwrap_or_default();
                let message = said(refused.message());
                match &*code {
                    // No right, no table, no schema, no function.
                    "42501" | "42P01" | "3F000" | "42883" => Self::Closed(message),
                    _ => Self::Failed(format!("{message} ({code})")),
                }
            }
            None => Self::Failed(said(&error.to_string())),
        }
    }

    /// Returns the result of a check that needs the statement's answer.
    pub(super) fn seen(self, fix: &str) -> Seen {
        match self {
            Self::Closed(why) => Seen::skipped(format!("cannot be looked at: {why}")),
            Self::Failed(why) => Seen::failed(why, fix),
        }
    }
}

impl Session {
    /// Connects to the database of `url`, and returns the session and what the check saw. `setting`
    /// is the name of the setting that holds the URL.
    ///
    /// # Errors
    /// The result of the check: what stands in the way, and how to mend it.
    pub(super) async fn connect(url: &Secret, setting: &str) -> Result<(Self, String), Seen> {
        let options = match db::options(url) {
            Ok(options) => options,
            Err(_may_quote_it) => {
                return Err(Seen::failed(
                    "the URL cannot be read",
                    format!("set {setting} to postgres://USER:PASSWORD@HOST/DATABASE"),
                ));
            }
        };
        let (host, port) = (options.get_host().to_owned(), options.get_port());
        let place = format!("{host}:{port}");
        let is_socket = options.get_socket().is_some() || host.starts_with('/');
        if !is_socket && let Err(error) = reach(&host, port).await {
            return Err(unreached(&error, setting));
        }
        let begun = Instant::now();
        match timeout(LOGIN_TIMEOUT, options.connect()).await {
            Ok(Ok(connection)) => {
                let mut session = Self(Some(connection));
                let limit = async |connection: &mut PgConnection| {
                    db::doctor::limit(connection, STATEMENT_LIMIT).await
                };
                if let Err(error) = session.query(STATEMENT_TIMEOUT, limit).await {
                    return Err(error.seen(&format!("look at the server behind {setting}")));
                }
                let took = begun.elapsed().as_secs_f64() * 1000.0;
                Ok((session, format!("{place}, {took:.0} ms to let {} in", options.get_username())))
            }
            Ok(Err(error)) => Err(not_let_in(&error, &options, &place, setting)),
            Err(_elapsed) => Err(Seen::failed(
                format!("{place} takes the connection and says nothing: it may be no Postgres"),
                format!("look at what {setting} names"),
            )),
        }
    }

    /// Runs a statement, which may take as long as `limit`.
    ///
    /// # Errors
    /// [`StatementError`]; the session is lost if there was no answer.
    pub(super) async fn query<T>(
        &mut self,
        limit: Duration,
        statement: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StatementError> {
        let Some(connection) = &mut self.0 else {
            return Err(StatementError::Failed("the session was lost".to_owned()));
        };
        match timeout(limit, statement(connection)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                if error.as_database_error().is_none() {
                    self.0 = None;
                }
                Err(StatementError::of(&error))
            }
            Err(_elapsed) => {
                self.0 = None;
                Err(StatementError::Failed("the database does not answer".to_owned()))
            }
        }
    }
}

fn unreached(error: &ReachError, setting: &str) -> Seen {
    let fix = match error {
        ReachError::Name(_) => format!("correct the host in {setting}"),
        ReachError::OnlyIpv6(_) => {
            format!("set {setting} to the pooler's session mode (port 5432), or add IPv4")
        }
        ReachError::Refused(_) => format!("start Postgres, or correct the port in {setting}"),
        ReachError::Silent(_) | ReachError::Other(..) | ReachError::Tls(..) => {
            format!("open the way from here to there, or correct {setting}")
        }
    };
    Seen::failed(error.to_string(), fix)
}

/// Explains by the code of the server's answer why it has not let the role in.
fn not_let_in(error: &sqlx::Error, options: &PgConnectOptions, place: &str, setting: &str) -> Seen {
    let user = options.get_username();
    if let Some(refused) = error.as_database_error() {
        let code = refused.code().unwrap_or_default();
        let words = said(refused.message());
        let fix = match &*code {
            "28P01" => format!("correct the password of {user} in {setting}"),
            "28000" => {
                format!("let {user} in (pg_hba.conf, TLS, or the role is missing), see {setting}")
            }
            "3D000" => format!("correct the database's name in {setting}"),
            "53300" => "end sessions, or raise max_connections".to_owned(),
            "57P03" => "wait until Postgres has started".to_owned(),
            // A pooler that serves many projects knows them by the role's name.
            _ if words.contains("Tenant or user not found") => {
                format!("name the role as the pooler wants it in {setting}: {user}.PROJECT")
            }
            _ => format!("look at the server's log, and at {setting}"),
        };
        let what = if code == "28P01" { "the password is wrong: " } else { "" };
        return Seen::failed(format!("{place} refuses {user}: {what}{words} ({code})"), fix);
    }
    match error {
        sqlx::Error::Tls(error) => Seen::failed(
            format!("no TLS with {place}: {}", said(&error.to_string())),
            format!("correct sslmode and sslrootcert in {setting}"),
        ),
        error => Seen::failed(
            format!("{place} does not speak as Postgres does: {}", said(&error.to_string())),
            format!("look at what {setting} names"),
        ),
    }
}
