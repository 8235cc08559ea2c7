//! The one task that sends what is due, in the order in which windows open.
//!
//! Invariants: no lock is held while frames are pushed; a message has been pushed to all
//! subscribers before it is repeated to the clients that were just caught up.

use std::{collections::BinaryHeap, slice, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    catch_up::Repeat,
    feed::Feed,
    metrics::Metrics,
    outgoing::{Outgoing, ToSend},
    reason::SendReason,
};
use crate::{
    hub::{
        BroadcastSource, FanOut, FannedOut, Hub, To, TooSlow,
        outbox::{Outbox, Replaceable, Since},
    },
    protocol::{
        serializer::Broadcast,
        topic::{Privacy, TOPIC_PREFIX, TopicKey},
    },
};

/// How long the task sleeps while nothing waits.
const IDLE: Duration = Duration::from_secs(3600);

/// When each feed has something to send.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// A feed's own time counts: one that has moved is noticed when its timer is due.
    heap: Mutex<BinaryHeap<Timer>>,
    changed: Notify,
}

#[derive(Debug)]
struct Timer {
    at: Instant,
    feed: Arc<Feed>,
}

impl Timers {
    /// Wakes the task when the feed has something to send.
    pub(super) fn add(&self, feed: &Arc<Feed>) {
        let Some(at) = feed.next() else { return };
        let is_first = {
            let mut heap = self.heap.lock();
            let is_first = heap.peek().is_none_or(|next| at < next.at);
            heap.push(Timer { at, feed: Arc::clone(feed) });
            is_first
        };
        if is_first {
            self.changed.notify_one();
        }
    }

    /// Removes every timer of the feed.
    pub(super) fn remove(&self, feed: &Arc<Feed>) {
        self.heap.lock().retain(|timer| !Arc::ptr_eq(&timer.feed, feed));
    }

    fn next(&self) -> Option<Instant> {
        self.heap.lock().peek().map(|timer| timer.at)
    }

    fn take_due(&self) -> Option<Arc<Feed>> {
        let mut heap = self.heap.lock();
        let is_due = heap.peek()?.at <= Instant::now();
        is_due.then(|| heap.pop().map(|timer| timer.feed)).flatten()
    }
}

/// Sends what is due.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    pub(super) timers: Arc<Timers>,
    pub(super) hub: Arc<Hub>,
    pub(super) metrics: Arc<Metrics>,
}

impl Sender {
    /// Sends what is due until the server stops.
    pub(crate) async fn run(self, stop: CancellationToken) {
        loop {
            let next = self.timers.next().unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.timers.changed.notified() => {}
                () = stop.cancelled() => return,
            }
            while let Some(feed) = self.timers.take_due() {
                match feed.due(false) {
                    ToSend::Nothing => {}
                    ToSend::Later => self.timers.add(&feed),
                    ToSend::Send(outgoing) => self.send(&feed, *outgoing).await,
                }
            }
        }
    }

    /// Sends one message to all subscribers of the feed, then its repeats, and records it.
    pub(super) async fn send(&self, feed: &Feed, outgoing: Outgoing) {
        let fanned_out = self.fan_out(feed, &outgoing).await;
        let mut repeats = 0;
        let repeated = self.metrics.sent.of(SendReason::Repeat);
        for Repeat { outbox, sub_topic, broadcast, since } in feed.repeats(&outgoing) {
            let queued = self.push(&outbox, &sub_topic, &broadcast, since);
            repeated.inc_by(queued as u64);
            repeats += queued;
        }
        let mut delivery = outgoing.delivery;
        self.metrics.sent.of(delivery.reason).inc();
        if let Some(waited) = outgoing.waited {
            self.metrics.window_wait.observe(waited.as_secs_f64());
        }
        self.metrics.merged.inc_by(delivery.merged.saturating_sub(1) as u64);
        (delivery.deliveries, delivery.repeats) = (fanned_out.deliveries, repeats);
        feed.delivered(delivery);
    }

    async fn fan_out(&self, feed: &Feed, outgoing: &Outgoing) -> FannedOut {
        self.hub
            .fan_out(FanOut {
                source: BroadcastSource::Merged,
                first: None,
                spellings: feed.topics(),
                broadcasts: slice::from_ref(&outgoing.broadcast),
                committed: outgoing.committed,
                to: To::All,
                too_slow: outgoing.since.map_or(TooSlow::LosesConnection, TooSlow::IsCaughtUp),
            })
            .await
    }

    /// Pushes a message to one client, and returns how many frames its outbox took: a slow client
    /// is told the same later, and a full outbox closes its own connection.
    pub(super) fn push(
        &self,
        outbox: &Outbox,
        sub_topic: &Arc<str>,
        broadcast: &Broadcast,
        since: Option<Since>,
    ) -> usize {
        let topic = format!("{TOPIC_PREFIX}{sub_topic}");
        let Some(frame) = outbox.serializer().encode_broadcast(&topic, broadcast) else {
            return 0;
        };
        // The topic of a rule is public, however it is joined.
        let key = TopicKey { sub_topic: Arc::clone(sub_topic), privacy: Privacy::Public };
        let is_queued = match since {
            Some(since) => {
                let replaceable = Replaceable { topic: self.hub.topic_id(&key), since };
                outbox.push_replaceable(frame, replaceable)
            }
            None => outbox.push(frame).is_ok(),
        };
        usize::from(is_queued)
    }
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    /// The earliest timer is the greatest: the heap returns the greatest first.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}
