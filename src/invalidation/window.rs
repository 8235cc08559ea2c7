//! The window of a feed: what waits for it, and until when.
//!
//! Invariants: whatever is added leaves with exactly one message; within one window at most one
//! message leaves, but for the last one of a server that ends.

use std::{mem, num::NonZeroU32, time::Duration};

use governor::{Quota, RateLimiter};
use tokio::time::Instant;

use super::{
    journal::{Contribution, SOURCES_MAX},
    known::KnownEndpoints,
    payload::{Endpoints, Invalidation},
    reason::CatchUpCause,
};
use crate::clock::{Limiter, TokioClock};

/// How long a message waits for others of its transaction, which arrive together: counted from the
/// last message of the same database session.
pub(super) const SETTLE: Duration = Duration::from_millis(10);
/// The longest such wait, counted from the first message.
pub(super) const SETTLE_MAX: Duration = Duration::from_millis(50);
/// Most endpoints of a union; a larger one becomes the complete list.
const UNION_MAX: usize = 200;

/// The window of one feed, and what waits for it.
#[derive(Debug)]
pub(super) struct Window {
    /// `None` where the rule's window is zero.
    limiter: Option<Limiter>,
    muted_until: Option<Instant>,
    pending: Option<Union>,
    /// The `timestamp` of the newest message that left last, as it was written.
    last_timestamp: Option<Box<str>>,
}

/// The union that waits.
#[derive(Debug)]
pub(super) struct Union {
    /// The newest invalidation; `None` while there are gaps alone.
    pub(super) newest: Option<Invalidation>,
    /// The union; empty if the complete list is to be sent.
    pub(super) endpoints: Endpoints,
    /// The complete list is to be sent.
    pub(super) is_complete: bool,
    /// The newest invalidation can be sent as it came, unless there is something to add.
    pub(super) may_pass: bool,
    /// How many invalidations the union stands for.
    pub(super) messages: usize,
    pub(super) sources: Vec<Contribution>,
    /// Why viewers may have missed something, if they may have.
    pub(super) gap: Option<CatchUpCause>,
    /// When the first of all was added.
    pub(super) first: Instant,
    /// The earliest commit, of those whose commit is known.
    pub(super) committed: Option<Instant>,
    /// The database session of the newest invalidation.
    pub(super) pid: Option<u32>,
    /// When to try again whether the union may leave.
    pub(super) due: Instant,
    /// The window or a mute has held it back.
    pub(super) has_waited: bool,
}

/// How the database has notified an invalidation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notified {
    /// The database session that wrote it.
    pub(crate) pid: u32,
    /// When it was committed, by this machine's clock, if that is known.
    pub(crate) committed: Option<Instant>,
}

impl Window {
    /// Creates a window of this length in which nothing waits.
    pub(super) fn new(length: Duration) -> Self {
        let quota = Quota::with_period(length).map(|quota| quota.allow_burst(NonZeroU32::MIN));
        let limiter = quota.map(|quota| RateLimiter::direct_with_clock(quota, TokioClock));
        Self { limiter, muted_until: None, pending: None, last_timestamp: None }
    }

    /// Adds an invalidation to the union, and returns whether nothing waited before.
    pub(super) fn add(
        &mut self,
        invalidation: Invalidation,
        notified: Option<Notified>,
        now: Instant,
    ) -> bool {
        let is_first = self.pending.is_none();
        let pending = self.pending_since(now, now + SETTLE);
        let pid = notified.map(|notified| notified.pid);
        if !pending.has_waited && pid == pending.pid {
            pending.due = (now + SETTLE).min(pending.first + SETTLE_MAX).max(pending.due);
        }
        pending.pid = pid;
        let committed = notified.and_then(|notified| notified.committed);
        pending.committed = [pending.committed, committed].into_iter().flatten().min();
        pending.messages += 1;
        pending.is_complete |= invalidation.is_pointer;
        pending.may_pass &= invalidation.bad.is_empty();
        pending.unite(&invalidation.endpoints);
        if pending.sources.len() < SOURCES_MAX {
            pending.sources.push(Contribution::of(&invalidation));
        }
        pending.newest = Some(invalidation);
        is_first
    }

    /// Adds what all viewers may have missed, which leaves not before `earliest`: these endpoints,
    /// or the complete list for `None`.
    pub(super) fn add_gap(
        &mut self,
        cause: CatchUpCause,
        missed: Option<&Endpoints>,
        earliest: Instant,
        now: Instant,
    ) {
        let pending = self.pending_since(now, earliest.max(now + SETTLE));
        pending.gap = Some(cause);
        match missed {
            Some(endpoints) => pending.unite(endpoints),
            None => {
                pending.is_complete = true;
                pending.endpoints = Endpoints::default();
            }
        }
    }

    /// Holds everything back until `until`; `None` ends that.
    pub(super) fn mute(&mut self, until: Option<Instant>) {
        self.muted_until = until;
        if let Some(pending) = &mut self.pending {
            pending.due = Instant::now();
        }
    }

    /// Returns how long the mute still lasts, if there is one.
    pub(super) fn muted_for(&self, now: Instant) -> Option<Duration> {
        self.muted_until.and_then(|until| until.checked_duration_since(now))
    }

    /// Returns when to call [`Self::take`] next, if something waits.
    pub(super) fn next(&self) -> Option<Instant> {
        self.pending.as_ref().map(|pending| pending.due)
    }

    /// Returns how many messages wait; gaps alone count as one.
    pub(super) fn pending_count(&self) -> usize {
        self.pending.as_ref().map_or(0, |pending| pending.messages.max(1))
    }

    /// Takes the union if it may leave now. The last one of a server that ends always may.
    pub(super) fn take(&mut self, is_last: bool, now: Instant) -> Option<Union> {
        let pending = self.pending.as_mut()?;
        if !is_last {
            if let Some(until) = self.muted_until.filter(|until| *until > now) {
                pending.due = until;
                pending.has_waited = true;
            }
            if pending.due > now {
                return None;
            }
            if let Some(Err(not_until)) = self.limiter.as_ref().map(Limiter::check) {
                pending.due = Instant::from_std(not_until.earliest_possible());
                pending.has_waited = true;
                return None;
            }
        }
        // Clients drop a message with the timestamp of the one before.
        let timestamp = pending.newest.as_ref().and_then(|newest| newest.timestamp.clone());
        pending.may_pass &= timestamp.is_none() || timestamp != self.last_timestamp;
        self.last_timestamp = timestamp;
        self.pending.take()
    }

    fn pending_since(&mut self, now: Instant, due: Instant) -> &mut Union {
        self.pending.get_or_insert_with(|| Union {
            newest: None,
            endpoints: Endpoints::default(),
            is_complete: false,
            may_pass: true,
            messages: 0,
            sources: Vec::new(),
            gap: None,
            first: now,
            committed: None,
            pid: None,
            due,
            has_waited: false,
        })
    }
}

impl Union {
    fn unite(&mut self, endpoints: &Endpoints) {
        self.endpoints.extend(endpoints.iter().cloned());
        // The complete list has them all: each was recorded as known before it was added.
        self.is_complete |= self.endpoints.len() > UNION_MAX;
        if self.is_complete {
            self.endpoints = Endpoints::default();
        }
    }

    /// Returns whether there is no endpoint to send.
    pub(super) fn is_empty(&self) -> bool {
        !self.is_complete && self.endpoints.is_empty()
    }

    /// Takes the endpoints of the union, or returns the complete list where that is to be sent.
    pub(super) fn take_endpoints(
        &mut self,
        known: &KnownEndpoints,
        resync: &Endpoints,
    ) -> Endpoints {
        if self.is_complete { known.complete(resync) } else { mem::take(&mut self.endpoints) }
    }
}

#[cfg(test)]
mod tests;
