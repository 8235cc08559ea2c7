//! One feed: the invalidations of one event of a rule that merges.
//!
//! Invariants: an endpoint is recorded as changed before a message that names it can be sent, so
//! that a viewer who joins is among the subscribers of the message, or finds the change recorded;
//! whatever is offered leaves with exactly one message to the whole feed; nothing here awaits or
//! pushes.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    catch_up::{CatchUp, ClientHistory, Recent, Repeat},
    journal::{Delivery, Heard, Journal, Notice, NoticeCount, Summary, Tally},
    known::KnownEndpoints,
    outgoing::{Outgoing, ToSend},
    payload::{BadEndpoint, Endpoints, Invalidation, Stamps, Template},
    reason::{CatchUpCause, Coverage},
    window::{Notified, Window},
};
use crate::{
    access::{Captures, EID, Merge, Rule},
    hub::{
        Subscription,
        outbox::{Outbox, Since},
    },
    protocol::{serializer::Broadcast, topic::TopicKey},
};

/// A feed: one per rule and event, whatever the spelling of its topic.
#[derive(Debug)]
pub(crate) struct Feed {
    template: Template,
    channel: Box<str>,
    topics: Arc<[TopicKey]>,
    /// What belongs to the complete list of any of the rule's events.
    resync: Endpoints,
    /// When the server started.
    started: Instant,
    /// The feed vouches for nothing before: a feed of the event may have been forgotten then.
    vouches_since: Instant,
    /// The event has been published to, or the database knows it: forgetting the feed loses
    /// something.
    has_content: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    known: KnownEndpoints,
    window: Window,
    recent: Recent,
    journal: Journal,
    stamps: Stamps,
    /// How many messages the whole feed was sent.
    messages: u64,
    /// A client has joined before the database was listened to for this feed.
    is_owed: bool,
    heard: Heard,
    /// The database has more endpoints of the event than every event has.
    is_known: bool,
}

/// What became of broadcasts that a feed was offered.
#[derive(Debug, Default)]
pub(super) struct Offered {
    /// Those that are not invalidations.
    pub(super) rest: Vec<Broadcast>,
    /// Why endpoints of the others were left out.
    pub(super) bad: Vec<BadEndpoint>,
    /// Whether nothing waited before.
    pub(super) is_first: bool,
}

impl Feed {
    /// Creates a feed of which nothing is known.
    pub(super) fn new(
        rule: &Arc<Rule>,
        merge: &Merge,
        captures: &Captures,
        (started, vouches_since): (Instant, Instant),
    ) -> Self {
        Self {
            template: Template {
                rule: Arc::clone(rule),
                merge: merge.clone(),
                eid: captures.get(EID).cloned().unwrap_or_default(),
            },
            channel: rule
                .listen
                .as_ref()
                .map_or_else(String::new, |listen| listen.expand(captures))
                .into(),
            topics: rule.spellings(captures).collect(),
            resync: rule.resync.iter().map(|pattern| pattern.expand(captures).into()).collect(),
            started,
            vouches_since,
            has_content: AtomicBool::new(false),
            state: Mutex::new(State {
                known: KnownEndpoints::default(),
                window: Window::new(merge.window),
                recent: Recent::default(),
                journal: Journal::default(),
                stamps: Stamps::default(),
                messages: 0,
                is_owed: false,
                heard: Heard::Nothing,
                is_known: false,
            }),
        }
    }

    /// The event's id.
    pub(crate) fn eid(&self) -> &str {
        &self.template.eid
    }

    /// The name of the rule.
    pub(crate) fn rule_name(&self) -> &str {
        &self.template.rule.name
    }

    /// The NOTIFY channel of the event.
    pub(crate) fn channel(&self) -> &str {
        &self.channel
    }

    /// The feed's topics, one for each spelling.
    pub(crate) fn topics(&self) -> &Arc<[TopicKey]> {
        &self.topics
    }

    /// Returns whether the rule, which is one of this feed's topics, spells them all as the feed
    /// does: texts that the same patterns match have the same captures.
    pub(crate) fn is_spelled_by(&self, rule: &Rule) -> bool {
        self.template.rule.pattern == rule.pattern
    }

    /// Returns whether the event has been published to, or the database knows it. Any other feed can
    /// be forgotten, and created again, without a difference to anybody.
    pub(crate) fn has_content(&self) -> bool {
        self.has_content.load(Ordering::Relaxed)
    }

    /// Offers every broadcast that is an invalidation; `notified` is given for what came from the
    /// database.
    pub(super) fn offer_all(
        &self,
        broadcasts: Vec<Broadcast>,
        notified: Option<Notified>,
    ) -> Offered {
        let mut offered = Offered::default();
        for broadcast in broadcasts {
            match self.template.read(broadcast) {
                Ok(invalidation) => {
                    if notified.is_some() {
                        self.hear(invalidation.id.is_some());
                    }
                    offered.bad.extend_from_slice(&invalidation.bad);
                    offered.is_first |= self.offer(invalidation, notified);
                }
                Err(other) => offered.rest.push(other),
            }
        }
        offered
    }

    /// Takes an invalidation, which leaves when [`Self::due`] returns it, and returns whether
    /// nothing waited before.
    #[must_use]
    fn offer(&self, invalidation: Invalidation, notified: Option<Notified>) -> bool {
        let now = Instant::now();
        self.has_content.store(true, Ordering::Relaxed);
        let mut state = self.state.lock();
        let State { known, window, journal, .. } = &mut *state;
        known.note(&invalidation.endpoints, Some(now));
        if invalidation.is_pointer {
            known.note_all(&self.resync, now);
        }
        journal.notified();
        window.add(invalidation, notified, now)
    }

    /// Takes what all viewers may have missed, which leaves not before `earliest`: these
    /// endpoints, or the complete list for `None`.
    pub(super) fn offer_gap(
        &self,
        cause: CatchUpCause,
        missed: Option<&Endpoints>,
        earliest: Instant,
    ) {
        let now = Instant::now();
        // The complete list after a lost link says nothing of the event, and that the event was not
        // heard is remembered with its LISTEN.
        if missed.is_some() || cause == CatchUpCause::Operator {
            self.has_content.store(true, Ordering::Relaxed);
        }
        let mut state = self.state.lock();
        match missed {
            Some(endpoints) => state.known.note(endpoints, Some(now)),
            // Each may have changed, up to now.
            None => state.known.note_all(&self.resync, now),
        }
        state.window.add_gap(cause, missed, earliest, now);
    }

    /// Records whether a notification named its row of the history.
    fn hear(&self, has_id: bool) {
        let mut state = self.state.lock();
        state.heard = match (state.heard, has_id) {
            (_, false) | (Heard::SomeWithoutId, true) => Heard::SomeWithoutId,
            (Heard::Nothing | Heard::OnlyWithId, true) => Heard::OnlyWithId,
        };
    }

    /// Returns whether the notifications named their rows.
    pub(crate) fn heard(&self) -> Heard {
        self.state.lock().heard
    }

    /// Records endpoints that exist in the database.
    pub(crate) fn learn(&self, endpoints: &Endpoints) {
        let mut state = self.state.lock();
        state.known.note(endpoints, None);
        // The database returns those of `resync` for any event.
        if endpoints.iter().any(|endpoint| !self.resync.contains(endpoint)) {
            state.is_known = true;
            self.has_content.store(true, Ordering::Relaxed);
        }
    }

    /// Records that a client has joined that does not hear the database yet.
    pub(crate) fn owe(&self) {
        self.state.lock().is_owed = true;
    }

    /// Returns whether a client is owed a catch-up, and forgets it.
    pub(crate) fn take_owed(&self) -> bool {
        mem::take(&mut self.state.lock().is_owed)
    }

    /// Returns when to call [`Self::due`] next, if something waits.
    pub(super) fn next(&self) -> Option<Instant> {
        self.state.lock().window.next()
    }

    /// Holds everything back until `until`; `None` ends that.
    pub(super) fn mute(&self, until: Option<Instant>) {
        self.state.lock().window.mute(until);
    }

    /// Returns the message that may leave now. While the server ends, whatever waits may.
    pub(super) fn due(&self, is_last: bool) -> ToSend {
        let now = Instant::now();
        let mut state = self.state.lock();
        let State { known, window, recent, journal, stamps, messages, .. } = &mut *state;
        let Some(mut union) = window.take(is_last, now) else {
            return if window.next().is_some() { ToSend::Later } else { ToSend::Nothing };
        };
        // A change that is not recorded could not be told later.
        let is_recorded = known.has_everything() && !union.is_empty();
        let since = is_recorded.then(|| Since::at(union.first, self.started));
        let own = union.take_endpoints(known, &self.resync);
        recent.forget(now, self.template.merge.carry);
        let mut endpoints = own.clone();
        endpoints.extend(recent.carried());
        let is_extended = endpoints.len() > own.len();
        recent.carry(own, now);
        journal.merged(union.messages);
        *messages += 1;
        let template = &self.template;
        let outgoing = Outgoing::of(union, template, endpoints, is_extended, since, stamps, now);
        ToSend::Send(Box::new(outgoing))
    }

    /// Returns what clients are sent that were just caught up alone, once `outgoing` has been
    /// pushed to all subscribers: a client that is caught up after this has been told of it, and
    /// one that was before gets both in one message.
    pub(super) fn repeats(&self, outgoing: &Outgoing) -> Vec<Repeat> {
        let mut state = self.state.lock();
        state.recent.forget(Instant::now(), self.template.merge.carry);
        let stamp = state.stamps.next();
        state.recent.repeats(outgoing, &self.template, stamp)
    }

    /// Records a message that has been sent.
    pub(super) fn delivered(&self, delivery: Delivery) {
        self.state.lock().journal.delivered(delivery);
    }

    /// Records that a client that may be deaf to the feed was told to join again.
    pub(crate) fn healed(&self) {
        self.state.lock().journal.told(Notice::Heal);
    }

    /// Returns what a client is to be told that has just subscribed, if anything: the changes that
    /// it may have missed, or the complete list where they are not known. `covered_since` is since
    /// when everything about the event has been heard here.
    pub(super) fn catch_up(
        &self,
        history: ClientHistory,
        covered_since: Option<Instant>,
        outbox: &Arc<Outbox>,
        subscription: &Subscription,
    ) -> Option<CatchUp> {
        let now = Instant::now();
        let (cause, since) = history.missed(now, self.started);
        let mut state = self.state.lock();
        let State { known, recent, journal, stamps, messages, .. } = &mut *state;
        let since = since.filter(|since| {
            covered_since.is_some_and(|covered| covered.max(self.vouches_since) <= *since)
                && known.reaches_back_to(*since)
        });
        let (mut endpoints, coverage) = match since {
            Some(since) => (known.changed_since(since), Coverage::Exact),
            None => (known.complete(&self.resync), Coverage::Complete),
        };
        let since = since.map_or(Since::EVER, |since| Since::at(since, self.started));
        if endpoints.is_empty() {
            return None;
        }
        journal.told(Notice::CatchUp(cause, coverage));
        let stamp = stamps.next();
        recent.forget(now, self.template.merge.carry);
        endpoints.extend(recent.carried());
        // A client that joins again at once would forget what it was told at first.
        if let Some(earlier) = recent.take(outbox, subscription.sub_topic()) {
            endpoints.extend(earlier.iter().cloned());
        }
        let broadcast = self.template.catch_up(cause.label(), &endpoints, stamp);
        recent.add(outbox, subscription, endpoints, since, now);
        Some(CatchUp { broadcast, cause, coverage, since, messages: *messages })
    }

    /// Returns how many messages the whole feed was sent.
    pub(super) fn messages(&self) -> u64 {
        self.state.lock().messages
    }

    /// Returns what operators see of the feed.
    pub(crate) fn summary(&self) -> Summary {
        let now = Instant::now();
        let state = self.state.lock();
        let journal = &state.journal;
        Summary {
            last_notification: journal.last_notification,
            last_delivery: journal.last_delivery,
            merged: journal.merged,
            pending: state.window.pending_count(),
            muted_for: state.window.muted_for(now),
            heard: state.heard,
            is_known: state.is_known,
            endpoints: state.known.count(),
            catch_ups: journal.notices.catch_ups,
            heals: journal.notices.heals,
        }
    }

    /// Returns what was counted since the last call.
    pub(crate) fn take_tally(&self) -> Tally {
        self.state.lock().journal.take_tally()
    }

    /// Returns the last messages to the whole feed, the newest first.
    pub(crate) fn log(&self) -> Vec<Arc<Delivery>> {
        self.state.lock().journal.log()
    }

    /// Returns what single clients were told, the newest first.
    pub(crate) fn notices(&self) -> Vec<NoticeCount> {
        self.state.lock().journal.notices.latest()
    }
}

#[cfg(test)]
mod tests;
