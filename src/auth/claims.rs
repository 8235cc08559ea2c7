//! What a verified token says: its claims, and the demands on them.

use std::{fmt, time::Duration};

use serde_json::{Map, Value};

use super::{error::TokenError, json};

/// Longest name of a Postgres role.
const ROLE_BYTES_MAX: usize = 63;

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
    pub(super) all: Map<String, Value>,
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

/// A time among the claims, rounded, in seconds since 1970.
fn seconds(claims: &Map<String, Value>, name: &str) -> Option<i64> {
    let time = claims.get(name)?.as_f64()?;
    #[expect(clippy::cast_possible_truncation, reason = "saturates, which is what is meant")]
    let time = time.round() as i64;
    Some(time)
}

pub(super) fn check_expiry(exp: i64, now: i64, allowance: Duration) -> Result<(), TokenError> {
    let seconds = now.saturating_sub(exp);
    let allowance = i64::try_from(allowance.as_secs()).unwrap_or(i64::MAX);
    if seconds < allowance { Ok(()) } else { Err(TokenError::Expired { seconds }) }
}
