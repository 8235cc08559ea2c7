//! `tidegate config --explain`: what a token may do with a topic, and what makes it so.

use crate::{
    access::{AccessRequest, Action, Reason, Rules},
    auth::{Authenticator, TokenError, jwks::JwksError},
    protocol::topic::{Privacy, TOPIC_PREFIX},
    server::settings::Config,
};

/// What a token may do with a topic, line by line, for `tidegate config --explain`.
///
/// ```text
/// token: verified, role authenticated
/// topic: admin-auction-AB3028 (rule admin; eid = AB3028)
/// read: allowed: grant 1 { claim = "admin_events.{eid}", any_of = ["super", …] }
/// write: refused: no grant
/// ```
///
/// # Errors
/// [`JwksError`] if there is a key set's file and it cannot be used; that of a URL is not asked.
pub(super) fn explain(
    config: &Config,
    sub_topic: &str,
    token: Option<&str>,
    privacy: Privacy,
) -> Result<String, JwksError> {
    let sub_topic = sub_topic.strip_prefix(TOPIC_PREFIX).unwrap_or(sub_topic);
    let rules = Rules::new(config.topic.clone(), config.topics);
    let authenticator = Authenticator::standalone(&config.trust())?;
    let verified = match token {
        None => Err(TokenError::Missing),
        Some(text) => authenticator.verify(text),
    };
    let mut lines = match &verified {
        Ok(token) => format!("token: verified, role {}\n", token.claims.role),
        Err(error) => format!("token: {error}\n"),
    };
    for (action, name) in [(Action::Read, "read"), (Action::Write, "write")] {
        let decision = rules.decide(&AccessRequest {
            action,
            sub_topic,
            privacy,
            token: verified.as_ref().map(|token| &token.claims),
            fallback: Some(&authenticator.anonymous().claims),
        });
        if action == Action::Read {
            lines.push_str(&match &decision.rule {
                Some((rule, captures)) => {
                    let captured: String = captures
                        .iter()
                        .map(|(name, value)| format!("; {name} = {value}"))
                        .collect();
                    format!("topic: {sub_topic} (rule {}{captured})\n", rule.name)
                }
                None => format!("topic: {sub_topic} (no rule)\n"),
            });
        }
        let grant = match (&decision.reason, &decision.rule, action) {
            (Reason::Grant(number), Some((rule, _)), Action::Read) => rule.read.get(number - 1),
            (Reason::Grant(number), Some((rule, _)), Action::Write) => rule.write.get(number - 1),
            (_, _, _) => None,
        };
        let grant = grant.map(|grant| format!(" {grant}")).unwrap_or_default();
        let instead = if decision.fell_back { " (asked as anon: the token has ended)" } else { "" };
        lines.push_str(&format!("{name}: {decision}{grant}{instead}\n"));
    }
    Ok(lines)
}
