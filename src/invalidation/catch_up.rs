//! What one client is told that joins a feed or has fallen behind on it, and what it is told once
//! more because the next message would make it forget that.
//!
//! Invariant: what is kept here was sent within the rule's `carry`, and is dropped after it.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    outgoing::Outgoing,
    payload::{Endpoints, Stamp, Template},
    reason::{CatchUpCause, Coverage},
};
use crate::{
    hub::{
        Subscription,
        outbox::{Outbox, Since},
    },
    protocol::serializer::Broadcast,
};

/// How far back a fresh page may have missed something: a cache may have answered its own fetch,
/// and its first upgrades may have been refused.
const FRESH: Duration = Duration::from_secs(30);

/// What is known of a client that joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientHistory {
    /// Its page was just loaded.
    Fresh,
    /// It has held this topic before on the same socket.
    Held,
    /// Its earlier socket held this topic, and had missed nothing up to this moment.
    Since(Instant),
    /// It reads so slowly that messages since this moment were dropped.
    Behind(Since),
    /// Nothing.
    Nothing,
}

/// A message to one client that has joined.
#[derive(Debug)]
pub(crate) struct CatchUp {
    pub(crate) broadcast: Broadcast,
    pub(crate) cause: CatchUpCause,
    pub(crate) coverage: Coverage,
    /// A moment not later than the first change that the message names.
    pub(crate) since: Since,
    /// How many messages had been sent to the whole feed.
    pub(crate) messages: u64,
}

/// A message to one client that was just caught up: that of the whole feed, extended by the
/// endpoints of the catch-up.
#[derive(Debug)]
pub(crate) struct Repeat {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) sub_topic: Arc<str>,
    pub(crate) broadcast: Broadcast,
    /// A moment not later than the first change that the message names; `None` if no later
    /// catch-up could replace it.
    pub(crate) since: Option<Since>,
}

/// What was sent within the rule's `carry`, and may be forgotten by a client that gets the next
/// message too soon after it.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// The endpoints of each message to the whole feed, without what it carried itself.
    carried: VecDeque<(Instant, Endpoints)>,
    /// The clients that were caught up alone, each once.
    caught_up: VecDeque<CaughtUp>,
}

/// A client that was caught up alone.
#[derive(Debug)]
struct CaughtUp {
    at: Instant,
    outbox: Weak<Outbox>,
    /// Ends with the client's subscription.
    life: Weak<()>,
    sub_topic: Arc<str>,
    endpoints: Arc<Endpoints>,
    /// A moment not later than the first change of these.
    since: Since,
}

impl ClientHistory {
    /// Returns why such a client is caught up, and since when it may have missed something if that
    /// is known.
    pub(super) fn missed(self, now: Instant, started: Instant) -> (CatchUpCause, Option<Instant>) {
        match self {
            Self::Fresh => (CatchUpCause::Fresh, now.checked_sub(FRESH)),
            Self::Held => (CatchUpCause::Held, now.checked_sub(FRESH)),
            Self::Since(since) => (CatchUpCause::Returned, Some(since)),
            Self::Behind(since) => (CatchUpCause::SlowClient, since.moment(started)),
            Self::Nothing => (CatchUpCause::Unknown, None),
        }
    }
}

impl Recent {
    /// Forgets what was sent longer ago than `carry`.
    pub(super) fn forget(&mut self, now: Instant, carry: Duration) {
        let is_over = |at: Instant| now.duration_since(at) > carry;
        while self.carried.front().is_some_and(|(at, _)| is_over(*at)) {
            self.carried.pop_front();
        }
        while self.caught_up.front().is_some_and(|client| is_over(client.at)) {
            self.caught_up.pop_front();
        }
    }

    /// Adds the endpoints of a message to the whole feed.
    pub(super) fn carry(&mut self, endpoints: Endpoints, now: Instant) {
        if !endpoints.is_empty() {
            self.carried.push_back((now, endpoints));
        }
    }

    /// Returns the endpoints that every further message repeats.
    pub(super) fn carried(&self) -> impl Iterator<Item = Box<str>> {
        self.carried.iter().flat_map(|(_, endpoints)| endpoints.iter().cloned())
    }

    /// Removes the client from those that were caught up, and returns what it was told.
    pub(super) fn take(
        &mut self,
        outbox: &Arc<Outbox>,
        sub_topic: &Arc<str>,
    ) -> Option<Arc<Endpoints>> {
        let is_it = |client: &CaughtUp| {
            client.outbox.as_ptr() == Arc::as_ptr(outbox) && client.sub_topic == *sub_topic
        };
        let place = self.caught_up.iter().position(is_it)?;
        self.caught_up.remove(place).map(|client| client.endpoints)
    }

    /// Adds a client that was caught up with these endpoints.
    pub(super) fn add(
        &mut self,
        outbox: &Arc<Outbox>,
        subscription: &Subscription,
        endpoints: Endpoints,
        since: Since,
        now: Instant,
    ) {
        // When everybody comes back at once, all are told the same.
        let endpoints = match self.caught_up.back() {
            Some(last) if *last.endpoints == endpoints => Arc::clone(&last.endpoints),
            Some(_) | None => Arc::new(endpoints),
        };
        self.caught_up.push_back(CaughtUp {
            at: now,
            outbox: Arc::downgrade(outbox),
            life: subscription.life(),
            sub_topic: Arc::clone(subscription.sub_topic()),
            endpoints,
            since,
        });
    }

    /// Returns a message for each client that was caught up with endpoints that `outgoing` does
    /// not name.
    pub(super) fn repeats(
        &self,
        outgoing: &Outgoing,
        template: &Template,
        stamp: Stamp,
    ) -> Vec<Repeat> {
        let message = &*outgoing.delivery.endpoints;
        // Nearly all have been told the same.
        let mut broadcasts: Vec<(&Endpoints, Broadcast)> = Vec::new();
        let mut repeats = Vec::new();
        // Each client is in the list once, so one stamp does for all.
        for CaughtUp { outbox, life, sub_topic, endpoints, since, .. } in &self.caught_up {
            let is_needed = life.strong_count() > 0 && !endpoints.is_subset(message);
            let Some(outbox) = outbox.upgrade().filter(|_| is_needed) else {
                continue;
            };
            let place = broadcasts.iter().position(|(known, _)| **known == **endpoints);
            let place = place.unwrap_or_else(|| {
                let both: Endpoints = message.union(endpoints).cloned().collect();
                broadcasts.push((endpoints, outgoing.naming(template, &both, stamp)));
                broadcasts.len() - 1
            });
            let broadcast = broadcasts[place].1.clone();
            let since = outgoing.since.map(|first| first.min(*since));
            repeats.push(Repeat { outbox, sub_topic: Arc::clone(sub_topic), broadcast, since });
        }
        repeats
    }
}

#[cfg(test)]
mod tests;
