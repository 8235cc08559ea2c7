//! Topics: how clients spell them, and what the hub calls them.

use std::sync::Arc;

/// The prefix of every topic that can be joined.
pub const TOPIC_PREFIX: &str = "realtime:";

/// Whether a channel was joined with `config.private`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Privacy {
    /// Open to every valid token that the topic's rule admits.
    Public,
    /// Authorized by the database.
    Private,
}

/// A topic as the server knows it: public and private ones of one name are different topics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TopicKey {
    /// The client's topic without its `realtime:` prefix.
    pub sub_topic: Arc<str>,
    /// Whether the channel was joined with `config.private`.
    pub privacy: Privacy,
}
