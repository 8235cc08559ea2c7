//! What may have been missed: from the history where it can be trusted, else everything.
//!
//! Invariants: a gap ends in exactly one invalidation per event that it touched; the history is
//! read after every LISTEN is active, so that what commits later is notified and what committed
//! earlier is read; where one event cannot be vouched for, its viewers get the complete list.

use std::{collections::HashMap, sync::Arc, time::Duration};

use sqlx::postgres::PgListener;
use tokio::time::Instant;

use super::{
    canary::{Good, Probe},
    listens::Listens,
    metrics::Metrics,
    places::Relayed,
};
use crate::{
    db::history::{self, Changed, Snapshot},
    invalidation::{CatchUpCause, Endpoints, Feed, Feeds, GapCause, Heard},
};

/// What the history knows about one event.
#[derive(Debug, Default)]
struct Missed {
    endpoints: Endpoints,
    is_everything: bool,
}

/// Finds out what was missed, and offers it to the feeds.
#[derive(Debug)]
pub(super) struct Gaps {
    pub(super) feeds: Arc<Feeds>,
    pub(super) listens: Arc<Listens>,
    pub(super) metrics: Arc<Metrics>,
    /// How long the history is kept.
    pub(super) history_keep: Duration,
    /// When every viewer of every event gets the complete list, the events are spread over this.
    pub(super) resync_spread: Duration,
}

/// The feeds that were listened to, each with its NOTIFY channel.
type Covered = [(Arc<Relayed>, Arc<Feed>)];

impl Gaps {
    /// Offers what viewers of the events that an earlier session has listened to have missed since
    /// `good`. `now` is what had been committed when all LISTENs were active.
    ///
    /// # Errors
    /// The session broke. What the server refuses to answer costs the complete list, and no more.
    pub(super) async fn catch_up(
        &self,
        listener: &mut PgListener,
        cause: GapCause,
        covered: Vec<Arc<Relayed>>,
        good: Option<&Good>,
        now: &Good,
    ) -> Result<(), sqlx::Error> {
        let covered = self.with_feeds(covered);
        // On one server transactions are only ever counted up.
        let is_same = |good: &&Good| {
            good.identity == now.identity && good.snapshot.xmax() <= now.snapshot.xmax()
        };
        let cause = match good {
            Some(good) if !is_same(&good) => {
                self.metrics.gap_begins(GapCause::Restored);
                GapCause::Restored
            }
            Some(_) | None => cause,
        };
        let missed = match good.filter(is_same) {
            Some(good) => self.read(listener, &good.snapshot, &covered).await?,
            None => None,
        };
        self.offer(cause, &covered, missed.as_ref());
        Ok(())
    }

    /// Offers what triggers could not notify since `since`, as a canary has found out.
    ///
    /// # Errors
    /// The session broke.
    pub(super) async fn catch_up_failures(
        &self,
        listener: &mut PgListener,
        since: &Snapshot,
        probe: &Probe,
    ) -> Result<(), sqlx::Error> {
        let failures = probe.failures.as_ref().map(|(_, failures)| &**failures).unwrap_or_default();
        let (kept, lost): (Vec<_>, Vec<_>) =
            failures.iter().partition(|failure| failure.is_in_history);
        if !lost.is_empty() {
            self.metrics.gap_begins(GapCause::TriggerFailure);
        }
        if !kept.is_empty() {
            self.metrics.gap_begins(GapCause::QueueFull);
        }
        // What has come to exist meanwhile belongs to the complete list, too.
        self.learn(listener, self.listens.covered()).await?;
        let covered = self.with_feeds(self.listens.covered());
        if !lost.is_empty() {
            let is_unknown = lost.iter().any(|failure| failure.eid.is_none());
            let is_lost = |feed: &Feed| {
                is_unknown || lost.iter().any(|failure| failure.eid.as_deref() == Some(feed.eid()))
            };
            let touched: Vec<_> =
                covered.iter().filter(|(_, feed)| is_lost(feed)).cloned().collect();
            self.offer(GapCause::TriggerFailure, &touched, None);
        }
        if !kept.is_empty() {
            let missed = self.read(listener, since, &covered).await?;
            self.offer(GapCause::QueueFull, &covered, missed.as_ref());
        }
        Ok(())
    }

    /// Learns which endpoints the events of these channels have.
    ///
    /// # Errors
    /// The session broke. Where the server refuses to answer, what is heard of an event is all that
    /// is known of it.
    pub(super) async fn learn(
        &self,
        listener: &mut PgListener,
        relayed: Vec<Arc<Relayed>>,
    ) -> Result<(), sqlx::Error> {
        let feeds: HashMap<_, _> = self
            .with_feeds(relayed)
            .into_iter()
            .map(|(_, feed)| (feed.eid().to_owned(), feed))
            .collect();
        if feeds.is_empty() {
            return Ok(());
        }
        let eids: Vec<_> = feeds.keys().cloned().collect();
        let Some(listed) = self.readable(history::endpoints(listener, &eids).await)? else {
            return Ok(());
        };
        let mut lists: HashMap<String, Endpoints> = HashMap::new();
        for (eid, endpoint) in listed {
            if !endpoint.is_empty() {
                lists.entry(eid).or_default().insert(endpoint.into());
            }
        }
        for (eid, endpoints) in &lists {
            if let Some(feed) = feeds.get(eid) {
                feed.learn(endpoints);
            }
        }
        Ok(())
    }

    /// Reads what the history knows, by EID; `None` if it cannot be read or lacks something.
    async fn read(
        &self,
        listener: &mut PgListener,
        since: &Snapshot,
        covered: &Covered,
    ) -> Result<Option<HashMap<String, Missed>>, sqlx::Error> {
        if covered.is_empty() {
            return Ok(None);
        }
        let keep = self.history_keep;
        let has_holes = self.readable(history::has_holes(listener, since, keep).await)?;
        let Some(has_holes) = has_holes else {
            return Ok(None);
        };
        let eids: Vec<_> = covered.iter().map(|(_, feed)| feed.eid().to_owned()).collect();
        let changed = self.readable(history::changed_since(listener, since, &eids).await)?;
        let Some(changed) = changed.filter(|_| !has_holes) else {
            return Ok(None);
        };
        let mut missed: HashMap<String, Missed> = HashMap::new();
        for Changed { eid, endpoint, is_pointer } in changed {
            let missed = missed.entry(eid).or_default();
            missed.is_everything |= is_pointer;
            missed.endpoints.extend(endpoint.map(Into::into));
        }
        Ok(Some(missed))
    }

    /// Returns what the server answered; `None` if it refused, which is counted.
    fn readable<T>(&self, read: Result<T, sqlx::Error>) -> Result<Option<T>, sqlx::Error> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(error @ (sqlx::Error::Database(_) | sqlx::Error::Protocol(_))) => {
                self.metrics.history_unreadable.inc();
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the history cannot be read");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Offers one invalidation to each feed of which something is known to be missed, and the
    /// complete list to each of which nothing is known, one feed after the other.
    fn offer(&self, cause: GapCause, covered: &Covered, missed: Option<&HashMap<String, Missed>>) {
        let (all, cause) = (self.feeds.all(), CatchUpCause::from(cause));
        let has_heard = |heard: Heard| all.iter().any(|feed| feed.heard() == heard);
        // Where nothing was heard of an event itself, its notifications are taken to be like those
        // of the others.
        let is_like_others = has_heard(Heard::OnlyWithId) && !has_heard(Heard::SomeWithoutId);
        for (relayed, feed) in covered {
            let is_trusted = match feed.heard() {
                Heard::OnlyWithId => true,
                Heard::SomeWithoutId => false,
                Heard::Nothing => is_like_others,
            };
            // A joined viewer who was owed a catch-up gets it with this one.
            let is_owed = feed.take_owed();
            let now = Instant::now();
            match missed.filter(|_| is_trusted && !is_owed) {
                Some(missed) => match missed.get(feed.eid()) {
                    Some(Missed { is_everything: true, .. }) => {
                        self.feeds.offer_gap(feed, cause, None, now);
                    }
                    Some(Missed { endpoints, .. }) if !endpoints.is_empty() => {
                        self.feeds.offer_gap(feed, cause, Some(endpoints), now);
                    }
                    Some(_) | None => {}
                },
                None => {
                    self.listens.cover_from_now(&relayed.channel);
                    let spread = self.resync_spread.mul_f64(fastrand::f64());
                    self.feeds.offer_gap(feed, cause, None, now + spread);
                }
            }
        }
    }

    /// Returns the channels that have a feed, with it.
    fn with_feeds(&self, relayed: Vec<Arc<Relayed>>) -> Vec<(Arc<Relayed>, Arc<Feed>)> {
        let with_feed = |relayed: Arc<Relayed>| {
            let feed = relayed.target.feed(&self.feeds)?;
            Some((relayed, feed))
        };
        relayed.into_iter().filter_map(with_feed).collect()
    }
}
