//! Plays every file of `protocol/jws/`: tokens that must be believed, tokens that must not, and what
//! is said of them.
//!
//! RFC 8725, point by point:
//!
//! | section | where |
//! |---|---|
//! | 2.1, 3.1 the algorithm is verified | `headers` (`none`, other names and types), each algorithm's file ("rejects the header's …"), `key_confusion` |
//! | 2.2, 3.5 weak symmetric keys | `unusable_keys`, `headers` (blank and common passwords); a short `jwt_secret` is warned about |
//! | 2.3, 2.4, 3.6 encryption, length, compression | JWE is not spoken: `headers` ("a JWE of five parts") |
//! | 2.5, 3.4 invalid curves and numbers | `es256_numbers`, `es384_numbers`, `eddsa_numbers`, `rs256_padding` |
//! | 2.6, 3.7 several encodings, UTF-8 | `headers` (members twice, UTF-16, not UTF-8, a mark before), each algorithm's file (base64) |
//! | 2.7, 2.8, 3.8, 3.9, 3.12 substitution, issuer, audience | `issuers_and_audiences`, `claims`, "rejects signature of another payload" |
//! | 2.9, 3.3 all signatures are validated | a token within a token is no token: `headers` |
//! | 2.10, 3.10 claims and headers that are not to be trusted | `headers` (`kid`), each algorithm's file (`jwk`, `jku`, `x5u`, `x5c`) |
//! | 3.2 appropriate algorithms | PS*, ES512, ES256K, Ed448 and RSA below 2048 bits are refused: `unusable_keys` |
//! | 3.11 explicit typing | not used by Supabase's tokens: `role` and `exp` are asked for instead: `headers` ("an ID token") |

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;
use serde_json::Value;
use strum::VariantNames;
use tidegate::{
    auth::{Authenticator, TokenError, VerifiedBy},
    secret::Secret,
    server::Config,
};

use crate::support::folder::Folder;

/// One file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    name: String,
    source: String,
    /// The time at which the tokens are looked at.
    now: i64,
    jwks: Option<Value>,
    jwt_secret: Option<String>,
    /// The answer to all of them where no secret is set.
    without_secret: Option<String>,
    leeway: Option<String>,
    #[serde(default)]
    issuers: Vec<String>,
    #[serde(default)]
    audiences: Vec<String>,
    tests: Vec<Vector>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    name: String,
    /// What the second part is, where that is the point.
    claims: Option<String>,
    jws: String,
    answer: String,
}

impl Vectors {
    /// A verifier of this file's keys.
    fn verifier(&self, secret: Option<&str>) -> Authenticator {
        let folder = Folder::new();
        let mut config = Config::defaults();
        config.jwt_secret = Secret::from(secret.unwrap_or_default());
        config.auth.leeway =
            humantime::parse_duration(self.leeway.as_deref().unwrap_or("0s")).unwrap();
        config.auth.issuers.clone_from(&self.issuers);
        config.auth.audiences.clone_from(&self.audiences);
        if let Some(jwks) = &self.jwks {
            config.jwks.file = folder.write("keys.json", &jwks.to_string());
        }
        Authenticator::standalone(&config.trust()).unwrap()
    }
}

fn all() -> Vec<Vectors> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("protocol/jws");
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
        .into_iter()
        .map(|file| {
            let vectors: Vectors = serde_json::from_str(&fs::read_to_string(&file).unwrap())
                .unwrap_or_else(|error| panic!("{file:?}: {error}"));
            assert!(file.ends_with(format!("{}.json", vectors.name)), "{file:?}");
            assert!(!vectors.source.is_empty(), "{file:?} has no source");
            vectors
        })
        .collect()
}

/// The key set of a file of vectors, and its first token, which is good until 2100.
pub(crate) fn good(name: &str) -> (Value, String) {
    let vectors = all().into_iter().find(|vectors| vectors.name == name).unwrap();
    (vectors.jwks.unwrap(), vectors.tests[0].jws.clone())
}

fn answer(verifier: &Authenticator, jws: &str, now: i64) -> &'static str {
    match verifier.verify_at(jws, now) {
        Ok(_) => "ok",
        Err(error) => error.label(),
    }
}

#[test]
fn every_token_of_the_vectors_gets_the_answer_that_stands_with_it() {
    let mut wrong = Vec::new();
    let mut played: BTreeMap<&str, usize> = BTreeMap::new();
    for vectors in all() {
        let verifier = vectors.verifier(vectors.jwt_secret.as_deref());
        let without =
            vectors.without_secret.as_deref().map(|answer| (answer, vectors.verifier(None)));
        for vector in &vectors.tests {
            let Vector { name, claims, jws, answer: expected } = vector;
            if let Some(claims) = claims {
                use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
                let payload = URL_SAFE_NO_PAD.encode(claims);
                assert_eq!(jws.split('.').nth(1), Some(&*payload), "{}: {name}", vectors.name);
            }
            // The second time it may be remembered.
            for _ in 0..2 {
                let said = answer(&verifier, jws, vectors.now);
                if said != expected {
                    wrong.push(format!("{}: {name}: {said} and not {expected}", vectors.name));
                }
                *played.entry(said).or_default() += 1;
            }
            if let Some((expected, verifier)) = &without {
                assert_eq!(
                    answer(verifier, jws, vectors.now),
                    *expected,
                    "{name} without a secret"
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(played.values().sum::<usize>() > 4_000, "{played:?}");
    for kind in TokenError::VARIANTS
        .iter()
        .copied()
        .filter(|kind| !["missing", "revoked", "key_gone"].contains(kind))
        .chain(["ok"])
    {
        assert!(played.contains_key(kind), "no vector gets {kind}");
    }
}

/// What opens a door is at least known to the key that it names: by another key set, by none, or by
/// another secret, each of the good tokens is refused.
#[test]
fn no_token_of_the_vectors_is_good_under_other_keys() {
    let mut good = 0;
    for vectors in all() {
        let (own, mut strange) =
            (vectors.verifier(vectors.jwt_secret.as_deref()), Config::defaults());
        strange.jwt_secret = Secret::from("another-secret-than-that-of-the-vectors");
        let strange = Authenticator::standalone(&strange.trust()).unwrap();
        for Vector { name, jws, .. } in &vectors.tests {
            if let Ok(token) = own.verify_at(jws, vectors.now) {
                good += 1;
                let verified_by = token.verified_by;
                assert!(
                    VerifiedBy::all().any(|known| known == verified_by),
                    "{name}: {verified_by:?}"
                );
                let error = strange.verify_at(jws, vectors.now).unwrap_err();
                assert!(matches!(error.label(), "signature" | "no_signer"), "{name}: {error}");
            }
        }
    }
    assert!(good > 100, "{good}");
}
