//! Clients that were away: what each of them may have missed, and which of them may be deaf.
//!
//! Invariants: a client whose absence is not known for certain is taken to have missed everything;
//! everything that is remembered is bounded, and is forgotten after a day.

mod healing;
mod history;
mod lost_sockets;
mod metrics;

use std::{sync::Arc, time::Duration};

pub use self::lost_sockets::ClientKey;
pub(crate) use self::{
    healing::Healer,
    history::{History, Hold},
    lost_sockets::{REMEMBERED, Record},
};
use self::{healing::Healing, lost_sockets::LostSockets, metrics::Metrics};
use crate::{access::Access, invalidation::Feeds, telemetry::metrics::Registry};

/// Most topics of lost sockets that are remembered: six each of 10,000 clients. Beyond that no
/// record is believed.
const LOST_TOPICS_MAX: usize = 60_000;

/// What is remembered of clients that were away.
#[derive(Debug)]
pub(crate) struct Recovery {
    pub(crate) lost_sockets: Arc<LostSockets>,
    pub(crate) healing: Arc<Healing>,
}

impl Recovery {
    /// Creates an empty memory. A socket is closed after `silence_timeout` without a message.
    pub(crate) fn new(
        silence_timeout: Duration,
        access: Arc<Access>,
        feeds: Arc<Feeds>,
        registry: &Registry,
    ) -> Self {
        let lost_sockets = Arc::new(LostSockets::new(LOST_TOPICS_MAX, silence_timeout));
        let (lost, metrics) = (Arc::clone(&lost_sockets), Metrics::new(registry));
        Self { lost_sockets, healing: Arc::new(Healing::new(lost, access, feeds, metrics)) }
    }

    /// Returns the task that heals in rounds. It runs once.
    pub(crate) fn healer(&self) -> Healer {
        Healer::new(Arc::clone(&self.healing))
    }

    /// Forgets what is over.
    pub(crate) fn sweep(&self) {
        self.lost_sockets.sweep();
        self.healing.sweep();
    }
}
