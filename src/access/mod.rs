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

pub(crate) use self::settings::validate_rules;
pub use self::{
    decision::{AccessRequest, Action, Decision, Reason, Verdict},
    grant::Grant,
    pattern::{Captures, Pattern, PatternError},
    rule::{Denied, EID, Merge, NOTIFY_CHANNEL_BYTES_MAX, Rule},
    rules::{Found, Rules},
    settings::Topics,
};
