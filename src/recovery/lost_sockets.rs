//! Sockets that have ended without a leave: what a client that comes back may have missed, and which
//! topics it may be deaf to.
//!
//! A client is known by its address and its `User-Agent`, which many clients may share: a record
//! stands for all of them, and holds the longest absence that any of them may have had.
//!
//! Invariants: at most `max` topics are remembered; once a topic was not remembered, no record is
//! believed until that one would have expired; a record is believed only while no other gateway,
//! running or ended, may have lost the same client without leaving its record.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use crate::limits::Address;

/// How long a client may be away; after that it gets the complete list.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// What a socket was sent so long before its last message has arrived.
const SLACK: Duration = Duration::from_secs(60);

/// Stands for a client's address and `User-Agent`. Whoever guesses both can verify the guess by it;
/// nobody else learns anything from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientKey(Uuid);

impl ClientKey {
    /// Returns the same key for all clients that share both.
    #[must_use]
    pub fn new(address: Address, user_agent: &str) -> Self {
        let text = format!("{} {user_agent}", address.ip());
        Self(Uuid::new_v5(&Uuid::NAMESPACE_URL, text.as_bytes()))
    }

    /// Reads a key that another gateway has written.
    #[must_use]
    pub fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// Returns the key as it is written for other gateways.
    #[must_use]
    pub fn uuid(self) -> Uuid {
        self.0
    }
}

/// The records of all lost sockets.
#[derive(Debug)]
pub(crate) struct LostSockets {
    state: Mutex<State>,
    max: usize,
    /// How long a socket may be silent before it is closed.
    silence_timeout: Duration,
}

#[derive(Debug, Default)]
struct State {
    clients: HashMap<ClientKey, HashMap<Arc<str>, Lost>>,
    /// How many topics all clients have together.
    topics: usize,
    /// When there was last no room for a record.
    overflowed: Option<Instant>,
    /// No other gateway may have lost a client that comes here.
    is_alone: bool,
}

#[derive(Debug, Clone, Copy)]
struct Lost {
    /// The earliest of their last data frames; `None` if that is not known.
    last_data: Option<Instant>,
    /// The latest of their ends.
    ended: Instant,
}

/// A record as it travels to another process.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) client: ClientKey,
    /// Without `realtime:`.
    pub(crate) topic: Arc<str>,
    /// The time since its last data frame.
    pub(crate) age: Duration,
}

impl LostSockets {
    /// Creates an empty set of records, with room for `max` topics.
    pub(super) fn new(max: usize, silence_timeout: Duration) -> Self {
        Self { state: Mutex::default(), max, silence_timeout }
    }

    /// Records that a socket which held the topic has ended, and when its last data frame came;
    /// `None` if its client may have been away before, for an unknown time.
    pub(crate) fn record(&self, client: ClientKey, topic: &str, last_data: Option<Instant>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_full = state.topics >= self.max;
        let topics = state.clients.entry(client).or_default();
        if let Some(lost) = topics.get_mut(topic) {
            // `None` is the least.
            lost.last_data = lost.last_data.min(last_data);
            lost.ended = now;
        } else if !is_full {
            topics.insert(topic.into(), Lost { last_data, ended: now });
            state.topics += 1;
        } else {
            if topics.is_empty() {
                state.clients.remove(&client);
            }
            state.overflowed = Some(now);
        }
    }

    /// Returns since when a client that comes back to the topic may have missed something, if that
    /// is known.
    pub(super) fn since(&self, client: ClientKey, topic: &str) -> Option<Instant> {
        let now = Instant::now();
        let state = self.state.lock();
        if !state.is_alone || state.overflowed.is_some_and(|at| now.duration_since(at) < REMEMBERED)
        {
            return None;
        }
        let lost = state.clients.get(&client)?.get(topic)?;
        if now.duration_since(lost.ended) >= REMEMBERED {
            return None;
        }
        // Another socket with the same record may be dead without having been closed yet.
        let unnoticed = now.checked_sub(self.silence_timeout)?;
        lost.last_data?.min(unnoticed).checked_sub(SLACK)
    }

    /// Returns the topics that the client may have lost.
    pub(super) fn topics(&self, client: ClientKey) -> Vec<Arc<str>> {
        let state = self.state.lock();
        state.clients.get(&client).map_or_else(Vec::new, |topics| topics.keys().cloned().collect())
    }

    /// Sets whether records may be believed: no other gateway may have lost a client that comes
    /// here without leaving its record.
    pub(crate) fn set_alone(&self, is_alone: bool) {
        self.state.lock().is_alone = is_alone;
    }

    /// Returns all records, for another process.
    pub(crate) fn records(&self) -> Vec<Record> {
        let now = Instant::now();
        let state = self.state.lock();
        let records = state.clients.iter().flat_map(|(client, topics)| {
            topics.iter().map(|(topic, lost)| Record {
                client: *client,
                topic: Arc::clone(topic),
                age: lost.last_data.map_or(2 * REMEMBERED, |at| now.duration_since(at)),
            })
        });
        records.collect()
    }

    /// Forgets records that have expired.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let mut left = 0;
        state.clients.retain(|_, topics| {
            topics.retain(|_, lost| now.duration_since(lost.ended) < REMEMBERED);
            left += topics.len();
            !topics.is_empty()
        });
        state.topics = left;
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const SILENCE: Duration = Duration::from_secs(90);

    fn client(last: u8) -> ClientKey {
        ClientKey::new(IpAddr::from([10, 0, 0, last]).into(), "browser")
    }

    fn alone(max: usize) -> LostSockets {
        let lost = LostSockets::new(max, SILENCE);
        lost.set_alone(true);
        lost
    }

    #[test]
    fn an_address_is_the_same_in_both_families_and_an_agent_tells_apart() {
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(ClientKey::new(mapped.into(), "browser"), client(1));
        assert_ne!(ClientKey::new(mapped.into(), "other"), client(1));
    }

    #[tokio::test(start_paused = true)]
    async fn of_several_sockets_the_longest_absence_counts() {
        tokio::time::advance(REMEMBERED).await;
        let lost = alone(9);
        let first = Instant::now();
        lost.record(client(1), "t", Some(first));
        tokio::time::advance(Duration::from_secs(600)).await;
        lost.record(client(1), "t", Some(Instant::now()));
        assert_eq!(lost.since(client(1), "t"), Some(first - SLACK));
        assert_eq!(lost.since(client(1), "other"), None);
        assert_eq!(lost.since(client(2), "t"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_whose_death_is_not_noticed_yet_is_reckoned_with() {
        tokio::time::advance(REMEMBERED).await;
        let lost = alone(9);
        lost.record(client(1), "t", Some(Instant::now()));
        assert_eq!(lost.since(client(1), "t"), Some(Instant::now() - SILENCE - SLACK));
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_holds_for_a_day() {
        tokio::time::advance(REMEMBERED).await;
        let lost = alone(9);
        lost.record(client(1), "t", Some(Instant::now()));
        tokio::time::advance(REMEMBERED - Duration::from_secs(1)).await;
        assert!(lost.since(client(1), "t").is_some());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(lost.since(client(1), "t"), None);
        lost.sweep();
        assert!(lost.topics(client(1)).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn where_one_was_not_recorded_none_is_believed() {
        tokio::time::advance(REMEMBERED).await;
        let lost = alone(1);
        lost.record(client(1), "t", Some(Instant::now()));
        assert!(lost.since(client(1), "t").is_some());
        lost.record(client(2), "t", Some(Instant::now()));
        assert_eq!(lost.since(client(1), "t"), None);
        assert_eq!(lost.topics(client(1)), ["t".into()]);
    }

    #[tokio::test(start_paused = true)]
    async fn beside_another_gateway_none_is_believed() {
        tokio::time::advance(REMEMBERED).await;
        let lost = alone(9);
        lost.record(client(1), "t", Some(Instant::now()));
        lost.set_alone(false);
        assert_eq!(lost.since(client(1), "t"), None);
    }
}
