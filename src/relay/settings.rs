//! `[relay]`: the database link.

use std::time::Duration;

use serde::Deserialize;

use crate::clock::duration;

/// The database link.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long a join waits for its topic's LISTEN before it is answered all the same.
    #[serde(deserialize_with = "duration")]
    pub listen_wait: Duration,
    /// How long a LISTEN is kept after its last viewer has gone.
    #[serde(deserialize_with = "duration")]
    pub linger: Duration,
    /// Most LISTENs; beyond, further events are joined, counted, and relayed as soon as there is
    /// room.
    pub listens_max: usize,
    /// Most LISTENs of one address on events that nobody knows.
    pub listens_per_address_max: usize,
    /// Between two heartbeats on the listening session.
    #[serde(deserialize_with = "duration")]
    pub heartbeat_interval: Duration,
    /// A heartbeat, or any other statement of the session, that takes longer ends the session.
    #[serde(deserialize_with = "duration")]
    pub heartbeat_timeout: Duration,
    /// A connection attempt that takes longer is given up.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// Longest wait between two attempts.
    #[serde(deserialize_with = "duration")]
    pub backoff_max: Duration,
    /// Between two canaries: notifications to this gateway itself, by which it knows up to where
    /// everything has arrived.
    #[serde(deserialize_with = "duration")]
    pub canary_interval: Duration,
    /// A canary that has not arrived so long after its commit ends the session.
    #[serde(deserialize_with = "duration")]
    pub canary_timeout: Duration,
    /// When each viewer of each event gets the complete list, the events are spread over so long.
    #[serde(deserialize_with = "duration")]
    pub resync_spread: Duration,
}

impl Settings {
    /// Returns what is wrong with the section, one text for each mistake.
    pub(crate) fn validate(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if self.listen_wait > Duration::from_millis(1500) {
            mistakes
                .push("relay.listen_wait: at most 1500ms, or clients give the join up".to_owned());
        }
        if self.listens_max == 0 {
            mistakes.push("relay.listens_max: must be at least 1".to_owned());
        }
        if self.listens_per_address_max == 0 {
            mistakes.push("relay.listens_per_address_max: must be at least 1".to_owned());
        }
        let durations = [
            ("heartbeat_interval", self.heartbeat_interval),
            ("heartbeat_timeout", self.heartbeat_timeout),
            ("connect_timeout", self.connect_timeout),
            ("canary_interval", self.canary_interval),
            ("canary_timeout", self.canary_timeout),
        ];
        let zeros = durations.iter().filter(|(_, duration)| duration.is_zero());
        mistakes.extend(zeros.map(|(name, _)| format!("relay.{name}: must be longer than 0s")));
        mistakes
    }
}
