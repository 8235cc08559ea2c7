//! The Phoenix socket: channels by topic over one connection, and the routing table of events.
//!
//! Invariants: messages of one topic are handled in their order, also while its join waits for a
//! LISTEN, its refusal for the delay, or its channel for the database's policies; other topics go on
//! meanwhile. A socket holds at most
//! `channels_per_socket_max` channels and as many refusals that wait, and no more bytes of messages
//! behind them than may wait in its outbox. A socket that ends without a leave leaves a record of
//! each topic that the database tells of.

pub(crate) mod channel;
mod private;

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::channel::{Channel, Context, EndReason, Fate};
use crate::{
    access::rule::Found,
    auth::jwt::Token,
    clock::unix_now,
    hub::outbox::{Outbox, Replaceable},
    invalidation::ClientHistory,
    limits::Limited,
    metrics::Dropped,
    policies::{Allowed, Asking, AuthorizeError},
    protocol::{
        error_code::{ErrorCode, Refusal, error_reply},
        generation::Generation,
        message::{Message, Payload, Ref},
        payload::OK,
        serializer::Push,
        topic::TOPIC_PREFIX,
    },
    recovery::{ClientKey, History, Hold},
    server::Services,
    telemetry::audit::{Audit, Caller},
};

/// Most messages of one topic that wait for the answer to its join.
const BACKLOG_MAX: usize = 100;

/// Clients beat every 25 or 30 s; a heartbeat after so long a silence is one of a hidden tab, which
/// sends one a minute, or of a page that was frozen.
const HEARTBEAT_LATE: Duration = Duration::from_secs(40);

/// The state of one client's channels.
#[derive(Debug)]
pub struct Socket {
    services: Arc<Services>,
    outbox: Arc<Outbox>,
    /// The token of the upgrade.
    apikey: Arc<Token>,
    caller: Caller,
    /// What its client may have missed.
    history: History,
    channels: HashMap<Box<str>, Slot>,
    /// Gives the topic whose answer is due.
    waiting: FuturesUnordered<Later>,
    /// Topics that wait for the delay of a refusal.
    refusals: usize,
    /// Of the upgrade, for the policies: a JSON object.
    headers: Arc<str>,
    /// Bytes of all backlogs' payloads.
    backlog_bytes: usize,
    /// Not later than the first token of a channel ends, in seconds since 1970.
    expires_at: i64,
    /// Since when a socket that has had channels has none.
    empty_since: Option<Instant>,
}

#[derive(Debug)]
enum Slot {
    Joined(Box<Channel>),
    Waiting(Box<Waiting>),
}

/// A topic that waits, with the messages that have come for it since.
#[derive(Debug)]
struct Waiting {
    who: Who,
    backlog: Vec<Message>,
}

/// Who waits.
#[derive(Debug)]
enum Who {
    Joining(Box<Joining>),
    /// A joined channel, for its policies.
    Channel(Box<Channel>),
}

/// A join that has not been answered yet.
#[derive(Debug)]
struct Joining {
    join_ref: Option<Ref>,
    reference: Option<Ref>,
    answer: Result<Channel, Refusal>,
    /// What was known of the client when it asked.
    known: ClientHistory,
    /// The channel that the join replaces.
    replaced: Option<Box<Channel>>,
}

/// Gives a topic when it need not wait any longer.
type Later = Pin<Box<dyn Future<Output = Due> + Send>>;

/// A topic that need not wait any longer.
#[derive(Debug)]
pub struct Due {
    topic: Box<str>,
    answer: Answer,
}

/// What it has waited for.
#[derive(Debug)]
enum Answer {
    /// A time to come, or a LISTEN.
    Nothing,
    Reads(Result<Allowed, AuthorizeError>),
    Writes(Result<bool, AuthorizeError>),
}

impl Socket {
    /// A socket without channels.
    #[must_use]
    pub fn new(
        services: Arc<Services>,
        outbox: Arc<Outbox>,
        apikey: Arc<Token>,
        client: ClientKey,
        caller: Caller,
    ) -> Self {
        Self {
            headers: Arc::clone(services.policies.no_headers()),
            services,
            outbox,
            apikey,
            caller,
            history: History::new(client),
            channels: HashMap::new(),
            waiting: FuturesUnordered::new(),
            refusals: 0,
            backlog_bytes: 0,
            expires_at: i64::MAX,
            empty_since: None,
        }
    }

    /// With these headers of the upgrade, a JSON object, for the policies of private channels.
    #[must_use]
    pub fn with_headers(mut self, headers: Option<Arc<str>>) -> Self {
        if let Some(headers) = headers {
            self.headers = headers;
        }
        self
    }

    /// Does what a client's messages ask for, one after the other; answers through the outbox.
    pub async fn handle(&mut self, messages: impl IntoIterator<Item = Message>) {
        let mut messages = messages.into_iter().peekable();
        while let Some(message) = messages.next() {
            let Self { services, outbox, apikey, history, .. } = &mut *self;
            let silence = history.hear(&message, &services.recovery.healing, outbox, apikey);
            if let Some(Slot::Waiting(waiting)) = self.channels.get_mut(&message.topic) {
                let bytes = self.backlog_bytes + message.payload.len();
                let bytes_max = self.services.limits.settings().outbox_bytes_max;
                if waiting.backlog.len() < BACKLOG_MAX && bytes <= bytes_max {
                    self.backlog_bytes = bytes;
                    waiting.backlog.push(message);
                } else {
                    self.services.metrics.count_dropped(Dropped::Backlog);
                }
                continue;
            }
            match (&*message.topic, &*message.event) {
                ("phoenix", "heartbeat") => {
                    let timing = if silence > HEARTBEAT_LATE { "late" } else { "on_time" };
                    self.services.metrics.heartbeats.with_label_values(&[timing]).inc();
                    self.reply_unjoined(&message, None, OK);
                }
                (_, "phx_join") => {
                    self.note_generation(&message);
                    self.join(message);
                }
                (_, "phx_leave") => self.leave(&message),
                (_, "broadcast") => {
                    // Neighbours on one topic are fanned out together.
                    let topic = message.topic.clone();
                    let mut pushes = vec![message];
                    let is_next = |it: &Message| &*it.event == "broadcast" && it.topic == topic;
                    while let Some(next) = messages.next_if(is_next) {
                        pushes.push(next);
                    }
                    // In a place of its own: few sockets ever broadcast, and none need have room.
                    Box::pin(self.broadcast(&topic, pushes)).await;
                }
                (_, _) => self.route(&message),
            }
        }
    }

    /// Waits until a topic need not wait any longer, which [`Self::answer`] is told.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn due(&mut self) -> Due {
        match self.waiting.next().await {
            Some(due) => due,
            // Nothing waits; what will is put in between two calls.
            None => std::future::pending().await,
        }
    }

    /// Does what a topic has waited for, then handles what came after it.
    pub async fn answer(&mut self, due: Due) {
        let Due { topic, answer } = due;
        let Some(Slot::Waiting(waiting)) = self.channels.remove(&topic) else {
            return;
        };
        let Waiting { who, mut backlog } = *waiting;
        self.backlog_bytes -= backlog.iter().map(|it| it.payload.len()).sum::<usize>();
        match who {
            Who::Joining(joining) => self.answer_join(&topic, *joining, answer),
            Who::Channel(channel) => self.tell(channel, answer, &mut backlog),
        }
        // What may have been revoked or exchanged meanwhile.
        let Self { services, outbox, apikey, channels, caller, .. } = self;
        let context = Context { services, outbox, apikey, caller: *caller };
        if let Some(Slot::Joined(channel)) = channels.get_mut(&topic) {
            let fate = channel.review(context);
            // While it waited, a tick has not looked at it.
            let ends_at = channel.expires_at(services.config.auth.grace);
            self.expires_at = self.expires_at.min(ends_at);
            self.settle(&topic, fate);
        }
        self.handle(backlog).await;
        self.note_emptiness();
    }

    fn answer_join(&mut self, topic: &str, joining: Joining, answer: Answer) {
        let Joining { join_ref, reference, answer: decided, known, replaced } = joining;
        if decided.is_err() {
            self.refusals -= 1;
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
            Ok(channel) => self.open(channel, reference.as_ref(), known, replaced),
            Err(refusal) => {
                let (join_ref, reference) = (join_ref.as_ref(), reference.as_ref());
                self.refuse(topic, join_ref, reference, &refusal, replaced);
            }
        }
    }

    /// Tells a joined channel what its policies have answered.
    fn tell(&mut self, mut channel: Box<Channel>, answer: Answer, backlog: &mut Vec<Message>) {
        let fate = match answer {
            Answer::Nothing => Fate::Open,
            Answer::Reads(reads) => channel.take_reads(self.context(), reads),
            Answer::Writes(writes) => {
                if let Err(reason) = channel.take_writes(writes) {
                    let is_other = |it: &Message| &*it.event != "broadcast";
                    let count = backlog.iter().position(is_other).unwrap_or(backlog.len());
                    for _ in backlog.drain(..count) {
                        self.services.metrics.count_dropped(reason);
                    }
                }
                Fate::Open
            }
        };
        let topic: Box<str> = channel.topic().into();
        self.channels.insert(topic.clone(), Slot::Joined(channel));
        self.settle(&topic, fate);
    }

    /// Asks the policies what the channel may read. To a join a no is told when it would be if a rule
    /// forbade the topic.
    fn ask_reads(&self, channel: &Channel, refused_at: Option<Instant>) -> Later {
        let (policies, asking) = (Arc::clone(&self.services.policies), self.asking(channel));
        let (topic, presence) = (channel.topic().into(), channel.wants_presence());
        let is_refused_anyway = channel.wants_replay();
        Box::pin(async move {
            let reads = policies.read(asking, presence).await;
            if let Some(refused_at) = refused_at
                && (is_refused_anyway || !reads.as_ref().is_ok_and(|it| it.any()))
            {
                sleep_until(refused_at).await;
            }
            Due { topic, answer: Answer::Reads(reads) }
        })
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
        expiry.min(suspicion).min(at_most)
    }

    /// Ends or changes the channels whose tokens have expired, and tries again to listen for those
    /// that found no place.
    pub fn tick(&mut self) {
        if self.is_silent() && self.history.suspect_at() <= Instant::now() {
            let Self { services, outbox, apikey, history, .. } = self;
            history.suspect(&services.recovery.healing, outbox, apikey);
        }
        let now = unix_now();
        let Self { services, outbox, apikey, channels, caller, .. } = self;
        let grace = services.config.auth.grace;
        let context = Context { services, outbox, apikey, caller: *caller };
        let mut fates: Vec<(Box<str>, Fate)> = Vec::new();
        for (topic, slot) in channels {
            let Slot::Joined(channel) = slot else { continue };
            if channel.expires_at(grace) <= now {
                fates.push((topic.clone(), channel.check_expiry(context)));
            }
            drop(channel.listen(context));
        }
        for (topic, fate) in fates {
            self.settle(&topic, fate);
        }
        self.note_expiry();
    }

    fn note_expiry(&mut self) {
        let grace = self.services.config.auth.grace;
        let ends = self.joined().map(|channel| channel.expires_at(grace));
        self.expires_at = ends.min().unwrap_or(i64::MAX);
    }

    /// Looks at each channel's token and topic anew: keys, rules or revocations have changed.
    pub fn review(&mut self) {
        let Self { services, outbox, apikey, channels, caller, .. } = self;
        let context = Context { services, outbox, apikey, caller: *caller };
        let mut fates: Vec<(Box<str>, Fate)> = Vec::new();
        for (topic, slot) in channels {
            let Slot::Joined(channel) = slot else { continue };
            fates.push((topic.clone(), channel.review(context)));
        }
        for (topic, fate) in fates {
            self.settle(&topic, fate);
        }
        self.note_expiry();
    }

    /// Tells the client what has changed on a topic whose messages it was too slow for.
    pub fn conflate(&self, behind: Replaceable) {
        for slot in self.channels.values() {
            let channel = match slot {
                Slot::Joined(channel) => Some(channel),
                Slot::Waiting(waiting) => match &waiting.who {
                    // It is still heard.
                    Who::Joining(joining) => joining.replaced.as_ref(),
                    Who::Channel(channel) => Some(channel),
                },
            };
            if let Some(channel) = channel {
                channel.conflate(self.context(), behind);
            }
        }
    }

    /// When the connection was upgraded.
    pub(crate) fn opened(&self) -> Instant {
        self.history.opened()
    }

    /// Who is at the other end.
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

    /// Whether it has joined nothing, and nobody has taken notice of it.
    fn is_silent(&self) -> bool {
        !self.history.is_suspect() && self.channels.is_empty() && self.empty_since.is_none()
    }

    /// Counts the client by its first join, which of a deaf one comes late.
    fn note_generation(&mut self, join: &Message) {
        if let Payload::Json(payload) = &join.payload
            && self.history.asks_first()
        {
            let generation = Generation::of(self.outbox.serializer(), payload);
            self.services.metrics.client_versions.with_label_values(&[generation.kind()]).inc();
        }
    }

    /// What is known of the client and a topic that it joins.
    fn known(&self, sub_topic: &str, replaced: Option<&Channel>) -> ClientHistory {
        let is_heard = replaced.is_some_and(Channel::is_subscribed);
        self.history.of(sub_topic, is_heard, &self.services.recovery.lost_sockets)
    }

    /// Remembers how the socket stands to a topic, if the database tells of it.
    fn hold(&mut self, topic: &str, hold: Hold) {
        let Self { services, history, channels, .. } = self;
        let is_listened = |sub_topic: &str| services.rules().is_listened(sub_topic);
        history.hold(topic, hold, is_listened, |topic| channels.contains_key(topic));
    }

    fn joined(&self) -> impl Iterator<Item = &Channel> {
        self.channels.values().filter_map(|slot| match slot {
            Slot::Joined(channel) => Some(&**channel),
            Slot::Waiting(_) => None,
        })
    }

    /// A question to the policies by a channel of this socket.
    fn asking(&self, channel: &Channel) -> Asking {
        channel.asking(&self.headers)
    }

    fn context(&self) -> Context<'_> {
        let Self { services, outbox, apikey, caller, .. } = self;
        Context { services, outbox, apikey, caller: *caller }
    }

    fn join(&mut self, join: Message) {
        if join.reference.as_ref().is_some_and(Ref::is_empty) {
            // A leftover of a join that was answered too late: an answer would remove the
            // client's healthy channel.
            return self.services.metrics.count_dropped(Dropped::EmptyRef);
        }
        let Some(sub_topic) = join.topic.strip_prefix(TOPIC_PREFIX) else {
            return self.reply_unmatched(&join);
        };
        let is_nameless = sub_topic.is_empty();
        let mut replaced = match self.channels.remove(&join.topic) {
            Some(Slot::Joined(channel)) => Some(channel),
            Some(Slot::Waiting(_)) | None => None,
        };
        let channels_max = self.services.limits.settings().channels_per_socket_max;
        let (join_ref, reference) = (join.join_ref.clone(), join.reference.clone());
        let topic = join.topic.clone();
        let known = self.known(sub_topic, replaced.as_deref());
        let mut answer = if is_nameless {
            Err(Refusal::new(ErrorCode::TopicNameRequired))
        } else if self.services.draining.is_cancelled() {
            Err(Refusal::new(ErrorCode::RealtimeRestarting))
        } else if self.joins_too_fast(sub_topic) {
            Err(Refusal::new(ErrorCode::ClientJoinRateLimitReached))
        } else if self.channels.len() - self.refusals >= channels_max {
            Err(Refusal::new(ErrorCode::ChannelRateLimitReached))
        } else {
            Channel::admit(self.context(), join)
        };
        // Who goes away before it is answered has lost the topic, too.
        self.hold(&topic, Hold::Asked);
        let error_delay = self.services.config.protocol.error_delay;
        let due: Later = match &mut answer {
            Ok(channel) if channel.is_private() => {
                self.empty_since = None;
                self.ask_reads(channel, Some(Instant::now() + error_delay))
            }
            Ok(channel) => match channel.listen(self.context()) {
                None => {
                    if let Ok(channel) = answer {
                        self.open(channel, reference.as_ref(), known, replaced);
                    }
                    return;
                }
                Some(activation) => {
                    self.empty_since = None;
                    let listen_wait = self.services.config.relay.listen_wait;
                    let topic = topic.clone();
                    Box::pin(async move {
                        // Answered all the same when the time is over.
                        let _ = timeout(listen_wait, activation).await;
                        Due { topic, answer: Answer::Nothing }
                    })
                }
            },
            Err(refusal) => {
                if let Some(replaced) = &mut replaced {
                    replaced.unsubscribe();
                }
                if self.refusals >= channels_max {
                    // No place to wait in: the delay is a courtesy, the bound is not.
                    let (join_ref, reference) = (join_ref.as_ref(), reference.as_ref());
                    return self.refuse(&topic, join_ref, reference, refusal, replaced);
                }
                self.refusals += 1;
                let topic = topic.clone();
                Box::pin(async move {
                    sleep(error_delay).await;
                    Due { topic, answer: Answer::Nothing }
                })
            }
        };
        let joining = Joining { join_ref, reference, answer, known, replaced };
        let waiting = Waiting { who: Who::Joining(Box::new(joining)), backlog: Vec::new() };
        self.channels.insert(topic, Slot::Waiting(Box::new(waiting)));
        self.waiting.push(due);
    }

    /// Counts a join. A rule's topic is joined at any rate: what its viewers are refused they do
    /// not ask for again.
    fn joins_too_fast(&self, sub_topic: &str) -> bool {
        let services = &self.services;
        let is_refused = !services.limits.join() && {
            let rules = services.rules();
            // Where others are not served, all that is not allowed is answered alike.
            rules.topics().allow_other && matches!(rules.find(sub_topic), Found::Other)
        };
        if is_refused {
            services.limits.count(Limited::Joins);
        }
        is_refused
    }

    fn open(
        &mut self,
        mut channel: Channel,
        reference: Option<&Ref>,
        known: ClientHistory,
        replaced: Option<Box<Channel>>,
    ) {
        let context = self.context();
        match replaced {
            Some(mut replaced) => {
                channel.take_over(&mut replaced);
                channel.open(context, reference, known);
                replaced.close(context, EndReason::Replaced);
            }
            None => channel.open(context, reference, known),
        }
        if channel.is_listened() {
            self.services.recovery.healing.note_joined(&channel.sub_topic());
        }
        self.expires_at = self.expires_at.min(channel.expires_at(self.services.config.auth.grace));
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
            // Of a channel that this one has replaced.
            return self.services.metrics.count_dropped(Dropped::StaleLeave);
        }
        if let Some(Slot::Joined(channel)) = self.channels.remove(&leave.topic) {
            if channel.is_subscribed() {
                self.hold(&leave.topic, Hold::Left);
            }
            channel.reply(self.context(), leave.reference.as_ref(), OK);
            channel.close(self.context(), EndReason::Left);
            self.note_emptiness();
        }
    }

    /// Hands broadcasts to their channel.
    async fn broadcast(&mut self, topic: &str, pushes: Vec<Message>) {
        if let Some(Slot::Joined(channel)) = self.channels.get(topic)
            && channel.asks_before_writing()
        {
            return self.ask_writes(topic, pushes);
        }
        let Self { services, outbox, apikey, channels, caller, .. } = self;
        let context = Context { services, outbox, apikey, caller: *caller };
        match channels.get(topic) {
            Some(Slot::Joined(channel)) => {
                let fate = channel.broadcast(context, pushes).await;
                self.settle(topic, fate);
            }
            Some(Slot::Waiting(_)) | None => {
                for push in &pushes {
                    self.reply_unmatched(push);
                }
            }
        }
    }

    /// Has the policies asked whether the channel may broadcast; what comes for its topic waits,
    /// these pushes first.
    fn ask_writes(&mut self, topic: &str, pushes: Vec<Message>) {
        let Some(Slot::Joined(channel)) = self.channels.remove(topic) else {
            return;
        };
        let (policies, asking) = (Arc::clone(&self.services.policies), self.asking(&channel));
        let due_topic: Box<str> = topic.into();
        self.waiting.push(Box::pin(async move {
            Due { topic: due_topic, answer: Answer::Writes(policies.write(asking).await) }
        }));
        self.backlog_bytes += pushes.iter().map(|it| it.payload.len()).sum::<usize>();
        let waiting = Waiting { who: Who::Channel(channel), backlog: pushes };
        self.channels.insert(topic.into(), Slot::Waiting(Box::new(waiting)));
    }

    /// Hands any other message to its channel.
    fn route(&mut self, message: &Message) {
        let Self { services, outbox, apikey, channels, caller, .. } = self;
        let context = Context { services, outbox, apikey, caller: *caller };
        let Some(Slot::Joined(channel)) = channels.get_mut(&message.topic) else {
            return self.reply_unmatched(message);
        };
        let fate = channel.receive(context, message);
        self.expires_at = self.expires_at.min(channel.expires_at(self.services.config.auth.grace));
        self.settle(&message.topic, fate);
    }

    /// Does what is left to do for a channel after an event.
    fn settle(&mut self, topic: &str, fate: Fate) {
        if fate == Fate::Open {
            return;
        }
        let Some(Slot::Joined(channel)) = self.channels.remove(topic) else {
            return;
        };
        match fate {
            Fate::Open => {}
            Fate::Ended(reason) => {
                channel.close(self.context(), reason);
                self.note_emptiness();
            }
            Fate::Asking => {
                self.waiting.push(self.ask_reads(&channel, None));
                let waiting = Waiting { who: Who::Channel(channel), backlog: Vec::new() };
                self.channels.insert(topic.into(), Slot::Waiting(Box::new(waiting)));
            }
        }
    }

    fn note_emptiness(&mut self) {
        if self.channels.is_empty() && self.empty_since.is_none() {
            self.empty_since = Some(Instant::now());
        }
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
        self.services.metrics.joins.with_label_values(&["error", refusal.code.as_str()]).inc();
        tracing::debug!(code = refusal.code.as_str(), "join refused");
        Audit::RefuseJoin { topic, reason: refusal.code.as_str() }
            .note(self.caller, Some(&self.apikey));
        let payload = refusal.reply();
        let payload = payload.as_str();
        self.context().push(&Push { join_ref, reference, topic, event: "phx_reply", payload });
        if let Some(replaced) = replaced {
            replaced.close(self.context(), EndReason::Replaced);
        }
    }

    fn reply_unmatched(&self, message: &Message) {
        self.reply_unjoined(message, None, error_reply("unmatched topic").as_str());
    }

    fn reply_unjoined(&self, message: &Message, join_ref: Option<&Ref>, payload: &str) {
        let Message { topic, reference, .. } = message;
        let reference = reference.as_ref();
        self.context().push(&Push { join_ref, reference, topic, event: "phx_reply", payload });
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let is_behind = self.outbox.is_behind();
        let has_heard = |topic: &str| match self.channels.get(topic) {
            Some(Slot::Joined(channel)) => channel.is_subscribed() && !is_behind,
            Some(Slot::Waiting(_)) | None => false,
        };
        self.history.end(&self.services.recovery.lost_sockets, has_heard);
    }
}
