//! Periodic work against the database: the exchange with other gateways, revocations, and the survey
//! of triggers, functions, writes and queue.
//!
//! Invariant: each task works over the pool and bounds each round by a deadline, so that a database
//! that does not answer delays nothing but the task.

mod metrics;
mod revocations;
mod settings;
mod sharing;
mod survey;

pub use metrics::Metrics;
pub use settings::Settings;

pub(crate) use revocations::RevocationReader;
pub(crate) use sharing::{Sharing, deregister};
pub(crate) use survey::Survey;
