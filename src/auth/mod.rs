//! Who somebody is: tokens and the keys that they are checked with; and what the database's policies
//! let them do.

pub mod authenticator;
pub mod jwks;
pub mod jwt;
pub mod keys;
pub mod revocations;
pub mod sign;

mod json;
