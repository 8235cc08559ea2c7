//! What the database's policies let a token do on a private channel.
//!
//! Invariants: a question is one transaction, which rolls back; policies are asked with the rights
//! of the token's role and no others; a session is used again only when its rollback has been
//! confirmed, so that a question that breaks or takes too long takes its session along; a place
//! stands for a session until the server is done with the question, whoever still waits for it; what
//! Postgres says of a policy is never shown, as it may quote a claim.
//!
//! The sessions are no pool of the library: that would retry a database that refuses, and waits
//! would not tell a lack of sessions from a lack of a database.

use std::{
    borrow::Cow,
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus::{HistogramVec, IntCounterVec};
use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::{
    auth::jwt::Token,
    db::{
        self,
        policies::{self as statements, PolicyContext, PolicyRole},
    },
    metrics::Metrics,
    protocol::error_code::{ErrorCode, Refusal},
    server::settings::Config,
};

/// A session that was not used for so long is not trusted to be alive.
const SESSION_IDLE: Duration = Duration::from_secs(60);

/// The extensions of a channel, as `realtime.messages` names them.
const BROADCAST: &str = "broadcast";
const PRESENCE: &str = "presence";

/// Asks the policies on `realtime.messages`, on sessions of its own.
#[derive(Debug)]
pub struct Policies {
    /// None without a database.
    options: Option<PgConnectOptions>,
    /// One for each session that may exist.
    places: Arc<Semaphore>,
    /// Sessions that nobody uses, and since when.
    idle: Mutex<Vec<(PgConnection, Instant)>>,
    timeout: Duration,
    no_headers: Arc<str>,
    /// Where questions run.
    tracker: TaskTracker,
    seconds: HistogramVec,
    questions: IntCounterVec,
    /// What the operator was told of, by [`Missing`].
    told: [AtomicBool; Missing::ALL.len()],
}

/// Who asks, for which topic.
#[derive(Debug, Clone)]
pub struct PolicyQuery {
    /// A verified one.
    pub token: Arc<Token>,
    /// The topic without its prefix.
    pub sub_topic: Arc<str>,
    /// Headers of the request, as a JSON object.
    pub headers: Arc<str>,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyAction {
    /// Which extensions may be read.
    Read {
        /// Whether presence is among those asked about.
        presence: bool,
    },
    /// Whether broadcasts may be written.
    Write,
}

impl PolicyAction {
    /// Every question's label once.
    pub const ALL: [Self; 2] = [Self::Read { presence: false }, Self::Write];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write => "write",
        }
    }
}

/// The extensions that something is allowed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Broadcasts.
    pub broadcast: bool,
    /// Presence.
    pub presence: bool,
}

impl Allowed {
    /// On every extension.
    pub const ALL: Self = Self { broadcast: true, presence: true };
    /// On none.
    pub const NONE: Self = Self { broadcast: false, presence: false };

    /// Whether there is any.
    #[must_use]
    pub fn any(self) -> bool {
        self.broadcast || self.presence
    }
}

/// Why the policies gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// Nobody answers, or the server cannot serve.
    #[error("the database is not available")]
    Unavailable(#[source] Option<sqlx::Error>),
    /// Something that the operator must set up.
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
    /// A policy failed, or the token's role is not one that it can be asked for. It says no.
    #[error("a policy failed, or the role is unknown (SQLSTATE {sqlstate})")]
    Policy {
        /// Postgres' code.
        sqlstate: Box<str>,
    },
}

impl QueryError {
    /// Every label that [`Self::kind`] gives.
    pub const KINDS: [&'static str; 6] = [
        "unavailable",
        "not_set_up",
        "pool_timeout",
        "query_canceled",
        "missing_partition",
        "policy_error",
    ];

    /// The metric's label.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::NotSetUp(_) => "not_set_up",
            Self::PoolTimeout => "pool_timeout",
            Self::QueryCanceled => "query_canceled",
            Self::MissingPartition => "missing_partition",
            Self::Policy { .. } => "policy_error",
        }
    }

    /// What the client of a channel is told.
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

/// What private channels lack; the operator is told once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// No URL.
    #[error("there is no database: set TIDEGATE_DATABASE_URL")]
    Database,
    /// A table, a function or the right to them.
    #[error(
        "realtime.messages or the gateway's right to ask its policies is missing: run `tidegate migrate` as the owner of the tables"
    )]
    Schema,
    /// The gateway's role may not take that of a token.
    #[error(
        "the gateway's role is no member of a token's role: run `tidegate migrate`, or grant that role to the gateway's"
    )]
    Membership,
}

impl Missing {
    /// Everything that may be.
    const ALL: [Self; 3] = [Self::Database, Self::Schema, Self::Membership];
}

impl Policies {
    /// Asks the database that the settings name, when somebody asks.
    #[must_use]
    pub fn new(config: &Config, metrics: &Metrics, tracker: &TaskTracker) -> Self {
        let connections_max = usize::try_from(config.policies.connections_max).unwrap_or(1);
        Self {
            // The settings' check has read the URL.
            options: Some(config.pool_url())
                .filter(|url| !url.is_empty())
                .and_then(|url| db::options(url).ok()),
            places: Arc::new(Semaphore::new(connections_max.clamp(1, Semaphore::MAX_PERMITS))),
            idle: Mutex::default(),
            timeout: config.policies.timeout,
            no_headers: "{}".into(),
            tracker: tracker.clone(),
            seconds: metrics.policy_seconds.clone(),
            questions: metrics.policy_questions.clone(),
            told: Default::default(),
        }
    }

    /// An empty JSON object, for who has no headers to tell of.
    #[must_use]
    pub fn no_headers(&self) -> &Arc<str> {
        &self.no_headers
    }

    /// What the token may read of the topic; nothing is an answer, too.
    ///
    /// # Errors
    /// [`QueryError`] if the policies gave no answer.
    ///
    /// # Cancel safety
    /// A question that has come to its turn goes on to its end, for nobody.
    pub async fn read(
        self: &Arc<Self>,
        asking: PolicyQuery,
        wants_presence: bool,
    ) -> Result<Allowed, QueryError> {
        self.count(asking, PolicyAction::Read { presence: wants_presence }).await
    }

    /// Whether the token may broadcast to the topic.
    ///
    /// # Errors
    /// [`QueryError`] if the policies gave no answer.
    ///
    /// # Cancel safety
    /// A question that has come to its turn goes on to its end, for nobody.
    pub async fn write(self: &Arc<Self>, asking: PolicyQuery) -> Result<bool, QueryError> {
        self.count(asking, PolicyAction::Write).await.map(|allowed| allowed.broadcast)
    }

    async fn count(
        self: &Arc<Self>,
        asking: PolicyQuery,
        question: PolicyAction,
    ) -> Result<Allowed, QueryError> {
        let started = Instant::now();
        let answer = self.ask(asking, question, started + self.timeout).await;
        let kind = question.kind();
        self.seconds.with_label_values(&[kind]).observe(started.elapsed().as_secs_f64());
        let result = match &answer {
            Ok(allowed) if allowed.any() => "allowed",
            Ok(_) => "denied",
            Err(error) => {
                match error {
                    QueryError::NotSetUp(missing) => self.tell(*missing),
                    QueryError::Policy { sqlstate } => {
                        tracing::debug!(code = "RlsPolicyError", action = kind, %sqlstate, "denied");
                    }
                    QueryError::Unavailable(_)
                    | QueryError::PoolTimeout
                    | QueryError::QueryCanceled
                    | QueryError::MissingPartition => {
                        let error = error as &dyn Error;
                        tracing::debug!(error, action = kind, "the policies give no answer");
                    }
                }
                error.kind()
            }
        };
        self.questions.with_label_values(&[kind, result]).inc();
        answer
    }

    async fn ask(
        self: &Arc<Self>,
        asking: PolicyQuery,
        question: PolicyAction,
        deadline: Instant,
    ) -> Result<Allowed, QueryError> {
        // A text of Postgres cannot hold it, so that no policy is for such a topic.
        if asking.sub_topic.contains('\0') {
            return Ok(Allowed::NONE);
        }
        if self.options.is_none() {
            return Err(QueryError::NotSetUp(Missing::Database));
        }
        // Half of the time is for the question itself: who comes to it later would only be told that
        // it takes too long.
        let place =
            timeout_at(deadline - self.timeout / 2, Arc::clone(&self.places).acquire_owned())
                .await
                .map_err(|_elapsed| QueryError::PoolTimeout)?
                // Never closed.
                .map_err(|_closed| QueryError::PoolTimeout)?;
        let policies = Arc::clone(self);
        // On its own, so that it keeps its place until the server is done, also when nobody waits
        // for it any more: clients that come and go hold no more sessions than those that stay.
        let asked = self.tracker.spawn(async move {
            let answer = policies.ask_once(&asking, question, deadline).await;
            drop(place);
            answer
        });
        asked.await.unwrap_or(Err(QueryError::Unavailable(None)))
    }

    async fn ask_once(
        &self,
        asking: &PolicyQuery,
        question: PolicyAction,
        deadline: Instant,
    ) -> Result<Allowed, QueryError> {
        let PolicyQuery { token, sub_topic, headers } = asking;
        let claims = &token.claims;
        // The server's own limit goes first, so that the session lives on.
        let limit = deadline.saturating_duration_since(Instant::now()).mul_f64(0.9);
        let (mut session, role, has_messages) =
            timeout_at(deadline, self.begin(&claims.role, limit))
                .await
                .map_err(|_elapsed| QueryError::Unavailable(None))?
                .map_err(|error| QueryError::Unavailable(Some(error)))?;
        let json = claims.json();
        let context = PolicyContext {
            role: &claims.role,
            sub: claims.sub().unwrap_or_default(),
            claims: &json,
            headers,
            sub_topic,
        };
        let answer = match (role, has_messages) {
            (PolicyRole::Bypasses, _) => Ok(Allowed::ALL),
            (PolicyRole::Unknown | PolicyRole::Superuser, _) => {
                Err(QueryError::Policy { sqlstate: UNKNOWN_ROLE.into() })
            }
            (PolicyRole::Bound, false) => Err(QueryError::NotSetUp(Missing::Schema)),
            (PolicyRole::Bound, true) => {
                let answer = async {
                    match question {
                        PolicyAction::Read { presence } => {
                            read(&mut session, &context, presence).await
                        }
                        PolicyAction::Write => write(&mut session, &context).await,
                    }
                };
                // A session that is still busy is closed.
                timeout_at(deadline, answer).await.map_err(|_elapsed| QueryError::QueryCanceled)?
            }
        };
        let ended = timeout_at(deadline, statements::roll_back(&mut session)).await;
        if matches!(ended, Ok(Ok(()))) {
            self.idle.lock().push((session, Instant::now()));
        }
        answer
    }

    /// A session of the gateway's own role in which a question has begun.
    async fn begin(
        &self,
        role: &str,
        limit: Duration,
    ) -> Result<(PgConnection, PolicyRole, bool), sqlx::Error> {
        while let Some((mut session, since)) = self.take_idle() {
            if since.elapsed() < SESSION_IDLE
                && let Ok((role, has_messages)) = statements::begin(&mut session, role, limit).await
            {
                return Ok((session, role, has_messages));
            }
            // The server, or somebody in between, has ended it.
        }
        let options = self.options.as_ref().ok_or(sqlx::Error::PoolClosed)?;
        let mut session = options.connect().await?;
        let (role, has_messages) = statements::begin(&mut session, role, limit).await?;
        Ok((session, role, has_messages))
    }

    fn take_idle(&self) -> Option<(PgConnection, Instant)> {
        self.idle.lock().pop()
    }

    fn tell(&self, missing: Missing) {
        if !self.told[missing as usize].swap(true, Ordering::Relaxed) {
            tracing::warn!(error = &missing as &dyn Error, "private channels are unavailable");
        }
    }
}

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
    let sees = |extension| seen.iter().any(|it| it == extension);
    Ok(Allowed { broadcast: sees(BROADCAST), presence: sees(PRESENCE) })
}

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

/// SQLSTATE of a missing right, which a policy's no is, too.
const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// SQLSTATE of a role that does not exist.
const UNKNOWN_ROLE: &str = "22023";

fn sqlstate(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Of a statement that the gateway's own role runs.
fn of_gateway(error: sqlx::Error) -> QueryError {
    match sqlstate(&error).as_deref() {
        // No such function, schema, table or column, or no right to it.
        Some("42883" | "3F000" | "42P01" | "42703" | INSUFFICIENT_PRIVILEGE) => {
            QueryError::NotSetUp(Missing::Schema)
        }
        _ => of_server(error).unwrap_or_else(|error| QueryError::Unavailable(Some(error))),
    }
}

/// Of becoming the token's role.
fn of_role(error: sqlx::Error) -> QueryError {
    match sqlstate(&error).as_deref() {
        Some(INSUFFICIENT_PRIVILEGE) => QueryError::NotSetUp(Missing::Membership),
        _ => of_policies(error),
    }
}

/// Of a statement that policies may make fail.
fn of_policies(error: sqlx::Error) -> QueryError {
    of_server(error).unwrap_or_else(|error| match sqlstate(&error) {
        Some(sqlstate) => QueryError::Policy { sqlstate: sqlstate.into() },
        None => QueryError::Unavailable(Some(error)),
    })
}

/// What any statement may end with.
fn of_server(error: sqlx::Error) -> Result<QueryError, sqlx::Error> {
    let Some(database) = error.as_database_error() else {
        return Ok(QueryError::Unavailable(Some(error)));
    };
    let code = database.code().unwrap_or_default();
    match &*code {
        "57014" => Ok(QueryError::QueryCanceled),
        // Of all checks only this one is the table's and has no name.
        "23514" if database.table() == Some("messages") && database.constraint().is_none() => {
            Ok(QueryError::MissingPartition)
        }
        // None of a policy's doing: the connection, the transaction, a statement that a pooler in
        // between has lost, a deadlock, resources, an operator, the system.
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
        assert_eq!(all.map(|error| error.kind()), QueryError::KINDS);
    }
}
