//! Which events the database knows, so that events that anybody can invent never keep them out.
//!
//! Invariants: the database is asked apart from the listening session, whose notifications do not
//! wait for it; what was known stays so while it does not answer; at most [`KNOWN_MAX`] events are
//! remembered.

use std::{error::Error, sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::{listens::Listens, metrics::Metrics};
use crate::{
    db::{Pool, history},
    telemetry::metrics::count,
};

/// Most events that are remembered. Those beyond are unknown until somebody publishes to them.
const KNOWN_MAX: u16 = 50_000;

/// The task that asks the database which events it knows.
#[derive(Debug)]
pub(super) struct KnownEvents {
    pub(super) pool: Pool,
    pub(super) listens: Arc<Listens>,
    pub(super) metrics: Arc<Metrics>,
    /// Time between two questions.
    pub(super) interval: Duration,
    /// For one question.
    pub(super) timeout: Duration,
}

impl KnownEvents {
    /// Asks until the server stops.
    pub(super) async fn run(self, stop: CancellationToken) {
        let rounds = async {
            let mut ticks = interval(self.interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.round().await;
            }
        };
        stop.run_until_cancelled(rounds).await;
    }

    async fn round(&self) {
        let known = history::known_events(&self.pool, KNOWN_MAX.into());
        let failure: Box<dyn Error> = match timeout(self.timeout, known).await {
            Ok(Ok(known)) => {
                self.metrics.known_events.set(count(known.len()));
                return self.listens.set_known(known.into_iter().map(Into::into).collect());
            }
            Ok(Err(error)) => error.into(),
            Err(elapsed) => elapsed.into(),
        };
        // The link's own errors, and what the database lacks, are logged and counted elsewhere.
        tracing::debug!(error = &*failure, "the database does not tell which events it knows");
    }
}
