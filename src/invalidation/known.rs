//! The endpoints of a feed that are known, and when each of them last changed.
//!
//! Invariants: at most [`ENDPOINTS_MAX`] endpoints are remembered; of the others the time of the
//! latest change is, so that a list that cannot be exact is never taken for exact.

use std::collections::HashMap;

use tokio::time::Instant;

use super::payload::Endpoints;

/// Most endpoints of a feed that are remembered. Further ones are sent like all others.
pub(super) const ENDPOINTS_MAX: usize = 2_000;

/// The endpoints of a feed that are known.
#[derive(Debug, Default)]
pub(super) struct KnownEndpoints {
    /// When each endpoint last changed; `None` for one that is only known to exist.
    changes: HashMap<Box<str>, Option<Instant>>,
    /// The latest change of an endpoint that is not remembered.
    forgotten: Option<Instant>,
}

impl KnownEndpoints {
    /// Records that these endpoints exist, and that they changed at `at` if that is given.
    pub(super) fn note(&mut self, endpoints: &Endpoints, at: Option<Instant>) {
        for endpoint in endpoints {
            if let Some(changed) = self.changes.get_mut(endpoint) {
                *changed = at.or(*changed);
            } else if self.changes.len() < ENDPOINTS_MAX {
                self.changes.insert(endpoint.clone(), at);
            } else if at.is_some() {
                self.forgotten = at;
            }
        }
    }

    /// Records that every endpoint changed at `at`, those of `resync` among them.
    pub(super) fn note_all(&mut self, resync: &Endpoints, at: Instant) {
        self.note(resync, Some(at));
        for changed in self.changes.values_mut() {
            *changed = Some(at);
        }
    }

    /// Returns the endpoints that changed at `since` or later, the oldest change first.
    pub(super) fn changed_since(&self, since: Instant) -> Endpoints {
        let mut changed: Vec<_> = self
            .changes
            .iter()
            .filter_map(|(endpoint, at)| Some(((*at)?, endpoint)))
            .filter(|(at, _)| *at >= since)
            .collect();
        changed.sort_unstable();
        changed.into_iter().map(|(_, endpoint)| endpoint.clone()).collect()
    }

    /// Returns the complete list: the endpoints of `resync`, then all others in sorted order.
    pub(super) fn complete(&self, resync: &Endpoints) -> Endpoints {
        let mut known: Vec<_> = self.changes.keys().cloned().collect();
        known.sort_unstable();
        resync.iter().cloned().chain(known).collect()
    }

    /// Returns whether every change at `since` or later is remembered.
    pub(super) fn reaches_back_to(&self, since: Instant) -> bool {
        self.forgotten.is_none_or(|forgotten| forgotten < since)
    }

    /// Returns whether every change is remembered.
    pub(super) fn has_everything(&self) -> bool {
        self.forgotten.is_none()
    }

    /// Returns how many endpoints are remembered.
    pub(super) fn count(&self) -> usize {
        self.changes.len()
    }
}
