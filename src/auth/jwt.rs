//! A token's text → its parts → its claims, or why it opens nothing.
//!
//! | a token says | the answer |
//! |---|---|
//! | anything but three parts of unpadded base64url with JSON objects in the first two; a member twice, at any depth; more bytes than `limits.token_bytes_max` | not a JWT |
//! | `alg` missing, no text, `none`, or any other name than ours to the letter | no signer |
//! | `kid` of more than 128 bytes | no signer; of another type than text or null: not a JWT |
//! | `crit`, whatever it lists; `b64` other than true | not a JWT: we understand no extension (RFC 7515, 4.1.11) |
//! | `typ`, `cty`, `jku`, `jwk`, `x5u`, `x5c`, `x5t` and all else in a header | nothing: it is not read |
//! | `exp` missing, or a text, null, a boolean, a list, an object | `role` and `exp` are required |
//! | `exp` negative, zero or past by `auth.leeway` | expired |
//! | `exp`, `nbf`, `iat` with a fraction | rounded |
//! | a number beyond what a double holds, such as `1e400` | not a JWT |
//! | `iat` or `nbf` that is no number | not a JWT |
//! | `nbf` ahead by more than `auth.leeway` | not valid yet |
//! | `iat` ahead | nothing: `nbf` is for that |
//! | `role` missing, no text, empty, of more than 63 bytes, or with a control character | `role` and `exp` are required |
//! | `iss` missing, no text, or none of `auth.issuers`, if that is set | of another issuer |
//! | `aud` missing, neither a text nor a list of texts, or none of `auth.audiences`, if that is set | for another audience |
//! | `sub`, `session_id`, `jti` that is no text | as if it were missing |
//!
//! Of several faults the first in this order is told: form, header, signature, types, `exp`, `nbf`,
//! `role`, `iss`, `aud`.
//!
//! Invariants: time is an argument; nothing of a token is believed before its signature; no token,
//! secret or claim is ever formatted into an error or a log, but the client's own `kid` to itself.

use std::{fmt, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::{
    json,
    keys::{Algorithm, KID_BYTES_MAX, VerifiedBy},
};
use crate::protocol::error_code::{ErrorCode, Refusal};

/// Longest name of a Postgres role.
const ROLE_BYTES_MAX: usize = 63;

/// A token taken apart; nothing of it is believed.
pub(super) struct Parts<'a> {
    pub(super) header: Header,
    /// What the signature is of: the first two parts as they came.
    pub(super) signed: &'a str,
    /// The claims, decoded.
    pub(super) payload: Vec<u8>,
    /// In base64url.
    pub(super) signature: &'a str,
}

/// The part of a header that is read.
pub(super) struct Header {
    pub(super) algorithm: Algorithm,
    pub(super) kid: Option<Box<str>>,
}

impl<'a> Parts<'a> {
    /// Takes a token apart.
    ///
    /// # Errors
    /// [`TokenError::Malformed`], or [`TokenError::NoSigner`] for an algorithm that is none.
    pub(super) fn of(text: &'a str) -> Result<Self, TokenError> {
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let decode = |part| URL_SAFE_NO_PAD.decode(part);
        // A dot is no digit, so that a fourth part fails here.
        let (Ok(header), Ok(payload), Ok(_)) = (decode(header), decode(payload), decode(signature))
        else {
            return Err(TokenError::Malformed);
        };
        let header = json::object(&header).ok_or(TokenError::Malformed)?;
        Ok(Self { header: Header::read(&header)?, signed, payload, signature })
    }
}

impl Header {
    fn read(members: &Map<String, Value>) -> Result<Self, TokenError> {
        let is_plain = members.get("b64").is_none_or(|it| *it == Value::Bool(true));
        if members.contains_key("crit") || !is_plain {
            return Err(TokenError::Malformed);
        }
        let kid = match members.get("kid") {
            None | Some(Value::Null) => None,
            Some(Value::String(kid)) if kid.len() <= KID_BYTES_MAX => Some(kid.as_str().into()),
            Some(Value::String(_)) => return Err(TokenError::NoSigner { kid: None }),
            Some(_) => return Err(TokenError::Malformed),
        };
        let algorithm = members.get("alg").and_then(Value::as_str).and_then(Algorithm::named);
        let algorithm = algorithm.ok_or(TokenError::NoSigner { kid: None })?;
        Ok(Self { algorithm, kid })
    }

    /// The `kid` without what a terminal or a page might take for more than text.
    pub(super) fn shown_kid(&self) -> Option<Box<str>> {
        let kid = self.kid.as_deref()?;
        Some(kid.chars().filter(|it| !it.is_control()).collect::<String>().into())
    }
}

/// What is asked of every token's claims.
#[derive(Debug, Default)]
pub(super) struct Demands {
    /// By so much `exp` and `nbf` may be missed at the first look.
    pub(super) leeway: Duration,
    /// One of them must be `iss`, if there are any.
    pub(super) issuers: Vec<String>,
    /// One of them must be in `aud`, if there are any.
    pub(super) audiences: Vec<String>,
}

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
    /// Reads the claims of a token whose signature is right, and which has not ended, or has up to
    /// `allowance` ago.
    ///
    /// # Errors
    /// [`TokenError`], in the order that this file's table gives.
    pub(super) fn read(
        payload: &[u8],
        demands: &Demands,
        now: i64,
        allowance: Duration,
    ) -> Result<Self, TokenError> {
        let all = json::object(payload).ok_or(TokenError::Malformed)?;
        for name in ["iat", "nbf"] {
            if all.get(name).is_some_and(|time| !time.is_number()) {
                return Err(TokenError::Malformed);
            }
        }
        if let Some(exp) = seconds(&all, "exp") {
            check_expiry(exp, now, allowance)?;
        }
        let leeway = i64::try_from(demands.leeway.as_secs()).unwrap_or(i64::MAX);
        if seconds(&all, "nbf").is_some_and(|nbf| nbf > now.saturating_add(leeway)) {
            return Err(TokenError::NotYetValid);
        }
        let claims = Self::try_from(all)?;
        let is_of = |names: &[String], name: &Value| {
            name.as_str().is_some_and(|it| names.iter().any(|name| name == it))
        };
        if !demands.issuers.is_empty() && !is_of(&demands.issuers, claims.at("iss")) {
            return Err(TokenError::Issuer);
        }
        let audiences = match claims.at("aud") {
            Value::Array(list) if list.iter().all(Value::is_string) => list,
            one => std::slice::from_ref(one),
        };
        let is_meant = || audiences.iter().any(|name| is_of(&demands.audiences, name));
        if !demands.audiences.is_empty() && !is_meant() {
            return Err(TokenError::Audience);
        }
        Ok(claims)
    }

    /// Whose token it is.
    #[must_use]
    pub fn sub(&self) -> Option<&str> {
        self.at("sub").as_str()
    }

    /// The sign-in that it comes from.
    #[must_use]
    pub fn session_id(&self) -> Option<&str> {
        self.at("session_id").as_str()
    }

    /// The token's own name.
    #[must_use]
    pub fn jti(&self) -> Option<&str> {
        self.at("jti").as_str()
    }

    /// When it was made, in seconds since 1970.
    #[must_use]
    pub fn iat(&self) -> Option<i64> {
        seconds(&self.all, "iat")
    }

    /// All claims as a JSON object; those of a key that is no JWT are its role alone.
    pub(crate) fn json(&self) -> String {
        let mut all = self.all.clone();
        all.entry("role").or_insert_with(|| Value::from(&*self.role));
        Value::Object(all).to_string()
    }

    fn at(&self, name: &str) -> &Value {
        self.all.get(name).unwrap_or(&Value::Null)
    }

    /// The string at this path, if there is one.
    pub fn text_at(&self, path: impl Iterator<Item = String>) -> Option<&str> {
        let mut path = path;
        let first = self.all.get(&path.next()?)?;
        path.try_fold(first, |value, key| value.get(&key))?.as_str()
    }
}

impl TryFrom<Map<String, Value>> for Claims {
    type Error = TokenError;

    /// Takes the claims if `role` may name a Postgres role and `exp` is a number; decimals are
    /// rounded.
    fn try_from(all: Map<String, Value>) -> Result<Self, TokenError> {
        let role = all.get("role").and_then(Value::as_str).filter(|role| {
            (1..=ROLE_BYTES_MAX).contains(&role.len()) && !role.contains(char::is_control)
        });
        let role = role.ok_or(TokenError::MissingClaims)?.into();
        let exp = seconds(&all, "exp").ok_or(TokenError::MissingClaims)?;
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
    /// What has shown that it is genuine.
    pub verified_by: VerifiedBy,
}

impl Token {
    pub(super) fn new(text: &str, claims: Claims, verified_by: VerifiedBy) -> Self {
        Self { text: text.into(), claims, verified_by }
    }

    /// An opaque key: it says nothing but the role, and does not end. Without a text, what is left
    /// of somebody who has none.
    pub(super) fn opaque(text: &str, role: &str) -> Self {
        let claims = Claims { role: role.into(), exp: i64::MAX, all: Map::new() };
        Self::new(text, claims, VerifiedBy::OPAQUE)
    }

    /// The token itself, to know it again.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether this is the same token, to the letter.
    #[must_use]
    pub fn is(&self, text: &str) -> bool {
        // Who has none has not sent an empty one.
        !self.text.is_empty() && *self.text == *text
    }

    /// Whether the token still holds at `now`, in seconds since 1970, or has ended so lately that
    /// it is let pass.
    ///
    /// # Errors
    /// [`TokenError::Expired`] from the second of `exp` and `allowance` on.
    pub fn check_expiry(&self, now: i64, allowance: Duration) -> Result<(), TokenError> {
        check_expiry(self.claims.exp, now, allowance)
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

/// A time among the claims, rounded, in seconds since 1970.
fn seconds(claims: &Map<String, Value>, name: &str) -> Option<i64> {
    let time = claims.get(name)?.as_f64()?;
    #[expect(clippy::cast_possible_truncation, reason = "saturates, which is what is meant")]
    let time = time.round() as i64;
    Some(time)
}

fn check_expiry(exp: i64, now: i64, allowance: Duration) -> Result<(), TokenError> {
    let seconds = now.saturating_sub(exp);
    let allowance = i64::try_from(allowance.as_secs()).unwrap_or(i64::MAX);
    if seconds < allowance { Ok(()) } else { Err(TokenError::Expired { seconds }) }
}
