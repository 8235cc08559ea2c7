//! The open sockets of this process: their permits, their review and their end.
//!
//! Invariants: at most `max` sockets are open; none is admitted once the drain has begun, so that a
//! drain that looks afterwards finds each one; nothing on the hot path looks here.

use std::{
    cmp::Reverse,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use slab::Slab;
use tokio_util::sync::CancellationToken;

use super::{held::OutboxBounds, metrics::OutboxMetrics, outbox::Outbox};
use crate::{protocol::serializer::Serializer, telemetry::metrics::Registry};

/// A client with no larger backlog keeps up, and is left alone however much others hold.
const BACKLOG_SPARED: usize = 16 * 1024;
/// Outboxes between two yields of the reliever.
const OUTBOXES_PER_YIELD: usize = 256;

/// All open sockets.
#[derive(Debug)]
pub struct Sockets {
    open: Mutex<Slab<Arc<Outbox>>>,
    max: usize,
    bounds: Arc<OutboxBounds>,
    /// Cancelled when the drain begins.
    draining: CancellationToken,
    next_number: AtomicU64,
    metrics: OutboxMetrics,
}

/// Why a socket is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPermit {
    /// All places are taken.
    Full,
    /// The server drains.
    Draining,
}

/// One open socket; dropping the permit frees its slot.
#[derive(Debug)]
pub(crate) struct Permit {
    sockets: Arc<Sockets>,
    slot: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.sockets.open.lock().remove(self.slot);
    }
}

impl Sockets {
    /// Creates room for `max` sockets.
    pub(crate) fn new(
        max: usize,
        bounds: Arc<OutboxBounds>,
        draining: CancellationToken,
        registry: &Registry,
    ) -> Self {
        Self {
            open: Mutex::default(),
            max,
            metrics: OutboxMetrics::new(registry, max, &bounds),
            bounds,
            draining,
            next_number: AtomicU64::new(1),
        }
    }

    /// Creates the outbox of a client that reads `serializer`.
    pub(crate) fn outbox(&self, serializer: Serializer) -> Arc<Outbox> {
        Arc::new(Outbox::new(serializer, &self.bounds))
    }

    /// Admits a socket.
    ///
    /// # Errors
    /// [`NoPermit`] if all places are taken or the server drains. Both are decided under the lock
    /// under which a drain looks for sockets.
    pub(crate) fn admit(self: &Arc<Self>, outbox: &Arc<Outbox>) -> Result<Permit, NoPermit> {
        let mut open = self.open.lock();
        if self.draining.is_cancelled() {
            return Err(NoPermit::Draining);
        }
        if open.len() >= self.max {
            return Err(NoPermit::Full);
        }
        let slot = open.insert(Arc::clone(outbox));
        Ok(Permit { sockets: Arc::clone(self), slot })
    }

    /// Returns a number for the next connection, by which logs name it.
    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// The outboxes of all open sockets.
    pub(crate) fn outboxes(&self) -> Vec<Arc<Outbox>> {
        self.open.lock().iter().map(|(_, outbox)| Arc::clone(outbox)).collect()
    }

    /// Has every socket decide again about its channels' tokens and topics, because keys, rules or
    /// revocations have changed.
    pub(crate) fn review(&self) {
        for outbox in self.outboxes() {
            outbox.nudge();
        }
    }

    /// The largest backlog since the turn before the last, in bytes.
    #[must_use]
    pub fn highest_backlog(&self) -> usize {
        self.bounds.highest()
    }

    /// Begins to forget the largest backlog.
    pub(crate) fn turn(&self) {
        self.bounds.turn();
    }

    /// Gives memory back, those with the largest backlogs first, until all outboxes hold no more
    /// than they may: first what can be dropped without closing a socket, then by closing sockets.
    /// Who keeps up loses nothing.
    async fn relieve(&self) {
        let (ended, open): (Vec<_>, Vec<_>) =
            self.outboxes().into_iter().partition(|outbox| outbox.ended().is_some());
        // What is being written is dropped by its connection, a moment after its end.
        let mut ending: usize = ended.iter().map(|outbox| outbox.leaving()).sum();
        let backlogs = open.into_iter().map(|outbox| (outbox.backlog(), outbox));
        let mut backlogs: Vec<_> =
            backlogs.filter(|(backlog, _)| *backlog > BACKLOG_SPARED).collect();
        backlogs.sort_unstable_by_key(|(backlog, _)| Reverse(*backlog));
        for (number, (_, outbox)) in backlogs.iter().enumerate() {
            if self.bounds.excess() <= ending {
                return;
            }
            outbox.relieve();
            if number % OUTBOXES_PER_YIELD == OUTBOXES_PER_YIELD - 1 {
                tokio::task::yield_now().await;
            }
        }
        for (_, outbox) in backlogs {
            if self.bounds.excess() <= ending {
                return;
            }
            ending += outbox.leaving();
            outbox.overflow();
        }
    }

    /// Shows the largest backlog.
    pub(crate) fn show(&self) {
        self.metrics.show(&self.bounds);
    }
}

/// The task that keeps all outboxes together within their bound.
#[derive(Debug)]
pub(crate) struct Reliever(pub(crate) Arc<Sockets>);

impl Reliever {
    /// Relieves outboxes until the server stops.
    pub(crate) async fn run(self, stop: CancellationToken) {
        while stop.run_until_cancelled(self.0.bounds.over()).await.is_some() {
            self.0.relieve().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, iter};

    use futures_util::FutureExt;
    use tokio_tungstenite::tungstenite::Message as Frame;

    use super::*;
    use crate::hub::outbox::{Drained, Ended, Kind, Notice, TopicId};

    fn sockets(all_bytes_max: usize) -> Arc<Sockets> {
        let bounds = OutboxBounds::new(1 << 20, all_bytes_max);
        let stop = CancellationToken::new();
        Arc::new(Sockets::new(10, bounds, stop, &Registry::new()))
    }

    /// The outbox of an open socket for which so many bytes of this kind wait.
    fn waiting(sockets: &Arc<Sockets>, bytes: usize, kind: Kind) -> (Arc<Outbox>, Permit) {
        let outbox = sockets.outbox(Serializer::V2);
        let permit = sockets.admit(&outbox).ok().unwrap();
        let frame = sockets.bounds.hold(Frame::binary(vec![b'x'; bytes]));
        outbox.push_all(iter::once(frame), None, kind).unwrap();
        (outbox, permit)
    }

    fn topic(hash: u64) -> TopicId {
        TopicId::of_hash(hash)
    }

    #[tokio::test]
    async fn the_largest_backlogs_go_first_and_no_more_than_must() {
        let sockets = sockets(100_000);
        let ruled = Kind::Ruled(topic(1));
        let kept: Vec<_> =
            [3_000, 40_000].map(|bytes| waiting(&sockets, bytes, ruled)).into_iter().collect();
        assert!(sockets.bounds.over().now_or_never().is_none());
        let (largest, _permit) = waiting(&sockets, 90_000, ruled);
        assert!(sockets.bounds.over().now_or_never().is_some());
        sockets.relieve().await;
        assert_eq!(largest.ended(), Some(Ended::SlowConsumer));
        assert!(kept.iter().all(|(outbox, _)| outbox.ended().is_none()));
        assert_eq!(sockets.bounds.held(), 43_000);
    }

    #[tokio::test]
    async fn ordinary_channels_go_before_a_socket_does() {
        let sockets = sockets(100_000);
        let (ruled, _permit) = waiting(&sockets, 60_000, Kind::Ruled(topic(1)));
        let (ordinary, _permit) = waiting(&sockets, 50_000, Kind::Ordinary(topic(2)));
        sockets.relieve().await;
        assert_eq!([ruled.ended(), ordinary.ended()], [None, None]);
        let mut batch = VecDeque::new();
        let drained = ordinary.drain(&mut batch).now_or_never();
        assert_eq!(drained, Some(Ok(Drained::Notice(Notice::Overflowed(topic(2))))));
        assert_eq!(sockets.bounds.held(), 60_000);
    }

    /// A small backlog is that of a client that reads.
    #[tokio::test]
    async fn whoever_keeps_up_loses_nothing_however_much_others_hold() {
        let sockets = sockets(20_000);
        let mut batch = VecDeque::new();
        let (stuck, _permit) = waiting(&sockets, 90_000, Kind::Own);
        stuck.drain(&mut batch).await.unwrap();
        let (healthy, _permit) = waiting(&sockets, 10_000, Kind::Ordinary(topic(2)));
        for _ in 0..2 {
            sockets.relieve().await;
        }
        assert_eq!([stuck.ended(), healthy.ended()], [Some(Ended::SlowConsumer), None]);
        assert_eq!(healthy.backlog(), 10_000);
    }

    /// A closed socket gives its bytes back a moment later.
    #[tokio::test]
    async fn what_is_being_written_is_counted_and_not_closed_for_twice() {
        let sockets = sockets(50_000);
        let (mut batch, mut other) = (VecDeque::new(), VecDeque::new());
        let (first, _permit) = waiting(&sockets, 40_000, Kind::Own);
        let (second, _permit) = waiting(&sockets, 30_000, Kind::Own);
        first.drain(&mut batch).await.unwrap();
        second.drain(&mut other).await.unwrap();
        sockets.relieve().await;
        assert_eq!([first.ended(), second.ended()], [Some(Ended::SlowConsumer), None]);
        assert_eq!(sockets.bounds.held(), 70_000);
        batch.clear();
        assert_eq!(sockets.bounds.held(), 30_000);
    }

    #[tokio::test]
    async fn a_message_that_many_wait_for_counts_once() {
        let sockets = sockets(100_000);
        let frame = sockets.bounds.hold(Frame::text("x".repeat(9_000)));
        let outboxes: Vec<_> = (0..8).map(|_| sockets.outbox(Serializer::V1)).collect();
        for outbox in &outboxes {
            outbox.push_all(iter::once(frame.clone()), None, Kind::Ordinary(topic(1))).unwrap();
        }
        drop(frame);
        assert_eq!((sockets.bounds.held(), sockets.bounds.excess()), (9_000, 0));
        drop(outboxes);
        assert_eq!(sockets.bounds.held(), 0);
    }
}
