//! What single clients of an event were told, counted by minute and reason: of a thousand that join
//! there are a few lines, and no message to the whole event is forgotten for them.
//!
//! Invariant: at most [`COUNTS_MAX`] counts are kept, the latest.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::reason::{CatchUpCause, Coverage};

/// Three hours with a client for one reason in each minute.
const COUNTS_MAX: usize = 200;
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
