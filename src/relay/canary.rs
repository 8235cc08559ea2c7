//! The canary: a notification that the gateway sends to itself, by which it knows up to where
//! everything has arrived.
//!
//! Notifications arrive in the order of their commits. So when a nonce that was notified after a
//! snapshot was taken arrives on the listening session, everything that the snapshot sees has
//! arrived before it: the snapshot is a good one, and after a gap only what it does not see may have
//! been missed.
//!
//! Invariant: a snapshot becomes good only if its nonce has arrived and what triggers failed to do
//! before it has been looked into.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::{
    db::history::{self, Snapshot, TriggerFailure},
    server::Services,
};

/// Where everything that `snapshot` sees has arrived.
#[derive(Debug, Clone)]
pub(crate) struct Good {
    pub(crate) snapshot: Snapshot,
    /// What triggers failed to do and this sees has been looked into.
    pub(crate) looked: String,
    /// Of the server that took it.
    pub(crate) identity: String,
}

/// The canary that is under way.
#[derive(Debug)]
pub(crate) struct Canary {
    nonce: String,
    sent: Instant,
    is_committed: bool,
    /// Once it may become good.
    snapshot: Option<Snapshot>,
    has_arrived: bool,
}

/// What one look at the database gave.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) snapshot: Snapshot,
    /// What triggers could not do since the last look, with what this one saw; none if that cannot
    /// be read.
    pub(crate) failures: Option<(String, Vec<TriggerFailure>)>,
}

/// The channel of one gateway's canary.
pub(crate) fn channel(gateway: Uuid) -> String {
    format!("tidegate_canary_{}", gateway.simple())
}

/// Sends a canary over the pool, and then looks at what triggers could not do.
pub(crate) async fn send(
    services: &Services,
    nonce: String,
    looked: Option<String>,
) -> Option<Look> {
    let pool = services.pool.as_ref()?;
    let look = async {
        let channel = channel(services.gateway);
        let snapshot = history::send_canary(pool, &channel, &nonce).await?;
        // After the snapshot was taken: what it does not see is found now or by the next one.
        let failures = match &looked {
            Some(looked) => history::trigger_failures(pool, looked).await.ok(),
            // Where nothing is good yet, the next session starts with the complete list.
            None => None,
        };
        Ok::<_, sqlx::Error>(Look { snapshot, failures })
    };
    match timeout(services.config.relay.canary_timeout, look).await {
        Ok(Ok(look)) => Some(look),
        Ok(Err(error)) => {
            services.metrics.canary_failures.inc();
            tracing::debug!(error = &error as &dyn std::error::Error, "no canary sent");
            None
        }
        Err(_elapsed) => {
            services.metrics.canary_failures.inc();
            None
        }
    }
}

impl Canary {
    /// One that has not been sent yet.
    pub(crate) fn new() -> Self {
        let nonce = Uuid::new_v4().simple().to_string();
        let sent = Instant::now();
        Self { nonce, sent, is_committed: false, snapshot: None, has_arrived: false }
    }

    /// What is notified.
    pub(crate) fn nonce(&self) -> &str {
        &self.nonce
    }

    /// Notes that the nonce has been committed, after this snapshot was taken if that may become
    /// good.
    pub(crate) fn committed(&mut self, snapshot: Option<Snapshot>) {
        self.is_committed = true;
        self.snapshot = snapshot;
    }

    /// Notes what has arrived on the canary's channel, and says how long it took if it is ours.
    pub(crate) fn arrived(&mut self, payload: &str) -> Option<Duration> {
        let is_first = payload == self.nonce && !self.has_arrived;
        self.has_arrived |= is_first;
        is_first.then(|| self.sent.elapsed())
    }

    /// The snapshot, once it is good.
    pub(crate) fn good(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref().filter(|_| self.has_arrived)
    }

    /// Whether it has been committed and not arrived.
    pub(crate) fn is_awaited(&self) -> bool {
        self.is_committed && !self.has_arrived
    }
}
