//! Tokens of every kind that tests need.

use serde_json::{Value, json};
use tidegate::{auth::sign::sign, clock::unix_now, secret::Secret};

use super::private::{MEMBER, READER};

/// The project's secret in all tests.
pub(crate) const SECRET: &str = "the-secret-of-the-tests-is-long-enough";

/// A token with these claims, signed by the project; `exp` is in an hour unless given.
pub(crate) fn with_claims(mut claims: Value) -> String {
    let fields = claims.as_object_mut().unwrap();
    fields.entry("exp").or_insert_with(|| (unix_now() + 3600).into());
    sign(&Secret::from(SECRET), &claims).unwrap()
}

/// A token with these claims, signed by somebody else.
pub(crate) fn forged(claims: &Value) -> String {
    sign(&Secret::from("not-the-secret-of-the-tests-but-long"), claims).unwrap()
}

/// A token of this role.
pub(crate) fn of_role(role: &str) -> String {
    with_claims(json!({ "role": role }))
}

/// The tokens that transcripts name: `$token:expired`.
pub(crate) fn named(name: &str) -> String {
    let exp = unix_now() + 3600;
    match name {
        "anon" | "authenticated" | "service_role" => of_role(name),
        "member" => with_claims(json!({ "role": "authenticated", "sub": MEMBER })),
        "reader" => with_claims(json!({ "role": "authenticated", "sub": READER })),
        "expired" => with_claims(json!({ "role": "anon", "exp": 1_700_000_000 })),
        "no_role" => with_claims(json!({})),
        "no_exp" => sign(&Secret::from(SECRET), &json!({ "role": "anon" })).unwrap(),
        "wrong_secret" => {
            sign(&Secret::from("another-secret"), &json!({ "role": "anon", "exp": exp })).unwrap()
        }
        _ => panic!("no token is called {name}"),
    }
}
