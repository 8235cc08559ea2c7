//! What waits for a feed's window, and what leaves when it opens.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    journal::{Delivery, Source},
    payload::{Endpoints, Invalidation},
    reason::CatchUpCause,
};
use crate::{
    hub::outbox::{Committed, Since},
    protocol::serializer::Broadcast,
};

/// How long a message waits for others of its transaction, which arrive together: from the last
/// one of the same backend, and from the first one of all.
pub(super) const SETTLE: Duration = Duration::from_millis(10);
pub(super) const SETTLE_MAX: Duration = Duration::from_millis(50);
/// A larger union becomes the complete list.
pub(super) const UNION_MAX: usize = 200;

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) newest: Option<Invalidation>,
    pub(super) endpoints: Endpoints,
    pub(super) is_complete: bool,
    /// Nothing had to be dropped from the lists.
    pub(super) is_clean: bool,
    pub(super) messages: usize,
    pub(super) sources: Vec<Source>,
    pub(super) gap: Option<CatchUpCause>,
    pub(super) first: Instant,
    /// When the oldest of them was committed of which that is known.
    pub(super) committed: Option<Instant>,
    pub(super) pid: Option<u32>,
    pub(super) due: Instant,
    /// The window has made it wait.
    pub(super) has_waited: bool,
}

/// How the database has notified an invalidation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notified {
    /// The session.
    pub(crate) pid: u32,
    /// By our clock, if it is known.
    pub(crate) committed: Option<Instant>,
}

/// What the event's timer finds.
#[derive(Debug)]
pub(crate) enum Due {
    Nothing,
    Later,
    Send(Box<Outgoing>),
}

/// One message to the whole event.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) broadcast: Broadcast,
    /// What it is made of, if not of gaps alone.
    pub(super) newest: Option<Invalidation>,
    pub(crate) sent: Delivery,
    /// The oldest of what it is made of.
    pub(crate) committed: Option<Committed>,
    /// Not later than the first change that it tells of; none if nothing could take its place.
    pub(crate) since: Option<Since>,
    /// How long its window has made it wait, if it has.
    pub(crate) waited: Option<Duration>,
}

impl Pending {
    pub(super) fn add(&mut self, endpoints: &Endpoints) {
        self.endpoints.extend(endpoints.iter().cloned());
        // What is not sent one by one is known all the same, and so in the complete list.
        self.is_complete |= self.endpoints.len() > UNION_MAX;
        if self.is_complete {
            self.endpoints = Endpoints::default();
        }
    }
}
