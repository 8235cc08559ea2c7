//! What everybody but the viewers has noticed: attempts, how long they took, and why they failed.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::ledger::Viewer;

/// What was noticed.
#[derive(Default)]
pub(crate) struct Testimony {
    /// Messages of the project's own server, to all and to admins.
    pub(crate) facts: Outcomes,
    pub(crate) admin_messages: Outcomes,
    /// From the connection to the answer of the join.
    pub(crate) newcomers: Outcomes,
    /// Messages in an ordinary room, from the sending to the acknowledgement.
    pub(crate) neighbours: Outcomes,
    /// Old clients, from the new socket until they are asked to join again.
    pub(crate) returned: Outcomes,
    /// Requests to take a token back.
    pub(crate) revocations: Outcomes,
    /// How many persons were watched to the end after that.
    pub(crate) watched: AtomicU64,
    /// The latest publication after the request that such a person read, in milliseconds since the
    /// request.
    pub(crate) read_after: AtomicU64,
    /// Viewers of events that nobody had open before.
    pub(crate) late: Mutex<Vec<Arc<Viewer>>>,
}

/// How some attempts went.
#[derive(Default)]
pub(crate) struct Outcomes(Mutex<Attempts>);

/// What is known of them.
#[derive(Default, Clone)]
pub(crate) struct Attempts {
    ok: u64,
    slowest: Duration,
    /// By their reasons.
    pub(crate) failures: BTreeMap<String, u64>,
}

impl Outcomes {
    /// Records an attempt that began then.
    pub(crate) fn record(&self, begun: Instant, result: Result<(), String>) {
        let mut attempts = self.0.lock();
        match result {
            Ok(()) => {
                attempts.ok += 1;
                attempts.slowest = attempts.slowest.max(begun.elapsed());
            }
            Err(reason) => *attempts.failures.entry(reason).or_default() += 1,
        }
    }

    /// Returns what is known up to now.
    pub(crate) fn attempts(&self) -> Attempts {
        self.0.lock().clone()
    }
}

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ok", self.ok)?;
        if self.ok > 0 {
            write!(f, ", slowest {:.0} ms", self.slowest.as_secs_f64() * 1000.0)?;
        }
        let mut failures = self.failures.iter();
        failures.try_for_each(|(reason, count)| write!(f, "; {count} × {reason}"))
    }
}
