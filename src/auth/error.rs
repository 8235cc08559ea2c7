//! Why a token opens nothing.

use crate::protocol::error_code::{ErrorCode, Refusal};

/// Why a token opens nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// There is none.
    #[error("no token")]
    Missing,
    /// It is not three parts of base64 with JSON in them.
    #[error("not a JWT")]
    Malformed,
    /// Another key has signed it.
    #[error("signature does not match")]
    Signature,
    /// We have no key for the algorithm that its header names.
    #[error("no key for the token's algorithm")]
    NoSigner {
        /// The header's `kid`, cut to what may be shown.
        kid: Option<Box<str>>,
    },
    /// `role` or `exp` is missing or of another type.
    #[error("`role` or `exp` is missing")]
    MissingClaims,
    /// It is not good before `nbf`.
    #[error("not valid yet")]
    NotYetValid,
    /// `iss` is none of those that the settings name.
    #[error("of another issuer")]
    Issuer,
    /// `aud` is none of those that the settings name.
    #[error("for another audience")]
    Audience,
    /// It was good until `exp`.
    #[error("expired {seconds} seconds ago")]
    Expired {
        /// Since then; at least 0.
        seconds: i64,
    },
    /// An operator has revoked it.
    #[error("revoked")]
    Revoked,
    /// It was verified once, and the key that signed it has been taken away.
    #[error("its key has been taken away")]
    KeyGone,
}

impl TokenError {
    /// The metric's label.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::Signature => "signature",
            Self::NoSigner { .. } => "no_signer",
            Self::MissingClaims => "missing_claims",
            Self::NotYetValid => "not_yet_valid",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Expired { .. } => "expired",
            Self::Revoked => "revoked",
            Self::KeyGone => "key_gone",
        }
    }

    /// Whether the token was good and is no more.
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

    /// Every label that [`Self::kind`] gives.
    pub const KINDS: [&'static str; 11] = [
        "missing",
        "malformed",
        "signature",
        "no_signer",
        "missing_claims",
        "not_yet_valid",
        "issuer",
        "audience",
        "expired",
        "revoked",
        "key_gone",
    ];

    /// What the client is told in a channel: in an error reply and in a `system` push.
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

    /// What the client is told when its upgrade is refused.
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
