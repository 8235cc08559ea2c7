//! Database → hub: which NOTIFY channels are listened to, the session that listens, and what
//! becomes of a notification.

pub mod ingest;
pub mod listener;
pub mod listens;

pub use ingest::Outcome;
pub use listener::LinkError;
