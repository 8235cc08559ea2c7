//! One query to the policies: its parts, its answer, why there may be none, and its statements.
//!
//! Invariants: the statements that policies decide run with the rights of the token's role and no
//! others; of a policy's error only the SQLSTATE is kept.

use std::{borrow::Cow, sync::Arc};

use sqlx::PgConnection;
use tokio::time::{Instant, timeout_at};

use super::sessions::{Begun, Sessions};
use crate::{
    auth::Token,
    db::policies::{self as statements, PolicyContext, PolicyRole},
    protocol::error_code::{ErrorCode, Refusal},
};

/// The extensions of a channel, in the words of `realtime.messages`.
const BROADCAST: &str = "broadcast";
const PRESENCE: &str = "presence";

/// Who wants to use which topic.
#[derive(Debug, Clone)]
pub struct PolicyQuery {
    /// A token that has been verified.
    pub token: Arc<Token>,
    /// The topic without `realtime:`.
    pub sub_topic: Arc<str>,
    /// Headers of the request, as a JSON object.
    pub headers: Arc<str>,
}

/// What the token wants to do on the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum PolicyAction {
    /// Receive the messages of the extensions.
    Read {
        /// Whether the query includes presence.
        presence: bool,
    },
    /// Send broadcasts.
    Write,
}

impl PolicyAction {
    /// The metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The extensions on which the policies allow an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Broadcasts.
    pub broadcast: bool,
    /// Presence.
    pub presence: bool,
}

impl Allowed {
    /// Every extension.
    pub const ALL: Self = Self { broadcast: true, presence: true };
    /// No extension.
    pub const NONE: Self = Self { broadcast: false, presence: false };

    /// Whether the policies allow at least one extension.
    #[must_use]
    pub fn any(self) -> bool {
        self.broadcast || self.presence
    }
}

/// Why the policies gave no answer.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum QueryError {
    /// The database cannot be reached, or cannot serve.
    #[error("the database is not available")]
    Unavailable(#[source] Option<sqlx::Error>),
    /// The operator has not set up private channels.
    #[error("private channels are not set up")]
    NotSetUp(#[source] Missing),
    /// All sessions were busy for too long.
    #[error("all of policies.connections_max sessions are busy")]
    PoolTimeout,
    /// The policies took too long.
    #[error("the policies took longer than policies.timeout")]
    QueryCanceled,
    /// `realtime.messages` has no partition for this day.
    #[error("realtime.messages has no partition for today")]
    MissingPartition,
    /// A policy failed, or the policies cannot be queried with the token's role. It counts as a
    /// denial.
    #[error("a policy failed, or the role is unknown (SQLSTATE {sqlstate})")]
    #[strum(serialize = "policy_error")]
    Policy {
        /// SQLSTATE of the error.
        sqlstate: Box<str>,
    },
}

impl QueryError {
    /// The metric's label.
    #[must_use]
    pub fn label(&self) -> &'static str {
        self.into()
    }

    /// Returns the refusal that the client of a channel gets.
    #[must_use]
    pub fn refuse(&self, sub_topic: &str) -> Refusal {
        match self {
            Self::Unavailable(_) | Self::NotSetUp(_) => {
                Refusal::new(ErrorCode::UnableToConnectToProject)
            }
            Self::PoolTimeout => Refusal::new(ErrorCode::IncreaseConnectionPool),
            Self::QueryCanceled => Refusal::new(ErrorCode::QueryCanceled),
            Self::MissingPartition => Refusal::new(ErrorCode::MissingPartition),
            Self::Policy { .. } => Refusal::unauthorized(sub_topic),
        }
    }
}

/// What private channels lack. Each is logged once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, strum::VariantArray)]
pub enum Missing {
    /// No database URL is set.
    #[error("there is no database: set TIDEGATE_DATABASE_URL")]
    Database,
    /// A table, a function, or the gateway's right to one of them.
    #[error(
        "realtime.messages or the gateway's right to ask its policies is missing: run `tidegate migrate` as the owner of the tables"
    )]
    Schema,
    /// The gateway's role is not a member of the token's role.
    #[error(
        "the gateway's role is no member of a token's role: run `tidegate migrate`, or grant that role to the gateway's"
    )]
    Membership,
}

impl PolicyQuery {
    /// Queries the policies in one transaction, which is rolled back.
    ///
    /// # Errors
    /// [`QueryError`], at the deadline too.
    pub(super) async fn run(
        &self,
        sessions: &Sessions,
        action: PolicyAction,
        deadline: Instant,
    ) -> Result<Allowed, QueryError> {
        let claims = &self.token.claims;
        // The server's own limit is a little shorter, so that it ends the statement and not we the
        // session.
        let limit = deadline.saturating_duration_since(Instant::now()).mul_f64(0.9);
        let Begun { mut session, role, has_messages } =
            timeout_at(deadline, sessions.begin(&claims.role, limit))
                .await
                .map_err(|_elapsed| QueryError::Unavailable(None))?
                .map_err(|error| QueryError::Unavailable(Some(error)))?;
        let json = claims.json();
        let context = PolicyContext {
            role: &claims.role,
            sub: claims.sub().unwrap_or_default(),
            claims: &json,
            headers: &self.headers,
            sub_topic: &self.sub_topic,
        };
        let answer = match (role, has_messages) {
            (PolicyRole::Bypasses, _) => Ok(Allowed::ALL),
            (PolicyRole::Unknown | PolicyRole::Superuser, _) => {
                Err(QueryError::Policy { sqlstate: UNKNOWN_ROLE.into() })
            }
            (PolicyRole::Bound, false) => Err(QueryError::NotSetUp(Missing::Schema)),
            (PolicyRole::Bound, true) => {
                let answer = async {
                    match action {
                        PolicyAction::Read { presence } => {
                            read(&mut session, &context, presence).await
                        }
                        PolicyAction::Write => write(&mut session, &context).await,
                    }
                };
                // At the deadline the session is still busy: it is dropped, which closes it.
                timeout_at(deadline, answer).await.map_err(|_elapsed| QueryError::QueryCanceled)?
            }
        };
        sessions.end(session, deadline).await;
        answer
    }
}

/// Returns the extensions of which the token's role sees a row of the topic.
async fn read(
    session: &mut PgConnection,
    context: &PolicyContext<'_>,
    wants_presence: bool,
) -> Result<Allowed, QueryError> {
    let extensions = [BROADCAST, PRESENCE];
    let extensions = if wants_presence { &extensions[..] } else { &extensions[..1] };
    let probes = statements::insert_probes(session, context.sub_topic, extensions)
        .await
        .map_err(of_gateway)?;
    statements::take_role(session, context).await.map_err(of_role)?;
    let seen = statements::visible_probes(session, &probes).await.map_err(of_policies)?;
    let sees = |extension| seen.iter().any(|visible| visible == extension);
    Ok(Allowed { broadcast: sees(BROADCAST), presence: sees(PRESENCE) })
}

/// Returns whether the token's role may insert a broadcast's row of the topic.
async fn write(
    session: &mut PgConnection,
    context: &PolicyContext<'_>,
) -> Result<Allowed, QueryError> {
    statements::take_role(session, context).await.map_err(of_role)?;
    match statements::insert_broadcast(session, context.sub_topic).await {
        Ok(()) => Ok(Allowed { broadcast: true, presence: false }),
        Err(error) if sqlstate(&error).as_deref() == Some(INSUFFICIENT_PRIVILEGE) => {
            Ok(Allowed::NONE)
        }
        Err(error) => Err(of_policies(error)),
    }
}

/// SQLSTATE of a missing right. A policy that denies an INSERT has the same.
const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// SQLSTATE of a role that does not exist.
const UNKNOWN_ROLE: &str = "22023";

fn sqlstate(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Maps the error of a statement that runs with the gateway's own role.
fn of_gateway(error: sqlx::Error) -> QueryError {
    match sqlstate(&error).as_deref() {
        // No such function, schema, table or column, or no right to it.
        Some("42883" | "3F000" | "42P01" | "42703" | INSUFFICIENT_PRIVILEGE) => {
            QueryError::NotSetUp(Missing::Schema)
        }
        _ => of_server(error).unwrap_or_else(|error| QueryError::Unavailable(Some(error))),
    }
}

/// Maps the error of the switch to the token's role.
fn of_role(error: sqlx::Error) -> QueryError {
    match sqlstate(&error).as_deref() {
        Some(INSUFFICIENT_PRIVILEGE) => QueryError::NotSetUp(Missing::Membership),
        _ => of_policies(error),
    }
}

/// Maps the error of a statement that a policy may have caused to fail.
fn of_policies(error: sqlx::Error) -> QueryError {
    of_server(error).unwrap_or_else(|error| match sqlstate(&error) {
        Some(sqlstate) => QueryError::Policy { sqlstate: sqlstate.into() },
        None => QueryError::Unavailable(Some(error)),
    })
}

/// Maps an error that any statement may have. Returns other errors unchanged.
fn of_server(error: sqlx::Error) -> Result<QueryError, sqlx::Error> {
    let Some(database) = error.as_database_error() else {
        return Ok(QueryError::Unavailable(Some(error)));
    };
    let code = database.code().unwrap_or_default();
    match &*code {
        "57014" => Ok(QueryError::QueryCanceled),
        // A missing partition violates an unnamed check of the table; all other checks have names.
        "23514" if database.table() == Some("messages") && database.constraint().is_none() => {
            Ok(QueryError::MissingPartition)
        }
        // Classes of errors that no policy causes: the connection, the transaction, a statement that
        // a pooler has lost, a deadlock, resources, an operator, the system.
        _ if ["08", "25", "26", "40", "53", "55", "57", "58", "XX"]
            .contains(&code.get(..2).unwrap_or_default()) =>
        {
            Ok(QueryError::Unavailable(Some(error)))
        }
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantNames;

    use super::*;

    #[test]
    fn every_answer_is_counted_under_a_name_that_exists_from_the_start() {
        let all = [
            QueryError::Unavailable(None),
            QueryError::NotSetUp(Missing::Database),
            QueryError::PoolTimeout,
            QueryError::QueryCanceled,
            QueryError::MissingPartition,
            QueryError::Policy { sqlstate: UNKNOWN_ROLE.into() },
        ];
        assert_eq!(all.map(|error| error.label()), QueryError::VARIANTS);
        assert_eq!(
            QueryError::VARIANTS,
            [
                "unavailable",
                "not_set_up",
                "pool_timeout",
                "query_canceled",
                "missing_partition",
                "policy_error",
            ]
        );
    }
}
