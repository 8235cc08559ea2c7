//! Token → claims, or why not.
//!
//! Invariants: the algorithm is bound to the key (HS256), a token's header only has to agree;
//! a signature is checked before any claim is read.

use std::{collections::HashMap, fmt, sync::Arc};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, errors::ErrorKind};
use parking_lot::Mutex;
use serde_json::{Map, Value};

use super::{
    jwt::{Token, TokenError},
    secret::Secret,
};
use crate::protocol::payload::OPAQUE_KEY_PREFIX;

/// Most verified tokens that are remembered; 10,000 viewers share one anon key.
const REMEMBERED_MAX: usize = 16_384;
/// Between two looks for remembered tokens that nobody holds, seconds.
const FORGET_INTERVAL: i64 = 1;

#[derive(Default)]
struct Remembered {
    tokens: HashMap<Box<str>, Arc<Token>>,
    /// When those that nobody holds were last forgotten, in seconds since 1970.
    forgotten_at: i64,
}

/// Verifies tokens with the project's key.
pub struct Verifier {
    key: DecodingKey,
    validation: Validation,
    token_bytes_max: usize,
    /// Tokens whose signature has been verified, so that one anon key is parsed and kept once.
    /// At the bound those that nobody holds are forgotten; if all are held, the next is not kept.
    remembered: Mutex<Remembered>,
    /// Keys that are no JWTs, and the tokens that they stand for.
    opaque: Vec<(Secret, Arc<Token>)>,
    anonymous: Arc<Token>,
}

impl Verifier {
    /// Checks HS256 signatures with `secret`; tokens longer than `token_bytes_max` are no JWTs.
    #[must_use]
    pub fn new(secret: &Secret, token_bytes_max: usize) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        // Claims are read here, in one place and with the reference server's answers.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        Self {
            key: DecodingKey::from_secret(secret.expose().as_bytes()),
            validation,
            token_bytes_max,
            remembered: Mutex::default(),
            opaque: Vec::new(),
            anonymous: Arc::new(Token::of_role("anon")),
        }
    }

    /// Takes `key`, which begins with `sb_`, for a token of this role; an empty key is none.
    #[must_use]
    pub fn with_opaque_key(mut self, key: &Secret, role: &str) -> Self {
        if !key.is_empty() {
            self.opaque.push((key.clone(), Arc::new(Token::of_role(role))));
        }
        self
    }

    /// What is left of somebody whose tokens have all expired: the role `anon`, no claims.
    #[must_use]
    pub fn anonymous(&self) -> &Arc<Token> {
        &self.anonymous
    }

    /// The token's claims, if it is signed by our key and has not expired at `now`.
    ///
    /// # Errors
    /// [`TokenError`]; signature before expiry before claims.
    pub fn verify(&self, text: &str, now: i64) -> Result<Arc<Token>, TokenError> {
        if text.starts_with(OPAQUE_KEY_PREFIX) {
            let known = self.opaque.iter().find(|(key, _)| key.is(text));
            return known.map(|(_, token)| Arc::clone(token)).ok_or(TokenError::Malformed);
        }
        let remembered = self.remembered.lock().tokens.get(text).cloned();
        if let Some(token) = remembered {
            token.check_expiry(now)?;
            return Ok(token);
        }
        if text.len() > self.token_bytes_max {
            return Err(TokenError::Malformed);
        }
        let all = decode::<Map<String, Value>>(text, &self.key, &self.validation)
            .map_err(|error| classify(text, error.kind()))?
            .claims;
        if all.get("iat").is_some_and(|iat| !iat.is_number()) {
            return Err(TokenError::Malformed);
        }
        if let Some(exp) = all.get("exp").and_then(Value::as_f64) {
            #[expect(clippy::cast_possible_truncation, reason = "saturates, which is meant")]
            let seconds = now.saturating_sub(exp.round() as i64);
            if seconds >= 0 {
                return Err(TokenError::Expired { seconds });
            }
        }
        let token = Arc::new(Token::new(text, all.try_into()?));
        self.remember(&token, now);
        Ok(token)
    }

    /// The token, if it would still be verified.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn recheck(&self, token: &Arc<Token>, now: i64) -> Result<Arc<Token>, TokenError> {
        token.check_expiry(now)?;
        Ok(Arc::clone(token))
    }

    fn remember(&self, token: &Arc<Token>, now: i64) {
        let mut remembered = self.remembered.lock();
        let is_due = remembered.forgotten_at.saturating_add(FORGET_INTERVAL) <= now;
        if remembered.tokens.len() >= REMEMBERED_MAX && is_due {
            remembered.forgotten_at = now;
            remembered.tokens.retain(|_, token| Arc::strong_count(token) > 1);
        }
        if remembered.tokens.len() < REMEMBERED_MAX {
            remembered.tokens.insert(token.text().into(), Arc::clone(token));
        }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

fn classify(text: &str, error: &ErrorKind) -> TokenError {
    match error {
        ErrorKind::InvalidSignature => TokenError::Signature,
        ErrorKind::InvalidAlgorithm
        | ErrorKind::InvalidAlgorithmName
        | ErrorKind::UnsupportedAlgorithm => TokenError::NoSigner { kid: kid(text) },
        // A header whose algorithm is no name that the library knows fails as JSON.
        _ if is_jwt_shaped(text) && decode_header(text).is_err() => {
            TokenError::NoSigner { kid: None }
        }
        _ => TokenError::Malformed,
    }
}

/// The header's `kid`, cut: it is the client's own text and goes back to the client only.
fn kid(text: &str) -> Option<Box<str>> {
    let kid = decode_header(text).ok()?.kid?;
    Some(kid.chars().filter(|c| !c.is_control()).take(64).collect::<String>().into())
}

/// Three parts, the first of which begins as a JSON object in base64 does.
fn is_jwt_shaped(text: &str) -> bool {
    text.split('.').count() == 3 && text.starts_with("ey")
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;
    use crate::auth::sign::sign;

    const NOW: i64 = 1_800_000_000;

    fn verify(claims: &Value) -> Result<Arc<Token>, TokenError> {
        let secret = Secret::from("a-secret-that-is-long-enough-to-sign");
        let token = sign(&secret, claims).unwrap();
        Verifier::new(&secret, 8192).verify(&token, NOW)
    }

    #[test]
    fn a_token_holds_until_the_second_of_its_expiry() {
        assert!(verify(&json!({ "role": "anon", "exp": NOW + 1 })).is_ok());
        let expired = verify(&json!({ "role": "anon", "exp": NOW })).unwrap_err();
        assert_eq!(expired, TokenError::Expired { seconds: 0 });
    }

    #[test]
    fn role_and_exp_must_be_there_and_of_their_types() {
        for claims in [
            json!({ "role": "anon" }),
            json!({ "exp": NOW + 9 }),
            json!({ "role": "anon", "exp": "1900000000" }),
            json!({ "role": 1, "exp": NOW + 9 }),
            json!({ "role": null, "exp": NOW + 9 }),
        ] {
            assert_eq!(verify(&claims).unwrap_err(), TokenError::MissingClaims, "{claims}");
        }
        assert_eq!(
            verify(&json!({ "role": "anon", "exp": NOW as f64 + 0.6 })).unwrap().claims.exp,
            NOW + 1
        );
    }

    #[test]
    fn an_audience_or_a_missing_subject_changes_nothing() {
        assert!(verify(&json!({ "role": "authenticated", "aud": "authenticated", "sub": "x", "exp": NOW + 9 })).is_ok());
    }

    #[test]
    fn another_key_another_algorithm_and_no_token_are_told_apart() {
        let verifier = Verifier::new(&Secret::from("right"), 8192);
        let claims = json!({ "role": "anon", "exp": NOW + 9 });
        let forged = sign(&Secret::from("wrong"), &claims).unwrap();
        assert_eq!(verifier.verify(&forged, NOW).unwrap_err(), TokenError::Signature);
        let hs512 = encode(
            &Header { kid: Some("k1".to_owned()), ..Header::new(Algorithm::HS512) },
            &claims,
            &EncodingKey::from_secret(b"right"),
        )
        .unwrap();
        let error = verifier.verify(&hs512, NOW).unwrap_err();
        assert_eq!(error, TokenError::NoSigner { kid: Some("k1".into()) });
        // {"alg":"none","typ":"JWT"}
        let body = forged.split('.').nth(1).unwrap();
        let none = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}.");
        assert_eq!(verifier.verify(&none, NOW).unwrap_err(), TokenError::NoSigner { kid: None });
        for text in ["", "garbage", "a.b.c", "a.b", "ey.ey"] {
            assert_eq!(verifier.verify(text, NOW).unwrap_err(), TokenError::Malformed, "{text}");
        }
    }

    #[test]
    fn an_opaque_key_stands_for_its_role_and_an_unknown_one_for_nothing() {
        let verifier = Verifier::new(&Secret::from("right"), 8192)
            .with_opaque_key(&Secret::from("sb_publishable_a"), "anon")
            .with_opaque_key(&Secret::from("sb_secret_b"), "service_role")
            .with_opaque_key(&Secret::default(), "nobody");
        let role = |key| verifier.verify(key, NOW).map(|token| token.claims.role.to_string());
        assert_eq!(role("sb_publishable_a").unwrap(), "anon");
        assert_eq!(role("sb_secret_b").unwrap(), "service_role");
        for key in ["sb_", "sb_secret_", "sb_secret_bb", "sb_publishable_b"] {
            assert_eq!(role(key).unwrap_err(), TokenError::Malformed, "{key}");
        }
    }

    #[test]
    fn a_token_above_the_bound_is_not_looked_at() {
        let secret = Secret::from("right");
        let token = sign(&secret, &json!({ "role": "anon", "exp": NOW + 9 })).unwrap();
        assert!(Verifier::new(&secret, token.len()).verify(&token, NOW).is_ok());
        let error = Verifier::new(&secret, token.len() - 1).verify(&token, NOW).unwrap_err();
        assert_eq!(error, TokenError::Malformed);
    }

    #[test]
    fn a_remembered_token_still_expires() {
        let secret = Secret::from("right");
        let token = sign(&secret, &json!({ "role": "anon", "exp": NOW + 9 })).unwrap();
        let verifier = Verifier::new(&secret, 8192);
        assert!(verifier.verify(&token, NOW).is_ok());
        assert_eq!(
            verifier.verify(&token, NOW + 10).unwrap_err(),
            TokenError::Expired { seconds: 1 }
        );
    }
}
