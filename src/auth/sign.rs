//! Signs tokens for the `token` command, the demo and tests. A gateway signs nothing.

use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Map, Value};

use super::error::TokenError;
use crate::{clock::unix_now, secret::Secret};

/// Signs `claims` with HS256.
///
/// # Errors
/// [`TokenError::NoSigner`] if the secret cannot sign.
pub fn sign(secret: &Secret, claims: &Value) -> Result<String, TokenError> {
    let key = EncodingKey::from_secret(secret.expose().as_bytes());
    encode(&Header::new(Algorithm::HS256), claims, &key)
        .map_err(|_no_reason_to_tell| TokenError::NoSigner { kid: None })
}

/// Why a token cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// `jwt_secret` is empty.
    #[error("jwt_secret is not set: set TIDEGATE_JWT_SECRET to the project's JWT secret")]
    NoSecret,
    /// The further claims are not a JSON object.
    #[error("the claims are not a JSON object")]
    Claims(#[source] serde_json::Error),
    /// The library refuses the secret.
    #[error("the secret cannot sign")]
    Sign(#[source] TokenError),
}

/// Signs a token for `role` with further `claims`, a JSON object. It expires after `ttl`.
///
/// # Errors
/// [`SignError`].
pub fn sign_role(
    secret: &Secret,
    role: &str,
    claims: &str,
    ttl: Duration,
) -> Result<String, SignError> {
    if secret.is_empty() {
        return Err(SignError::NoSecret);
    }
    let mut claims: Map<String, Value> = serde_json::from_str(claims).map_err(SignError::Claims)?;
    let now = unix_now();
    let ttl = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
    claims.insert("role".to_owned(), role.into());
    for (name, value) in [("iat", now), ("exp", now.saturating_add(ttl))] {
        claims.entry(name).or_insert(value.into());
    }
    sign(secret, &claims.into()).map_err(SignError::Sign)
}
