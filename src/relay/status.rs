//! Whether the database link is up.
//!
//! Invariant: [`LinkStatus`] is the truth about the link; metrics mirror it and are never read.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::metrics::Metrics;
use crate::clock::unix_seconds;

/// Whether the link is up, when a canary last arrived, and how far the two clocks are apart.
#[derive(Debug)]
pub(crate) struct LinkStatus {
    state: Mutex<State>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    is_up: bool,
    last_canary: Option<f64>,
    clock_offset: f64,
}

impl LinkStatus {
    /// Creates the status of a link that is down.
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self { state: Mutex::default(), metrics }
    }

    /// Whether the listening session is up.
    pub(crate) fn is_up(&self) -> bool {
        self.state.lock().is_up
    }

    /// How long ago a canary last arrived; `None` before the first.
    pub(crate) fn canary_age(&self) -> Option<Duration> {
        let arrived = self.state.lock().last_canary?;
        Some(Duration::try_from_secs_f64(unix_seconds() - arrived).unwrap_or_default())
    }

    /// The database's clock less the gateway's, in seconds.
    pub(super) fn clock_offset(&self) -> f64 {
        self.state.lock().clock_offset
    }

    /// Records whether the listening session is up.
    pub(super) fn set_up(&self, is_up: bool) {
        self.state.lock().is_up = is_up;
        self.metrics.link_up.set(is_up.into());
    }

    /// Records that a canary has arrived.
    pub(super) fn canary_arrived(&self) {
        let now = unix_seconds();
        self.state.lock().last_canary = Some(now);
        self.metrics.canary_last.set(now);
    }

    /// Records how far the two clocks are apart, in seconds.
    pub(super) fn set_clock_offset(&self, offset: f64) {
        self.state.lock().clock_offset = offset;
        self.metrics.clock_offset.set(offset);
    }
}
