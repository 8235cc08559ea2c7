//! What clients are told that join a feed or have fallen behind on it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    payload::Endpoints,
    reason::{CatchUpCause, Coverage},
};
use crate::{
    hub::outbox::{Outbox, Since},
    protocol::serializer::Broadcast,
};

/// What a fresh page may have missed: its own fetch may have been answered by a cache, its first
/// upgrades refused.
pub(super) const FRESH: Duration = Duration::from_secs(30);

/// A client that was caught up alone.
#[derive(Debug)]
pub(super) struct CaughtUp {
    pub(super) at: Instant,
    pub(super) outbox: Weak<Outbox>,
    /// Ends with its subscription.
    pub(super) life: Weak<()>,
    pub(super) sub_topic: Arc<str>,
    pub(super) endpoints: Arc<Endpoints>,
    /// Not later than the first change of these.
    pub(super) since: Since,
}

/// What is known of a client that joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientHistory {
    /// Its page was just loaded.
    Fresh,
    /// It has held this topic before on the same socket.
    Held,
    /// Its earlier socket held this topic and has missed nothing before.
    Since(Instant),
    /// It reads so slowly that something was dropped.
    Behind(Since),
    /// Nothing.
    Nothing,
}

/// A message to one client: the event's, with the endpoints of its catch-up, which it would else
/// forget.
#[derive(Debug)]
pub(crate) struct Repeat {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) sub_topic: Arc<str>,
    pub(crate) broadcast: Broadcast,
    pub(crate) since: Option<Since>,
}

/// A message to one client that has joined.
#[derive(Debug)]
pub(crate) struct CatchUp {
    pub(crate) broadcast: Broadcast,
    pub(crate) cause: CatchUpCause,
    pub(crate) method: Coverage,
    pub(crate) since: Since,
    /// How many messages the whole event had been sent.
    pub(crate) messages: u64,
}
