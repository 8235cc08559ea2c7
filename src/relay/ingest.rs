//! Notification → broadcast: what Postgres sends becomes what clients get, at once or, of a merged
//! rule, with the event's next message.
//!
//! Invariants: notifications are handled one after the other, in the order in which the session
//! received them, which is the order of their commits; a payload passes byte for byte.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::Instant};

use super::{
    clock_offset,
    listens::Listens,
    metrics::{ChannelKind, Handled, Metrics, Outcome},
    status::LinkStatus,
};
use crate::{
    access::Access,
    auth::Authenticator,
    clock::unix_seconds,
    db::revocations::REVOCATIONS_CHANNEL,
    hub::Hub,
    invalidation::Notified,
    protocol::{
        message::{Json, UserBroadcast, UserPayload},
        serializer::Broadcast,
    },
    publish::{Publisher, Source},
    recovery::Recovery,
    telemetry::metrics::set_now,
};

/// The channel of the database's monitoring notifications, which name every event.
pub(crate) const STATS_CHANNEL: &str = "global_cache_stats";

/// Notifications that may wait between the session and the fan-out; beyond, the session waits,
/// and what the server has sent waits in its connection.
pub(super) const BACKLOG_MAX: usize = 1024;

/// Most notifications that are handled together.
const BATCH_MAX: usize = 64;

/// One notification as the session received it.
#[derive(Debug)]
pub(super) struct Notification {
    pub(super) channel: Box<str>,
    pub(super) payload: String,
    /// The process id of the session that notified; what it sent in one transaction arrives
    /// together.
    pub(super) pid: u32,
    /// When it was read from the connection.
    pub(super) received: Instant,
}

/// Handles notifications.
#[derive(Debug)]
pub(super) struct Ingest {
    pub(super) listens: Arc<Listens>,
    pub(super) access: Arc<Access>,
    pub(super) hub: Arc<Hub>,
    pub(super) recovery: Arc<Recovery>,
    pub(super) publisher: Arc<Publisher>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) link: Arc<LinkStatus>,
    pub(super) metrics: Arc<Metrics>,
    /// Largest payload that is relayed.
    pub(super) payload_bytes_max: usize,
}

impl Ingest {
    /// Publishes notifications until the session's end of the queue is dropped.
    pub(super) async fn run(self, mut queue: mpsc::Receiver<Notification>) {
        let mut batch = Vec::new();
        while queue.recv_many(&mut batch, BATCH_MAX).await > 0 {
            set_now(&self.metrics.last_notification);
            // Neighbours of one channel and session leave together; the order of all stays.
            let mut rest = batch.drain(..).peekable();
            while let Some(first) = rest.next() {
                let Notification { channel, pid, payload, received } = first;
                let mut payloads = vec![(payload, received)];
                while let Some(next) =
                    rest.next_if(|next| next.channel == channel && next.pid == pid)
                {
                    payloads.push((next.payload, next.received));
                }
                self.handle(&channel, payloads, pid).await;
            }
        }
    }

    async fn handle(&self, channel: &str, payloads: Vec<(String, Instant)>, pid: u32) {
        for (payload, _) in &payloads {
            self.metrics.notification_bytes.observe(payload.len() as f64);
        }
        match channel {
            REVOCATIONS_CHANNEL => {
                self.auth.revocations.mark_stale();
                self.count(ChannelKind::Revocations, Outcome::Noted, payloads.len());
            }
            STATS_CHANNEL => self.note_stats(payloads),
            _ => self.relay(channel, payloads, pid).await,
        }
    }

    /// Takes monitoring notifications, each of which names an event that has changed.
    fn note_stats(&self, payloads: Vec<(String, Instant)>) {
        for (payload, _) in payloads {
            let outcome = match self.check(payload) {
                Ok(stats) => {
                    if let Some(eid) = named_event(&stats) {
                        self.recovery.healing.name_event(&eid);
                        if !self.has_viewers(&eid) {
                            self.metrics.published_without_viewer.inc();
                        }
                    }
                    Outcome::Noted
                }
                Err(outcome) => outcome,
            };
            self.count(ChannelKind::Stats, outcome, 1);
        }
    }

    /// Publishes the notifications of an event.
    async fn relay(&self, channel: &str, payloads: Vec<(String, Instant)>, pid: u32) {
        let Some(relayed) = self.listens.notified(channel) else {
            return self.count(ChannelKind::Other, Outcome::UnknownChannel, payloads.len());
        };
        let (mut broadcasts, mut oldest) = (Vec::with_capacity(payloads.len()), None);
        for (payload, received) in payloads {
            match self.check(payload) {
                Ok(payload) => {
                    let committed = self.committed(payload.as_str(), received);
                    oldest = [oldest, committed].into_iter().flatten().min();
                    let user_event = relayed.user_event.clone();
                    let message = UserBroadcast { user_event, payload: UserPayload::Json(payload) };
                    broadcasts.push(Broadcast::User { message, metadata: None });
                }
                Err(outcome) => self.count(ChannelKind::Event, outcome, 1),
            }
        }
        let source = Source::Database(Notified { pid, committed: oldest });
        let published = self.publisher.publish(&relayed.target, source, broadcasts).await;
        self.count(ChannelKind::Event, Outcome::Offered, published.offered);
        if let Some(feed) = self.publisher.feed(&relayed.target) {
            // After the feed has recorded the change, so that who rejoins is told of it.
            self.recovery.healing.news_of(feed.eid());
        }
        let is_heard = published.fanned_out.deliveries > 0;
        let outcome = if is_heard { Outcome::Delivered } else { Outcome::NoViewer };
        self.count(ChannelKind::Event, outcome, published.sent);
    }

    fn count(&self, channel: ChannelKind, outcome: Outcome, count: usize) {
        if count > 0 {
            tracing::trace!(outcome = outcome.label(), count, "notifications");
            self.metrics.notifications.of(Handled(channel, outcome)).inc_by(count as u64);
        }
    }

    /// Returns when a payload was committed, by the gateway's clock, if its stamp tells; measures
    /// what it took to arrive.
    fn committed(&self, payload: &str, received: Instant) -> Option<Instant> {
        let received_at = unix_seconds() - received.elapsed().as_secs_f64();
        let age: Duration = clock_offset::age(payload, received_at, self.link.clock_offset())?;
        self.metrics.commit_to_received.observe(age.as_secs_f64());
        received.checked_sub(age)
    }

    /// Whether somebody here has joined the event, under any spelling of any rule that merges.
    fn has_viewers(&self, eid: &str) -> bool {
        self.access.rules().merged(eid).any(|(rule, captures)| {
            rule.spellings(&captures).any(|topic| self.hub.subscriber_count(&topic) > 0)
        })
    }

    /// Parses a payload, which must be a JSON object.
    fn check(&self, payload: String) -> Result<Json, Outcome> {
        if payload.len() > self.payload_bytes_max {
            return Err(Outcome::Oversized);
        }
        let json = Json::parse(payload.into()).map_err(|_not_json| Outcome::Malformed)?;
        if json.is_object() { Ok(json) } else { Err(Outcome::NotObject) }
    }
}

/// Returns the event that `{"event_eid":"AB3028",…}` names.
fn named_event(stats: &Json) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Stats {
        event_eid: String,
    }
    serde_json::from_str::<Stats>(stats.as_str()).ok().map(|stats| stats.event_eid)
}
