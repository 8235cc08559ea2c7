//! `[protocol]`: what clients notice.

use std::time::Duration;

use serde::Deserialize;

use crate::clock::duration;

/// What clients notice.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Delay of error replies to joins and of refused upgrades; at most 1.5 s.
    #[serde(deserialize_with = "duration")]
    pub error_delay: Duration,
    /// Whether a client that sends a `presence` object without `enabled` waits for a state.
    pub presence_default: bool,
}

impl Settings {
    /// Returns what is wrong with the section, one text for each mistake.
    pub(crate) fn validate(&self) -> Vec<String> {
        let is_long = self.error_delay > Duration::from_millis(1500);
        let text = "protocol.error_delay: at most 1500ms, or clients give the join up";
        is_long.then(|| text.to_owned()).into_iter().collect()
    }
}
