//! One topic rule: the spellings of its topic, its NOTIFY channel, its grants.
//!
//! A rule is data. [`Rules::find`](super::rules::Rules::find) chooses the rule of a topic, and
//! [`Rules::decide_found`](super::rules::Rules::decide_found) evaluates its grants.

use std::time::Duration;

use serde::Deserialize;

use super::{
    grant::Grant,
    pattern::{Captures, Pattern},
};
use crate::{
    clock,
    protocol::topic::{Privacy, TopicKey},
};

/// Longest name of a NOTIFY channel: Postgres cuts longer identifiers without a word.
pub const NOTIFY_CHANNEL_BYTES_MAX: usize = 63;

/// The capture that names the event, in a rule that has events.
pub const EID: &str = "eid";

/// One rule: a section `[[topic]]` of the settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The name of the rule in logs and decisions.
    pub name: Box<str>,
    /// The spellings of the topic, with captures in braces: the same names in each.
    pub pattern: Vec<Pattern>,
    /// The NOTIFY channel that is relayed to the topic; the gateway listens while a client has joined.
    #[serde(default)]
    pub listen: Option<Pattern>,
    /// The user event as which a notification is broadcast.
    #[serde(default)]
    pub event: Option<Box<str>>,
    /// Treats broadcasts of the event as invalidations, which are merged; without it they are
    /// relayed one by one.
    #[serde(default)]
    pub merge: Option<Merge>,
    /// The endpoints of the complete list that a resync sends, for any of the rule's events.
    #[serde(default)]
    pub resync: Vec<Pattern>,
    /// Says that everybody may know which events of the rule have viewers. Without it that are those
    /// events that the database calls public. It matters to clients that come back deaf: they are
    /// told of such events, too, and of any other only if it is one that they have lost.
    #[serde(default)]
    pub listed: bool,
    /// Grants to receive broadcasts.
    #[serde(default)]
    pub read: Vec<Grant>,
    /// Grants to send broadcasts.
    #[serde(default)]
    pub write: Vec<Grant>,
    /// The answer to a join whose claims do not allow reading.
    #[serde(default)]
    pub denied: Denied,
}

/// How the invalidations of one event are merged into fewer messages, without losing an endpoint.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// At most one message is sent per window. Clients wait after a message before they refetch,
    /// and each further message restarts that wait, so the window is well longer than the wait.
    /// `0s` merges only what was published together.
    #[serde(deserialize_with = "clock::duration", default = "Merge::default_window")]
    pub window: Duration,
    /// How long an endpoint is repeated in every further message, because clients forget a message
    /// that is followed too soon by another one. The default is the window, by which a network may
    /// delay one message against the next, plus the 2 s that clients wait.
    #[serde(deserialize_with = "clock::duration", default = "Merge::default_carry")]
    pub carry: Duration,
    /// The field of the payload whose lists of texts are united.
    #[serde(default = "Merge::default_union")]
    pub union: Box<str>,
}

impl Merge {
    fn default_window() -> Duration {
        Duration::from_secs(3)
    }

    fn default_carry() -> Duration {
        Duration::from_secs(5)
    }

    fn default_union() -> Box<str> {
        "endpoints".into()
    }
}

/// The answer to a join whose claims do not allow reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Denied {
    /// An error reply.
    #[default]
    Refuse,
    /// The reply is `ok`, and nothing is delivered until an `access_token` event or a new join
    /// brings sufficient claims: clients join with the anon key first and send the user's token
    /// later, and some never retry a refused join.
    Withhold,
}

impl Rule {
    /// Returns what the patterns capture for the event `eid`; `None` if they capture more than the
    /// event, or cannot capture this one.
    #[must_use]
    pub fn event_captures(&self, eid: &str) -> Option<Captures> {
        let pattern = self.pattern.first()?;
        let captures = Captures::from([(EID.into(), eid.into())]);
        // Expanding and matching again rejects an `eid` that the capture's class does not allow.
        (pattern.captures(&pattern.expand(&captures))? == captures).then_some(captures)
    }

    /// Returns the public topics with these captures, one for each pattern.
    pub fn spellings(&self, captures: &Captures) -> impl Iterator<Item = TopicKey> {
        self.pattern.iter().map(|pattern| TopicKey {
            sub_topic: pattern.expand(captures).into(),
            privacy: Privacy::Public,
        })
    }

    /// Returns every mistake of the rule itself, without its name.
    #[must_use]
    pub fn validate(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let names = self.pattern.first().map(Pattern::capture_names).unwrap_or_default();
        if self.pattern.is_empty() {
            mistakes.push("`pattern` is empty".to_owned());
        }
        for pattern in self.pattern.iter().skip(1).chain(&self.listen).chain(&self.resync) {
            if pattern.capture_names() != names {
                mistakes.push(format!(
                    "`{pattern}` does not capture the same names as the first pattern"
                ));
            }
        }
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            mistakes.push("a pattern captures one name twice".to_owned());
        }
        if self.listen.is_some() != self.event.is_some() {
            mistakes.push("`listen` and `event` go together".to_owned());
        }
        if self.merge.is_some() && (self.listen.is_none() || !names.contains(&EID)) {
            mistakes.push("`merge` goes with `listen` and a capture named `eid`".to_owned());
        }
        if self.merge.is_none() && !self.resync.is_empty() {
            mistakes.push("`resync` goes with `merge`".to_owned());
        }
        for grant in self.read.iter().chain(&self.write) {
            mistakes.extend(grant.validate(&names));
        }
        mistakes
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rule_names_each_of_its_mistakes() {
        let rule: Rule = serde_json::from_value(json!({
            "name": "x", "pattern": ["a_{eid}", "b_{other}"], "listen": "c_{eid}",
            "read": [{}, { "claim": "p" }, { "claim": "p", "equals": "{nobody}" }],
        }))
        .unwrap();
        assert_eq!(rule.validate().len(), 5);
    }
}
