//! Token → claims, or why not: who a client is.
//!
//! [`Authenticator`] verifies tokens with the current keys; [`KeyFollower`] is the task that keeps
//! the keys of a key set up to date; [`revocations`] are tokens that are refused although they are
//! genuine; [`sign`] makes tokens for commands and tests.
//!
//! Invariants: nothing of a token is believed before its signature; a key is used only for its own
//! algorithms; no token, secret or key is ever logged. Only `jwks` and `follower` do I/O.

pub mod jwks;
pub mod revocations;
pub mod sign;

mod algorithm;
mod authenticator;
mod claims;
mod error;
mod follower;
mod json;
mod jwk;
mod jwt;
mod keys;
mod metrics;
mod settings;

pub(crate) use self::{algorithm::SECRET_BYTES_MIN, follower::KeyFollower, metrics::Metrics};
pub use self::{
    algorithm::{Algorithm, KeySlot, VerifiedBy},
    authenticator::Authenticator,
    claims::Claims,
    error::TokenError,
    jwk::{DocumentError, KeySource, Unusable},
    jwt::Token,
    settings::{Settings, TrustSettings},
};
