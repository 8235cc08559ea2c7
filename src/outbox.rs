//! The frames waiting to be written to one client.
//!
//! Invariants: `bytes` is the sum of the queued frames' lengths; a backlog of two frames or more
//! is at most its bound; once ended, an outbox refuses everything, and it has overflowed only if
//! it is empty.

use std::{
    future::poll_fn,
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
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
    frames: Vec<Frame>,
    bytes: usize,
    /// The oldest of what waits.
    committed: Option<Committed>,
    ended: Option<Ended>,
    /// The connection is to look at what it has decided.
    nudged: bool,
    waker: Option<Waker>,
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

    /// Queues `frame` and wakes the connection. Never waits.
    ///
    /// # Errors
    /// [`Ended`] when the backlog would exceed its bound; an empty outbox takes any frame. The
    /// queue is then emptied at once, so that a stuck peer costs no memory while its connection
    /// closes.
    pub fn push(&self, frame: Frame) -> Result<(), Ended> {
        self.push_all(std::iter::once(frame), None).map(drop)
    }

    /// Queues `frames` together, so that they can leave together, with the moment at which the
    /// first of them was committed if that is known. Gives how many there were.
    ///
    /// # Errors
    /// As [`Self::push`], as soon as one of them does not fit.
    pub fn push_all(
        &self,
        frames: impl Iterator<Item = Frame>,
        committed: Option<Committed>,
    ) -> Result<usize, Ended> {
        let (waker, pushed) = {
            let mut state = self.state.lock();
            let mut count = 0;
            for frame in frames {
                let bytes = state.bytes + frame.len();
                if state.ended.is_none()
                    && bytes > self.backlogs.bytes_max
                    && !state.frames.is_empty()
                {
                    *state = State {
                        ended: Some(Ended::SlowConsumer),
                        waker: state.waker.take(),
                        ..State::default()
                    };
                }
                if state.ended.is_some() {
                    break;
                }
                state.bytes = bytes;
                state.frames.push(frame);
                count += 1;
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

    /// Waits for frames, then swaps all of them into `batch`, which must be empty. It stays empty
    /// after a [`Self::nudge`]. Gives when the oldest of them was committed that has a moment.
    ///
    /// # Errors
    /// [`Ended`] once the outbox has ended.
    ///
    /// # Cancel safety
    /// Frames leave the queue only when this returns.
    pub async fn drain(&self, batch: &mut Vec<Frame>) -> Result<Option<Committed>, Ended> {
        debug_assert!(batch.is_empty());
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if let Some(ended) = state.ended
                && state.frames.is_empty()
            {
                return Poll::Ready(Err(ended));
            }
            if state.frames.is_empty() {
                if mem::take(&mut state.nudged) {
                    return Poll::Ready(Ok(None));
                }
                if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    state.waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
            mem::swap(&mut state.frames, batch);
            state.bytes = 0;
            Poll::Ready(Ok(state.committed.take()))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(bytes_max: usize) -> Outbox {
        Outbox::new(Serializer::V1, &Backlogs::of_at_most(bytes_max))
    }

    #[tokio::test]
    async fn a_batch_keeps_the_order_of_pushes() {
        let outbox = outbox(16);
        outbox.push(Frame::text("a")).unwrap();
        outbox.push(Frame::text("b")).unwrap();
        let mut batch = Vec::new();
        outbox.drain(&mut batch).await.unwrap();
        assert_eq!(batch, [Frame::text("a"), Frame::text("b")]);
    }

    fn committed(departure: Departure, ago: u64) -> Option<Committed> {
        let at = Instant::now() - std::time::Duration::from_secs(ago);
        Some(Committed { at, departure })
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_has_the_moment_of_the_oldest_of_it_that_has_one() {
        let outbox = outbox(16);
        let (mut batch, a) = (Vec::new(), || std::iter::once(Frame::text("a")));
        outbox.push_all(a(), committed(Departure::AtOnce, 1)).unwrap();
        outbox.push_all(a(), committed(Departure::Merged, 3)).unwrap();
        outbox.push_all(a(), committed(Departure::AtOnce, 2)).unwrap();
        outbox.push(Frame::text("a")).unwrap();
        let drained = outbox.drain(&mut batch).await;
        assert_eq!((drained, batch.len()), (Ok(committed(Departure::Merged, 3)), 4));
        // It has left with them; and what sends nothing has none.
        outbox.push_all(std::iter::empty(), committed(Departure::AtOnce, 1)).unwrap();
        outbox.push(Frame::text("a")).unwrap();
        batch.clear();
        assert_eq!(outbox.drain(&mut batch).await, Ok(None));
    }

    #[test]
    fn an_empty_outbox_takes_a_frame_of_any_size() {
        assert_eq!(outbox(1).push(Frame::text("abc")), Ok(()));
    }

    #[test]
    fn a_backlog_is_taken_at_the_bound_and_refused_one_past_it() {
        let outbox = outbox(4);
        outbox.push(Frame::text("abc")).unwrap();
        assert_eq!(outbox.push(Frame::text("d")), Ok(()));
        assert_eq!(outbox.push(Frame::text("e")), Err(Ended::SlowConsumer));
    }

    #[tokio::test]
    async fn what_is_queued_when_an_outbox_is_ended_is_still_written() {
        let outbox = outbox(16);
        outbox.push(Frame::text("a")).unwrap();
        outbox.end(Ended::Draining);
        assert_eq!(outbox.push(Frame::text("b")), Err(Ended::Draining));
        let mut batch = Vec::new();
        outbox.drain(&mut batch).await.unwrap();
        assert_eq!(batch, [Frame::text("a")]);
        assert_eq!(outbox.drain(&mut Vec::new()).await, Err(Ended::Draining));
    }

    #[tokio::test]
    async fn the_highest_backlog_of_all_is_remembered_for_two_turns() {
        let backlogs = Backlogs::of_at_most(8);
        let [low, high] = [(); 2].map(|()| Outbox::new(Serializer::V1, &backlogs));
        high.push(Frame::text("abc")).unwrap();
        high.push(Frame::text("de")).unwrap();
        high.drain(&mut Vec::new()).await.unwrap();
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
