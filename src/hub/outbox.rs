//! The frames waiting to be written to one client.
//!
//! A frame that one invalidation can take the place of is [`Replaceable`]. When a client falls too
//! far behind, such frames are dropped and their topics noted; once it has read the rest it is told
//! of each such topic what has changed meanwhile (**conflation**). Only what cannot be replaced ends
//! the connection.
//!
//! Invariants: `bytes` is the sum of the queued frames' lengths; a backlog of two frames or more
//! is at most its bound; nothing that is replaceable is dropped without a note of its topic, and
//! while that note stands nothing of the topic is queued; once ended, an outbox refuses everything,
//! and it has overflowed only if it is empty.

use std::{
    future::poll_fn,
    mem,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::protocol::serializer::Serializer;

/// A byte-bounded queue of encoded frames: many tasks push, one connection drains.
#[derive(Debug)]
pub struct Outbox {
    state: Mutex<State>,
    backlogs: Arc<Backlogs>,
    serializer: Serializer,
}

/// The bound of all outboxes' backlogs, and how large one has been of late.
#[derive(Debug)]
pub struct Backlogs {
    /// Most bytes that may wait behind another frame. A drained batch is no longer counted: a
    /// connection holds at most twice so many plus the largest frame.
    bytes_max: usize,
    /// Since the last turn, and between that and the one before.
    highest: [AtomicUsize; 2],
}

impl Backlogs {
    /// Backlogs of at most so many bytes each.
    #[must_use]
    pub fn of_at_most(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, highest: Default::default() })
    }

    /// The largest of one outbox since the turn before the last, in bytes.
    #[must_use]
    pub fn highest(&self) -> usize {
        self.highest.iter().map(|it| it.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Begins to forget. Whoever looks in between sees the same as anybody else.
    pub fn turn(&self) {
        let [now, before] = &self.highest;
        before.store(now.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    fn note(&self, bytes: usize) {
        let [now, _] = &self.highest;
        // Nearly always it was higher; a line that nobody writes costs nobody anything.
        if bytes > now.load(Ordering::Relaxed) {
            now.fetch_max(bytes, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    frames: Vec<Queued>,
    bytes: usize,
    /// The oldest of what waits, or was replaced.
    committed: Option<Committed>,
    /// The topics whose frames were dropped, each once.
    behind: Vec<Replaceable>,
    ended: Option<Ended>,
    /// The connection is to look at what it has decided.
    nudged: bool,
    waker: Option<Waker>,
}

/// A frame that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Queued {
    /// To be written as it is.
    pub frame: Frame,
    /// What can take its place, if anything can.
    pub replaceable: Option<Replaceable>,
}

/// What can take the place of a frame: an invalidation of its topic, of all that has changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replaceable {
    /// The frame's topic.
    pub topic: TopicId,
    /// Not later than the first change that the frame tells of.
    pub since: Since,
}

/// A topic, in a few bytes. Two topics may have the same one: then both count as behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicId(NonZeroU32);

impl TopicId {
    /// That of the topic with this hash.
    #[must_use]
    pub fn of_hash(hash: u64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        Self(NonZeroU32::MIN | hash as u32)
    }
}

/// A moment in a few bytes: whole seconds since the server started, rounded down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Since(u32);

impl Since {
    /// Before everything.
    pub const EVER: Self = Self(0);

    /// Not later than `at`, by the second.
    #[must_use]
    pub fn at(at: Instant, started: Instant) -> Self {
        let seconds = at.saturating_duration_since(started).as_secs();
        Self(u32::try_from(seconds).unwrap_or(u32::MAX))
    }

    /// The moment, unless it is [`Self::EVER`].
    #[must_use]
    pub fn moment(self, started: Instant) -> Option<Instant> {
        let since_start = Duration::from_secs(u64::from(self.0));
        (self > Self::EVER).then(|| started + since_start)
    }
}

/// What an outbox has for its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Frames, the oldest of which was committed then, if that is known.
    Frames(Option<Committed>),
    /// All frames have been drained, and those of this topic were dropped: the client is to be told
    /// what has changed.
    Behind(Replaceable),
    /// The connection is to look at what it has decided.
    Nudged,
}

/// When the database committed what is sent, by this machine's clock. The older one is the lesser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Committed {
    /// The moment.
    pub at: Instant,
    /// What has become of it since.
    pub departure: Departure,
}

/// Whether a message had to wait for its event's window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Departure {
    /// It left as soon as it could.
    AtOnce,
    /// It left with others, or later than it could.
    Merged,
}

/// Why an outbox takes nothing more; its connection must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The consumer fell further behind than it may.
    SlowConsumer,
    /// The server drains.
    Draining,
}

impl Outbox {
    /// An empty outbox of a client that reads `serializer`.
    #[must_use]
    pub fn new(serializer: Serializer, backlogs: &Arc<Backlogs>) -> Self {
        Self { state: Mutex::default(), backlogs: Arc::clone(backlogs), serializer }
    }

    /// What the client reads.
    #[must_use]
    pub fn serializer(&self) -> Serializer {
        self.serializer
    }

    /// Queues `frame`, which nothing can take the place of, and wakes the connection. Never waits.
    ///
    /// # Errors
    /// [`Ended`] when the backlog would exceed its bound; an empty outbox takes any frame. The
    /// queue is then emptied at once, so that a stuck peer costs no memory while its connection
    /// closes.
    pub fn push(&self, frame: Frame) -> Result<(), Ended> {
        self.push_all(std::iter::once(frame), None, None).map(drop)
    }

    /// Queues `frames` together, so that they can leave together, with the moment at which the
    /// first of them was committed if that is known. Gives how many were queued: those that are
    /// replaceable may be dropped.
    ///
    /// # Errors
    /// As [`Self::push`], as soon as one of them does not fit.
    pub fn push_all(
        &self,
        frames: impl Iterator<Item = Frame>,
        committed: Option<Committed>,
        replaceable: Option<Replaceable>,
    ) -> Result<usize, Ended> {
        let (waker, pushed) = {
            let mut state = self.state.lock();
            let mut count = 0;
            for frame in frames {
                if state.ended.is_some() {
                    break;
                }
                let queued = Queued { frame, replaceable };
                count += usize::from(state.take(queued, self.backlogs.bytes_max));
            }
            if count > 0 && state.ended.is_none() {
                state.committed = [state.committed, committed].into_iter().flatten().min();
            }
            self.backlogs.note(state.bytes);
            (state.waker.take(), state.ended.map_or(Ok(count), Err))
        };
        // Outside the lock: waking may run the scheduler, which must not find it held.
        if let Some(waker) = waker {
            waker.wake();
        }
        pushed
    }

    /// Why the outbox takes nothing more, if it has ended.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.state.lock().ended
    }

    /// Ends the outbox: its connection writes what is queued and closes for this reason, unless it
    /// already does for another.
    pub fn end(&self, ended: Ended) {
        let waker = {
            let mut state = self.state.lock();
            state.ended.get_or_insert(ended);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Has the connection look at what it has decided, once it has written what is queued.
    pub fn nudge(&self) {
        let waker = {
            let mut state = self.state.lock();
            state.nudged = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether something was dropped that the client has not been told of.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        let state = self.state.lock();
        !state.behind.is_empty() || state.ended == Some(Ended::SlowConsumer)
    }

    /// Waits for frames, then swaps all of them into `batch`, which must be empty; it stays empty
    /// where there is something else to do.
    ///
    /// # Errors
    /// [`Ended`] once the outbox has ended.
    ///
    /// # Cancel safety
    /// Frames leave the queue only when this returns.
    pub async fn drain(&self, batch: &mut Vec<Queued>) -> Result<Drained, Ended> {
        debug_assert!(batch.is_empty());
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if !state.frames.is_empty() {
                mem::swap(&mut state.frames, batch);
                state.bytes = 0;
                return Poll::Ready(Ok(Drained::Frames(state.committed.take())));
            }
            if let Some(ended) = state.ended {
                return Poll::Ready(Err(ended));
            }
            // One at a time: what is said of it is written before the next.
            if !state.behind.is_empty() {
                return Poll::Ready(Ok(Drained::Behind(state.behind.remove(0))));
            }
            if mem::take(&mut state.nudged) {
                return Poll::Ready(Ok(Drained::Nudged));
            }
            state.wake(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Waits until there is a frame that nothing can take the place of, or the outbox has ended.
    /// Not while somebody [drains](Self::drain) it.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn holds_up(&self) {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            let is_held_up = state.frames.iter().any(|it| it.replaceable.is_none());
            if is_held_up || state.ended.is_some() {
                return Poll::Ready(());
            }
            state.wake(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

impl State {
    /// Queues a frame, or notes that its client falls behind. Gives whether it is queued.
    fn take(&mut self, queued: Queued, bytes_max: usize) -> bool {
        let length = queued.frame.len();
        let fits = |it: &Self| it.frames.is_empty() || it.bytes + length <= bytes_max;
        if !fits(self) {
            self.conflate();
        }
        match queued.replaceable {
            Some(it) if self.is_behind(it.topic) || !fits(self) => {
                self.fall_behind(it);
                false
            }
            None if !fits(self) => {
                *self = Self {
                    ended: Some(Ended::SlowConsumer),
                    waker: self.waker.take(),
                    ..Self::default()
                };
                false
            }
            Some(_) | None => {
                self.bytes += length;
                self.frames.push(queued);
                true
            }
        }
    }

    /// Drops whatever can be replaced.
    fn conflate(&mut self) {
        let mut frames = mem::take(&mut self.frames);
        frames.retain(|Queued { frame, replaceable }| {
            if let Some(replaceable) = replaceable {
                self.bytes -= frame.len();
                self.fall_behind(*replaceable);
            }
            replaceable.is_none()
        });
        self.frames = frames;
    }

    fn is_behind(&self, topic: TopicId) -> bool {
        self.behind.iter().any(|it| it.topic == topic)
    }

    fn fall_behind(&mut self, replaceable: Replaceable) {
        match self.behind.iter_mut().find(|it| it.topic == replaceable.topic) {
            Some(known) => known.since = known.since.min(replaceable.since),
            None => self.behind.push(replaceable),
        }
    }

    fn wake(&mut self, waker: &Waker) {
        if !self.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.waker = Some(waker.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, iter};

    use futures_util::FutureExt;
    use tokio::task::JoinSet;

    use super::*;

    fn outbox(bytes_max: usize) -> Outbox {
        Outbox::new(Serializer::V1, &Backlogs::of_at_most(bytes_max))
    }

    /// Of a topic that has this letter.
    fn replaceable(topic: char, since: u32) -> Replaceable {
        Replaceable { topic: TopicId::of_hash(u64::from(topic) << 1), since: Since(since) }
    }

    /// Pushes a message of a topic, and gives whether it is queued.
    fn offer(outbox: &Outbox, text: &'static str, topic: char, since: u32) -> bool {
        let frames = iter::once(Frame::text(text));
        outbox.push_all(frames, None, Some(replaceable(topic, since))).unwrap() == 1
    }

    /// What there is for the connection at once: the frames' texts, and what else.
    fn drained(outbox: &Outbox) -> Option<(Vec<String>, Drained)> {
        let mut batch = Vec::new();
        let drained = outbox.drain(&mut batch).now_or_never()?.unwrap();
        let texts = batch.into_iter().map(|it| it.frame.to_text().unwrap().to_owned()).collect();
        Some((texts, drained))
    }

    fn frames(texts: &[&str]) -> Option<(Vec<String>, Drained)> {
        let texts = texts.iter().map(|it| (*it).to_owned()).collect();
        Some((texts, Drained::Frames(None)))
    }

    fn behind(topic: char, since: u32) -> Option<(Vec<String>, Drained)> {
        Some((Vec::new(), Drained::Behind(replaceable(topic, since))))
    }

    #[test]
    fn a_batch_keeps_the_order_of_pushes() {
        let outbox = outbox(16);
        outbox.push(Frame::text("a")).unwrap();
        assert!(offer(&outbox, "b", 't', 1));
        outbox.push(Frame::text("c")).unwrap();
        assert_eq!(drained(&outbox), frames(&["a", "b", "c"]));
        assert_eq!(drained(&outbox), None);
    }

    fn committed(departure: Departure, ago: u64) -> Option<Committed> {
        Some(Committed { at: Instant::now() - Duration::from_secs(ago), departure })
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_has_the_moment_of_the_oldest_of_it_that_has_one() {
        let outbox = outbox(16);
        let (mut batch, a) = (Vec::new(), || iter::once(Frame::text("a")));
        outbox.push_all(a(), committed(Departure::AtOnce, 1), None).unwrap();
        outbox.push_all(a(), committed(Departure::Merged, 3), None).unwrap();
        outbox.push_all(a(), committed(Departure::AtOnce, 2), None).unwrap();
        outbox.push(Frame::text("a")).unwrap();
        let oldest = Drained::Frames(committed(Departure::Merged, 3));
        assert_eq!((outbox.drain(&mut batch).await, batch.len()), (Ok(oldest), 4));
        // It has left with them; and what sends nothing has none.
        outbox.push_all(iter::empty(), committed(Departure::AtOnce, 1), None).unwrap();
        outbox.push(Frame::text("a")).unwrap();
        batch.clear();
        assert_eq!(outbox.drain(&mut batch).await, Ok(Drained::Frames(None)));
    }

    #[test]
    fn an_empty_outbox_takes_a_frame_of_any_size() {
        assert_eq!(outbox(1).push(Frame::text("abc")), Ok(()));
        assert!(offer(&outbox(1), "abc", 't', 1));
    }

    #[test]
    fn a_backlog_is_taken_at_the_bound_and_refused_one_past_it() {
        let outbox = outbox(4);
        outbox.push(Frame::text("abc")).unwrap();
        assert_eq!(outbox.push(Frame::text("d")), Ok(()));
        assert_eq!(outbox.push(Frame::text("e")), Err(Ended::SlowConsumer));
    }

    #[test]
    fn what_can_be_replaced_is_taken_at_the_bound_and_conflated_one_past_it() {
        let outbox = outbox(4);
        assert!(offer(&outbox, "abc", 't', 7));
        assert!(offer(&outbox, "d", 't', 8));
        assert!(!outbox.is_empty_and_told());
        assert!(!offer(&outbox, "e", 't', 9));
        // While it is behind, nothing is said of the topic.
        assert!(!offer(&outbox, "f", 't', 5));
        assert_eq!(drained(&outbox), behind('t', 5));
        assert!(offer(&outbox, "g", 't', 10));
        assert_eq!(drained(&outbox), frames(&["g"]));
        assert!(outbox.is_empty_and_told());
    }

    #[test]
    fn what_cannot_be_replaced_keeps_its_place_and_its_order() {
        let outbox = outbox(5);
        outbox.push(Frame::text("ab")).unwrap();
        assert!(offer(&outbox, "cd", 't', 1));
        assert!(offer(&outbox, "e", 'u', 2));
        outbox.push(Frame::text("fg")).unwrap();
        // There is no room for a third topic, either, and nobody who is in nobody's way is closed.
        assert!(!offer(&outbox, "hi", 'v', 3));
        assert_eq!(drained(&outbox), frames(&["ab", "fg"]));
        // One after the other, so that what is said of one is written before the next.
        assert_eq!(drained(&outbox), behind('t', 1));
        assert!(offer(&outbox, "j", 't', 1));
        assert_eq!(drained(&outbox), frames(&["j"]));
        assert_eq!(drained(&outbox), behind('u', 2));
        assert_eq!(drained(&outbox), behind('v', 3));
        assert_eq!(drained(&outbox), None);
    }

    #[test]
    fn what_cannot_be_replaced_still_ends_a_client_that_does_not_read_it() {
        let outbox = outbox(4);
        outbox.push(Frame::text("abc")).unwrap();
        assert!(offer(&outbox, "d", 't', 1));
        outbox.push(Frame::text("e")).unwrap();
        assert_eq!(outbox.push(Frame::text("f")), Err(Ended::SlowConsumer));
        assert!(outbox.is_behind());
    }

    #[test]
    fn who_has_not_been_told_is_behind_to_the_end() {
        let outbox = outbox(1);
        assert!(offer(&outbox, "a", 't', 1));
        assert!(!outbox.is_behind());
        assert!(!offer(&outbox, "b", 't', 1));
        outbox.end(Ended::Draining);
        assert!(outbox.is_behind());
        assert_eq!(outbox.push(Frame::text("c")), Err(Ended::Draining));
    }

    #[tokio::test]
    async fn who_is_written_to_learns_when_something_is_held_up() {
        let outbox = Arc::new(outbox(8));
        for is_end in [false, true] {
            assert!(offer(&outbox, "a", 't', 1));
            let mut tasks = JoinSet::new();
            let waiting = Arc::clone(&outbox);
            tasks.spawn(async move { waiting.holds_up().await });
            tokio::task::yield_now().await;
            assert!(tasks.try_join_next().is_none(), "it can be replaced");
            if is_end {
                outbox.end(Ended::Draining);
            } else {
                outbox.push(Frame::text("fact")).unwrap();
            }
            tasks.join_all().await;
            drained(&outbox);
        }
    }

    #[test]
    fn a_moment_is_never_later_than_what_it_was_made_of() {
        let started = Instant::now();
        for (millis, seconds) in [(0, 0), (999, 0), (1_000, 1), (1_999, 1), (86_400_500, 86_400)] {
            let at = started + Duration::from_millis(millis);
            let moment = Since::at(at, started).moment(started);
            // The first second is ever.
            let expected = (seconds > 0).then(|| started + Duration::from_secs(seconds));
            assert_eq!(moment, expected);
        }
        assert_eq!(Since::EVER.moment(started), None);
        assert!(Since::EVER < Since(1));
    }

    #[test]
    fn what_waits_is_small() {
        let frame = size_of::<Frame>();
        assert_eq!((size_of::<Queued>(), size_of::<Option<Replaceable>>()), (frame + 8, 8));
    }

    /// Changes are noted before they are pushed, as an event does, and who falls behind is told what
    /// is noted: then every change reaches the client, by its own message or by what replaces it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn pushes_and_drains_race_and_nothing_is_missed_or_left() {
        const CHANGES: u32 = 20_000;
        let outbox = Arc::new(outbox(64));
        let noted: Arc<HashMap<char, AtomicUsize>> =
            Arc::new(['t', 'u'].map(|topic| (topic, AtomicUsize::new(0))).into());
        let mut publishing = JoinSet::new();
        for topic in ['t', 'u'] {
            let (outbox, noted) = (Arc::clone(&outbox), Arc::clone(&noted));
            publishing.spawn(async move {
                for change in 1..=CHANGES {
                    noted[&topic].store(change as usize, Ordering::SeqCst);
                    let frame = iter::once(Frame::text(format!("{topic}{change}")));
                    let of = Some(replaceable(topic, change));
                    assert!(outbox.push_all(frame, None, of).unwrap() <= 1);
                    if change % 64 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            });
        }
        let mut told: HashMap<char, Vec<bool>> =
            ['t', 'u'].map(|topic| (topic, vec![false; CHANGES as usize + 1])).into();
        let (mut batch, mut conflations) = (Vec::new(), 0);
        loop {
            let is_over = publishing.is_empty();
            while let Some(joined) = publishing.try_join_next() {
                joined.unwrap();
            }
            match outbox.drain(&mut batch).now_or_never() {
                Some(Ok(Drained::Behind(Replaceable { topic, since }))) => {
                    conflations += 1;
                    let letter =
                        ['t', 'u'].into_iter().find(|it| replaceable(*it, 0).topic == topic);
                    let letter = letter.unwrap();
                    let last = noted[&letter].load(Ordering::SeqCst);
                    told.get_mut(&letter).unwrap()[since.0 as usize..=last].fill(true);
                }
                Some(drained) => assert_eq!(drained, Ok(Drained::Frames(None))),
                None if is_over => break,
                None => {}
            }
            for Queued { frame, .. } in batch.drain(..) {
                let (topic, change) = frame.to_text().unwrap().split_at(1);
                let topic = topic.chars().next().unwrap();
                told.get_mut(&topic).unwrap()[change.parse::<usize>().unwrap()] = true;
            }
            tokio::task::yield_now().await;
        }
        assert!(conflations > 0, "the client is never too slow");
        for (topic, told) in told {
            let missed: Vec<_> = (1..told.len()).filter(|it| !told[*it]).collect();
            assert_eq!(missed, Vec::<usize>::new(), "of {topic}");
        }
        assert!(outbox.is_empty_and_told());
    }

    impl Outbox {
        fn is_empty_and_told(&self) -> bool {
            let state = self.state.lock();
            state.frames.is_empty() && state.bytes == 0 && state.behind.is_empty()
        }
    }

    #[test]
    fn what_is_queued_when_an_outbox_is_ended_is_still_written() {
        let outbox = outbox(16);
        outbox.push(Frame::text("a")).unwrap();
        outbox.end(Ended::Draining);
        assert_eq!(outbox.push(Frame::text("b")), Err(Ended::Draining));
        assert_eq!(drained(&outbox), frames(&["a"]));
        let ended = outbox.drain(&mut Vec::new()).now_or_never().unwrap();
        assert_eq!(ended, Err(Ended::Draining));
    }

    #[test]
    fn the_highest_backlog_of_all_is_remembered_for_two_turns() {
        let backlogs = Backlogs::of_at_most(8);
        let [low, high] = [(); 2].map(|()| Outbox::new(Serializer::V1, &backlogs));
        high.push(Frame::text("abc")).unwrap();
        high.push(Frame::text("de")).unwrap();
        drained(&high);
        low.push(Frame::text("f")).unwrap();
        assert_eq!(backlogs.highest(), 5);
        backlogs.turn();
        low.push(Frame::text("g")).unwrap();
        assert_eq!(backlogs.highest(), 5);
        backlogs.turn();
        assert_eq!(backlogs.highest(), 2);
        backlogs.turn();
        assert_eq!(backlogs.highest(), 0);
    }

    #[tokio::test]
    async fn overflow_empties_the_queue_and_is_final() {
        let outbox = outbox(3);
        outbox.push(Frame::text("abc")).unwrap();
        assert_eq!(outbox.push(Frame::text("d")), Err(Ended::SlowConsumer));
        assert_eq!(outbox.push(Frame::text("")), Err(Ended::SlowConsumer));
        assert_eq!(outbox.drain(&mut Vec::new()).await, Err(Ended::SlowConsumer));
    }
}
