//! The window of each event: an invalidation goes at once, those after it in one message at the
//! window's end, and who was away is told what has changed meanwhile.
//!
//! Invariants: every source of a merged rule goes through [`offer`], so that the window covers all
//! of them; one task sends, in the order in which windows end; at most `max` events are held.

mod catch_up;
mod feed;
mod journal;
mod known;
mod payload;
mod reason;
mod window;

use std::{
    collections::{BinaryHeap, HashMap},
    iter, slice,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use self::{
    catch_up::Repeat,
    window::{Due, Outgoing},
};
pub(crate) use self::{
    catch_up::{CatchUp, ClientHistory},
    feed::Feed,
    journal::{Delivery, Heard, MINUTE, Notice, NoticeCount, Summary, Tally},
    payload::{ENDPOINT_BYTES_MAX, Endpoints},
    window::Notified,
};
pub use self::{
    payload::BadEndpoint,
    reason::{CatchUpCause, Coverage, LinkLoss, SendReason},
};
use crate::{
    access::rule::{Captures, Rule},
    hub::{BroadcastSource, FanOut, To, outbox::Replaceable},
    protocol::{
        serializer::Broadcast,
        topic::{Privacy, TOPIC_PREFIX, TopicKey},
    },
    server::Services,
};

/// How long an event is remembered that nobody holds.
const EVENT_KEPT: Duration = Duration::from_secs(24 * 3600);
/// While nothing waits.
const IDLE: Duration = Duration::from_secs(3600);

/// The events of all merged rules, and when each has something to send.
#[derive(Debug)]
pub(crate) struct Feeds {
    state: Mutex<State>,
    changed: Notify,
    max: usize,
    started: Instant,
}

#[derive(Debug, Default)]
struct State {
    /// By the first spelling of the topic.
    events: HashMap<Box<str>, Held>,
    /// The events' own times count; one that has moved away is found out when it is looked at.
    timers: BinaryHeap<Timer>,
}

#[derive(Debug)]
struct Held {
    event: Arc<Feed>,
    used: Instant,
    /// So long it is not forgotten.
    muted_until: Option<Instant>,
}

#[derive(Debug)]
struct Timer {
    at: Instant,
    event: Arc<Feed>,
}

impl Feeds {
    /// No event, and room for `max`.
    pub(crate) fn new(max: usize) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), max, started: Instant::now() }
    }

    /// The event of a topic, if its rule merges and there is room for it.
    pub(crate) fn of(&self, rule: &Arc<Rule>, captures: &Captures) -> Option<Arc<Feed>> {
        let merge = rule.merge.as_ref()?;
        let key: Box<str> = rule.pattern.first()?.fill(captures).into();
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(held) = state.events.get_mut(&key) {
            held.used = now;
            return Some(Arc::clone(&held.event));
        }
        if state.events.len() >= self.max {
            state.events.retain(|_, held| {
                Arc::strong_count(&held.event) > 1 || held.muted_until.is_some_and(|it| it > now)
            });
            if state.events.len() >= self.max {
                return None;
            }
        }
        let event = Arc::new(Feed::new(rule, merge, captures, self.started));
        let held = Held { event: Arc::clone(&event), used: now, muted_until: None };
        state.events.insert(key, held);
        Some(event)
    }

    /// Every event that is remembered.
    pub(crate) fn all(&self) -> Vec<Arc<Feed>> {
        self.state.lock().events.values().map(|held| Arc::clone(&held.event)).collect()
    }

    /// The events of this id, of any rule.
    pub(crate) fn named(&self, eid: &str) -> Vec<Arc<Feed>> {
        let state = self.state.lock();
        let events = state.events.values().map(|held| &held.event);
        events.filter(|event| event.eid() == eid).map(Arc::clone).collect()
    }

    /// Holds back what the event is sent, until then or no longer.
    pub(crate) fn mute(&self, event: &Arc<Feed>, until: Option<Instant>) {
        {
            let mut state = self.state.lock();
            let State { events, timers } = &mut *state;
            let key = event.topics().first();
            if let Some(held) = key.and_then(|key| events.get_mut(&*key.sub_topic)) {
                held.muted_until = until;
            }
            // They would keep the event until another mute's end; the one that counts is made below.
            timers.retain(|timer| !Arc::ptr_eq(&timer.event, event));
        }
        event.mute(until);
        self.schedule(event);
    }

    /// Since when this process could hear anything; without a database that is all there is.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Forgets the events that nobody has held for long.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        self.state.lock().events.retain(|_, held| {
            if Arc::strong_count(&held.event) > 1 {
                held.used = now;
            }
            now.duration_since(held.used) < EVENT_KEPT
        });
    }

    /// Has the event looked at when it has something to send.
    pub(crate) fn schedule(&self, event: &Arc<Feed>) {
        let Some(at) = event.next() else { return };
        let is_first = {
            let mut state = self.state.lock();
            let is_first = state.timers.peek().is_none_or(|next| at < next.at);
            state.timers.push(Timer { at, event: Arc::clone(event) });
            is_first
        };
        if is_first {
            self.changed.notify_one();
        }
    }

    fn next(&self) -> Option<Instant> {
        self.state.lock().timers.peek().map(|timer| timer.at)
    }

    fn take_due(&self) -> Option<Arc<Feed>> {
        let mut state = self.state.lock();
        let is_due = state.timers.peek()?.at <= Instant::now();
        is_due.then(|| state.timers.pop().map(|timer| timer.event)).flatten()
    }
}

/// Takes what is an invalidation out of `broadcasts`, which were sent to a topic of `event` by the
/// database or by somebody else, and gives the rest.
pub(crate) fn offer(
    services: &Services,
    event: &Arc<Feed>,
    broadcasts: Vec<Broadcast>,
    notified: Option<Notified>,
) -> Vec<Broadcast> {
    let (mut rest, mut is_first) = (Vec::new(), false);
    for broadcast in broadcasts {
        match event.read(broadcast) {
            Ok(invalidation) => {
                if notified.is_some() {
                    event.hear(invalidation.id.is_some());
                }
                for bad in &invalidation.bad {
                    services.metrics.endpoints_dropped.with_label_values(&[bad.kind()]).inc();
                }
                is_first |= event.offer(invalidation, notified);
            }
            Err(other) => rest.push(other),
        }
    }
    // The timer of one that waits already finds out by itself.
    if is_first {
        services.feeds.schedule(event);
    }
    rest
}

/// Tells everybody of an event what they may have missed, not before `earliest`: these endpoints,
/// or the complete list.
pub(crate) fn offer_gap(
    services: &Services,
    event: &Arc<Feed>,
    cause: CatchUpCause,
    missed: Option<&Endpoints>,
    earliest: Instant,
) {
    let method = if missed.is_some() { Coverage::Exact } else { Coverage::Complete };
    services.metrics.catch_ups.with_label_values(&[cause.label(), method.label()]).inc();
    tracing::debug!(eid = event.eid(), cause = cause.label(), method = method.label(), "gap");
    event.offer_gap(cause, missed, earliest);
    services.feeds.schedule(event);
}

/// Sends what is due until the server stops.
pub(crate) async fn run(services: Arc<Services>) {
    let events = &services.feeds;
    loop {
        let next = events.next().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            () = sleep_until(next) => {}
            () = events.changed.notified() => {}
            () = services.stopped.cancelled() => return,
        }
        while let Some(event) = events.take_due() {
            match event.due(false) {
                Due::Nothing => {}
                Due::Later => events.schedule(&event),
                Due::Send(outgoing) => send(&services, &event, *outgoing).await,
            }
        }
    }
}

/// Sends everything that waits, whatever its window.
pub(crate) async fn flush(services: &Services) {
    for event in services.feeds.all() {
        if let Due::Send(outgoing) = event.due(true) {
            send(services, &event, *outgoing).await;
        }
    }
}

async fn send(services: &Services, event: &Feed, outgoing: Outgoing) {
    let (metrics, hub) = (&services.metrics, &services.hub);
    let fanned_out = hub
        .fan_out(FanOut {
            source: BroadcastSource::Merged,
            topics: event.topics(),
            broadcasts: slice::from_ref(&outgoing.broadcast),
            committed: outgoing.committed,
            to: outgoing.since.map_or(To::All, To::WhoKeepsUp),
        })
        .await;
    let mut repeats = 0;
    let repeated = &metrics.invalidations_sent.with_label_values(&[SendReason::Repeat.label()]);
    for Repeat { outbox, sub_topic, broadcast, since } in event.repeats(&outgoing) {
        let topic = format!("{TOPIC_PREFIX}{sub_topic}");
        if let Some(frame) = outbox.serializer().encode_broadcast(&topic, &broadcast) {
            let key = TopicKey { sub_topic, privacy: Privacy::Public };
            let replaceable = since.map(|since| Replaceable { topic: hub.topic_id(&key), since });
            // A full outbox closes its own connection.
            let queued = outbox.push_all(iter::once(frame), None, replaceable).unwrap_or(0);
            repeated.inc_by(queued as u64);
            repeats += queued;
        }
    }
    let mut delivery = outgoing.delivery;
    metrics.invalidations_sent.with_label_values(&[delivery.reason.label()]).inc();
    if let Some(waited) = outgoing.waited {
        metrics.window_wait.observe(waited.as_secs_f64());
    }
    metrics.invalidations_merged.inc_by(delivery.merged.saturating_sub(1) as u64);
    (delivery.deliveries, delivery.repeats) = (fanned_out.deliveries, repeats);
    event.delivered(delivery);
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    /// The earliest is the greatest: the heap gives it first.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}

#[cfg(test)]
mod tests;
