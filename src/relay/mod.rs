//! NOTIFY → publish: which NOTIFY channels are listened to, the session that listens, what becomes of
//! a notification, and of one that may have been missed.
//!
//! Invariant: one session listens, and one task handles what it receives, in the order of commits.

mod canary;
mod clock_offset;
mod gaps;
mod ingest;
mod known_events;
mod link;
mod listener;
mod listens;
mod metrics;
mod places;
mod settings;
mod status;

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::{
    canary::Canaries, gaps::Gaps, ingest::Ingest, known_events::KnownEvents, listener::Listener,
};
pub(crate) use self::{
    canary::channel as canary_channel,
    ingest::STATS_CHANNEL,
    listens::{ListenGuard, Listening, Listens},
    metrics::Metrics,
    places::{Places, Wish},
    status::LinkStatus,
};
pub use self::{link::LinkError, metrics::Outcome, settings::Settings};
use crate::{
    access::Access, auth::Authenticator, db::Pool, hub::Hub, invalidation::Feeds,
    publish::Publisher, recovery::Recovery, secret::Secret,
};

/// What the relay is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    /// `[relay]`.
    pub(crate) settings: Settings,
    /// A session-mode connection for LISTEN.
    pub(crate) url: Secret,
    /// Connections for what the listening session is not for; `None` if the URL cannot be read.
    pub(crate) pool: Option<Pool>,
    /// Names this process among the gateways of its database.
    pub(crate) gateway: uuid::Uuid,
    /// How long the history is kept.
    pub(crate) history_keep: std::time::Duration,
    /// Largest payload that is relayed.
    pub(crate) payload_bytes_max: usize,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) link: Arc<LinkStatus>,
    pub(crate) listens: Arc<Listens>,
    pub(crate) access: Arc<Access>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) feeds: Arc<Feeds>,
    pub(crate) recovery: Arc<Recovery>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) auth: Arc<Authenticator>,
}

/// The database link: the session that listens, and the handling of what it receives.
#[derive(Debug)]
pub(crate) struct Relay {
    listener: Listener,
    ingest: Ingest,
    notifications: mpsc::Receiver<ingest::Notification>,
    /// `None` if the pool's URL cannot be read.
    known_events: Option<KnownEvents>,
}

impl Relay {
    /// Creates the link, which connects when it runs.
    pub(crate) fn new(parts: Parts) -> Self {
        let (queue, notifications) = mpsc::channel(ingest::BACKLOG_MAX);
        let Parts { settings, link, listens, metrics, feeds, auth, .. } = parts;
        let gaps = Gaps {
            feeds: Arc::clone(&feeds),
            listens: Arc::clone(&listens),
            metrics: Arc::clone(&metrics),
            history_keep: parts.history_keep,
            resync_spread: settings.resync_spread,
        };
        let known_events = parts.pool.clone().map(|pool| KnownEvents {
            pool,
            listens: Arc::clone(&listens),
            metrics: Arc::clone(&metrics),
            interval: settings.canary_interval,
            timeout: settings.connect_timeout,
        });
        let canaries = Canaries {
            pool: parts.pool,
            channel: canary::channel(parts.gateway),
            timeout: settings.canary_timeout,
            failures: metrics.canary_failures.clone(),
        };
        let ingest = Ingest {
            listens: Arc::clone(&listens),
            access: parts.access,
            hub: parts.hub,
            recovery: parts.recovery,
            publisher: parts.publisher,
            auth: Arc::clone(&auth),
            link: Arc::clone(&link),
            metrics: Arc::clone(&metrics),
            payload_bytes_max: parts.payload_bytes_max,
        };
        let listener = Listener {
            settings,
            url: parts.url,
            queue,
            gaps,
            canaries,
            listens,
            feeds,
            auth,
            link,
            metrics,
        };
        Self { listener, ingest, notifications, known_events }
    }

    /// Returns the tasks of the link, each to be spawned: the session that listens until the server
    /// stops, the handling of what it has received, which ends after it, and what finds out which
    /// events the database knows.
    pub(crate) fn run(
        self,
        stop: CancellationToken,
    ) -> (
        impl Future<Output = ()> + Send,
        impl Future<Output = ()> + Send,
        Option<impl Future<Output = ()> + Send>,
    ) {
        let known_events = self.known_events.map(|known_events| known_events.run(stop.clone()));
        (self.listener.run(stop), self.ingest.run(self.notifications), known_events)
    }
}
