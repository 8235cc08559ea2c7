//! What a channel hears from the database: its LISTEN, its catch-up, and the message that takes the
//! place of those that it was too slow for.
//!
//! Invariants: a catch-up is pushed after the channel has subscribed; a change is noted before its
//! message is fanned out, so that it is in the one or in the other; a channel without a place is
//! counted, and looks for one again.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::channel::{Channel, Context};
use crate::{
    access::EID,
    hub::outbox::{Replaceable, TopicId},
    invalidation::{CatchUpCause, ClientHistory, Feed},
    relay::{ListenGuard, Listening, Wish},
};

impl Channel {
    /// Whether the database tells of the topic.
    pub(super) fn is_listened(&self) -> bool {
        self.rule.as_ref().is_some_and(|(rule, _)| rule.listen.is_some())
    }

    /// Holds the NOTIFY channel of the topic, if there is one and a place for it. A channel that
    /// finds none is told of no change until it does; then everybody who has joined its event is
    /// caught up.
    ///
    /// Returns what to wait for if it is not active yet, and for how long at most.
    pub(super) fn listen(
        &mut self,
        context: Context<'_>,
    ) -> Option<(impl Future<Output = ()> + Send + use<>, Duration)> {
        let (rule, captures) = self.rule.as_ref()?;
        let listens = context.shared.listens.as_ref()?;
        if !self.may_read || self.listening.as_ref().is_some_and(|it| it.held().is_some()) {
            return None;
        }
        let wish = Wish {
            channel: rule.listen.as_ref()?.expand(captures),
            user_event: rule.event.as_ref()?,
            target: &self.target,
            eid: captures.get(EID).map(|eid| &**eid),
            is_published: self.target.has_content(&context.shared.feeds),
            address: context.caller.address().into(),
        };
        let listening = listens.listen(wish, self.listening.take());
        let inactive = listening.held().filter(|guard| !guard.is_active());
        let wait = inactive.map(|guard| (guard.activation(), listens.wait()));
        self.listening = Some(listening);
        wait
    }

    /// How long until the channel has to look for a place, if that may be needed.
    pub(super) fn looks_again(&self) -> Option<Duration> {
        self.listening.as_ref()?.looks_again()
    }

    /// Pushes what has changed since the client last heard of the event.
    pub(super) fn catch_up(&self, context: Context<'_>, history: ClientHistory) {
        let (Some(feed), Some(subscription)) = (self.feed(context), &self.subscription) else {
            return;
        };
        let feeds = &context.shared.feeds;
        if self.listening.as_ref().is_some_and(|listening| !listening.is_active()) {
            feed.owe();
            // It may have become active in between, and have found nothing owed.
            let is_active = self.listening.as_ref().is_some_and(Listening::is_active);
            if is_active && feed.take_owed() {
                feeds.offer_gap(&feed, CatchUpCause::LateListen, None, Instant::now());
            }
        }
        let covered_since = match &self.listening {
            Some(listening) => listening.held().and_then(ListenGuard::covered_since),
            // Without a database there is nothing else to be heard.
            None => context.shared.listens.is_none().then(|| feeds.started()),
        };
        feeds.catch_up(&feed, history, covered_since, context.outbox, subscription);
    }

    /// Tells a client that has fallen behind on the topic what has changed since; a client that
    /// listens to another topic is told nothing.
    pub(super) fn conflate(&self, context: Context<'_>, behind: Replaceable) {
        let is_behind = self.topic_id(context) == behind.topic;
        if is_behind && self.target.is_merged() && self.is_subscribed() {
            context.shared.metrics.conflations.inc();
            self.catch_up(context, ClientHistory::Behind(behind.since));
        }
    }

    fn feed(&self, context: Context<'_>) -> Option<Arc<Feed>> {
        self.target.feed(&context.shared.feeds)
    }

    /// The topic as the outbox knows it.
    pub(super) fn topic_id(&self, context: Context<'_>) -> TopicId {
        context.shared.hub.topic_id(&self.target.topic)
    }
}
