//! What all sockets of one server share.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{metrics::Metrics, settings::Settings};
use crate::{
    access::Access, auth::Authenticator, hub::Hub, invalidation::Feeds, limits::Limits,
    policies::Policies, publish::Publisher, recovery::Recovery, relay::Listens,
};

/// What all sockets of one server share.
#[derive(Debug)]
pub struct Shared {
    pub(crate) settings: Settings,
    pub(crate) metrics: Metrics,
    pub(crate) auth: Arc<Authenticator>,
    pub(crate) access: Arc<Access>,
    pub(crate) policies: Arc<Policies>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) feeds: Arc<Feeds>,
    /// `None` without a database.
    pub(crate) listens: Option<Arc<Listens>>,
    pub(crate) recovery: Arc<Recovery>,
    pub(crate) publisher: Arc<Publisher>,
    /// Cancelled when the drain begins.
    pub(crate) draining: CancellationToken,
}
