//! Signature algorithms of tokens, and the record of which key has verified one.

use jsonwebtoken::Algorithm as Library;
use strum::{IntoStaticStr, VariantArray};

use crate::telemetry::metrics::Label;

/// Shortest symmetric key, in bytes: as long as the shortest hash (RFC 7518, 3.2).
pub(crate) const SECRET_BYTES_MIN: usize = 32;

/// A signature algorithm; `none` and every other value of `alg` is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray, IntoStaticStr)]
#[strum(serialize_all = "UPPERCASE")]
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
    #[strum(serialize = "EdDSA")]
    EdDsa,
}

impl Algorithm {
    /// The algorithms of a shared secret.
    pub(super) const SYMMETRIC: [Self; 3] = [Self::Hs256, Self::Hs384, Self::Hs512];
    /// The algorithms of an RSA key.
    pub(super) const RSA: [Self; 3] = [Self::Rs256, Self::Rs384, Self::Rs512];

    /// Returns the algorithm with this `alg`, compared letter by letter.
    pub(super) fn named(name: &str) -> Option<Self> {
        if name == "Ed25519" {
            return Some(Self::EdDsa);
        }
        Self::VARIANTS.iter().copied().find(|algorithm| algorithm.label() == name)
    }

    /// The algorithm's name in a header, and the metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }

    /// Whether the key is a shared secret.
    pub(super) fn is_symmetric(self) -> bool {
        Self::SYMMETRIC.contains(&self)
    }

    /// The same algorithm as a type of the JWT library.
    pub(super) fn library(self) -> Library {
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

/// The setting that a key comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum KeySlot {
    /// `jwt_secret`.
    Current,
    /// `jwt_secret_previous`, as long as tokens of it are in use.
    Previous,
    /// `jwks.file` or `jwks.url`.
    Jwks,
    /// `publishable_key` or `secret_key`, which are not JWTs.
    Opaque,
}

impl KeySlot {
    /// The metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The key and the algorithm that have verified a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedBy {
    /// Where the key comes from.
    pub slot: KeySlot,
    /// The algorithm; `None` for an opaque key, which is compared.
    pub algorithm: Option<Algorithm>,
}

impl VerifiedBy {
    /// An opaque key, compared with the one of the settings.
    pub(super) const OPAQUE: Self = Self { slot: KeySlot::Opaque, algorithm: None };

    /// Returns every combination that can occur.
    pub fn all() -> impl Iterator<Item = Self> {
        let of = |slot, algorithms: &'static [Algorithm]| {
            algorithms.iter().map(move |algorithm| Self { slot, algorithm: Some(*algorithm) })
        };
        of(KeySlot::Current, &Algorithm::SYMMETRIC)
            .chain(of(KeySlot::Previous, &Algorithm::SYMMETRIC))
            .chain(of(KeySlot::Jwks, Algorithm::VARIANTS))
            .chain([Self::OPAQUE])
    }
}

/// Key and algorithm.
impl Label<2> for VerifiedBy {
    fn all() -> impl Iterator<Item = [&'static str; 2]> {
        Self::all().map(|verified_by| verified_by.values())
    }

    fn values(&self) -> [&'static str; 2] {
        [self.slot.label(), self.algorithm.map_or("", Algorithm::label)]
    }
}
