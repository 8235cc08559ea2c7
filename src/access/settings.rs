//! What is served of the topics that no rule matches.

use serde::Deserialize;

/// Topics that no rule matches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topics {
    /// Whether they are served as ordinary topics.
    pub allow_other: bool,
    /// Whether only private channels of them are.
    pub private_only: bool,
}
