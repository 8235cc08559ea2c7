//! Deaf clients: old client libraries come back after a lost connection and never join again. A
//! `phx_error` on a topic that they hold makes them join; a client that does not hold it ignores
//! the `phx_error`, so a wrong guess is cheap.
//!
//! A socket is suspect if it has joined nothing soon after it opened, or if it began as an old
//! client library does. It is healed of each topic that it has not joined: first of those that its
//! address has lost, then of those that anybody has joined recently.
//!
//! Invariants: no client is sent a `phx_error` on a topic that it has joined, or that its token may
//! not read; two rounds to one socket are at least [`SPACING`] apart, because some clients start
//! their wait again after each; no lock is held while frames are pushed. The lock of the lost
//! sockets may be taken under that of the suspects, never the other way round.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use slab::Slab;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    lost_sockets::{ClientKey, LostSockets, REMEMBERED},
    metrics::Metrics,
};
use crate::{
    access::{Access, AccessRequest, Action, EID, Found, Rules},
    auth::Token,
    hub::outbox::{Kind, Outbox},
    invalidation::Feeds,
    protocol::{
        serializer::Push,
        topic::{Privacy, TOPIC_PREFIX},
    },
};

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
/// Most topics of a round.
const TOPICS_PER_ROUND: usize = 64;
/// Most of the recently joined topics that a suspect may be deaf to.
const CANDIDATES_MAX: usize = 1024;
/// A client that has ignored a topic so often does not hold it.
const TOLD_MAX: u32 = 5;
/// The least time between two rounds for news of one event.
const NAMED_SPACING: Duration = Duration::from_secs(3);
/// Suspects between two yields, each up to 0.1 ms of work.
const SUSPECTS_PER_YIELD: usize = 4;
/// Most recently joined topics that are remembered.
const RECENT_MAX: usize = 10_000;
/// How long the task sleeps while no socket is suspect.
const IDLE: Duration = Duration::from_secs(3600);

/// The sockets that may be deaf, and the topics that were joined recently.
#[derive(Debug)]
pub(crate) struct Healing {
    state: Mutex<State>,
    changed: Notify,
    lost_sockets: Arc<LostSockets>,
    access: Arc<Access>,
    feeds: Arc<Feeds>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    suspects: Slab<Suspect>,
    /// When each topic was last joined.
    recent: HashMap<Arc<str>, RecentTopic>,
    /// When suspects were last told of an event by its name.
    named: HashMap<Arc<str>, Instant>,
}

#[derive(Debug)]
struct RecentTopic {
    joined: Instant,
    /// The database has not been told yet.
    is_new: bool,
}

#[derive(Debug)]
struct Suspect {
    outbox: Arc<Outbox>,
    /// The token of the upgrade.
    token: Arc<Token>,
    client: ClientKey,
    opened: Instant,
    /// As the client spells them, without `realtime:`.
    joined: HashSet<Arc<str>>,
    /// How often each topic was sent a `phx_error`.
    told: HashMap<Arc<str>, u32>,
    rounds: usize,
    next: Instant,
    last: Option<Instant>,
}

/// One socket's round.
#[derive(Debug)]
struct Heal {
    outbox: Arc<Outbox>,
    topics: Vec<Arc<str>>,
}

/// A socket's place among the suspects; dropping it takes the socket from them.
#[derive(Debug)]
pub(super) struct Suspicion {
    healing: Arc<Healing>,
    slot: usize,
}

impl Healing {
    /// Creates an empty set of suspects.
    pub(super) fn new(
        lost_sockets: Arc<LostSockets>,
        access: Arc<Access>,
        feeds: Arc<Feeds>,
        metrics: Metrics,
    ) -> Self {
        let (state, changed) = (Mutex::default(), Notify::new());
        Self { state, changed, lost_sockets, access, feeds, metrics }
    }

    /// Begins to heal a socket that has joined these topics.
    pub(super) fn suspect(
        self: &Arc<Self>,
        outbox: &Arc<Outbox>,
        token: &Arc<Token>,
        client: ClientKey,
        opened: Instant,
        joined: HashSet<Arc<str>>,
    ) -> Suspicion {
        let next = (opened + FIRST_ROUND).max(Instant::now());
        let slot = self.state.lock().suspects.insert(Suspect {
            outbox: Arc::clone(outbox),
            token: Arc::clone(token),
            client,
            opened,
            joined,
            told: HashMap::new(),
            rounds: 0,
            next,
            last: None,
        });
        self.changed.notify_one();
        self.metrics.deaf_suspects.inc();
        Suspicion { healing: Arc::clone(self), slot }
    }

    /// Records that a client has joined the topic.
    pub(crate) fn note_joined(&self, sub_topic: &str) {
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(recent) = state.recent.get_mut(sub_topic) {
            // The database is told once a minute, which is enough.
            recent.is_new |= now.duration_since(recent.joined) > ROUND;
            recent.joined = now;
        } else if state.recent.len() < RECENT_MAX {
            state.recent.insert(sub_topic.into(), RecentTopic { joined: now, is_new: true });
        }
    }

    /// Records a topic that was joined so long ago, at another gateway or before a restart.
    pub(crate) fn note_recent(&self, sub_topic: &str, age: Duration) {
        let Some(joined) = Instant::now().checked_sub(age) else { return };
        let mut state = self.state.lock();
        if state.recent.len() < RECENT_MAX {
            state.recent.entry(sub_topic.into()).or_insert(RecentTopic { joined, is_new: false });
        }
    }

    /// Returns the topics that were joined since the last call.
    pub(crate) fn take_new(&self) -> Vec<Arc<str>> {
        let mut state = self.state.lock();
        let new = state.recent.iter_mut().filter(|(_, recent)| recent.is_new);
        new.map(|(topic, recent)| {
            recent.is_new = false;
            Arc::clone(topic)
        })
        .collect()
    }

    /// Forgets topics that were not joined for a day.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.recent.retain(|_, recent| now.duration_since(recent.joined) < REMEMBERED);
        state.named.retain(|_, at| now.duration_since(*at) < ROUND);
    }

    /// Heals at once the sockets that may be deaf to an event of which there is news.
    pub(crate) fn name_event(&self, eid: &str) {
        for heal in self.round_of(eid) {
            self.send(heal);
        }
    }

    fn next(&self) -> Option<Instant> {
        self.state.lock().suspects.iter().map(|(_, suspect)| suspect.next).min()
    }

    /// Returns the suspects whose time has come, and the topics that were joined recently, the
    /// latest first.
    fn due(&self) -> (Vec<usize>, Vec<Arc<str>>) {
        let now = Instant::now();
        let state = self.state.lock();
        let due = state.suspects.iter().filter(|(_, suspect)| suspect.next <= now);
        let due: Vec<_> = due.map(|(slot, _)| slot).collect();
        if due.is_empty() {
            return (due, Vec::new());
        }
        let mut latest: Vec<_> =
            state.recent.iter().map(|(topic, recent)| (recent.joined, topic)).collect();
        latest.sort_unstable_by(|a, b| b.cmp(a));
        (due, latest.into_iter().take(CANDIDATES_MAX).map(|(_, topic)| Arc::clone(topic)).collect())
    }

    /// Returns the round of one suspect, and sets when the next one follows.
    fn round(&self, slot: usize, latest: &[Arc<str>]) -> Option<Heal> {
        let (now, rules) = (Instant::now(), self.access.rules());
        let mut state = self.state.lock();
        let suspect = state.suspects.get_mut(slot).filter(|suspect| suspect.next <= now)?;
        let lost = self.lost_sockets.topics(suspect.client);
        let mut candidates: Vec<_> = lost
            .iter()
            .chain(latest.iter().filter(|topic| !lost.contains(topic)))
            .map(|topic| (suspect.told.get(topic).copied().unwrap_or(0), topic))
            .filter(|(told, _)| *told < TOLD_MAX)
            .collect();
        // Topics that did not fit into an earlier round come first; otherwise the order stays.
        candidates.sort_by_key(|(told, _)| *told);
        let topics: Vec<_> = candidates
            .into_iter()
            .filter(|(_, topic)| suspect.may_be_deaf_to(&rules, topic))
            .take(TOPICS_PER_ROUND)
            .map(|(_, topic)| Arc::clone(topic))
            .collect();
        let next = NEXT_ROUNDS.get(suspect.rounds).map(|after| suspect.opened + *after);
        suspect.rounds += 1;
        suspect.next = next.unwrap_or(now + ROUND).max(now + SPACING);
        suspect.tell(topics, now)
    }

    /// Returns the rounds of all suspects that may be deaf to an event.
    fn round_of(&self, eid: &str) -> Vec<Heal> {
        let (now, rules) = (Instant::now(), self.access.rules());
        let mut state = self.state.lock();
        let State { suspects, recent, named } = &mut *state;
        if suspects.is_empty()
            || named.get(eid).is_some_and(|at| now.duration_since(*at) < NAMED_SPACING)
        {
            return Vec::new();
        }
        if named.len() < RECENT_MAX {
            named.insert(eid.into(), now);
        }
        let is_named = |topic: &&Arc<str>| match rules.find(topic) {
            Found::Rule(_, captures) => captures.get(EID).is_some_and(|named| **named == *eid),
            Found::Other | Found::Lookalike => false,
        };
        let joined: Vec<_> = recent.keys().filter(is_named).cloned().collect();
        let mut round = Vec::new();
        for (_, suspect) in suspects {
            let is_early = now < suspect.opened + FIRST_ROUND
                || suspect.last.is_some_and(|last| now.duration_since(last) < SPACING);
            if is_early {
                continue;
            }
            let lost = self.lost_sockets.topics(suspect.client);
            let lost = lost.iter().filter(is_named).filter(|topic| !joined.contains(topic));
            let topics: Vec<_> = lost
                .chain(&joined)
                .filter(|topic| suspect.may_be_deaf_to(&rules, topic))
                .take(TOPICS_PER_ROUND)
                .cloned()
                .collect();
            if let Some(heal) = suspect.tell(topics, now) {
                suspect.next = suspect.next.max(now + SPACING);
                round.push(heal);
            }
        }
        round
    }

    fn send(&self, Heal { outbox, topics }: Heal) {
        self.metrics.heals_sent.inc_by(topics.len() as u64);
        let rules = self.access.rules();
        for topic in &topics {
            if let Found::Rule(rule, captures) = rules.find(topic)
                && let Some(feed) = self.feeds.of(&rule, &captures)
            {
                feed.healed();
            }
        }
        let frames = topics.iter().map(|sub_topic| {
            let topic = format!("{TOPIC_PREFIX}{sub_topic}");
            outbox.serializer().encode(&Push {
                join_ref: None,
                reference: None,
                topic: &topic,
                event: "phx_error",
                payload: "{}",
            })
        });
        // A full outbox closes its own connection.
        let _ = outbox.push_all(frames, None, Kind::Own);
    }
}

impl Suspect {
    fn may_be_deaf_to(&self, rules: &Rules, sub_topic: &str) -> bool {
        if self.joined.contains(sub_topic) {
            return false;
        }
        let decision = rules.decide(&AccessRequest {
            action: Action::Read,
            sub_topic,
            privacy: Privacy::Public,
            token: Ok(&self.token.claims),
            fallback: None,
        });
        decision.is_allowed() && decision.rule.is_some_and(|(rule, _)| rule.listen.is_some())
    }

    fn tell(&mut self, topics: Vec<Arc<str>>, now: Instant) -> Option<Heal> {
        if topics.is_empty() {
            return None;
        }
        self.last = Some(now);
        for topic in &topics {
            *self.told.entry(Arc::clone(topic)).or_default() += 1;
        }
        Some(Heal { outbox: Arc::clone(&self.outbox), topics })
    }
}

impl Suspicion {
    /// Records that the socket has joined the topic, or asks to.
    pub(super) fn joined(&self, sub_topic: &str) {
        let mut state = self.healing.state.lock();
        if let Some(suspect) = state.suspects.get_mut(self.slot) {
            suspect.joined.insert(sub_topic.into());
            if suspect.told.remove(sub_topic).is_some() {
                self.healing.metrics.healed.inc();
            }
        }
    }

    /// Records that the socket has left the topic.
    pub(super) fn left(&self, sub_topic: &str) {
        let mut state = self.healing.state.lock();
        if let Some(suspect) = state.suspects.get_mut(self.slot) {
            suspect.joined.remove(sub_topic);
        }
    }
}

impl Drop for Suspicion {
    fn drop(&mut self) {
        self.healing.metrics.deaf_suspects.dec();
        self.healing.state.lock().suspects.remove(self.slot);
    }
}

/// The task that heals in rounds.
#[derive(Debug)]
pub(crate) struct Healer(Arc<Healing>);

impl Healer {
    /// Heals the suspects of `healing`.
    pub(super) fn new(healing: Arc<Healing>) -> Self {
        Self(healing)
    }

    /// Heals in rounds until the server stops.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let healing = &self.0;
        loop {
            let next = healing.next().unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                () = sleep_until(next) => {}
                () = healing.changed.notified() => {}
                () = stop.cancelled() => return,
            }
            let (due, latest) = healing.due();
            for (number, slot) in due.into_iter().enumerate() {
                if let Some(heal) = healing.round(slot, &latest) {
                    healing.send(heal);
                }
                if number % SUSPECTS_PER_YIELD == SUSPECTS_PER_YIELD - 1 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}
