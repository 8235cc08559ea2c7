//! Queries the database's policies: what may a token do on a private channel?
//!
//! Invariants: a query is one transaction, which rolls back; a query that has a session runs to its
//! end, also if nobody waits for the answer; the text of a policy's error is shown to nobody, because
//! it may quote a claim.

mod metrics;
mod query;
mod sessions;
mod settings;

pub use query::{Allowed, Missing, PolicyAction, PolicyQuery, QueryError};
pub use settings::Settings;

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::postgres::PgConnectOptions;
use strum::VariantArray;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use self::{
    metrics::{Metrics, QueryResult},
    sessions::Sessions,
};
use crate::telemetry::metrics::Registry;

/// The policies on `realtime.messages`, queried on sessions of their own.
#[derive(Debug)]
pub struct Policies {
    sessions: Sessions,
    /// For a query with its wait for a session.
    timeout: Duration,
    no_headers: Arc<str>,
    /// Runs the queries.
    tracker: TaskTracker,
    metrics: Metrics,
    /// What has been logged, by [`Missing`].
    logged: [AtomicBool; Missing::VARIANTS.len()],
}

impl Policies {
    /// Connects to the database of `options` when the first query comes; `None` is no database.
    #[must_use]
    pub(crate) fn new(
        settings: &Settings,
        options: Option<PgConnectOptions>,
        registry: &Registry,
        tracker: TaskTracker,
    ) -> Self {
        let connections_max = usize::try_from(settings.connections_max).unwrap_or(1);
        Self {
            sessions: Sessions::new(options, connections_max),
            timeout: settings.timeout,
            no_headers: "{}".into(),
            tracker,
            metrics: Metrics::new(registry),
            logged: Default::default(),
        }
    }

    /// An empty JSON object, which all clients without headers share.
    #[must_use]
    pub fn no_headers(&self) -> &Arc<str> {
        &self.no_headers
    }

    /// Returns the extensions of the topic that the token may read; it may be none.
    ///
    /// # Errors
    /// [`QueryError`] if the policies gave no answer.
    ///
    /// # Cancel safety
    /// A query that has a session runs to its end, and its answer is dropped.
    pub async fn read(
        self: &Arc<Self>,
        query: PolicyQuery,
        wants_presence: bool,
    ) -> Result<Allowed, QueryError> {
        self.measured(query, PolicyAction::Read { presence: wants_presence }).await
    }

    /// Returns whether the token may broadcast to the topic.
    ///
    /// # Errors
    /// [`QueryError`] if the policies gave no answer.
    ///
    /// # Cancel safety
    /// A query that has a session runs to its end, and its answer is dropped.
    pub async fn write(self: &Arc<Self>, query: PolicyQuery) -> Result<bool, QueryError> {
        self.measured(query, PolicyAction::Write).await.map(|allowed| allowed.broadcast)
    }

    /// Runs the query, measures it, and logs why there is no answer.
    async fn measured(
        self: &Arc<Self>,
        query: PolicyQuery,
        action: PolicyAction,
    ) -> Result<Allowed, QueryError> {
        let started = Instant::now();
        let answer = self.run(query, action, started + self.timeout).await;
        self.metrics.seconds.of(&action).observe(started.elapsed().as_secs_f64());
        self.metrics.queries.of(QueryResult::new(action, &answer)).inc();
        match &answer {
            Ok(_) => {}
            Err(QueryError::NotSetUp(missing)) => self.log_once(*missing),
            Err(QueryError::Policy { sqlstate }) => {
                let action = action.label();
                tracing::debug!(code = "RlsPolicyError", action, %sqlstate, "denied");
            }
            Err(
                error @ (QueryError::Unavailable(_)
                | QueryError::PoolTimeout
                | QueryError::QueryCanceled
                | QueryError::MissingPartition),
            ) => {
                let (error, action) = (error as &dyn Error, action.label());
                tracing::debug!(error, action, "the policies give no answer");
            }
        }
        answer
    }

    /// Waits for a session, and runs the query in a task of its own.
    async fn run(
        self: &Arc<Self>,
        query: PolicyQuery,
        action: PolicyAction,
        deadline: Instant,
    ) -> Result<Allowed, QueryError> {
        // Postgres' type `text` cannot hold the character, so no policy can allow such a topic.
        if query.sub_topic.contains('\0') {
            return Ok(Allowed::NONE);
        }
        if !self.sessions.has_database() {
            return Err(QueryError::NotSetUp(Missing::Database));
        }
        // Half of the time is kept for the query itself: with less it would only be cancelled, and
        // the error would name the policies instead of the lack of sessions.
        let permit = self.sessions.permit(deadline - self.timeout / 2).await;
        let permit = permit.ok_or(QueryError::PoolTimeout)?;
        let policies = Arc::clone(self);
        // In a task of its own, which holds the permit until the server has finished, also if the
        // client has gone: clients that come and go occupy no more sessions than those that stay.
        let task = self.tracker.spawn(async move {
            let answer = query.run(&policies.sessions, action, deadline).await;
            drop(permit);
            answer
        });
        task.await.unwrap_or(Err(QueryError::Unavailable(None)))
    }

    /// Logs what the operator must set up, the first time.
    fn log_once(&self, missing: Missing) {
        if !self.logged[missing as usize].swap(true, Ordering::Relaxed) {
            tracing::warn!(error = &missing as &dyn Error, "private channels are unavailable");
        }
    }
}
