//! Patterns of topics and NOTIFY channels, and what they capture.
//!
//! Invariant: matching is unambiguous. A text that matches a pattern is exactly the pattern with its
//! captures inserted, so that no two topics are taken for one.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;

/// The captured parts of a topic, by name.
pub type Captures = BTreeMap<Box<str>, Box<str>>;

/// Literal text with captures: `event_offers_{event:uuid}_{person:uuid}`.
///
/// The class of a capture decides what it matches: `eid` (the default: 1 to 50 of `A-Z a-z 0-9 -`),
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
    /// Returns how many bytes at the start of `text` belong to the capture; `None` if it does not match.
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
    /// Returns the captures if the whole of `text` matches.
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

    /// Returns the pattern with its captures inserted.
    #[must_use]
    pub fn expand(&self, captures: &Captures) -> String {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Literal(literal) => &**literal,
                Part::Capture { name, .. } => captures.get(name).map_or("", |value| value),
            })
            .collect()
    }

    /// The text before the first capture.
    pub(super) fn literal_prefix(&self) -> &str {
        match self.parts.first() {
            Some(Part::Literal(literal)) => literal,
            Some(Part::Capture { .. }) | None => "",
        }
    }

    /// The names of the captures, sorted.
    pub(super) fn capture_names(&self) -> Vec<&str> {
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

/// Why a text is not a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A `{` has no `}`.
    #[error("a brace is not closed")]
    Brace,
    /// The class is not one of the three.
    #[error("a capture is {{name}}, {{name:uuid}} or {{name:any}}")]
    Class,
    /// The name is empty or has a character other than `a-z` and `_`.
    #[error("a capture's name is of a-z and _")]
    Name,
    /// Text follows a capture of class `any`, which matches the whole rest.
    #[error("a capture of class any stands last")]
    AnyInside,
    /// The pattern begins with a capture, so that it would match nearly every topic.
    #[error("a pattern begins with literal text")]
    Prefix,
    /// A capture is followed by another one, or by text that it would match itself.
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

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// So that no two topics are taken for one, and none for another.
        #[test]
        fn a_topic_that_matches_is_its_pattern_filled_with_what_was_captured(
            topic in prop_oneof!["[A-Za-z0-9_-]{0,60}", any::<String>()],
        ) {
            for pattern in ["a_{eid}_b", "a_{x:uuid}_{y:uuid}", "a_{rest:any}", "a_{eid}_{rest:any}"] {
                let pattern: Pattern = pattern.parse().unwrap();
                for text in [&topic, &format!("a_{topic}_b"), &format!("a_{topic}")] {
                    if let Some(captures) = pattern.captures(text) {
                        prop_assert_eq!(&pattern.expand(&captures), text);
                    }
                }
            }
        }
    }

    #[test]
    fn a_capture_takes_fifty_characters_and_not_one_more() {
        let pattern: Pattern = "t_{eid}".parse().unwrap();
        assert!(pattern.captures(&format!("t_{}", "A".repeat(50))).is_some());
        assert!(pattern.captures(&format!("t_{}", "A".repeat(51))).is_none());
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
}
