//! Topics that were joined recently, and of which events anybody may be told.
//!
//! Anybody who may read a topic may be told of it if the database calls its event public, or if the
//! topic's rule lists its events, and if somebody has viewed it within [`VIEWED_LATELY`]. While there is
//! no database that can be asked, that goes for every event of which it has said nothing: a deaf client
//! that nobody heals misses everything.
//!
//! Invariants: at most `all` topics are remembered, and of each address at most `of_address` whose
//! event nobody else knows; beyond that the oldest of those is forgotten, and one whose event is
//! known only if there is none; a search costs what it finds, however many topics there are.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use super::lost_sockets::REMEMBERED;
use crate::access::{EID, Found, Rules};

/// For how long after its last viewer a topic is told of: whatever takes the gateway away takes all
/// viewers at once, and the first that come back may all be deaf.
pub(super) const VIEWED_LATELY: Duration = Duration::from_secs(3600);
/// The least time between two notes of one topic for the database, and between two questions about
/// one event.
const NOTED_AGAIN: Duration = Duration::from_secs(60);

/// Most topics that are remembered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of all topics together.
    pub(super) all: usize,
    /// Of the topics that one address has joined, and whose event nobody else knows.
    pub(super) of_address: usize,
}

/// The topics that were joined recently.
#[derive(Debug)]
pub(super) struct Recent {
    state: Mutex<State>,
    bounds: Bounds,
}

#[derive(Debug, Default)]
struct State {
    topics: HashMap<Arc<str>, Topic>,
    events: HashMap<Arc<str>, Event>,
    /// The order in which topics are forgotten: whether the event is known, when it was last viewed.
    places: BTreeSet<(bool, Instant, Arc<str>)>,
    /// The topics of unknown events that each address has joined.
    unknown_of: HashMap<Uuid, BTreeSet<(Instant, Arc<str>)>>,
    /// The topics that anybody may be told of.
    open: BTreeSet<(Instant, Arc<str>)>,
    /// The database answers which events are public.
    is_answered: bool,
}

#[derive(Debug)]
struct Topic {
    /// The event, if the topic names it and nothing else.
    event: Option<Arc<str>>,
    /// The rule lists its events.
    is_listed: bool,
    /// Stands for the address that has joined it first; `None` if that was at another gateway.
    from: Option<Uuid>,
    /// When it was last known to have a viewer.
    viewed: Instant,
    /// The database has not been told yet.
    is_new: bool,
}

#[derive(Debug, Default)]
struct Event {
    /// One for each spelling that was joined.
    topics: Vec<Arc<str>>,
    /// The database has notified something of it.
    is_published: bool,
    standing: Standing,
    asked: Option<Instant>,
}

/// What the database says of an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The database knows no such event, or was not asked.
    #[default]
    Unknown,
    /// The event exists, and not everybody is told so.
    Private,
    /// Everybody may know the event.
    Public,
}

/// A topic that anybody may be told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Open {
    pub(super) topic: Arc<str>,
    pub(super) by: OpenBy,
}

/// Why anybody may be told of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenBy {
    /// The database calls its event public.
    Database,
    /// Its rule listed its events when it was last joined.
    Rule,
    /// The database has said nothing of its event, and cannot be asked.
    Silence,
}

impl Recent {
    /// Creates an empty memory.
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { state: Mutex::default(), bounds }
    }

    /// Records that a client of this address has joined the topic.
    pub(super) fn joined(&self, rules: &Rules, sub_topic: &str, from: Uuid) {
        self.note(rules, sub_topic, Some(from), Instant::now());
    }

    /// Records a topic that had a viewer so long ago, at another gateway or before a restart.
    pub(super) fn joined_elsewhere(&self, rules: &Rules, sub_topic: &str, age: Duration) {
        if let Some(viewed) = Instant::now().checked_sub(age) {
            self.note(rules, sub_topic, None, viewed);
        }
    }

    fn note(&self, rules: &Rules, sub_topic: &str, from: Option<Uuid>, viewed: Instant) {
        let Found::Rule(rule, captures) = rules.find(sub_topic) else { return };
        let (is_listed, is_new) = (rule.listed, from.is_some());
        let mut state = self.state.lock();
        if let Some((topic, _)) = state.topics.get_key_value(sub_topic) {
            let topic = Arc::clone(topic);
            return state.view(&topic, viewed, Some(is_listed));
        }
        let eid = captures.get(EID).filter(|_| captures.len() == 1);
        let topic: Arc<str> = sub_topic.into();
        let event = eid.map(|eid| state.event_of(eid, &topic));
        state.topics.insert(Arc::clone(&topic), Topic { event, is_listed, from, viewed, is_new });
        state.place(&topic);
        if let Some(from) = from {
            let unknown = state.unknown_of.get(&from);
            let unknown = unknown.filter(|unknown| unknown.len() > self.bounds.of_address);
            if let Some((_, first)) = unknown.and_then(|unknown| unknown.first().cloned()) {
                state.forget(&first);
            }
        }
        if state.topics.len() > self.bounds.all
            && let Some((_, _, first)) = state.places.first().cloned()
        {
            state.forget(&first);
        }
    }

    /// Records that the database has notified something of the event.
    pub(super) fn published(&self, eid: &str) {
        let mut state = self.state.lock();
        if state.events.get(eid).is_some_and(|event| !event.is_published) {
            state.change(eid, |event| event.is_published = true);
        }
    }

    /// Returns at most `max` events of which it is not known, or not known any more, what the
    /// database says of them.
    pub(super) fn unasked(&self, max: usize) -> Vec<Arc<str>> {
        let mut state = self.state.lock();
        let is_over = |event: &Event| event.asked.is_none_or(|at| at.elapsed() >= NOTED_AGAIN);
        let unasked = state.events.iter_mut().filter(|(_, event)| is_over(event));
        unasked.take(max).map(|(eid, _)| Arc::clone(eid)).collect()
    }

    /// Takes what the database says of an event.
    pub(super) fn answered(&self, eid: &str, standing: Standing) {
        let mut state = self.state.lock();
        let Some(event) = state.events.get_mut(eid) else { return };
        event.asked = Some(Instant::now());
        if event.standing != standing {
            state.change(eid, |event| event.standing = standing);
        }
    }

    /// Records whether the database answers which events are public.
    pub(super) fn set_answered(&self, is_answered: bool) {
        let mut state = self.state.lock();
        if state.is_answered == is_answered {
            return;
        }
        let topics: Vec<_> = state.topics.keys().cloned().collect();
        for topic in &topics {
            state.unplace(topic);
        }
        state.is_answered = is_answered;
        for topic in &topics {
            state.place(topic);
        }
    }

    /// Whether somebody else than a client knows the event.
    pub(super) fn is_known(&self, eid: &str) -> bool {
        self.state.lock().events.get(eid).is_some_and(Event::is_known)
    }

    /// Whether anybody may be told of a topic of the event.
    pub(super) fn is_open(&self, eid: &str) -> bool {
        !self.open_of(eid).is_empty()
    }

    /// Returns the topics of the event that anybody may be told of.
    pub(super) fn open_of(&self, eid: &str) -> Vec<Open> {
        let now = Instant::now();
        let state = self.state.lock();
        let topics = state.events.get(eid).into_iter().flat_map(|event| &event.topics);
        let held = topics.filter_map(|topic| Some((topic, state.topics.get(topic)?)));
        held.filter(|(_, held)| now.duration_since(held.viewed) < VIEWED_LATELY)
            .filter_map(|(topic, held)| {
                Some(Open { topic: Arc::clone(topic), by: state.open_by(held)? })
            })
            .collect()
    }

    /// Returns at most `max` topics that anybody may be told of, those that were viewed last first.
    pub(super) fn open(&self, max: usize) -> Vec<Open> {
        let now = Instant::now();
        let state = self.state.lock();
        let open = state.open.iter().rev().take(max);
        open.take_while(|(viewed, _)| now.duration_since(*viewed) < VIEWED_LATELY)
            .filter_map(|(_, topic)| {
                let by = state.open_by(state.topics.get(topic)?)?;
                Some(Open { topic: Arc::clone(topic), by })
            })
            .collect()
    }

    /// Returns every topic that is remembered.
    pub(super) fn all(&self) -> Vec<Arc<str>> {
        self.state.lock().topics.keys().cloned().collect()
    }

    /// Records that these topics have a viewer. They keep their order.
    pub(super) fn viewed(&self, topics: &[Arc<str>]) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let known =
            topics.iter().filter_map(|topic| Some((state.topics.get(topic)?.viewed, topic)));
        let mut known: Vec<_> = known.collect();
        known.sort_unstable();
        for (after, (_, topic)) in known.into_iter().rev().enumerate() {
            let viewed = now.checked_sub(Duration::from_nanos(after as u64)).unwrap_or(now);
            state.view(topic, viewed, None);
        }
    }

    /// Returns the topics that were viewed since the last call, and of which anybody may be told or
    /// whose event is known: what clients invent is not worth a row.
    pub(super) fn take_new(&self) -> Vec<Arc<str>> {
        let mut state = self.state.lock();
        let State { topics, events, .. } = &mut *state;
        let new = topics.iter_mut().filter(|(_, topic)| {
            let event = topic.event.as_ref().and_then(|eid| events.get(eid));
            topic.is_new && (topic.is_listed || event.is_some_and(Event::is_known))
        });
        new.map(|(name, topic)| {
            topic.is_new = false;
            Arc::clone(name)
        })
        .collect()
    }

    /// Forgets topics that nobody has viewed for a day.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_over = |topic: &Topic| now.duration_since(topic.viewed) >= REMEMBERED;
        let over = state.topics.iter().filter(|(_, topic)| is_over(topic));
        let over: Vec<_> = over.map(|(name, _)| Arc::clone(name)).collect();
        for topic in &over {
            state.forget(topic);
        }
    }
}

impl Event {
    fn is_known(&self) -> bool {
        self.is_published || self.standing != Standing::Unknown
    }
}

impl State {
    /// Returns the event's name, with the topic among its topics.
    fn event_of(&mut self, eid: &str, topic: &Arc<str>) -> Arc<str> {
        let known = self.events.get_key_value(eid).map(|(eid, _)| Arc::clone(eid));
        let eid = known.unwrap_or_else(|| eid.into());
        self.events.entry(Arc::clone(&eid)).or_default().topics.push(Arc::clone(topic));
        eid
    }

    fn is_known(&self, topic: &Topic) -> bool {
        let event = topic.event.as_ref().and_then(|eid| self.events.get(eid));
        event.is_some_and(Event::is_known)
    }

    /// Returns why anybody may be told of the topic.
    fn open_by(&self, topic: &Topic) -> Option<OpenBy> {
        let event = topic.event.as_ref().and_then(|eid| self.events.get(eid));
        match event.map(|event| event.standing) {
            Some(Standing::Public) => Some(OpenBy::Database),
            _ if topic.is_listed => Some(OpenBy::Rule),
            Some(Standing::Unknown) if !self.is_answered => Some(OpenBy::Silence),
            Some(Standing::Unknown | Standing::Private) | None => None,
        }
    }

    fn view(&mut self, topic: &Arc<str>, viewed: Instant, is_listed: Option<bool>) {
        self.unplace(topic);
        if let Some(held) = self.topics.get_mut(topic) {
            held.is_listed = is_listed.unwrap_or(held.is_listed);
            // The database is told once a minute, which is enough.
            held.is_new |= viewed.saturating_duration_since(held.viewed) >= NOTED_AGAIN;
            held.viewed = held.viewed.max(viewed);
        }
        self.place(topic);
    }

    fn change(&mut self, eid: &str, change: impl FnOnce(&mut Event)) {
        let topics = self.events.get(eid).map(|event| event.topics.clone()).unwrap_or_default();
        for topic in &topics {
            self.unplace(topic);
        }
        if let Some(event) = self.events.get_mut(eid) {
            change(event);
        }
        for topic in &topics {
            self.place(topic);
        }
    }

    fn forget(&mut self, topic: &Arc<str>) {
        self.unplace(topic);
        let event = self.topics.remove(topic).and_then(|topic| topic.event);
        if let Some(eid) = event
            && let Some(event) = self.events.get_mut(&eid)
        {
            event.topics.retain(|other| other != topic);
            if event.topics.is_empty() {
                self.events.remove(&eid);
            }
        }
    }

    /// Puts a topic where its age and its event belong.
    fn place(&mut self, topic: &Arc<str>) {
        let Some(held) = self.topics.get(topic) else { return };
        let (viewed, is_known) = (held.viewed, self.is_known(held));
        let is_open = self.open_by(held).is_some();
        let from = held.from.filter(|_| !is_known);
        self.places.insert((is_known, viewed, Arc::clone(topic)));
        if let Some(from) = from {
            self.unknown_of.entry(from).or_default().insert((viewed, Arc::clone(topic)));
        }
        if is_open {
            self.open.insert((viewed, Arc::clone(topic)));
        }
    }

    /// Takes a topic from where it was put; what decides that has not changed since.
    fn unplace(&mut self, topic: &Arc<str>) {
        let Some(held) = self.topics.get(topic) else { return };
        let (viewed, is_known, from) = (held.viewed, self.is_known(held), held.from);
        self.places.remove(&(is_known, viewed, Arc::clone(topic)));
        self.open.remove(&(viewed, Arc::clone(topic)));
        if let Some(from) = from
            && let Some(unknown) = self.unknown_of.get_mut(&from)
        {
            unknown.remove(&(viewed, Arc::clone(topic)));
            if unknown.is_empty() {
                self.unknown_of.remove(&from);
            }
        }
    }
}

#[cfg(test)]
mod tests;
