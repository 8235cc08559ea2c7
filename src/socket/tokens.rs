//! The token of a channel: another one, its expiry, and decisions that are made again.
//!
//! Invariants: on a rule's topic a token that has ended is replaced by the connection's, or by none
//! at all, and the channel stays; an ordinary channel ends with its token.

use std::sync::Arc;

use super::{
    channel::{Channel, Context, Next, authorize},
    metrics::{Dropped, Refresh},
};
use crate::{
    access::{Decision, Found, Verdict},
    auth::{Token, TokenError},
    clock::unix_now,
    invalidation::ClientHistory,
    protocol::{
        error_code::Refusal,
        message::{Message, Payload},
        payload::{NotText, OPAQUE_KEY_PREFIX, access_token},
    },
    telemetry::audit::Audit,
};

impl Channel {
    /// Takes the `access_token` event: never answered; an equal, absent or opaque token changes
    /// nothing.
    pub(super) fn token_received(&mut self, context: Context<'_>, message: &Message) -> Next {
        let Payload::Json(payload) = &message.payload else {
            return Next::Open;
        };
        let metrics = &context.shared.metrics;
        let text = match access_token(payload) {
            Ok(Some(text)) => text,
            Ok(None) => return Next::Open,
            Err(NotText) => {
                metrics.dropped.of(Dropped::UnknownEvent).inc();
                return Next::Open;
            }
        };
        if text.starts_with(OPAQUE_KEY_PREFIX) || self.token.is(&text) {
            return Next::Open;
        }
        let verified = context.shared.auth.verify(&text);
        let refresh = if verified.is_ok() { Refresh::Ok } else { Refresh::Refused };
        metrics.token_refreshes.of(refresh).inc();
        self.replace_token(context, verified)
    }

    /// Decides once more about a join that has waited: keys, rules or revocations may have changed.
    ///
    /// # Errors
    /// [`Refusal`] if the join would be refused by now.
    pub(super) fn confirm(&mut self, context: Context<'_>) -> Result<(), Refusal> {
        let (sub_topic, auth) = (Arc::clone(self.sub_topic()), &context.shared.auth);
        let verified = auth.recheck(&self.token, unix_now(), auth.leeway());
        let rules = context.shared.access.rules();
        let found = self.find(&rules);
        let (decision, token) =
            authorize(context, (&rules, &found), &sub_topic, self.privacy(), verified);
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

    /// Checks whether the token, and the grace after it, still hold. If not, on a rule's topic
    /// another takes its place, and an ordinary channel ends.
    pub(super) fn check_expiry(&mut self, context: Context<'_>) -> Next {
        match self.token.check_expiry(unix_now(), context.shared.auth.grace()) {
            Ok(()) => Next::Open,
            Err(error) => self.lose_token(context, error),
        }
    }

    /// Checks whether the token still holds and still opens the topic: keys, rules or revocations
    /// have changed.
    pub(super) fn review(&mut self, context: Context<'_>) -> Next {
        let auth = &context.shared.auth;
        match auth.recheck(&self.token, unix_now(), auth.grace()) {
            Ok(token) => self.replace_token(context, Ok(token)),
            Err(error) => self.lose_token(context, error),
        }
    }

    /// Ends delivery to a channel that waits for an answer, if what it was decided by does not hold
    /// any more. What becomes of the channel is decided after the wait.
    pub(super) fn review_waiting(&mut self, context: Context<'_>) {
        let auth = &context.shared.auth;
        let verified = auth.recheck(&self.token, unix_now(), auth.grace());
        let rules = context.shared.access.rules();
        let found = self.find(&rules);
        let (decision, token) =
            authorize(context, (&rules, &found), self.sub_topic(), self.privacy(), verified);
        let may_read = match decision.verdict {
            Verdict::Allowed | Verdict::Policies => token.is_some(),
            Verdict::Withheld | Verdict::Refused => false,
        };
        if !may_read {
            self.stop_reading(context);
        }
    }

    /// Goes on without its token, if it may.
    fn lose_token(&mut self, context: Context<'_>, error: TokenError) -> Next {
        if matches!(error, TokenError::Expired { .. }) {
            context.shared.metrics.token_expiries.inc();
        }
        self.replace_token(context, Err(error))
    }

    /// Decides again, by another token or by none.
    fn replace_token(
        &mut self,
        context: Context<'_>,
        verified: Result<Arc<Token>, TokenError>,
    ) -> Next {
        let sub_topic = Arc::clone(self.sub_topic());
        let fault = verified.as_ref().err().map(TokenError::label);
        let (decision, token) = self.authorize(context, verified);
        let had_read = self.may_read;
        let is_same = token.as_ref().is_some_and(|token| Arc::ptr_eq(token, &self.token));
        let is_private = decision.verdict == Verdict::Policies;
        if !is_same || !is_private && had_read != decision.is_allowed() {
            let token = token.as_deref().unwrap_or(&self.token);
            Audit::Token { topic: &self.topic, decided: decision.decided(), fault }
                .note(context.caller, Some(token.subject()));
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
                return Next::AskReads;
            }
            self.follow(context);
            return Next::Open;
        }
        self.token = token;
        self.may_read = decision.is_allowed();
        self.reason = decision.reason.clone();
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
        Next::Open
    }

    /// Decides about reading by the rules in force, and keeps the rule that decided.
    fn authorize(
        &mut self,
        context: Context<'_>,
        verified: Result<Arc<Token>, TokenError>,
    ) -> (Decision, Option<Arc<Token>>) {
        let rules = context.shared.access.rules();
        let found = self.find(&rules);
        let (sub_topic, privacy) = (self.sub_topic(), self.privacy());
        let decided = authorize(context, (&rules, &found), sub_topic, privacy, verified);
        match (&self.rule, &decided.0.rule) {
            (Some((rule, _)), Some((new, captures))) if rule.listen == new.listen => {
                if !Arc::ptr_eq(rule, new) {
                    self.target.spell(new, captures);
                    self.rule = Some((Arc::clone(new), Arc::clone(captures)));
                }
                self.rules = rules;
            }
            (None, None) if matches!(found, Found::Other) => self.rules = rules,
            // The topic has gained or lost its rule, or its NOTIFY channel: what was joined stays,
            // and each decision searches.
            (_, _) => {}
        }
        decided
    }
}
