//! A topic → its rule and captures, and the grants that say who may read and write it.
//!
//! Rules are data: the first one with a pattern that matches a topic decides. A topic that begins
//! like a pattern and fails its captures is refused; one that begins like none is an ordinary
//! topic. Nothing here does I/O, and nothing here decides: [`TopicRules::decide`] does.

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

/// Longest NOTIFY channel: Postgres cuts identifiers there, silently.
pub const NOTIFY_CHANNEL_BYTES_MAX: usize = 63;

/// The capture that names the event, where a rule has events.
pub const EID: &str = "eid";

/// One rule as it stands in the settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Names the rule in logs and decisions.
    pub name: Box<str>,
    /// Spellings of the topic; captures in braces, the same ones in each.
    pub pattern: Vec<Pattern>,
    /// The NOTIFY channel that is relayed to the topic, listened to while somebody has joined.
    #[serde(default)]
    pub listen: Option<Pattern>,
    /// The user event under which a notification is broadcast.
    #[serde(default)]
    pub event: Option<Box<str>>,
    /// Makes broadcasts of the event invalidations, which are merged; absent relays them as they
    /// come.
    #[serde(default)]
    pub merge: Option<Merge>,
    /// What belongs to the complete list of any of the rule's events.
    #[serde(default)]
    pub resync: Vec<Pattern>,
    /// Who may receive.
    #[serde(default)]
    pub read: Vec<Grant>,
    /// Who may send.
    #[serde(default)]
    pub write: Vec<Grant>,
    /// What becomes of a join whose claims do not allow reading.
    #[serde(default)]
    pub denied: Denied,
}

/// How invalidations of one event become fewer, and none is lost.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// At most one message per window; well longer than what clients wait after one, for each
    /// further message restarts that wait. `0s` merges only what was sent together.
    #[serde(deserialize_with = "clock::duration", default = "Merge::default_window")]
    pub window: Duration,
    /// For so long an endpoint is repeated in every further message, because clients forget a
    /// message that is followed too soon by another: the window, by which a network may delay
    /// one message against the next, and the 2 s that clients wait.
    #[serde(deserialize_with = "clock::duration", default = "Merge::default_carry")]
    pub carry: Duration,
    /// The field of the payload with the list of texts that is united.
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

/// What becomes of a join whose claims do not allow reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Denied {
    /// An error reply.
    #[default]
    Refuse,
    /// The join is answered `ok` and nothing is delivered until an `access_token` event or a new
    /// join proves the claims: clients join with the anon key first and send the user's token
    /// later, and some never retry a refused join.
    Withhold,
}

impl Rule {
    /// What the patterns capture where the event is this one; none if they capture more than an
    /// event, or cannot capture that.
    #[must_use]
    pub fn event_captures(&self, eid: &str) -> Option<Captures> {
        let pattern = self.pattern.first()?;
        let captures = Captures::from([(EID.into(), eid.into())]);
        // The pattern knows what it takes: filled in, it must give the same again.
        (pattern.captures(&pattern.fill(&captures))? == captures).then_some(captures)
    }

    /// The topics that what is sent to `sub_topic` reaches: of a rule that listens all spellings,
    /// which are one event, `sub_topic` first; of any other itself.
    #[must_use]
    pub fn topics(&self, sub_topic: &str, captures: &Captures) -> Vec<TopicKey> {
        let mut topics = vec![TopicKey { sub_topic: sub_topic.into(), privacy: Privacy::Public }];
        if self.listen.is_some() {
            topics.extend(self.spellings(captures).filter(|it| *it.sub_topic != *sub_topic));
        }
        topics
    }

    /// The public topics that spell these captures, one for each pattern.
    pub fn spellings(&self, captures: &Captures) -> impl Iterator<Item = TopicKey> {
        self.pattern.iter().map(|pattern| TopicKey {
            sub_topic: pattern.fill(captures).into(),
            privacy: Privacy::Public,
        })
    }

    /// What is wrong with the rule itself; empty if nothing is.
    #[must_use]
    pub fn mistakes(&self) -> Vec<String> {
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
            mistakes.extend(grant.mistake(&names));
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
        assert_eq!(rule.mistakes().len(), 5);
    }
}
