//! Grants: the conditions under which a token's claims allow an action.
//!
//! Invariant: a claim's path is split before captures are inserted, so that a topic cannot choose
//! which claim is compared.

use std::fmt;

use serde::Deserialize;

use super::pattern::Captures;
use crate::auth::Claims;

/// A set of conditions. A grant holds if all of its conditions do; an action is allowed if any of
/// its grants holds.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The token's role is one of these.
    #[serde(default)]
    pub role: Option<Vec<Box<str>>>,
    /// The path of a claim, with captures: `admin_events.{eid}`. Needs either `any_of` or `equals`.
    #[serde(default)]
    pub claim: Option<Box<str>>,
    /// The claim is one of these strings.
    #[serde(default)]
    pub any_of: Option<Vec<Box<str>>>,
    /// The claim is this string, which may be a capture: `{person}`.
    #[serde(default)]
    pub equals: Option<Box<str>>,
}

/// Writes the grant as in the settings: `{ role = ["anon"] }`.
impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut conditions = Vec::new();
        if let Some(roles) = &self.role {
            conditions.push(format!("role = {roles:?}"));
        }
        if let Some(claim) = &self.claim {
            conditions.push(format!("claim = {claim:?}"));
        }
        if let Some(values) = &self.any_of {
            conditions.push(format!("any_of = {values:?}"));
        }
        if let Some(value) = &self.equals {
            conditions.push(format!("equals = {value:?}"));
        }
        write!(f, "{{ {} }}", conditions.join(", "))
    }
}

impl Grant {
    /// Whether all conditions hold for these claims.
    #[must_use]
    pub fn holds(&self, captures: &Captures, claims: &Claims) -> bool {
        if let Some(roles) = &self.role
            && !roles.iter().any(|role| **role == *claims.role)
        {
            return false;
        }
        let Some(path) = &self.claim else {
            // A grant without a condition never holds; `validate` reports it as well.
            return self.role.is_some();
        };
        let path = path.split('.').map(|part| expand(part, captures));
        let Some(claim) = claims.text_at(path) else {
            return false;
        };
        match (&self.any_of, &self.equals) {
            (Some(values), None) => values.iter().any(|value| **value == *claim),
            (None, Some(value)) => expand(value, captures) == claim,
            (None, None) | (Some(_), Some(_)) => false,
        }
    }

    /// Returns what is wrong with the grant of a rule whose patterns capture these names.
    pub(super) fn validate(&self, names: &[&str]) -> Option<String> {
        let values = usize::from(self.any_of.is_some()) + usize::from(self.equals.is_some());
        if self.role.is_none() && self.claim.is_none() {
            return Some("a grant needs `role` or `claim`".to_owned());
        }
        if values != usize::from(self.claim.is_some()) {
            return Some("`claim` goes with one of `any_of` and `equals`".to_owned());
        }
        [&self.claim, &self.equals].into_iter().flatten().find_map(|text| {
            let mut named = text.split('{').skip(1).filter_map(|part| part.split('}').next());
            named
                .any(|name| !names.contains(&name))
                .then(|| format!("`{text}` names no capture of the patterns"))
        })
    }
}

/// Replaces each `{name}` by its capture, in one pass: braces within a captured value stay text.
fn expand(text: &str, captures: &Captures) -> String {
    let mut parts = text.split('{');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, after) = part.split_once('}').unwrap_or((part, ""));
        out.push_str(captures.get(name).map_or("", |value| value));
        out.push_str(after);
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::access::Rule;

    fn claims(value: &serde_json::Value) -> Claims {
        Claims::try_from(value.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_captured_value_cannot_reach_another_claim() {
        let rule: Rule = serde_json::from_value(json!({
            "name": "x", "pattern": ["x-{rest:any}"],
            "read": [{ "claim": "levels.{rest}", "any_of": ["super"] }],
        }))
        .unwrap();
        let claims = claims(&json!({
            "role": "authenticated", "exp": 1, "levels": { "a": { "b": "super" } },
        }));
        let captures = rule.pattern[0].captures("x-a.b").unwrap();
        assert!(!rule.read[0].holds(&captures, &claims));
    }
}
