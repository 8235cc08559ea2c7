//! Where log lines go: standard error by the operator's filter, and the audit log on its own.

use std::{
    io::{self, IsTerminal},
    sync::Arc,
};

use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, ParseError},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use super::audit::{self, AuditLog};

/// Installs the process' one subscriber: log lines that pass `filter` go to standard error, audit
/// events to `audit` and nowhere else.
///
/// # Errors
/// [`ParseError`] if `filter` is none, such as `info` or `tidegate=debug`; nothing is installed.
///
/// # Panics
/// If the process has a subscriber already.
pub fn start_logs(filter: &str, audit: Option<Arc<AuditLog>>) -> Result<(), ParseError> {
    let filter = EnvFilter::try_new(filter)?.and(audit::is_elsewhere());
    let log = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_filter(filter);
    // In a list, so that an absent layer does not ask for every event.
    let mut layers = vec![log.boxed()];
    layers.extend(audit.map(|audit| audit.layer().boxed()));
    tracing_subscriber::registry().with(layers).init();
    Ok(())
}
