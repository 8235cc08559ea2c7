//! The sessions on which the policies are queried.
//!
//! Invariants: a permit stands for a session until the server has finished the query, also if
//! nobody waits for the answer; a session is used again only after the server has confirmed its
//! rollback, so that a query which fails or takes too long takes its session along.
//!
//! The library's pool is not used: it would retry a database that refuses connections, and its
//! time-out would not distinguish a lack of sessions from a lack of a database.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::db::policies::{self as statements, PolicyRole};

/// An idle session that was last used longer ago is closed, because a server or a pooler may have
/// ended it.
const SESSION_IDLE: Duration = Duration::from_secs(60);

/// All sessions of one gateway.
#[derive(Debug)]
pub(super) struct Sessions {
    /// `None` without a database.
    options: Option<PgConnectOptions>,
    /// One permit for each session that may exist.
    permits: Arc<Semaphore>,
    /// Idle sessions, each with the time of its last use.
    idle: Mutex<Vec<(PgConnection, Instant)>>,
}

/// A session in which a query's transaction has begun.
#[derive(Debug)]
pub(super) struct Begun {
    /// A session of the gateway's own role.
    pub(super) session: PgConnection,
    /// How the policies apply to the token's role.
    pub(super) role: PolicyRole,
    /// Whether the table `realtime.messages` exists.
    pub(super) has_messages: bool,
}

impl Sessions {
    /// Creates no session yet; at most `max` will exist.
    pub(super) fn new(options: Option<PgConnectOptions>, max: usize) -> Self {
        let permits = Arc::new(Semaphore::new(max.clamp(1, Semaphore::MAX_PERMITS)));
        Self { options, permits, idle: Mutex::default() }
    }

    /// Whether there is a database.
    pub(super) fn has_database(&self) -> bool {
        self.options.is_some()
    }

    /// Waits until a session may be used. Returns `None` at the deadline.
    ///
    /// # Cancel safety
    /// Cancel-safe: a caller that goes away loses its place in the queue, and nothing else.
    pub(super) async fn permit(&self, deadline: Instant) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.permits).acquire_owned();
        // The semaphore is never closed.
        timeout_at(deadline, permit).await.ok()?.ok()
    }

    /// Begins a query's transaction on an idle session, or on a new one.
    ///
    /// # Errors
    /// There is no database, or it refuses the session or the statement.
    pub(super) async fn begin(&self, role: &str, limit: Duration) -> Result<Begun, sqlx::Error> {
        while let Some((mut session, last_used)) = self.take_idle() {
            if last_used.elapsed() < SESSION_IDLE
                && let Ok((role, has_messages)) = statements::begin(&mut session, role, limit).await
            {
                return Ok(Begun { session, role, has_messages });
            }
            // The session is too old, or the server or a pooler has ended it.
        }
        let options = self.options.as_ref().ok_or(sqlx::Error::PoolClosed)?;
        let mut session = options.connect().await?;
        let (role, has_messages) = statements::begin(&mut session, role, limit).await?;
        Ok(Begun { session, role, has_messages })
    }

    /// Rolls the transaction back and keeps the session, or closes the session if the server does
    /// not confirm the rollback before the deadline.
    pub(super) async fn end(&self, mut session: PgConnection, deadline: Instant) {
        let rolled_back = timeout_at(deadline, statements::roll_back(&mut session)).await;
        if matches!(rolled_back, Ok(Ok(()))) {
            self.idle.lock().push((session, Instant::now()));
        }
    }

    /// Takes the session that was used last. The lock is released before the caller awaits.
    fn take_idle(&self) -> Option<(PgConnection, Instant)> {
        self.idle.lock().pop()
    }
}
