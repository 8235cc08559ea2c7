//! Tests of which tokens are accepted.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::auth::{
    algorithm::{Algorithm, KeySlot, VerifiedBy},
    sign::sign,
};
use crate::server::settings::Config;

const NOW: i64 = 1_800_000_000;
const SECRET: &str = "a-secret-that-is-long-enough-to-sign";

fn config() -> Config {
    let mut config = Config::defaults();
    config.jwt_secret = SECRET.into();
    config.auth.leeway = Duration::ZERO;
    config
}

fn verifier(config: &Config) -> Authenticator {
    Authenticator::standalone(&config.trust()).unwrap()
}

fn token(claims: &Value) -> String {
    sign(&SECRET.into(), claims).unwrap()
}

fn verify(claims: &Value) -> Result<Arc<Token>, TokenError> {
    verifier(&config()).verify_at(&token(claims), NOW)
}

fn lasting() -> String {
    token(&json!({ "role": "anon", "exp": NOW + 9 }))
}

#[test]
fn a_token_holds_until_the_second_of_its_expiry_and_the_leeway() {
    let mut config = config();
    for leeway in [0_i64, 5] {
        config.auth.leeway = Duration::from_secs(leeway.unsigned_abs());
        let verifier = verifier(&config);
        let ends = |exp| verifier.verify_at(&token(&json!({ "role": "anon", "exp": exp })), NOW);
        assert!(ends(NOW - leeway + 1).is_ok());
        let expired = ends(NOW - leeway).unwrap_err();
        assert_eq!(expired, TokenError::Expired { seconds: leeway });
    }
}

#[test]
fn a_remembered_token_still_expires() {
    let (verifier, token) = (verifier(&config()), lasting());
    assert!(!verifier.is_known(&token));
    assert!(verifier.verify_at(&token, NOW).is_ok());
    assert!(verifier.is_known(&token));
    let expired = verifier.verify_at(&token, NOW + 10).unwrap_err();
    assert_eq!(expired, TokenError::Expired { seconds: 1 });
}

#[test]
fn a_token_in_its_grace_is_still_checked_with_the_keys_of_the_moment() {
    let (mut config, token) = (config(), lasting());
    let (verifier, grace) = (verifier(&config), Duration::from_secs(30));
    let token = verifier.verify_at(&token, NOW).unwrap();
    for reload in [false, true] {
        if reload {
            verifier.reload(&config.trust()).unwrap();
        }
        assert!(verifier.recheck(&token, NOW + 9 + 29, grace).is_ok());
        let expired = verifier.recheck(&token, NOW + 9 + 30, grace).unwrap_err();
        assert_eq!(expired, TokenError::Expired { seconds: 30 });
        assert!(verifier.verify_at(token.text(), NOW + 9).is_err(), "it opens nothing");
    }
    config.jwt_secret = "another-secret-that-is-long-enough-to-sign".into();
    verifier.reload(&config.trust()).unwrap();
    let changed = verifier.recheck(&token, NOW, grace).unwrap_err();
    assert_eq!(changed, TokenError::KeyGone);
    assert!(verifier.recheck(verifier.anonymous(), NOW, grace).is_ok());
}

#[test]
fn an_opaque_key_that_has_been_changed_is_noticed() {
    let mut config = config();
    config.secret_key = "sb_secret_a".into();
    let verifier = verifier(&config);
    let token = verifier.verify_at("sb_secret_a", NOW).unwrap();
    assert!(verifier.recheck(&token, NOW, Duration::ZERO).is_ok());
    config.secret_key = "sb_secret_b".into();
    verifier.reload(&config.trust()).unwrap();
    let gone = verifier.recheck(&token, NOW, Duration::ZERO).unwrap_err();
    assert_eq!(gone, TokenError::KeyGone);
}

#[test]
fn an_audience_or_a_missing_subject_changes_nothing_unless_asked_for() {
    let claims = json!({ "role": "authenticated", "aud": "x", "iss": 1, "exp": NOW + 9 });
    let verified = verify(&claims).unwrap();
    assert_eq!((verified.claims.sub(), verified.claims.iat()), (None, None));
}

#[test]
fn revocation_and_audit_can_name_a_token() {
    let claims = json!({ "role": "authenticated", "exp": NOW + 9, "iat": NOW as f64 + 0.6,
        "sub": "a", "session_id": "b", "jti": "c" });
    let claims = verify(&claims).unwrap().claims.clone();
    let named = (claims.sub(), claims.session_id(), claims.jti(), claims.iat());
    assert_eq!(named, (Some("a"), Some("b"), Some("c"), Some(NOW)));
    let strange = json!({ "role": "a", "exp": NOW + 9, "sub": 1, "jti": ["c"] });
    let strange = verify(&strange).unwrap();
    assert_eq!((strange.claims.sub(), strange.claims.jti()), (None, None));
}

#[test]
fn the_previous_secret_is_good_as_long_as_it_is_set() {
    let old = lasting();
    let mut config = config();
    config.jwt_secret = "another-secret-that-is-long-enough-to-sign".into();
    let verifier = verifier(&config);
    assert_eq!(verifier.verify_at(&old, NOW).unwrap_err(), TokenError::Signature);
    config.jwt_secret_previous = SECRET.into();
    verifier.reload(&config.trust()).unwrap();
    let verified_by = verifier.verify_at(&old, NOW).unwrap().verified_by;
    assert_eq!(verified_by.slot, KeySlot::Previous);
    assert_eq!(verified_by.algorithm, Some(Algorithm::Hs256));
    config.jwt_secret_previous = Secret::default();
    verifier.reload(&config.trust()).unwrap();
    assert!(!verifier.is_known(&old), "it outlives its key");
    assert_eq!(verifier.verify_at(&old, NOW).unwrap_err(), TokenError::Signature);
}

#[test]
fn a_reload_is_told_and_takes_over_opaque_keys_issuers_and_bounds() {
    let mut config = config();
    config.publishable_key = "sb_publishable_a".into();
    let verifier = verifier(&config);
    let mut changes = verifier.changes();
    assert!(
        verifier.verify_at("sb_publishable_a", NOW).is_ok()
            && verifier.verify_at(&lasting(), NOW).is_ok()
    );
    assert!(!changes.has_changed().unwrap());
    config.publishable_key = "sb_publishable_b".into();
    config.auth.issuers = vec!["us".to_owned()];
    verifier.reload(&config.trust()).unwrap();
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert!(!verifier.is_known("sb_publishable_a") && verifier.is_known("sb_publishable_b"));
    assert_eq!(verifier.verify_at(&lasting(), NOW).unwrap_err(), TokenError::Issuer);
    config.auth.issuers.clear();
    config.limits.token_bytes_max = lasting().len() - 1;
    verifier.reload(&config.trust()).unwrap();
    assert_eq!(verifier.verify_at(&lasting(), NOW).unwrap_err(), TokenError::Malformed);
}

#[test]
fn a_reload_that_fails_changes_nothing() {
    let mut config = config();
    let verifier = verifier(&config);
    let changes = verifier.changes();
    config.jwt_secret = "another-secret-that-is-long-enough-to-sign".into();
    config.jwks.file = "/nowhere/keys.json".to_owned();
    let error = verifier.reload(&config.trust()).unwrap_err();
    assert_eq!(error.label(), "unreadable");
    assert!(!changes.has_changed().unwrap() && verifier.verify_at(&lasting(), NOW).is_ok());
}

#[test]
fn a_document_read_for_other_settings_is_ignored_and_the_same_one_changes_nothing() {
    let config = config();
    let verifier = verifier(&config);
    let changes = verifier.changes();
    let read_as = verifier.jwks();
    let document = br#"{"keys":[]}"#.to_vec();
    verifier.take(document.clone(), KeySource::Url, &read_as).unwrap();
    assert!(changes.has_changed().unwrap());
    for (read_as, text) in [(&Arc::new(config.jwks.clone()), b"{}".to_vec()), (&read_as, document)]
    {
        let changes = verifier.changes();
        verifier.take(text, KeySource::Url, read_as).unwrap();
        assert!(!changes.has_changed().unwrap());
    }
    let error = verifier.take(b"{}".to_vec(), KeySource::Url, &read_as).unwrap_err();
    assert_eq!(error, DocumentError::Malformed);
}

#[test]
fn an_opaque_key_stands_for_its_role_and_an_unknown_one_for_nothing() {
    let mut config = config();
    config.publishable_key = "sb_publishable_a".into();
    config.secret_key = "sb_secret_b".into();
    let verifier = verifier(&config);
    let role = |key| verifier.verify_at(key, NOW).map(|token| token.claims.role.to_string());
    assert_eq!(role("sb_publishable_a").unwrap(), "anon");
    assert_eq!(role("sb_secret_b").unwrap(), "service_role");
    for key in ["sb_", "sb_secret_", "sb_secret_bb", "sb_publishable_b"] {
        assert_eq!(role(key).unwrap_err(), TokenError::Malformed, "{key}");
    }
    // An empty `access_token` is not the one that the key stands for.
    assert!(!verifier.verify_at("sb_secret_b", NOW).unwrap().is(""));
}

#[test]
fn a_token_above_the_bound_is_not_looked_at() {
    let (mut config, token) = (config(), lasting());
    config.limits.token_bytes_max = token.len();
    assert!(verifier(&config).verify_at(&token, NOW).is_ok());
    config.limits.token_bytes_max = token.len() - 1;
    assert_eq!(verifier(&config).verify_at(&token, NOW).unwrap_err(), TokenError::Malformed);
}

#[test]
fn a_secret_signs_with_each_of_its_algorithms_whatever_the_kid() {
    let (verifier, key) =
        (verifier(&config()), jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes()));
    for (algorithm, ours) in [
        (jsonwebtoken::Algorithm::HS256, Algorithm::Hs256),
        (jsonwebtoken::Algorithm::HS384, Algorithm::Hs384),
        (jsonwebtoken::Algorithm::HS512, Algorithm::Hs512),
    ] {
        let header = jsonwebtoken::Header {
            kid: Some("of-no-key-set".to_owned()),
            ..jsonwebtoken::Header::new(algorithm)
        };
        let claims = json!({ "role": "anon", "exp": NOW + 9 });
        let token = jsonwebtoken::encode(&header, &claims, &key).unwrap();
        let verified_by = verifier.verify_at(&token, NOW).unwrap().verified_by;
        assert_eq!(verified_by, VerifiedBy { slot: KeySlot::Current, algorithm: Some(ours) });
    }
}

proptest! {
    #[test]
    fn a_token_changed_in_any_place_never_verifies(place in any::<prop::sample::Index>(), by in any::<char>()) {
        let (verifier, token) = (verifier(&config()), lasting());
        let place = place.index(token.len());
        let changed: String =
            token.chars().enumerate().map(|(at, it)| if at == place { by } else { it }).collect();
        prop_assert_eq!(verifier.verify_at(&changed, NOW).is_ok(), changed == token);
    }

    #[test]
    fn a_token_that_is_cut_stretched_or_moved_never_verifies(
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        more in "[A-Za-z0-9_.=-]{0,8}",
    ) {
        let (verifier, token) = (verifier(&config()), lasting());
        let (from, to) = (from.index(token.len()), to.index(token.len() + 1));
        let part = token.get(from..to).unwrap_or_default();
        for changed in [format!("{part}{more}"), format!("{more}{part}"), format!("{token}{more}"), format!("{more}{token}")] {
            prop_assert_eq!(verifier.verify_at(&changed, NOW).is_ok(), changed == token);
        }
    }

    #[test]
    fn no_text_and_no_three_parts_panic_or_verify(
        text in any::<String>(),
        parts in prop::array::uniform3(prop::collection::vec(any::<u8>(), 0..64)),
    ) {
        use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
        let verifier = verifier(&config());
        let parts = parts.map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
        let header = r#"{"alg":"HS256"}"#;
        let headed = format!("{}.{parts}", URL_SAFE_NO_PAD.encode(header));
        for text in [text, parts, headed] {
            prop_assert!(verifier.verify_at(&text, NOW).is_err());
        }
    }

    #[test]
    fn random_claims_are_read_or_refused_and_never_panic(
        name in prop::sample::select(vec!["exp", "nbf", "iat", "role", "iss", "aud", "sub"]),
        value in r#"-?[0-9]{1,25}(\.[0-9]{1,5})?(e[+-]?[0-9]{1,4})?|"[ -!#-\[\]-~]{0,80}"|\[\]|\{\}|null|true"#,
        now in any::<i64>(),
    ) {
        let demands = Demands { issuers: vec!["a".to_owned()], audiences: vec!["a".to_owned()], ..Demands::default() };
        for rest in ["", r#","role":"anon","exp":1900000000,"iss":"a","aud":["a"]"#] {
            let claims = format!("{{\"{name}\":{value}{rest}}}");
            for demands in [&demands, &Demands::default()] {
                if let Ok(claims) = Claims::read(claims.as_bytes(), demands, now, Duration::ZERO) {
                    prop_assert!(!claims.role.is_empty() && claims.exp > now);
                }
            }
        }
    }
}
