//! What one client can do to the others: `make siege`.
//!
//! A gateway of default settings has a thousand viewers of four events, a `service_role` publisher,
//! a database in which things change, newcomers, neighbours and old clients. After a time of peace
//! attackers of eleven kinds come side by side, with the anon key that every browser has.
//! What the others notice is printed. What does not depend on the machine must hold, or the run
//! fails: nobody misses a change, no viewer is closed, nobody is told of an event that is not
//! public, no message of the project's own server is refused, and memory comes back.
//!
//! `--only 3,4` lets only these kinds attack; `--short` is small, so that it does not rot.

#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure ends")]

mod support;
mod siege {
    pub(super) mod attack;
    pub(super) mod client;
    pub(super) mod http;
    pub(super) mod ledger;
    pub(super) mod memory;
    pub(super) mod network;
    pub(super) mod operator;
    pub(super) mod report;
    pub(super) mod sources;
    pub(super) mod stage;
    pub(super) mod testimony;
    pub(super) mod viewers;
    pub(super) mod witnesses;
}

use std::{
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::{
    siege::{
        attack::{self, Attackers, KINDS},
        ledger::{Ledger, Phase, Viewer},
        memory::Memory,
        operator::{self, WATCH, pass},
        report::{Memories, Report},
        sources,
        stage::{EVENTS, LATE, MEMBERS, Stage, VIEWERS},
        testimony::Testimony,
        viewers::{self, Seat},
        witnesses,
    },
    support::{row, token},
};

/// How much of everything.
struct Scale {
    viewers: usize,
    peace: Duration,
    siege: Duration,
    /// Memory that nobody asks back, in MiB: a small process keeps what it has used once.
    kept_mib: f64,
}

/// Slow members of the ordinary room.
const ROOM_MEMBERS: usize = 20;
/// How long the gateway may take to give memory back.
const RECOVERY: Duration = Duration::from_secs(30);
/// How much of the memory of peace it may then have.
const RECOVERED: f64 = 1.3;
/// How long what was changed last may take: a window and more.
const LAST_WORD: Duration = Duration::from_secs(30);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

#[tokio::main]
async fn main() -> ExitCode {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--attack") {
        attack::run(&arguments[at + 1..]).await;
        return ExitCode::SUCCESS;
    }
    let is_short = arguments.iter().any(|argument| argument == "--short");
    let only = arguments.iter().position(|argument| argument == "--only");
    let kinds: Vec<u8> = match only.and_then(|at| arguments.get(at + 1)) {
        Some(kinds) => kinds.split(',').filter_map(|kind| kind.parse().ok()).collect(),
        None => KINDS.iter().map(|(kind, _)| *kind).collect(),
    };
    let seconds = Duration::from_secs;
    let scale = if is_short {
        Scale { viewers: 100, peace: seconds(5), siege: seconds(10), kept_mib: 64.0 }
    } else {
        Scale { viewers: 1000, peace: seconds(20), siege: seconds(60), kept_mib: 0.0 }
    };
    let report = run(&scale, &kinds).await;
    row(&["what", "measured", "promise"]);
    row(&["---"; 3]);
    let broken = report.print(&kinds);
    for promise in &broken {
        println!("BROKEN: {promise}");
    }
    if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn run(scale: &Scale, kinds: &[u8]) -> Report {
    let stage = Stage::set().await;
    let [public, admin] = stage.gateway.addresses;
    let mut calm = Calm::begin(&stage, scale).await;
    pass(scale.peace).await;
    let memory = Memory::watch(stage.gateway.pid());
    let peace = memory.mib();
    let newcomers_in_peace = calm.testimony.newcomers.attempts();

    calm.ledger.enter(Phase::Siege);
    let testimony = || Arc::clone(&calm.testimony);
    let over = CancellationToken::new();
    let (mut returning, mut revoking) = (JoinSet::new(), JoinSet::new());
    returning.spawn(witnesses::returning(public, testimony(), over.clone()));
    let (seat, stop) = (calm.seat.clone(), calm.stop.clone());
    calm.viewing.spawn(witnesses::open_late(seat, testimony(), over.clone(), stop));
    let is_stubborn = kinds.contains(&1);
    revoking.spawn(operator::revoke(public, admin, calm.begun, is_stubborn, testimony()));
    let attackers = Attackers::start(&stage.gateway, &stage.stranger, kinds);
    pass(scale.siege).await;
    // One person at least is watched to the end.
    let begun = Instant::now();
    while calm.testimony.watched.load(Ordering::Relaxed) == 0 && begun.elapsed() < WATCH * 2 {
        pass(LOOK).await;
    }
    revoking.shutdown().await;
    let deeds = attackers.end();

    over.cancel();
    calm.ledger.enter(Phase::After);
    let promised = (peace * RECOVERED).max(scale.kept_mib);
    let recovered = memory.falls_to(promised, RECOVERY).await;
    let (highest, after) = (memory.highest_mib(), memory.mib());
    let memories = Memories { peace, highest, after, promised, recovered };
    while returning.join_next().await.is_some() {}
    let (ledger, testimony, viewers) = calm.end().await;
    Report { ledger, viewers, memories, newcomers_in_peace, testimony, deeds }
}

/// Everybody but the attackers.
struct Calm {
    begun: Instant,
    ledger: Arc<Ledger>,
    testimony: Arc<Testimony>,
    viewers: Vec<Arc<Viewer>>,
    seat: Seat,
    viewing: JoinSet<()>,
    /// Ends the viewers.
    stop: CancellationToken,
    sources: JoinSet<()>,
    /// Ends the sources, after what they are saying.
    finish: CancellationToken,
    _others: JoinSet<()>,
}

impl Calm {
    async fn begin(stage: &Stage, scale: &Scale) -> Self {
        let [at, _] = stage.gateway.addresses;
        let (begun, stop, finish) =
            (Instant::now(), CancellationToken::new(), CancellationToken::new());
        let (ledger, testimony) = (Arc::new(Ledger::new()), Arc::<Testimony>::default());
        let (mut viewing, key) = (JoinSet::new(), Arc::<str>::from(token("anon")));
        let seat = Seat { at, from: VIEWERS, key, ledger: Arc::clone(&ledger), is_member: false };
        let hidden = EVENTS.len() + LATE.len();
        let events = (0..scale.viewers).map(|viewer| viewer % EVENTS.len()).chain([hidden]);
        let mut viewers = viewers::open(&seat, events, &mut viewing, &stop).await;
        let members = Seat { from: MEMBERS, is_member: true, ..seat.clone() };
        let events = (0..ROOM_MEMBERS).map(|member| member % EVENTS.len());
        viewers.extend(viewers::open(&members, events, &mut viewing, &stop).await);

        let (mut sources, mut others) = (JoinSet::new(), JoinSet::new());
        let both = || (Arc::clone(&ledger), Arc::clone(&testimony));
        sources.spawn(sources::bid(stage.database.clone(), both(), finish.clone()));
        sources.spawn(sources::publish(at, both(), finish.clone()));
        others.spawn(operator::publish(at, begun, Arc::clone(&testimony)));
        others.spawn(witnesses::newcomers(at, Arc::clone(&testimony)));
        others.spawn(witnesses::neighbour(at, Arc::clone(&testimony)));
        let _others = others;
        Self { begun, ledger, testimony, viewers, seat, viewing, stop, sources, finish, _others }
    }

    /// Ends when everybody has been told of everything, or is not any more.
    async fn end(mut self) -> (Arc<Ledger>, Arc<Testimony>, Vec<Arc<Viewer>>) {
        self.finish.cancel();
        while self.sources.join_next().await.is_some() {}
        self.viewers.extend(self.testimony.late.lock().iter().cloned());
        let (begun, ledger) = (Instant::now(), &self.ledger);
        let waits = |viewer: &Arc<Viewer>| ledger.lost(viewer) != (0, 0) && viewer.end().is_none();
        while self.viewers.iter().any(waits) && begun.elapsed() < LAST_WORD {
            pass(LOOK).await;
        }
        self.stop.cancel();
        while self.viewing.join_next().await.is_some() {}
        (self.ledger, self.testimony, self.viewers)
    }
}
