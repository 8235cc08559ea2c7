//! What all connections of the public port share.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    bodies::Bodies,
    metrics::{Metrics, RefusedUpgrade},
    visits::Visits,
};
use crate::{
    access::Access,
    auth::Authenticator,
    hub::Sockets,
    limits::Limits,
    policies::Policies,
    publish::Publisher,
    socket,
    telemetry::audit::{Audit, Caller},
};

/// What all connections of the public port share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) metrics: Metrics,
    pub(crate) auth: Arc<Authenticator>,
    pub(crate) access: Arc<Access>,
    pub(crate) policies: Arc<Policies>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) sockets: Arc<Sockets>,
    pub(crate) publisher: Arc<Publisher>,
    /// What the sockets share.
    pub(crate) socket: Arc<socket::Shared>,
    /// Places for large bodies.
    pub(crate) bodies: Bodies,
    /// Where doctors have come from.
    pub(crate) visits: Arc<Visits>,
    /// Runs the sockets' tasks.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the drain begins.
    pub(crate) draining: CancellationToken,
    /// Cancelled when the sockets are gone.
    pub(crate) stopped: CancellationToken,
}

impl Shared {
    /// Counts a connection attempt that came to nothing; `fault` is the fault of its token.
    pub(crate) fn count_refused(
        &self,
        caller: Caller,
        reason: RefusedUpgrade,
        fault: Option<&'static str>,
    ) {
        self.metrics.refused.of(reason).inc();
        Audit::RefuseUpgrade { reason: reason.label(), fault }.note(caller, None);
    }
}
