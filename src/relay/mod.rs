//! Database → hub: which NOTIFY channels are listened to, the session that listens, what becomes of
//! a notification, and of one that may have been missed.

pub(crate) mod canary;
mod clock_offset;
mod gaps;
pub mod ingest;
pub mod listener;
pub mod listens;

pub use ingest::Outcome;
pub use listener::LinkError;
