//! The sender of one REST request's messages: what they cost, which of them are sent, and what the
//! audit log says of them.
//!
//! Invariants: a message that may not be written costs its sender's share and nobody else's; the
//! policies are asked about a private topic once for each request; all denied messages of a request
//! are one line of the audit log.

use std::{collections::HashMap, sync::Arc, time::Duration};

use hyper::StatusCode;
use tokio::time::Instant;

use super::{exchange::Request, policy_headers, shared::Shared};
use crate::{
    access::{AccessRequest, Action, Decision, Verdict},
    auth::Token,
    limits::{Amount, Broadcasts, Effect, Exceeded, Share},
    policies::{PolicyQuery, QueryError},
    protocol::{serializer::Broadcast, topic::Privacy},
    publish::Source,
    socket::Dropped,
    telemetry::audit::{Audit, Caller},
};

/// How long policies may be asked about the private topics of one batch; a message whose topic has
/// no answer by then is not sent.
const QUESTIONS_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a message is not sent.
pub(super) enum PublishError {
    /// The topic may not be written to with this token.
    Denied,
    /// The policies of a private channel gave no answer.
    Unanswered(QueryError),
    /// The policies have allowed the message, and it is one too many.
    TooFast,
}

impl PublishError {
    /// The reason as the audit log names it.
    fn label(&self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Unanswered(error) => error.label(),
            Self::TooFast => "too_fast",
        }
    }
}

/// What the sender is told where the policies gave no answer.
///
/// Source: supabase/realtime `broadcast_controller.ex` @833cf36.
pub(super) fn unanswered(error: &QueryError) -> (StatusCode, &'static str) {
    let status = StatusCode::UNPROCESSABLE_ENTITY;
    match error {
        QueryError::Policy { .. } => (status, "RLS policy error"),
        QueryError::QueryCanceled => (status, "Query canceled"),
        QueryError::MissingPartition => (status, "Missing messages partition"),
        QueryError::Unavailable(_) | QueryError::NotSetUp(_) => {
            (status, "Tenant database unavailable")
        }
        QueryError::PoolTimeout => (StatusCode::TOO_MANY_REQUESTS, "Connection pool exhausted"),
    }
}

/// The sender of one request's messages.
pub(super) struct MessageSender<'a> {
    shared: &'a Shared,
    caller: Caller,
    token: Arc<Token>,
    share: Share,
    /// What becomes of a message that the policies have allowed and that is one too many.
    effect: Effect,
    /// Headers of the request as a JSON object, for RLS policies.
    headers: Arc<str>,
    /// By private topic, why it may not be written to; `None` where it may.
    answers: HashMap<Box<str>, Option<Dropped>>,
    /// When the policies are asked no more.
    deadline: Instant,
    denied: Option<DeniedMessages>,
}

/// The messages of a request that are not sent.
struct DeniedMessages {
    /// The topic of the first.
    topic: Box<str>,
    /// The decision about it.
    decision: Decision,
    fault: &'static str,
    count: usize,
}

impl<'a> MessageSender<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        caller: Caller,
        (token, share): (Arc<Token>, Share),
        effect: Effect,
        request: &Request,
    ) -> Self {
        Self {
            shared,
            caller,
            token,
            share,
            effect,
            headers: policy_headers::rest_headers(request.headers()),
            answers: HashMap::new(),
            deadline: Instant::now() + QUESTIONS_TIMEOUT,
            denied: None,
        }
    }

    /// Decides whether a topic may be written to, which of private topics only the policies know.
    pub(super) fn decide(&self, sub_topic: &str, privacy: Privacy) -> Decision {
        self.shared.access.decide(&AccessRequest {
            action: Action::Write,
            sub_topic,
            privacy,
            token: Ok(&self.token.claims),
            fallback: None,
        })
    }

    /// Takes the messages from the rates, all of them or none.
    ///
    /// # Errors
    /// The rate that they exceed.
    pub(super) fn pay<'m>(
        &self,
        messages: impl Iterator<Item = (&'m Decision, &'m Broadcast)>,
    ) -> Result<(), Exceeded> {
        let mut all = Broadcasts::default();
        for (decision, broadcast) in messages {
            let kind = match (decision.verdict, &decision.rule) {
                (Verdict::Allowed, Some(_)) => &mut all.ruled,
                (Verdict::Allowed, None) => &mut all.ordinary,
                (Verdict::Policies | Verdict::Withheld | Verdict::Refused, _) => &mut all.unsent,
            };
            *kind += amount(broadcast);
        }
        self.shared.limits.broadcast(self.share, &all, Effect::Refused)
    }

    /// Publishes to a topic if its rule or, on a private channel, its policies let the token write.
    pub(super) async fn publish(
        &mut self,
        decision: &Decision,
        sub_topic: &str,
        privacy: Privacy,
        broadcast: Broadcast,
    ) -> Result<(), PublishError> {
        let shared = self.shared;
        let answer = match decision.verdict {
            Verdict::Allowed => Ok(()),
            Verdict::Policies => self.ask(sub_topic).await,
            Verdict::Withheld | Verdict::Refused => {
                shared.socket.metrics.dropped.of(Dropped::WriteDenied).inc();
                Err(PublishError::Denied)
            }
        };
        if let Err(error) = answer {
            self.deny(decision, sub_topic, &error);
            return Err(error);
        }
        Audit::Rest { topic: sub_topic, decided: decision.decided(), fault: None, count: None }
            .note(self.caller, Some(self.token.subject()));
        if decision.verdict == Verdict::Policies {
            // The sender has paid; the project pays for what the policies have allowed.
            shared.limits.send(amount(&broadcast), self.effect).map_err(|_exceeded| {
                shared.socket.metrics.dropped.of(Dropped::Rate).inc();
                PublishError::TooFast
            })?;
        }
        let target = shared.publisher.target(sub_topic, privacy, decision.rule.as_ref());
        shared.publisher.publish(&target, Source::Rest, vec![broadcast]).await;
        Ok(())
    }

    /// Asks the policies of a private topic, once for all messages of the request.
    async fn ask(&mut self, sub_topic: &str) -> Result<(), PublishError> {
        let dropped = &self.shared.socket.metrics.dropped;
        if let Some(answer) = self.answers.get(sub_topic) {
            let Some(reason) = answer else { return Ok(()) };
            dropped.of(*reason).inc();
            return Err(PublishError::Denied);
        }
        let may_write = if Instant::now() < self.deadline {
            let (token, headers) = (Arc::clone(&self.token), Arc::clone(&self.headers));
            let query = PolicyQuery { token, sub_topic: sub_topic.into(), headers };
            self.shared.policies.write(query).await
        } else {
            Err(QueryError::PoolTimeout)
        };
        let (answer, result) = match may_write {
            Ok(true) => (None, Ok(())),
            Ok(false) => (Some(Dropped::WriteDenied), Err(PublishError::Denied)),
            Err(error) => (Some(Dropped::WriteUnanswered), Err(PublishError::Unanswered(error))),
        };
        if let Some(reason) = answer {
            dropped.of(reason).inc();
        }
        self.answers.insert(sub_topic.into(), answer);
        result
    }

    /// Keeps what the audit log is told of a message that is not sent.
    fn deny(&mut self, decision: &Decision, sub_topic: &str, error: &PublishError) {
        let denied = self.denied.get_or_insert_with(|| DeniedMessages {
            topic: sub_topic.into(),
            decision: decision.clone(),
            fault: error.label(),
            count: 0,
        });
        denied.count += 1;
    }
}

impl Drop for MessageSender<'_> {
    /// Tells the audit log of the messages that were not sent.
    fn drop(&mut self) {
        let Some(DeniedMessages { topic, decision, fault, count }) = &self.denied else { return };
        let fault = (decision.verdict == Verdict::Policies).then_some(*fault);
        let count = (*count > 1).then_some(*count);
        Audit::Rest { topic, decided: decision.decided(), fault, count }
            .note(self.caller, Some(self.token.subject()));
    }
}

/// What a broadcast takes from the rates.
fn amount(broadcast: &Broadcast) -> Amount {
    Amount::one(match broadcast {
        Broadcast::Envelope(envelope) => envelope.len(),
        Broadcast::User { message, .. } => message.payload.len(),
    })
}
