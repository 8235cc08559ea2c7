//! What a gateway tells the others and hears from them, and the retention of what they share.
//!
//! Invariant: a record of a lost socket is believed only after the database has said that no other
//! gateway lives, or has died within a day without leaving its records.

use std::{error::Error, sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use crate::{db, recovery::REMEMBERED, server::Services};

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
    let mut upkeep = Upkeep { read_at: None, slow_at: None };
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
    /// When it was last read what others have left.
    read_at: Option<Instant>,
    slow_at: Option<Instant>,
}

impl Upkeep {
    async fn round(&mut self, services: &Services, pool: &PgPool) {
        let deadline = services.config.relay.connect_timeout;
        let result = timeout(deadline, self.share(services, pool)).await;
        if !matches!(result, Ok(Ok(()))) {
            // Nobody knows who lives and dies meanwhile.
            services.recovery.lost_sockets.set_alone(false);
        }
        if let Ok(Err(error)) = result {
            tracing::debug!(error = &error as &dyn Error, "nothing shared with other gateways");
        }
        if self.slow_at.is_none_or(|at| at.elapsed() >= SLOW) {
            self.slow_at = Some(Instant::now());
            services.feeds.sweep();
            services.recovery.sweep();
            let forgotten = timeout(FORGET_TIMEOUT, forget(services, pool)).await;
            if let Ok(Err(error)) = forgotten {
                tracing::debug!(error = &error as &dyn Error, "nothing forgotten");
            }
        }
    }

    async fn share(&mut self, services: &Services, pool: &PgPool) -> Result<(), sqlx::Error> {
        let has_others = db::sign_of_life(pool, services.gateway).await?;
        // After that: who has ended by then has left its records.
        let now = Instant::now();
        let within = self.read_at.map_or(REMEMBERED, |at| now.duration_since(at) + REREAD);
        for record in db::lost_sockets(pool, services.gateway, within).await? {
            let last_data = Instant::now().checked_sub(record.age);
            services.recovery.lost_sockets.record(record.client, &record.topic, last_data);
        }
        if self.read_at.is_none() {
            for (topic, age) in db::recent_topics(pool, RECENT_MAX).await? {
                services.recovery.healing.note_recent(&topic, age);
            }
        }
        self.read_at = Some(now);
        let topics: Vec<_> =
            services.recovery.healing.take_new().iter().map(ToString::to_string).collect();
        if !topics.is_empty() {
            db::note_recent_topics(pool, &topics).await?;
        }
        services.recovery.lost_sockets.set_alone(!has_others);
        Ok(())
    }
}

async fn forget(services: &Services, pool: &PgPool) -> Result<(), sqlx::Error> {
    while db::forget_history(pool, services.config.history.keep).await? >= db::FORGET_BATCH {}
    db::forget_shared(pool).await
}

/// Leaves this gateway's records to the others, until the deadline. Its end is orderly if every
/// socket has ended and so has its record.
pub(crate) async fn end(services: &Services, pool: &PgPool, is_orderly: bool, deadline: Instant) {
    let records = services.recovery.lost_sockets.records();
    let end = db::end_gateway(pool, services.gateway, is_orderly, &records);
    match timeout_at(deadline, end).await {
        Ok(Ok(())) => tracing::info!(records = records.len(), "records of lost sockets are left"),
        Ok(Err(error)) => {
            tracing::warn!(error = &error as &dyn Error, "no records of lost sockets are left");
        }
        Err(_elapsed) => tracing::warn!("no records of lost sockets are left in time"),
    }
}
