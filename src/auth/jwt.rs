//! Token → claims, or why not. The only file that names `jsonwebtoken`.
//!
//! Invariants: the algorithm is bound to the key (HS256), a token's header only has to agree;
//! a signature is checked before any claim is read; time is an argument; no token, secret or
//! claim is ever formatted into an error or a log.

use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode,
    errors::ErrorKind,
};
use parking_lot::Mutex;
use serde_json::{Map, Value};

use crate::protocol::{
    error_code::{ErrorCode, Refusal},
    payload::OPAQUE_KEY_PREFIX,
};

/// Most verified tokens that are remembered; 10,000 viewers share one anon key.
const REMEMBERED_MAX: usize = 16_384;
/// Between two looks for remembered tokens that nobody holds, seconds.
const FORGET_INTERVAL: i64 = 1;

/// A secret of the settings; its `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Whether it was not set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `text` is the secret, asked in constant time; an unset secret is nothing.
    #[must_use]
    pub fn is(&self, text: &str) -> bool {
        let (given, wanted) = (text.as_bytes(), self.0.as_bytes());
        let differ = given.iter().zip(wanted).fold(0, |differ, (a, b)| differ | (a ^ b));
        !wanted.is_empty() && given.len() == wanted.len() && differ == 0
    }

    /// The secret itself, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<hidden>")
    }
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
    /// A token that is no JWT, says nothing but the role, and does not end.
    fn of_role(role: &str) -> Self {
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
        let token = Arc::new(Token { text: text.into(), claims: all.try_into()? });
        self.remember(&token, now);
        Ok(token)
    }

    fn remember(&self, token: &Arc<Token>, now: i64) {
        let mut remembered = self.remembered.lock();
        let is_due = remembered.forgotten_at.saturating_add(FORGET_INTERVAL) <= now;
        if remembered.tokens.len() >= REMEMBERED_MAX && is_due {
            remembered.forgotten_at = now;
            remembered.tokens.retain(|_, token| Arc::strong_count(token) > 1);
        }
        if remembered.tokens.len() < REMEMBERED_MAX {
            remembered.tokens.insert(token.text.clone(), Arc::clone(token));
        }
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

/// Signs `claims` with HS256, for the `token` command, the demo and tests.
///
/// # Errors
/// [`TokenError::NoSigner`] if the secret cannot sign.
pub fn sign(secret: &Secret, claims: &Value) -> Result<String, TokenError> {
    let key = EncodingKey::from_secret(secret.expose().as_bytes());
    encode(&Header::new(Algorithm::HS256), claims, &key)
        .map_err(|_no_reason_to_tell| TokenError::NoSigner { kid: None })
}

/// Why a token cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// No secret, no tokens.
    #[error("jwt_secret is not set: set TIDEGATE_JWT_SECRET to the project's JWT secret")]
    NoSecret,
    /// The further claims are not an object.
    #[error("the claims are not a JSON object")]
    Claims(#[source] serde_json::Error),
    /// The library refuses.
    #[error("the secret cannot sign")]
    Sign(#[source] TokenError),
}

/// A token for `role` with further `claims`, a JSON object, that holds for `ttl`.
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

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
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
    use serde_json::json;

    use super::*;

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
