//! A client's WebSocket: joins, waits for an invalidation, sends heartbeats.
//!
//! Invariant: it speaks by [`crate::wire_client`], which is written apart from the server's codecs.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::{context::CANARY_EID, target::Stream};
use crate::{
    protocol::topic::TOPIC_PREFIX,
    wire_client::{
        failure::Failure,
        frame::{Frame, FrameReader, push_pong},
        message::{Event, Join, Vsn},
    },
};

/// Longest wait for the answer to a join; production clients wait for 2 s.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the reply to a heartbeat, and for a write.
const BEAT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most messages that wait to be read; far fewer are sent to the doctor's topics within a run.
const RECEIVED_MAX: usize = 1_000;
/// The version of production clients, whose frames are text.
pub(super) const VSN: Vsn = Vsn::V1;
/// A topic without a rule: notifications on the channel of its name must not reach clients.
pub(super) const UNLISTED: &str = "tidegate_doctor_unlisted";

/// A WebSocket of a client.
pub(super) struct Socket {
    stream: Stream,
    reader: FrameReader,
    received: VecDeque<Event>,
    last_ref: u64,
}

impl Socket {
    /// Creates a WebSocket over a stream that has been upgraded.
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, reader: FrameReader::default(), received: VecDeque::new(), last_ref: 0 }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        let written =
            timeout(BEAT_TIMEOUT, write).await.map_err(|_elapsed| Failure::WriteDeadline)?;
        written.map_err(|error| Failure::Lost(error.kind()))
    }

    /// Returns the server's next message; `None` if there is none until `until`.
    pub(super) async fn next(&mut self, until: Instant) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(event) = self.received.pop_front() {
                return Ok(Some(event));
            }
            let mut bytes = Vec::with_capacity(16 << 10);
            let read = timeout(
                until.saturating_duration_since(Instant::now()),
                self.stream.read_buf(&mut bytes),
            );
            match read.await {
                Err(_elapsed) => return Ok(None),
                Ok(Ok(0)) => return Err(Failure::Closed),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(Failure::Lost(error.kind())),
            }
            let pongs = self.take(&bytes)?;
            if !pongs.is_empty() {
                self.send(&pongs).await?;
            }
        }
    }

    /// Keeps the messages in these bytes, and returns the pongs that they ask for.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut pongs = Vec::new();
        let received = &mut self.received;
        self.reader.read(bytes, |frame| {
            match frame {
                Frame::Text(text) => received.extend(VSN.read(text)),
                Frame::Ping(payload) => push_pong(payload, &mut pongs),
                Frame::Close(Some(code)) => return Err(Failure::ClosedWith(code)),
                Frame::Close(None) => return Err(Failure::Closed),
                Frame::Binary(_) | Frame::Pong => {}
            }
            Ok(())
        })?;
        if self.received.len() > RECEIVED_MAX {
            return Err(Failure::NotUnderstood);
        }
        Ok(pongs)
    }

    /// Joins a topic, and returns how long the answer took, or the reason of the refusal.
    pub(super) async fn join(
        &mut self,
        sub_topic: &str,
        token: &str,
    ) -> Result<Result<Duration, String>, Failure> {
        self.last_ref += 1;
        let mut bytes = Vec::new();
        let topic = format!("{TOPIC_PREFIX}{sub_topic}");
        let join =
            Join { topic: &topic, reference: self.last_ref, ack: false, access_token: token };
        VSN.push_join(&join, &mut bytes);
        let begun = Instant::now();
        self.send(&bytes).await?;
        loop {
            match self.next(begun + JOIN_TIMEOUT).await? {
                None => return Err(Failure::JoinDeadline),
                Some(Event::Reply { reference, refusal }) if reference == self.last_ref => {
                    return Ok(refusal.map_or(Ok(begun.elapsed()), Err));
                }
                Some(_) => {}
            }
        }
    }

    /// Waits for the invalidation with this payload. Returns the payload with which it came, and
    /// whether a broadcast came on the topic that must stay silent.
    pub(super) async fn invalidated(
        &mut self,
        payload: &Value,
        until: Instant,
    ) -> (Result<Option<Value>, Failure>, bool) {
        let mut is_leaked = false;
        loop {
            match self.next(until).await {
                Ok(Some(Event::Broadcast { topic, .. })) if topic.ends_with(UNLISTED) => {
                    is_leaked = true;
                }
                Ok(Some(Event::Broadcast { mut envelope, .. }))
                    if is_it(&envelope["payload"], payload) =>
                {
                    return (Ok(Some(envelope["payload"].take())), is_leaked);
                }
                Ok(Some(_)) => {}
                Ok(None) => return (Ok(None), is_leaked),
                Err(failure) => return (Err(failure), is_leaked),
            }
        }
    }

    /// Sends a heartbeat and returns whether anything came back: [`Event`] does not tell the reply
    /// from other messages.
    pub(super) async fn beats(&mut self) -> Result<bool, Failure> {
        self.last_ref += 1;
        let mut bytes = Vec::new();
        VSN.push_heartbeat(self.last_ref, &mut bytes);
        self.send(&bytes).await?;
        Ok(self.next(Instant::now() + BEAT_TIMEOUT).await?.is_some())
    }
}

/// Returns whether `arrived` is the invalidation `sent`, or a later one with which it was merged.
fn is_it(arrived: &Value, sent: &Value) -> bool {
    let is_ours = arrived["event_eid"] == CANARY_EID && arrived["type"] == sent["type"];
    match (arrived["id"].as_u64(), sent["id"].as_u64()) {
        (Some(arrived), Some(sent)) => is_ours && arrived >= sent,
        (_, _) => is_ours,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_invalidation_is_known_by_its_row_or_a_later_one() {
        let sent = json!({ "type": "manual_invalidation", "event_eid": CANARY_EID, "id": 7 });
        let with = |name: &str, value: Value| {
            let mut arrived = sent.clone();
            arrived[name] = value;
            arrived
        };
        assert!(is_it(&sent, &sent) && is_it(&with("id", 8.into()), &sent));
        assert!(is_it(&with("id", Value::Null), &sent), "a history that cannot be written");
        assert!(!is_it(&with("id", 6.into()), &sent));
        assert!(!is_it(&with("type", "catch_up".into()), &sent));
        assert!(!is_it(&with("event_eid", "AB3028".into()), &sent));
    }
}
