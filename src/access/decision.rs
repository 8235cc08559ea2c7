//! Who may do what: one pure function, [`TopicRules::decide`], decides each read and each write.
//!
//! Joins, broadcasts, REST, changed tokens, reloads, healing and `tidegate config --explain` all
//! ask it, and `protocol/authorization.json` is its table. What it answers is a [`Decision`]: the
//! verdict, and the rule, grant or fault that made it. A token's faults are part of the question,
//! so that there is no other place where a token could be overlooked.

use std::{fmt, sync::Arc};

use super::{
    grant::Grant,
    pattern::Captures,
    rule::{Denied, Rule},
    rules::{Found, TopicRules},
    settings::Topics,
};
use crate::{
    auth::{Claims, TokenError},
    protocol::{
        error_code::{ErrorCode, Refusal},
        topic::Privacy,
    },
};

/// What somebody wants to do with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// To receive its broadcasts.
    Read,
    /// To broadcast to it.
    Write,
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// What for.
    pub action: Action,
    /// The topic without `realtime:`.
    pub sub_topic: &'a str,
    /// As the client asks; topics with a rule ignore it.
    pub privacy: Privacy,
    /// What the token says, or why it says nothing.
    pub token: Result<&'a Claims, &'a TokenError>,
    /// On a topic with a rule, these claims count where the token has ended: an error or a close
    /// would end production clients for good, and what viewers who are signed out may read, those
    /// whose session has just ended may, too. None where a token that has ended is an error.
    pub fallback: Option<&'a Claims>,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Allowed,
    /// Not with these claims: the channel is open and silent until others come.
    Withheld,
    /// Postgres' policies on `realtime.messages` decide.
    Policies,
    /// No.
    Refused,
}

/// What made the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Because {
    /// This grant of the rule holds, counted from 1.
    Grant(usize),
    /// No grant of the rule holds.
    NoGrant,
    /// No rule matches: an ordinary topic.
    NoRule,
    /// A private channel of an ordinary topic.
    Private,
    /// It begins like a rule's pattern and does not match it.
    Lookalike,
    /// Topics without a rule are not served.
    NotServed,
    /// Only private channels of topics without a rule are served.
    PrivateOnly,
    /// The token.
    Token(TokenError),
}

/// The answer, and what made it.
#[derive(Debug, Clone)]
pub struct Decision {
    /// The answer.
    pub verdict: Verdict,
    /// What made it.
    pub because: Because,
    /// The rule that decided, with what its pattern captured.
    pub rule: Option<(Arc<Rule>, Captures)>,
    /// Whether the token has ended and the fallback's claims were asked.
    pub fell_back: bool,
}

impl TopicRules {
    /// Decides. Nothing else in this program does.
    #[must_use]
    pub fn decide(&self, asked: &Asked<'_>) -> Decision {
        let found = self.find(asked.sub_topic);
        let has_rule = matches!(found, Found::Rule(..));
        let (claims, fell_back) = match (asked.token, asked.fallback) {
            (Err(error), Some(fallback)) if has_rule && error.is_end() => (Ok(fallback), true),
            (claims, _) => (claims, false),
        };
        let (verdict, because) = match (claims, &found) {
            (Err(error), _) => (Verdict::Refused, Because::Token(error.clone())),
            (Ok(claims), Found::Rule(rule, captures)) => {
                by_rule(rule, captures, asked.action, claims)
            }
            (Ok(_), Found::Lookalike) => (Verdict::Refused, Because::Lookalike),
            (Ok(_), Found::Other) => self.without_rule(asked.privacy),
        };
        let rule = match found {
            Found::Rule(rule, captures) => Some((rule, captures)),
            Found::Lookalike | Found::Other => None,
        };
        Decision { verdict, because, rule, fell_back }
    }

    fn without_rule(&self, privacy: Privacy) -> (Verdict, Because) {
        match (privacy, self.topics()) {
            (_, Topics { allow_other: false, .. }) => (Verdict::Refused, Because::NotServed),
            (Privacy::Private, _) => (Verdict::Policies, Because::Private),
            (Privacy::Public, Topics { private_only: true, .. }) => {
                (Verdict::Refused, Because::PrivateOnly)
            }
            (Privacy::Public, _) => (Verdict::Allowed, Because::NoRule),
        }
    }
}

fn by_rule(
    rule: &Rule,
    captures: &Captures,
    action: Action,
    claims: &Claims,
) -> (Verdict, Because) {
    let grants: &[Grant] = match action {
        Action::Read => &rule.read,
        Action::Write => &rule.write,
    };
    match grants.iter().position(|grant| grant.holds(captures, claims)) {
        Some(number) => (Verdict::Allowed, Because::Grant(number + 1)),
        None if action == Action::Read && rule.denied == Denied::Withhold => {
            (Verdict::Withheld, Because::NoGrant)
        }
        None => (Verdict::Refused, Because::NoGrant),
    }
}

impl Decision {
    /// Whether the answer is yes.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.verdict == Verdict::Allowed
    }

    /// The name of the rule that decided.
    #[must_use]
    pub fn rule_name(&self) -> Option<&str> {
        self.rule.as_ref().map(|(rule, _)| &*rule.name)
    }

    /// What a client is told whose join is refused: whether a topic is forbidden or unknown, the
    /// same.
    #[must_use]
    pub fn refusal(&self, sub_topic: &str) -> Refusal {
        match &self.because {
            Because::Token(error) => error.refuse(),
            Because::PrivateOnly => Refusal::new(ErrorCode::PrivateOnly),
            Because::Grant(_)
            | Because::NoGrant
            | Because::NoRule
            | Because::Private
            | Because::Lookalike
            | Because::NotServed => Refusal::unauthorized(sub_topic),
        }
    }
}

impl Verdict {
    /// The word for it in tables and logs.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Withheld => "withheld",
            Self::Policies => "policies",
            Self::Refused => "refused",
        }
    }
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grant(number) => write!(f, "grant {number}"),
            Self::NoGrant => f.write_str("no grant"),
            Self::NoRule => f.write_str("no rule"),
            Self::Private => f.write_str("private"),
            Self::Lookalike => f.write_str("looks like a rule's topic"),
            Self::NotServed => f.write_str("topics without a rule are not served"),
            Self::PrivateOnly => f.write_str("private channels only"),
            Self::Token(error) => f.write_str(error.kind()),
        }
    }
}

/// `allowed: grant 1`, as in `protocol/authorization.json`.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.verdict.kind(), self.because)
    }
}
