//! A client of the protocol that shares no code with the server.

pub(crate) mod frame;
pub(crate) mod message;
