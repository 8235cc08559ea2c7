//! What was changed and published, and when; and what each viewer has been told of it.
//!
//! Invariants: a change is entered before its statement begins, so that nobody can be told of it
//! before; a list that names an endpoint before it has changed tells nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::Mutex;

use super::stage::{ARTWORKS, events};

/// Most facts of one event; beyond that none is published.
const FACTS: usize = 4096;

/// The latest arrival that is told apart, in microseconds.
const LATEST: u64 = 300_000_000;

/// The parts of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Peace,
    Siege,
    After,
}

/// Everything that was changed, by event.
pub(crate) struct Ledger {
    begun: Instant,
    phase: AtomicUsize,
    pub(crate) events: Vec<Event>,
    /// How late facts were, by phase: they are told one by one.
    pub(crate) facts: [Mutex<Histogram<u64>>; 3],
    /// How late invalidations were, by phase: they wait for their window.
    pub(crate) invalidations: [Mutex<Histogram<u64>>; 3],
}

/// One event's changes.
pub(crate) struct Event {
    pub(crate) eid: &'static str,
    /// When the bids of each artwork changed, in microseconds; zero until then.
    artworks: Vec<AtomicU64>,
    bids: AtomicUsize,
    /// When each fact was published, in microseconds; zero until then, and if it was refused.
    facts: Vec<AtomicU64>,
    published: AtomicUsize,
}

/// What one viewer was told.
pub(crate) struct Viewer {
    pub(crate) event: usize,
    /// When it was answered `ok`, in microseconds; zero until then.
    joined: AtomicU64,
    told: Mutex<Told>,
    /// Why its socket has ended.
    ended: Mutex<Option<String>>,
    /// It has joined the topic of the facts, too.
    hears_facts: bool,
}

struct Told {
    artworks: Vec<bool>,
    facts: Vec<bool>,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        let empty = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let events = events().map(|eid| Event {
            eid,
            artworks: empty(ARTWORKS),
            bids: AtomicUsize::new(0),
            facts: empty(FACTS),
            published: AtomicUsize::new(0),
        });
        let histogram = || Histogram::new_with_bounds(1, LATEST, 3).unwrap();
        let histograms = || [(); 3].map(|()| Mutex::new(histogram()));
        Self {
            begun: Instant::now(),
            phase: AtomicUsize::new(Phase::Peace as usize),
            events: events.collect(),
            facts: histograms(),
            invalidations: histograms(),
        }
    }

    /// The time since the run began, in microseconds; never zero.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX).max(1)
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as usize, Ordering::Relaxed);
    }

    /// Records that a viewer was told of these endpoints.
    pub(crate) fn told(&self, viewer: &Viewer, artworks: impl Iterator<Item = usize>) {
        let (now, event) = (self.now(), &self.events[viewer.event]);
        let mut told = viewer.told.lock();
        for artwork in artworks {
            let changed = event.artworks.get(artwork).map_or(0, |at| at.load(Ordering::SeqCst));
            if changed > 0 && !std::mem::replace(&mut told.artworks[artwork], true) {
                self.record(&self.invalidations, now - changed);
            }
        }
    }

    /// Records that a viewer has heard a fact.
    pub(crate) fn heard(&self, viewer: &Viewer, fact: usize) {
        let (now, event) = (self.now(), &self.events[viewer.event]);
        let published = event.facts.get(fact).map_or(0, |at| at.load(Ordering::SeqCst));
        if published > 0 && !std::mem::replace(&mut viewer.told.lock().facts[fact], true) {
            self.record(&self.facts, now - published);
        }
    }

    fn record(&self, histograms: &[Mutex<Histogram<u64>>; 3], late: u64) {
        let phase = self.phase.load(Ordering::Relaxed);
        histograms[phase].lock().saturating_record(late);
    }

    /// How many changes and facts a viewer has not been told of, of those after its join.
    pub(crate) fn lost(&self, viewer: &Viewer) -> (usize, usize) {
        let event = &self.events[viewer.event];
        let (joined, told) = (viewer.joined.load(Ordering::SeqCst), viewer.told.lock());
        let missing = |all: &[AtomicU64], told: &[bool]| {
            let all = all.iter().map(|at| at.load(Ordering::SeqCst));
            all.zip(told).filter(|(at, told)| joined > 0 && *at > joined && !**told).count()
        };
        let facts = if viewer.hears_facts { missing(&event.facts, &told.facts) } else { 0 };
        (missing(&event.artworks, &told.artworks), facts)
    }
}

impl Event {
    /// Enters a change of the next artwork; none if all have changed.
    pub(crate) fn next_bid(&self, ledger: &Ledger) -> Option<usize> {
        let artwork = self.bids.fetch_add(1, Ordering::SeqCst);
        self.artworks.get(artwork)?.store(ledger.now(), Ordering::SeqCst);
        Some(artwork)
    }

    /// Enters the next fact; none if there are too many.
    pub(crate) fn next_fact(&self, ledger: &Ledger) -> Option<usize> {
        let fact = self.published.fetch_add(1, Ordering::SeqCst);
        self.facts.get(fact)?.store(ledger.now(), Ordering::SeqCst);
        Some(fact)
    }

    /// Takes back a fact that was refused.
    pub(crate) fn refused(&self, fact: usize) {
        self.facts[fact].store(0, Ordering::SeqCst);
    }

    /// How many artworks have changed.
    pub(crate) fn changed(&self) -> usize {
        self.bids.load(Ordering::SeqCst).min(ARTWORKS)
    }
}

impl Viewer {
    pub(crate) fn new(event: usize, hears_facts: bool) -> Arc<Self> {
        let told = Told { artworks: vec![false; ARTWORKS], facts: vec![false; FACTS] };
        let (joined, ended) = (AtomicU64::new(0), Mutex::default());
        Arc::new(Self { event, joined, told: Mutex::new(told), ended, hears_facts })
    }

    /// Records the answer to its join, after which it must be told of everything.
    pub(crate) fn joined(&self, ledger: &Ledger) {
        self.joined.store(ledger.now(), Ordering::SeqCst);
    }

    pub(crate) fn has_joined(&self) -> bool {
        self.joined.load(Ordering::SeqCst) > 0
    }

    /// Records that its socket has ended.
    pub(crate) fn ended(&self, reason: String) {
        self.ended.lock().get_or_insert(reason);
    }

    /// Why its socket has ended.
    pub(crate) fn end(&self) -> Option<String> {
        self.ended.lock().clone()
    }
}

/// A percentile in milliseconds.
pub(crate) fn milliseconds(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    let late = Duration::from_micros(histogram.value_at_quantile(quantile));
    late.as_secs_f64() * 1000.0
}
