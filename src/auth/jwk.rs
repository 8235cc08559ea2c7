//! Keys, and the reading of a JSON Web Key Set.
//!
//! Invariants: a key is used only for the algorithms that are bound to it; a key of doubtful shape is
//! left out, with a named reason; no key is ever formatted. Nothing here does I/O.

use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{DecodingKey, crypto};
use serde_json::{Map, Value};
use strum::{IntoStaticStr, VariantArray};

use super::{
    algorithm::{Algorithm, SECRET_BYTES_MIN},
    json,
};

/// Most keys of a document.
const KEYS_MAX: usize = 64;
/// Longest `kid`, in bytes.
pub(super) const KID_BYTES_MAX: usize = 128;
/// Bits of an RSA modulus: the minimum of RFC 7518, 3.3; a longer one makes verifying too expensive.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// Smallest public exponent: with smaller ones, a lax check of the padding has allowed forgeries.
const RSA_EXPONENT_MIN: u64 = 65537;
/// The members that only the private half of a key pair has.
const PRIVATE_MEMBERS: [&str; 7] = ["d", "p", "q", "dp", "dq", "qi", "oth"];

/// A key and the algorithms that are bound to it.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) algorithms: Vec<Algorithm>,
    material: DecodingKey,
}

impl Key {
    /// Creates the key of a shared secret.
    pub(super) fn of_secret(secret: &[u8]) -> Self {
        let algorithms = Algorithm::SYMMETRIC.to_vec();
        Self { algorithms, material: DecodingKey::from_secret(secret) }
    }

    /// Whether the key is a shared secret.
    pub(super) fn is_symmetric(&self) -> bool {
        self.algorithms.iter().all(|algorithm| algorithm.is_symmetric())
    }

    /// Whether this is a signature of the key. False for an algorithm that is not bound to the key.
    pub(super) fn has_signed(&self, algorithm: Algorithm, signed: &str, signature: &str) -> bool {
        let algorithm = self.algorithms.iter().find(|own| **own == algorithm);
        algorithm.is_some_and(|own| {
            let (signed, own) = (signed.as_bytes(), own.library());
            crypto::verify(signature, signed, &self.material, own).unwrap_or(false)
        })
    }

    /// Reads a key of a document, with each algorithm that its type allows or the one of its `alg`.
    fn of_jwk(jwk: &Map<String, Value>, from: KeySource) -> Result<Self, Unusable> {
        if !is_for_verifying(jwk) {
            return Err(Unusable::Use);
        }
        let is_octets = jwk.get("kty").and_then(Value::as_str) == Some("oct");
        let has_private = PRIVATE_MEMBERS.iter().any(|name| jwk.contains_key(*name));
        if has_private || is_octets && from == KeySource::Url {
            return Err(Unusable::Private);
        }
        let (own, material): (&[Algorithm], _) = match (text(jwk, "kty")?, jwk.get("crv")) {
            ("oct", _) => (&Algorithm::SYMMETRIC, octets(jwk)?),
            ("RSA", _) => (&Algorithm::RSA, rsa(jwk)?),
            ("EC", Some(Value::String(curve))) if curve == "P-256" => {
                (&[Algorithm::Es256], point(jwk, 32)?)
            }
            ("EC", Some(Value::String(curve))) if curve == "P-384" => {
                (&[Algorithm::Es384], point(jwk, 48)?)
            }
            ("OKP", Some(Value::String(curve))) if curve == "Ed25519" => {
                let x = number(jwk, "x", 32)?;
                (&[Algorithm::EdDsa], DecodingKey::from_ed_der(&x))
            }
            (_, _) => return Err(Unusable::Type),
        };
        let algorithms = match jwk.get("alg") {
            None => own.to_vec(),
            Some(name) => {
                let named = name.as_str().and_then(Algorithm::named);
                let named = named.filter(|algorithm| own.contains(algorithm));
                vec![named.ok_or(Unusable::Algorithm)?]
            }
        };
        Ok(Self { algorithms, material })
    }
}

/// Whether `use` is absent or `sig`, and `key_ops` is absent or contains `verify`.
fn is_for_verifying(jwk: &Map<String, Value>) -> bool {
    let is_to_verify = |operations: &Value| {
        operations.as_array().is_some_and(|list| list.iter().any(|name| name == "verify"))
    };
    jwk.get("use").is_none_or(|usage| usage == "sig") && jwk.get("key_ops").is_none_or(is_to_verify)
}

fn text<'a>(jwk: &'a Map<String, Value>, name: &str) -> Result<&'a str, Unusable> {
    jwk.get(name).and_then(Value::as_str).ok_or(Unusable::Malformed)
}

fn bytes(jwk: &Map<String, Value>, name: &str) -> Result<Vec<u8>, Unusable> {
    URL_SAFE_NO_PAD.decode(text(jwk, name)?).map_err(|_no_more_to_tell| Unusable::Malformed)
}

/// Reads a number of exactly `length` bytes.
fn number(jwk: &Map<String, Value>, name: &str, length: usize) -> Result<Vec<u8>, Unusable> {
    let number = bytes(jwk, name)?;
    if number.len() == length { Ok(number) } else { Err(Unusable::Malformed) }
}

fn octets(jwk: &Map<String, Value>) -> Result<DecodingKey, Unusable> {
    let secret = bytes(jwk, "k")?;
    let is_long = secret.len() >= SECRET_BYTES_MIN;
    if is_long { Ok(DecodingKey::from_secret(&secret)) } else { Err(Unusable::Weak) }
}

/// Reads a point of an elliptic curve. One that is not on its curve verifies no signature.
fn point(jwk: &Map<String, Value>, length: usize) -> Result<DecodingKey, Unusable> {
    let uncompressed = 4;
    let mut point = vec![uncompressed];
    point.extend(number(jwk, "x", length)?);
    point.extend(number(jwk, "y", length)?);
    Ok(DecodingKey::from_ec_der(&point))
}

fn rsa(jwk: &Map<String, Value>) -> Result<DecodingKey, Unusable> {
    let (modulus, exponent) = (bytes(jwk, "n")?, bytes(jwk, "e")?);
    // Some issuers put a zero byte for the sign in front, as in ASN.1.
    let zeros = modulus.iter().take_while(|byte| **byte == 0).count();
    let (modulus, exponent) = (&modulus[zeros..], exponent.as_slice());
    let leading = modulus.first().map_or(0, |byte| byte.leading_zeros() as usize);
    if !RSA_BITS.contains(&(modulus.len() * 8 - leading)) || exponent.len() > 4 {
        return Err(Unusable::Weak);
    }
    let value = exponent.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    let is_odd = |number: &[u8]| number.last().is_some_and(|byte| byte & 1 == 1);
    if value < RSA_EXPONENT_MIN || !is_odd(exponent) || !is_odd(modulus) {
        return Err(Unusable::Weak);
    }
    Ok(DecodingKey::from_rsa_raw_components(modulus, exponent))
}

/// The setting that a key set comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum KeySource {
    /// `jwks.file`.
    File,
    /// `jwks.url`.
    Url,
}

impl KeySource {
    /// The metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Why a key of a document is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Unusable {
    /// The key is not an object, or a member is missing, of another type or length, or not
    /// base64url.
    Malformed,
    /// The `kid` is not a text of 1 to 128 bytes, so that no token could name it.
    Kid,
    /// Another key has the same `kid`; neither is used.
    Duplicate,
    /// The `kty` or `crv` is not supported.
    Type,
    /// The `alg` is not supported, or does not go with the type.
    Algorithm,
    /// The key is not for verifying signatures.
    Use,
    /// RSA: fewer than 2048 bits or more than 8192, or an exponent that is below 65537, has more
    /// than 32 bits or is even. Symmetric: fewer than 32 bytes.
    Weak,
    /// The key contains its private half, or is symmetric and public at a URL.
    Private,
}

impl Unusable {
    /// The metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Why a document is not a key set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// The document is not an object with a list of `keys`, or a member occurs twice.
    #[error("not a JSON Web Key Set: expected an object with a list of keys")]
    Malformed,
    /// The document has more keys than the bound.
    #[error("more than {KEYS_MAX} keys")]
    TooMany,
}

/// The keys of one JSON Web Key Set by `kid`.
#[derive(Clone, Default)]
pub(super) struct PublishedKeys {
    pub(super) keys: HashMap<Box<str>, Key>,
    /// The places of the keys that are left out, and the reasons.
    pub(super) unusable: Vec<(usize, Unusable)>,
}

impl PublishedKeys {
    /// Reads a document. A key that cannot be used is left out.
    ///
    /// # Errors
    /// [`DocumentError`] if the document is not a key set, or has too many keys.
    pub(super) fn parse(document: &[u8], from: KeySource) -> Result<Self, DocumentError> {
        let document = json::object(document).ok_or(DocumentError::Malformed)?;
        let jwks = document.get("keys").and_then(Value::as_array);
        let jwks = jwks.ok_or(DocumentError::Malformed)?;
        if jwks.len() > KEYS_MAX {
            return Err(DocumentError::TooMany);
        }
        let mut published = Self::default();
        for (place, jwk) in jwks.iter().enumerate() {
            let has_same_kid = |other: &&Value| other.get("kid") == jwk.get("kid");
            let is_alone = jwks.iter().filter(has_same_kid).count() == 1;
            match named_key(jwk, is_alone, from) {
                Ok((kid, key)) => {
                    published.keys.insert(kid.into(), key);
                }
                Err(reason) => published.unusable.push((place, reason)),
            }
        }
        Ok(published)
    }

    /// Returns how many keys can be used.
    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }
}

fn named_key(jwk: &Value, is_alone: bool, from: KeySource) -> Result<(&str, Key), Unusable> {
    let jwk = jwk.as_object().ok_or(Unusable::Malformed)?;
    let kid = jwk.get("kid").and_then(Value::as_str).ok_or(Unusable::Kid)?;
    if !(1..=KID_BYTES_MAX).contains(&kid.len()) {
        return Err(Unusable::Kid);
    }
    let key = Key::of_jwk(jwk, from)?;
    if is_alone { Ok((kid, key)) } else { Err(Unusable::Duplicate) }
}

#[cfg(test)]
pub(super) mod tests;
