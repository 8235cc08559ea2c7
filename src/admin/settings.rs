//! `[metrics]`: what is measured, and how often.

use std::time::Duration;

use serde::Deserialize;

use crate::clock::duration;

/// What is measured.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Most events with series of their own, the busiest; the rest share `other`. At most 1,000.
    pub events_max: usize,
    /// Between two looks at the database's triggers, functions, writes and queue; at least 1 s.
    #[serde(deserialize_with = "duration")]
    pub database_interval: Duration,
}

impl Settings {
    /// Returns what is wrong with the section, one text for each mistake.
    pub(crate) fn validate(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if self.database_interval < Duration::from_secs(1) {
            mistakes.push("metrics.database_interval: at least 1s".to_owned());
        }
        if self.events_max > 1000 {
            mistakes.push("metrics.events_max: at most 1000, each has five series".to_owned());
        }
        mistakes
    }
}
