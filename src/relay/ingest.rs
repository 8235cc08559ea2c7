//! Notification → broadcast: what Postgres sends becomes what clients get, at once or, of a merged
//! rule, with the event's next message.
//!
//! Invariants: notifications are handled one after the other, in the order in which the session
//! received them, which is the order of their commits; a payload passes byte for byte.

use std::sync::Arc;

use tokio::{sync::mpsc, time::Instant};

use super::clock_offset;
use crate::{
    clock::unix_seconds,
    db::REVOCATIONS_CHANNEL,
    hub::{
        BroadcastSource, FanOut, To,
        outbox::{Committed, Departure},
    },
    invalidation::Notified,
    metrics::Metrics,
    protocol::{
        message::{Json, UserBroadcast, UserPayload},
        serializer::Broadcast,
    },
    server::Services,
};

/// The channel of the database's monitoring notifications, which name every event.
pub(crate) const STATS_CHANNEL: &str = "global_cache_stats";

/// Notifications that may wait between the session and the fan-out; beyond, the session waits,
/// and what the server has sent waits in its connection.
pub(crate) const BACKLOG_MAX: usize = 1024;

/// Most notifications that are handled together.
const BATCH_MAX: usize = 64;

/// One notification as the session received it.
#[derive(Debug)]
pub(crate) struct Notification {
    pub(crate) channel: Box<str>,
    pub(crate) payload: String,
    /// Of the session that notified; what it sent in one transaction arrives together.
    pub(crate) pid: u32,
    /// When it was read from the connection.
    pub(crate) received: Instant,
}

/// What became of a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// At least one client was sent it.
    Delivered,
    /// It waits for its event's next message.
    Offered,
    /// Nobody here has joined the event.
    NoViewer,
    /// Its payload is not JSON.
    Malformed,
    /// Its payload is JSON, but not an object.
    NotObject,
    /// Its payload is above the limit.
    Oversized,
    /// Nobody has wanted its channel.
    UnknownChannel,
    /// A monitoring notification: noted, not relayed.
    Noted,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 8] = [
        Self::Delivered,
        Self::Offered,
        Self::NoViewer,
        Self::Malformed,
        Self::NotObject,
        Self::Oversized,
        Self::UnknownChannel,
        Self::Noted,
    ];

    /// The metric's label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Offered => "offered",
            Self::NoViewer => "no_viewer",
            Self::Malformed => "malformed",
            Self::NotObject => "not_object",
            Self::Oversized => "oversized",
            Self::UnknownChannel => "unknown_channel",
            Self::Noted => "noted",
        }
    }

    /// The sources whose notifications can come to this.
    pub(crate) fn sources(self) -> &'static [&'static str] {
        match self {
            Self::Delivered | Self::Offered | Self::NoViewer => &["event"],
            Self::Malformed | Self::NotObject | Self::Oversized => &["event", "stats"],
            Self::UnknownChannel => &["other"],
            Self::Noted => &["stats", "revocations"],
        }
    }
}

/// Broadcasts notifications until the session's end of the queue is dropped.
pub(crate) async fn run(services: Arc<Services>, mut queue: mpsc::Receiver<Notification>) {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, BATCH_MAX).await > 0 {
        services.metrics.relay_last_notification.set(unix_seconds());
        // Neighbours of one channel and session leave together; the order of all stays.
        let mut rest = batch.drain(..).peekable();
        while let Some(first) = rest.next() {
            let Notification { channel, pid, payload, received } = first;
            let mut payloads = vec![(payload, received)];
            while let Some(next) = rest.next_if(|it| it.channel == channel && it.pid == pid) {
                payloads.push((next.payload, next.received));
            }
            ingest(&services, &channel, payloads, pid).await;
        }
    }
}

async fn ingest(services: &Services, channel: &str, payloads: Vec<(String, Instant)>, pid: u32) {
    let metrics = &services.metrics;
    for (payload, _) in &payloads {
        metrics.notification_bytes.observe(payload.len() as f64);
    }
    let count = |source, outcome: Outcome, count: usize| {
        tracing::trace!(channel, outcome = outcome.kind(), count, "notifications");
        metrics.notifications.with_label_values(&[source, outcome.kind()]).inc_by(count as u64);
    };
    if channel == REVOCATIONS_CHANNEL {
        services.revocations_changed.notify_one();
        return count("revocations", Outcome::Noted, payloads.len());
    }
    if channel == STATS_CHANNEL {
        for (payload, _) in payloads {
            let outcome = match check(services, payload) {
                Ok(stats) => {
                    if let Some(eid) = named_event(&stats) {
                        services.recovery.healing.name_event(&eid);
                        if !has_viewers(services, &eid) {
                            metrics.published_without_viewer.inc();
                        }
                    }
                    Outcome::Noted
                }
                Err(outcome) => outcome,
            };
            count("stats", outcome, 1);
        }
        return;
    }
    let Some(source) = services.listens.source(channel) else {
        return count("other", Outcome::UnknownChannel, payloads.len());
    };
    let (mut broadcasts, mut oldest) = (Vec::with_capacity(payloads.len()), None);
    for (payload, received) in payloads {
        match check(services, payload) {
            Ok(payload) => {
                let committed = committed(metrics, payload.as_str(), received);
                oldest = [oldest, committed].into_iter().flatten().min();
                broadcasts.push(Broadcast::User {
                    message: UserBroadcast {
                        user_event: source.user_event.clone(),
                        payload: UserPayload::Json(payload),
                    },
                    metadata: None,
                });
            }
            Err(outcome) => count("event", outcome, 1),
        }
    }
    if let Some(event) = &source.event {
        let offered = broadcasts.len();
        let notified = Notified { pid, committed: oldest };
        broadcasts = services.feeds.offer(event, broadcasts, Some(notified));
        count("event", Outcome::Offered, offered - broadcasts.len());
        services.recovery.healing.name_event(event.eid());
    }
    if broadcasts.is_empty() {
        return;
    }
    let committed = oldest.map(|at| Committed { at, departure: Departure::AtOnce });
    let (topics, to) = (&source.topics, To::All);
    let source = BroadcastSource::Database;
    let fan_out = FanOut { source, topics, broadcasts: &broadcasts, committed, to };
    let fanned_out = services.hub.fan_out(fan_out).await;
    let outcome = if fanned_out.deliveries > 0 { Outcome::Delivered } else { Outcome::NoViewer };
    count("event", outcome, broadcasts.len());
}

/// When a payload was committed, by our clock, if its stamp tells; measures what it took to come.
fn committed(metrics: &Metrics, payload: &str, received: Instant) -> Option<Instant> {
    let received_at = unix_seconds() - received.elapsed().as_secs_f64();
    let age = clock_offset::age(payload, received_at, metrics.database_clock_offset.get())?;
    metrics.commit_to_received.observe(age.as_secs_f64());
    received.checked_sub(age)
}

/// Whether somebody here has joined the event, under any spelling of any rule that merges.
fn has_viewers(services: &Services, eid: &str) -> bool {
    services.rules().merged(eid).any(|(rule, captures)| {
        rule.spellings(&captures).any(|topic| services.hub.subscriber_count(&topic) > 0)
    })
}

/// `{"event_eid":"AB3028",…}`
fn named_event(stats: &Json) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Stats {
        event_eid: String,
    }
    serde_json::from_str::<Stats>(stats.as_str()).ok().map(|stats| stats.event_eid)
}

fn check(services: &Services, payload: String) -> Result<Json, Outcome> {
    if payload.len() > services.limits.settings().payload_bytes_max {
        return Err(Outcome::Oversized);
    }
    let json = Json::parse(payload.into()).map_err(|_not_json| Outcome::Malformed)?;
    if json.is_object() { Ok(json) } else { Err(Outcome::NotObject) }
}
