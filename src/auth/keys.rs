//! The keys that tokens are verified with: the project's secrets and the keys of key sets.
//!
//! Invariants: a token's header only selects among these keys, and keys or addresses in it (`jwk`,
//! `jku`, `x5u`, `x5c`) are not read; a public key is found by its `kid` alone, and there is no
//! other to fall back to. Nothing here does I/O, and no key is ever formatted.

use std::collections::HashMap;

use super::{
    algorithm::{KeySlot, VerifiedBy},
    error::TokenError,
    jwk::{Key, PublishedKeys},
    jwt::Header,
};
use crate::secret::Secret;

/// All keys at one time.
pub(super) struct KeySet {
    current: Option<Key>,
    previous: Option<Key>,
    published: HashMap<Box<str>, Key>,
}

impl KeySet {
    /// Collects the secrets that are set, and the keys of both documents. Of two keys with one `kid`
    /// the file's is used, which the operator controls directly.
    pub(super) fn new(secrets: [&Secret; 2], file: &PublishedKeys, url: &PublishedKeys) -> Self {
        let [current, previous] = secrets
            .map(|secret| (!secret.is_empty()).then(|| Key::of_secret(secret.expose().as_bytes())));
        let mut published = url.keys.clone();
        published.extend(file.keys.clone());
        Self { current, previous, published }
    }

    /// Returns the key that has signed `signed`.
    ///
    /// A symmetric algorithm is tried with the symmetric key that `kid` names in a document, or else
    /// with the project's secrets; any other algorithm with the key of that `kid`.
    ///
    /// # Errors
    /// [`TokenError::NoSigner`] if there is no key to try, else [`TokenError::Signature`].
    pub(super) fn verify(
        &self,
        header: &Header,
        signed: &str,
        signature: &str,
    ) -> Result<VerifiedBy, TokenError> {
        let algorithm = header.algorithm;
        let named = self.named(header);
        let candidates = if algorithm.is_symmetric() && named.is_none_or(|key| !key.is_symmetric())
        {
            [(KeySlot::Current, self.current.as_ref()), (KeySlot::Previous, self.previous.as_ref())]
        } else {
            let named = named.filter(|key| key.algorithms.contains(&algorithm));
            [(KeySlot::Jwks, named), (KeySlot::Jwks, None)]
        };
        let mut error = TokenError::NoSigner { kid: header.shown_kid() };
        for (slot, key) in candidates {
            let Some(key) = key else { continue };
            if key.has_signed(algorithm, signed, signature) {
                return Ok(VerifiedBy { slot, algorithm: Some(algorithm) });
            }
            error = TokenError::Signature;
        }
        Err(error)
    }

    /// Whether the header names a public key that is not here.
    pub(super) fn lacks(&self, header: &Header) -> bool {
        header.kid.is_some() && !header.algorithm.is_symmetric() && self.named(header).is_none()
    }

    fn named(&self, header: &Header) -> Option<&Key> {
        header.kid.as_deref().and_then(|kid| self.published.get(kid))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::auth::{
        algorithm::Algorithm,
        jwk::{
            KeySource,
            tests::{jwk, parse, rsa_key},
        },
    };

    #[test]
    fn of_two_keys_with_one_kid_that_of_the_file_is_used() {
        let mut other = jwk(include_str!("../../protocol/jws/es256.json"));
        other["kid"] = rsa_key()["kid"].clone();
        let file = parse(&json!([other]), KeySource::File).unwrap();
        let url = parse(&json!([rsa_key()]), KeySource::Url).unwrap();
        let keys = KeySet::new([&Secret::default(), &Secret::default()], &file, &url);
        let kid = rsa_key()["kid"].as_str().unwrap().into();
        assert_eq!(keys.published.len(), 1);
        let key = keys.named(&Header { algorithm: Algorithm::Rs256, kid: Some(kid) }).unwrap();
        assert_eq!(key.algorithms, [Algorithm::Es256]);
    }

    #[test]
    fn only_an_unknown_public_key_is_missed() {
        let file = parse(&json!([rsa_key()]), KeySource::File).unwrap();
        let secret = Secret::from("a-secret-that-is-long-enough-to-sign");
        let keys = KeySet::new([&secret, &secret], &file, &PublishedKeys::default());
        let lacks = |algorithm, kid: Option<&str>| {
            keys.lacks(&Header { algorithm, kid: kid.map(Into::into) })
        };
        assert!(lacks(Algorithm::Es256, Some("unknown")));
        assert!(!lacks(Algorithm::Hs256, Some("unknown")) && !lacks(Algorithm::Es256, None));
        assert!(!lacks(Algorithm::Es256, rsa_key()["kid"].as_str()));
    }
}
