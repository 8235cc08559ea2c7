//! The client's side of the protocol, as far as a load and the doctor need it: joins, heartbeats
//! and broadcasts out; replies, broadcasts and the ends of channels in.
//!
//! Invariant: a broadcast of the load is recognised by its stamp, in one pass over its bytes and
//! without parsing; everything else is rare and is parsed.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::frame::Frame;

/// The protocol version on the URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Vsn {
    /// Objects in text frames, as realtime-js before 2.91.
    #[value(name = "1.0.0")]
    V1,
    /// Arrays in text frames and binary broadcasts, as realtime-js since 2.91.
    #[value(name = "2.0.0")]
    V2,
}

/// A message of the server, other than a stamped broadcast.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The answer to the join or broadcast with this ref.
    Reply { reference: u64, refusal: Option<String> },
    /// The message of a `system` push with status `error`.
    SystemError(String),
    /// `phx_error` or `phx_close`: a channel has ended.
    ChannelEnded(String),
    /// A broadcast on this topic, with its envelope.
    Broadcast { topic: String, envelope: Value },
    /// Any other message: a heartbeat's reply, presence.
    Other,
}

impl Vsn {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "1.0.0",
            Self::V2 => "2.0.0",
        }
    }

    /// Appends a masked `phx_join` with the config that realtime-js sends by default.
    pub(crate) fn push_join(self, join: &Join<'_>, out: &mut Vec<u8>) {
        let reference = join.reference.to_string();
        let presence = match self {
            Self::V1 => json!({ "key": "" }),
            Self::V2 => json!({ "key": "", "enabled": false }),
        };
        let payload = json!({
            "config": {
                "broadcast": { "ack": join.ack, "self": false },
                "presence": presence,
                "postgres_changes": [],
                "private": false,
            },
            "access_token": join.access_token,
        });
        self.push_text(Some(&reference), &reference, join.topic, "phx_join", &payload, out);
    }

    /// Appends a masked heartbeat.
    pub(crate) fn push_heartbeat(self, reference: u64, out: &mut Vec<u8>) {
        self.push_text(None, &reference.to_string(), HEARTBEAT_TOPIC, "heartbeat", &json!({}), out);
    }

    /// Appends a masked broadcast of `payload`, which is JSON: text in V1, kind 3 in V2. The
    /// `join_ref` is that of a publisher, which joins once. In V2 the topic has at most 255 bytes.
    pub(crate) fn push_broadcast(
        self,
        topic: &str,
        reference: u64,
        payload: &str,
        out: &mut Vec<u8>,
    ) {
        match self {
            Self::V1 => {
                let topic = json!(topic);
                let text = format!(
                    r#"{{"topic":{topic},"event":"broadcast","payload":{{"type":"broadcast","event":"{USER_EVENT}","payload":{payload}}},"ref":"{reference}","join_ref":"{PUBLISHER_JOIN_REF}"}}"#
                );
                Frame::Text(text.as_bytes()).push_masked(out);
            }
            Self::V2 => {
                let reference = reference.to_string();
                let header = [PUBLISHER_JOIN_REF, &reference, topic, USER_EVENT, NO_METADATA];
                let mut bytes = vec![KIND_USER_BROADCAST_PUSH];
                // The caller keeps the topic below 256 bytes.
                bytes.extend(header.map(|field| u8::try_from(field.len()).unwrap_or_default()));
                bytes.push(ENCODING_JSON);
                bytes.extend(header.concat().bytes());
                bytes.extend_from_slice(payload.as_bytes());
                Frame::Binary(&bytes).push_masked(out);
            }
        }
    }

    fn push_text(
        self,
        join_ref: Option<&str>,
        reference: &str,
        topic: &str,
        event: &str,
        payload: &Value,
        out: &mut Vec<u8>,
    ) {
        let message = match (self, join_ref) {
            (Self::V1, Some(join_ref)) => json!({
                "topic": topic, "event": event, "payload": payload, "ref": reference,
                "join_ref": join_ref,
            }),
            (Self::V1, None) => {
                json!({ "topic": topic, "event": event, "payload": payload, "ref": reference })
            }
            (Self::V2, join_ref) => json!([join_ref, reference, topic, event, payload]),
        };
        Frame::Text(message.to_string().as_bytes()).push_masked(out);
    }

    /// Parses a text frame; `None` if it is not of this protocol version.
    pub(crate) fn read(self, text: &[u8]) -> Option<Event> {
        let message = match self {
            Self::V1 => serde_json::from_slice(text).ok()?,
            Self::V2 => {
                let (_join_ref, reference, topic, event, payload): ArrayMessage =
                    serde_json::from_slice(text).ok()?;
                ObjectMessage { topic, event, payload, reference }
            }
        };
        Some(message.into_event())
    }
}

/// The parts of a `phx_join`.
#[derive(Debug)]
pub(crate) struct Join<'a> {
    /// The topic with its prefix: `realtime:bench-1`.
    pub(crate) topic: &'a str,
    pub(crate) reference: u64,
    pub(crate) ack: bool,
    pub(crate) access_token: &'a str,
}

/// The mark by which one run recognises its own broadcasts, and the time in each: `@0123abcd-` and
/// nanoseconds since the run began.
#[derive(Debug)]
pub(crate) struct Stamps {
    prefix: [u8; 10],
}

impl Stamps {
    /// Creates marks that no other run shares.
    pub(crate) fn random() -> Self {
        Self::of(fastrand::u32(..))
    }

    fn of(run: u32) -> Self {
        let mut prefix = *b"@00000000-";
        prefix[1..9].copy_from_slice(format!("{run:08x}").as_bytes());
        Self { prefix }
    }

    /// Creates a user payload of `bytes` bytes (or the few more that it needs at least), like those
    /// of production: `{"type":"bench","event_eid":"AB1","endpoints":["/live/event/AB1"],…}`.
    ///
    /// `sent` is the time since the run began, `unix` that of the wall clock, which clients use as
    /// a key.
    pub(crate) fn payload(
        &self,
        eid: &str,
        sent: Duration,
        unix: Duration,
        bytes: usize,
    ) -> String {
        let mark = String::from_utf8_lossy(&self.prefix);
        let (sent, seconds, microseconds) = (sent.as_nanos(), unix.as_secs(), unix.subsec_micros());
        let head = format!(
            r#"{{"type":"bench","event_eid":"{eid}","endpoints":["/live/event/{eid}"],"timestamp":{seconds}.{microseconds:06},"sent":"{mark}{sent}","pad":""#
        );
        let pad = bytes.saturating_sub(head.len() + r#""}"#.len());
        format!(r#"{head}{:x<pad$}"}}"#, "")
    }

    /// Returns when the broadcast in `frame` was sent; `None` if it carries no mark of this run.
    pub(crate) fn sent(&self, frame: &[u8]) -> Option<Duration> {
        let mut rest = frame;
        while let Some(at) = rest.iter().position(|byte| *byte == b'@') {
            if let Some(digits) = rest[at..].strip_prefix(&self.prefix) {
                return leading_number(digits).map(Duration::from_nanos);
            }
            rest = &rest[at + 1..];
        }
        None
    }
}

/// Returns how many messages the server merged into this one: the number after `"merged":`, else 1.
pub(crate) fn merged_count(frame: &[u8]) -> u64 {
    let mut rest = frame;
    while let Some(at) = rest.iter().position(|byte| *byte == b'm') {
        if let Some(number) = rest[at..].strip_prefix(br#"merged":"#) {
            return leading_number(number).unwrap_or(1).max(1);
        }
        rest = &rest[at + 1..];
    }
    1
}

/// The `join_ref` of every publisher: it joins one channel, with its first push.
const PUBLISHER_JOIN_REF: &str = "1";
const HEARTBEAT_TOPIC: &str = "phoenix";
const USER_EVENT: &str = "bench";
const NO_METADATA: &str = "";
const KIND_USER_BROADCAST_PUSH: u8 = 3;
const ENCODING_JSON: u8 = 1;

/// V2: `[join_ref, ref, topic, event, payload]`.
type ArrayMessage = (Option<String>, Option<String>, String, String, Value);

/// V1: `{"topic":…,"event":…,"payload":…,"ref":…}`.
#[derive(Deserialize)]
struct ObjectMessage {
    topic: String,
    event: String,
    payload: Value,
    #[serde(rename = "ref")]
    reference: Option<String>,
}

impl ObjectMessage {
    fn into_event(self) -> Event {
        let Self { topic, event, payload, reference } = self;
        match event.as_str() {
            "phx_reply" if topic == HEARTBEAT_TOPIC => Event::Other,
            "phx_reply" => match reference.and_then(|reference| reference.parse().ok()) {
                Some(reference) => Event::Reply { reference, refusal: refusal(&payload) },
                None => Event::Other,
            },
            "phx_error" | "phx_close" => Event::ChannelEnded(event),
            "broadcast" => Event::Broadcast { topic, envelope: payload },
            "system" if payload["status"] == "error" => {
                Event::SystemError(text_of(&payload["message"]))
            }
            _ => Event::Other,
        }
    }
}

/// Returns the reason in the payload of an error reply; `None` for an ok.
fn refusal(payload: &Value) -> Option<String> {
    if payload["status"] == "ok" {
        return None;
    }
    let response = &payload["response"];
    Some(text_of(response.get("reason").unwrap_or(response)))
}

/// Returns a string as it is, anything else as JSON.
fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Parses the decimal number at the start of `bytes`.
fn leading_number(bytes: &[u8]) -> Option<u64> {
    let length = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    str::from_utf8(&bytes[..length]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The payload of a masked client frame that is shorter than 64 KiB.
    fn unmask(frame: &[u8]) -> Vec<u8> {
        let key_at = if frame[1] == 0x80 | 126 { 4 } else { 2 };
        let (key, payload) = (&frame[key_at..key_at + 4], &frame[key_at + 4..]);
        payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect()
    }

    fn join(vsn: Vsn) -> Value {
        let mut out = Vec::new();
        let join = Join { topic: "realtime:a", reference: 1, ack: true, access_token: "t" };
        vsn.push_join(&join, &mut out);
        serde_json::from_slice(&unmask(&out)).unwrap()
    }

    #[test]
    fn a_join_is_that_of_realtime_js() {
        let v1 = join(Vsn::V1);
        let config = json!({
            "broadcast": { "ack": true, "self": false }, "presence": { "key": "" },
            "postgres_changes": [], "private": false,
        });
        let payload = json!({ "config": config, "access_token": "t" });
        assert_eq!(
            v1,
            json!({ "topic": "realtime:a", "event": "phx_join", "payload": payload, "ref": "1", "join_ref": "1" })
        );
        let v2 = join(Vsn::V2);
        assert_eq!(v2.as_array().unwrap()[..4], ["1", "1", "realtime:a", "phx_join"]);
        assert_eq!(v2[4]["config"]["presence"]["enabled"], false);
    }

    #[test]
    fn a_heartbeat_has_no_join_ref() {
        let mut out = Vec::new();
        Vsn::V1.push_heartbeat(7, &mut out);
        let beat = json!({ "topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "7" });
        assert_eq!(serde_json::from_slice::<Value>(&unmask(&out)).unwrap(), beat);
        out.clear();
        Vsn::V2.push_heartbeat(7, &mut out);
        let beat = json!([null, "7", "phoenix", "heartbeat", {}]);
        assert_eq!(serde_json::from_slice::<Value>(&unmask(&out)).unwrap(), beat);
    }

    #[test]
    fn a_broadcast_is_text_in_v1_and_kind_3_in_v2() {
        let mut out = Vec::new();
        Vsn::V1.push_broadcast("realtime:a", 2, r#"{"x":1}"#, &mut out);
        assert_eq!(
            serde_json::from_slice::<Value>(&unmask(&out)).unwrap(),
            json!({
                "topic": "realtime:a", "event": "broadcast", "ref": "2", "join_ref": "1",
                "payload": { "type": "broadcast", "event": "bench", "payload": { "x": 1 } },
            })
        );
        out.clear();
        Vsn::V2.push_broadcast("realtime:a", 2, r#"{"x":1}"#, &mut out);
        assert_eq!(out[0], 0x82);
        assert_eq!(unmask(&out), b"\x03\x01\x01\x0a\x05\x00\x0112realtime:abench{\"x\":1}");
    }

    #[test]
    fn a_stamp_is_found_again_and_only_by_its_run() {
        let stamps = Stamps::of(0xab);
        let sent = Duration::from_nanos(123_456_789);
        let payload = stamps.payload("AB1", sent, Duration::from_micros(5_000_007), 230);
        assert_eq!(payload.len(), 230);
        let value: Value = serde_json::from_str(&payload).unwrap();
        assert_eq!(value["endpoints"], json!(["/live/event/AB1"]));
        assert_eq!(value["timestamp"], json!(5.000_007));
        let frame = format!(r#"{{"topic":"realtime:b@c","payload":{payload},"ref":null}}"#);
        assert_eq!(stamps.sent(frame.as_bytes()), Some(sent));
        assert_eq!(Stamps::of(0xac).sent(frame.as_bytes()), None);
        assert_eq!(stamps.sent(b"@000000ab-"), None, "a mark without a time");
    }

    #[test]
    fn a_payload_is_never_cut() {
        let stamps = Stamps::of(1);
        let payload = stamps.payload("AB1", Duration::ZERO, Duration::ZERO, 10);
        assert!(payload.len() > 10);
        serde_json::from_str::<Value>(&payload).unwrap();
    }

    #[test]
    fn a_merged_message_says_how_many_it_stands_for() {
        assert_eq!(merged_count(br#"{"timestamp":1,"merged":17,"type":"x"}"#), 17);
        assert_eq!(merged_count(br#"{"timestamp":1,"type":"mm"}"#), 1);
        assert_eq!(merged_count(br#"{"merged":null}"#), 1);
    }

    #[test]
    fn replies_and_ends_are_read_in_both_versions() {
        let v1 = |text: &str| Vsn::V1.read(text.as_bytes()).unwrap();
        let ok = Event::Reply { reference: 1, refusal: None };
        let reply = r#"{"topic":"realtime:a","event":"phx_reply","payload":{"status":"ok","response":{}},"ref":"1"}"#;
        assert_eq!(v1(reply), ok);
        let reply = r#"["1","1","realtime:a","phx_reply",{"status":"ok","response":{}}]"#;
        assert_eq!(Vsn::V2.read(reply.as_bytes()).unwrap(), ok);
        assert_eq!(
            v1(
                r#"{"topic":"t","event":"phx_reply","payload":{"status":"error","response":{"reason":"no"}},"ref":"2"}"#
            ),
            Event::Reply { reference: 2, refusal: Some("no".into()) }
        );
        assert_eq!(
            v1(r#"{"topic":"t","event":"phx_error","payload":{},"ref":null}"#),
            Event::ChannelEnded("phx_error".into())
        );
        assert_eq!(
            v1(
                r#"{"topic":"t","event":"system","payload":{"status":"error","message":"m"},"ref":null}"#
            ),
            Event::SystemError("m".into())
        );
        assert_eq!(
            v1(r#"{"topic":"t","event":"presence_state","payload":{},"ref":null}"#),
            Event::Other
        );
        let beat = r#"[null,"3","phoenix","phx_reply",{"status":"ok","response":{}}]"#;
        assert_eq!(Vsn::V2.read(beat.as_bytes()), Some(Event::Other));
        assert_eq!(Vsn::V2.read(b"{}"), None);
    }
}
