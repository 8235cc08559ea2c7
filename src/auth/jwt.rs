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
    algorithm::{Algorithm, VerifiedBy},
    claims::{Claims, check_expiry},
    error::TokenError,
    json,
    jwk::KID_BYTES_MAX,
};
use crate::telemetry::audit::Subject;

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

    /// The holder of the token, for the audit log.
    pub(crate) fn subject(&self) -> Subject<'_> {
        Subject { role: &self.claims.role, sub: self.claims.sub() }
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
