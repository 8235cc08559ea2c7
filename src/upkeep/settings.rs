//! `[history]` of the settings.

use std::time::Duration;

use serde::Deserialize;

use crate::clock::duration;

/// What the database remembers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long a message stays in `tidegate.broadcast_history`.
    #[serde(deserialize_with = "duration")]
    pub keep: Duration,
}
