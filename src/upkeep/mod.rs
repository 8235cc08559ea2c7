//! Periodic work against the database.

pub(crate) mod revocations;
pub(crate) mod sharing;
pub(crate) mod survey;
