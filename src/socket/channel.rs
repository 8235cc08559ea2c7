//! One joined channel: its config, what its token allows, its subscription; what each event does.
//!
//! Invariants: a channel is subscribed exactly while its claims allow reading; the reply to a join
//! is pushed before the channel subscribes, with no `.await` between, so that it precedes every
//! broadcast and no broadcast after it is missed (a channel that replaces another goes on where
//! that was); nothing here touches the WebSocket.

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use tokio::time::Instant;

use crate::{
    access::{
        decision::{Action, Asked, Because, Decision, Verdict},
        rule::{Captures, Rule},
    },
    auth::jwt::{Token, TokenError},
    clock::unix_now,
    hub::{
        BroadcastSource, FanOut, Subscription, To,
        outbox::{Outbox, Replaceable, TopicId},
    },
    invalidation::{CatchUpCause, ClientHistory, Feed},
    limits::Limited,
    metrics::{Dropped, OpenChannel},
    protocol::{
        error_code::{ErrorCode, Refusal, error_reply},
        message::{Json, Message, Payload, Ref},
        payload::{JoinConfig, OK, OPAQUE_KEY_PREFIX, PAYLOAD_TOO_LARGE, system_error},
        serializer::{Broadcast, Push},
        topic::{Privacy, TOPIC_PREFIX, TopicKey},
    },
    relay::listens::{Listening, Source},
    server::Services,
    telemetry::audit::{Audit, Caller},
};

/// The extension's answer until it is offered.
const NO_POSTGRES_CHANGES: &str = "Postgres changes are not offered by this server yet";

/// What a channel is told that ends because clients broadcast too fast.
const TOO_MANY_MESSAGES: &str = "Too many messages per second";

/// One topic joined on one socket, from the admission of its join to its close.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(super) topic: Box<str>,
    pub(super) join_ref: Option<Ref>,
    pub(super) config: JoinConfig,
    pub(super) key: TopicKey,
    /// The rule that decides, unless the topic is an ordinary one.
    pub(super) rule: Option<(Arc<Rule>, Captures)>,
    pub(super) token: Arc<Token>,
    /// By the last decision.
    pub(super) may_read: bool,
    /// What made it.
    pub(super) because: Because,
    /// Of a private channel.
    pub(super) policies: super::private::Answers,
    /// Of a rule that merges.
    pub(super) event: Option<Arc<Feed>>,
    /// None while the claims do not allow reading.
    pub(super) subscription: Option<Subscription>,
    pub(super) listening: Option<Listening>,
    pub(super) asked_at: Instant,
    /// Counts the channel once it is open.
    pub(super) open: Option<OpenChannel>,
}

/// Why a joined channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// Its client has left.
    Left,
    /// Its client has joined the topic once more.
    Replaced,
    /// Its token does not hold or does not open the topic any more.
    Token,
    /// Its client broadcasts too fast.
    TooFast,
    /// The database's policies could not be asked.
    Unanswered,
    /// Its connection has ended.
    Connection,
}

impl EndReason {
    /// Every reason.
    pub(crate) const ALL: [Self; 6] = [
        Self::Left,
        Self::Replaced,
        Self::Token,
        Self::TooFast,
        Self::Unanswered,
        Self::Connection,
    ];

    /// The metric's label, and the audit log's reason.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Replaced => "replaced",
            Self::Token => "token",
            Self::TooFast => "too_fast",
            Self::Unanswered => "unanswered",
            Self::Connection => "connection",
        }
    }
}

/// Whether the channel goes on after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Fate {
    Open,
    /// It is over, as the client is told; after [`EndReason::Unanswered`] it is told to join again.
    Ended(EndReason),
    /// What it may read must be asked of the policies.
    Asking,
}

/// The things of its socket that a channel works with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) services: &'a Services,
    pub(crate) outbox: &'a Arc<Outbox>,
    /// The token of the upgrade.
    pub(crate) apikey: &'a Arc<Token>,
    pub(crate) caller: Caller,
}

impl Context<'_> {
    pub(crate) fn push(&self, push: &Push<'_>) {
        // An overflowed outbox ends its connection, which counts it.
        let _ = self.outbox.push(self.outbox.serializer().encode(push));
    }
}

impl Channel {
    /// Decides about a join: token, then topic. The channel is not open yet.
    ///
    /// # Errors
    /// [`Refusal`] if the payload, the token or the topic's rule forbids the join.
    pub(crate) fn admit(context: Context<'_>, join: Message) -> Result<Self, Refusal> {
        let services = context.services;
        let sub_topic = join.topic.strip_prefix(TOPIC_PREFIX).unwrap_or_default();
        let Payload::Json(payload) = join.payload else {
            return Err(Refusal::new(ErrorCode::UnknownErrorOnChannel));
        };
        let presence_default = services.config.protocol.presence_default;
        let mut config = JoinConfig::parse(&payload, sub_topic, presence_default)?;
        let verified = match config.token.take() {
            Some(text) if !context.apikey.is(&text) => services.verify(&text),
            Some(_) | None => {
                services.verifier.recheck(context.apikey, unix_now(), services.config.auth.leeway)
            }
        };
        let (decision, token) = authorize(context, sub_topic, config.privacy, verified);
        let token = match (decision.verdict, token) {
            // About a private channel the policies have the last word: see [`Self::admit_by`].
            (Verdict::Allowed | Verdict::Withheld | Verdict::Policies, Some(token)) => token,
            (Verdict::Refused, _) | (_, None) => return Err(decision.refusal(sub_topic)),
        };
        let may_read = decision.is_allowed();
        let rule = decision.rule;
        if rule.is_some() {
            // A rule's topic is what the rule says, however it is joined.
            config.privacy = Privacy::Public;
        }
        let key = TopicKey { sub_topic: sub_topic.into(), privacy: config.privacy };
        let event = rule.as_ref().and_then(|(rule, captures)| services.feeds.of(rule, captures));
        Ok(Self {
            topic: join.topic,
            join_ref: join.join_ref,
            config,
            key,
            event,
            rule,
            token,
            may_read,
            because: decision.because,
            policies: super::private::Answers::NOTHING,
            subscription: None,
            listening: None,
            asked_at: Instant::now(),
            open: None,
        })
    }

    /// Decides once more about a join that has waited: keys, rules or revocations may have changed.
    ///
    /// # Errors
    /// [`Refusal`] if the join would be refused by now.
    pub(crate) fn confirm(&mut self, context: Context<'_>) -> Result<(), Refusal> {
        let (sub_topic, services) = (self.sub_topic(), context.services);
        let leeway = services.config.auth.leeway;
        let verified = services.verifier.recheck(&self.token, unix_now(), leeway);
        let (decision, token) = authorize(context, &sub_topic, self.key.privacy, verified);
        let Some(token) = token.filter(|_| decision.verdict != Verdict::Refused) else {
            return Err(decision.refusal(&sub_topic));
        };
        self.token = token;
        if decision.verdict != Verdict::Policies {
            // What it may hear since, the review that follows its opening brings.
            self.may_read &= decision.is_allowed();
        }
        Ok(())
    }

    /// Holds the NOTIFY channel of the topic, if there is one.
    ///
    /// Gives what to wait for if it is not active yet.
    pub(crate) fn listen(
        &mut self,
        context: Context<'_>,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let (rule, captures) = self.rule.as_ref()?;
        let has_database = !context.services.config.notify_url().is_empty();
        if self.listening.is_some() || !has_database || !self.may_read {
            return None;
        }
        let source = Source {
            channel: rule.listen.as_ref()?.fill(captures).into(),
            user_event: rule.event.clone()?,
            topics: rule.topics(&self.key.sub_topic, captures),
            event: self.event.clone(),
        };
        match context.services.listens.hold(source) {
            Ok(listening) => {
                let listening = self.listening.insert(listening);
                (!listening.is_active()).then(|| listening.activation())
            }
            Err(error) => {
                let refused = &context.services.metrics.relay_listens_refused;
                refused.with_label_values(&[error.kind()]).inc();
                None
            }
        }
    }

    /// Answers the join with `ok` and begins to deliver: first what the client may have missed.
    pub(crate) fn open(
        &mut self,
        context: Context<'_>,
        reference: Option<&Ref>,
        known: ClientHistory,
    ) {
        let metrics = &context.services.metrics;
        let response = self.config.reply();
        self.reply(context, reference, response.as_str());
        self.follow(context);
        self.catch_up(context, known);
        let result = if self.subscription.is_some() { "ok" } else { "withheld" };
        metrics.joins.with_label_values(&[result, ""]).inc();
        let result = if self.may_read { Verdict::Allowed } else { Verdict::Withheld };
        let (topic, because) = (&*self.topic, &self.because);
        Audit::Join { topic, result, rule: self.rule_name(), because }
            .note(context.caller, Some(&self.token));
        metrics.join_seconds.observe(self.asked_at.elapsed().as_secs_f64());
        self.open = Some(OpenChannel::new(metrics));
        if !self.config.bindings.is_empty() {
            let payload =
                system_error("postgres_changes", NO_POSTGRES_CHANGES, &self.key.sub_topic);
            self.push(context, "system", &payload);
            // They were echoed; nothing asks for them again.
            self.config.bindings = Vec::new();
        }
        if self.config.presence && (!self.is_private() || self.policies.may_read_presence()) {
            self.push(context, "presence_state", &Json::EMPTY);
        }
    }

    /// Pushes what has changed since the client last heard of the event, after it has subscribed: a
    /// change is noted before its message is fanned out, so that it is in the one or in the other.
    fn catch_up(&self, context: Context<'_>, known: ClientHistory) {
        let (Some(event), Some(subscription)) = (&self.event, &self.subscription) else {
            return;
        };
        if cfg!(feature = "without-catch-up") {
            return;
        }
        let services = context.services;
        if self.listening.as_ref().is_some_and(|listening| !listening.is_active()) {
            event.owe();
            // It may have become active in between, and have found nothing owed.
            let is_active = self.listening.as_ref().is_some_and(Listening::is_active);
            if is_active && event.take_owed() {
                services.feeds.offer_gap(event, CatchUpCause::LateListen, None, Instant::now());
            }
        }
        let covered_since = match &self.listening {
            Some(listening) => listening.covered_since(),
            // Without a database there is nothing else to be heard.
            None => services.config.notify_url().is_empty().then(|| services.feeds.started()),
        };
        services.feeds.catch_up(event, known, covered_since, context.outbox, subscription);
    }

    /// Tells a client that has fallen behind on the topic what has changed since; one that listens
    /// to another is told nothing.
    pub(crate) fn conflate(&self, context: Context<'_>, behind: Replaceable) {
        if self.topic_id(context) == behind.topic && self.event.is_some() && self.is_subscribed() {
            context.services.metrics.conflations.inc();
            self.catch_up(context, ClientHistory::Behind(behind.since));
        }
    }

    fn topic_id(&self, context: Context<'_>) -> TopicId {
        context.services.hub.topic_id(&self.key)
    }

    /// Whether the database tells of the topic.
    pub(crate) fn is_listened(&self) -> bool {
        self.rule.as_ref().is_some_and(|(rule, _)| rule.listen.is_some())
    }

    /// Does what a client's message asks of a joined channel; broadcasts go to
    /// [`Self::broadcast`].
    pub(crate) fn receive(&mut self, context: Context<'_>, message: &Message) -> Fate {
        match &*message.event {
            "access_token" => self.refresh(context, message),
            "presence" => {
                let refused = error_reply("Presence is not offered by this server yet");
                self.reply(context, message.reference.as_ref(), refused.as_str());
                Fate::Open
            }
            _ => {
                context.services.metrics.count_dropped(Dropped::UnknownEvent);
                Fate::Open
            }
        }
    }

    /// Fans out what a client broadcasts, several pushes that came together at once, and then
    /// acknowledges them. Where clients broadcast too fast, the one that a rule does not bind loses
    /// its channel, as upstream.
    pub(crate) async fn broadcast(&self, context: Context<'_>, pushes: Vec<Message>) -> Fate {
        let services = context.services;
        let (mut broadcasts, mut acks) = (Vec::with_capacity(pushes.len()), Vec::new());
        let (mut denied, mut fate) = (0, Fate::Open);
        for push in pushes {
            match self.admit_broadcast(services, push.payload) {
                Err(Dropped::Rate) if self.rule.is_none() => {
                    services.limits.count(Limited::BroadcastsClosed);
                    fate = Fate::Ended(EndReason::TooFast);
                    break;
                }
                Ok(broadcast) => {
                    broadcasts.push(broadcast);
                    acks.push((push.reference, OK));
                }
                Err(reason) => {
                    services.metrics.count_dropped(reason);
                    match reason {
                        Dropped::TooLarge => acks.push((push.reference, PAYLOAD_TOO_LARGE)),
                        Dropped::WriteDenied => denied += 1,
                        Dropped::Rate => {
                            services.limits.count(Limited::BroadcastsDropped);
                        }
                        _ => {}
                    }
                }
            }
        }
        if denied > 0 {
            let rule = self.rule_name();
            Audit::RefuseBroadcast { topic: &self.topic, rule, count: denied }
                .note(context.caller, Some(&self.token));
        }
        if let Some(event) = &self.event {
            broadcasts = services.feeds.offer(event, broadcasts, None);
        }
        if !broadcasts.is_empty() {
            let topics = match &self.rule {
                Some((rule, captures)) => rule.topics(&self.key.sub_topic, captures),
                None => vec![self.key.clone()],
            };
            let to = match &self.subscription {
                Some(subscription) if !self.config.to_self => To::Others(subscription),
                Some(_) | None => To::All,
            };
            let source = BroadcastSource::Socket;
            let fan_out =
                FanOut { source, topics: &topics, broadcasts: &broadcasts, committed: None, to };
            services.hub.fan_out(fan_out).await;
        }
        if self.config.ack {
            for (reference, payload) in acks {
                self.reply(context, reference.as_ref(), payload);
            }
        }
        if fate != Fate::Open {
            self.complain(context, TOO_MANY_MESSAGES);
        }
        fate
    }

    /// A client's payload as a broadcast, if it may be one. A denied write is never answered, as
    /// upstream.
    fn admit_broadcast(&self, services: &Services, payload: Payload) -> Result<Broadcast, Dropped> {
        let (broadcast, size) = match payload {
            Payload::Json(payload) if !payload.is_object() => return Err(Dropped::NotObject),
            Payload::Json(payload) => {
                let size = payload.len();
                (Broadcast::Envelope(payload), size)
            }
            Payload::UserBroadcast(message) => {
                let size = message.payload.len();
                (Broadcast::User { message, metadata: None }, size)
            }
        };
        if size > services.limits.settings().payload_bytes_max {
            return Err(Dropped::TooLarge);
        }
        let decision = services.rules().decide(&Asked {
            action: Action::Write,
            sub_topic: &self.key.sub_topic,
            privacy: self.key.privacy,
            token: Ok(&self.token.claims),
            fallback: None,
        });
        match decision.verdict {
            Verdict::Allowed => {}
            Verdict::Policies if self.policies.may_write() => {}
            Verdict::Policies | Verdict::Withheld | Verdict::Refused => {
                return Err(Dropped::WriteDenied);
            }
        }
        services.limits.broadcast(1).map(|()| broadcast).map_err(|_too_fast| Dropped::Rate)
    }

    /// Says goodbye. `phx_close` is for good, `phx_error` has the client join again. Both carry the
    /// join's ref, so that a newer channel of the same topic, on the client's side, does not take
    /// it for its own.
    pub(crate) fn close(mut self, context: Context<'_>, reason: EndReason) {
        let kind = reason.kind();
        Audit::Leave { topic: &self.topic, reason: kind }.note(context.caller, Some(&self.token));
        if let Some(open) = &mut self.open {
            open.ends_for = reason;
        }
        // What is wrong is nothing that the client's token could change.
        let is_for_good = reason != EndReason::Unanswered;
        let join_ref = self.join_ref.as_ref();
        context.push(&Push {
            join_ref,
            reference: join_ref,
            topic: &self.topic,
            event: if is_for_good { "phx_close" } else { "phx_error" },
            payload: "{}",
        });
    }

    /// As the client spells it.
    pub(crate) fn topic(&self) -> &str {
        &self.topic
    }

    /// Whether the client hears the topic.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.subscription.is_some()
    }

    /// The topic without its prefix.
    pub(crate) fn sub_topic(&self) -> Arc<str> {
        Arc::clone(&self.key.sub_topic)
    }

    fn rule_name(&self) -> Option<&str> {
        self.rule.as_ref().map(|(rule, _)| &*rule.name)
    }

    /// The join's ref, which names this channel.
    pub(crate) fn join_ref(&self) -> Option<&Ref> {
        self.join_ref.as_ref()
    }

    /// Takes the place of `replaced` among the topic's subscribers, so that nothing is missed or
    /// delivered twice between the two.
    pub(crate) fn take_over(&mut self, replaced: &mut Self) {
        if self.may_read && replaced.key == self.key {
            self.subscription = replaced.subscription.take();
        }
    }

    /// Ends delivery without a word.
    pub(crate) fn unsubscribe(&mut self) {
        self.subscription = None;
    }

    /// When the channel's token has ended and the grace is over, in seconds since 1970.
    pub(crate) fn expires_at(&self, grace: Duration) -> i64 {
        let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        self.token.claims.exp.saturating_add(grace)
    }

    /// Looks whether the token, and the grace after it, still hold. If not, on a rule's topic another takes its place, and
    /// an ordinary channel ends.
    pub(crate) fn check_expiry(&mut self, context: Context<'_>) -> Fate {
        let grace = context.services.config.auth.grace;
        match self.token.check_expiry(unix_now(), grace) {
            Ok(()) => Fate::Open,
            Err(error) => self.lose_token(context, error),
        }
    }

    /// Goes on without its token, if it may.
    pub(super) fn lose_token(&mut self, context: Context<'_>, error: TokenError) -> Fate {
        if matches!(error, TokenError::Expired { .. }) {
            context.services.metrics.token_expiries.inc();
        }
        self.replace_token(context, Err(error))
    }

    /// Answers a message of this channel.
    pub(crate) fn reply(&self, context: Context<'_>, reference: Option<&Ref>, payload: &str) {
        context.push(&Push {
            join_ref: self.join_ref.as_ref(),
            reference,
            topic: &self.topic,
            event: "phx_reply",
            payload,
        });
    }

    pub(super) fn push(&self, context: Context<'_>, event: &str, payload: &Json) {
        context.push(&Push {
            join_ref: self.join_ref.as_ref(),
            reference: None,
            topic: &self.topic,
            event,
            payload: payload.as_str(),
        });
    }

    /// The `access_token` event: never answered; an equal, absent or opaque token changes nothing.
    pub(super) fn refresh(&mut self, context: Context<'_>, message: &Message) -> Fate {
        let Payload::Json(payload) = &message.payload else {
            return Fate::Open;
        };
        let payload = serde_json::from_str::<Value>(payload.as_str()).unwrap_or_default();
        let text = match payload.get("access_token") {
            Some(Value::String(text)) => text,
            None | Some(Value::Null) => return Fate::Open,
            Some(_) => {
                context.services.metrics.count_dropped(Dropped::UnknownEvent);
                return Fate::Open;
            }
        };
        if text.starts_with(OPAQUE_KEY_PREFIX) || self.token.is(text) {
            return Fate::Open;
        }
        let verified = context.services.verify(text);
        let result = if verified.is_ok() { "ok" } else { "refused" };
        context.services.metrics.token_refreshes.with_label_values(&[result]).inc();
        self.replace_token(context, verified)
    }

    /// Looks whether the token still holds and still opens the topic: keys, rules or revocations
    /// have changed.
    pub(crate) fn review(&mut self, context: Context<'_>) -> Fate {
        let services = context.services;
        let grace = services.config.auth.grace;
        match services.verifier.recheck(&self.token, unix_now(), grace) {
            Ok(token) => self.replace_token(context, Ok(token)),
            Err(error) => self.lose_token(context, error),
        }
    }

    /// Decides anew, by another token or by none.
    pub(super) fn replace_token(
        &mut self,
        context: Context<'_>,
        verified: Result<Arc<Token>, TokenError>,
    ) -> Fate {
        let sub_topic = self.sub_topic();
        let fault = verified.as_ref().err().map(TokenError::kind);
        let (decision, token) = authorize(context, &sub_topic, self.key.privacy, verified);
        let had_read = self.may_read;
        let is_same = token.as_ref().is_some_and(|it| Arc::ptr_eq(it, &self.token));
        let is_private = decision.verdict == Verdict::Policies;
        if !is_same || !is_private && had_read != decision.is_allowed() {
            Audit::Token { topic: &self.topic, decision: &decision, fault }
                .note(context.caller, token.as_deref().or(Some(&self.token)));
        }
        if let (Some((rule, _)), Some((new, captures))) = (&self.rule, &decision.rule)
            && rule.listen == new.listen
        {
            self.rule = Some((Arc::clone(new), captures.clone()));
        }
        let Some(token) = token else {
            return self.end_with(context, &decision.refusal(&sub_topic));
        };
        if decision.verdict == Verdict::Refused && decision.rule.is_none() {
            return self.end_with(context, &decision.refusal(&sub_topic));
        }
        if is_private {
            let is_other = self.token.claims != token.claims;
            self.token = token;
            if is_other {
                self.policies.forget_writes();
                return Fate::Asking;
            }
            return Fate::Open;
        }
        self.token = token;
        self.may_read = decision.is_allowed();
        self.because = decision.because.clone();
        if had_read && decision.verdict == Verdict::Refused {
            // Told, and not closed: a close is for good, and the next token may be a better one.
            self.complain(context, decision.refusal(&sub_topic).text());
        }
        // What was withheld may begin, what was delivered may end.
        let was_silent = self.subscription.is_none();
        drop(self.listen(context));
        self.follow(context);
        if was_silent {
            self.catch_up(context, ClientHistory::Nothing);
        }
        Fate::Open
    }

    /// Says why, and ends the channel.
    pub(super) fn end_with(&self, context: Context<'_>, refusal: &Refusal) -> Fate {
        self.complain(context, refusal.text());
        Fate::Ended(EndReason::Token)
    }

    pub(super) fn complain(&self, context: Context<'_>, text: &str) {
        self.push(context, "system", &system_error("system", text, &self.key.sub_topic));
    }

    /// Subscribes or unsubscribes, as was decided.
    pub(super) fn follow(&mut self, context: Context<'_>) {
        if !self.may_read {
            self.subscription = None;
            self.listening = None;
        } else if self.subscription.is_none() {
            let outbox = Arc::clone(context.outbox);
            self.subscription = Some(context.services.hub.subscribe(self.key.clone(), outbox));
        }
    }
}

/// Decides about reading, and gives the token that it was decided by: where that of the client has
/// ended and the topic has a rule, the connection's or, if that has ended as well, none at all.
fn authorize(
    context: Context<'_>,
    sub_topic: &str,
    privacy: Privacy,
    verified: Result<Arc<Token>, TokenError>,
) -> (Decision, Option<Arc<Token>>) {
    let verifier = &context.services.verifier;
    let fallback = verifier
        .recheck(context.apikey, unix_now(), context.services.config.auth.leeway)
        .unwrap_or_else(|_has_ended| Arc::clone(verifier.anonymous()));
    let decision = context.services.rules().decide(&Asked {
        action: Action::Read,
        sub_topic,
        privacy,
        token: verified.as_ref().map(|token| &token.claims),
        fallback: Some(&fallback.claims),
    });
    let token = if decision.fell_back { Some(fallback) } else { verified.ok() };
    (decision, token)
}
