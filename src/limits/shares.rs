//! The project's rates, and the share that each client has of them.
//!
//! A client takes from its own share first, and what its share lacks costs nobody else anything. A
//! share is a person's, by the `sub` of a verified token, or else an address's. What servers
//! broadcast to the topics of rules has a rate of its own, which no browser can use up.
//!
//! Invariants: all that a call takes is taken or nothing is, under one lock; at most `shares_max`
//! shares are remembered, and clients beyond have one share together, so that nobody's use is
//! forgotten for room.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    ops::AddAssign,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    address::Address,
    bucket::{Bucket, Quota, TooFast},
    metrics::{Limited, Rate},
    rate::{BURST_SECONDS, PROJECT_BURST_SECONDS},
    settings::Settings,
};
use crate::telemetry::audit::Subject;

/// The role of tokens that servers have.
const SERVER_ROLE: &str = "service_role";
/// The share of all for whom there is no room.
const SHARED: u64 = 0;
/// Between two looks for room.
const CROWDED_INTERVAL: Duration = Duration::from_secs(1);

/// Whose share a client takes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    key: u64,
    is_server: bool,
}

impl Share {
    /// Whether it is that of servers.
    pub(crate) fn is_servers(self) -> bool {
        self.is_server
    }
}

#[derive(Hash)]
enum Holder<'a> {
    Servers,
    Person(&'a str),
    Address(Address),
}

/// Broadcasts and the bytes of their payloads.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Amount {
    count: usize,
    bytes: usize,
}

impl Amount {
    /// One broadcast with a payload of so many bytes.
    pub(crate) fn one(bytes: usize) -> Self {
        Self { count: 1, bytes }
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, more: Self) {
        self.count += more.count;
        self.bytes += more.bytes;
    }
}

/// Broadcasts that came together.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Broadcasts {
    /// To topics with a rule.
    pub(crate) ruled: Amount,
    /// To other topics.
    pub(crate) ordinary: Amount,
    /// Those that may not be sent, or about which the policies have not been asked: they cost their
    /// sender and nobody else.
    pub(crate) unsent: Amount,
}

/// A rate that broadcasts exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exceeded {
    pub(crate) rate: Rate,
    pub(crate) too_fast: TooFast,
}

/// The quotas of the project, or of one client's share of them.
#[derive(Debug, Clone, Copy)]
struct Quotas {
    joins: Option<Quota>,
    broadcasts: Option<Quota>,
    bytes: Option<Quota>,
}

impl Quotas {
    /// The project's, or so many percent of them.
    fn new(limits: &Settings, percent: u32) -> Self {
        let part = |rate: u32| {
            let part = u64::from(rate) * u64::from(percent);
            u32::try_from(part.div_ceil(100)).unwrap_or(u32::MAX)
        };
        let messages = |rate| Quota::new(part(rate), PROJECT_BURST_SECONDS, 0);
        Self {
            joins: messages(limits.joins_per_second_max),
            broadcasts: messages(limits.broadcasts_per_second_max),
            bytes: Quota::new(
                part(limits.broadcast_bytes_per_second_max),
                BURST_SECONDS,
                limits.payload_bytes_max,
            ),
        }
    }
}

/// What has been taken, of the project's quotas or of one share.
#[derive(Debug, Clone, Copy, Default)]
struct Used {
    joins: Bucket,
    broadcasts: Bucket,
    bytes: Bucket,
    /// Of an address.
    requests: Bucket,
}

impl Used {
    fn is_none(&self, now: Instant) -> bool {
        let Self { joins, broadcasts, bytes, requests } = self;
        [joins, broadcasts, bytes, requests].iter().all(|bucket| bucket.is_full(now))
    }

    /// What has been used once these broadcasts have been taken, too.
    fn after(
        self,
        quotas: &Quotas,
        amount: Amount,
        (broadcasts, bytes): (Rate, Rate),
        now: Instant,
    ) -> Result<Self, Exceeded> {
        let exceeded = |rate| move |too_fast| Exceeded { rate, too_fast };
        let is_one = amount.count == 1;
        Ok(Self {
            broadcasts: self
                .broadcasts
                .after(quotas.broadcasts, amount.count, now)
                .map_err(exceeded(broadcasts))?,
            bytes: self
                .bytes
                .after(quotas.bytes, amount.bytes, now)
                .map_err(|_too_many| if is_one { TooFast::One } else { TooFast::Batch })
                .map_err(exceeded(bytes))?,
            ..self
        })
    }
}

/// The rates of one project.
#[derive(Debug)]
pub(crate) struct Shares {
    project: Quotas,
    client: Quotas,
    servers: Option<Quota>,
    requests: Option<Quota>,
    max: usize,
    hasher: RandomState,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    project: Used,
    servers: Bucket,
    clients: HashMap<u64, Used>,
    /// When room was last looked for.
    crowded_at: Option<Instant>,
}

impl State {
    /// The share of a client, or, where there is no room, that of all such clients.
    fn client(&mut self, key: u64, max: usize, now: Instant) -> &mut Used {
        let is_new = !self.clients.contains_key(&key);
        if is_new && self.clients.len() >= max {
            if self.crowded_at.is_none_or(|at| now.duration_since(at) >= CROWDED_INTERVAL) {
                self.crowded_at = Some(now);
                self.clients.retain(|_, used| !used.is_none(now));
            }
            if self.clients.len() >= max {
                return self.clients.entry(SHARED).or_default();
            }
        }
        self.clients.entry(key).or_default()
    }
}

impl Shares {
    /// Creates the rates that the settings ask for.
    pub(super) fn new(limits: &Settings) -> Self {
        Self {
            project: Quotas::new(limits, 100),
            client: Quotas::new(limits, limits.client_share_percent),
            servers: Quota::new(limits.server_broadcasts_per_second_max, PROJECT_BURST_SECONDS, 0),
            requests: Quota::new(limits.requests_per_address_max, BURST_SECONDS, 0),
            max: limits.shares_max,
            hasher: RandomState::new(),
            state: Mutex::default(),
        }
    }

    /// The share of the holder of a verified token.
    pub(super) fn of(&self, address: Address, subject: Subject<'_>) -> Share {
        let is_server = subject.role == SERVER_ROLE;
        let holder = match subject.sub {
            _ if is_server => Holder::Servers,
            Some(sub) if !sub.is_empty() => Holder::Person(sub),
            Some(_) | None => Holder::Address(address),
        };
        Share { key: self.hasher.hash_one(holder), is_server }
    }

    /// Counts a request of an address; false if they come too fast.
    pub(super) fn request(&self, address: Address) -> bool {
        if self.requests.is_none() {
            return true;
        }
        let (key, now) = (self.hasher.hash_one(Holder::Address(address)), Instant::now());
        let mut state = self.state.lock();
        let used = state.client(key, self.max, now);
        let after = used.requests.after(self.requests, 1, now);
        after.map(|requests| used.requests = requests).is_ok()
    }

    /// Counts a join.
    ///
    /// # Errors
    /// The limit that it exceeds: the client's share, or else the project's rate.
    pub(super) fn join(&self, share: Share) -> Result<(), Limited> {
        if self.project.joins.is_none() {
            return Ok(());
        }
        let now = Instant::now();
        let mut state = self.state.lock();
        let project = state.project.joins.after(self.project.joins, 1, now);
        let used = state.client(share.key, self.max, now);
        let own = used.joins.after(self.client.joins, 1, now);
        let own = own.map_err(|_too_fast| Limited::ClientJoins)?;
        let project = project.map_err(|_too_fast| Limited::Joins)?;
        used.joins = own;
        state.project.joins = project;
        Ok(())
    }

    /// Takes broadcasts that came together, all of them or none.
    ///
    /// # Errors
    /// The first rate that is [`Exceeded`].
    pub(super) fn broadcast(&self, share: Share, all: &Broadcasts) -> Result<(), Exceeded> {
        let now = Instant::now();
        let mut sent = all.ordinary;
        let mut ruled = 0;
        if share.is_server {
            ruled = all.ruled.count;
        } else {
            sent += all.ruled;
        }
        let mut own = sent;
        own += all.unsent;
        let mut state = self.state.lock();
        let State { project, servers, .. } = *state;
        let used = state.client(share.key, self.max, now);
        let own = self.of_client(share, *used, own, now)?;
        let project = self.of_project(project, sent, now)?;
        let servers = servers
            .after(self.servers, ruled, now)
            .map_err(|too_fast| Exceeded { rate: Rate::ServerBroadcasts, too_fast })?;
        *used = own;
        (state.project, state.servers) = (project, servers);
        Ok(())
    }

    /// Takes a broadcast that its sender has paid for as one that was not sent.
    ///
    /// # Errors
    /// The first rate that is [`Exceeded`].
    pub(super) fn send(&self, one: Amount) -> Result<(), Exceeded> {
        let mut state = self.state.lock();
        state.project = self.of_project(state.project, one, Instant::now())?;
        Ok(())
    }

    /// What has been used of a client's share. A server is no client among others: the project's rate
    /// alone bounds what it says beside the topics of rules.
    fn of_client(
        &self,
        share: Share,
        used: Used,
        amount: Amount,
        now: Instant,
    ) -> Result<Used, Exceeded> {
        if share.is_server {
            return Ok(used);
        }
        used.after(&self.client, amount, (Rate::ClientBroadcasts, Rate::ClientBroadcastBytes), now)
    }

    fn of_project(&self, used: Used, sent: Amount, now: Instant) -> Result<Used, Exceeded> {
        used.after(&self.project, sent, (Rate::Broadcasts, Rate::BroadcastBytes), now)
    }

    /// Takes one broadcast from what a single channel may send: as much as its client.
    ///
    /// # Errors
    /// [`TooFast`] if the channel alone exceeds its client's share.
    pub(super) fn channel(&self, sent: &mut Bucket) -> Result<(), TooFast> {
        *sent = sent.after(self.client.broadcasts, 1, Instant::now())?;
        Ok(())
    }

    /// Which rate has nothing left for the client, whatever it broadcasts.
    pub(super) fn spent(&self, share: Share) -> Option<Rate> {
        let now = Instant::now();
        let mut state = self.state.lock();
        if share.is_server && state.servers.after(self.servers, 1, now).is_ok() {
            return None;
        }
        let project = self.of_project(state.project, Amount::one(1), now);
        let used = state.client(share.key, self.max, now);
        let own = self.of_client(share, *used, Amount::one(1), now);
        own.and(project).err().map(|exceeded| exceeded.rate)
    }

    /// How many shares are remembered.
    pub(super) fn count(&self) -> usize {
        self.state.lock().clients.len()
    }

    /// Forgets the shares of which everything has come back.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.clients.retain(|_, used| !used.is_none(now));
        let count = state.clients.len();
        state.clients.shrink_to(2 * count);
    }
}
