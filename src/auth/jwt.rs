//! A token's text → its parts → a verified token, or its fault.
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
//! | `exp`, `nbf`, `iat` with a fraction | rounded; of `iat` the fraction is cut off |
//! | a number beyond what a double holds, such as `1e400` | not a JWT |
//! | `iat` or `nbf` that is no number | not a JWT |
//! | `nbf` ahead by more than `auth.leeway` | not valid yet |
//! | `iat` ahead | nothing: `nbf` is for that |
//! | `role` missing, no text, empty, of more than 63 bytes, or with a control character | `role` and `exp` are required |
//! | `iss` missing, no text, or none of `auth.issuers`, if that is set | of another issuer |
//! | `aud` missing, neither a text nor a list of texts, or none of `auth.audiences`, if that is set | for another audience |
//! | `sub`, `session_id`, `jti` that is no text | as if it were missing |
//!
//! Of several faults the first in this order is reported: form, header, signature, types, `exp`,
//! `nbf`, `role`, `iss`, `aud`.
//!
//! Invariants: the time is an argument; nothing of a token is believed before its signature; no
//! token, secret or claim is ever formatted into an error or a log. The one exception is the `kid`,
//! which only the client that sent it gets back.

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

/// The parts of a token, none of which is verified yet.
pub(super) struct TokenParts<'a> {
    pub(super) header: Header,
    /// The signed text: the first two parts as they arrived.
    pub(super) signed: &'a str,
    /// The claims, decoded.
    pub(super) payload: Vec<u8>,
    /// The signature, in base64url.
    pub(super) signature: &'a str,
}

/// The members of a header that are read.
pub(super) struct Header {
    pub(super) algorithm: Algorithm,
    pub(super) kid: Option<Box<str>>,
}

impl<'a> TokenParts<'a> {
    /// Splits a token and decodes its header and its payload.
    ///
    /// # Errors
    /// [`TokenError::Malformed`], or [`TokenError::NoSigner`] for an unknown algorithm.
    pub(super) fn of(text: &'a str) -> Result<Self, TokenError> {
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let decode = |part| URL_SAFE_NO_PAD.decode(part);
        // A dot is not a base64 digit, so that a token of more than three parts fails here.
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
        let is_plain = members.get("b64").is_none_or(|value| *value == Value::Bool(true));
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

    /// Returns the `kid` without control characters, which a terminal might obey.
    pub(super) fn shown_kid(&self) -> Option<Box<str>> {
        let kid = self.kid.as_deref()?;
        Some(kid.chars().filter(|character| !character.is_control()).collect::<String>().into())
    }
}

/// A token whose signature has been verified. Its expiry must be checked at each use.
pub struct Token {
    text: Box<str>,
    /// The token's claims.
    pub claims: Claims,
    /// The key and the algorithm that have verified it.
    pub verified_by: VerifiedBy,
}

impl Token {
    pub(super) fn new(text: &str, claims: Claims, verified_by: VerifiedBy) -> Self {
        Self { text: text.into(), claims, verified_by }
    }

    /// Creates the token of an opaque key: it has a role and no other claim, and does not expire.
    /// With an empty text it stands for a client whose tokens have all expired.
    pub(super) fn opaque(text: &str, role: &str) -> Self {
        Self::new(text, Claims::of_role(role), VerifiedBy::OPAQUE)
    }

    /// The text of the token.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Returns the holder of the token, for the audit log.
    pub(crate) fn subject(&self) -> Subject<'_> {
        Subject { role: &self.claims.role, sub: self.claims.sub() }
    }

    /// Returns whether `text` is this token, letter by letter.
    #[must_use]
    pub fn is(&self, text: &str) -> bool {
        // An empty text stands for no token, which no client has sent.
        !self.text.is_empty() && *self.text == *text
    }

    /// Checks whether the token has expired at `now`, in seconds since 1970, by more than
    /// `allowance`.
    ///
    /// # Errors
    /// [`TokenError::Expired`] from `exp` plus `allowance` on.
    pub fn check_expiry(&self, now: i64, allowance: Duration) -> Result<(), TokenError> {
        check_expiry(self.claims.exp, now, allowance)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.claims.fmt(f)
    }
}
