//! What a gateway tells the others and hears from them, and the retention of what they share.
//!
//! Invariant: a record of a lost socket is believed only after the database has said that no other
//! gateway lives, or has died within a day without leaving its records.

use std::{error::Error, sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use crate::{db, lost_sockets::REMEMBERED, server::Services};

/// How often what is slow is done: retention, topics joined of late.
const SLOW: Duration = Duration::from_secs(60);
/// Most topics that are read of those joined of late.
const RECENT_MAX: usize = 10_000;
/// How far back records are read again: longer than the transaction that writes them takes.
const REREAD: Duration = Duration::from_secs(120);
/// For a batch of the history.
const FORGET_TIMEOUT: Duration = Duration::from_secs(30);

/// Looks after what is shared until the server stops.
pub(crate) async fn run(services: Arc<Services>, pool: PgPool) {
    let mut ticks = interval(services.config.relay.canary_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut upkeep = Upkeep { has_read: false, slow_at: None };
    loop {
        let round = async {
            ticks.tick().await;
            upkeep.round(&services, &pool).await;
        };
        tokio::select! {
            () = round => {}
            // Each statement is a transaction of its own: one that is cut off is as if never begun.
            () = services.stopped.cancelled() => return,
        }
    }
}

struct Upkeep {
    /// Whether what was there at the start has been read.
    has_read: bool,
    slow_at: Option<Instant>,
}

impl Upkeep {
    async fn round(&mut self, services: &Services, pool: &PgPool) {
        let deadline = services.config.relay.connect_timeout;
        let result = timeout(deadline, self.share(services, pool)).await;
        if !matches!(result, Ok(Ok(()))) {
            // Nobody knows who lives and dies meanwhile.
            services.lost_sockets.set_alone(false);
        }
        if let Ok(Err(error)) = result {
            tracing::debug!(error = &error as &dyn Error, "nothing shared with other gateways");
        }
        if self.slow_at.is_none_or(|at| at.elapsed() >= SLOW) {
            self.slow_at = Some(Instant::now());
            services.events.sweep();
            services.lost_sockets.sweep();
            services.healing.sweep();
            let forgotten = timeout(FORGET_TIMEOUT, forget(services, pool)).await;
            if let Ok(Err(error)) = forgotten {
                tracing::debug!(error = &error as &dyn Error, "nothing forgotten");
            }
        }
    }

    async fn share(&mut self, services: &Services, pool: &PgPool) -> Result<(), sqlx::Error> {
        let has_others = db::sign_of_life(pool, services.gateway).await?;
        // After that: who has ended by then has left its records.
        let within = if self.has_read { REREAD } else { REMEMBERED };
        for record in db::lost_sockets(pool, services.gateway, within).await? {
            let last_data = Instant::now().checked_sub(record.age);
            services.lost_sockets.record(record.client, &record.topic, last_data);
        }
        if !self.has_read {
            for (topic, age) in db::recent_topics(pool, RECENT_MAX).await? {
                services.healing.note_recent(&topic, age);
            }
        }
        self.has_read = true;
        let topics: Vec<_> = services.healing.take_new().iter().map(ToString::to_string).collect();
        if !topics.is_empty() {
            db::note_recent_topics(pool, &topics).await?;
        }
        services.lost_sockets.set_alone(!has_others);
        Ok(())
    }
}

async fn forget(services: &Services, pool: &PgPool) -> Result<(), sqlx::Error> {
    while db::forget(pool, services.config.history.keep).await? >= db::FORGET_BATCH {}
    Ok(())
}

/// Leaves this gateway's records to the others, until the deadline.
pub(crate) async fn end(services: &Services, pool: &PgPool, deadline: Instant) {
    let records = services.lost_sockets.records();
    match timeout_at(deadline, db::end_gateway(pool, services.gateway, &records)).await {
        Ok(Ok(())) => tracing::info!(records = records.len(), "records of lost sockets are left"),
        Ok(Err(error)) => {
            tracing::warn!(error = &error as &dyn Error, "no records of lost sockets are left");
        }
        Err(_elapsed) => tracing::warn!("no records of lost sockets are left in time"),
    }
}
