//! The Phoenix socket: channels by topic over one connection, and the routing table of events.
//!
//! Invariants: messages of one topic are handled in their order, also while its join waits for a
//! LISTEN, its refusal for the delay, or its channel for the database's policies; other topics go on
//! meanwhile. A socket holds at most `channels_per_socket_max` channels and as many refusals that
//! wait; what waits behind them has a bound of its own, see [`pending`]. A socket that ends without a
//! leave leaves a record of each topic that the database tells of.

mod answers;
mod broadcast;
mod channel;
mod listening;
mod metrics;
mod pending;
mod private;
mod settings;
mod shared;
mod tokens;

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout};

pub(crate) use self::metrics::{Dropped, Metrics};
use self::{
    channel::{Channel, Context, Next},
    metrics::{EndReason, JoinResult, Timing},
    pending::{Answer, Awaiting, Joining, Pending, Slot, Waiting},
};
pub use self::{pending::Due, settings::Settings, shared::Shared};
use crate::{
    access::{Found, Rules},
    auth::Token,
    clock::unix_now,
    hub::outbox::{Outbox, Replaceable, TopicId},
    invalidation::ClientHistory,
    protocol::{
        error_code::{ErrorCode, Refusal, error_reply},
        generation::Generation,
        message::{Message, Payload, Ref},
        payload::{OK, PAYLOAD_TOO_LARGE},
        serializer::Push,
        topic::TOPIC_PREFIX,
    },
    recovery::{ClientKey, History, Hold},
    telemetry::audit::{Audit, Caller},
};

/// Clients beat every 25 or 30 s. A heartbeat after a longer silence than this comes from a hidden
/// tab, which sends one a minute, or from a page that was frozen.
const HEARTBEAT_LATE: Duration = Duration::from_secs(40);

/// What a client is told whose channel ends because it reads too slowly.
const TOO_SLOW: &str = "Too many messages for a client that reads this slowly";

/// The state of one client's channels.
#[derive(Debug)]
pub struct Socket {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    /// The token of the upgrade.
    apikey: Arc<Token>,
    caller: Caller,
    /// What the client may have missed, and whether it may be deaf.
    history: History,
    channels: HashMap<Box<str>, Slot>,
    /// Topics that wait for an answer.
    pending: Pending,
    /// Headers of the upgrade as a JSON object, for RLS policies.
    headers: Arc<str>,
    /// Not later than the first token of a channel ends, in seconds since 1970.
    expires_at: i64,
    /// When a channel has to look for its LISTEN, if one may have to.
    looks_at: Option<Instant>,
    /// Since when a socket that has had channels has none.
    empty_since: Option<Instant>,
}

impl Socket {
    /// Creates a socket without channels.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        outbox: Arc<Outbox>,
        apikey: Arc<Token>,
        client: ClientKey,
        caller: Caller,
    ) -> Self {
        Self {
            headers: Arc::clone(shared.policies.no_headers()),
            history: History::new(client),
            shared,
            outbox,
            apikey,
            caller,
            channels: HashMap::new(),
            pending: Pending::default(),
            expires_at: i64::MAX,
            looks_at: None,
            empty_since: None,
        }
    }

    /// Sets the headers of the upgrade, a JSON object, for the policies of private channels.
    #[must_use]
    pub fn with_headers(mut self, headers: Option<Arc<str>>) -> Self {
        if let Some(headers) = headers {
            self.headers = headers;
        }
        self
    }

    /// Handles a client's messages in their order. Replies go to the outbox.
    pub async fn handle(&mut self, messages: impl IntoIterator<Item = Message>) {
        let mut messages = messages.into_iter().peekable();
        while let Some(message) = messages.next() {
            let Self { shared, outbox, apikey, history, .. } = &mut *self;
            let silence = history.hear(&message, &shared.recovery.healing, outbox, apikey);
            if message.payload == Payload::TooLarge && &*message.event != "phx_join" {
                self.refuse_large(&message);
                continue;
            }
            if let Some(Slot::Waiting(waiting)) = self.channels.get_mut(&message.topic) {
                let bytes_max = self.shared.limits.settings().outbox_bytes_max;
                if !self.pending.keep(waiting, message, bytes_max) {
                    self.shared.metrics.dropped.of(Dropped::Backlog).inc();
                }
                continue;
            }
            match (&*message.topic, &*message.event) {
                ("phoenix", "heartbeat") => self.heartbeat(&message, silence),
                (_, "phx_join") => self.join(message),
                (_, "phx_leave") => self.leave(&message),
                (_, "broadcast") => {
                    // Neighbours on one topic are fanned out together.
                    let topic = message.topic.clone();
                    let mut pushes = vec![message];
                    let is_next =
                        |next: &Message| &*next.event == "broadcast" && next.topic == topic;
                    while let Some(next) = messages.next_if(is_next) {
                        pushes.push(next);
                    }
                    // Boxed: few sockets ever broadcast, and the rest should not reserve space for
                    // it.
                    Box::pin(self.broadcast(&topic, pushes)).await;
                }
                (_, "access_token") => self.on_channel(&message, Channel::token_received),
                (_, "presence") => self.on_channel(&message, Channel::presence_received),
                (_, _) => self.on_channel(&message, Channel::unknown_received),
            }
        }
    }

    /// Waits until a topic's answer has arrived; [`Self::answer`] takes it.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn due(&mut self) -> Due {
        self.pending.due().await
    }

    /// Takes the answer that a topic has waited for, then handles the messages kept behind it.
    pub async fn answer(&mut self, due: Due) {
        let Due { topic, answer } = due;
        let Some(Slot::Waiting(waiting)) = self.channels.remove(&topic) else {
            return;
        };
        let Waiting { what, mut backlog, is_too_slow } = *waiting;
        self.pending.take(&backlog);
        match what {
            Awaiting::Join(joining) => self.answer_join(&topic, *joining, answer),
            Awaiting::Channel(channel) => self.answer_channel(channel, answer, &mut backlog),
        }
        // Tokens may have been revoked, keys or rules exchanged, while it waited.
        let Self { shared, outbox, apikey, channels, caller, .. } = self;
        let context = Context { shared, outbox, apikey, caller: *caller };
        if let Some(Slot::Joined(channel)) = channels.get_mut(&topic) {
            let next = channel.review(context);
            // While it waited, a tick has not looked at it.
            let ends_at = channel.expires_at(shared.auth.grace());
            self.expires_at = self.expires_at.min(ends_at);
            self.settle(&topic, next);
        }
        if is_too_slow {
            self.end_too_slow(&topic);
        }
        self.handle(backlog).await;
        self.note_emptiness();
    }

    /// How long until [`Self::tick`] has something to do, at most `at_most`.
    #[must_use]
    pub fn next_tick(&self, at_most: Duration) -> Duration {
        let seconds = self.expires_at.saturating_sub(unix_now());
        let expiry = Duration::from_secs(seconds.max(0).unsigned_abs());
        let suspicion = if self.is_silent() {
            self.history.suspect_at().saturating_duration_since(Instant::now())
        } else {
            at_most
        };
        let look = self.looks_at.map(|at| at.saturating_duration_since(Instant::now()));
        expiry.min(suspicion).min(look.unwrap_or(at_most)).min(at_most)
    }

    /// Ends or changes the channels whose tokens have expired, and tries again to listen for those
    /// that found no place.
    pub fn tick(&mut self) {
        if self.is_silent() && self.history.suspect_at() <= Instant::now() {
            let Self { shared, outbox, apikey, history, .. } = &mut *self;
            history.suspect(&shared.recovery.healing, outbox, apikey);
        }
        let (now, grace) = (unix_now(), self.shared.auth.grace());
        self.looks_at = None;
        self.each_channel(|channel, context| {
            let is_over = channel.expires_at(grace) <= now;
            let next = if is_over { channel.check_expiry(context) } else { Next::Open };
            drop(channel.listen(context));
            next
        });
    }

    /// Decides again about each channel's token and topic: keys, rules or revocations have changed.
    pub fn review(&mut self) {
        self.each_channel(Channel::review);
    }

    /// Pushes one message that names what has changed on a topic whose messages were dropped,
    /// because the client was too slow.
    pub fn conflate(&self, behind: Replaceable) {
        for slot in self.channels.values() {
            if let Some(channel) = slot.hearing() {
                channel.conflate(self.context(), behind);
            }
        }
    }

    /// Ends the channel of an ordinary topic for which the client is too slow.
    pub fn overflowed(&mut self, topic: TopicId) {
        let context = self.context();
        let is_it =
            |slot: &Slot| slot.hearing().is_some_and(|channel| channel.topic_id(context) == topic);
        let found = self.channels.iter().find(|(_, slot)| is_it(slot));
        let Some(name) = found.map(|(name, _)| name.clone()) else {
            return;
        };
        match self.channels.get_mut(&name) {
            Some(Slot::Joined(_)) => self.end_too_slow(&name),
            // It ends when the answer has come that it waits for.
            Some(Slot::Waiting(waiting)) => waiting.is_too_slow = true,
            None => {}
        }
    }

    fn end_too_slow(&mut self, topic: &str) {
        if let Some(Slot::Joined(channel)) = self.channels.get(topic) {
            channel.complain(self.context(), TOO_SLOW);
            self.settle(topic, Next::Ended(EndReason::TooSlow));
        }
    }

    /// When the connection was upgraded.
    pub(crate) fn opened(&self) -> Instant {
        self.history.opened()
    }

    /// The client at the other end.
    #[must_use]
    pub fn caller(&self) -> Caller {
        self.caller
    }

    /// The token of the upgrade.
    #[must_use]
    pub fn apikey(&self) -> &Token {
        &self.apikey
    }

    /// Since when a socket that has had channels has none.
    #[must_use]
    pub fn empty_since(&self) -> Option<Instant> {
        self.empty_since
    }

    /// Drops a message that is too large to be parsed. A join is refused as any other.
    fn refuse_large(&self, message: &Message) {
        self.shared.metrics.dropped.of(Dropped::TooLarge).inc();
        if message.reference.is_some() {
            self.reply_unjoined(message, message.join_ref.as_ref(), PAYLOAD_TOO_LARGE);
        }
    }

    fn heartbeat(&self, heartbeat: &Message, silence: Duration) {
        let timing = if silence > HEARTBEAT_LATE { Timing::Late } else { Timing::OnTime };
        self.shared.metrics.heartbeats.of(timing).inc();
        self.reply_unjoined(heartbeat, None, OK);
    }

    fn join(&mut self, join: Message) {
        self.note_generation(&join);
        if join.reference.as_ref().is_some_and(Ref::is_empty) {
            // A leftover of a join that was answered too late: an answer would remove the
            // client's healthy channel.
            return self.shared.metrics.dropped.of(Dropped::EmptyRef).inc();
        }
        let Some(sub_topic) = join.topic.strip_prefix(TOPIC_PREFIX) else {
            return self.reply_unmatched(&join);
        };
        let mut replaced = match self.channels.remove(&join.topic) {
            Some(Slot::Joined(channel)) => Some(channel),
            Some(Slot::Waiting(_)) | None => None,
        };
        let (join_ref, reference) = (join.join_ref.clone(), join.reference.clone());
        let topic = join.topic.clone();
        let is_heard = replaced.as_ref().is_some_and(|channel| channel.is_subscribed());
        let lost_sockets = &self.shared.recovery.lost_sockets;
        let history = self.history.of(sub_topic, is_heard, lost_sockets);
        // The one search for the topic's rule.
        let rules = self.shared.access.rules();
        let found = rules.find(sub_topic);
        let is_listened = found.is_listened();
        let mut decided = match self.refuse_early(sub_topic, &rules, &found) {
            Some(code) => Err(Refusal::new(code)),
            None => Channel::admit(self.context(), join, (rules, found)),
        };
        // A client that goes away before the answer has lost the topic, too.
        self.hold(&topic, Hold::Asked, is_listened);
        let error_delay = self.shared.settings.error_delay;
        match &mut decided {
            Ok(channel) if channel.is_private() => {
                self.empty_since = None;
                let answer = self.ask_reads(channel, Some(Instant::now() + error_delay));
                self.pending.wait(&topic, answer);
            }
            Ok(channel) => match channel.listen(self.context()) {
                None => {
                    if let Ok(channel) = decided {
                        self.open(channel, reference.as_ref(), history, replaced);
                    }
                    return;
                }
                Some((activation, listen_wait)) => {
                    self.empty_since = None;
                    self.pending.wait(&topic, async move {
                        // Answered all the same when the time is over.
                        let _ = timeout(listen_wait, activation).await;
                        Answer::Nothing
                    });
                }
            },
            Err(refusal) => {
                if let Some(replaced) = &mut replaced {
                    replaced.stop_reading(self.context());
                }
                if self.pending.refusals >= self.shared.limits.settings().channels_per_socket_max {
                    // No place to wait in: the delay is a courtesy, the bound is not.
                    let (join_ref, reference) = (join_ref.as_ref(), reference.as_ref());
                    return self.refuse(&topic, join_ref, reference, refusal, replaced);
                }
                self.pending.refusals += 1;
                self.pending.wait(&topic, async move {
                    sleep(error_delay).await;
                    Answer::Nothing
                });
            }
        }
        let joining = Joining { join_ref, reference, decided, history, replaced };
        let waiting = Waiting {
            what: Awaiting::Join(Box::new(joining)),
            backlog: Vec::new(),
            is_too_slow: false,
        };
        self.channels.insert(topic, Slot::Waiting(Box::new(waiting)));
    }

    /// Why a join is refused before its token is looked at, if it is.
    fn refuse_early(&self, sub_topic: &str, rules: &Rules, found: &Found) -> Option<ErrorCode> {
        let channels_max = self.shared.limits.settings().channels_per_socket_max;
        if sub_topic.is_empty() {
            Some(ErrorCode::TopicNameRequired)
        } else if self.shared.draining.is_cancelled() {
            Some(ErrorCode::RealtimeRestarting)
        } else if self.joins_too_fast(rules, found) {
            Some(ErrorCode::ClientJoinRateLimitReached)
        } else if self.channels.len() - self.pending.refusals >= channels_max {
            Some(ErrorCode::ChannelRateLimitReached)
        } else {
            None
        }
    }

    /// Counts a join of a topic without a rule. A rule's topic is joined at any rate and takes
    /// nothing, because viewers who are refused do not ask again; and where topics without a rule
    /// are not served, every refusal is alike.
    fn joins_too_fast(&self, rules: &Rules, found: &Found) -> bool {
        let is_limited = rules.topics().allow_other && matches!(found, Found::Other);
        let limits = &self.shared.limits;
        is_limited && !limits.join(limits.share(self.caller, self.apikey.subject()))
    }

    fn answer_join(&mut self, topic: &str, joining: Joining, answer: Answer) {
        let Joining { join_ref, reference, decided, history, replaced } = joining;
        if decided.is_err() {
            self.pending.refusals -= 1;
        }
        let decided = match (decided, answer) {
            (Ok(channel), Answer::Reads(reads)) => channel.admit_by(reads),
            (decided, Answer::Nothing | Answer::Reads(_) | Answer::Writes(_)) => decided,
        };
        let decided = decided.and_then(|mut channel| {
            channel.confirm(self.context())?;
            Ok(channel)
        });
        match decided {
            Ok(channel) => self.open(channel, reference.as_ref(), history, replaced),
            Err(refusal) => {
                let (join_ref, reference) = (join_ref.as_ref(), reference.as_ref());
                self.refuse(topic, join_ref, reference, &refusal, replaced);
            }
        }
    }

    /// Hands a joined channel the answer of its policies.
    fn answer_channel(
        &mut self,
        mut channel: Box<Channel>,
        answer: Answer,
        backlog: &mut Vec<Message>,
    ) {
        let next = match answer {
            Answer::Nothing => Next::Open,
            Answer::Reads(reads) => channel.take_reads(self.context(), reads),
            Answer::Writes(writes) => {
                if let Err(reason) = channel.take_writes(writes) {
                    let is_other = |message: &Message| &*message.event != "broadcast";
                    let count = backlog.iter().position(is_other).unwrap_or(backlog.len());
                    for _ in backlog.drain(..count) {
                        self.shared.metrics.dropped.of(reason).inc();
                    }
                }
                Next::Open
            }
        };
        let topic: Box<str> = channel.topic().into();
        self.channels.insert(topic.clone(), Slot::Joined(channel));
        self.settle(&topic, next);
    }

    /// Asks the policies what the channel may read. A join that they refuse is answered at
    /// `refused_at`, as one that a rule forbids.
    fn ask_reads(
        &self,
        channel: &Channel,
        refused_at: Option<Instant>,
    ) -> impl Future<Output = Answer> + Send + use<> {
        let (policies, query) = (Arc::clone(&self.shared.policies), channel.query(&self.headers));
        let (presence, is_refused_anyway) = (channel.wants_presence(), channel.wants_replay());
        async move {
            let reads = policies.read(query, presence).await;
            if let Some(refused_at) = refused_at
                && (is_refused_anyway || !reads.as_ref().is_ok_and(|reads| reads.any()))
            {
                sleep_until(refused_at).await;
            }
            Answer::Reads(reads)
        }
    }

    /// Has the policies asked whether the channel may broadcast; what comes for its topic waits,
    /// these pushes first.
    fn ask_writes(&mut self, topic: &str, pushes: Vec<Message>) {
        let Some(Slot::Joined(channel)) = self.channels.remove(topic) else {
            return;
        };
        let (policies, query) = (Arc::clone(&self.shared.policies), channel.query(&self.headers));
        let answer = async move { Answer::Writes(policies.write(query).await) };
        self.pending.wait(topic, answer);
        let backlog = self.pending.put(pushes);
        let waiting = Waiting { what: Awaiting::Channel(channel), backlog, is_too_slow: false };
        self.channels.insert(topic.into(), Slot::Waiting(Box::new(waiting)));
    }

    fn open(
        &mut self,
        mut channel: Channel,
        reference: Option<&Ref>,
        history: ClientHistory,
        replaced: Option<Box<Channel>>,
    ) {
        let context = self.context();
        match replaced {
            Some(mut replaced) => {
                channel.take_over(&mut replaced);
                channel.open(context, reference, history);
                replaced.close(context, EndReason::Replaced);
            }
            None => channel.open(context, reference, history),
        }
        if channel.is_listened() {
            self.shared.recovery.note_joined(self.history.client(), channel.sub_topic());
        }
        self.expires_at = self.expires_at.min(channel.expires_at(self.shared.auth.grace()));
        self.note_look(channel.looks_again());
        self.channels.insert(channel.topic().into(), Slot::Joined(Box::new(channel)));
        self.empty_since = None;
    }

    fn leave(&mut self, leave: &Message) {
        let Some(Slot::Joined(channel)) = self.channels.get(&leave.topic) else {
            return self.reply_unjoined(leave, leave.join_ref.as_ref(), OK);
        };
        if let (Some(asked), Some(joined)) = (&leave.join_ref, channel.join_ref())
            && asked != joined
        {
            // The leave of a channel that this one has replaced.
            return self.shared.metrics.dropped.of(Dropped::StaleLeave).inc();
        }
        if let Some(Slot::Joined(channel)) = self.channels.remove(&leave.topic) {
            if channel.is_subscribed() {
                self.hold(&leave.topic, Hold::Left, channel.is_listened());
            }
            channel.reply(self.context(), leave.reference.as_ref(), OK);
            channel.close(self.context(), EndReason::Left);
            self.note_emptiness();
        }
    }

    /// Hands broadcasts to their channel. What comes behind the one that ends it has no channel.
    async fn broadcast(&mut self, topic: &str, pushes: Vec<Message>) {
        if self.expires_at <= unix_now() {
            // The tick may come a moment later; who may write is decided here.
            self.tick();
        }
        if let Some(Slot::Joined(channel)) = self.channels.get(topic)
            && channel.asks_before_writing()
        {
            return self.ask_writes(topic, pushes);
        }
        let Self { shared, outbox, apikey, channels, caller, .. } = self;
        let context = Context { shared, outbox, apikey, caller: *caller };
        let mut pushes = pushes.into_iter();
        if let Some(Slot::Joined(channel)) = channels.get_mut(topic) {
            let next = channel.broadcast_received(context, &mut pushes).await;
            self.settle(topic, next);
        }
        for push in pushes {
            self.reply_unmatched(&push);
        }
    }

    /// Hands a message to its channel.
    fn on_channel(
        &mut self,
        message: &Message,
        receive: impl FnOnce(&mut Channel, Context<'_>, &Message) -> Next,
    ) {
        let Self { shared, outbox, apikey, channels, caller, .. } = self;
        let context = Context { shared, outbox, apikey, caller: *caller };
        let Some(Slot::Joined(channel)) = channels.get_mut(&message.topic) else {
            return self.reply_unmatched(message);
        };
        let next = receive(channel, context, message);
        self.expires_at = self.expires_at.min(channel.expires_at(shared.auth.grace()));
        let look = channel.looks_again();
        self.note_look(look);
        self.settle(&message.topic, next);
    }

    /// Acts on each joined channel, then finds the next expiry.
    fn each_channel(&mut self, mut act: impl FnMut(&mut Channel, Context<'_>) -> Next) {
        let Self { shared, outbox, apikey, channels, caller, .. } = self;
        let context = Context { shared, outbox, apikey, caller: *caller };
        let mut nexts: Vec<(Box<str>, Next)> = Vec::new();
        for (topic, slot) in channels {
            let channel = match slot {
                Slot::Joined(channel) => channel,
                Slot::Waiting(waiting) => {
                    if let Some(channel) = waiting.hearing_mut() {
                        channel.review_waiting(context);
                    }
                    continue;
                }
            };
            match act(channel, context) {
                Next::Open => {}
                next @ (Next::Ended(_) | Next::AskReads) => nexts.push((topic.clone(), next)),
            }
        }
        for (topic, next) in nexts {
            self.settle(&topic, next);
        }
        let grace = self.shared.auth.grace();
        let ends = self.joined().map(|channel| channel.expires_at(grace));
        self.expires_at = ends.min().unwrap_or(i64::MAX);
        let look = self.joined().filter_map(Channel::looks_again).min();
        self.note_look(look);
    }

    /// Ends a channel, or asks its policies, as its last event requires.
    fn settle(&mut self, topic: &str, next: Next) {
        if next == Next::Open {
            return;
        }
        let Some(Slot::Joined(channel)) = self.channels.remove(topic) else {
            return;
        };
        match next {
            Next::Open => {}
            Next::Ended(reason) => {
                channel.close(self.context(), reason);
                self.note_emptiness();
            }
            Next::AskReads => {
                let answer = self.ask_reads(&channel, None);
                self.pending.wait(topic, answer);
                let waiting = Waiting {
                    what: Awaiting::Channel(channel),
                    backlog: Vec::new(),
                    is_too_slow: false,
                };
                self.channels.insert(topic.into(), Slot::Waiting(Box::new(waiting)));
            }
        }
    }

    /// Counts the client by its first join, which of a deaf one comes late.
    fn note_generation(&mut self, join: &Message) {
        if let Payload::Json(payload) = &join.payload
            && self.history.asks_first()
        {
            let generation = Generation::of(self.outbox.serializer(), payload);
            self.shared.metrics.client_versions.of(generation).inc();
        }
    }

    /// Notes that a channel has to look for its LISTEN after so long, if one may have to.
    fn note_look(&mut self, after: Option<Duration>) {
        let after = after.map(|after| Instant::now() + after);
        self.looks_at = [self.looks_at, after].into_iter().flatten().min();
    }

    fn note_emptiness(&mut self) {
        if self.channels.is_empty() && self.empty_since.is_none() {
            self.empty_since = Some(Instant::now());
        }
    }

    /// Records how the socket stands to a topic, if the database tells of it.
    fn hold(&mut self, topic: &str, hold: Hold, is_listened: bool) {
        let channels = &self.channels;
        let has_channel = |topic: &str| channels.contains_key(topic);
        self.history.hold(topic, hold, is_listened, has_channel);
    }

    /// Whether the client has joined nothing, and is not suspected yet of being deaf.
    fn is_silent(&self) -> bool {
        !self.history.is_suspect() && self.channels.is_empty() && self.empty_since.is_none()
    }

    fn joined(&self) -> impl Iterator<Item = &Channel> {
        self.channels.values().filter_map(|slot| match slot {
            Slot::Joined(channel) => Some(&**channel),
            Slot::Waiting(_) => None,
        })
    }

    fn context(&self) -> Context<'_> {
        let Self { shared, outbox, apikey, caller, .. } = self;
        Context { shared, outbox, apikey, caller: *caller }
    }

    /// Answers a join with an error; the channel that it would have replaced is gone, too.
    fn refuse(
        &self,
        topic: &str,
        join_ref: Option<&Ref>,
        reference: Option<&Ref>,
        refusal: &Refusal,
        replaced: Option<Box<Channel>>,
    ) {
        self.shared.metrics.joins.of(JoinResult::Error(refusal.code)).inc();
        tracing::debug!(code = refusal.code.as_str(), "join refused");
        Audit::RefuseJoin { topic, reason: refusal.code.as_str() }
            .note(self.caller, Some(self.apikey.subject()));
        let payload = refusal.reply();
        let payload = payload.as_str();
        self.context().push(&Push { join_ref, reference, topic, event: "phx_reply", payload });
        if let Some(replaced) = replaced {
            replaced.close(self.context(), EndReason::Replaced);
        }
    }

    fn reply_unmatched(&self, message: &Message) {
        self.shared.metrics.dropped.of(Dropped::UnmatchedTopic).inc();
        self.reply_unjoined(message, None, error_reply("unmatched topic").as_str());
    }

    fn reply_unjoined(&self, message: &Message, join_ref: Option<&Ref>, payload: &str) {
        let Message { topic, reference, .. } = message;
        let reference = reference.as_ref();
        self.context().push(&Push { join_ref, reference, topic, event: "phx_reply", payload });
    }
}

impl Drop for Socket {
    /// Leaves a record of each topic that the socket has asked for and not left.
    fn drop(&mut self) {
        let is_behind = self.outbox.is_behind();
        let has_heard = |topic: &str| match self.channels.get(topic) {
            Some(Slot::Joined(channel)) => channel.is_subscribed() && !is_behind,
            Some(Slot::Waiting(_)) | None => false,
        };
        for (sub_topic, last_data) in self.history.lost(has_heard) {
            self.shared.recovery.lose(self.history.client(), sub_topic, last_data);
        }
    }
}
