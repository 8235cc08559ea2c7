//! The gateway's resident memory, looked at all the time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use super::witnesses::steady;
use crate::support::resident_kib;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// Looks at one process until it is dropped.
pub(crate) struct Memory {
    pid: u32,
    highest: Arc<AtomicU64>,
    _watch: JoinSet<()>,
}

impl Memory {
    pub(crate) fn watch(pid: u32) -> Self {
        let (highest, mut watch) = (Arc::new(AtomicU64::new(0)), JoinSet::new());
        let seen = Arc::clone(&highest);
        watch.spawn(async move {
            let mut looks = steady(LOOK);
            loop {
                looks.tick().await;
                seen.fetch_max(resident_kib(pid), Ordering::Relaxed);
            }
        });
        Self { pid, highest, _watch: watch }
    }

    /// Returns the memory at this moment, in MiB.
    pub(crate) fn mib(&self) -> f64 {
        resident_kib(self.pid) as f64 / 1024.0
    }

    /// Returns the most that was seen, in MiB.
    pub(crate) fn highest_mib(&self) -> f64 {
        self.highest.load(Ordering::Relaxed) as f64 / 1024.0
    }

    /// Waits until no more than this is left, and returns how long that took.
    pub(crate) async fn falls_to(&self, mib: f64, time: Duration) -> Option<Duration> {
        let (begun, mut looks) = (Instant::now(), steady(LOOK));
        while begun.elapsed() < time {
            looks.tick().await;
            if self.mib() <= mib {
                return Some(begun.elapsed());
            }
        }
        None
    }
}
