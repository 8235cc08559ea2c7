//! Clients that were away: what each of them may have missed, and which of them may be deaf.
//!
//! Invariants: a client whose absence is not known for certain is taken to have missed everything;
//! everything that is remembered is bounded, and is forgotten after a day.

mod client_key;
mod healing;
mod history;
mod lost_sockets;
mod metrics;
mod recent;
mod suspects;

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use uuid::Uuid;

pub use self::client_key::ClientKey;
pub(crate) use self::{
    healing::Healer,
    history::{History, Hold},
    lost_sockets::{REMEMBERED, Record},
    recent::Standing,
};
use self::{
    healing::{Healing, Parts},
    lost_sockets::{Loss, LostSockets},
    metrics::Metrics,
    recent::Recent,
    suspects::Suspects,
};
use crate::{
    access::{Access, EID, Found},
    auth::Authenticator,
    hub::Hub,
    invalidation::Feeds,
    protocol::topic::{Privacy, TopicKey},
    telemetry::metrics::Registry,
};

/// Most topics of lost sockets that are remembered: six each of 10,000 clients; of an address as
/// many as three each of 341 clients; of a record as many as one round heals.
const LOST_MAX: lost_sockets::Bounds =
    lost_sockets::Bounds { all: 60_000, of_address: 1_024, of_record: 64 };
/// Most topics that are remembered because somebody has joined them.
const RECENT_MAX: recent::Bounds = recent::Bounds { all: 10_000, of_address: 128 };
/// Most suspects of an address: more than a venue has viewers with old client libraries.
const SUSPECTS_PER_ADDRESS_MAX: usize = 8_192;

/// What is remembered of clients that were away.
#[derive(Debug)]
pub(crate) struct Recovery {
    pub(crate) lost_sockets: Arc<LostSockets>,
    pub(crate) healing: Arc<Healing>,
    recent: Arc<Recent>,
    access: Arc<Access>,
    hub: Arc<Hub>,
}

impl Recovery {
    /// Creates an empty memory. A socket is closed after `silence_timeout` without a message.
    pub(crate) fn new(
        silence_timeout: Duration,
        auth: Arc<Authenticator>,
        access: Arc<Access>,
        hub: Arc<Hub>,
        feeds: Arc<Feeds>,
        registry: &Registry,
    ) -> Self {
        let lost_sockets = Arc::new(LostSockets::new(LOST_MAX, silence_timeout));
        let recent = Arc::new(Recent::new(RECENT_MAX));
        let healing = Arc::new(Healing::new(Parts {
            suspects: Suspects::new(SUSPECTS_PER_ADDRESS_MAX),
            recent: Arc::clone(&recent),
            lost_sockets: Arc::clone(&lost_sockets),
            auth,
            access: Arc::clone(&access),
            feeds,
            metrics: Metrics::new(registry),
        }));
        Self { lost_sockets, healing, recent, access, hub }
    }

    /// Returns the task that heals. It runs once.
    pub(crate) fn healer(&self) -> Healer {
        Healer::new(Arc::clone(&self.healing))
    }

    /// Records that a client has joined the topic.
    pub(crate) fn note_joined(&self, client: ClientKey, sub_topic: &str) {
        self.recent.joined(&self.access.rules(), sub_topic, client.address());
    }

    /// Records a topic that was joined so long ago, at another gateway or before a restart.
    pub(crate) fn note_recent(&self, sub_topic: &str, age: Duration) {
        self.recent.joined_elsewhere(&self.access.rules(), sub_topic, age);
    }

    /// Returns the topics that were viewed since the last call, and that are worth telling others.
    pub(crate) fn take_new(&self) -> Vec<Arc<str>> {
        self.recent.take_new()
    }

    /// Returns events of which the database is to be asked whether everybody may know them.
    pub(crate) fn unasked_events(&self) -> Vec<Arc<str>> {
        self.recent.unasked(RECENT_MAX.all)
    }

    /// Records whether the database answers which events everybody may know. Until it does, all may be
    /// told of what it has said nothing of.
    pub(crate) fn set_answered(&self, is_answered: bool) {
        self.recent.set_answered(is_answered);
    }

    /// Takes what the database says of an event.
    pub(crate) fn answered(&self, eid: &str, standing: Standing) {
        self.recent.answered(eid, standing);
    }

    /// Records that a socket which held the topic has ended, and when its last data frame came;
    /// `None` if its client may have been away before, for an unknown time.
    pub(crate) fn lose(&self, client: ClientKey, topic: &str, last_data: Option<Instant>) {
        self.lost_sockets.record(client, self.loss(topic, last_data));
    }

    /// Records what another gateway has lost; the arguments are those of its [`Record`].
    pub(crate) fn take_over(&self, record: Uuid, topic: &str, age: Duration) {
        let last_data = Instant::now().checked_sub(age);
        self.lost_sockets.take_over(record, self.loss(topic, last_data));
    }

    fn loss<'a>(&self, topic: &'a str, last_data: Option<Instant>) -> Loss<'a> {
        let event: Option<Arc<str>> = match self.access.rules().find(topic) {
            Found::Rule(_, captures) => captures.get(EID).map(|eid| (&**eid).into()),
            Found::Other | Found::Lookalike => None,
        };
        let is_known = event.as_ref().is_some_and(|eid| self.recent.is_known(eid));
        Loss { topic, event, is_known, last_data }
    }

    /// Forgets what is over, and notes which topics have viewers.
    pub(crate) fn sweep(&self) {
        self.lost_sockets.sweep();
        let is_viewed = |topic: &Arc<str>| {
            let key = TopicKey { sub_topic: Arc::clone(topic), privacy: Privacy::Public };
            self.hub.subscriber_count(&key) > 0
        };
        let viewed: Vec<_> = self.recent.all().into_iter().filter(is_viewed).collect();
        self.recent.viewed(&viewed);
        self.recent.sweep();
    }
}
