//! Clients that were away: what each may have missed, and who may be deaf.

pub(crate) mod healing;
pub mod lost_sockets;
