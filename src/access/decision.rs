//! The one function that decides who may do what: [`Rules::decide_found`].
//!
//! It is pure, and `protocol/authorization.json` is its table. A token's faults are part of the
//! [`AccessRequest`], so that no caller can overlook one. The result is a [`Decision`]: the verdict,
//! and the rule, grant or fault that led to it.

use std::{fmt, sync::Arc};

use super::{
    grant::Grant,
    pattern::Captures,
    rule::{Denied, Rule},
    rules::{Found, Rules},
    settings::Topics,
};
use crate::{
    auth::{Claims, TokenError},
    protocol::{
        error_code::{ErrorCode, Refusal},
        topic::Privacy,
    },
    telemetry::audit::Decided,
};

/// What a client wants to do with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Receive its broadcasts.
    Read,
    /// Broadcast to it.
    Write,
}

/// A request for a decision.
#[derive(Debug, Clone, Copy)]
pub struct AccessRequest<'a> {
    /// What the client wants to do.
    pub action: Action,
    /// The topic without `realtime:`.
    pub sub_topic: &'a str,
    /// The privacy that the client asks for; ignored on topics with a rule.
    pub privacy: Privacy,
    /// The claims of the token, or its fault.
    pub token: Result<&'a Claims, &'a TokenError>,
    /// The claims that count on a topic with a rule once the token has ended. An error or a close
    /// would end production clients for good, and a viewer whose session has just ended may read
    /// what viewers who are signed out may read. `None` where a token that has ended is an error.
    pub fallback: Option<&'a Claims>,
}

/// The answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Verdict {
    /// The action is allowed.
    Allowed,
    /// These claims do not suffice: the channel is open and silent until others arrive.
    Withheld,
    /// The RLS policies on `realtime.messages` decide.
    Policies,
    /// The action is refused.
    Refused,
}

impl Verdict {
    /// The verdict's name in tables, in logs and in the audit log.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// What led to a verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// This grant of the rule holds, counted from 1.
    Grant(usize),
    /// No grant of the rule holds.
    NoGrant,
    /// No rule matches: an ordinary topic.
    NoRule,
    /// A private channel of an ordinary topic.
    Private,
    /// The topic begins like a rule's pattern and does not match it.
    Lookalike,
    /// Topics without a rule are not served.
    NotServed,
    /// Of topics without a rule only private channels are served.
    PrivateOnly,
    /// The token has this fault.
    Token(TokenError),
}

/// The answer to a request, and what led to it.
#[derive(Debug, Clone)]
pub struct Decision {
    /// The answer.
    pub verdict: Verdict,
    /// What led to it.
    pub reason: Reason,
    /// The rule that decided, and what its pattern captured.
    pub rule: Option<(Arc<Rule>, Arc<Captures>)>,
    /// Whether the token has ended and the fallback's claims counted instead.
    pub fell_back: bool,
}

impl Rules {
    /// Finds the topic's rule and decides.
    #[must_use]
    pub fn decide(&self, request: &AccessRequest<'_>) -> Decision {
        self.decide_found(&self.find(request.sub_topic), request)
    }

    /// Decides about a topic whose rule is known: `found` is the result of [`Self::find`] for
    /// `request.sub_topic`. No other code decides.
    #[must_use]
    pub fn decide_found(&self, found: &Found, request: &AccessRequest<'_>) -> Decision {
        let has_rule = matches!(found, Found::Rule(..));
        let (claims, fell_back) = match (request.token, request.fallback) {
            (Err(error), Some(fallback)) if has_rule && error.is_end() => (Ok(fallback), true),
            (claims, _) => (claims, false),
        };
        let (verdict, reason) = match (claims, found) {
            (Err(error), _) => (Verdict::Refused, Reason::Token(error.clone())),
            (Ok(claims), Found::Rule(rule, captures)) => {
                by_rule(rule, captures, request.action, claims)
            }
            (Ok(_), Found::Lookalike) => (Verdict::Refused, Reason::Lookalike),
            (Ok(_), Found::Other) => self.without_rule(request.privacy),
        };
        let rule = match found {
            Found::Rule(rule, captures) => Some((Arc::clone(rule), Arc::clone(captures))),
            Found::Lookalike | Found::Other => None,
        };
        Decision { verdict, reason, rule, fell_back }
    }

    fn without_rule(&self, privacy: Privacy) -> (Verdict, Reason) {
        match (privacy, self.topics()) {
            (_, Topics { allow_other: false, .. }) => (Verdict::Refused, Reason::NotServed),
            (Privacy::Private, _) => (Verdict::Policies, Reason::Private),
            (Privacy::Public, Topics { private_only: true, .. }) => {
                (Verdict::Refused, Reason::PrivateOnly)
            }
            (Privacy::Public, _) => (Verdict::Allowed, Reason::NoRule),
        }
    }
}

fn by_rule(rule: &Rule, captures: &Captures, action: Action, claims: &Claims) -> (Verdict, Reason) {
    let grants: &[Grant] = match action {
        Action::Read => &rule.read,
        Action::Write => &rule.write,
    };
    match grants.iter().position(|grant| grant.holds(captures, claims)) {
        Some(number) => (Verdict::Allowed, Reason::Grant(number + 1)),
        None if action == Action::Read && rule.denied == Denied::Withhold => {
            (Verdict::Withheld, Reason::NoGrant)
        }
        None => (Verdict::Refused, Reason::NoGrant),
    }
}

impl Decision {
    /// Returns the decision as the audit log records it.
    pub(crate) fn decided(&self) -> Decided<'_> {
        let (result, rule) = (self.verdict.label(), self.rule_name());
        Decided { result, rule, because: &self.reason }
    }

    /// Whether the action is allowed.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.verdict == Verdict::Allowed
    }

    /// The name of the rule that decided.
    #[must_use]
    pub fn rule_name(&self) -> Option<&str> {
        self.rule.as_ref().map(|(rule, _)| &*rule.name)
    }

    /// Returns the refusal that the client of a refused join gets: the same for a forbidden topic
    /// and an unknown one.
    #[must_use]
    pub fn refusal(&self, sub_topic: &str) -> Refusal {
        match &self.reason {
            Reason::Token(error) => error.refuse(),
            Reason::PrivateOnly => Refusal::new(ErrorCode::PrivateOnly),
            Reason::Grant(_)
            | Reason::NoGrant
            | Reason::NoRule
            | Reason::Private
            | Reason::Lookalike
            | Reason::NotServed => Refusal::unauthorized(sub_topic),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grant(number) => write!(f, "grant {number}"),
            Self::NoGrant => f.write_str("no grant"),
            Self::NoRule => f.write_str("no rule"),
            Self::Private => f.write_str("private"),
            Self::Lookalike => f.write_str("looks like a rule's topic"),
            Self::NotServed => f.write_str("topics without a rule are not served"),
            Self::PrivateOnly => f.write_str("private channels only"),
            Self::Token(error) => f.write_str(error.label()),
        }
    }
}

/// Writes `allowed: grant 1`, as in `protocol/authorization.json`.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.verdict.label(), self.reason)
    }
}
