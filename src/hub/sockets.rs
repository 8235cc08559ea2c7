//! The open sockets of this process: their permits, their review and their end.
//!
//! Invariants: at most `max` sockets are open; none is admitted once the drain has begun, so that a
//! drain that looks afterwards finds each one; nothing on the hot path looks here.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;
use slab::Slab;
use tokio_util::sync::CancellationToken;

use super::{
    metrics::OutboxMetrics,
    outbox::{Outbox, OutboxBounds},
};
use crate::{protocol::serializer::Serializer, telemetry::metrics::Registry};

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
    /// Creates room for `max` sockets, each with at most `outbox_bytes_max` waiting for it.
    pub(crate) fn new(
        max: usize,
        outbox_bytes_max: usize,
        draining: CancellationToken,
        registry: &Registry,
    ) -> Self {
        Self {
            open: Mutex::default(),
            max,
            bounds: OutboxBounds::new(outbox_bytes_max),
            draining,
            next_number: AtomicU64::new(1),
            metrics: OutboxMetrics::new(registry, max, outbox_bytes_max),
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

    /// Shows the largest backlog.
    pub(crate) fn show(&self) {
        self.metrics.show(&self.bounds);
    }
}
