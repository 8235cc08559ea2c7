//! Deaf clients: old client libraries come back after a lost connection and never join again. A
//! `phx_error` on a topic that they hold makes them; who does not hold it ignores it.
//!
//! Suspect is a socket that has joined nothing soon after it opened, or that began like an old one;
//! it is healed of each topic that it has not joined: first those that its address has lost, then
//! those that anybody has joined of late.
//!
//! Invariants: nobody is sent a `phx_error` on a topic that it has joined, or that its token may
//! not read; never two rounds to one socket within [`SPACING`], because some clients wait anew
//! after each; no lock is held while frames are pushed.

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

use super::lost_sockets::{ClientKey, REMEMBERED};
use crate::{
    access::{
        decision::{Action, Asked},
        rule::{EID, Found},
    },
    auth::jwt::Token,
    hub::outbox::Outbox,
    protocol::{
        serializer::Push,
        topic::{Privacy, TOPIC_PREFIX},
    },
    server::Services,
};

/// A page that lives joins within milliseconds after it opened its socket.
pub(crate) const FIRST_ROUND: Duration = Duration::from_millis(2500);
/// The rounds after the first, since the socket opened, and then the time between two.
const NEXT_ROUNDS: [Duration; 2] = [Duration::from_secs(17), Duration::from_secs(32)];
const ROUND: Duration = Duration::from_secs(60);
/// Clients that join by themselves do so up to 10 s after the socket opened, and each `phx_error`
/// makes them wait anew.
const SPACING: Duration = Duration::from_secs(14);
/// Most topics of a round.
const TOPICS_PER_ROUND: usize = 64;
/// Most of the topics that were joined of late that a suspect may be deaf to.
const CANDIDATES_MAX: usize = 1024;
/// Who has ignored a topic so often does not hold it.
const TOLD_MAX: u32 = 5;
/// The least time between two rounds for news of one event.
const NAMED_SPACING: Duration = Duration::from_secs(3);
/// Suspects between two yields, each up to 0.1 ms of work.
const SUSPECTS_PER_YIELD: usize = 4;
/// Most topics that are remembered for all.
const RECENT_MAX: usize = 10_000;
/// While nobody is suspect.
const IDLE: Duration = Duration::from_secs(3600);

/// Who may be deaf, and what anybody has joined of late.
#[derive(Debug, Default)]
pub(crate) struct Healing {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    suspects: Slab<Suspect>,
    /// When each topic was last joined.
    recent: HashMap<Arc<str>, Recent>,
    /// When suspects were last told of an event that was named.
    named: HashMap<Arc<str>, Instant>,
}

#[derive(Debug)]
struct Recent {
    joined: Instant,
    /// Not yet known to the database.
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

/// A socket's place among the suspects; dropping it takes it away.
#[derive(Debug)]
pub(crate) struct Suspicion {
    services: Arc<Services>,
    slot: usize,
}

impl Healing {
    /// Begins to heal a socket that has joined these topics.
    pub(crate) fn suspect(
        services: &Arc<Services>,
        outbox: &Arc<Outbox>,
        token: &Arc<Token>,
        client: ClientKey,
        opened: Instant,
        joined: HashSet<Arc<str>>,
    ) -> Suspicion {
        let healing = &services.healing;
        let next = (opened + FIRST_ROUND).max(Instant::now());
        let slot = healing.state.lock().suspects.insert(Suspect {
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
        healing.changed.notify_one();
        services.metrics.deaf_suspects.inc();
        Suspicion { services: Arc::clone(services), slot }
    }

    /// Notes that somebody has joined the topic.
    pub(crate) fn note_joined(&self, sub_topic: &str) {
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(recent) = state.recent.get_mut(sub_topic) {
            // Once a minute is enough to be told to the database.
            recent.is_new |= now.duration_since(recent.joined) > ROUND;
            recent.joined = now;
        } else if state.recent.len() < RECENT_MAX {
            state.recent.insert(sub_topic.into(), Recent { joined: now, is_new: true });
        }
    }

    /// Notes a topic that was joined elsewhere or earlier, so long ago.
    pub(crate) fn note_recent(&self, sub_topic: &str, age: Duration) {
        let Some(joined) = Instant::now().checked_sub(age) else { return };
        let mut state = self.state.lock();
        if state.recent.len() < RECENT_MAX {
            state.recent.entry(sub_topic.into()).or_insert(Recent { joined, is_new: false });
        }
    }

    /// The topics that were joined since this was last asked.
    pub(crate) fn take_new(&self) -> Vec<Arc<str>> {
        let mut state = self.state.lock();
        let new = state.recent.iter_mut().filter(|(_, recent)| recent.is_new);
        new.map(|(topic, recent)| {
            recent.is_new = false;
            Arc::clone(topic)
        })
        .collect()
    }

    /// Forgets what nobody has joined for a day.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.recent.retain(|_, recent| now.duration_since(recent.joined) < REMEMBERED);
        state.named.retain(|_, at| now.duration_since(*at) < ROUND);
    }

    fn next(&self) -> Option<Instant> {
        self.state.lock().suspects.iter().map(|(_, suspect)| suspect.next).min()
    }

    /// The suspects whose time has come, and what was joined of late, the latest first.
    fn due(&self) -> (Vec<usize>, Vec<Arc<str>>) {
        let now = Instant::now();
        let state = self.state.lock();
        let due: Vec<_> =
            state.suspects.iter().filter(|(_, it)| it.next <= now).map(|(slot, _)| slot).collect();
        if due.is_empty() {
            return (due, Vec::new());
        }
        let mut latest: Vec<_> =
            state.recent.iter().map(|(topic, it)| (it.joined, topic)).collect();
        latest.sort_unstable_by(|a, b| b.cmp(a));
        (due, latest.into_iter().take(CANDIDATES_MAX).map(|(_, topic)| Arc::clone(topic)).collect())
    }

    /// What one suspect is to be sent now.
    fn round(&self, services: &Services, slot: usize, latest: &[Arc<str>]) -> Option<Heal> {
        let now = Instant::now();
        let mut state = self.state.lock();
        let suspect = state.suspects.get_mut(slot).filter(|suspect| suspect.next <= now)?;
        let lost = services.lost_sockets.topics(suspect.client);
        let mut candidates: Vec<_> = lost
            .iter()
            .chain(latest.iter().filter(|topic| !lost.contains(topic)))
            .map(|topic| (suspect.told.get(topic).copied().unwrap_or(0), topic))
            .filter(|(told, _)| *told < TOLD_MAX)
            .collect();
        // What did not fit into an earlier round comes first; else the order stays.
        candidates.sort_by_key(|(told, _)| *told);
        let topics: Vec<_> = candidates
            .into_iter()
            .filter(|(_, topic)| suspect.may_be_deaf_to(services, topic))
            .take(TOPICS_PER_ROUND)
            .map(|(_, topic)| Arc::clone(topic))
            .collect();
        let next = NEXT_ROUNDS.get(suspect.rounds).map(|after| suspect.opened + *after);
        suspect.rounds += 1;
        suspect.next = next.unwrap_or(now + ROUND).max(now + SPACING);
        suspect.tell(topics, now)
    }

    /// What is to be sent now that an event was named.
    fn round_of(&self, services: &Services, eid: &str) -> Vec<Heal> {
        let now = Instant::now();
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
        let rules = services.rules();
        let is_named = |topic: &&Arc<str>| match rules.find(topic) {
            Found::Rule(_, captures) => captures.get(EID).is_some_and(|it| **it == *eid),
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
            let lost = services.lost_sockets.topics(suspect.client);
            let lost = lost.iter().filter(is_named).filter(|it| !joined.contains(it));
            let topics: Vec<_> = lost
                .chain(&joined)
                .filter(|topic| suspect.may_be_deaf_to(services, topic))
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
}

impl Suspect {
    fn may_be_deaf_to(&self, services: &Services, sub_topic: &str) -> bool {
        if self.joined.contains(sub_topic) {
            return false;
        }
        let decision = services.rules().decide(&Asked {
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
    /// Notes that the socket has joined the topic, or asks to.
    pub(crate) fn joined(&self, sub_topic: &str) {
        let mut state = self.services.healing.state.lock();
        if let Some(suspect) = state.suspects.get_mut(self.slot) {
            suspect.joined.insert(sub_topic.into());
            if suspect.told.remove(sub_topic).is_some() {
                self.services.metrics.healed.inc();
            }
        }
    }

    /// Notes that the socket has left the topic.
    pub(crate) fn left(&self, sub_topic: &str) {
        let mut state = self.services.healing.state.lock();
        if let Some(suspect) = state.suspects.get_mut(self.slot) {
            suspect.joined.remove(sub_topic);
        }
    }
}

impl Drop for Suspicion {
    fn drop(&mut self) {
        self.services.metrics.deaf_suspects.dec();
        self.services.healing.state.lock().suspects.remove(self.slot);
    }
}

/// Heals in rounds until the server stops.
pub(crate) async fn run(services: Arc<Services>) {
    let healing = &services.healing;
    loop {
        let next = healing.next().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            () = sleep_until(next) => {}
            () = healing.changed.notified() => {}
            () = services.stopped.cancelled() => return,
        }
        let (due, latest) = healing.due();
        for (number, slot) in due.into_iter().enumerate() {
            if let Some(heal) = healing.round(&services, slot, &latest) {
                send(&services, heal);
            }
            if number % SUSPECTS_PER_YIELD == SUSPECTS_PER_YIELD - 1 {
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Heals at once who may be deaf to an event of which there is news.
pub(crate) fn name_event(services: &Services, eid: &str) {
    for heal in services.healing.round_of(services, eid) {
        send(services, heal);
    }
}

fn send(services: &Services, Heal { outbox, topics }: Heal) {
    if cfg!(feature = "without-catch-up") {
        return;
    }
    services.metrics.heals_sent.inc_by(topics.len() as u64);
    for topic in &topics {
        if let Found::Rule(rule, captures) = services.rules().find(topic)
            && let Some(event) = services.feeds.of(&rule, &captures)
        {
            event.healed();
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
    let _ = outbox.push_all(frames, None, None);
}
