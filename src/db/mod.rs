//! Every SQL statement of the gateway, by subject.
//!
//! Invariants: no other room holds SQL; a row is a struct of plain values (text, numbers, times,
//! `Uuid`), from which the caller makes its own types; an error is the library's, and the caller
//! decides what it means.

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

/// The gateway's pool, under a name for rooms that run no SQL of their own.
pub(crate) type Pool = sqlx::PgPool;
