//! One joined channel: its config, what its token allows, its subscription.
//!
//! Invariants: a channel is subscribed exactly while its claims allow reading; the reply to a join
//! is pushed before the channel subscribes, with no `.await` between, so that it precedes every
//! broadcast and no broadcast after it is missed (a channel that replaces another goes on where
//! that was); nothing here touches the WebSocket.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    answers::Answers,
    metrics::{Dropped, EndReason, JoinResult, OpenChannel},
    shared::Shared,
};
use crate::{
    access::{AccessRequest, Action, Captures, Decision, Found, Reason, Rule, Rules, Verdict},
    auth::{Token, TokenError},
    clock::unix_now,
    hub::{Subscription, outbox::Outbox},
    invalidation::ClientHistory,
    limits::Bucket,
    protocol::{
        error_code::{ErrorCode, Refusal, error_reply},
        message::{Json, Message, Payload, Ref},
        payload::{JoinConfig, system_error},
        serializer::Push,
        topic::{Privacy, TOPIC_PREFIX},
    },
    publish::Target,
    relay::Listening,
    telemetry::audit::{Audit, Caller, Decided},
};

/// The answer to Postgres changes until they are offered.
const NO_POSTGRES_CHANGES: &str = "Postgres changes are not offered by this server yet";

/// The answer to a join above the bound of control messages.
const JOIN_TOO_LARGE: &str = "the payload is larger than 64 KiB";

/// One topic joined on one socket, from the admission of its join to its close.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) topic: Box<str>,
    pub(super) join_ref: Option<Ref>,
    pub(super) config: JoinConfig,
    pub(super) target: Target,
    /// The rule that decides, unless the topic is an ordinary one.
    pub(super) rule: Option<(Arc<Rule>, Arc<Captures>)>,
    /// The rules among which that rule was found.
    pub(super) rules: Arc<Rules>,
    pub(super) token: Arc<Token>,
    /// Whether the last decision allows reading.
    pub(super) may_read: bool,
    /// What led to it.
    pub(super) reason: Reason,
    /// What the policies of a private channel have answered.
    pub(super) policies: Answers,
    /// `None` while the claims do not allow reading.
    pub(super) subscription: Option<Subscription>,
    /// `None` while there is nothing to be heard from the database.
    pub(super) listening: Option<Listening>,
    /// What the channel's client has broadcast on it, of what one client may.
    pub(super) sent: Bucket,
    asked_at: Instant,
    /// Counts the channel once it is open.
    open: Option<OpenChannel>,
}

/// Whether a channel goes on after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Next {
    Open,
    /// The channel is over, as the client is told; after [`EndReason::Unanswered`] and
    /// [`EndReason::TooSlow`] the client is told to join again.
    Ended(EndReason),
    /// The policies must be asked what the channel may read.
    AskReads,
}

/// The parts of its socket that a channel works with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) shared: &'a Shared,
    pub(super) outbox: &'a Arc<Outbox>,
    /// The token of the upgrade.
    pub(super) apikey: &'a Arc<Token>,
    pub(super) caller: Caller,
}

impl Context<'_> {
    pub(super) fn push(&self, push: &Push<'_>) {
        // An overflowed outbox ends its connection, which counts it.
        let _ = self.outbox.push(self.outbox.serializer().encode(push));
    }
}

impl Channel {
    /// Decides about a join by the rules in force and what they hold of its topic: token, then
    /// topic. The channel is not open yet.
    ///
    /// # Errors
    /// [`Refusal`] if the payload, the token or the topic's rule forbids the join.
    pub(super) fn admit(
        context: Context<'_>,
        join: Message,
        (rules, found): (Arc<Rules>, Found),
    ) -> Result<Self, Refusal> {
        let shared = context.shared;
        let sub_topic = join.topic.strip_prefix(TOPIC_PREFIX).unwrap_or_default();
        let payload = match join.payload {
            Payload::Json(payload) => payload,
            Payload::TooLarge => {
                return Err(Refusal::with_detail(ErrorCode::InvalidJoinPayload, JOIN_TOO_LARGE));
            }
            Payload::UserBroadcast(_) => {
                return Err(Refusal::new(ErrorCode::UnknownErrorOnChannel));
            }
        };
        let mut config = JoinConfig::parse(&payload, sub_topic, shared.settings.presence_default)?;
        let verified = match config.token.take() {
            Some(text) if !context.apikey.is(&text) => shared.auth.verify(&text),
            Some(_) | None => shared.auth.recheck(context.apikey, unix_now(), shared.auth.leeway()),
        };
        let (decision, token) =
            authorize(context, (&rules, &found), sub_topic, config.privacy, verified);
        let token = match (decision.verdict, token) {
            // About a private channel the policies have the last word: see [`Self::admit_by`].
            (Verdict::Allowed | Verdict::Withheld | Verdict::Policies, Some(token)) => token,
            (Verdict::Refused, _) | (_, None) => return Err(decision.refusal(sub_topic)),
        };
        let may_read = decision.is_allowed();
        let rule = decision.rule;
        let target = shared.publisher.target(sub_topic, config.privacy, rule.as_ref());
        Ok(Self {
            topic: join.topic,
            join_ref: join.join_ref,
            config,
            target,
            rule,
            rules,
            token,
            may_read,
            reason: decision.reason,
            policies: Answers::NOTHING,
            subscription: None,
            listening: None,
            sent: Bucket::default(),
            asked_at: Instant::now(),
            open: None,
        })
    }

    /// Answers the join with `ok` and begins to deliver: first what the client may have missed.
    pub(super) fn open(
        &mut self,
        context: Context<'_>,
        reference: Option<&Ref>,
        history: ClientHistory,
    ) {
        let metrics = &context.shared.metrics;
        let response = self.config.reply();
        self.reply(context, reference, &response);
        self.follow(context);
        self.catch_up(context, history);
        let is_silent = self.subscription.is_none();
        let result = if is_silent { JoinResult::Withheld } else { JoinResult::Ok };
        metrics.joins.of(result).inc();
        let result = if self.may_read { Verdict::Allowed } else { Verdict::Withheld };
        let (result, rule) = (result.label(), self.rule_name());
        let decided = Decided { result, rule, because: &self.reason };
        Audit::Join { topic: &self.topic, decided }
            .note(context.caller, Some(self.token.subject()));
        metrics.join_seconds.observe(self.asked_at.elapsed().as_secs_f64());
        self.open = Some(metrics.open_channel());
        // They were echoed; nothing needs them again.
        if self.config.bindings.take().is_some() {
            let payload = system_error("postgres_changes", NO_POSTGRES_CHANGES, self.sub_topic());
            self.push(context, "system", &payload);
        }
        if self.config.presence && (!self.is_private() || self.policies.may_read_presence()) {
            self.push(context, "presence_state", &Json::EMPTY);
        }
    }

    /// Says goodbye. `phx_close` is for good, `phx_error` has the client join again. Both carry the
    /// join's ref, so that a newer channel of the same topic, on the client's side, does not take
    /// it for its own.
    pub(super) fn close(mut self, context: Context<'_>, reason: EndReason) {
        Audit::Leave { topic: &self.topic, reason: reason.label() }
            .note(context.caller, Some(self.token.subject()));
        if let Some(open) = &mut self.open {
            open.ends_for = reason;
        }
        let is_for_good = match reason {
            // Another token of the client would change nothing, and the next join may.
            EndReason::Unanswered | EndReason::TooSlow => false,
            EndReason::Left
            | EndReason::Replaced
            | EndReason::Token
            | EndReason::TooFast
            | EndReason::Connection => true,
        };
        if matches!(reason, EndReason::Token | EndReason::TooSlow) {
            self.stop_reading(context);
        }
        let join_ref = self.join_ref.as_ref();
        context.push(&Push {
            join_ref,
            reference: join_ref,
            topic: &self.topic,
            event: if is_for_good { "phx_close" } else { "phx_error" },
            payload: "{}",
        });
    }

    /// Answers the `presence` event, which is not offered.
    pub(super) fn presence_received(&mut self, context: Context<'_>, message: &Message) -> Next {
        let refused = error_reply("Presence is not offered by this server yet");
        self.reply(context, message.reference.as_ref(), refused.as_str());
        Next::Open
    }

    /// Drops an event that channels do not know.
    pub(super) fn unknown_received(&mut self, context: Context<'_>, _message: &Message) -> Next {
        context.shared.metrics.dropped.of(Dropped::UnknownEvent).inc();
        Next::Open
    }

    /// The topic as the client spells it.
    pub(super) fn topic(&self) -> &str {
        &self.topic
    }

    /// The topic without its prefix.
    pub(super) fn sub_topic(&self) -> &Arc<str> {
        &self.target.topic.sub_topic
    }

    /// Whether the topic is a private one.
    pub(super) fn privacy(&self) -> Privacy {
        self.target.topic.privacy
    }

    /// The name of the rule that decides.
    pub(super) fn rule_name(&self) -> Option<&str> {
        self.rule.as_ref().map(|(rule, _)| &*rule.name)
    }

    /// The topic's rule among `rules`, which is searched for only where they are others than those
    /// of the last decision.
    pub(super) fn find(&self, rules: &Arc<Rules>) -> Found {
        if !Arc::ptr_eq(rules, &self.rules) {
            return rules.find(self.sub_topic());
        }
        match &self.rule {
            Some((rule, captures)) => Found::Rule(Arc::clone(rule), Arc::clone(captures)),
            None => Found::Other,
        }
    }

    /// The join's ref, which names this channel.
    pub(super) fn join_ref(&self) -> Option<&Ref> {
        self.join_ref.as_ref()
    }

    /// Whether the client hears the topic.
    pub(super) fn is_subscribed(&self) -> bool {
        self.subscription.is_some()
    }

    /// Takes the place of `replaced` among the topic's subscribers, so that nothing is missed or
    /// delivered twice between the two.
    pub(super) fn take_over(&mut self, replaced: &mut Self) {
        if self.may_read && replaced.target.topic == self.target.topic {
            self.subscription = replaced.subscription.take();
        }
    }

    /// Ends delivery without a word, also of what is queued.
    pub(super) fn stop_reading(&mut self, context: Context<'_>) {
        if self.subscription.take().is_some() {
            context.outbox.forget(self.topic_id(context));
        }
    }

    /// Subscribes or unsubscribes, as was decided.
    pub(super) fn follow(&mut self, context: Context<'_>) {
        if !self.may_read {
            self.stop_reading(context);
            self.listening = None;
        } else if self.subscription.is_none() {
            let (key, outbox) = (self.target.topic.clone(), Arc::clone(context.outbox));
            self.subscription = Some(context.shared.hub.subscribe(key, outbox));
        }
    }

    /// When the channel's token has ended and the grace is over, in seconds since 1970.
    pub(super) fn expires_at(&self, grace: Duration) -> i64 {
        let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        self.token.claims.exp.saturating_add(grace)
    }

    /// Answers a message of this channel.
    pub(super) fn reply(&self, context: Context<'_>, reference: Option<&Ref>, payload: &str) {
        context.push(&Push {
            join_ref: self.join_ref.as_ref(),
            reference,
            topic: &self.topic,
            event: "phx_reply",
            payload,
        });
    }

    /// Pushes an event to this channel.
    pub(super) fn push(&self, context: Context<'_>, event: &str, payload: &Json) {
        context.push(&Push {
            join_ref: self.join_ref.as_ref(),
            reference: None,
            topic: &self.topic,
            event,
            payload: payload.as_str(),
        });
    }

    /// Pushes a `system` text about this channel.
    pub(super) fn complain(&self, context: Context<'_>, text: &str) {
        self.push(context, "system", &system_error("system", text, self.sub_topic()));
    }

    /// Tells the client why its channel ends.
    pub(super) fn end_with(&self, context: Context<'_>, refusal: &Refusal) -> Next {
        self.complain(context, refusal.text());
        Next::Ended(EndReason::Token)
    }
}

/// Decides about reading, and returns the token that it was decided by: where that of the client
/// has ended and the topic has a rule, the connection's or, if that has ended as well, none at all.
pub(super) fn authorize(
    context: Context<'_>,
    (rules, found): (&Rules, &Found),
    sub_topic: &str,
    privacy: Privacy,
    verified: Result<Arc<Token>, TokenError>,
) -> (Decision, Option<Arc<Token>>) {
    let auth = &context.shared.auth;
    let fallback = verified.is_err().then(|| {
        auth.recheck(context.apikey, unix_now(), auth.leeway())
            .unwrap_or_else(|_has_ended| Arc::clone(auth.anonymous()))
    });
    let decision = rules.decide_found(
        found,
        &AccessRequest {
            action: Action::Read,
            sub_topic,
            privacy,
            token: verified.as_ref().map(|token| &token.claims),
            fallback: fallback.as_ref().map(|token| &token.claims),
        },
    );
    let token = if decision.fell_back { fallback } else { verified.ok() };
    (decision, token)
}
