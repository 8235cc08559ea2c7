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
    bounds: Arc<OutboxBounds>,
    serializer: Serializer,
}

/// The bound of every outbox, and the high-water mark of all of them.
#[derive(Debug)]
pub struct OutboxBounds {
    /// Most bytes that may wait behind another frame. A drained batch is no longer counted: a
    /// connection holds at most twice this many plus the largest frame.
    bytes_max: usize,
    /// Since the last turn, and between that and the one before.
    highest: [AtomicUsize; 2],
}

impl OutboxBounds {
    /// Creates the bounds: at most `bytes_max` in each outbox.
    #[must_use]
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, highest: Default::default() })
    }

    /// The largest of one outbox since the turn before the last, in bytes.
    #[must_use]
    pub fn highest(&self) -> usize {
        self.highest.iter().map(|bytes| bytes.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Ends one period of the high-water mark. All readers within a period see the same mark.
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
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, strum::VariantArray, strum::IntoStaticStr,
)]
#[strum(serialize_all = "snake_case")]
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
    pub fn new(serializer: Serializer, bounds: &Arc<OutboxBounds>) -> Self {
        Self { state: Mutex::default(), bounds: Arc::clone(bounds), serializer }
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
    /// first of them was committed if that is known.
    ///
    /// Returns how many were queued: replaceable frames may be dropped.
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
                count += usize::from(state.take(queued, self.bounds.bytes_max));
            }
            if count > 0 && state.ended.is_none() {
                state.committed = [state.committed, committed].into_iter().flatten().min();
            }
            self.bounds.note(state.bytes);
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
            let is_held_up = state.frames.iter().any(|queued| queued.replaceable.is_none());
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
    /// Queues a frame, or marks the client as behind. Returns whether the frame is queued.
    fn take(&mut self, queued: Queued, bytes_max: usize) -> bool {
        let length = queued.frame.len();
        let fits = |state: &Self| state.frames.is_empty() || state.bytes + length <= bytes_max;
        if !fits(self) {
            self.conflate();
        }
        match queued.replaceable {
            Some(replaceable) if self.is_behind(replaceable.topic) || !fits(self) => {
                self.fall_behind(replaceable);
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
        self.behind.iter().any(|known| known.topic == topic)
    }

    fn fall_behind(&mut self, replaceable: Replaceable) {
        match self.behind.iter_mut().find(|known| known.topic == replaceable.topic) {
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
mod tests;
