//! Revocations that another gateway has taken, or this one before it was started.
//!
//! Invariant: a notification carries nothing, so that whoever may notify can make a gateway read
//! the table, at most so often, and nothing else.

use std::{error::Error, sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::{sleep, timeout};

use crate::{
    auth::revocations::{By, Revocation},
    clock::unix_now,
    db,
    server::Services,
};

/// Between two readings, if nobody tells of a change.
const REREAD: Duration = Duration::from_secs(60);
/// After one that failed.
const RETRY: Duration = Duration::from_secs(2);
/// Between two readings, whoever tells of changes: a revocation counts within a second.
const SPACING: Duration = Duration::from_millis(250);

/// Reads the revocations whenever they change, until the server stops.
pub(crate) async fn run(services: Arc<Services>, pool: PgPool) {
    let rounds = async {
        loop {
            let wait = match read(&services, &pool).await {
                Ok(()) => REREAD,
                Err(error) => {
                    tracing::debug!(error = &*error, "revocations not read");
                    RETRY
                }
            };
            // Whichever comes first.
            let _ = timeout(wait, services.revocations_changed.notified()).await;
            sleep(SPACING).await;
        }
    };
    services.stopped.run_until_cancelled(rounds).await;
}

async fn read(services: &Services, pool: &PgPool) -> Result<(), Box<dyn Error + Send + Sync>> {
    let revocations = db::revocations::revocations(pool, services.config.auth.revocations_max);
    let revocations = timeout(services.config.relay.connect_timeout, revocations).await??;
    let list = &services.verifier.revocations;
    // A newer gateway may revoke by claims that this one does not know.
    let known = revocations.into_iter().filter_map(|row| {
        let by = By::named(&row.claim)?;
        Some(Revocation { by, value: row.value.into(), at: row.at, until: row.until })
    });
    if list.replace(known, unix_now()) {
        tracing::info!(revocations = list.count(), "revocations have changed");
        services.review();
    }
    Ok(())
}
