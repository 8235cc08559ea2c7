//! Who somebody is: tokens and the keys that they are checked with.

pub mod jwt;
pub mod secret;
pub mod sign;
pub mod verifier;
