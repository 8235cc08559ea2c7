//! The counts of one run, which all its sockets share.
//!
//! Invariants: counting allocates nothing, and no lock is contended, since one thread counts; only
//! failures allocate, and they are rare. The number of distinct failures is bounded, since servers
//! word their reasons freely.

use std::{
    collections::BTreeMap,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use super::latency::Latencies;
use crate::wire_client::{failure::Failure, message::Stamps};

/// Most distinct failures; further ones are counted as `other`.
const FAILURE_KINDS_MAX: usize = 64;
/// Longest wait for the next arrival.
const QUIET: Duration = Duration::from_secs(2);

/// The counts of one run.
#[derive(Debug)]
pub(super) struct Tally {
    begun: Instant,
    pub(super) stamps: Stamps,
    pub(super) handshake: Latencies,
    pub(super) join_reply: Latencies,
    /// Times from the stamp in a message to its receipt, by each receiver.
    pub(super) delivery: Latencies,
    /// Lateness of ticks, which is the tool's own fault.
    pub(super) lateness: Latencies,
    /// Joined channels of viewers, by topic.
    receivers: Vec<AtomicU64>,
    delivered: AtomicU64,
    /// Messages that arrived merged into another.
    merged: AtomicU64,
    acknowledged: AtomicU64,
    /// Deliveries, messages merged into them, and acknowledgements.
    arrivals: AtomicU64,
    /// The number of arrivals to wait for; `u64::MAX` until it is known.
    arrivals_expected: AtomicU64,
    arrived: Notify,
    /// Nanoseconds from the beginning of the run to the last delivery.
    last_delivery: AtomicU64,
    /// The frame of the first delivery, as it came over the wire.
    sample: OnceLock<Vec<u8>>,
    failures: Mutex<BTreeMap<String, u64>>,
}

impl Tally {
    /// Creates an empty tally of `topics` topics; the run begins now.
    pub(super) fn new(topics: usize) -> Self {
        Self {
            begun: Instant::now(),
            stamps: Stamps::random(),
            handshake: Latencies::default(),
            join_reply: Latencies::default(),
            delivery: Latencies::default(),
            lateness: Latencies::default(),
            receivers: (0..topics).map(|_| AtomicU64::new(0)).collect(),
            delivered: 0.into(),
            merged: 0.into(),
            acknowledged: 0.into(),
            arrivals: 0.into(),
            arrivals_expected: u64::MAX.into(),
            arrived: Notify::new(),
            last_delivery: 0.into(),
            sample: OnceLock::new(),
            failures: Mutex::default(),
        }
    }

    /// Returns the time since the run began.
    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Counts a viewer's channel on the topic with this index as joined.
    pub(super) fn joined(&self, topic: usize) {
        if let Some(receivers) = self.receivers.get(topic) {
            receivers.fetch_add(1, Relaxed);
        }
    }

    /// Counts a message that was `sent` and is received `now`, and that stands for `merged_count`
    /// messages. `frame` returns the message's bytes; it is called for the first delivery alone.
    pub(super) fn delivered(
        &self,
        sent: Duration,
        now: Duration,
        merged_count: u64,
        frame: impl FnOnce() -> Vec<u8>,
    ) {
        self.delivery.record(now.saturating_sub(sent));
        self.delivered.fetch_add(1, Relaxed);
        self.merged.fetch_add(merged_count - 1, Relaxed);
        self.last_delivery.store(nanoseconds(now), Relaxed);
        if self.sample.get().is_none() {
            self.sample.get_or_init(frame);
        }
        self.arrive(merged_count);
    }

    /// Counts a publisher's message as acknowledged.
    pub(super) fn acknowledged(&self) {
        self.acknowledged.fetch_add(1, Relaxed);
        self.arrive(1);
    }

    /// Counts a failure by its text.
    pub(super) fn fail(&self, failure: &Failure) {
        let mut failures = self.failures.lock();
        let mut kind = failure.to_string();
        if failures.len() >= FAILURE_KINDS_MAX && !failures.contains_key(&kind) {
            "other".clone_into(&mut kind);
        }
        *failures.entry(kind).or_default() += 1;
    }

    /// Waits until there are `expected` arrivals in all, or none has come for [`QUIET`].
    pub(super) async fn wait_for(&self, expected: u64) {
        self.arrivals_expected.store(expected, SeqCst);
        loop {
            let seen = self.arrivals.load(SeqCst);
            if seen >= expected {
                return;
            }
            if timeout(QUIET, self.arrived.notified()).await.is_err()
                && self.arrivals.load(SeqCst) == seen
            {
                return;
            }
        }
    }

    /// Returns the joined channels of viewers, by topic.
    pub(super) fn receivers(&self) -> Vec<u64> {
        self.receivers.iter().map(|receivers| receivers.load(Relaxed)).collect()
    }

    pub(super) fn delivered_count(&self) -> u64 {
        self.delivered.load(Relaxed)
    }

    pub(super) fn merged_count(&self) -> u64 {
        self.merged.load(Relaxed)
    }

    pub(super) fn acknowledged_count(&self) -> u64 {
        self.acknowledged.load(Relaxed)
    }

    /// Returns the time from the beginning of the run to the last delivery.
    pub(super) fn last_delivery(&self) -> Duration {
        Duration::from_nanos(self.last_delivery.load(Relaxed))
    }

    pub(super) fn sample(&self) -> Option<&[u8]> {
        self.sample.get().map(Vec::as_slice)
    }

    pub(super) fn failures(&self) -> BTreeMap<String, u64> {
        self.failures.lock().clone()
    }

    fn arrive(&self, count: u64) {
        let arrivals = self.arrivals.fetch_add(count, SeqCst) + count;
        if arrivals >= self.arrivals_expected.load(SeqCst) {
            self.arrived.notify_one();
        }
    }
}

/// Returns a duration in nanoseconds; one of more than 500 years is cut.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliver(tally: &Tally, merged_count: u64) {
        tally.delivered(Duration::ZERO, Duration::from_millis(1), merged_count, Vec::new);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_last_arrival() {
        let tally = Tally::new(1);
        deliver(&tally, 1);
        tally.acknowledged();
        deliver(&tally, 3);
        let before = Instant::now();
        tally.wait_for(5).await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        assert_eq!((tally.delivered_count(), tally.merged_count()), (2, 2));
        assert_eq!(tally.acknowledged_count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_when_nothing_comes_any_more() {
        let tally = Tally::new(1);
        let before = Instant::now();
        let deliver_late = async {
            tokio::time::sleep(QUIET / 2).await;
            deliver(&tally, 1);
        };
        tokio::join!(tally.wait_for(2), deliver_late);
        assert_eq!(before.elapsed(), QUIET * 2, "one quiet time after the one with a delivery");
    }

    #[test]
    fn kinds_of_failure_are_bounded() {
        let tally = Tally::new(1);
        for number in 0..100 {
            tally.fail(&Failure::JoinRefused(format!("expired {number} seconds ago")));
        }
        let failures = tally.failures();
        assert_eq!(failures.len(), FAILURE_KINDS_MAX + 1);
        assert_eq!(failures["other"], 36);
    }

    #[test]
    fn channels_are_counted_by_topic() {
        let tally = Tally::new(2);
        tally.joined(1);
        tally.joined(1);
        assert_eq!(tally.receivers(), [0, 2]);
    }
}
