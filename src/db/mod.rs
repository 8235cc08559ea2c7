//! Pools, migrations, and every SQL statement of the gateway.

pub(crate) mod catalog;
mod connect;
pub mod deployed;
pub(crate) mod doctor;
pub(crate) mod gateways;
pub(crate) mod history;
mod migrate;
pub(crate) mod policies;
pub(crate) mod revocations;
pub(crate) mod session;

pub use migrate::{MigrateError, migrate, uninstall};

pub(crate) use connect::{options, pool, single};
