//! Topic → rule → decision: who may read and write what.

mod decision;
mod grant;
mod pattern;
mod rule;
mod rules;
mod settings;

pub use self::{
    decision::{Action, Asked, Because, Decision, Verdict},
    grant::Grant,
    pattern::{Captures, Pattern, PatternError},
    rule::{Denied, EID, Merge, NOTIFY_CHANNEL_BYTES_MAX, Rule},
    rules::{Found, TopicRules},
    settings::Topics,
};
