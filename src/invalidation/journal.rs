//! The records of one feed for operators and metrics: the last messages to all its subscribers, what
//! single clients were told, and what has been counted.
//!
//! What single clients are told is counted by minute and reason, so that a thousand joins are a few
//! lines and push no message out of the log.
//!
//! Invariants: the log keeps the last [`LOG_MAX`] messages, of each [`LISTED_MAX`] endpoints and
//! [`SOURCES_MAX`] sources at most; the last [`COUNTS_MAX`] counts are kept.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    payload::{Endpoints, Invalidation},
    reason::{CatchUpCause, Coverage, SendReason},
};

/// Most messages in the log.
const LOG_MAX: usize = 200;
/// Most sources of one message.
pub(super) const SOURCES_MAX: usize = 50;
/// Most endpoints of one message.
const LISTED_MAX: usize = 100;
/// Most characters of a source's type.
const KIND_CHARS_MAX: usize = 100;
/// Most counts: three hours in which a client is told something for one reason each minute.
const COUNTS_MAX: usize = 200;
/// The time that one count covers.
pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// The records of one feed.
#[derive(Debug, Default)]
pub(super) struct Journal {
    log: VecDeque<Arc<Delivery>>,
    pub(super) notices: Notices,
    pub(super) last_notification: Option<SystemTime>,
    pub(super) last_delivery: Option<SystemTime>,
    /// Invalidations that left as part of another, since the feed was created.
    pub(super) merged: u64,
    tally: Tally,
}

/// A message to all subscribers of a feed.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    pub(crate) at: SystemTime,
    pub(crate) reason: SendReason,
    /// The cause of the gap, if it follows one.
    pub(crate) cause: Option<CatchUpCause>,
    /// All endpoints; in the log the first [`LISTED_MAX`] of them.
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) endpoint_count: usize,
    /// How many invalidations it stands for; the first of them are listed in `sources`.
    pub(crate) merged: usize,
    pub(crate) sources: Vec<Contribution>,
    /// How many outboxes took it.
    pub(crate) deliveries: usize,
    /// How many clients were sent it once more, with the endpoints of their catch-up.
    pub(crate) repeats: usize,
}

/// One invalidation that became part of a message.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Contribution {
    /// Its row of the history.
    pub(crate) id: Option<i64>,
    #[serde(rename = "type")]
    pub(crate) kind: Option<Box<str>>,
}

/// What a single client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    /// What it may have missed.
    CatchUp(CatchUpCause, Coverage),
    /// To join again.
    Heal,
}

/// How many clients were told the same within a minute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoticeCount {
    /// When the minute began.
    pub(crate) minute: SystemTime,
    pub(crate) notice: Notice,
    pub(crate) clients: u64,
}

/// What came for a feed, and what became of it, since the tally was last taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Invalidations that came, from any source.
    pub(crate) notifications: u64,
    /// Frames of messages to the whole feed.
    pub(crate) deliveries: u64,
    /// Invalidations that left as part of another.
    pub(crate) merged: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.notifications += other.notifications;
        self.deliveries += other.deliveries;
        self.merged += other.merged;
    }
}

/// Whether the notifications of a feed name their rows of the history.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Heard {
    /// None has come.
    #[default]
    Nothing,
    /// All do.
    OnlyWithId,
    /// Not all do.
    SomeWithoutId,
}

/// A feed as operators see it.
#[derive(Debug)]
pub(crate) struct Summary {
    pub(crate) last_notification: Option<SystemTime>,
    pub(crate) last_delivery: Option<SystemTime>,
    pub(crate) merged: u64,
    /// How many messages wait for the window.
    pub(crate) pending: usize,
    pub(crate) muted_for: Option<Duration>,
    pub(crate) heard: Heard,
    /// Whether the database has an artwork of the event, or a message of the last day.
    pub(crate) is_known: bool,
    /// How many endpoints are known.
    pub(crate) endpoints: usize,
    /// How many single clients were caught up.
    pub(crate) catch_ups: u64,
    /// How many single clients were told to join again.
    pub(crate) heals: u64,
}

impl Journal {
    /// Records that an invalidation came.
    pub(super) fn notified(&mut self) {
        self.last_notification = Some(SystemTime::now());
        self.tally.notifications += 1;
    }

    /// Records how many invalidations left in one message.
    pub(super) fn merged(&mut self, messages: usize) {
        let merged = (messages.max(1) - 1) as u64;
        self.merged += merged;
        self.tally.merged += merged;
    }

    /// Records a message that was sent to the whole feed.
    pub(super) fn delivered(&mut self, mut delivery: Delivery) {
        if delivery.endpoint_count > LISTED_MAX {
            let listed = delivery.endpoints.iter().take(LISTED_MAX).cloned();
            delivery.endpoints = Arc::new(listed.collect());
        }
        self.tally.deliveries += delivery.deliveries as u64;
        if delivery.deliveries > 0 {
            self.last_delivery = Some(delivery.at);
        }
        if self.log.len() >= LOG_MAX {
            self.log.pop_front();
        }
        self.log.push_back(Arc::new(delivery));
    }

    /// Records that a single client was told something.
    pub(super) fn told(&mut self, notice: Notice) {
        self.notices.add(notice, SystemTime::now());
    }

    /// Returns what was counted since the last call.
    pub(super) fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Returns the messages of the log, the newest first.
    pub(super) fn log(&self) -> Vec<Arc<Delivery>> {
        self.log.iter().rev().map(Arc::clone).collect()
    }
}

impl Contribution {
    /// Records an invalidation as a source.
    pub(super) fn of(invalidation: &Invalidation) -> Self {
        let kind = invalidation.kind.as_deref();
        let kind = kind.map(|kind| kind.chars().take(KIND_CHARS_MAX).collect::<String>().into());
        Self { id: invalidation.id, kind }
    }
}

/// What single clients were told, by minute.
#[derive(Debug, Default)]
pub(super) struct Notices {
    counts: VecDeque<NoticeCount>,
    /// Catch-ups since the feed was created.
    pub(super) catch_ups: u64,
    /// Heals since the feed was created.
    pub(super) heals: u64,
}

impl Notices {
    /// Counts a client that was told this at `now`.
    fn add(&mut self, notice: Notice, now: SystemTime) {
        match notice {
            Notice::CatchUp(..) => self.catch_ups += 1,
            Notice::Heal => self.heals += 1,
        }
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let minute = UNIX_EPOCH + Duration::from_secs(seconds - seconds % MINUTE.as_secs());
        let mut of_this_minute =
            self.counts.iter_mut().rev().take_while(|count| count.minute == minute);
        if let Some(count) = of_this_minute.find(|count| count.notice == notice) {
            count.clients += 1;
            return;
        }
        if self.counts.len() >= COUNTS_MAX {
            self.counts.pop_front();
        }
        self.counts.push_back(NoticeCount { minute, notice, clients: 1 });
    }

    /// Returns the counts, the newest first.
    pub(super) fn latest(&self) -> Vec<NoticeCount> {
        self.counts.iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invalidation::tests::feed;

    const EXACT: Notice = Notice::CatchUp(CatchUpCause::Fresh, Coverage::Exact);
    const COMPLETE: Notice = Notice::CatchUp(CatchUpCause::Fresh, Coverage::Complete);

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn clients_of_one_minute_and_reason_are_one_count() {
        let mut counts = Notices::default();
        for (notice, seconds) in
            [(EXACT, 120), (COMPLETE, 121), (Notice::Heal, 122), (EXACT, 179), (EXACT, 180)]
        {
            counts.add(notice, at(seconds));
        }
        let count = |minute, notice, clients| NoticeCount { minute: at(minute), notice, clients };
        let expected = [
            count(180, EXACT, 1),
            count(120, Notice::Heal, 1),
            count(120, COMPLETE, 1),
            count(120, EXACT, 2),
        ];
        assert_eq!(counts.latest(), expected);
        assert_eq!((counts.catch_ups, counts.heals), (4, 1));
    }

    #[test]
    fn the_latest_counts_are_kept() {
        let mut counts = Notices::default();
        for minute in 0..=COUNTS_MAX as u64 {
            counts.add(Notice::Heal, at(minute * 60));
        }
        let latest = counts.latest();
        assert_eq!(latest.len(), COUNTS_MAX);
        assert_eq!(latest[COUNTS_MAX - 1].minute, at(60));
        assert_eq!(counts.heals, COUNTS_MAX as u64 + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_of_messages_is_bounded() {
        let feed = feed();
        for number in 0..LOG_MAX + 5 {
            for _ in 0..SOURCES_MAX + 5 {
                feed.take(&format!(r#"{{"type":"t","id":{number},"endpoints":["/a"]}}"#), 1);
            }
            feed.delivered(feed.sends().await.outgoing.delivery);
        }
        let log = feed.log();
        assert_eq!(log.len(), LOG_MAX);
        assert_eq!((log[0].merged, log[0].sources.len()), (SOURCES_MAX + 5, SOURCES_MAX));
        let newest = i64::try_from(LOG_MAX + 4).unwrap();
        assert_eq!(log[0].sources[0], Contribution { id: Some(newest), kind: Some("t".into()) });
    }
}
