//! How tokens may be signed, and what has shown that one is genuine.

use jsonwebtoken::Algorithm as Library;

/// Shortest symmetric key: as long as the shortest hash (RFC 7518, 3.2).
pub(crate) const SECRET_BYTES_MIN: usize = 32;

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
    pub(super) const RSA: [Self; 3] = [Self::Rs256, Self::Rs384, Self::Rs512];

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

    pub(super) fn is_symmetric(self) -> bool {
        Self::SYMMETRIC.contains(&self)
    }

    pub(super) fn of_library(self) -> Library {
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
