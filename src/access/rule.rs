//! A topic → its rule and captures, and the grants that say who may read and write it.
//!
//! Rules are data: the first one with a pattern that matches a topic decides. A topic that begins
//! like a pattern and fails its captures is refused; one that begins like none is an ordinary
//! topic. Nothing here does I/O, and nothing here decides: [`TopicRules::decide`] does.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use serde::Deserialize;

use super::settings::Topics;
use crate::{
    auth::Claims,
    clock,
    protocol::topic::{Privacy, TopicKey},
};

/// Longest NOTIFY channel: Postgres cuts identifiers there, silently.
pub const NOTIFY_CHANNEL_BYTES_MAX: usize = 63;

/// The capture that names the event, where a rule has events.
pub const EID: &str = "eid";

/// All rules, in the order in which they are tried.
#[derive(Debug, Clone, Default)]
pub struct TopicRules {
    rules: Vec<Arc<Rule>>,
    topics: Topics,
}

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

/// A set of conditions; it holds if all of them do. An action is allowed if any grant holds.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The token's role is one of these.
    #[serde(default)]
    pub role: Option<Vec<Box<str>>>,
    /// The path of a claim, with captures: `admin_events.{eid}`. Goes with `any_of` or `equals`.
    #[serde(default)]
    pub claim: Option<Box<str>>,
    /// The claim is one of these strings.
    #[serde(default)]
    pub any_of: Option<Vec<Box<str>>>,
    /// The claim is this string, which may be a capture: `{person}`.
    #[serde(default)]
    pub equals: Option<Box<str>>,
}

/// As it stands in the settings: `{ role = ["anon"] }`.
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

/// What a pattern's braces caught, by name.
pub type Captures = BTreeMap<Box<str>, Box<str>>;

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

impl Grant {
    /// Whether all conditions hold.
    #[must_use]
    pub fn holds(&self, captures: &Captures, claims: &Claims) -> bool {
        if let Some(roles) = &self.role
            && !roles.iter().any(|role| **role == *claims.role)
        {
            return false;
        }
        let Some(path) = &self.claim else {
            // A grant without any condition never holds; `mistake` reports it, too.
            return self.role.is_some();
        };
        // The path is split before captures are filled in: a capture cannot reach another claim.
        let path = path.split('.').map(|part| fill(part, captures));
        let Some(claim) = claims.text_at(path) else {
            return false;
        };
        match (&self.any_of, &self.equals) {
            (Some(values), None) => values.iter().any(|value| **value == *claim),
            (None, Some(value)) => fill(value, captures) == claim,
            (None, None) | (Some(_), Some(_)) => false,
        }
    }

    fn mistake(&self, names: &[&str]) -> Option<String> {
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

/// Replaces `{name}` by what was captured, once: what was captured is not looked into.
fn fill(text: &str, captures: &Captures) -> String {
    let mut parts = text.split('{');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, after) = part.split_once('}').unwrap_or((part, ""));
        out.push_str(captures.get(name).map_or("", |value| value));
        out.push_str(after);
    }
    out
}

/// Literal text with captures: `event_offers_{event:uuid}_{person:uuid}`.
///
/// A capture's class says what it takes: `eid` (the default: 1 to 50 of `A-Z a-z 0-9 -`),
/// `uuid` (36 characters), or `any` (the rest of the topic, at least one character).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: Box<str>,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(Box<str>),
    Capture { name: Box<str>, class: Class },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Eid,
    Uuid,
    Any,
}

impl Class {
    /// How many bytes at the start of `text` the class takes, if it can.
    fn take(self, text: &str) -> Option<usize> {
        let is_eid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        match self {
            Self::Any => (!text.is_empty()).then_some(text.len()),
            Self::Eid => {
                let length = text.bytes().take_while(|byte| is_eid(*byte)).count();
                (1..=50).contains(&length).then_some(length)
            }
            Self::Uuid => {
                let head = text.get(..36)?;
                uuid::Uuid::try_parse(head).is_ok().then_some(36)
            }
        }
    }
}

impl Pattern {
    /// What the braces catch if the whole of `text` matches.
    #[must_use]
    pub fn captures(&self, text: &str) -> Option<Captures> {
        let (mut rest, mut captures) = (text, Captures::new());
        for part in &self.parts {
            match part {
                Part::Literal(literal) => rest = rest.strip_prefix(&**literal)?,
                Part::Capture { name, class } => {
                    let (value, after) = rest.split_at(class.take(rest)?);
                    captures.insert(name.clone(), value.into());
                    rest = after;
                }
            }
        }
        rest.is_empty().then_some(captures)
    }

    /// The pattern with its captures filled in.
    #[must_use]
    pub fn fill(&self, captures: &Captures) -> String {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Literal(literal) => &**literal,
                Part::Capture { name, .. } => captures.get(name).map_or("", |value| value),
            })
            .collect()
    }

    fn literal_prefix(&self) -> &str {
        match self.parts.first() {
            Some(Part::Literal(literal)) => literal,
            Some(Part::Capture { .. }) | None => "",
        }
    }

    fn capture_names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self
            .parts
            .iter()
            .filter_map(|part| match part {
                Part::Capture { name, .. } => Some(&**name),
                Part::Literal(_) => None,
            })
            .collect();
        names.sort_unstable();
        names
    }
}

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some((literal, after)) = rest.split_once('{') {
            if !literal.is_empty() {
                parts.push(Part::Literal(literal.into()));
            }
            let (capture, after) = after.split_once('}').ok_or(PatternError::Brace)?;
            let (name, class) = capture.split_once(':').unwrap_or((capture, "eid"));
            let class = match class {
                "eid" => Class::Eid,
                "uuid" => Class::Uuid,
                "any" if after.is_empty() => Class::Any,
                "any" => return Err(PatternError::AnyInside),
                _ => return Err(PatternError::Class),
            };
            if name.is_empty()
                || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            {
                return Err(PatternError::Name);
            }
            parts.push(Part::Capture { name: name.into(), class });
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Literal(rest.into()));
        }
        if !matches!(parts.first(), Some(Part::Literal(_))) {
            return Err(PatternError::Prefix);
        }
        let pairs = parts.iter().zip(parts.iter().skip(1));
        for (part, next) in pairs {
            match (part, next) {
                (Part::Capture { .. }, Part::Capture { .. }) => return Err(PatternError::Adjacent),
                // The capture would take the literal's first character, too.
                (Part::Capture { class: Class::Eid, .. }, Part::Literal(literal))
                    if Class::Eid.take(literal).is_some() =>
                {
                    return Err(PatternError::Adjacent);
                }
                (Part::Capture { .. } | Part::Literal(_), _) => {}
            }
        }
        Ok(Self { text: text.into(), parts })
    }
}

/// Why a pattern is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A brace is not closed.
    #[error("a brace is not closed")]
    Brace,
    /// The class is unknown.
    #[error("a capture is {{name}}, {{name:uuid}} or {{name:any}}")]
    Class,
    /// The name is empty or not in `a-z_`.
    #[error("a capture's name is of a-z and _")]
    Name,
    /// `any` takes the rest and so stands last.
    #[error("a capture of class any stands last")]
    AnyInside,
    /// It would match everything.
    #[error("a pattern begins with literal text")]
    Prefix,
    /// It cannot be told where one capture ends.
    #[error("a capture is followed by text that it cannot take")]
    Adjacent,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| serde::de::Error::custom(format!("`{text}`: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::server::settings::Config;

    fn rules() -> TopicRules {
        let config = Config::defaults();
        TopicRules::new(config.topic, config.topics)
    }

    fn claims(value: &serde_json::Value) -> Claims {
        Claims::try_from(value.as_object().unwrap().clone()).unwrap()
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

        /// So that no two topics are taken for one, and none for another.
        #[test]
        fn a_topic_that_matches_is_its_pattern_filled_with_what_was_captured(
            topic in prop_oneof!["[A-Za-z0-9_-]{0,60}", any::<String>()],
        ) {
            for pattern in ["a_{eid}_b", "a_{x:uuid}_{y:uuid}", "a_{rest:any}", "a_{eid}_{rest:any}"] {
                let pattern: Pattern = pattern.parse().unwrap();
                for text in [&topic, &format!("a_{topic}_b"), &format!("a_{topic}")] {
                    if let Some(captures) = pattern.captures(text) {
                        prop_assert_eq!(&pattern.fill(&captures), text);
                    }
                }
            }
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

    #[test]
    fn a_capture_takes_fifty_characters_and_not_one_more() {
        let pattern: Pattern = "t_{eid}".parse().unwrap();
        assert!(pattern.captures(&format!("t_{}", "A".repeat(50))).is_some());
        assert!(pattern.captures(&format!("t_{}", "A".repeat(51))).is_none());
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

    #[test]
    fn a_pattern_that_cannot_be_told_apart_is_refused() {
        for (text, error) in [
            ("a{x}b", PatternError::Adjacent),
            ("a{x}{y}", PatternError::Adjacent),
            ("{x}", PatternError::Prefix),
            ("a{x:any}b", PatternError::AnyInside),
            ("a{x", PatternError::Brace),
            ("a{x:int}", PatternError::Class),
            ("a{}", PatternError::Name),
        ] {
            assert_eq!(text.parse::<Pattern>(), Err(error), "{text}");
        }
    }

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
