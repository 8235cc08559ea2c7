//! The settings of the sections `[topics]` and `[[topic]]`, and what can be wrong with them.

use serde::Deserialize;

use super::rule::Rule;

/// Which topics without a rule are served: the section `[topics]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topics {
    /// Whether they are served as ordinary topics.
    pub allow_other: bool,
    /// Whether only private channels of them are.
    pub private_only: bool,
}

/// Checks the rules of the sections `[[topic]]`, each alone and against those before it. Returns
/// every mistake, with the name of its rule.
pub(crate) fn validate_rules(rules: &[Rule]) -> Vec<String> {
    let mut mistakes = Vec::new();
    for (number, rule) in rules.iter().enumerate() {
        let name = &rule.name;
        let before = &rules[..number];
        if rule.listen.is_some() && before.iter().any(|other| other.listen == rule.listen) {
            mistakes.push(format!("topic \"{name}\": another rule listens to the same"));
        }
        let own = rule.validate();
        mistakes.extend(own.into_iter().map(|mistake| format!("topic \"{name}\": {mistake}")));
    }
    mistakes
}
