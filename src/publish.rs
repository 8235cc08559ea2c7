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
///
/// The feed is looked up for each broadcast and not kept, so that it can be forgotten while nothing
/// is known of its event, and an event that found no room for a feed gets one as soon as there is.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The topic as it was named.
    pub(crate) topic: TopicKey,
    /// Every spelling of a rule with a NOTIFY channel; shared with the feed where it has the same.
    spellings: Arc<[TopicKey]>,
    /// The rule that merges, and what it has captured: the feed's key.
    merged: Option<(Arc<Rule>, Arc<Captures>)>,
    /// What becomes of subscribers that are too slow for what is fanned out here.
    too_slow: TooSlow,
}

impl Target {
    /// Takes the spellings of the rule that the topic has now. The feed stays.
    pub(crate) fn spell(&mut self, rule: &Rule, captures: &Captures) {
        if rule.listen.is_some() && !rule.spellings(captures).eq(self.spellings.iter().cloned()) {
            self.spellings = rule.spellings(captures).collect();
        }
    }

    /// Returns whether a feed merges what is published to the topic, as long as there is room.
    pub(crate) fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Returns whether somebody has published to the topic, as far as its feed remembers.
    pub(crate) fn has_content(&self, feeds: &Feeds) -> bool {
        self.merged.as_ref().is_some_and(|(rule, captures)| feeds.has_content(rule, captures))
    }

    /// Returns the feed that merges, and creates it if needed.
    pub(crate) fn feed(&self, feeds: &Feeds) -> Option<Arc<Feed>> {
        let (rule, captures) = self.merged.as_ref()?;
        feeds.of(rule, captures)
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
        let mut target = Target { topic, spellings: Arc::default(), merged: None, too_slow };
        if let Some((rule, captures)) = rule {
            target.merged = rule.merge.is_some().then(|| (Arc::clone(rule), Arc::clone(captures)));
            match target.feed(&self.feeds) {
                Some(feed) if feed.is_spelled_by(rule) => {
                    target.spellings = Arc::clone(feed.topics());
                }
                Some(_) | None => target.spell(rule, captures),
            }
            if let Some(own) = target.spellings.iter().find(|spelling| **spelling == target.topic) {
                // One text for all sockets of a feed, rather than one for each.
                target.topic = own.clone();
            }
        }
        target
    }

    /// Returns the feed that merges what is published to the target, if one does.
    pub(crate) fn feed(&self, target: &Target) -> Option<Arc<Feed>> {
        target.feed(&self.feeds)
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
        if let Some(feed) = self.feed(target) {
            broadcasts = self.feeds.offer(&feed, broadcasts, notified);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{Found, Rules},
        protocol::message::{Json, UserBroadcast, UserPayload},
        server::settings::Config,
        telemetry::metrics::Registry,
    };
    use std::time::Duration;
    use tokio::time::Instant;

    const FEEDS_MAX: usize = 32;

    /// A publisher with room for [`FEEDS_MAX`] feeds, and the built-in rules.
    struct Stage {
        publisher: Publisher,
        feeds: Arc<Feeds>,
        rules: Rules,
    }

    impl Stage {
        fn new() -> Self {
            let (registry, config) = (Registry::new(), Config::defaults());
            let hub = Arc::new(Hub::new(&registry));
            let feeds = Arc::new(Feeds::new(FEEDS_MAX, Arc::clone(&hub), &registry));
            let publisher = Publisher::new(hub, Arc::clone(&feeds));
            Self { publisher, feeds, rules: Rules::new(config.topic, config.topics) }
        }

        /// The target of an event, as a join makes it.
        fn join(&self, eid: &str) -> Target {
            let topic = format!("cache_invalidate_{eid}");
            let Found::Rule(rule, captures) = self.rules.find(&topic) else { panic!("{topic}") };
            self.publisher.target(&topic, Privacy::Public, Some(&(rule, captures)))
        }

        /// Publishes a change of the event, and returns whether its feed merges it.
        async fn publish(&self, target: &Target) -> bool {
            let payload = Json::parse(r#"{"endpoints":["/a"]}"#.to_owned().into()).unwrap();
            let payload = UserPayload::Json(payload);
            let message = UserBroadcast { user_event: "cache_invalidation".into(), payload };
            let broadcast = Broadcast::User { message, metadata: None };
            let source = Source::Database(Notified { pid: 1, committed: None });
            self.publisher.publish(target, source, vec![broadcast]).await.offered == 1
        }
    }

    /// Whoever came first used to keep the feeds for as long as they stayed.
    #[tokio::test(start_paused = true)]
    async fn events_that_nobody_knows_make_room_for_the_feeds_of_all_others() {
        let stage = Stage::new();
        let known = stage.join("AB3028");
        assert!(stage.publish(&known).await);
        stage.feeds.flush().await;
        let feed = stage.publisher.feed(&known).unwrap();
        let before = Arc::as_ptr(&feed);
        drop(feed);
        // A flood that stays, and does not leave a single place.
        let flood: Vec<_> = (0..10 * FEEDS_MAX).map(|n| stage.join(&format!("X{n}"))).collect();
        assert!(stage.feeds.all().len() <= FEEDS_MAX);
        assert_eq!(Arc::as_ptr(&stage.publisher.feed(&known).unwrap()), before, "it is the same");
        // An event that is joined in between is merged as soon as somebody publishes to it.
        let late = stage.join("AB3029");
        assert!(flood.len() > FEEDS_MAX && stage.publish(&late).await);
    }

    /// An operator has muted as many events as there is room for.
    #[tokio::test(start_paused = true)]
    async fn an_event_without_a_feed_at_the_join_is_merged_as_soon_as_there_is_room() {
        let stage = Stage::new();
        let until = Instant::now() + Duration::from_secs(60);
        let muted: Vec<_> = (0..FEEDS_MAX).map(|n| stage.join(&format!("M{n}"))).collect();
        for target in &muted {
            stage.feeds.mute(&stage.publisher.feed(target).unwrap(), Some(until));
        }
        let viewer = stage.join("AB3028");
        assert!(!stage.publish(&viewer).await, "there is no room");
        stage.feeds.mute(&stage.publisher.feed(&muted[0]).unwrap(), None);
        assert!(stage.publish(&viewer).await, "there is");
    }
}
