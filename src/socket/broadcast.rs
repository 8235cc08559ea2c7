//! The `broadcast` event: what a client may send, and how it is acknowledged.
//!
//! Source: supabase/realtime `realtime_channel/broadcast_handler.ex` @833cf36.

use super::{
    channel::{Channel, Context, Next},
    metrics::{Dropped, EndReason},
};
use crate::{
    access::{AccessRequest, Action, Verdict},
    limits::{Amount, Broadcasts, Effect},
    protocol::{
        message::{Message, Payload},
        payload::{OK, PAYLOAD_TOO_LARGE},
        serializer::Broadcast,
    },
    publish::Source,
    telemetry::audit::Audit,
};

/// What a client is told whose channel ends because it broadcasts too fast.
const TOO_MANY_MESSAGES: &str = "Too many messages per second";

impl Channel {
    /// Publishes what a client broadcasts, several pushes that came together at once, and then
    /// acknowledges them. A channel without a rule that alone takes more than one client may ends,
    /// as upstream; the pushes behind the one too many are left for whoever answers for a topic
    /// without a channel. What goes too fast because of others is dropped, and the channel stays.
    pub(super) async fn broadcast_received(
        &mut self,
        context: Context<'_>,
        pushes: &mut impl Iterator<Item = Message>,
    ) -> Next {
        let shared = context.shared;
        let (mut broadcasts, mut acks) = (Vec::new(), Vec::new());
        let (mut denied, mut next) = (0, Next::Open);
        for push in pushes {
            match self.admit_broadcast(context, push.payload) {
                Ok(broadcast) => {
                    broadcasts.push(broadcast);
                    acks.push((push.reference, OK));
                }
                Err(reason) => {
                    shared.metrics.dropped.of(reason).inc();
                    if reason == Dropped::TooLarge {
                        acks.push((push.reference, PAYLOAD_TOO_LARGE));
                    }
                    denied += usize::from(reason == Dropped::WriteDenied);
                    if reason == Dropped::ChannelRate {
                        next = Next::Ended(EndReason::TooFast);
                        break;
                    }
                }
            }
        }
        if denied > 0 {
            let rule = self.rule_name();
            Audit::RefuseBroadcast { topic: &self.topic, rule, count: denied }
                .note(context.caller, Some(self.token.subject()));
        }
        if !broadcasts.is_empty() {
            let except = self.subscription.as_ref().filter(|_| !self.config.to_self);
            shared.publisher.publish(&self.target, Source::Socket { except }, broadcasts).await;
        }
        if self.config.ack {
            for (reference, payload) in acks {
                self.reply(context, reference.as_ref(), payload);
            }
        }
        if next != Next::Open {
            self.complain(context, TOO_MANY_MESSAGES);
        }
        next
    }

    /// Returns a client's payload as a broadcast, if it may be one. A denied write is never
    /// answered, as upstream.
    fn admit_broadcast(
        &mut self,
        context: Context<'_>,
        payload: Payload,
    ) -> Result<Broadcast, Dropped> {
        let shared = context.shared;
        let (broadcast, size) = match payload {
            Payload::Json(payload) if !payload.is_object() => return Err(Dropped::NotObject),
            Payload::Json(payload) => {
                let size = payload.len();
                (Broadcast::Envelope(payload), size)
            }
            Payload::TooLarge => return Err(Dropped::TooLarge),
            Payload::UserBroadcast(message) => {
                let size = message.payload.len();
                (Broadcast::User { message, metadata: None }, size)
            }
        };
        if size > shared.limits.settings().payload_bytes_max {
            return Err(Dropped::TooLarge);
        }
        let rules = shared.access.rules();
        let decision = rules.decide_found(
            &self.find(&rules),
            &AccessRequest {
                action: Action::Write,
                sub_topic: self.sub_topic(),
                privacy: self.privacy(),
                token: Ok(&self.token.claims),
                fallback: None,
            },
        );
        match decision.verdict {
            Verdict::Allowed => {}
            Verdict::Policies if self.policies.may_write() => {}
            Verdict::Policies | Verdict::Withheld | Verdict::Refused => {
                return Err(Dropped::WriteDenied);
            }
        }
        let limits = &shared.limits;
        let mut all = Broadcasts::default();
        if self.rule.is_some() {
            all.ruled += Amount::one(size);
        } else if limits.channel(&mut self.sent) {
            all.ordinary += Amount::one(size);
        } else {
            return Err(Dropped::ChannelRate);
        }
        let share = limits.share(context.caller, self.token.subject());
        let taken = limits.broadcast(share, &all, Effect::Dropped);
        taken.map(|()| broadcast).map_err(|_exceeded| Dropped::Rate)
    }
}
