//! Faults of tokens, and what a client is told of each.

use strum::{IntoStaticStr, VariantNames};

use crate::protocol::error_code::{ErrorCode, Refusal};

/// Why a token is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, VariantNames, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum TokenError {
    /// The request has no token.
    #[error("no token")]
    Missing,
    /// The token is not three parts of base64 with JSON in the first two.
    #[error("not a JWT")]
    Malformed,
    /// The signature is that of another key.
    #[error("signature does not match")]
    Signature,
    /// The gateway has no key for the algorithm and the `kid` of the header.
    #[error("no key for the token's algorithm")]
    NoSigner {
        /// The `kid` of the header, without control characters.
        kid: Option<Box<str>>,
    },
    /// `role` or `exp` is missing or has another type.
    #[error("`role` or `exp` is missing")]
    MissingClaims,
    /// `nbf` is in the future.
    #[error("not valid yet")]
    NotYetValid,
    /// `iss` is not one of `auth.issuers`.
    #[error("of another issuer")]
    Issuer,
    /// `aud` has none of `auth.audiences`.
    #[error("for another audience")]
    Audience,
    /// `exp` is over.
    #[error("expired {seconds} seconds ago")]
    Expired {
        /// The time since `exp`; at least 0.
        seconds: i64,
    },
    /// An operator has revoked the token.
    #[error("revoked")]
    Revoked,
    /// The token was verified once, and the key that signed it has been removed.
    #[error("its key has been taken away")]
    KeyGone,
}

impl TokenError {
    /// The fault's name in metrics and in the audit log.
    #[must_use]
    pub fn label(&self) -> &'static str {
        self.into()
    }

    /// Whether the token was valid before.
    #[must_use]
    pub fn is_end(&self) -> bool {
        match self {
            Self::Expired { .. } | Self::Revoked | Self::KeyGone => true,
            Self::Missing
            | Self::Malformed
            | Self::Signature
            | Self::NoSigner { .. }
            | Self::MissingClaims
            | Self::NotYetValid
            | Self::Issuer
            | Self::Audience => false,
        }
    }

    /// Returns the refusal for a channel: for an error reply and for a `system` push.
    #[must_use]
    pub fn refuse(&self) -> Refusal {
        match self {
            Self::Missing => Refusal::new(ErrorCode::MissingApiKey),
            Self::Malformed => Refusal::new(ErrorCode::MalformedJwt),
            Self::Signature | Self::KeyGone => Refusal::new(ErrorCode::JwtSignatureError),
            Self::NoSigner { kid: None } => Refusal::new(ErrorCode::JwtSignerError),
            Self::NoSigner { kid: Some(kid) } => Refusal::with_detail(
                ErrorCode::JwtSignerError,
                format!(
                    "Failed to generate JWT signer for key ID (kid) \"{kid}\", check your JWT secret or JWKS configuration"
                ),
            ),
            Self::MissingClaims => Refusal::new(ErrorCode::InvalidJwtToken),
            Self::NotYetValid => {
                Refusal::with_detail(ErrorCode::InvalidJwtToken, "Token is not valid yet")
            }
            Self::Issuer => {
                Refusal::with_detail(ErrorCode::InvalidJwtToken, "Token is of another issuer")
            }
            Self::Audience => {
                Refusal::with_detail(ErrorCode::InvalidJwtToken, "Token is for another audience")
            }
            Self::Expired { seconds } => Refusal::with_detail(
                ErrorCode::InvalidJwtToken,
                format!("Token has expired {seconds} seconds ago"),
            ),
            Self::Revoked => {
                Refusal::with_detail(ErrorCode::InvalidJwtToken, "Token has been revoked")
            }
        }
    }

    /// Returns the refusal of an upgrade.
    #[must_use]
    pub fn refuse_upgrade(&self) -> Refusal {
        match self {
            Self::Expired { .. } => {
                Refusal::with_detail(ErrorCode::InvalidJwtToken, "Token has expired")
            }
            Self::Missing
            | Self::Malformed
            | Self::Signature
            | Self::NoSigner { .. }
            | Self::MissingClaims
            | Self::NotYetValid
            | Self::Issuer
            | Self::Audience
            | Self::Revoked
            | Self::KeyGone => self.refuse(),
        }
    }
}
