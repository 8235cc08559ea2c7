//! The only helpers of the tests.

pub(crate) mod client;
pub(crate) mod folder;
pub(crate) mod page;
pub(crate) mod postgres;
pub(crate) mod private;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod server;
pub(crate) mod system;
pub(crate) mod token;
