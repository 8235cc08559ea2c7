//! What single clients of an event were told, counted by minute and reason: of a thousand that join
//! there are a few lines, and no message to the whole event is forgotten for them.
//!
//! Invariant: at most [`COUNTS_MAX`] counts are kept, the latest.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    payload::Endpoints,
    reason::{CatchUpCause, Coverage, SendReason},
};

/// Three hours with a client for one reason in each minute.
const COUNTS_MAX: usize = 200;
/// Most messages that are told of afterwards; of each so many sources and endpoints, and of a
/// source's type so many characters.
pub(super) const LOG_MAX: usize = 200;
pub(super) const SOURCES_MAX: usize = 50;
pub(super) const LISTED_MAX: usize = 100;
pub(super) const KIND_CHARS_MAX: usize = 100;
/// What a count covers.
pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// What a single client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    CatchUp(CatchUpCause, Coverage),
    /// To join again.
    Heal,
}

/// How many clients were told it within a minute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoticeCount {
    /// When the minute began.
    pub(crate) minute: SystemTime,
    pub(crate) told: Notice,
    pub(crate) clients: u64,
}

/// The counts of one event, and how many there ever were.
#[derive(Debug, Default)]
pub(super) struct Notices {
    counts: VecDeque<NoticeCount>,
    pub(super) catch_ups: u64,
    pub(super) heals: u64,
}

impl Notices {
    /// Counts a client that was told this at `now`.
    pub(super) fn add(&mut self, told: Notice, now: SystemTime) {
        match told {
            Notice::CatchUp(..) => self.catch_ups += 1,
            Notice::Heal => self.heals += 1,
        }
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let minute = UNIX_EPOCH + Duration::from_secs(seconds - seconds % MINUTE.as_secs());
        let mut of_this_minute = self.counts.iter_mut().rev().take_while(|it| it.minute == minute);
        if let Some(count) = of_this_minute.find(|it| it.told == told) {
            count.clients += 1;
            return;
        }
        if self.counts.len() >= COUNTS_MAX {
            self.counts.pop_front();
        }
        self.counts.push_back(NoticeCount { minute, told, clients: 1 });
    }

    /// The latest first.
    pub(super) fn latest(&self) -> Vec<NoticeCount> {
        self.counts.iter().rev().cloned().collect()
    }
}

/// What has come for an event and what has become of it, since somebody has last taken note.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Invalidations that have come, from wherever.
    pub(crate) notifications: u64,
    /// Frames of what the whole event was sent.
    pub(crate) deliveries: u64,
    /// Invalidations that have left as part of another.
    pub(crate) merged: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.notifications += other.notifications;
        self.deliveries += other.deliveries;
        self.merged += other.merged;
    }
}

/// Whether the event's notifications name their rows of the history.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Heard {
    #[default]
    Nothing,
    OnlyWithId,
    SomeWithoutId,
}

/// One message that became part of another.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Source {
    /// Its row of the history.
    pub(crate) id: Option<i64>,
    #[serde(rename = "type")]
    pub(crate) kind: Option<Box<str>>,
}

/// What was sent, to be told of afterwards.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    pub(crate) at: SystemTime,
    pub(crate) why: SendReason,
    pub(crate) cause: Option<CatchUpCause>,
    /// Once it is sent, the first of them.
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) endpoint_count: usize,
    /// How many messages it stands for, the first of which are listed.
    pub(crate) merged: usize,
    pub(crate) sources: Vec<Source>,
    pub(crate) deliveries: usize,
    /// How many clients got it once more, with what they were just caught up with.
    pub(crate) repeats: usize,
}

/// An event as operators see it.
#[derive(Debug)]
pub(crate) struct Summary {
    pub(crate) last_notification: Option<SystemTime>,
    pub(crate) last_delivery: Option<SystemTime>,
    pub(crate) merged: u64,
    pub(crate) pending: usize,
    pub(crate) muted_for: Option<Duration>,
    pub(crate) heard: Heard,
    /// The database knows it: an artwork of it, or a message within a day.
    pub(crate) is_known: bool,
    /// How many are known.
    pub(crate) endpoints: usize,
    /// Of single clients.
    pub(crate) catch_ups: u64,
    pub(crate) heals: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXACT: Notice = Notice::CatchUp(CatchUpCause::Fresh, Coverage::Exact);
    const COMPLETE: Notice = Notice::CatchUp(CatchUpCause::Fresh, Coverage::Complete);

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn clients_of_one_minute_and_reason_are_one_count() {
        let mut counts = Notices::default();
        for (told, seconds) in
            [(EXACT, 120), (COMPLETE, 121), (Notice::Heal, 122), (EXACT, 179), (EXACT, 180)]
        {
            counts.add(told, at(seconds));
        }
        let count = |minute, told, clients| NoticeCount { minute: at(minute), told, clients };
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
}
