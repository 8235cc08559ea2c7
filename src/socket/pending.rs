//! Topics that wait for an answer, and the messages that wait behind them.
//!
//! Invariants: messages of one topic are handled in their order, so those that come while it waits
//! are kept, at most [`BACKLOG_MAX`] a topic and no more bytes of them all than may wait in an
//! outbox; a message that is kept holds the bytes that are counted and no others; what is waited for
//! is cancel-safe.

use std::pin::Pin;

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::channel::Channel;
use crate::{
    invalidation::ClientHistory,
    policies::{Allowed, QueryError},
    protocol::{
        error_code::Refusal,
        message::{Message, Ref},
    },
};

/// Most messages of one topic that wait for an answer.
const BACKLOG_MAX: usize = 100;

/// A topic of a socket.
#[derive(Debug)]
pub(super) enum Slot {
    Joined(Box<Channel>),
    Waiting(Box<Waiting>),
}

impl Slot {
    /// The channel that hears the topic.
    pub(super) fn hearing(&self) -> Option<&Channel> {
        match self {
            Self::Joined(channel) => Some(channel),
            Self::Waiting(waiting) => match &waiting.what {
                // The channel that a join replaces still hears its topic.
                Awaiting::Join(joining) => joining.replaced.as_deref(),
                Awaiting::Channel(channel) => Some(channel),
            },
        }
    }
}

impl Waiting {
    /// The channel that hears the topic.
    pub(super) fn hearing_mut(&mut self) -> Option<&mut Channel> {
        match &mut self.what {
            Awaiting::Join(joining) => joining.replaced.as_deref_mut(),
            Awaiting::Channel(channel) => Some(channel),
        }
    }
}

/// A topic that waits, with the messages that have come for it since.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) what: Awaiting,
    pub(super) backlog: Vec<Message>,
    /// The client was too slow for the topic meanwhile.
    pub(super) is_too_slow: bool,
}

/// What waits.
#[derive(Debug)]
pub(super) enum Awaiting {
    /// A join, for its LISTEN, its policies, or the delay of its refusal.
    Join(Box<Joining>),
    /// A joined channel, for its policies.
    Channel(Box<Channel>),
}

/// A join that has not been answered yet.
#[derive(Debug)]
pub(super) struct Joining {
    pub(super) join_ref: Option<Ref>,
    pub(super) reference: Option<Ref>,
    pub(super) decided: Result<Channel, Refusal>,
    /// What was known of the client when it asked.
    pub(super) history: ClientHistory,
    /// The channel that the join replaces.
    pub(super) replaced: Option<Box<Channel>>,
}

/// A topic whose answer is there.
#[derive(Debug)]
pub struct Due {
    pub(super) topic: Box<str>,
    pub(super) answer: Answer,
}

/// What a topic has waited for.
#[derive(Debug)]
pub(super) enum Answer {
    /// A time to come, or a LISTEN.
    Nothing,
    Reads(Result<Allowed, QueryError>),
    Writes(Result<bool, QueryError>),
}

/// Returns a topic when its answer is there.
type Later = Pin<Box<dyn Future<Output = Due> + Send>>;

/// What a socket waits for.
#[derive(Debug, Default)]
pub(super) struct Pending {
    later: FuturesUnordered<Later>,
    /// Topics that wait for the delay of a refusal.
    pub(super) refusals: usize,
    /// Bytes of all backlogs' payloads.
    backlog_bytes: usize,
}

impl Pending {
    /// Waits for the answer of a topic. `answer` must be cancel-safe.
    pub(super) fn wait(
        &mut self,
        topic: &str,
        answer: impl Future<Output = Answer> + Send + 'static,
    ) {
        let topic = topic.into();
        self.later.push(Box::pin(async move { Due { topic, answer: answer.await } }));
    }

    /// Waits until a topic's answer is there; forever while none waits.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(super) async fn due(&mut self) -> Due {
        match self.later.next().await {
            Some(due) => due,
            // Nothing waits; what will is put in between two calls.
            None => std::future::pending().await,
        }
    }

    /// Keeps a message behind its topic's answer; false if there is no room for it.
    #[must_use]
    pub(super) fn keep(
        &mut self,
        waiting: &mut Waiting,
        message: Message,
        bytes_max: usize,
    ) -> bool {
        let bytes = self.backlog_bytes + message.payload.len();
        let has_room = waiting.backlog.len() < BACKLOG_MAX && bytes <= bytes_max;
        if has_room {
            self.backlog_bytes = bytes;
            waiting.backlog.push(detached(message));
        }
        has_room
    }

    /// Counts messages that wait from this time on, whatever their size, and returns them as they
    /// are to be kept.
    pub(super) fn put(&mut self, backlog: Vec<Message>) -> Vec<Message> {
        self.backlog_bytes += bytes(&backlog);
        backlog.into_iter().map(detached).collect()
    }

    /// Counts a topic's messages no longer.
    pub(super) fn take(&mut self, backlog: &[Message]) {
        self.backlog_bytes -= bytes(backlog);
    }
}

fn detached(message: Message) -> Message {
    Message { payload: message.payload.detached(), ..message }
}

fn bytes(backlog: &[Message]) -> usize {
    backlog.iter().map(|message| message.payload.len()).sum()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio_tungstenite::tungstenite::{Message as Frame, Utf8Bytes};

    use super::*;
    use crate::protocol::{error_code::ErrorCode, serializer::Serializer};

    /// The frame's further elements are read and ignored; a few bytes of payload kept all of them.
    #[test]
    fn a_message_that_waits_does_not_keep_the_frame_that_it_came_in() {
        let (mut pending, refusal) = (Pending::default(), Refusal::new(ErrorCode::Unauthorized));
        let joining = Joining {
            join_ref: None,
            reference: None,
            decided: Err(refusal),
            history: ClientHistory::Nothing,
            replaced: None,
        };
        let mut waiting = Waiting {
            what: Awaiting::Join(Box::new(joining)),
            backlog: Vec::new(),
            is_too_slow: false,
        };
        let message =
            |frame: &Utf8Bytes| Serializer::V2.decode(Frame::Text(frame.clone())).unwrap();
        let ignored = "x".repeat(1_000_000);
        let frame: Utf8Bytes = format!(r#"[null,"1","t","e",{{"a":1}},"{ignored}"]"#).into();
        let kept = message(&frame);
        let frame = Bytes::from(frame);
        assert!(!frame.is_unique(), "the payload shares the frame");
        assert!(pending.keep(&mut waiting, kept, 100));
        assert!(frame.is_unique(), "and what is kept does not");
        assert_eq!(pending.backlog_bytes, 7);
        let frame: Utf8Bytes = format!(r#"[null,"1","t","broadcast",{{}},"{ignored}"]"#).into();
        let backlog = vec![message(&frame)];
        let backlog = pending.put(backlog);
        assert!(Bytes::from(frame).is_unique());
        assert_eq!(pending.backlog_bytes, 9);
        pending.take(&backlog);
        assert_eq!(pending.backlog_bytes, 7);
    }
}
