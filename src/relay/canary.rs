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
    db::{
        Pool,
        history::{self, Snapshot, TriggerFailure},
    },
    telemetry::metrics::Counter,
};

/// A point up to which everything has arrived: what `snapshot` sees.
#[derive(Debug, Clone)]
pub(super) struct Good {
    pub(super) snapshot: Snapshot,
    /// The snapshot up to which failures of triggers have been looked into.
    pub(super) looked: String,
    /// The identity of the server that took the snapshot.
    pub(super) identity: String,
}

/// The canary that is under way.
#[derive(Debug)]
pub(super) struct Canary {
    nonce: String,
    sent: Instant,
    is_committed: bool,
    /// Set once it may become good.
    snapshot: Option<Snapshot>,
    has_arrived: bool,
}

/// What one canary found out about the database.
#[derive(Debug)]
pub(super) struct Probe {
    pub(super) snapshot: Snapshot,
    /// What triggers could not do since the last probe, with the snapshot that this one saw; `None`
    /// if that cannot be read.
    pub(super) failures: Option<(String, Vec<TriggerFailure>)>,
}

/// Returns the NOTIFY channel of one gateway's canaries.
pub(crate) fn channel(gateway: Uuid) -> String {
    format!("tidegate_canary_{}", gateway.simple())
}

/// Sends canaries over the pool, which is not the listening session's way to the database.
#[derive(Debug)]
pub(super) struct Canaries {
    pub(super) pool: Option<Pool>,
    /// The NOTIFY channel of this gateway's canaries.
    pub(super) channel: String,
    /// A canary that takes longer to send counts as failed.
    pub(super) timeout: Duration,
    /// Canaries that could not be sent.
    pub(super) failures: Counter,
}

impl Canaries {
    /// Sends a canary, and then reads what triggers could not do since `looked`.
    pub(super) async fn send(&self, nonce: String, looked: Option<String>) -> Option<Probe> {
        let pool = self.pool.as_ref()?;
        let probe = async {
            let snapshot = history::send_canary(pool, &self.channel, &nonce).await?;
            // After the snapshot was taken: what it does not see is found now or by the next one.
            let failures = match &looked {
                Some(looked) => history::trigger_failures(pool, looked).await.ok(),
                // Where nothing is good yet, the next session starts with the complete list.
                None => None,
            };
            Ok::<_, sqlx::Error>(Probe { snapshot, failures })
        };
        match timeout(self.timeout, probe).await {
            Ok(Ok(probe)) => Some(probe),
            Ok(Err(error)) => {
                self.failures.inc();
                tracing::debug!(error = &error as &dyn std::error::Error, "no canary sent");
                None
            }
            Err(_elapsed) => {
                self.failures.inc();
                None
            }
        }
    }
}

impl Canary {
    /// Creates a canary that has not been sent yet.
    pub(super) fn new() -> Self {
        let nonce = Uuid::new_v4().simple().to_string();
        let sent = Instant::now();
        Self { nonce, sent, is_committed: false, snapshot: None, has_arrived: false }
    }

    /// The payload that is notified.
    pub(super) fn nonce(&self) -> &str {
        &self.nonce
    }

    /// Records that the nonce has been committed, after `snapshot` was taken if that may become
    /// good.
    pub(super) fn committed(&mut self, snapshot: Option<Snapshot>) {
        self.is_committed = true;
        self.snapshot = snapshot;
    }

    /// Records what has arrived on the canary's channel; returns how long it took if it is the
    /// nonce.
    pub(super) fn arrived(&mut self, payload: &str) -> Option<Duration> {
        let is_first = payload == self.nonce && !self.has_arrived;
        self.has_arrived |= is_first;
        is_first.then(|| self.sent.elapsed())
    }

    /// The snapshot, once it is good.
    pub(super) fn good(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref().filter(|_| self.has_arrived)
    }

    /// Whether it has been committed and not arrived.
    pub(super) fn is_awaited(&self) -> bool {
        self.is_committed && !self.has_arrived
    }
}
