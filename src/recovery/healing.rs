//! Deaf clients: old client libraries come back after a lost connection and never join again. A
//! `phx_error` on a topic that they hold makes them join; a client that does not hold it ignores
//! the `phx_error`, so a wrong guess is cheap.
//!
//! A socket is suspect if it has joined nothing soon after it opened, or if it began as an old
//! client library does. It is healed of each topic that it has not joined: first of those that its
//! own record has lost, then of those that anybody may be told of.
//!
//! Invariants: no client is sent a `phx_error` on a topic that it has joined, or that its token may
//! not read, nor on one that only others have lost or joined and that is not open to anybody; two
//! rounds to one socket are at least 14 s apart, because some clients start their wait again after
//! each; one task heals, and whoever has news of an event leaves its name and goes on; what a name
//! costs is what it concerns; no lock is held while frames are pushed, and no two at once.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    task::yield_now,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    client_key::ClientKey,
    lost_sockets::LostSockets,
    metrics::Metrics,
    recent::{Open, OpenBy, Recent},
    suspects::{Suspect, Suspects},
};
use crate::{
    access::{Access, AccessRequest, Action, Found, Rules},
    auth::{Authenticator, Token, TokenError},
    clock::unix_now,
    hub::outbox::{Kind, Outbox},
    invalidation::Feeds,
    protocol::{
        serializer::Push,
        topic::{Privacy, TOPIC_PREFIX},
    },
};

/// Most topics of a round.
const TOPICS_PER_ROUND: usize = 64;
/// Most topics that only others have joined and that a suspect may be deaf to.
const CANDIDATES_MAX: usize = 1024;
/// A client that has ignored a topic so often does not hold it.
const TOLD_MAX: u32 = 5;
/// The least time between two rounds for news of one event.
const NAMED_SPACING: Duration = Duration::from_secs(3);
/// Most events whose news wait; each is one that somebody has joined or lost. News beyond are left
/// to the suspects' own rounds.
const NAMED_MAX: usize = 10_000;
/// Suspects that are told something between two yields, each up to 0.1 ms of work.
const TOLD_PER_YIELD: usize = 4;
/// Suspects that are looked at between two yields, each up to 1 µs of work.
const LOOKS_PER_YIELD: usize = 256;
/// How long the task sleeps while no socket is suspect.
const IDLE: Duration = Duration::from_secs(3600);

/// The sockets that may be deaf, and what they are told.
#[derive(Debug)]
pub(crate) struct Healing {
    suspects: Suspects,
    /// The events of which there is news.
    named: Mutex<HashSet<Arc<str>>>,
    /// There is a new suspect, or news.
    changed: Notify,
    /// Before any suspect was.
    started: Instant,
    recent: Arc<Recent>,
    lost_sockets: Arc<LostSockets>,
    auth: Arc<Authenticator>,
    access: Arc<Access>,
    feeds: Arc<Feeds>,
    metrics: Metrics,
}

/// What healing asks and uses.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) suspects: Suspects,
    pub(super) recent: Arc<Recent>,
    pub(super) lost_sockets: Arc<LostSockets>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) access: Arc<Access>,
    pub(super) feeds: Arc<Feeds>,
    pub(super) metrics: Metrics,
}

/// Why a suspect may be told of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Its own record has lost it.
    Lost,
    Open(OpenBy),
}

/// A socket's place among the suspects; dropping it takes the socket from them.
#[derive(Debug)]
pub(super) struct Suspicion {
    healing: Arc<Healing>,
    suspect: Arc<Suspect>,
}

impl Healing {
    /// Creates an empty set of suspects.
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { suspects, recent, lost_sockets, auth, access, feeds, metrics } = parts;
        let (named, changed, started) = (Mutex::default(), Notify::new(), Instant::now());
        Self {
            suspects,
            named,
            changed,
            started,
            recent,
            lost_sockets,
            auth,
            access,
            feeds,
            metrics,
        }
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
        let suspect = self.suspects.add(outbox, token, client, opened, joined);
        self.changed.notify_one();
        self.metrics.deaf_suspects.inc();
        Suspicion { healing: Arc::clone(self), suspect }
    }

    /// Leaves the name of an event of which there is news, so that the sockets that may be deaf to
    /// it are healed at once. It costs nothing if nobody can be.
    pub(crate) fn name_event(&self, eid: &str) {
        if self.suspects.is_empty()
            || !(self.recent.is_open(eid) || self.lost_sockets.has_event(eid))
        {
            return;
        }
        let mut named = self.named.lock();
        if named.len() < NAMED_MAX && !named.contains(eid) {
            named.insert(eid.into());
            self.changed.notify_one();
        }
    }

    /// As [`Self::name_event`], of an event of which the database has notified.
    pub(crate) fn news_of(&self, eid: &str) {
        self.recent.published(eid);
        self.name_event(eid);
    }

    /// Heals one suspect whose round is due. Returns whether it was told anything.
    fn round(&self, suspect: &Suspect, open: &[Open]) -> bool {
        let now = Instant::now();
        let has_told = suspect.begin_round(now) && {
            let lost = self.lost_sockets.topics(suspect.client.record(), None);
            let mut candidates = suspect.not_joined(candidates(&lost, open));
            candidates.retain(|(told, ..)| *told < TOLD_MAX);
            // Topics that did not fit into an earlier round come first; otherwise the order stays.
            candidates.sort_by_key(|(told, ..)| *told);
            self.tell(suspect, candidates, now)
        };
        self.suspects.plan(suspect);
        has_told
    }

    /// Heals one suspect of an event of which there is news: of what its own record has lost, if
    /// `has_lost`, and of what anybody may be told of. Returns whether it was told anything.
    fn round_of(&self, eid: &str, suspect: &Suspect, open: &[Open], has_lost: bool) -> bool {
        let now = Instant::now();
        if !suspect.is_ready(now) {
            return false;
        }
        let record = suspect.client.record();
        let lost = if has_lost { self.lost_sockets.topics(record, Some(eid)) } else { Vec::new() };
        let has_told = self.tell(suspect, suspect.not_joined(candidates(&lost, open)), now);
        if has_told {
            self.suspects.plan(suspect);
        }
        has_told
    }

    /// Tells a suspect of the first of these topics that it may read.
    fn tell(&self, suspect: &Suspect, of: Vec<(u32, Arc<str>, Why)>, now: Instant) -> bool {
        if of.is_empty() {
            return false;
        }
        let rules = self.access.rules();
        // The token of the upgrade may have ended, or been revoked, since.
        let token = self.auth.recheck(&suspect.token, unix_now(), self.auth.leeway());
        let may_be_told = of
            .into_iter()
            .filter(|(_, topic, why)| self.may_be_told(&rules, token.as_ref(), topic, *why));
        let topics = may_be_told.take(TOPICS_PER_ROUND).map(|(_, topic, _)| topic).collect();
        let topics = suspect.tell(topics, now);
        if topics.is_empty() {
            return false;
        }
        self.push(&suspect.outbox, &topics, &rules);
        true
    }

    fn may_be_told(
        &self,
        rules: &Rules,
        token: Result<&Arc<Token>, &TokenError>,
        sub_topic: &str,
        why: Why,
    ) -> bool {
        let decision = rules.decide(&AccessRequest {
            action: Action::Read,
            sub_topic,
            privacy: Privacy::Public,
            token: token.map(|token| &token.claims),
            fallback: Some(&self.auth.anonymous().claims),
        });
        decision.is_allowed()
            && decision.rule.is_some_and(|(rule, _)| {
                // The rules may have been exchanged since the topic was joined.
                rule.listen.is_some() && (why != Why::Open(OpenBy::Rule) || rule.listed)
            })
    }

    fn push(&self, outbox: &Outbox, topics: &[Arc<str>], rules: &Rules) {
        self.metrics.heals_sent.inc_by(topics.len() as u64);
        for topic in topics {
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

/// Returns the topics that a suspect's own record has lost, then those that anybody may be told of.
fn candidates(lost: &[Arc<str>], open: &[Open]) -> impl Iterator<Item = (Arc<str>, Why)> {
    let own = lost.iter().map(|topic| (Arc::clone(topic), Why::Lost));
    let others = open.iter().filter(|open| !lost.contains(&open.topic));
    own.chain(others.map(|open| (Arc::clone(&open.topic), Why::Open(open.by))))
}

impl Suspicion {
    /// Records that the socket has joined the topic, or asks to.
    pub(super) fn joined(&self, sub_topic: &str) {
        if self.suspect.joined(sub_topic) {
            self.healing.metrics.healed.inc();
        }
    }

    /// Records that the socket has left the topic.
    pub(super) fn left(&self, sub_topic: &str) {
        self.suspect.left(sub_topic);
    }
}

impl Drop for Suspicion {
    fn drop(&mut self) {
        self.healing.metrics.deaf_suspects.dec();
        self.healing.suspects.remove(&self.suspect);
    }
}

/// The task that heals.
#[derive(Debug)]
pub(crate) struct Healer {
    healing: Arc<Healing>,
    /// When suspects were last told of an event by its name, for [`NAMED_SPACING`].
    named: HashMap<Arc<str>, Instant>,
    pace: Pace,
}

/// What was done since the last yield.
#[derive(Debug, Default)]
struct Pace {
    looks: usize,
    told: usize,
}

impl Pace {
    /// Yields after enough work.
    async fn step(&mut self, has_told: bool) {
        self.looks += 1;
        self.told += usize::from(has_told);
        if self.told >= TOLD_PER_YIELD || self.looks >= LOOKS_PER_YIELD {
            *self = Self::default();
            yield_now().await;
        }
    }
}

impl Healer {
    /// Heals the suspects of `healing`.
    pub(super) fn new(healing: Arc<Healing>) -> Self {
        Self { healing, named: HashMap::new(), pace: Pace::default() }
    }

    /// Heals until the server stops.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let next = self.healing.suspects.next().unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.healing.changed.notified() => {}
                () = stop.cancelled() => return,
            }
            self.heal_due().await;
            self.heal_named().await;
        }
    }

    /// Heals the suspects whose round is due.
    async fn heal_due(&mut self) {
        let healing = Arc::clone(&self.healing);
        let now = Instant::now();
        let mut open = None;
        while let Some(suspect) = healing.suspects.take_due(now) {
            let open = open.get_or_insert_with(|| healing.recent.open(CANDIDATES_MAX));
            let has_told = healing.round(&suspect, open);
            self.pace.step(has_told).await;
        }
    }

    /// Heals the suspects that may be deaf to an event of which there is news.
    async fn heal_named(&mut self) {
        let healing = Arc::clone(&self.healing);
        let names = mem::take(&mut *healing.named.lock());
        let now = Instant::now();
        self.named.retain(|_, at| now.duration_since(*at) < NAMED_SPACING);
        for eid in names {
            if self.named.contains_key(&eid) {
                continue;
            }
            self.named.insert(Arc::clone(&eid), now);
            let open = healing.recent.open_of(&eid);
            for record in healing.lost_sockets.of_event(&eid) {
                self.heal_record(&eid, record, &open).await;
            }
            if !open.is_empty() {
                self.heal_all(&eid, &open).await;
            }
        }
    }

    /// Heals those that may have lost the event themselves.
    async fn heal_record(&mut self, eid: &str, record: Uuid, open: &[Open]) {
        for suspect in self.healing.suspects.of_record(record) {
            let has_told = self.healing.round_of(eid, &suspect, open, true);
            self.pace.step(has_told).await;
        }
        self.pace.step(false).await;
    }

    /// Heals all who may be told of the event.
    async fn heal_all(&mut self, eid: &str, open: &[Open]) {
        let mut place = (self.healing.started, 0);
        loop {
            let (suspects, behind) = self.healing.suspects.ready(place, LOOKS_PER_YIELD);
            if suspects.is_empty() {
                return;
            }
            place = behind;
            for suspect in suspects {
                let has_told = self.healing.round_of(eid, &suspect, open, false);
                self.pace.step(has_told).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
