//! Exchanges with the other gateways what all of them need, and prunes what they share.
//!
//! Invariant: records of lost sockets are trusted only after the database has confirmed that no
//! other gateway is alive or has died within 24 hours without leaving its records.

use std::{collections::HashMap, error::Error, sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::settings::Settings;
use crate::{
    db::{
        Pool,
        gateways::{self, LostSocket},
        history,
    },
    recovery::{REMEMBERED, Record, Recovery, Standing},
};

/// Time between two prunings of the database.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// Most recent topics that are read at the start.
const RECENT_MAX: usize = 10_000;
/// Overlap of two readings of lost sockets: longer than the transaction that writes them takes.
const REREAD: Duration = Duration::from_secs(120);
/// For the prunings of one time.
const PRUNE_TIMEOUT: Duration = Duration::from_secs(30);

/// The task that exchanges heartbeats, lost sockets and recent topics with other gateways.
#[derive(Debug)]
pub(crate) struct Sharing {
    pub(crate) settings: Settings,
    pub(crate) pool: Pool,
    pub(crate) gateway: Uuid,
    pub(crate) recovery: Arc<Recovery>,
    /// Time between two rounds.
    pub(crate) interval: Duration,
    /// For one exchange with the database.
    pub(crate) timeout: Duration,
}

/// Times of the last successful reading and of the last pruning.
#[derive(Default)]
struct Progress {
    read_at: Option<Instant>,
    pruned_at: Option<Instant>,
}

impl Sharing {
    /// Works in rounds until the server stops.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let rounds = async {
            let mut ticks = interval(self.interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut progress = Progress::default();
            loop {
                ticks.tick().await;
                self.round(&mut progress).await;
            }
        };
        // Each statement is a transaction of its own, so a round that is cut off leaves nothing half
        // done.
        stop.run_until_cancelled(rounds).await;
    }

    async fn round(&self, progress: &mut Progress) {
        let result = timeout(self.timeout, self.exchange(progress)).await;
        if !matches!(result, Ok(Ok(()))) {
            // Other gateways may start or die until the next exchange.
            self.recovery.lost_sockets.set_alone(false);
            self.recovery.set_answered(false);
        }
        if let Ok(Err(error)) = result {
            tracing::debug!(error = &error as &dyn Error, "nothing shared with other gateways");
        }
        if progress.pruned_at.is_none_or(|at| at.elapsed() >= PRUNE_INTERVAL) {
            progress.pruned_at = Some(Instant::now());
            let pruned = timeout(PRUNE_TIMEOUT, self.prune()).await;
            if let Ok(Err(error)) = pruned {
                tracing::debug!(error = &error as &dyn Error, "nothing forgotten");
            }
        }
    }

    /// Sends a heartbeat, reads the lost sockets of other gateways, and writes recent topics.
    async fn exchange(&self, progress: &mut Progress) -> Result<(), sqlx::Error> {
        let has_others = gateways::heartbeat(&self.pool, self.gateway).await?;
        // After the heartbeat: a gateway that it saw as ended has committed its records by now.
        let now = Instant::now();
        let within = progress.read_at.map_or(REMEMBERED, |at| now.duration_since(at) + REREAD);
        if progress.read_at.is_none() {
            for (topic, age) in gateways::recent_topics(&self.pool, RECENT_MAX).await? {
                self.recovery.note_recent(&topic, age);
            }
        }
        // Before the lost sockets are taken over, for which it matters whether an event is known.
        let answered = self.ask_standings().await;
        self.recovery.set_answered(answered.is_ok());
        if let Err(error) = answered {
            tracing::debug!(
                error = &error as &dyn Error,
                "the database does not say which events everybody may know; is its system file old?"
            );
        }
        for lost in gateways::lost_sockets(&self.pool, self.gateway, within).await? {
            self.recovery.take_over(lost.client, &lost.topic, lost.age);
        }
        progress.read_at = Some(now);
        let topics: Vec<_> = self.recovery.take_new().iter().map(ToString::to_string).collect();
        if !topics.is_empty() {
            gateways::note_recent_topics(&self.pool, &topics).await?;
        }
        self.recovery.lost_sockets.set_alone(!has_others);
        Ok(())
    }

    /// Asks which of the events that somebody has joined everybody may know.
    async fn ask_standings(&self) -> Result<(), sqlx::Error> {
        let asked = self.recovery.unasked_events();
        if asked.is_empty() {
            return Ok(());
        }
        let eids: Vec<_> = asked.iter().map(|eid| &**eid).collect();
        let standings = gateways::event_standings(&self.pool, &eids).await?;
        let standings: HashMap<_, _> = standings.into_iter().collect();
        for eid in &eids {
            let standing = match standings.get(*eid) {
                Some(true) => Standing::Public,
                Some(false) => Standing::Private,
                None => Standing::Unknown,
            };
            self.recovery.answered(eid, standing);
        }
        Ok(())
    }

    /// Deletes what is past its retention, the history in batches.
    async fn prune(&self) -> Result<(), sqlx::Error> {
        let keep = self.settings.keep;
        while history::prune_history(&self.pool, keep).await? >= history::PRUNE_BATCH {}
        gateways::prune_shared(&self.pool).await
    }
}

/// Writes this gateway's lost sockets for the other gateways, and gives up at the deadline. The end
/// is orderly if every socket has ended and the records say what they miss.
pub(crate) async fn deregister(
    pool: &Pool,
    gateway: Uuid,
    recovery: &Recovery,
    is_orderly: bool,
    deadline: Instant,
) {
    let is_orderly = is_orderly && !recovery.lost_sockets.has_overflowed();
    let records: Vec<_> = recovery.lost_sockets.records().into_iter().map(row).collect();
    let deregister = gateways::deregister(pool, gateway, is_orderly, &records);
    match timeout_at(deadline, deregister).await {
        Ok(Ok(())) => tracing::info!(records = records.len(), "records of lost sockets are left"),
        Ok(Err(error)) => {
            tracing::warn!(error = &error as &dyn Error, "no records of lost sockets are left");
        }
        Err(_elapsed) => tracing::warn!("no records of lost sockets are left in time"),
    }
}

/// Converts a record to its row.
fn row(record: Record) -> LostSocket {
    let Record { client, topic, age } = record;
    LostSocket { client, topic: topic.to_string(), age }
}
