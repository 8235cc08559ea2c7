//! The feeds of auction events: the first invalidation leaves at once, those within the window
//! after it in one message, and a client that was away is told what has changed meanwhile.
//!
//! Invariants: every source of a rule that merges goes through [`Feeds::offer`], so that the window
//! covers all of them; one task sends, in the order in which windows open; at most `max` feeds are
//! held, and those of events that nobody knows make room for all others; a feed vouches for nothing
//! that was forgotten; no lock is held while frames are pushed, and no two at once.

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

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

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

/// How long a feed is remembered that has no viewer.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// Of all feeds, so large a part is forgotten at once for want of room.
const BATCH_PART: usize = 16;

/// The feeds of all rules that merge.
#[derive(Debug)]
pub(crate) struct Feeds {
    held: Mutex<Remembered>,
    max: usize,
    started: Instant,
    sender: Sender,
}

#[derive(Debug, Default)]
struct Remembered {
    /// By the first spelling of the topic.
    feeds: HashMap<Box<str>, Held>,
    /// When a feed with content was last forgotten, or found no room.
    forgot_at: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    feed: Arc<Feed>,
    used: Instant,
    /// The feed is not forgotten before.
    muted_until: Option<Instant>,
}

impl Remembered {
    /// Forgets feeds that nobody works with and no operator has muted, the least recently used
    /// first: only such without content, if there are any.
    fn make_room(&mut self, batch: usize) {
        let now = Instant::now();
        let is_idle = |held: &Held| {
            Arc::strong_count(&held.feed) == 1 && held.muted_until.is_none_or(|until| until <= now)
        };
        let idle = self.feeds.iter().filter(|(_, held)| is_idle(held));
        let mut idle: Vec<_> =
            idle.map(|(key, held)| (held.feed.has_content(), held.used, key.clone())).collect();
        idle.sort_unstable();
        let has_content = idle.first().is_some_and(|(has_content, ..)| *has_content);
        if has_content {
            self.forgot_at = Some(now);
        }
        let alike = idle.into_iter().take_while(|(other, ..)| *other == has_content);
        for (_, _, key) in alike.take(batch) {
            self.feeds.remove(&key);
        }
    }
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
        let mut held = self.held.lock();
        if let Some(held) = held.feeds.get_mut(&key) {
            held.used = now;
            return Some(Arc::clone(&held.feed));
        }
        if held.feeds.len() >= self.max {
            held.make_room((self.max / BATCH_PART).max(1));
            if held.feeds.len() >= self.max {
                // What is published meanwhile is not recorded.
                held.forgot_at = Some(now);
                return None;
            }
        }
        let since = (self.started, held.forgot_at.unwrap_or(self.started));
        let feed = Arc::new(Feed::new(rule, merge, captures, since));
        held.feeds.insert(key, Held { feed: Arc::clone(&feed), used: now, muted_until: None });
        Some(feed)
    }

    /// Returns whether a topic has a feed of which something is known.
    pub(crate) fn has_content(&self, rule: &Rule, captures: &Captures) -> bool {
        let Some(key) = rule.pattern.first().map(|pattern| pattern.expand(captures)) else {
            return false;
        };
        self.held.lock().feeds.get(&*key).is_some_and(|held| held.feed.has_content())
    }

    /// Returns every feed that is remembered.
    pub(crate) fn all(&self) -> Vec<Arc<Feed>> {
        self.held.lock().feeds.values().map(|held| Arc::clone(&held.feed)).collect()
    }

    /// Returns the feeds of an event, one for each rule that has it.
    pub(crate) fn named(&self, eid: &str) -> Vec<Arc<Feed>> {
        let held = self.held.lock();
        let feeds = held.feeds.values().map(|held| &held.feed);
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
            && let Some(held) = self.held.lock().feeds.get_mut(&*topic.sub_topic)
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

    /// Returns whether somebody has joined the event, under any spelling.
    pub(crate) fn has_viewers(&self, feed: &Feed) -> bool {
        feed.topics().iter().any(|topic| self.sender.hub.subscriber_count(topic) > 0)
    }

    /// Forgets the feeds that have had no viewer for long.
    pub(crate) fn sweep(&self) {
        let (now, mut viewed) = (Instant::now(), self.all());
        viewed.retain(|feed| self.has_viewers(feed));
        let viewed: HashSet<_> = viewed.iter().map(Arc::as_ptr).collect();
        self.held.lock().feeds.retain(|_, held| {
            if viewed.contains(&Arc::as_ptr(&held.feed)) {
                held.used = now;
            }
            now.duration_since(held.used) < KEPT
        });
    }
}

#[cfg(test)]
mod tests;
