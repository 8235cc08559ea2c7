//! What all requests of the operators' port share.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{busiest::Busiest, metrics::Metrics};
use crate::{
    access::Access,
    auth::Authenticator,
    db::Pool,
    http::Visits,
    hub::{Hub, Sockets},
    invalidation::Feeds,
    limits::Limits,
    relay::{LinkStatus, Listens},
    secret::Secret,
    telemetry::metrics::Registry,
};

/// Why the settings were not read again.
#[derive(Debug)]
pub(crate) struct ReloadFailure {
    /// What an operator is told.
    pub(crate) message: String,
    /// Every mistake in the settings, if they are the reason.
    pub(crate) mistakes: Vec<String>,
}

/// Reads rules and keys again.
pub(crate) type ReloadFn = Box<dyn Fn() -> Result<(), ReloadFailure> + Send + Sync>;

/// What all requests of the operators' port share.
pub(crate) struct Shared {
    pub(crate) metrics: Metrics,
    pub(crate) registry: Arc<Registry>,
    /// Asked of every request; empty asks for none.
    pub(crate) admin_token: Secret,
    /// Most events with series of their own.
    pub(crate) events_max: usize,
    /// The events that have series of their own.
    pub(crate) busiest: Mutex<Busiest>,
    pub(crate) auth: Arc<Authenticator>,
    pub(crate) access: Arc<Access>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) feeds: Arc<Feeds>,
    pub(crate) visits: Arc<Visits>,
    /// `None` without a database.
    pub(crate) listens: Option<Arc<Listens>>,
    pub(crate) link: Arc<LinkStatus>,
    /// Between two canaries.
    pub(crate) canary_interval: Duration,
    /// `None` without a database.
    pub(crate) pool: Option<Pool>,
    /// The database is given so much time for an answer.
    pub(crate) database_timeout: Duration,
    pub(crate) reload: ReloadFn,
    /// Cancelled when the drain begins.
    pub(crate) draining: CancellationToken,
    /// Cancelled when the sockets are gone.
    pub(crate) stopped: CancellationToken,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}
