//! The table of what was measured, and the promises that were broken.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    attack::{Deeds, KINDS, TOLD},
    ledger::{Event, Ledger, Phase, Viewer, milliseconds},
    stage::{EVENTS, LATE},
    testimony::{Attempts, Testimony},
};
use crate::support::row;

/// Most resident memory, in MiB. What waits for clients that do not read has a bound of its own.
const HIGHEST_MIB: f64 = 1024.0;
/// A revocation that takes so long is none, on any machine.
const REVOCATION_MAX: Duration = Duration::from_secs(10);

/// The gateway's memory, in MiB.
pub(crate) struct Memories {
    pub(crate) peace: f64,
    pub(crate) highest: f64,
    pub(crate) after: f64,
    /// What it had to come down to, and how long that took.
    pub(crate) promised: f64,
    pub(crate) recovered: Option<Duration>,
}

/// Everything that was measured.
pub(crate) struct Report {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) viewers: Vec<Arc<Viewer>>,
    pub(crate) memories: Memories,
    pub(crate) newcomers_in_peace: Attempts,
    pub(crate) testimony: Arc<Testimony>,
    pub(crate) deeds: Deeds,
}

impl Report {
    /// Prints the table, and returns the promises that were broken.
    pub(crate) fn print(&self, kinds: &[u8]) -> Vec<String> {
        let mut broken = Vec::new();
        self.deliveries(&mut broken);
        self.memory(&mut broken);
        self.others(&mut broken);
        self.attackers(kinds, &mut broken);
        broken
    }

    fn deliveries(&self, broken: &mut Vec<String>) {
        let names = ["in peace", "under siege", "after it"];
        for (what, histograms) in [
            ("facts by REST", &self.ledger.facts),
            ("bids, within the window of 3 s", &self.ledger.invalidations),
        ] {
            for (phase, name) in [Phase::Peace, Phase::Siege, Phase::After].into_iter().zip(names) {
                let histogram = histograms[phase as usize].lock();
                let measured = format!(
                    "{} deliveries, p50 {:.1} ms, p99 {:.1} ms, max {:.0} ms",
                    histogram.len(),
                    milliseconds(&histogram, 0.5),
                    milliseconds(&histogram, 0.99),
                    milliseconds(&histogram, 1.0),
                );
                row(&[&format!("{what}, {name}"), &measured, ""]);
            }
        }
        let (mut changes, mut facts, mut losers) = (0, 0, 0);
        for viewer in &self.viewers {
            let (lost, unheard) = self.ledger.lost(viewer);
            changes += lost;
            facts += unheard;
            losers += usize::from(lost + unheard > 0);
        }
        let changed: usize = self.ledger.events.iter().map(Event::changed).sum();
        let measured = format!(
            "{changes} of the {changed} changes and {facts} facts, by {losers} of {} viewers",
            self.viewers.len()
        );
        row(&["lost", &measured, "0"]);
        if losers > 0 {
            broken.push(format!("lost: {measured}"));
        }
        let absent = self.viewers.iter().filter(|viewer| !viewer.has_joined()).count();
        let mut ends = BTreeMap::<String, usize>::new();
        for reason in self.viewers.iter().filter_map(|viewer| viewer.end()) {
            *ends.entry(reason).or_default() += 1;
        }
        let ends: Vec<_> = ends.iter().map(|(why, count)| format!("{count} × {why}")).collect();
        let measured = format!("{absent} never joined; closed: {}", none_or(&ends.join("; ")));
        row(&["viewers that were closed", &measured, "none"]);
        if absent > 0 || !ends.is_empty() {
            broken.push(format!("viewers: {measured}"));
        }
        let late = EVENTS.len()..EVENTS.len() + LATE.len();
        let late = self.viewers.iter().filter(|viewer| late.contains(&viewer.event)).count();
        let measured = format!("{late}, counted above");
        row(&["viewers of events that nobody had open", &measured, ""]);
    }

    fn memory(&self, broken: &mut Vec<String>) {
        let Memories { peace, highest, after, promised, recovered } = self.memories;
        let measured = format!("{peace:.0} MiB in peace, {highest:.0} MiB at most");
        row(&["resident memory", &measured, &format!("≤ {HIGHEST_MIB} MiB")]);
        if highest > HIGHEST_MIB {
            broken.push(format!("memory: {highest:.0} MiB"));
        }
        let measured = match recovered {
            Some(time) => format!("{:.1} s", time.as_secs_f64()),
            None => format!("{after:.0} MiB 30 s after the siege"),
        };
        row(&["until it was back", &measured, &format!("≤ {promised:.0} MiB within 30 s")]);
        if recovered.is_none() {
            broken.push(format!("memory is not given back: {measured}"));
        }
    }

    fn others(&self, broken: &mut Vec<String>) {
        let mut attempts = |what: &str, attempts: &Attempts, promise: &str| {
            row(&[what, &attempts.to_string(), promise]);
            if !attempts.failures.is_empty() {
                broken.push(format!("{what}: {attempts}"));
            }
        };
        let told = &self.testimony;
        attempts("facts of service_role", &told.facts.attempts(), "none refused");
        attempts("its messages to admins", &told.admin_messages.attempts(), "none refused");
        attempts("newcomers in peace, connection to join", &self.newcomers_in_peace, "");
        attempts("newcomers in all", &told.newcomers.attempts(), "≤ 1,500 ms");
        attempts("a neighbour in an ordinary room", &told.neighbours.attempts(), "");
        attempts("old clients asked to join again", &told.returned.attempts(), "");
        attempts("requests to revoke", &told.revocations.attempts(), "");
        let watched = told.watched.load(Ordering::Relaxed);
        let longest = told.read_after.load(Ordering::Relaxed);
        let measured = format!("{longest} ms at most, of {watched}");
        row(&["published after a revocation and read all the same", &measured, "≤ 1,000 ms"]);
        if watched == 0 || u128::from(longest) > REVOCATION_MAX.as_millis() {
            broken.push(format!("revocations: {measured}"));
        }
    }

    fn attackers(&self, kinds: &[u8], broken: &mut Vec<String>) {
        let mut told = 0;
        for (kind, what) in KINDS.iter().filter(|(kind, _)| kinds.contains(kind)) {
            let deeds = self.deeds.get(kind);
            let counts = deeds.into_iter().flatten().map(|(name, count)| format!("{count} {name}"));
            let counts = counts.collect::<Vec<_>>().join(", ");
            row(&[&format!("attackers {kind}: {what}"), none_or(&counts), ""]);
            told += deeds.and_then(|deeds| deeds.get(TOLD)).copied().unwrap_or(0);
            if deeds.is_none() {
                broken.push(format!("attackers of kind {kind} have done nothing"));
            }
        }
        row(&["told of an event that is not public", &told.to_string(), "0"]);
        if told > 0 {
            broken.push(format!("told of an event that is not public: {told} times"));
        }
    }
}

fn none_or(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}
