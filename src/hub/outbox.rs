//! The frames waiting to be written to one client.
//!
//! What becomes of a frame that a client is too slow for depends on what it is, see [`Kind`]. One
//! that an invalidation can take the place of is dropped and its topic noted; the client is told of
//! each such topic what has changed meanwhile (**conflation**). A broadcast of an ordinary topic ends
//! the client's channel. Everything else ends the connection.
//!
//! Invariants: `bytes` is the sum of the queued frames' lengths; a backlog of two frames or more
//! is at most its bound; nothing that is replaceable is dropped without a note of its topic, and
//! while that note stands nothing of the topic is queued; a note is given out once the frames that
//! stood before it have left, whatever has come since; what a connection has to look at goes before
//! every frame; once ended, an outbox refuses everything, and it has overflowed only if it is empty.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    iter, mem,
    num::NonZeroU64,
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message as Frame;

use super::held::OutboxBounds;
use crate::protocol::serializer::Serializer;

/// A batch that leaves together is about this large, or one frame: the rest waits where it can still
/// be dropped.
const BATCH_BYTES: usize = 16 * 1024;

/// A byte-bounded queue of encoded frames: many tasks push, one connection drains.
#[derive(Debug)]
pub struct Outbox {
    state: Mutex<State>,
    bounds: Arc<OutboxBounds>,
    serializer: Serializer,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Queued>,
    bytes: usize,
    /// Bytes of the last batch, until the next is asked for.
    leaving: usize,
    /// The oldest of what waits, or was replaced.
    committed: Option<Committed>,
    /// The topics whose frames were dropped, each once.
    behind: Vec<Behind>,
    /// The ordinary topics whose frames were dropped, each once.
    overflowed: Vec<TopicId>,
    ended: Option<Ended>,
    /// The connection is to look at what it has decided.
    nudged: bool,
    waker: Option<Waker>,
}

/// A topic whose frames were dropped, and how many frames leave before that is told.
#[derive(Debug)]
struct Behind {
    replaceable: Replaceable,
    frames_before: usize,
}

/// A frame that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Queued {
    /// To be written as it is.
    pub frame: Frame,
    /// What it is.
    pub kind: Kind,
}

/// What a frame is, and so what becomes of it if the client is too slow for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A reply, or another message to this client alone: the connection ends.
    Own,
    /// A broadcast of a topic that has a rule: the connection ends.
    Ruled(TopicId),
    /// A broadcast of an ordinary topic: the client's channel ends.
    Ordinary(TopicId),
    /// A message of which an invalidation can take the place, and does.
    Replaceable(Replaceable),
}

impl Kind {
    fn topic(self) -> Option<TopicId> {
        match self {
            Self::Own => None,
            Self::Ruled(topic) | Self::Ordinary(topic) => Some(topic),
            Self::Replaceable(replaceable) => Some(replaceable.topic),
        }
    }

    /// What can take its place, if anything can.
    #[must_use]
    pub fn replaceable(self) -> Option<Replaceable> {
        match self {
            Self::Replaceable(replaceable) => Some(replaceable),
            Self::Own | Self::Ruled(_) | Self::Ordinary(_) => None,
        }
    }
}

/// What can take the place of a frame: an invalidation of its topic, of all that has changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replaceable {
    /// The frame's topic.
    pub topic: TopicId,
    /// Not later than the first change that the frame tells of.
    pub since: Since,
}

/// A topic, in a few bytes: a hash by a key that no client knows, wide enough that two topics of one
/// socket do not meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TopicId(NonZeroU64);

impl TopicId {
    /// That of the topic with this hash.
    #[must_use]
    pub fn of_hash(hash: u64) -> Self {
        Self(NonZeroU64::MIN | hash)
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
    /// Frames of this topic were dropped, and what stood before them has been drained: the client is
    /// to be told what has changed.
    Behind(Replaceable),
    /// The connection is to look at something first.
    Notice(Notice),
}

/// What a connection is to look at before it writes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// What it has decided: keys, rules or revocations have changed.
    Nudged,
    /// Broadcasts of this ordinary topic were dropped, because the client is too slow for them: its
    /// channel is to end.
    Overflowed(TopicId),
}

/// Why a connection that waits for its client's reading should do something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interruption {
    /// There is something to look at.
    Notice(Notice),
    /// There is a frame that nothing can take the place of.
    HeldUp,
    /// The outbox has ended.
    Ended(Ended),
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

    /// The bounds that it shares with all others.
    pub(super) fn bounds(&self) -> &Arc<OutboxBounds> {
        &self.bounds
    }

    /// What the client reads.
    #[must_use]
    pub fn serializer(&self) -> Serializer {
        self.serializer
    }

    /// Queues `frame`, a message to this client alone, and wakes the connection. Never waits.
    ///
    /// # Errors
    /// [`Ended`] when the backlog would exceed its bound; an empty outbox takes any frame. The
    /// queue is then emptied at once, so that a stuck peer costs no memory while its connection
    /// closes.
    pub fn push(&self, frame: Frame) -> Result<(), Ended> {
        self.push_all(iter::once(self.bounds.hold(frame)), None, Kind::Own).map(drop)
    }

    /// Queues a message to this client alone of which an invalidation can take the place. Returns
    /// whether it is queued.
    pub fn push_replaceable(&self, frame: Frame, replaceable: Replaceable) -> bool {
        let (frame, kind) = (self.bounds.hold(frame), Kind::Replaceable(replaceable));
        let is_queued = self.push_all(iter::once(frame), None, kind).is_ok_and(|count| count > 0);
        if is_queued {
            // What is said of one topic leaves before what is said of the next.
            self.state.lock().put_notes_off();
        }
        is_queued
    }

    /// Queues `frames` together, so that they can leave together, with the moment at which the
    /// first of them was committed if that is known.
    ///
    /// Returns how many were queued: those of ordinary topics, and replaceable ones, may be dropped.
    ///
    /// # Errors
    /// As [`Self::push`], as soon as one of them does not fit.
    pub fn push_all(
        &self,
        frames: impl Iterator<Item = Frame>,
        committed: Option<Committed>,
        kind: Kind,
    ) -> Result<usize, Ended> {
        self.change(|state| {
            let mut count = 0;
            for frame in frames {
                if state.ended.is_some() {
                    break;
                }
                count += usize::from(state.take(Queued { frame, kind }, self.bounds.bytes_max()));
            }
            if count > 0 && state.ended.is_none() {
                state.committed = [state.committed, committed].into_iter().flatten().min();
            }
            self.bounds.note(state.bytes);
            state.ended.map_or(Ok(count), Err)
        })
    }

    /// Drops what is queued of a topic that the client may not hear any more, or no longer wants.
    pub fn forget(&self, topic: TopicId) {
        let mut state = self.state.lock();
        state.behind.retain(|behind| behind.replaceable.topic != topic);
        state.overflowed.retain(|known| *known != topic);
        state.drop_frames(|kind| kind.topic() == Some(topic));
    }

    /// Drops whatever can be dropped without closing the connection, because all outboxes together
    /// hold too much.
    pub(super) fn relieve(&self) {
        self.change(|state| {
            state.conflate();
            while let Some(topic) = state.largest_ordinary(None) {
                state.overflow(topic);
            }
        });
    }

    /// Drops everything and ends the connection, because all outboxes together hold too much.
    pub(super) fn overflow(&self) {
        self.change(State::end_as_slow);
    }

    /// How much is being written, in bytes.
    pub(super) fn leaving(&self) -> usize {
        self.state.lock().leaving
    }

    /// How much waits or is being written, in bytes.
    pub(super) fn backlog(&self) -> usize {
        let state = self.state.lock();
        state.bytes + state.leaving
    }

    /// Why the outbox takes nothing more, if it has ended.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.state.lock().ended
    }

    /// Ends the outbox: its connection writes what is queued and closes for this reason, unless it
    /// already does for another.
    pub fn end(&self, ended: Ended) {
        self.change(|state| {
            state.ended.get_or_insert(ended);
        });
    }

    /// Has the connection look at what it has decided, whatever else it has to do.
    pub fn nudge(&self) {
        self.change(|state| state.nudged = true);
    }

    /// Changes the state and wakes the connection.
    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let (waker, changed) = {
            let mut state = self.state.lock();
            let changed = act(&mut state);
            (state.waker.take(), changed)
        };
        // Outside the lock: waking may run the scheduler, which must not find it held.
        if let Some(waker) = waker {
            waker.wake();
        }
        changed
    }

    /// Whether something was dropped that the client has not been told of.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        let state = self.state.lock();
        !state.behind.is_empty() || state.ended == Some(Ended::SlowConsumer)
    }

    /// Waits for frames, then moves the first of them into `batch`, which must be empty; it stays
    /// empty where there is something else to do.
    ///
    /// # Errors
    /// [`Ended`] once the outbox has ended.
    ///
    /// # Cancel safety
    /// Frames leave the queue only when this returns.
    pub async fn drain(&self, batch: &mut VecDeque<Queued>) -> Result<Drained, Ended> {
        debug_assert!(batch.is_empty());
        poll_fn(|cx| {
            let mut state = self.state.lock();
            state.leaving = 0;
            if let Some(notice) = state.notice() {
                return Poll::Ready(Ok(Drained::Notice(notice)));
            }
            if let Some(replaceable) = state.next_behind() {
                return Poll::Ready(Ok(Drained::Behind(replaceable)));
            }
            if !state.frames.is_empty() {
                state.drain(batch);
                return Poll::Ready(Ok(Drained::Frames(state.committed.take())));
            }
            if let Some(ended) = state.ended {
                return Poll::Ready(Err(ended));
            }
            state.wake(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Waits until there is something that a connection must not put off while its client does not
    /// read: a notice, the outbox's end unless `is_ending`, or, if `is_replaceable`, a frame that
    /// nothing can take the place of. Not while somebody [drains](Self::drain) it.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn interrupted(&self, is_replaceable: bool, is_ending: bool) -> Interruption {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if let Some(notice) = state.notice() {
                return Poll::Ready(Interruption::Notice(notice));
            }
            if let Some(ended) = state.ended.filter(|_| !is_ending) {
                return Poll::Ready(Interruption::Ended(ended));
            }
            let mut kinds = state.frames.iter().map(|queued| queued.kind);
            if is_replaceable && kinds.any(|kind| kind.replaceable().is_none()) {
                return Poll::Ready(Interruption::HeldUp);
            }
            state.wake(cx.waker());
            Poll::Pending
        })
        .await
    }
}

impl State {
    /// Queues a frame, or notes that the client is too slow for it. Returns whether the frame is
    /// queued.
    fn take(&mut self, queued: Queued, bytes_max: usize) -> bool {
        let (length, kind) = (queued.frame.len(), queued.kind);
        let fits = |state: &Self| state.frames.is_empty() || state.bytes + length <= bytes_max;
        if matches!(kind, Kind::Ordinary(topic) if self.overflowed.contains(&topic)) {
            return false;
        }
        if !fits(self) {
            self.conflate();
        }
        if let Kind::Replaceable(replaceable) = kind
            && (self.is_behind(replaceable.topic) || !fits(self))
        {
            self.fall_behind(replaceable);
            return false;
        }
        // The largest ordinary topic makes room, which may be the frame's own.
        while !fits(self) {
            let Some(topic) = self.largest_ordinary(Some((kind, length))) else { break };
            self.overflow(topic);
            if kind == Kind::Ordinary(topic) {
                return false;
            }
        }
        if !fits(self) {
            self.end_as_slow();
            return false;
        }
        self.bytes += length;
        self.frames.push_back(queued);
        true
    }

    /// Ends the outbox because its client is too slow.
    fn end_as_slow(&mut self) {
        let ended = Some(self.ended.unwrap_or(Ended::SlowConsumer));
        let (leaving, waker) = (self.leaving, self.waker.take());
        *self = Self { ended, leaving, waker, ..Self::default() };
    }

    /// Moves the first frames into `batch`.
    fn drain(&mut self, batch: &mut VecDeque<Queued>) {
        if self.bytes <= BATCH_BYTES {
            mem::swap(&mut self.frames, batch);
            self.leaving = mem::take(&mut self.bytes);
        } else {
            let is_next = |leaving: usize, queued: &Queued| {
                leaving == 0 || leaving + queued.frame.len() <= BATCH_BYTES
            };
            while let Some(queued) =
                self.frames.pop_front_if(|queued| is_next(self.leaving, queued))
            {
                self.leaving += queued.frame.len();
                batch.push_back(queued);
            }
            self.bytes -= self.leaving;
        }
        for behind in &mut self.behind {
            behind.frames_before = behind.frames_before.saturating_sub(batch.len());
        }
    }

    /// What the connection is to look at first.
    fn notice(&mut self) -> Option<Notice> {
        if mem::take(&mut self.nudged) {
            return Some(Notice::Nudged);
        }
        self.overflowed.pop().map(Notice::Overflowed)
    }

    /// The first topic that the client can be told of.
    fn next_behind(&mut self) -> Option<Replaceable> {
        if self.ended.is_some() {
            return None;
        }
        let place = self.behind.iter().position(|behind| behind.frames_before == 0)?;
        Some(self.behind.remove(place).replaceable)
    }

    /// Has every note wait for what is queued.
    fn put_notes_off(&mut self) {
        let Self { behind, frames, .. } = self;
        for behind in behind {
            behind.frames_before = frames.len();
        }
    }

    /// Drops whatever can be replaced.
    fn conflate(&mut self) {
        let replaceables: Vec<_> =
            self.frames.iter().filter_map(|queued| queued.kind.replaceable()).collect();
        if replaceables.is_empty() {
            return;
        }
        self.drop_frames(|kind| kind.replaceable().is_some());
        for replaceable in replaceables {
            self.fall_behind(replaceable);
        }
    }

    /// The ordinary topic that takes most of the room, together with a frame that is to come.
    fn largest_ordinary(&self, coming: Option<(Kind, usize)>) -> Option<TopicId> {
        let waiting = self.frames.iter().map(|queued| (queued.kind, queued.frame.len()));
        let mut bytes: HashMap<TopicId, usize> = HashMap::new();
        for (kind, length) in waiting.chain(coming) {
            if let Kind::Ordinary(topic) = kind {
                *bytes.entry(topic).or_default() += length;
            }
        }
        bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(topic, _)| topic)
    }

    /// Drops what is queued of an ordinary topic, and notes that its channel is to end.
    fn overflow(&mut self, topic: TopicId) {
        self.drop_frames(|kind| kind == Kind::Ordinary(topic));
        self.overflowed.push(topic);
    }

    fn drop_frames(&mut self, is_dropped: impl Fn(Kind) -> bool) {
        let Self { frames, bytes, behind, .. } = self;
        frames.retain(|Queued { frame, kind }| {
            let is_dropped = is_dropped(*kind);
            if is_dropped {
                *bytes -= frame.len();
            }
            !is_dropped
        });
        for behind in behind {
            behind.frames_before = behind.frames_before.min(frames.len());
        }
    }

    fn is_behind(&self, topic: TopicId) -> bool {
        self.behind.iter().any(|behind| behind.replaceable.topic == topic)
    }

    fn fall_behind(&mut self, new: Replaceable) {
        let known = self.behind.iter_mut().find(|behind| behind.replaceable.topic == new.topic);
        match known {
            Some(Behind { replaceable, .. }) => {
                replaceable.since = replaceable.since.min(new.since);
            }
            None => {
                let frames_before = self.frames.len();
                self.behind.push(Behind { replaceable: new, frames_before });
            }
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
