//! Who somebody is: tokens and the keys that they are checked with; and what the database's policies
//! let them do.

pub mod jwks;
pub mod revocations;
pub mod sign;

mod algorithm;
mod authenticator;
mod claims;
mod error;
mod json;
mod jwk;
mod jwt;
mod keys;
mod settings;

pub(crate) use self::algorithm::SECRET_BYTES_MIN;
pub use self::{
    algorithm::{Algorithm, KeySlot, VerifiedBy},
    authenticator::Verifier,
    claims::Claims,
    error::TokenError,
    jwk::{DocumentError, KeySource, Unusable},
    jwt::Token,
    settings::{Settings, TrustSettings},
};
