//! The attackers: a process of their own, from loopback addresses of their own, with the anon key
//! and nothing else except where a kind says so.
//!
//! Each kind counts what it has done, so that a siege without attackers is seen to be none.

mod bodies;
mod listens;
mod pipelines;
mod readers;
mod rooms;
mod strangers;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::witnesses::steady;
use crate::support::{Gateway, token};

/// What must never be counted: something of an event that is not public.
pub(crate) const TOLD: &str = "TOLD OF WHAT IS NOT PUBLIC";
/// Between two lines of the attackers' process.
const REPORT: Duration = Duration::from_millis(500);

/// All kinds, and what each of them does.
pub(crate) const KINDS: [(u8, &str); 11] = [
    (1, "an admin reads slowly, and keeps frames in flight, while the token is revoked"),
    (2, "20 sockets with 500 joins of invented events each"),
    (
        3,
        "121 lost sockets with 500 joins each, 1,500 idle ones of the same client, 1,000 NOTIFYs/s",
    ),
    (4, "REST batches of 3 MB of empty objects"),
    (5, "300 sockets that do not read, and 2.9 MB for each of them"),
    (6, "joins and tokens of 4.2 MB"),
    (7, "4,096 connections that do not read what they ask for, and 64 on the operators' port"),
    (8, "121 lost sockets with 500 joins each, of another client each time"),
    (9, "2,000 refused REST broadcasts/s, joins and broadcasts without end"),
    (10, "REST batches of 7.8 MB to the room of slow members"),
    (11, "strangers who send nothing, and joins of events that are not public"),
];

/// Where the attackers find the gateway.
#[derive(Clone)]
pub(crate) struct Field {
    pub(crate) public: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// For a database role without rights.
    pub(crate) database: String,
    pub(crate) key: Arc<str>,
}

/// What one kind has done, by name.
#[derive(Clone)]
pub(crate) struct Tally {
    kind: u8,
    all: Arc<Mutex<Deeds>>,
}

/// Counts by kind and name.
pub(crate) type Deeds = BTreeMap<u8, BTreeMap<String, u64>>;

impl Tally {
    /// Counts something done, or something that came of it.
    pub(crate) fn count(&self, what: &str) {
        self.add(what, 1);
    }

    pub(crate) fn add(&self, what: &str, count: u64) {
        let mut all = self.all.lock();
        *all.entry(self.kind).or_default().entry(what.to_owned()).or_default() += count;
    }
}

/// Runs the attackers' process: `--attack PUBLIC ADMIN DATABASE KIND,KIND…`.
pub(crate) async fn run(arguments: &[String]) {
    let [public, admin, database, kinds] = arguments else { panic!("{arguments:?}") };
    let field = Field {
        public: public.parse().unwrap(),
        admin: admin.parse().unwrap(),
        database: database.clone(),
        key: token("anon").into(),
    };
    let (all, mut tasks) = (Arc::<Mutex<Deeds>>::default(), JoinSet::new());
    for kind in kinds.split(',').filter_map(|kind| kind.parse().ok()) {
        let tally = Tally { kind, all: Arc::clone(&all) };
        begin(&field, &tally, &mut tasks);
    }
    let mut ticks = steady(REPORT);
    loop {
        ticks.tick().await;
        let line = serde_json::to_string(&*all.lock()).unwrap();
        // The siege is over when nobody reads.
        if writeln!(std::io::stdout(), "{line}").is_err() {
            return;
        }
    }
}

fn begin(field: &Field, tally: &Tally, tasks: &mut JoinSet<()>) {
    match tally.kind {
        // Beside the operator, who knows when the revocation was.
        1 => tally.count("beside the operator"),
        2 => listens::begin(field, tally, tasks),
        3 => listens::begin_healing(field, tally, tasks),
        4 => bodies::begin_batches(field, tally, tasks),
        5 => readers::begin(field, tally, tasks),
        6 => bodies::begin_joins(field, tally, tasks),
        7 => pipelines::begin(field, tally, tasks),
        8 => listens::begin_filling(field, tally, tasks),
        9 => rooms::begin_rates(field, tally, tasks),
        10 => rooms::begin_large(field, tally, tasks),
        11 => strangers::begin(field, tally, tasks),
        kind => panic!("no kind {kind}"),
    }
}

/// The attackers' process, seen from the siege.
pub(crate) struct Attackers {
    child: Child,
    reader: JoinHandle<Deeds>,
}

impl Attackers {
    /// Starts attackers of these kinds.
    pub(crate) fn start(gateway: &Gateway, stranger: &str, kinds: &[u8]) -> Self {
        let kinds: Vec<_> = kinds.iter().map(u8::to_string).collect();
        let [public, admin] = gateway.addresses.map(|address| address.to_string());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--attack", &public, &admin, stranger, &kinds.join(",")])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let lines = lines.map_while(Result::ok);
            lines.filter_map(|line| serde_json::from_str(&line).ok()).last().unwrap_or_default()
        });
        Self { child, reader }
    }

    /// Ends them all at once, and returns what they have done.
    pub(crate) fn end(mut self) -> Deeds {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reader.join().unwrap()
    }
}
