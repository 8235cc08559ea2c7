//! All rules in the order in which they are tried, and the search for the one that decides.
//!
//! Invariants: the first rule with a pattern that matches a topic decides; a topic that begins like
//! a pattern and does not match it is refused ([`Found::Lookalike`]), so that a misspelling never
//! falls back to the permissions of an ordinary topic; any other topic is ordinary. Nothing here
//! does I/O.

use std::sync::Arc;

use super::{pattern::Captures, rule::Rule, settings::Topics};

/// All rules, in the order in which they are tried, and the settings for topics without a rule.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    rules: Vec<Arc<Rule>>,
    topics: Topics,
}

/// What the rules know about a topic. A clone is a few reference counts.
#[derive(Debug, Clone)]
pub enum Found {
    /// This rule decides; its pattern has captured this.
    Rule(Arc<Rule>, Arc<Captures>),
    /// No pattern resembles the topic: an ordinary one, if those are served.
    Other,
    /// The topic begins like a pattern and does not match it.
    Lookalike,
}

impl Found {
    /// Whether the topic has a rule with a NOTIFY channel.
    #[must_use]
    pub fn is_listened(&self) -> bool {
        match self {
            Self::Rule(rule, _) => rule.listen.is_some(),
            Self::Other | Self::Lookalike => false,
        }
    }
}

impl Rules {
    /// Creates the list of rules, in the order in which they are tried.
    #[must_use]
    pub fn new(rules: Vec<Rule>, topics: Topics) -> Self {
        Self { rules: rules.into_iter().map(Arc::new).collect(), topics }
    }

    /// Returns which topics without a rule are served.
    #[must_use]
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Returns the rules with [`Merge`](super::rule::Merge) that have `eid` as an event, and what
    /// their patterns capture for it.
    pub fn merged<'a>(&'a self, eid: &'a str) -> impl Iterator<Item = (&'a Arc<Rule>, Captures)> {
        let merged = self.rules.iter().filter(|rule| rule.merge.is_some());
        merged.filter_map(move |rule| Some((rule, rule.event_captures(eid)?)))
    }

    /// Finds the rule for `sub_topic`.
    #[must_use]
    pub fn find(&self, sub_topic: &str) -> Found {
        let mut resembles = false;
        for rule in &self.rules {
            for pattern in &rule.pattern {
                if let Some(captures) = pattern.captures(sub_topic) {
                    return Found::Rule(Arc::clone(rule), Arc::new(captures));
                }
                resembles |= sub_topic.starts_with(pattern.literal_prefix());
            }
        }
        if resembles { Found::Lookalike } else { Found::Other }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::server::settings::Config;

    fn rules() -> Rules {
        let config = Config::defaults();
        Rules::new(config.topic, config.topics)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// A spelling that a rule's pattern misses does not reach what the rule protects.
        #[test]
        fn whatever_begins_like_a_rules_topic_is_never_an_ordinary_one(
            number in 0_usize..10, rest in any::<String>(),
        ) {
            let prefixes = [
                "cache_invalidate:", "cache_invalidate_", "auction_winner_", "event_offers_",
                "offer_notifications_", "admin-", "admin-auction-", "admin-voting-", "sms-",
                "active-campaigns",
            ];
            let topic = format!("{}{rest}", prefixes[number]);
            prop_assert!(!matches!(rules().find(&topic), Found::Other), "{topic:?}");
        }
    }

    #[test]
    fn both_spellings_of_an_event_are_one_notify_channel() {
        for topic in ["cache_invalidate:AB3028", "cache_invalidate_AB3028"] {
            let Found::Rule(rule, captures) = rules().find(topic) else { panic!("{topic}") };
            let listen = rule.listen.as_ref().unwrap().expand(&captures);
            assert_eq!(listen, "cache_invalidate_AB3028");
        }
    }
}
