//! What a token says, or why it opens nothing.
//!
//! Invariants: time is an argument; no token, secret or claim is ever formatted into an error or a
//! log.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use crate::protocol::error_code::{ErrorCode, Refusal};

/// The claims of a verified token.
#[derive(Clone, PartialEq)]
pub struct Claims {
    /// The Postgres role: `anon`, `authenticated`, `service_role`.
    pub role: Box<str>,
    /// When the token ends, in seconds since 1970.
    pub exp: i64,
    all: Map<String, Value>,
}

impl Claims {
    /// The string at this path, if there is one.
    pub fn text_at(&self, path: impl Iterator<Item = String>) -> Option<&str> {
        let mut path = path;
        let first = self.all.get(&path.next()?)?;
        path.try_fold(first, |value, key| value.get(&key))?.as_str()
    }
}

impl TryFrom<Map<String, Value>> for Claims {
    type Error = TokenError;

    /// Takes the claims if `role` is a string and `exp` a number; decimals are rounded.
    fn try_from(all: Map<String, Value>) -> Result<Self, TokenError> {
        let role = all.get("role").and_then(Value::as_str).ok_or(TokenError::MissingClaims)?.into();
        let exp = all.get("exp").and_then(Value::as_f64).ok_or(TokenError::MissingClaims)?;
        #[expect(clippy::cast_possible_truncation, reason = "saturates, which is what is meant")]
        let exp = exp.round() as i64;
        Ok(Self { role, exp, all })
    }
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claims").field("role", &self.role).field("exp", &self.exp).finish()
    }
}

/// A token whose signature has been verified. That it has not expired must be asked each time.
pub struct Token {
    text: Box<str>,
    /// What it says.
    pub claims: Claims,
}

impl Token {
    /// A token that has been verified.
    pub(super) fn new(text: &str, claims: Claims) -> Self {
        Self { text: text.into(), claims }
    }

    /// The token itself, to know it again.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// A token that is no JWT, says nothing but the role, and does not end.
    pub(super) fn of_role(role: &str) -> Self {
        let claims = Claims { role: role.into(), exp: i64::MAX, all: Map::new() };
        Self { text: "".into(), claims }
    }

    /// Whether this is the same token, to the letter.
    #[must_use]
    pub fn is(&self, text: &str) -> bool {
        *self.text == *text
    }

    /// Whether the token still holds at `now`, in seconds since 1970.
    ///
    /// # Errors
    /// [`TokenError::Expired`] from the second of `exp` on.
    pub fn check_expiry(&self, now: i64) -> Result<(), TokenError> {
        let seconds = now.saturating_sub(self.claims.exp);
        if seconds < 0 { Ok(()) } else { Err(TokenError::Expired { seconds }) }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.claims.fmt(f)
    }
}

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
    /// It was good until `exp`.
    #[error("expired {seconds} seconds ago")]
    Expired {
        /// Since then; at least 0.
        seconds: i64,
    },
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
            Self::Expired { .. } => "expired",
        }
    }

    /// Whether the token was good and is no more.
    #[must_use]
    pub fn is_end(&self) -> bool {
        match self {
            Self::Expired { .. } => true,
            Self::Missing
            | Self::Malformed
            | Self::Signature
            | Self::NoSigner { .. }
            | Self::MissingClaims => false,
        }
    }

    /// Every label that [`Self::kind`] gives.
    pub const KINDS: [&'static str; 6] =
        ["missing", "malformed", "signature", "no_signer", "missing_claims", "expired"];

    /// What the client is told in a channel: in an error reply and in a `system` push.
    #[must_use]
    pub fn refuse(&self) -> Refusal {
        match self {
            Self::Missing => Refusal::new(ErrorCode::MissingApiKey),
            Self::Malformed => Refusal::new(ErrorCode::MalformedJwt),
            Self::Signature => Refusal::new(ErrorCode::JwtSignatureError),
            Self::NoSigner { kid: None } => Refusal::new(ErrorCode::JwtSignerError),
            Self::NoSigner { kid: Some(kid) } => Refusal::with_detail(
                ErrorCode::JwtSignerError,
                format!(
                    "Failed to generate JWT signer for key ID (kid) \"{kid}\", check your JWT secret or JWKS configuration"
                ),
            ),
            Self::MissingClaims => Refusal::new(ErrorCode::InvalidJwtToken),
            Self::Expired { seconds } => Refusal::with_detail(
                ErrorCode::InvalidJwtToken,
                format!("Token has expired {seconds} seconds ago"),
            ),
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
            | Self::MissingClaims => self.refuse(),
        }
    }
}

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
