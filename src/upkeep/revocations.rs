//! Reads the revocations that other gateways, or earlier processes of this one, have stored.
//!
//! Invariant: a notification's payload is ignored, so that a session with the right to notify can
//! only make the gateway read the table, and that at most once per [`SPACING`].

use std::{error::Error, sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    auth::{
        Authenticator,
        revocations::{Revocation, RevokedBy},
    },
    clock::unix_now,
    db::{self, Pool},
    hub::Sockets,
};

/// Longest time between two readings.
const REREAD: Duration = Duration::from_secs(60);
/// Longest time between a failed reading and the next.
const RETRY: Duration = Duration::from_secs(2);
/// Shortest time between two readings, however many notifications arrive. A revocation takes effect
/// within a second.
const SPACING: Duration = Duration::from_millis(250);

/// The task that reads the revocations at the start, after each notification, and regularly.
#[derive(Debug)]
pub(crate) struct RevocationReader {
    pub(crate) pool: Pool,
    /// Holds the revocations in force.
    pub(crate) auth: Arc<Authenticator>,
    /// For one reading.
    pub(crate) timeout: Duration,
    /// Open sockets, which check their tokens again after a change.
    pub(crate) sockets: Arc<Sockets>,
}

impl RevocationReader {
    /// Reads until the server stops.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let rounds = async {
            loop {
                let wait = match self.read().await {
                    Ok(()) => REREAD,
                    Err(error) => {
                        tracing::debug!(error = &*error, "revocations not read");
                        RETRY
                    }
                };
                // Elapsing is as good a reason to read as a notification.
                let _ = timeout(wait, self.auth.revocations.stale()).await;
                sleep(SPACING).await;
            }
        };
        stop.run_until_cancelled(rounds).await;
    }

    /// Reads the revocations and, if they have changed, makes every socket check its tokens.
    async fn read(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let rows = db::revocations::revocations(&self.pool, self.auth.revocations.max());
        let rows = timeout(self.timeout, rows).await??;
        // A newer gateway may revoke by claims that this one does not know.
        let known = rows.into_iter().filter_map(|row| {
            let by = RevokedBy::named(&row.claim)?;
            Some(Revocation { by, value: row.value.into(), at: row.at, until: row.until })
        });
        let list = &self.auth.revocations;
        if list.replace(known, unix_now()) {
            tracing::info!(revocations = list.count(), "revocations have changed");
            self.sockets.review();
        }
        Ok(())
    }
}
