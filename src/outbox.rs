//! The frames waiting to be written to one client.
//!
//! Invariants: `bytes` is the sum of the queued frames' lengths; a backlog of two frames or more
//! is at most `bytes_max`; once ended, an outbox refuses everything, and it has overflowed only if
//! it is empty.

use std::{
    future::poll_fn,
    mem,
    task::{Poll, Waker},
};

use parking_lot::Mutex;
use tokio_tungstenite::tungstenite::Message as Frame;

use crate::protocol::serializer::Serializer;

/// A byte-bounded queue of encoded frames: many tasks push, one connection drains.
#[derive(Debug)]
pub struct Outbox {
    state: Mutex<State>,
    /// Most bytes that may wait behind another frame. A drained batch is no longer counted: a
    /// connection holds at most twice `bytes_max` plus the largest frame.
    bytes_max: usize,
    serializer: Serializer,
}

#[derive(Debug, Default)]
struct State {
    frames: Vec<Frame>,
    bytes: usize,
    ended: Option<Ended>,
    /// The connection is to look at what it has decided.
    nudged: bool,
    waker: Option<Waker>,
}

/// Why an outbox takes nothing more; its connection must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The consumer fell more than `bytes_max` behind.
    SlowConsumer,
    /// The server drains.
    Draining,
}

impl Outbox {
    /// An empty outbox of a client that reads `serializer`, for a backlog of `bytes_max` bytes.
    #[must_use]
    pub fn new(serializer: Serializer, bytes_max: usize) -> Self {
        Self { state: Mutex::default(), bytes_max, serializer }
    }

    /// What the client reads.
    #[must_use]
    pub fn serializer(&self) -> Serializer {
        self.serializer
    }

    /// Queues `frame` and wakes the connection. Never waits.
    ///
    /// # Errors
    /// [`Ended`] when the backlog would exceed `bytes_max`; an empty outbox takes any frame. The
    /// queue is then emptied at once, so that a stuck peer costs no memory while its connection
    /// closes.
    pub fn push(&self, frame: Frame) -> Result<(), Ended> {
        self.push_all(std::iter::once(frame)).map(drop)
    }

    /// Queues `frames` together, so that they can leave together. Gives how many there were.
    ///
    /// # Errors
    /// As [`Self::push`], as soon as one of them does not fit.
    pub fn push_all(&self, frames: impl Iterator<Item = Frame>) -> Result<usize, Ended> {
        let (waker, pushed) = {
            let mut state = self.state.lock();
            let mut count = 0;
            for frame in frames {
                let bytes = state.bytes + frame.len();
                if state.ended.is_none() && bytes > self.bytes_max && !state.frames.is_empty() {
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
    /// after a [`Self::nudge`].
    ///
    /// # Errors
    /// [`Ended`] once the outbox has ended.
    ///
    /// # Cancel safety
    /// Frames leave the queue only when this returns.
    pub async fn drain(&self, batch: &mut Vec<Frame>) -> Result<(), Ended> {
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
                    return Poll::Ready(Ok(()));
                }
                if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    state.waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
            mem::swap(&mut state.frames, batch);
            state.bytes = 0;
            Poll::Ready(Ok(()))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(bytes_max: usize) -> Outbox {
        Outbox::new(Serializer::V1, bytes_max)
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
    async fn overflow_empties_the_queue_and_is_final() {
        let outbox = outbox(3);
        outbox.push(Frame::text("abc")).unwrap();
        assert_eq!(outbox.push(Frame::text("d")), Err(Ended::SlowConsumer));
        assert_eq!(outbox.push(Frame::text("")), Err(Ended::SlowConsumer));
        assert_eq!(outbox.drain(&mut Vec::new()).await, Err(Ended::SlowConsumer));
    }
}
