//! The keys that tokens are checked with: the project's secrets, and a JSON Web Key Set.
//!
//! Invariants: a key is used for the algorithms that are bound to it and for no other; a token's
//! header only selects among keys, and what it brings along (`jwk`, `jku`, `x5u`, `x5c`) is not
//! read; a public key is found by its `kid` alone, and there is no other to fall back to; a key of
//! doubtful shape is left out by name. Nothing here does I/O, and no key is ever formatted.

use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm as Library, DecodingKey, crypto};
use serde_json::{Map, Value};

use super::{
    json,
    jwt::{Header, TokenError},
};
use crate::secret::Secret;

/// Most keys of a document.
const KEYS_MAX: usize = 64;
/// Longest `kid`.
pub(super) const KID_BYTES_MAX: usize = 128;
/// Shortest symmetric key: as long as the shortest hash (RFC 7518, 3.2).
pub(crate) const SECRET_BYTES_MIN: usize = 32;
/// Bits of an RSA modulus: RFC 7518, 3.3; above, a signature costs too much to look at.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// Smallest public exponent: with smaller ones a lax padding check has been a forgery before.
const RSA_EXPONENT_MIN: u64 = 65537;
/// What a key pair has and its public half has not.
const PRIVATE_MEMBERS: [&str; 7] = ["d", "p", "q", "dp", "dq", "qi", "oth"];

/// How tokens may be signed; `none` and everything else that a header may say is no algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// HMAC with SHA-384.
    Hs384,
    /// HMAC with SHA-512.
    Hs512,
    /// RSA PKCS #1 v1.5 with SHA-256.
    Rs256,
    /// RSA PKCS #1 v1.5 with SHA-384.
    Rs384,
    /// RSA PKCS #1 v1.5 with SHA-512.
    Rs512,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// Those of a shared secret.
    pub(super) const SYMMETRIC: [Self; 3] = [Self::Hs256, Self::Hs384, Self::Hs512];
    const RSA: [Self; 3] = [Self::Rs256, Self::Rs384, Self::Rs512];

    /// Every algorithm.
    pub const ALL: [Self; 9] = [
        Self::Hs256,
        Self::Hs384,
        Self::Hs512,
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Es256,
        Self::Es384,
        Self::EdDsa,
    ];

    /// As `alg` spells it, to the letter.
    pub(super) fn named(name: &str) -> Option<Self> {
        if name == "Ed25519" {
            return Some(Self::EdDsa);
        }
        Self::ALL.into_iter().find(|algorithm| algorithm.kind() == name)
    }

    /// The name: in a header, and as a metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Hs256 => "HS256",
            Self::Hs384 => "HS384",
            Self::Hs512 => "HS512",
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }

    fn is_symmetric(self) -> bool {
        Self::SYMMETRIC.contains(&self)
    }

    fn of_library(self) -> Library {
        match self {
            Self::Hs256 => Library::HS256,
            Self::Hs384 => Library::HS384,
            Self::Hs512 => Library::HS512,
            Self::Rs256 => Library::RS256,
            Self::Rs384 => Library::RS384,
            Self::Rs512 => Library::RS512,
            Self::Es256 => Library::ES256,
            Self::Es384 => Library::ES384,
            Self::EdDsa => Library::EdDSA,
        }
    }
}

/// Where a key has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySlot {
    /// `jwt_secret`.
    Current,
    /// `jwt_secret_previous`: tokens of it are still about.
    Previous,
    /// The key set.
    Jwks,
    /// No JWT: `publishable_key` or `secret_key`.
    Opaque,
}

impl KeySlot {
    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Previous => "previous",
            Self::Jwks => "jwks",
            Self::Opaque => "opaque",
        }
    }
}

/// What has shown that a token is genuine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedBy {
    /// Which key.
    pub slot: KeySlot,
    /// And how; an opaque key has none.
    pub algorithm: Option<Algorithm>,
}

impl VerifiedBy {
    /// An opaque key, compared with the one of the settings.
    pub(super) const OPAQUE: Self = Self { slot: KeySlot::Opaque, algorithm: None };

    /// Everything that may be.
    pub fn all() -> impl Iterator<Item = Self> {
        let of = |slot, algorithms: &'static [Algorithm]| {
            algorithms.iter().map(move |it| Self { slot, algorithm: Some(*it) })
        };
        of(KeySlot::Current, &Algorithm::SYMMETRIC)
            .chain(of(KeySlot::Previous, &Algorithm::SYMMETRIC))
            .chain(of(KeySlot::Jwks, &Algorithm::ALL))
            .chain([Self::OPAQUE])
    }

    /// The metric's labels: key and algorithm.
    #[must_use]
    pub fn labels(self) -> [&'static str; 2] {
        [self.slot.kind(), self.algorithm.map_or("", Algorithm::kind)]
    }
}

/// A key and the algorithms that it is for.
#[derive(Clone)]
struct Key {
    algorithms: Vec<Algorithm>,
    material: DecodingKey,
}

impl Key {
    fn of_secret(secret: &[u8]) -> Self {
        let algorithms = Algorithm::SYMMETRIC.to_vec();
        Self { algorithms, material: DecodingKey::from_secret(secret) }
    }

    fn is_symmetric(&self) -> bool {
        self.algorithms.iter().all(|algorithm| algorithm.is_symmetric())
    }

    /// Whether the key has signed this; never, with an algorithm that is not its own.
    fn has_signed(&self, algorithm: Algorithm, signed: &str, signature: &str) -> bool {
        let algorithm = self.algorithms.iter().find(|own| **own == algorithm);
        algorithm.is_some_and(|own| {
            let (signed, own) = (signed.as_bytes(), own.of_library());
            crypto::verify(signature, signed, &self.material, own).unwrap_or(false)
        })
    }

    /// Reads a key of a document.
    fn of_jwk(jwk: &Map<String, Value>, from: Origin) -> Result<Self, Unusable> {
        if !is_for_verifying(jwk) {
            return Err(Unusable::Use);
        }
        let is_octets = jwk.get("kty").and_then(Value::as_str) == Some("oct");
        let has_private = PRIVATE_MEMBERS.iter().any(|name| jwk.contains_key(*name));
        if has_private || is_octets && from == Origin::Url {
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

/// `use` is absent or `sig`, `key_ops` absent or with `verify`.
fn is_for_verifying(jwk: &Map<String, Value>) -> bool {
    let of_use = jwk.get("use").is_none_or(|it| it == "sig");
    let operations =
        |it: &Value| it.as_array().is_some_and(|it| it.iter().any(|it| it == "verify"));
    of_use && jwk.get("key_ops").is_none_or(operations)
}

fn text<'a>(jwk: &'a Map<String, Value>, name: &str) -> Result<&'a str, Unusable> {
    jwk.get(name).and_then(Value::as_str).ok_or(Unusable::Malformed)
}

fn bytes(jwk: &Map<String, Value>, name: &str) -> Result<Vec<u8>, Unusable> {
    URL_SAFE_NO_PAD.decode(text(jwk, name)?).map_err(|_no_more_to_tell| Unusable::Malformed)
}

/// A number that has this many bytes, no more and no less.
fn number(jwk: &Map<String, Value>, name: &str, length: usize) -> Result<Vec<u8>, Unusable> {
    let number = bytes(jwk, name)?;
    if number.len() == length { Ok(number) } else { Err(Unusable::Malformed) }
}

fn octets(jwk: &Map<String, Value>) -> Result<DecodingKey, Unusable> {
    let secret = bytes(jwk, "k")?;
    let is_long = secret.len() >= SECRET_BYTES_MIN;
    if is_long { Ok(DecodingKey::from_secret(&secret)) } else { Err(Unusable::Weak) }
}

/// A point that is not on its curve verifies nothing.
fn point(jwk: &Map<String, Value>, length: usize) -> Result<DecodingKey, Unusable> {
    let uncompressed = 4;
    let mut point = vec![uncompressed];
    point.extend(number(jwk, "x", length)?);
    point.extend(number(jwk, "y", length)?);
    Ok(DecodingKey::from_ec_der(&point))
}

fn rsa(jwk: &Map<String, Value>) -> Result<DecodingKey, Unusable> {
    let (modulus, exponent) = (bytes(jwk, "n")?, bytes(jwk, "e")?);
    // Some writers put the sign in front, as ASN.1 has it.
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

/// Where a document comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// `jwks.file`.
    File,
    /// `jwks.url`.
    Url,
}

impl Origin {
    /// Both.
    pub const ALL: [Self; 2] = [Self::File, Self::Url];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Url => "url",
        }
    }
}

/// Why a key of a document is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// Not an object, or a member is missing, of another type or length, or not base64url.
    Malformed,
    /// No `kid` that a token could name: a text of 1 to 128 bytes.
    Kid,
    /// Another key has the same `kid`; neither is used.
    Duplicate,
    /// A `kty` or `crv` that is not supported.
    Type,
    /// An `alg` that is not supported or not one of the key's type.
    Algorithm,
    /// For something else than verifying signatures.
    Use,
    /// RSA: fewer than 2048 bits or more than 8192, or an exponent below 65537 or of more than 32
    /// bits, or even; a symmetric key of fewer than 32 bytes.
    Weak,
    /// The private half is there for everyone to read, or a symmetric key at a URL.
    Private,
}

impl Unusable {
    /// Every reason.
    pub const ALL: [Self; 8] = [
        Self::Malformed,
        Self::Kid,
        Self::Duplicate,
        Self::Type,
        Self::Algorithm,
        Self::Use,
        Self::Weak,
        Self::Private,
    ];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Kid => "kid",
            Self::Duplicate => "duplicate",
            Self::Type => "type",
            Self::Algorithm => "algorithm",
            Self::Use => "use",
            Self::Weak => "weak",
            Self::Private => "private",
        }
    }
}

/// Why a document is no key set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// Not an object with a list of `keys`, or a member occurs twice.
    #[error("not a JSON Web Key Set: expected an object with a list of keys")]
    Malformed,
    /// More keys than are looked at.
    #[error("more than {KEYS_MAX} keys")]
    TooMany,
}

/// The keys of one JSON Web Key Set by `kid`.
#[derive(Clone, Default)]
pub(super) struct Published {
    keys: HashMap<Box<str>, Key>,
    /// The places of the keys that are left out, and why.
    pub(super) unusable: Vec<(usize, Unusable)>,
}

impl Published {
    /// Reads a document.
    pub(super) fn parse(document: &[u8], from: Origin) -> Result<Self, DocumentError> {
        let document = json::object(document).ok_or(DocumentError::Malformed)?;
        let jwks = document.get("keys").and_then(Value::as_array);
        let jwks = jwks.ok_or(DocumentError::Malformed)?;
        if jwks.len() > KEYS_MAX {
            return Err(DocumentError::TooMany);
        }
        let mut published = Self::default();
        for (place, jwk) in jwks.iter().enumerate() {
            let is_alone = jwks.iter().filter(|it| it.get("kid") == jwk.get("kid")).count() == 1;
            match named_key(jwk, is_alone, from) {
                Ok((kid, key)) => {
                    published.keys.insert(kid.into(), key);
                }
                Err(reason) => published.unusable.push((place, reason)),
            }
        }
        Ok(published)
    }

    /// How many keys can be used.
    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }
}

fn named_key(jwk: &Value, is_alone: bool, from: Origin) -> Result<(&str, Key), Unusable> {
    let jwk = jwk.as_object().ok_or(Unusable::Malformed)?;
    let kid = jwk.get("kid").and_then(Value::as_str).ok_or(Unusable::Kid)?;
    if !(1..=KID_BYTES_MAX).contains(&kid.len()) {
        return Err(Unusable::Kid);
    }
    let key = Key::of_jwk(jwk, from)?;
    if is_alone { Ok((kid, key)) } else { Err(Unusable::Duplicate) }
}

/// All keys at one time.
pub(super) struct KeySet {
    current: Option<Key>,
    previous: Option<Key>,
    published: HashMap<Box<str>, Key>,
}

impl KeySet {
    /// The secrets that are set, and the keys of both documents; of two with one `kid` that of the
    /// file, which is nearer to the operator's hand.
    pub(super) fn new(secrets: [&Secret; 2], file: &Published, url: &Published) -> Self {
        let [current, previous] =
            secrets.map(|it| (!it.is_empty()).then(|| Key::of_secret(it.expose().as_bytes())));
        let mut published = url.keys.clone();
        published.extend(file.keys.clone());
        Self { current, previous, published }
    }

    /// Whether one of the keys has signed this, and which.
    ///
    /// A symmetric algorithm is for the symmetric key that `kid` names in a document, or else for
    /// the project's secrets; any other is for the key of that `kid`.
    ///
    /// # Errors
    /// [`TokenError::NoSigner`] if there is no key to ask, else [`TokenError::Signature`].
    pub(super) fn verify(
        &self,
        header: &Header,
        signed: &str,
        signature: &str,
    ) -> Result<VerifiedBy, TokenError> {
        let algorithm = header.algorithm;
        let named = self.named(header);
        let candidates = if algorithm.is_symmetric() && named.is_none_or(|it| !it.is_symmetric()) {
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

    /// Whether the header names a public key that we have not heard of.
    pub(super) fn lacks(&self, header: &Header) -> bool {
        header.kid.is_some() && !header.algorithm.is_symmetric() && self.named(header).is_none()
    }

    fn named(&self, header: &Header) -> Option<&Key> {
        header.kid.as_deref().and_then(|kid| self.published.get(kid))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// The key of one of the vectors' files.
    fn jwk(vectors: &str) -> Value {
        serde_json::from_str::<Value>(vectors).unwrap()["jwks"]["keys"][0].clone()
    }

    fn rsa_key() -> Value {
        jwk(include_str!("../../protocol/jws/rs256.json"))
    }

    fn parse(keys: &Value, from: Origin) -> Result<Published, DocumentError> {
        Published::parse(json!({ "keys": keys }).to_string().as_bytes(), from)
    }

    fn reasons(keys: &Value, from: Origin) -> Vec<&'static str> {
        let published = parse(keys, from).unwrap();
        published.unusable.iter().map(|(_, reason)| reason.kind()).collect()
    }

    #[test]
    fn a_document_is_an_object_with_a_list_of_at_most_64_keys() {
        for text in ["", "[]", "{}", "null", r#"{"keys":{}}"#, r#"{"keys":[],"keys":[]}"#, "<html>"]
        {
            let error = Published::parse(text.as_bytes(), Origin::File).err();
            assert_eq!(error, Some(DocumentError::Malformed), "{text}");
        }
        let keys = |count| {
            let key = |at| json!({ "kty": "oct", "kid": format!("{at}"), "k": "A".repeat(43) });
            (0..count).map(key).collect::<Vec<_>>().into()
        };
        assert_eq!(parse(&keys(64), Origin::File).map(|it| it.key_count()), Ok(64));
        assert_eq!(parse(&keys(65), Origin::File).err(), Some(DocumentError::TooMany));
        assert_eq!(parse(&json!([]), Origin::Url).map(|it| it.key_count()), Ok(0));
    }

    #[test]
    fn each_reason_to_leave_a_key_out_is_named() {
        let with = |name: &str, value: Value| {
            let mut key = rsa_key();
            key[name] = value;
            key
        };
        let mut without_kid = rsa_key();
        without_kid.as_object_mut().unwrap().remove("kid");
        let cases = [
            (rsa_key(), ""),
            (with("key_ops", json!(["verify", "sign"])), ""),
            (with("x5c", json!(["ignored"])), ""),
            (json!("key"), "malformed"),
            (with("n", json!(1)), "malformed"),
            (with("e", json!("AQAB=")), "malformed"),
            (with("kty", json!(["RSA"])), "malformed"),
            (without_kid, "kid"),
            (with("kid", json!(7)), "kid"),
            (with("kid", json!("")), "kid"),
            (with("kid", json!("k".repeat(129))), "kid"),
            (with("kty", json!("rsa")), "type"),
            (with("kty", json!("OKP")), "type"),
            (json!({ "kty": "EC", "crv": "P-521", "kid": "a" }), "type"),
            (with("alg", json!("PS256")), "algorithm"),
            (with("alg", json!("HS256")), "algorithm"),
            (with("alg", json!(null)), "algorithm"),
            (with("use", json!("enc")), "use"),
            (with("use", json!(["sig"])), "use"),
            (with("key_ops", json!("verify")), "use"),
            (with("key_ops", json!([])), "use"),
            (with("e", json!("AQ")), "weak"),
            (with("e", json!("Aw")), "weak"),
            (with("e", json!("AQAAAAE")), "weak"),
            (with("e", json!("AQAA")), "weak"),
            (with("n", json!("AQAB")), "weak"),
            (with("n", json!("")), "weak"),
            (with("n", json!(URL_SAFE_NO_PAD.encode([0xff; 1025]))), "weak"),
            (with("d", json!("AQAB")), "private"),
            (with("oth", json!([])), "private"),
        ];
        for (key, reason) in cases {
            let expected: Vec<_> = Some(reason).filter(|it| !it.is_empty()).into_iter().collect();
            assert_eq!(reasons(&json!([key]), Origin::File), expected, "{key}");
        }
        let twice = json!([rsa_key(), rsa_key()]);
        assert_eq!(reasons(&twice, Origin::File), ["duplicate", "duplicate"]);
    }

    #[test]
    fn a_modulus_may_have_its_sign_in_front_and_8192_bits() {
        let modulus = |zeros: usize, length| {
            let mut bytes = vec![0; zeros];
            bytes.extend(vec![0xff_u8; length]);
            json!([{ "kty": "RSA", "kid": "a", "e": "AQAB", "n": URL_SAFE_NO_PAD.encode(bytes) }])
        };
        for (zeros, length) in [(0, 256), (1, 256), (1, 1024)] {
            assert!(reasons(&modulus(zeros, length), Origin::Url).is_empty());
        }
        assert_eq!(reasons(&modulus(1, 255), Origin::Url), ["weak"]);
    }

    #[test]
    fn a_symmetric_key_at_a_url_is_everybodys_and_nobody_is_believed_by_it() {
        let keys = json!([{ "kty": "oct", "kid": "a", "k": "A".repeat(43) }]);
        assert!(reasons(&keys, Origin::File).is_empty());
        assert_eq!(reasons(&keys, Origin::Url), ["private"]);
        let short = json!([{ "kty": "oct", "kid": "a", "k": "A".repeat(42) }]);
        assert_eq!(reasons(&short, Origin::File), ["weak"]);
    }

    #[test]
    fn of_two_keys_with_one_kid_that_of_the_file_is_used() {
        let mut other = jwk(include_str!("../../protocol/jws/es256.json"));
        other["kid"] = rsa_key()["kid"].clone();
        let file = parse(&json!([other]), Origin::File).unwrap();
        let url = parse(&json!([rsa_key()]), Origin::Url).unwrap();
        let keys = KeySet::new([&Secret::default(), &Secret::default()], &file, &url);
        let kid = rsa_key()["kid"].as_str().unwrap().into();
        assert_eq!(keys.published.len(), 1);
        let key = keys.named(&Header { algorithm: Algorithm::Rs256, kid: Some(kid) }).unwrap();
        assert_eq!(key.algorithms, [Algorithm::Es256]);
    }

    #[test]
    fn only_an_unknown_public_key_is_missed() {
        let file = parse(&json!([rsa_key()]), Origin::File).unwrap();
        let secret = Secret::from("a-secret-that-is-long-enough-to-sign");
        let keys = KeySet::new([&secret, &secret], &file, &Published::default());
        let lacks = |algorithm, kid: Option<&str>| {
            keys.lacks(&Header { algorithm, kid: kid.map(Into::into) })
        };
        assert!(lacks(Algorithm::Es256, Some("unknown")));
        assert!(!lacks(Algorithm::Hs256, Some("unknown")) && !lacks(Algorithm::Es256, None));
        assert!(!lacks(Algorithm::Es256, rsa_key()["kid"].as_str()));
    }

    proptest! {
        #[test]
        fn random_documents_never_panic(text in any::<Vec<u8>>(), name in "[a-z_5#]{1,8}", value in r#"[ -~]{0,40}"#) {
            let _ = Published::parse(&text, Origin::File); // Whether it is one is not the question.
            let mut key = rsa_key();
            key[&name] = serde_json::from_str(&value).unwrap_or(Value::String(value));
            prop_assert!(parse(&json!([key]), Origin::Url).is_ok());
        }

        #[test]
        fn a_member_of_any_value_leaves_the_key_out_or_whole(
            member in prop::sample::select(vec!["kty", "kid", "n", "e", "alg", "use", "key_ops", "crv"]),
            value in prop_oneof![
                Just(Value::Null), any::<bool>().prop_map(Value::from), any::<i64>().prop_map(Value::from),
                "[A-Za-z0-9_=+/-]{0,400}".prop_map(Value::from),
                prop::collection::vec("[a-z]{0,8}", 0..3).prop_map(Value::from),
            ],
        ) {
            let mut key = rsa_key();
            key[member] = value;
            let published = parse(&json!([key]), Origin::Url).unwrap();
            prop_assert_eq!(published.key_count() + published.unusable.len(), 1);
        }
    }
}
