//! The orderly end of a server: sockets in jittered batches, then everything else.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::gateway::Gateway;
use crate::{hub::outbox::Ended, upkeep};

/// What everything else may take once the sockets are closed, however long that took.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends what waits for its window, closes all sockets in jittered batches, then ends everything,
/// within the drain's time.
pub(super) async fn drain(gateway: &Gateway) {
    let timeout = gateway.drain.timeout;
    let deadline = Instant::now() + timeout;
    gateway.feeds.flush().await;
    let outboxes = gateway.sockets.outboxes();
    tracing::info!(sockets = outboxes.len(), "draining");
    // Clients come back at once: the spread is theirs. A hundred need none.
    let spread = Duration::from_millis(outboxes.len() as u64).min(timeout / 2);
    for batch in outboxes.chunks(outboxes.len().div_ceil(20).max(100)) {
        for outbox in batch {
            outbox.end(Ended::Draining);
        }
        if outboxes.len() > batch.len() {
            sleep((spread / 20).mul_f64(0.5 + fastrand::f64())).await;
        }
    }
    gateway.connections.close();
    let closed = timeout_at(deadline, gateway.connections.wait()).await;
    // A gateway that never had a session of the database has nobody to leave records to.
    if let Some(pool) = gateway.pool.as_ref().filter(|pool| pool.size() > 0) {
        let (id, recovery) = (gateway.id, &gateway.recovery);
        let deadline = Instant::now() + STOP_TIMEOUT;
        upkeep::deregister(pool, id, recovery, closed.is_ok(), deadline).await;
    }
    gateway.stopped.cancel();
    gateway.tasks.close();
    // What still runs after the deadline is dropped with the runtime.
    let deadline = deadline.max(Instant::now() + STOP_TIMEOUT);
    let ended = timeout_at(deadline, gateway.tasks.wait()).await;
    tracing::info!(complete = closed.is_ok() && ended.is_ok(), "drained");
}
