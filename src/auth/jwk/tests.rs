//! Tests of which documents and keys are accepted.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// The key of one of the vectors' files.
pub(in crate::auth) fn jwk(vectors: &str) -> Value {
    serde_json::from_str::<Value>(vectors).unwrap()["jwks"]["keys"][0].clone()
}

pub(in crate::auth) fn rsa_key() -> Value {
    jwk(include_str!("../../../protocol/jws/rs256.json"))
}

pub(in crate::auth) fn parse(
    keys: &Value,
    from: KeySource,
) -> Result<PublishedKeys, DocumentError> {
    PublishedKeys::parse(json!({ "keys": keys }).to_string().as_bytes(), from)
}

fn reasons(keys: &Value, from: KeySource) -> Vec<&'static str> {
    let published = parse(keys, from).unwrap();
    published.unusable.iter().map(|(_, reason)| reason.label()).collect()
}

#[test]
fn a_document_is_an_object_with_a_list_of_at_most_64_keys() {
    for text in ["", "[]", "{}", "null", r#"{"keys":{}}"#, r#"{"keys":[],"keys":[]}"#, "<html>"] {
        let error = PublishedKeys::parse(text.as_bytes(), KeySource::File).err();
        assert_eq!(error, Some(DocumentError::Malformed), "{text}");
    }
    let keys = |count| {
        let key = |at| json!({ "kty": "oct", "kid": format!("{at}"), "k": "A".repeat(43) });
        (0..count).map(key).collect::<Vec<_>>().into()
    };
    assert_eq!(parse(&keys(64), KeySource::File).map(|keys| keys.key_count()), Ok(64));
    assert_eq!(parse(&keys(65), KeySource::File).err(), Some(DocumentError::TooMany));
    assert_eq!(parse(&json!([]), KeySource::Url).map(|keys| keys.key_count()), Ok(0));
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
        let expected: Vec<_> =
            Some(reason).filter(|reason| !reason.is_empty()).into_iter().collect();
        assert_eq!(reasons(&json!([key]), KeySource::File), expected, "{key}");
    }
    let twice = json!([rsa_key(), rsa_key()]);
    assert_eq!(reasons(&twice, KeySource::File), ["duplicate", "duplicate"]);
}

#[test]
fn a_modulus_may_have_its_sign_in_front_and_8192_bits() {
    let modulus = |zeros: usize, length| {
        let mut bytes = vec![0; zeros];
        bytes.extend(vec![0xff_u8; length]);
        json!([{ "kty": "RSA", "kid": "a", "e": "AQAB", "n": URL_SAFE_NO_PAD.encode(bytes) }])
    };
    for (zeros, length) in [(0, 256), (1, 256), (1, 1024)] {
        assert!(reasons(&modulus(zeros, length), KeySource::Url).is_empty());
    }
    assert_eq!(reasons(&modulus(1, 255), KeySource::Url), ["weak"]);
}

#[test]
fn a_symmetric_key_at_a_url_is_everybodys_and_nobody_is_believed_by_it() {
    let keys = json!([{ "kty": "oct", "kid": "a", "k": "A".repeat(43) }]);
    assert!(reasons(&keys, KeySource::File).is_empty());
    assert_eq!(reasons(&keys, KeySource::Url), ["private"]);
    let short = json!([{ "kty": "oct", "kid": "a", "k": "A".repeat(42) }]);
    assert_eq!(reasons(&short, KeySource::File), ["weak"]);
}

proptest! {
    #[test]
    fn random_documents_never_panic(text in any::<Vec<u8>>(), name in "[a-z_5#]{1,8}", value in r#"[ -~]{0,40}"#) {
        let _ = PublishedKeys::parse(&text, KeySource::File); // Whether it is one is not the question.
        let mut key = rsa_key();
        key[&name] = serde_json::from_str(&value).unwrap_or(Value::String(value));
        prop_assert!(parse(&json!([key]), KeySource::Url).is_ok());
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
        let published = parse(&json!([key]), KeySource::Url).unwrap();
        prop_assert_eq!(published.key_count() + published.unusable.len(), 1);
    }
}
