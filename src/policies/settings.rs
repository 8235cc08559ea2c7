//! `[policies]` of the settings.

use std::time::Duration;

use serde::Deserialize;

use crate::clock::duration;

/// The database's decisions about private channels.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Most questions asked at a time, each on a connection of its own.
    pub connections_max: u32,
    /// A question that takes longer counts as unanswered; at most 1.2 s.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
}

impl Settings {
    /// Returns everything that is wrong with the section.
    pub(crate) fn validate(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if self.timeout > Duration::from_millis(1200) {
            mistakes
                .push("policies.timeout: at most 1200ms, or clients give the join up".to_owned());
        }
        if self.timeout.is_zero() {
            mistakes.push("policies.timeout: must be longer than 0s".to_owned());
        }
        mistakes
    }
}
