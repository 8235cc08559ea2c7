//! The one way in: a broadcast, the topic that it is for, and its source → feed or hub.
//!
//! Invariants: nothing else offers broadcasts to a feed or fans them out, but for the feeds' own
//! sender; replies, catch-ups and heals go to one client's outbox and do not pass here.

use std::sync::Arc;

use crate::{
    access::{Captures, Rule},
    hub::{
        BroadcastSource, FanOut, FannedOut, Hub, Subscription, To, TooSlow,
        outbox::{Committed, Departure},
    },
    invalidation::{Feed, Feeds, Notified},
    protocol::{
        serializer::Broadcast,
        topic::{Privacy, TopicKey},
    },
};

/// Where a broadcast goes: the spellings of one topic, and the feed that merges it, if one does.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The topic as it was named.
    pub(crate) topic: TopicKey,
    /// Every spelling of a rule with a NOTIFY channel; shared with the feed where it has the same.
    spellings: Arc<[TopicKey]>,
    /// The feed of a rule that merges.
    pub(crate) feed: Option<Arc<Feed>>,
    /// What becomes of subscribers that are too slow for what is fanned out here.
    too_slow: TooSlow,
}

impl Target {
    /// Takes the spellings of the rule that the topic has now. The feed stays.
    pub(crate) fn spell(&mut self, rule: &Rule, captures: &Captures) {
        if rule.listen.is_none() {
            return;
        }
        self.spellings = match &self.feed {
            Some(feed) if feed.is_spelled_by(rule) => Arc::clone(feed.topics()),
            Some(_) | None => rule.spellings(captures).collect(),
        };
    }
}

/// Where a broadcast comes from, which decides how it is counted, and what a feed makes of it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// A client's socket; its own subscription is left out unless it asked for its own broadcasts.
    Socket { except: Option<&'a Subscription> },
    /// A request of the REST interface.
    Rest,
    /// A notification.
    Database(Notified),
}

/// What became of broadcasts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Published {
    /// How many were invalidations, which leave with the feed's next message.
    pub(crate) offered: usize,
    /// How many were fanned out.
    pub(crate) sent: usize,
    /// What the fan-out came to.
    pub(crate) fanned_out: FannedOut,
}

/// Publishes the broadcasts of clients and of the database.
#[derive(Debug)]
pub(crate) struct Publisher {
    hub: Arc<Hub>,
    feeds: Arc<Feeds>,
}

impl Publisher {
    /// Creates the publisher of one server.
    pub(crate) fn new(hub: Arc<Hub>, feeds: Arc<Feeds>) -> Self {
        Self { hub, feeds }
    }

    /// Creates the target of a topic with its rule, if it has one.
    pub(crate) fn target(
        &self,
        sub_topic: &str,
        privacy: Privacy,
        rule: Option<&(Arc<Rule>, Arc<Captures>)>,
    ) -> Target {
        // A rule's topic is what the rule says, however it is named.
        let privacy = if rule.is_some() { Privacy::Public } else { privacy };
        let topic = TopicKey { sub_topic: sub_topic.into(), privacy };
        let too_slow =
            if rule.is_some() { TooSlow::LosesConnection } else { TooSlow::LosesChannel };
        let mut target = Target { topic, spellings: Arc::default(), feed: None, too_slow };
        if let Some((rule, captures)) = rule {
            target.feed = self.feeds.of(rule, captures);
            target.spell(rule, captures);
            if let Some(own) = target.spellings.iter().find(|spelling| **spelling == target.topic) {
                // One text for all sockets of a feed, rather than one for each.
                target.topic = own.clone();
            }
        }
        target
    }

    /// Offers invalidations to the feed and fans the rest out to every spelling.
    ///
    /// Returns once the rest has been pushed to all outboxes. Broadcasts of one caller reach each
    /// subscriber in the order of the calls.
    pub(crate) async fn publish(
        &self,
        target: &Target,
        source: Source<'_>,
        mut broadcasts: Vec<Broadcast>,
    ) -> Published {
        let (counted, to, notified) = match source {
            Source::Socket { except } => {
                (BroadcastSource::Socket, except.map_or(To::All, To::Others), None)
            }
            Source::Rest => (BroadcastSource::Rest, To::All, None),
            Source::Database(notified) => (BroadcastSource::Database, To::All, Some(notified)),
        };
        let count = broadcasts.len();
        if let Some(feed) = &target.feed {
            broadcasts = self.feeds.offer(feed, broadcasts, notified);
        }
        let (offered, sent) = (count - broadcasts.len(), broadcasts.len());
        if broadcasts.is_empty() {
            return Published { offered, ..Published::default() };
        }
        let committed = notified.and_then(|notified| notified.committed);
        let fan_out = FanOut {
            source: counted,
            first: Some(&target.topic),
            spellings: &target.spellings,
            broadcasts: &broadcasts,
            committed: committed.map(|at| Committed { at, departure: Departure::AtOnce }),
            to,
            too_slow: target.too_slow,
        };
        let fanned_out = self.hub.fan_out(fan_out).await;
        Published { offered, sent, fanned_out }
    }
}
