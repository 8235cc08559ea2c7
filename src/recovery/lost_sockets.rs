//! Sockets that have ended without a leave: what a client that comes back may have missed, and which
//! topics it may be deaf to.
//!
//! A client is known by its address and its `User-Agent`, which many clients may share: a record
//! stands for all of them, and holds the longest absence that any of them may have had.
//!
//! Invariants: the topics of a record, of an address and of all records are bounded; beyond a bound
//! the oldest of the topics whose event nobody knows is forgotten, and one whose event is known only
//! if there is none; where a topic was forgotten, the record, or all records of its address once the
//! whole record is gone, are not believed for a day; a record is believed only while no other
//! gateway, running or ended, may have lost the same client without leaving its record.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use super::client_key::ClientKey;

/// How long a client may be away; after that it gets the complete list.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// What a socket was sent so long before its last message has arrived.
const SLACK: Duration = Duration::from_secs(60);
/// Most records and addresses that are known to have lost topics. Beyond that no record is believed.
const FORGOTTEN_MAX: usize = 10_000;

/// The topic of a row that says of a client, or of an address, that some of its topics were
/// forgotten. No topic has that name.
const FORGOTTEN: &str = "";

/// Most topics that are remembered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of all clients together.
    pub(super) all: usize,
    /// Of all clients of an address.
    pub(super) of_address: usize,
    /// Of the clients that share an address and a `User-Agent`.
    pub(super) of_record: usize,
}

/// The records of all lost sockets.
#[derive(Debug)]
pub(crate) struct LostSockets {
    state: Mutex<State>,
    bounds: Bounds,
    /// How long a socket may be silent before it is closed.
    silence_timeout: Duration,
}

/// The order in which topics are forgotten: whether the event is known, when the socket ended, the
/// record, the topic.
type Place = (bool, Instant, Uuid, Arc<str>);

#[derive(Debug, Default)]
struct State {
    records: HashMap<Uuid, Lost>,
    places: BTreeSet<Place>,
    /// The places of each address, as far as this process has lost the sockets itself.
    places_of: HashMap<Uuid, BTreeSet<Place>>,
    /// The records with a topic of each event.
    events: HashMap<Arc<str>, HashSet<Uuid>>,
    /// When all of a record was forgotten, by the address, or by the record of another gateway.
    forgotten: HashMap<Uuid, Instant>,
    /// When there was last no room in `forgotten`.
    overflowed: Option<Instant>,
    /// No other gateway may have lost a client that comes here.
    is_alone: bool,
}

/// One record.
#[derive(Debug)]
struct Lost {
    /// `None` if another gateway has lost the sockets.
    address: Option<Uuid>,
    topics: HashMap<Arc<str>, LostTopic>,
    /// When one of its topics was last forgotten.
    cut: Option<Instant>,
}

#[derive(Debug, Clone)]
struct LostTopic {
    event: Option<Arc<str>>,
    is_known: bool,
    /// The earliest of their last data frames; `None` if that is not known.
    last_data: Option<Instant>,
    /// The latest of their ends.
    ended: Instant,
}

/// A topic that a socket has lost.
#[derive(Debug)]
pub(super) struct Loss<'a> {
    pub(super) topic: &'a str,
    /// The event that the topic names.
    pub(super) event: Option<Arc<str>>,
    /// Somebody else than a client knows the event.
    pub(super) is_known: bool,
    /// When the socket's last data frame came; `None` if its client may have been away before, for
    /// an unknown time.
    pub(super) last_data: Option<Instant>,
}

/// A record as it travels to another process.
#[derive(Debug)]
pub(crate) struct Record {
    /// The key of a record or, if its topic is empty, of one that is not to be believed.
    pub(crate) client: Uuid,
    /// Without `realtime:`.
    pub(crate) topic: Arc<str>,
    /// The time since its last data frame.
    pub(crate) age: Duration,
}

impl LostSockets {
    /// Creates an empty set of records.
    pub(super) fn new(bounds: Bounds, silence_timeout: Duration) -> Self {
        Self { state: Mutex::default(), bounds, silence_timeout }
    }

    /// Records that a socket of this process which held the topic has ended.
    pub(super) fn record(&self, client: ClientKey, loss: Loss<'_>) {
        self.state.lock().record(client.record(), Some(client.address()), loss, self.bounds);
    }

    /// Records what another gateway has recorded.
    pub(super) fn take_over(&self, record: Uuid, loss: Loss<'_>) {
        let mut state = self.state.lock();
        if loss.topic == FORGOTTEN {
            state.mark(record);
        } else {
            state.record(record, None, loss, self.bounds);
        }
    }

    /// Returns since when a client that comes back to the topic may have missed something, if that
    /// is known.
    pub(super) fn since(&self, client: ClientKey, topic: &str) -> Option<Instant> {
        let now = Instant::now();
        let is_over = |at: &Instant| now.duration_since(*at) >= REMEMBERED;
        let state = self.state.lock();
        if !state.is_alone || state.overflowed.is_some_and(|at| !is_over(&at)) {
            return None;
        }
        let marks = [client.record(), client.address()];
        if marks.iter().any(|key| state.forgotten.get(key).is_some_and(|at| !is_over(at))) {
            return None;
        }
        let record = state.records.get(&client.record())?;
        let lost = record.topics.get(topic)?;
        if is_over(&lost.ended) || record.cut.is_some_and(|at| !is_over(&at)) {
            return None;
        }
        // Another socket with the same record may be dead without having been closed yet.
        let unnoticed = now.checked_sub(self.silence_timeout)?;
        lost.last_data?.min(unnoticed).checked_sub(SLACK)
    }

    /// Returns the topics that a record's clients may have lost, or those of one event.
    pub(super) fn topics(&self, record: Uuid, event: Option<&str>) -> Vec<Arc<str>> {
        let state = self.state.lock();
        let topics = state.records.get(&record).into_iter().flat_map(|record| &record.topics);
        topics
            .filter(|(_, lost)| event.is_none_or(|event| lost.event.as_deref() == Some(event)))
            .map(|(topic, _)| Arc::clone(topic))
            .collect()
    }

    /// Returns whether anybody has lost a topic of the event.
    pub(super) fn has_event(&self, event: &str) -> bool {
        self.state.lock().events.contains_key(event)
    }

    /// Returns the records with a topic of the event.
    pub(super) fn of_event(&self, event: &str) -> Vec<Uuid> {
        let state = self.state.lock();
        state.events.get(event).into_iter().flatten().copied().collect()
    }

    /// Sets whether records may be believed: no other gateway may have lost a client that comes
    /// here without leaving its record.
    pub(crate) fn set_alone(&self, is_alone: bool) {
        self.state.lock().is_alone = is_alone;
    }

    /// Returns whether so much was forgotten that no record is to be believed.
    pub(crate) fn has_overflowed(&self) -> bool {
        self.state.lock().overflowed.is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    /// Returns all records, for another process.
    pub(crate) fn records(&self) -> Vec<Record> {
        let now = Instant::now();
        let state = self.state.lock();
        let cut = state.records.iter().filter(|(_, record)| record.cut.is_some());
        let marks = state.forgotten.keys().chain(cut.map(|(client, _)| client));
        let marks = marks.map(|client| Record {
            client: *client,
            topic: FORGOTTEN.into(),
            age: Duration::ZERO,
        });
        let lost = state.records.iter().flat_map(|(client, record)| {
            record.topics.iter().map(|(topic, lost)| Record {
                client: *client,
                topic: Arc::clone(topic),
                age: lost.last_data.map_or(2 * REMEMBERED, |at| now.duration_since(at)),
            })
        });
        lost.chain(marks).collect()
    }

    /// Forgets records that have expired.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let is_over = |at: Instant| now.duration_since(at) >= REMEMBERED;
        let mut state = self.state.lock();
        state.forgotten.retain(|_, at| !is_over(*at));
        let over: Vec<_> = state.places.iter().filter(|place| is_over(place.1)).cloned().collect();
        for place in &over {
            state.remove(place);
        }
    }
}

impl Lost {
    fn new(address: Option<Uuid>) -> Self {
        Self { address, topics: HashMap::new(), cut: None }
    }

    /// Returns the place of the topic that is forgotten first.
    fn first(&self, key: Uuid) -> Option<Place> {
        let places = self.topics.iter().map(|(topic, lost)| (lost.is_known, lost.ended, topic));
        let (is_known, ended, topic) = places.min()?;
        Some((is_known, ended, key, Arc::clone(topic)))
    }
}

impl State {
    fn record(&mut self, key: Uuid, address: Option<Uuid>, loss: Loss<'_>, bounds: Bounds) {
        let now = Instant::now();
        let Loss { topic, event, is_known, last_data } = loss;
        let (mut topic, mut lost): (Arc<str>, _) =
            (topic.into(), LostTopic { event, is_known, last_data, ended: now });
        let record = self.records.entry(key).or_insert_with(|| Lost::new(address));
        let address = record.address;
        if let Some((known, before)) = record.topics.remove_entry(&topic) {
            topic = known;
            // `None` is the least.
            lost.last_data = lost.last_data.min(before.last_data);
            lost.is_known |= before.is_known;
            let place = (before.is_known, before.ended, key, Arc::clone(&topic));
            self.unplace(&place, address);
        }
        if let Some(event) = &lost.event {
            self.events.entry(Arc::clone(event)).or_default().insert(key);
        }
        let place = (lost.is_known, now, key, Arc::clone(&topic));
        self.places.insert(place.clone());
        if let Some(address) = address {
            self.places_of.entry(address).or_default().insert(place);
        }
        if let Some(record) = self.records.get_mut(&key) {
            record.topics.insert(topic, lost);
        }
        self.keep_to(bounds, key, address);
    }

    /// Forgets what is beyond the bounds after a record of an address has got one topic more.
    fn keep_to(&mut self, bounds: Bounds, key: Uuid, address: Option<Uuid>) {
        let record = self.records.get(&key).filter(|record| record.topics.len() > bounds.of_record);
        if let Some(place) = record.and_then(|record| record.first(key)) {
            self.forget(&place);
        }
        let places = address.and_then(|address| self.places_of.get(&address));
        let places = places.filter(|places| places.len() > bounds.of_address);
        if let Some(place) = places.and_then(|places| places.first().cloned()) {
            self.forget(&place);
        }
        if self.places.len() > bounds.all
            && let Some(place) = self.places.first().cloned()
        {
            self.forget(&place);
        }
    }

    /// Forgets a topic that has not expired, and whom not to believe for it.
    fn forget(&mut self, place: &Place) {
        let key = place.2;
        let Some(address) = self.records.get(&key).map(|record| record.address) else { return };
        self.remove(place);
        match self.records.get_mut(&key) {
            Some(record) => record.cut = Some(Instant::now()),
            None => self.mark(address.unwrap_or(key)),
        }
    }

    /// Remembers whose records are not to be believed for a day.
    fn mark(&mut self, key: Uuid) {
        let now = Instant::now();
        if self.forgotten.len() < FORGOTTEN_MAX || self.forgotten.contains_key(&key) {
            self.forgotten.insert(key, now);
        } else {
            self.overflowed = Some(now);
        }
    }

    fn remove(&mut self, place: &Place) {
        let (_, _, client, topic) = place;
        let Some(record) = self.records.get_mut(client) else { return };
        let (address, lost) = (record.address, record.topics.remove(topic));
        let event = lost.and_then(|lost| lost.event);
        let has_event = record.topics.values().any(|lost| lost.event == event);
        if record.topics.is_empty() {
            self.records.remove(client);
        }
        if let Some(event) = event.filter(|_| !has_event)
            && let Some(records) = self.events.get_mut(&event)
        {
            records.remove(client);
            if records.is_empty() {
                self.events.remove(&event);
            }
        }
        self.unplace(place, address);
    }

    fn unplace(&mut self, place: &Place, address: Option<Uuid>) {
        self.places.remove(place);
        if let Some(address) = address
            && let Some(places) = self.places_of.get_mut(&address)
        {
            places.remove(place);
            if places.is_empty() {
                self.places_of.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests;
