//! The settings of tokens: the section `[auth]`, and all settings that decide which tokens are
//! accepted.

use std::time::Duration;

use serde::Deserialize;

use super::jwks;
use crate::{clock::duration, secret::Secret};

/// What is asked of tokens: the section `[auth]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// By so much `exp` and `nbf` may be missed by clocks that differ.
    #[serde(deserialize_with = "duration")]
    pub leeway: Duration,
    /// So long after `exp` a joined channel still lives on its token; no shorter than the leeway.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
    /// One of these must be `iss`; an empty list asks for nothing.
    pub issuers: Vec<String>,
    /// One of these must be in `aud`; an empty list asks for nothing.
    pub audiences: Vec<String>,
    /// Most revocations that are remembered; beyond, a further one is refused.
    pub revocations_max: usize,
    /// How long a revocation holds, unless it says: no shorter than a token's life.
    #[serde(deserialize_with = "duration")]
    pub revocation_keep: Duration,
}

impl Settings {
    /// Returns every mistake of the section.
    pub(crate) fn validate(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        for (name, values) in [("auth.issuers", &self.issuers), ("auth.audiences", &self.audiences)]
        {
            if values.iter().any(String::is_empty) {
                mistakes.push(format!("{name}: one of them is empty"));
            }
        }
        if self.grace < self.leeway {
            mistakes.push(
                "auth.grace: no shorter than auth.leeway, or who is let in is thrown out"
                    .to_owned(),
            );
        }
        mistakes
    }
}

/// All settings that decide which tokens are accepted.
#[derive(Debug, Clone)]
pub struct TrustSettings {
    /// `jwt_secret`; may be empty.
    pub jwt_secret: Secret,
    /// `jwt_secret_previous`; may be empty.
    pub jwt_secret_previous: Secret,
    /// `publishable_key`, which stands for the role `anon`; may be empty.
    pub publishable_key: Secret,
    /// `secret_key`, which stands for the role `service_role`; may be empty.
    pub secret_key: Secret,
    /// The section `[auth]`.
    pub auth: Settings,
    /// The section `[jwks]`.
    pub jwks: jwks::Settings,
    /// `limits.token_bytes_max`.
    pub token_bytes_max: usize,
}
