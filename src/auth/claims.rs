//! The claims of a verified token, and the demands on them.

use std::{fmt, time::Duration};

use serde_json::{Map, Value};

use super::{error::TokenError, json};

/// Longest name of a Postgres role, in bytes.
const ROLE_BYTES_MAX: usize = 63;

/// The demands on the claims of every token.
#[derive(Debug, Default)]
pub(super) struct Demands {
    /// How much `exp` and `nbf` may be off when a token is first verified.
    pub(super) leeway: Duration,
    /// `iss` must be one of these; an empty list accepts every issuer.
    pub(super) issuers: Vec<String>,
    /// `aud` must contain one of these; an empty list accepts every audience.
    pub(super) audiences: Vec<String>,
}

/// The claims of a verified token.
#[derive(Clone, PartialEq)]
pub struct Claims {
    /// The Postgres role: `anon`, `authenticated`, `service_role`.
    pub role: Box<str>,
    /// The end of the token, in seconds since 1970.
    pub exp: i64,
    all: Map<String, Value>,
}

impl Claims {
    /// The claims of an opaque key: a role and no end.
    pub(super) fn of_role(role: &str) -> Self {
        Self { role: role.into(), exp: i64::MAX, all: Map::new() }
    }

    /// Reads the claims of a token whose signature has been verified. `exp` may be over by
    /// `allowance`.
    ///
    /// # Errors
    /// [`TokenError`], in the order of the table of [`super::jwt`].
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
            name.as_str().is_some_and(|name| names.iter().any(|known| known == name))
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

    /// The subject: the person whose token it is.
    #[must_use]
    pub fn sub(&self) -> Option<&str> {
        self.at("sub").as_str()
    }

    /// The session, which begins with a sign-in.
    #[must_use]
    pub fn session_id(&self) -> Option<&str> {
        self.at("session_id").as_str()
    }

    /// The identifier of the token.
    #[must_use]
    pub fn jti(&self) -> Option<&str> {
        self.at("jti").as_str()
    }

    /// The second in which the token was issued, since 1970. A fraction is cut off and not rounded: a
    /// revocation is known to the second as well, and rounded up a token that was issued before it
    /// would seem to be issued after.
    #[must_use]
    pub fn iat(&self) -> Option<i64> {
        #[expect(clippy::cast_possible_truncation, reason = "the cast saturates, as intended")]
        let second = self.all.get("iat")?.as_f64()?.floor() as i64;
        Some(second)
    }

    /// Returns all claims as a JSON object; those of an opaque key are its role alone.
    pub(crate) fn json(&self) -> String {
        let mut all = self.all.clone();
        all.entry("role").or_insert_with(|| Value::from(&*self.role));
        Value::Object(all).to_string()
    }

    fn at(&self, name: &str) -> &Value {
        self.all.get(name).unwrap_or(&Value::Null)
    }

    /// Returns the text at this path, if there is one.
    pub fn text_at(&self, path: impl Iterator<Item = String>) -> Option<&str> {
        let mut path = path;
        let first = self.all.get(&path.next()?)?;
        path.try_fold(first, |value, key| value.get(&key))?.as_str()
    }
}

impl TryFrom<Map<String, Value>> for Claims {
    type Error = TokenError;

    /// Accepts the claims if `role` may name a Postgres role and `exp` is a number; decimals are
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

/// Returns a claim that is a time, rounded, in seconds since 1970.
fn seconds(claims: &Map<String, Value>, name: &str) -> Option<i64> {
    let time = claims.get(name)?.as_f64()?;
    #[expect(clippy::cast_possible_truncation, reason = "the cast saturates, as intended")]
    let time = time.round() as i64;
    Some(time)
}

/// Checks that `exp` is not over by `allowance` or more.
///
/// # Errors
/// [`TokenError::Expired`].
pub(super) fn check_expiry(exp: i64, now: i64, allowance: Duration) -> Result<(), TokenError> {
    let seconds = now.saturating_sub(exp);
    let allowance = i64::try_from(allowance.as_secs()).unwrap_or(i64::MAX);
    if seconds < allowance { Ok(()) } else { Err(TokenError::Expired { seconds }) }
}
