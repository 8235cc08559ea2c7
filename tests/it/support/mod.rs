//! The only helpers of the tests.

pub(crate) mod client;
pub(crate) mod server;
pub(crate) mod token;
