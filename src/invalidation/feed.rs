//! One event of a merged rule: what is known of its endpoints, what waits for its window, what has
//! been sent.
//!
//! Invariants: an endpoint is noted as changed before the message about it can be sent, so that a
//! viewer who joins either is among the subscribers of the message or finds the change noted; what
//! is offered leaves with exactly one message to the whole event; nothing here awaits or pushes.

use std::{
    collections::{HashMap, VecDeque},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use governor::{Quota, RateLimiter};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    catch_up::{CatchUp, CaughtUp, ClientHistory, FRESH, Repeat},
    journal::{
        Delivery, Heard, KIND_CHARS_MAX, LISTED_MAX, LOG_MAX, Notice, NoticeCount, Notices,
        SOURCES_MAX, Source, Summary, Tally,
    },
    payload::{self, Endpoints, Invalidation, Stamp},
    reason::{CatchUpCause, Coverage, SendReason},
    window::{Due, Notified, Outgoing, Pending, SETTLE, SETTLE_MAX},
};
use crate::{
    access::rule::{Captures, EID, Merge, Rule},
    clock::{Limiter, TokioClock},
    hub::{
        Subscription,
        outbox::{Committed, Departure, Outbox, Since},
    },
    protocol::{serializer::Broadcast, topic::TopicKey},
};

/// Most endpoints of an event that are known; more are sent, and not remembered.
const ENDPOINTS_MAX: usize = 2_000;

/// An event: one per rule and EID, whatever the spelling of its topic.
#[derive(Debug)]
pub(crate) struct Feed {
    rule: Arc<Rule>,
    merge: Merge,
    eid: Box<str>,
    channel: Box<str>,
    topics: Vec<TopicKey>,
    resync: Endpoints,
    /// None where the rule's window is zero.
    window: Option<Limiter>,
    /// When the server did.
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When each endpoint last changed; none for one that is only known to exist.
    endpoints: HashMap<Box<str>, Option<Instant>>,
    /// What changed up to this may not be noted.
    forgotten: Option<Instant>,
    pending: Option<Pending>,
    /// What the whole event was sent within `carry`, by its own messages.
    carried: VecDeque<(Instant, Endpoints)>,
    /// Who was caught up within `carry`.
    caught_up: VecDeque<CaughtUp>,
    stamp: Stamp,
    /// That of the newest message which was sent last, as it was written.
    last_timestamp: Option<Box<str>>,
    /// How many the whole event was sent.
    messages: u64,
    /// Somebody has joined before the event was listened to.
    is_owed: bool,
    heard: Heard,
    muted_until: Option<Instant>,
    log: VecDeque<Arc<Delivery>>,
    told: Notices,
    last_notification: Option<SystemTime>,
    last_delivery: Option<SystemTime>,
    merged: u64,
    /// The database has said that there is more of it than every event has.
    is_known: bool,
    tally: Tally,
}

impl Feed {
    /// An event of which nothing is known.
    pub(crate) fn new(
        rule: &Arc<Rule>,
        merge: &Merge,
        captures: &Captures,
        started: Instant,
    ) -> Self {
        let quota = Quota::with_period(merge.window).map(|it| it.allow_burst(NonZeroU32::MIN));
        Self {
            eid: captures.get(EID).cloned().unwrap_or_default(),
            channel: rule.listen.as_ref().map_or_else(String::new, |it| it.fill(captures)).into(),
            topics: rule.spellings(captures).collect(),
            resync: rule.resync.iter().map(|pattern| pattern.fill(captures).into()).collect(),
            window: quota.map(|quota| RateLimiter::direct_with_clock(quota, TokioClock)),
            merge: merge.clone(),
            rule: Arc::clone(rule),
            started,
            state: Mutex::default(),
        }
    }

    /// The event's id.
    pub(crate) fn eid(&self) -> &str {
        &self.eid
    }

    /// What the rule is called.
    pub(crate) fn rule_name(&self) -> &str {
        &self.rule.name
    }

    /// Where the database tells of the event.
    pub(crate) fn channel(&self) -> &str {
        &self.channel
    }

    /// One for each spelling.
    pub(crate) fn topics(&self) -> &[TopicKey] {
        &self.topics
    }

    /// Reads a broadcast to this event.
    ///
    /// # Errors
    /// The broadcast itself, if it is no invalidation.
    pub(crate) fn read(&self, broadcast: Broadcast) -> Result<Invalidation, Broadcast> {
        Invalidation::read(broadcast, &self.rule, &self.merge)
    }

    /// Takes an invalidation, and says whether nothing was waiting before. It leaves when
    /// [`Self::due`] says so.
    #[must_use]
    pub(crate) fn offer(&self, invalidation: Invalidation, notified: Option<Notified>) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_first = state.pending.is_none();
        state.note(&invalidation.endpoints, Some(now));
        state.last_notification = Some(SystemTime::now());
        state.tally.notifications += 1;
        if invalidation.is_pointer {
            state.note_all(&self.resync, now);
        }
        let pending = state.pending(now, now + SETTLE);
        let pid = notified.map(|it| it.pid);
        if !pending.has_waited && pid == pending.pid {
            pending.due = (now + SETTLE).min(pending.first + SETTLE_MAX).max(pending.due);
        }
        pending.pid = pid;
        let committed = notified.and_then(|it| it.committed);
        pending.committed = [pending.committed, committed].into_iter().flatten().min();
        pending.messages += 1;
        pending.is_complete |= invalidation.is_pointer;
        pending.is_clean &= invalidation.bad.is_empty();
        pending.add(&invalidation.endpoints);
        if pending.sources.len() < SOURCES_MAX {
            let kind = invalidation.kind.as_deref();
            let kind = kind.map(|it| it.chars().take(KIND_CHARS_MAX).collect::<String>().into());
            pending.sources.push(Source { id: invalidation.id, kind });
        }
        pending.newest = Some(invalidation);
        is_first
    }

    /// Notes whether a notification named its row of the history.
    pub(crate) fn hear(&self, has_id: bool) {
        let mut state = self.state.lock();
        state.heard = match (state.heard, has_id) {
            (_, false) | (Heard::SomeWithoutId, true) => Heard::SomeWithoutId,
            (Heard::Nothing | Heard::OnlyWithId, true) => Heard::OnlyWithId,
        };
    }

    /// Whether the event's notifications have named their rows.
    pub(crate) fn heard(&self) -> Heard {
        self.state.lock().heard
    }

    /// Takes what everybody may have missed, to leave not before `earliest`: these endpoints, or
    /// if there are none the complete list.
    pub(crate) fn offer_gap(
        &self,
        cause: CatchUpCause,
        missed: Option<&Endpoints>,
        earliest: Instant,
    ) {
        let now = Instant::now();
        let mut state = self.state.lock();
        match missed {
            Some(endpoints) => state.note(endpoints, Some(now)),
            // Each may have changed, up to now.
            None => state.note_all(&self.resync, now),
        }
        let pending = state.pending(now, earliest.max(now + SETTLE));
        pending.gap = Some(cause);
        match missed {
            Some(endpoints) => pending.add(endpoints),
            None => {
                pending.is_complete = true;
                pending.endpoints = Endpoints::default();
            }
        }
    }

    /// Notes endpoints that exist.
    pub(crate) fn learn(&self, endpoints: &Endpoints) {
        let mut state = self.state.lock();
        state.note(endpoints, None);
        // The others it says of any.
        state.is_known |= endpoints.iter().any(|it| !self.resync.contains(it));
    }

    /// Notes that somebody has joined who could not be told what happens meanwhile.
    pub(crate) fn owe(&self) {
        self.state.lock().is_owed = true;
    }

    /// Whether somebody is owed a catch-up, who is then no more.
    pub(crate) fn take_owed(&self) -> bool {
        std::mem::take(&mut self.state.lock().is_owed)
    }

    /// When something is to be sent, as far as is known.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.state.lock().pending.as_ref().map(|it| it.due)
    }

    /// Holds everything back until then, or no longer.
    pub(crate) fn mute(&self, until: Option<Instant>) {
        let mut state = self.state.lock();
        state.muted_until = until;
        if let Some(pending) = &mut state.pending {
            pending.due = Instant::now();
        }
    }

    /// What is to be sent, if its time has come; at the end of the server that does not matter.
    pub(crate) fn due(&self, is_last: bool) -> Due {
        let now = Instant::now();
        let mut state = self.state.lock();
        let muted_until = state.muted_until.filter(|until| *until > now);
        let Some(pending) = &mut state.pending else {
            return Due::Nothing;
        };
        if !is_last {
            if let Some(until) = muted_until {
                pending.due = until;
                pending.has_waited = true;
            }
            if pending.due > now {
                return Due::Later;
            }
            if let Some(Err(not_until)) = self.window.as_ref().map(Limiter::check) {
                pending.due = Instant::from_std(not_until.earliest_possible());
                pending.has_waited = true;
                return Due::Later;
            }
        }
        match state.pending.take() {
            Some(pending) => Due::Send(Box::new(self.compose(&mut state, pending, now))),
            None => Due::Nothing,
        }
    }

    /// What clients get that were caught up alone, once `outgoing` has been pushed to everybody:
    /// whoever is caught up after this has been told of it, and whoever was before gets both in one.
    pub(crate) fn repeats(&self, outgoing: &Outgoing) -> Vec<Repeat> {
        let message = &*outgoing.sent.endpoints;
        let mut state = self.state.lock();
        state.forget_carried(Instant::now(), self.merge.carry);
        let stamp = state.next_stamp();
        // Nearly all have been told the same.
        let mut broadcasts: Vec<(&Endpoints, Broadcast)> = Vec::new();
        let mut repeats = Vec::new();
        // Each client is in the list once, so one stamp does for all.
        for CaughtUp { outbox, life, sub_topic, endpoints, since, .. } in &state.caught_up {
            let is_needed = life.strong_count() > 0 && !endpoints.is_subset(message);
            let Some(outbox) = outbox.upgrade().filter(|_| is_needed) else {
                continue;
            };
            let place = broadcasts.iter().position(|(it, _)| **it == **endpoints);
            let place = place.unwrap_or_else(|| {
                let both: Endpoints = message.union(endpoints).cloned().collect();
                let (newest, sent) = (outgoing.newest.as_ref(), &outgoing.sent);
                broadcasts.push((endpoints, self.write(newest, sent, &both, stamp)));
                broadcasts.len() - 1
            });
            let broadcast = broadcasts[place].1.clone();
            let since = outgoing.since.map(|it| it.min(*since));
            repeats.push(Repeat { outbox, sub_topic: Arc::clone(sub_topic), broadcast, since });
        }
        repeats
    }

    /// Notes a message that has been sent.
    pub(crate) fn sent(&self, mut sent: Delivery) {
        if sent.endpoint_count > LISTED_MAX {
            sent.endpoints = Arc::new(sent.endpoints.iter().take(LISTED_MAX).cloned().collect());
        }
        let mut state = self.state.lock();
        state.tally.deliveries += sent.deliveries as u64;
        if sent.deliveries > 0 {
            state.last_delivery = Some(sent.at);
        }
        if state.log.len() >= LOG_MAX {
            state.log.pop_front();
        }
        state.log.push_back(Arc::new(sent));
    }

    /// Notes that a client that may be deaf to the event was told to join it.
    pub(crate) fn healed(&self) {
        self.state.lock().told.add(Notice::Heal, SystemTime::now());
    }

    /// What a client gets that has just subscribed, if anything: what has changed since it last
    /// heard of the event, or the complete list where that is not known. `covered_since` is since
    /// when everything about the event has been heard here.
    pub(crate) fn catch_up(
        &self,
        known: ClientHistory,
        covered_since: Option<Instant>,
        outbox: &Arc<Outbox>,
        subscription: &Subscription,
    ) -> Option<CatchUp> {
        let (now, sub_topic) = (Instant::now(), subscription.sub_topic());
        let (cause, since) = match known {
            ClientHistory::Fresh => (CatchUpCause::Fresh, now.checked_sub(FRESH)),
            ClientHistory::Held => (CatchUpCause::Held, now.checked_sub(FRESH)),
            ClientHistory::Since(since) => (CatchUpCause::Returned, Some(since)),
            ClientHistory::Behind(since) => (CatchUpCause::SlowClient, since.moment(self.started)),
            ClientHistory::Nothing => (CatchUpCause::Unknown, None),
        };
        let mut state = self.state.lock();
        let reaches = |since: &Instant| {
            covered_since.is_some_and(|covered| covered <= *since)
                && state.forgotten.is_none_or(|forgotten| forgotten < *since)
        };
        let since = since.filter(reaches);
        let (mut endpoints, method) = match since {
            Some(since) => (state.changed_since(since), Coverage::Exact),
            None => (self.complete(&state), Coverage::Complete),
        };
        let since = since.map_or(Since::EVER, |it| Since::at(it, self.started));
        if endpoints.is_empty() {
            return None;
        }
        state.told.add(Notice::CatchUp(cause, method), SystemTime::now());
        let stamp = state.next_stamp();
        state.forget_carried(now, self.merge.carry);
        endpoints.extend(state.carried());
        // Who joins again at once would forget what it was told at first.
        if let Some(earlier) = state.take_caught_up(outbox, sub_topic) {
            endpoints.extend(earlier.iter().cloned());
        }
        let (rule, merge) = (&self.rule, &self.merge);
        let broadcast = payload::catch_up(rule, merge, &self.eid, cause.kind(), &endpoints, stamp);
        // When everybody comes back at once, all are told the same.
        let endpoints = match state.caught_up.back() {
            Some(last) if *last.endpoints == endpoints => Arc::clone(&last.endpoints),
            Some(_) | None => Arc::new(endpoints),
        };
        state.caught_up.push_back(CaughtUp {
            at: now,
            outbox: Arc::downgrade(outbox),
            life: subscription.life(),
            sub_topic: Arc::clone(sub_topic),
            endpoints,
            since,
        });
        Some(CatchUp { broadcast, cause, method, since, messages: state.messages })
    }

    /// How many messages the whole event was sent.
    pub(crate) fn messages(&self) -> u64 {
        self.state.lock().messages
    }

    /// What operators see.
    pub(crate) fn summary(&self) -> Summary {
        let now = Instant::now();
        let state = self.state.lock();
        Summary {
            last_notification: state.last_notification,
            last_delivery: state.last_delivery,
            merged: state.merged,
            pending: state.pending.as_ref().map_or(0, |it| it.messages.max(1)),
            muted_for: state.muted_until.and_then(|until| until.checked_duration_since(now)),
            heard: state.heard,
            is_known: state.is_known,
            endpoints: state.endpoints.len(),
            catch_ups: state.told.catch_ups,
            heals: state.told.heals,
        }
    }

    /// What has come and become of it since this was last asked.
    pub(crate) fn take_tally(&self) -> Tally {
        std::mem::take(&mut self.state.lock().tally)
    }

    /// What the whole event was sent, the newest first.
    pub(crate) fn log(&self) -> Vec<Arc<Delivery>> {
        self.state.lock().log.iter().rev().map(Arc::clone).collect()
    }

    /// What single clients were told, the latest first.
    pub(crate) fn told(&self) -> Vec<NoticeCount> {
        self.state.lock().told.latest()
    }

    /// Every endpoint of the event that is known.
    fn complete(&self, state: &State) -> Endpoints {
        let mut known: Vec<_> = state.endpoints.keys().cloned().collect();
        known.sort_unstable();
        self.resync.iter().cloned().chain(known).collect()
    }

    fn compose(&self, state: &mut State, pending: Pending, now: Instant) -> Outgoing {
        let is_complete = pending.is_complete;
        // What is not noted could not be told afterwards.
        let is_noted = state.forgotten.is_none() && (is_complete || !pending.endpoints.is_empty());
        let since = is_noted.then(|| Since::at(pending.first, self.started));
        let own = if is_complete { self.complete(state) } else { pending.endpoints };
        state.forget_carried(now, self.merge.carry);
        let mut endpoints = own.clone();
        endpoints.extend(state.carried());
        let is_alone = pending.messages == 1 && pending.gap.is_none() && !is_complete;
        let messages = pending.messages;
        let timestamp = pending.newest.as_ref().and_then(|it| it.timestamp.clone());
        let is_new = timestamp.is_none() || timestamp != state.last_timestamp;
        let is_as_it_came = is_alone && is_new && pending.is_clean && endpoints.len() == own.len();
        state.last_timestamp = timestamp;
        if !own.is_empty() {
            state.carried.push_back((now, own));
        }
        let merged = (messages.max(1) - 1) as u64;
        state.merged += merged;
        state.tally.merged += merged;
        state.messages += 1;
        let why = match (pending.gap, pending.has_waited) {
            (Some(_), _) => SendReason::Gap,
            (None, true) => SendReason::Window,
            (None, false) => SendReason::Leading,
        };
        let sent = Delivery {
            at: SystemTime::now(),
            why,
            cause: pending.gap,
            endpoint_count: endpoints.len(),
            endpoints: Arc::new(endpoints),
            merged: messages,
            sources: pending.sources,
            deliveries: 0,
            repeats: 0,
        };
        // What a gap tells of leaves with it, however late.
        let departure = match why {
            SendReason::Leading => Departure::AtOnce,
            SendReason::Window | SendReason::Gap | SendReason::CatchUp | SendReason::Repeat => {
                Departure::Merged
            }
        };
        let committed = pending.committed.map(|at| Committed { at, departure });
        let waited = pending.has_waited.then(|| now.duration_since(pending.first));
        let broadcast = match &pending.newest {
            Some(newest) if is_as_it_came => newest.broadcast.clone(),
            newest => self.write(newest.as_ref(), &sent, &sent.endpoints, state.next_stamp()),
        };
        Outgoing { broadcast, newest: pending.newest, sent, committed, waited, since }
    }

    /// The newest message, or a catch-up where there is none, with these endpoints.
    fn write(
        &self,
        newest: Option<&Invalidation>,
        sent: &Delivery,
        endpoints: &Endpoints,
        stamp: Stamp,
    ) -> Broadcast {
        let (rule, merge) = (&self.rule, &self.merge);
        match newest {
            Some(newest) => newest.rewritten(rule, merge, endpoints, stamp, sent.merged),
            None => {
                let cause = sent.cause.map_or(sent.why.kind(), CatchUpCause::kind);
                payload::catch_up(rule, merge, &self.eid, cause, endpoints, stamp)
            }
        }
    }
}

impl State {
    fn note(&mut self, endpoints: &Endpoints, at: Option<Instant>) {
        for endpoint in endpoints {
            if let Some(changed) = self.endpoints.get_mut(endpoint) {
                *changed = at.or(*changed);
            } else if self.endpoints.len() < ENDPOINTS_MAX {
                self.endpoints.insert(endpoint.clone(), at);
            } else if at.is_some() {
                self.forgotten = at;
            }
        }
    }

    fn note_all(&mut self, resync: &Endpoints, at: Instant) {
        self.note(resync, Some(at));
        for changed in self.endpoints.values_mut() {
            *changed = Some(at);
        }
    }

    fn pending(&mut self, now: Instant, due: Instant) -> &mut Pending {
        self.pending.get_or_insert_with(|| Pending {
            newest: None,
            endpoints: Endpoints::default(),
            is_complete: false,
            is_clean: true,
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

    /// The oldest change first.
    fn changed_since(&self, since: Instant) -> Endpoints {
        let mut changed: Vec<_> = self
            .endpoints
            .iter()
            .filter_map(|(endpoint, at)| Some(((*at)?, endpoint)))
            .filter(|(at, _)| *at >= since)
            .collect();
        changed.sort_unstable();
        changed.into_iter().map(|(_, endpoint)| endpoint.clone()).collect()
    }

    /// Forgets that this client was caught up, and gives of what.
    fn take_caught_up(
        &mut self,
        outbox: &Arc<Outbox>,
        sub_topic: &Arc<str>,
    ) -> Option<Arc<Endpoints>> {
        let is_it =
            |it: &CaughtUp| it.outbox.as_ptr() == Arc::as_ptr(outbox) && it.sub_topic == *sub_topic;
        let place = self.caught_up.iter().position(is_it)?;
        self.caught_up.remove(place).map(|it| it.endpoints)
    }

    /// What the whole event was sent just before.
    fn carried(&self) -> impl Iterator<Item = Box<str>> {
        self.carried.iter().flat_map(|(_, endpoints)| endpoints.iter().cloned())
    }

    fn forget_carried(&mut self, now: Instant, carry: Duration) {
        let is_over = |at: Instant| now.duration_since(at) > carry;
        while self.carried.front().is_some_and(|(at, _)| is_over(*at)) {
            self.carried.pop_front();
        }
        while self.caught_up.front().is_some_and(|it| is_over(it.at)) {
            self.caught_up.pop_front();
        }
    }

    /// Later than any before.
    fn next_stamp(&mut self) -> Stamp {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        self.stamp = Stamp(now.max(self.stamp.0 + 1));
        self.stamp
    }
}

#[cfg(test)]
mod tests;
