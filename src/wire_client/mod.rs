//! A client of the protocol that shares no code with the server.
//!
//! Invariant: this room names no other. A load tool or a doctor that shares a mistake with the
//! server's codecs would find nothing.

pub(crate) mod failure;
pub(crate) mod frame;
pub(crate) mod message;
pub(crate) mod upgrade;
