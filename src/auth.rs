//! Who somebody is: tokens and the keys that they are checked with.

pub mod jwks;
pub mod jwt;
pub mod keys;
pub mod secret;
pub mod sign;
pub mod verifier;

mod json;
