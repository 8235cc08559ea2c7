//! The feeds of auction events: the first invalidation leaves at once, those within the window
//! after it in one message, and a client that was away is told what has changed meanwhile.
//!
//! Invariants: every source of a rule that merges goes through [`Feeds::offer`], so that the window
//! covers all of them; one task sends, in the order in which windows open; at most `max` feeds are
//! held; no lock is held while frames are pushed, and no two at once.

mod catch_up;
mod feed;
mod journal;
mod known;
mod metrics;
mod outgoing;
mod payload;
mod reason;
mod sender;
mod window;

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use self::{catch_up::CatchUp, feed::Offered, metrics::Metrics, outgoing::ToSend, sender::Timers};
pub(crate) use self::{
    catch_up::ClientHistory,
    feed::Feed,
    journal::{Delivery, Heard, MINUTE, Notice, NoticeCount, Summary, Tally},
    payload::{ENDPOINT_BYTES_MAX, Endpoints},
    reason::GapCause,
    sender::Sender,
    window::Notified,
};
pub use self::{
    payload::BadEndpoint,
    reason::{CatchUpCause, Coverage, LinkLoss, SendReason},
};
use crate::{
    access::{Captures, Rule},
    hub::{Hub, Subscription, outbox::Outbox},
    protocol::serializer::Broadcast,
    telemetry::metrics::Registry,
};

/// How long a feed is remembered that nobody holds.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// The feeds of all rules that merge.
#[derive(Debug)]
pub(crate) struct Feeds {
    /// By the first spelling of the topic.
    held: Mutex<HashMap<Box<str>, Held>>,
    max: usize,
    started: Instant,
    sender: Sender,
}

#[derive(Debug)]
struct Held {
    feed: Arc<Feed>,
    used: Instant,
    /// The feed is not forgotten before.
    muted_until: Option<Instant>,
}

impl Feeds {
    /// Creates an empty set of feeds, with room for `max`.
    pub(crate) fn new(max: usize, hub: Arc<Hub>, registry: &Registry) -> Self {
        let metrics = Arc::new(Metrics::new(registry));
        let sender = Sender { timers: Arc::new(Timers::default()), hub, metrics };
        Self { held: Mutex::default(), max, started: Instant::now(), sender }
    }

    /// Returns the task that sends what is due. It runs once.
    pub(crate) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Returns the feed of a topic, and creates it if needed; `None` if the rule does not merge or
    /// there is no room.
    pub(crate) fn of(&self, rule: &Arc<Rule>, captures: &Captures) -> Option<Arc<Feed>> {
        let merge = rule.merge.as_ref()?;
        let key: Box<str> = rule.pattern.first()?.expand(captures).into();
        let now = Instant::now();
        let mut feeds = self.held.lock();
        if let Some(held) = feeds.get_mut(&key) {
            held.used = now;
            return Some(Arc::clone(&held.feed));
        }
        if feeds.len() >= self.max {
            feeds.retain(|_, held| {
                Arc::strong_count(&held.feed) > 1
                    || held.muted_until.is_some_and(|until| until > now)
            });
            if feeds.len() >= self.max {
                return None;
            }
        }
        let feed = Arc::new(Feed::new(rule, merge, captures, self.started));
        feeds.insert(key, Held { feed: Arc::clone(&feed), used: now, muted_until: None });
        Some(feed)
    }

    /// Returns every feed that is remembered.
    pub(crate) fn all(&self) -> Vec<Arc<Feed>> {
        self.held.lock().values().map(|held| Arc::clone(&held.feed)).collect()
    }

    /// Returns the feeds of an event, one for each rule that has it.
    pub(crate) fn named(&self, eid: &str) -> Vec<Arc<Feed>> {
        let feeds = self.held.lock();
        let feeds = feeds.values().map(|held| &held.feed);
        feeds.filter(|feed| feed.eid() == eid).map(Arc::clone).collect()
    }

    /// Since when this process could hear anything. Without a database nothing reaches back
    /// further.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Takes the invalidations out of `broadcasts`, which were sent to a topic of `feed`, and
    /// returns the rest. `notified` is given for what came from the database.
    pub(crate) fn offer(
        &self,
        feed: &Arc<Feed>,
        broadcasts: Vec<Broadcast>,
        notified: Option<Notified>,
    ) -> Vec<Broadcast> {
        let Offered { rest, bad, is_first } = feed.offer_all(broadcasts, notified);
        for bad in bad {
            self.sender.metrics.endpoints_dropped.of(bad).inc();
        }
        // A feed with a timer notices by itself that its time has moved.
        if is_first {
            self.sender.timers.add(feed);
        }
        rest
    }

    /// Tells all viewers of a feed what they may have missed, not before `earliest`: these
    /// endpoints, or the complete list for `None`.
    pub(crate) fn offer_gap(
        &self,
        feed: &Arc<Feed>,
        cause: CatchUpCause,
        missed: Option<&Endpoints>,
        earliest: Instant,
    ) {
        let coverage = if missed.is_some() { Coverage::Exact } else { Coverage::Complete };
        self.sender.metrics.catch_ups.of((cause, coverage)).inc();
        tracing::debug!(eid = feed.eid(), cause = cause.label(), method = coverage.label(), "gap");
        feed.offer_gap(cause, missed, earliest);
        self.sender.timers.add(feed);
    }

    /// Pushes to one client what it may have missed, after it has subscribed: a change is recorded
    /// before its message is fanned out, so that the client gets the message or finds the change.
    ///
    /// `covered_since` is since when everything about the event has been heard here, if anything
    /// has.
    pub(crate) fn catch_up(
        &self,
        feed: &Feed,
        history: ClientHistory,
        covered_since: Option<Instant>,
        outbox: &Arc<Outbox>,
        subscription: &Subscription,
    ) {
        while let Some(catch_up) = feed.catch_up(history, covered_since, outbox, subscription) {
            let CatchUp { broadcast, cause, coverage, since, messages } = catch_up;
            let metrics = &self.sender.metrics;
            metrics.catch_ups.of((cause, coverage)).inc();
            metrics.sent.of(SendReason::CatchUp).inc();
            self.sender.push(outbox, subscription.sub_topic(), &broadcast, Some(since));
            // A message that left meanwhile may stand before this one, which would make the
            // client forget it: the next catch-up names its endpoints, too.
            if feed.messages() == messages {
                break;
            }
        }
    }

    /// Holds back what the feed is sent until `until`; `None` ends that.
    pub(crate) fn mute(&self, feed: &Arc<Feed>, until: Option<Instant>) {
        if let Some(topic) = feed.topics().first()
            && let Some(held) = self.held.lock().get_mut(&*topic.sub_topic)
        {
            held.muted_until = until;
        }
        // Earlier timers would hold the feed until the end of another mute; the one that counts is
        // added below.
        self.sender.timers.remove(feed);
        feed.mute(until);
        self.sender.timers.add(feed);
    }

    /// Sends everything that waits, whatever its window.
    pub(crate) async fn flush(&self) {
        for feed in self.all() {
            if let ToSend::Send(outgoing) = feed.due(true) {
                self.sender.send(&feed, *outgoing).await;
            }
        }
    }

    /// Forgets the feeds that nobody has held for long.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        self.held.lock().retain(|_, held| {
            if Arc::strong_count(&held.feed) > 1 {
                held.used = now;
            }
            now.duration_since(held.used) < KEPT
        });
    }
}

#[cfg(test)]
mod tests;
