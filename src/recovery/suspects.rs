//! The sockets that may be deaf, by the time of their next round, by record and by address.
//!
//! Invariants: at most `per_address` sockets of an address are suspect, beyond which the one that
//! became so first is left alone; the lock of the set is held for a search and never while a
//! suspect is judged; each suspect has a lock of its own, which is taken under no other.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    mem,
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use super::client_key::ClientKey;
use crate::{auth::Token, hub::outbox::Outbox};

/// When a socket that has joined nothing becomes suspect. A page with a working client joins within
/// milliseconds after it opened its socket.
pub(super) const FIRST_ROUND: Duration = Duration::from_millis(2500);
/// When the second and the third round follow, counted from the socket's opening.
const NEXT_ROUNDS: [Duration; 2] = [Duration::from_secs(17), Duration::from_secs(32)];
/// The time between two later rounds.
const ROUND: Duration = Duration::from_secs(60);
/// The least time between two rounds. Clients that join by themselves do so up to 10 s after the
/// socket opened, and each `phx_error` makes them start that wait again.
const SPACING: Duration = Duration::from_secs(14);

/// A suspect's place in an order by time: the time, and the suspect's number.
pub(super) type Place = (Instant, u64);

/// All suspects.
#[derive(Debug)]
pub(super) struct Suspects {
    state: Mutex<State>,
    per_address: usize,
}

#[derive(Debug, Default)]
struct State {
    /// By number, which counts up as sockets become suspect.
    all: HashMap<u64, Entry>,
    /// By the time of their next round.
    rounds: BTreeSet<Place>,
    /// By the time from which on news may be told.
    ready: BTreeSet<Place>,
    of_record: HashMap<Uuid, BTreeSet<u64>>,
    of_address: HashMap<Uuid, BTreeSet<u64>>,
    last_number: u64,
}

#[derive(Debug)]
struct Entry {
    suspect: Arc<Suspect>,
    times: Times,
}

/// What is planned for a suspect.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Its next round.
    round: Instant,
    /// From then on it may be told news: neither too soon after the socket opened, nor after its
    /// last round.
    ready: Instant,
}

/// One socket that may be deaf.
#[derive(Debug)]
pub(super) struct Suspect {
    number: u64,
    pub(super) outbox: Arc<Outbox>,
    /// The token of the upgrade.
    pub(super) token: Arc<Token>,
    pub(super) client: ClientKey,
    opened: Instant,
    progress: Mutex<Progress>,
}

/// What a suspect has joined and was told.
#[derive(Debug)]
struct Progress {
    /// As the client spells them, without `realtime:`.
    joined: HashSet<Arc<str>>,
    /// How often each topic was sent a `phx_error`.
    told: HashMap<Arc<str>, u32>,
    rounds: usize,
    times: Times,
}

impl Suspects {
    /// Creates an empty set.
    pub(super) fn new(per_address: usize) -> Self {
        Self { state: Mutex::default(), per_address }
    }

    /// Adds a socket that was opened then and has joined these topics.
    pub(super) fn add(
        &self,
        outbox: &Arc<Outbox>,
        token: &Arc<Token>,
        client: ClientKey,
        opened: Instant,
        joined: HashSet<Arc<str>>,
    ) -> Arc<Suspect> {
        let ready = opened + FIRST_ROUND;
        let times = Times { round: ready.max(Instant::now()), ready };
        let progress = Progress { joined, told: HashMap::new(), rounds: 0, times };
        let mut state = self.state.lock();
        state.last_number += 1;
        let number = state.last_number;
        let suspect = Arc::new(Suspect {
            number,
            outbox: Arc::clone(outbox),
            token: Arc::clone(token),
            client,
            opened,
            progress: Mutex::new(progress),
        });
        state.rounds.insert((times.round, number));
        state.ready.insert((times.ready, number));
        state.all.insert(number, Entry { suspect: Arc::clone(&suspect), times });
        state.of_record.entry(client.record()).or_default().insert(number);
        let of_address = state.of_address.entry(client.address()).or_default();
        of_address.insert(number);
        if of_address.len() > self.per_address
            && let Some(first) = of_address.first().copied()
        {
            state.remove(first);
        }
        suspect
    }

    /// Removes a suspect, if it is not left alone already.
    pub(super) fn remove(&self, suspect: &Suspect) {
        self.state.lock().remove(suspect.number);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state.lock().all.is_empty()
    }

    /// When the next round is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.state.lock().rounds.first().map(|(at, _)| *at)
    }

    /// Returns a suspect whose round is due, and plans its next one for later.
    pub(super) fn take_due(&self, now: Instant) -> Option<Arc<Suspect>> {
        let mut state = self.state.lock();
        let (_, number) = state.rounds.first().copied().filter(|(at, _)| *at <= now)?;
        let entry = state.all.get(&number)?;
        let (suspect, times) = (Arc::clone(&entry.suspect), entry.times);
        let later = Times { round: now + ROUND, ..times };
        state.plan(number, later);
        Some(suspect)
    }

    /// Plans a suspect as its own times say.
    pub(super) fn plan(&self, suspect: &Suspect) {
        let times = suspect.progress.lock().times;
        self.state.lock().plan(suspect.number, times);
    }

    /// Returns the suspects with this record.
    pub(super) fn of_record(&self, record: Uuid) -> Vec<Arc<Suspect>> {
        let state = self.state.lock();
        let numbers = state.of_record.get(&record).into_iter().flatten();
        numbers.filter_map(|number| Some(Arc::clone(&state.all.get(number)?.suspect))).collect()
    }

    /// Returns the first `max` suspects that may be told news, and the place behind them, from
    /// which the next call goes on.
    pub(super) fn ready(&self, from: Place, max: usize) -> (Vec<Arc<Suspect>>, Place) {
        let now = Instant::now();
        let state = self.state.lock();
        let behind = (Bound::Excluded(from), Bound::Unbounded);
        let ready = state.ready.range(behind).take_while(|(at, _)| *at <= now).take(max);
        let ready: Vec<_> = ready.copied().collect();
        let last = ready.last().copied().unwrap_or(from);
        let suspects = ready.iter().filter_map(|(_, number)| state.all.get(number));
        (suspects.map(|entry| Arc::clone(&entry.suspect)).collect(), last)
    }
}

impl State {
    fn plan(&mut self, number: u64, times: Times) {
        let Some(entry) = self.all.get_mut(&number) else { return };
        let before = mem::replace(&mut entry.times, times);
        self.rounds.remove(&(before.round, number));
        self.ready.remove(&(before.ready, number));
        self.rounds.insert((times.round, number));
        self.ready.insert((times.ready, number));
    }

    fn remove(&mut self, number: u64) {
        let Some(Entry { suspect, times }) = self.all.remove(&number) else { return };
        self.rounds.remove(&(times.round, number));
        self.ready.remove(&(times.ready, number));
        let client = suspect.client;
        for (index, key) in
            [(&mut self.of_record, client.record()), (&mut self.of_address, client.address())]
        {
            if let Some(numbers) = index.get_mut(&key) {
                numbers.remove(&number);
                if numbers.is_empty() {
                    index.remove(&key);
                }
            }
        }
    }
}

impl Suspect {
    /// Records that the socket has joined the topic, or asks to. Returns whether it was told to.
    pub(super) fn joined(&self, sub_topic: &str) -> bool {
        let mut progress = self.progress.lock();
        progress.joined.insert(sub_topic.into());
        progress.told.remove(sub_topic).is_some()
    }

    /// Records that the socket has left the topic.
    pub(super) fn left(&self, sub_topic: &str) {
        self.progress.lock().joined.remove(sub_topic);
    }

    /// Whether it may be told news.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        self.progress.lock().times.ready <= now
    }

    /// Whether its round is due, which news may have put off; if so, one more has begun.
    pub(super) fn begin_round(&self, now: Instant) -> bool {
        let mut progress = self.progress.lock();
        if progress.times.round > now {
            return false;
        }
        let next = NEXT_ROUNDS.get(progress.rounds).map(|after| self.opened + *after);
        progress.rounds += 1;
        progress.times.round = next.unwrap_or(now + ROUND).max(now + SPACING);
        true
    }

    /// Returns how often it was told of each of these topics, without those that it has joined.
    pub(super) fn not_joined<T>(
        &self,
        topics: impl Iterator<Item = (Arc<str>, T)>,
    ) -> Vec<(u32, Arc<str>, T)> {
        let progress = self.progress.lock();
        topics
            .filter(|(topic, _)| !progress.joined.contains(topic))
            .map(|(topic, with)| (progress.told.get(&topic).copied().unwrap_or(0), topic, with))
            .collect()
    }

    /// Records that the socket is told of these topics, less those that it has joined meanwhile,
    /// and returns them.
    pub(super) fn tell(&self, mut topics: Vec<Arc<str>>, now: Instant) -> Vec<Arc<str>> {
        let mut progress = self.progress.lock();
        topics.retain(|topic| !progress.joined.contains(topic));
        if !topics.is_empty() {
            progress.times.ready = now + SPACING;
            progress.times.round = progress.times.round.max(now + SPACING);
        }
        for topic in &topics {
            *progress.told.entry(Arc::clone(topic)).or_default() += 1;
        }
        topics
    }
}
