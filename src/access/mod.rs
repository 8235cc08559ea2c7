//! Topic → rule → decision: who may read and write what.
//!
//! [`Access`] holds the rules in force and decides by them. Joins, broadcasts, REST, changed
//! tokens, reloads and healing ask it; `tidegate config --explain` and the doctor ask [`Rules`]
//! that they build from the settings.
//!
//! Invariants: one pure function decides each read and each write ([`Rules::decide_found`]); the
//! rules are data and are replaced as a whole, so a decision never mixes old and new ones; the lock
//! is held only while a pointer is copied.

mod decision;
mod grant;
mod pattern;
mod rule;
mod rules;
mod settings;

use std::sync::Arc;

use parking_lot::RwLock;

pub(crate) use self::settings::validate_rules;
pub use self::{
    decision::{AccessRequest, Action, Decision, Reason, Verdict},
    grant::Grant,
    pattern::{Captures, Pattern, PatternError},
    rule::{Denied, EID, Merge, NOTIFY_CHANNEL_BYTES_MAX, Rule},
    rules::{Found, Rules},
    settings::Topics,
};

/// The rules in force.
#[derive(Debug)]
pub struct Access {
    rules: RwLock<Arc<Rules>>,
}

impl Access {
    /// Begins with these rules.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self { rules: RwLock::new(Arc::new(rules)) }
    }

    /// Returns the rules in force. A caller with several questions about one topic asks them of
    /// this snapshot, so that a reload in between cannot give two answers.
    #[must_use]
    pub fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read())
    }

    /// Decides by the rules in force.
    #[must_use]
    pub fn decide(&self, request: &AccessRequest<'_>) -> Decision {
        self.rules().decide(request)
    }

    /// Replaces the rules. Channels that are open keep what was decided until a review.
    pub(crate) fn replace(&self, rules: Rules) {
        *self.rules.write() = Arc::new(rules);
    }
}
