//! All rules in their order, and the one that decides about a topic.

use std::sync::Arc;

use super::{pattern::Captures, rule::Rule, settings::Topics};

/// All rules, in the order in which they are tried.
#[derive(Debug, Clone, Default)]
pub struct TopicRules {
    rules: Vec<Arc<Rule>>,
    topics: Topics,
}

/// What the rules say of a topic.
#[derive(Debug, Clone)]
pub enum Found {
    /// This rule decides.
    Rule(Arc<Rule>, Captures),
    /// No rule's business: an ordinary topic, if those are served.
    Other,
    /// Begins like a rule's pattern and does not match it.
    Lookalike,
}

impl TopicRules {
    /// The rules in the order in which they are tried.
    #[must_use]
    pub fn new(rules: Vec<Rule>, topics: Topics) -> Self {
        Self { rules: rules.into_iter().map(Arc::new).collect(), topics }
    }

    /// What is served of the topics that no rule matches.
    #[must_use]
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// The rules that merge and of which `eid` is an event, with what their patterns capture.
    pub fn merged<'a>(&'a self, eid: &'a str) -> impl Iterator<Item = (&'a Arc<Rule>, Captures)> {
        let merged = self.rules.iter().filter(|rule| rule.merge.is_some());
        merged.filter_map(move |rule| Some((rule, rule.event_captures(eid)?)))
    }

    /// Finds the rule that decides about `sub_topic`.
    #[must_use]
    pub fn find(&self, sub_topic: &str) -> Found {
        let mut resembles = false;
        for rule in &self.rules {
            for pattern in &rule.pattern {
                if let Some(captures) = pattern.captures(sub_topic) {
                    return Found::Rule(Arc::clone(rule), captures);
                }
                resembles |= sub_topic.starts_with(pattern.literal_prefix());
            }
        }
        if resembles { Found::Lookalike } else { Found::Other }
    }
}

impl TopicRules {
    /// Whether the database tells of `sub_topic`.
    #[must_use]
    pub fn is_listened(&self, sub_topic: &str) -> bool {
        match self.find(sub_topic) {
            Found::Rule(rule, _) => rule.listen.is_some(),
            Found::Other | Found::Lookalike => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::server::settings::Config;

    fn rules() -> TopicRules {
        let config = Config::defaults();
        TopicRules::new(config.topic, config.topics)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]


        /// What a rule protects is not reached by a spelling that its pattern misses.
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
            let listen = rule.listen.as_ref().unwrap().fill(&captures);
            assert_eq!(listen, "cache_invalidate_AB3028");
        }
    }
}
