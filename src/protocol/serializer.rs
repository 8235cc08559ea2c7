//! The two serializers: V1 writes objects, V2 arrays and binary frames.
//!
//! Invariants: a broadcast's user payload is copied as it came, never re-serialised; a client of
//! V1 is never sent a binary frame, a client of V2 no binary kind but 4.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::{Message as Frame, Utf8Bytes};

use super::{
    binary,
    message::{
        CONTROL_BYTES_MAX, FIELD_BYTES_MAX, Json, Malformed, Message, Payload, Ref, UserBroadcast,
        UserPayload, write_json_string,
    },
};

/// How a socket's frames are written, chosen by `vsn` at the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Serializer {
    /// `vsn=1.0.0`: `{"topic":…,"event":…,"payload":…,"ref":…,"join_ref":…}`.
    V1,
    /// `vsn=2.0.0`: `[join_ref, ref, topic, event, payload]`, and binary user broadcasts.
    V2,
}

/// A message of the server to one client: a reply, or a push of a channel.
#[derive(Debug, Clone, Copy)]
pub struct Push<'a> {
    /// The channel's; V1 does not send it.
    pub join_ref: Option<&'a Ref>,
    /// The ref that is answered, or null.
    pub reference: Option<&'a Ref>,
    /// The client's topic, with its prefix.
    pub topic: &'a str,
    /// The protocol event.
    pub event: &'a str,
    /// JSON.
    pub payload: &'a str,
}

/// A message to all members of a topic.
#[derive(Debug, Clone, PartialEq)]
pub enum Broadcast {
    /// From a text frame: the whole payload of its envelope,
    /// `{"type":"broadcast","event":…,"payload":…}`, passed on as it came.
    Envelope(Json),
    /// From a kind 3 frame, a REST single message, or the database: the envelope is ours.
    User {
        /// Event and payload.
        message: UserBroadcast,
        /// `{"id":…}`, if there is one.
        metadata: Option<Json>,
    },
}

impl Serializer {
    /// Chooses the serializer: absent is 1.0.0, as semantic versions `~> 1.0.0` and `~> 2.0.0`.
    #[must_use]
    pub fn from_vsn(vsn: Option<&str>) -> Option<Self> {
        let Some(vsn) = vsn else {
            return Some(Self::V1);
        };
        let version = semver::Version::parse(vsn).ok()?;
        match (version.major, version.minor, version.pre.is_empty()) {
            (1, 0, true) => Some(Self::V1),
            (2, 0, true) => Some(Self::V2),
            _ => None,
        }
    }

    /// Reads a client's frame, text or binary.
    ///
    /// # Errors
    /// [`Malformed`]; the frame is then ignored, the socket goes on.
    pub fn decode(self, frame: Frame) -> Result<Message, Malformed> {
        match (self, frame) {
            (_, Frame::Text(text)) => self.decode_text(&text),
            // The opcode is not checked on V1: a binary frame is read as JSON.
            (Self::V1, Frame::Binary(bytes)) => {
                let text = Utf8Bytes::try_from(bytes).map_err(|_not_utf8| Malformed::NotJson)?;
                self.decode_text(&text)
            }
            (Self::V2, Frame::Binary(bytes)) => binary::decode(bytes),
            (_, Frame::Ping(_) | Frame::Pong(_) | Frame::Close(_) | Frame::Frame(_)) => {
                Err(Malformed::UnknownKind)
            }
        }
    }

    fn decode_text(self, text: &Utf8Bytes) -> Result<Message, Malformed> {
        let envelope = match self {
            // The derived reader would take an array of the fields, too.
            Self::V1 if text.trim_start().starts_with('[') => return Err(Malformed::WrongShape),
            Self::V1 => serde_json::from_str::<ObjectEnvelope<'_>>(text).map(Envelope::from),
            Self::V2 => serde_json::from_str::<ArrayEnvelope<'_>>(text).map(|array| array.0),
        };
        let envelope = envelope.map_err(|error| {
            if error.is_data() { Malformed::WrongShape } else { Malformed::NotJson }
        })?;
        for length in [
            envelope.topic.len(),
            envelope.event.len(),
            envelope.reference.as_ref().map_or(0, ref_length),
            envelope.join_ref.as_ref().map_or(0, ref_length),
        ] {
            if length > FIELD_BYTES_MAX {
                return Err(Malformed::TooLong);
            }
        }
        let size = envelope.payload.get().len();
        let payload = if size > CONTROL_BYTES_MAX && envelope.event != "broadcast" {
            Payload::TooLarge
        } else {
            let json = Json::part_of(text, envelope.payload);
            Payload::Json(json.map_err(|_too_deep| Malformed::WrongShape)?)
        };
        Ok(Message {
            join_ref: envelope.join_ref,
            reference: envelope.reference,
            topic: envelope.topic.into(),
            event: envelope.event.into(),
            payload,
        })
    }

    /// Writes a reply or a push of a channel; always a text frame.
    #[must_use]
    pub fn encode(self, push: &Push<'_>) -> Frame {
        let mut out = String::with_capacity(push.topic.len() + push.payload.len() + 96);
        match self {
            Self::V1 => {
                out.push_str("{\"ref\":");
                write_ref(&mut out, push.reference);
                out.push_str(",\"event\":");
                write_json_string(&mut out, push.event);
                out.push_str(",\"payload\":");
                out.push_str(push.payload);
                out.push_str(",\"topic\":");
                write_json_string(&mut out, push.topic);
                out.push('}');
            }
            Self::V2 => {
                out.push('[');
                write_ref(&mut out, push.join_ref);
                out.push(',');
                write_ref(&mut out, push.reference);
                out.push(',');
                write_json_string(&mut out, push.topic);
                out.push(',');
                write_json_string(&mut out, push.event);
                out.push(',');
                out.push_str(push.payload);
                out.push(']');
            }
        }
        Frame::text(out)
    }

    /// Writes a broadcast for the members of `topic`. Returns `None` if this serializer cannot
    /// carry it: binary payloads on V1.
    #[must_use]
    pub fn encode_broadcast(self, topic: &str, broadcast: &Broadcast) -> Option<Frame> {
        let (message, metadata) = match broadcast {
            Broadcast::Envelope(payload) => {
                return Some(self.encode(&Push {
                    join_ref: None,
                    reference: None,
                    topic,
                    event: "broadcast",
                    payload: payload.as_str(),
                }));
            }
            Broadcast::User { message, metadata } => (message, metadata.as_ref()),
        };
        if self == Self::V2
            && let Some(frame) = binary::encode(topic, message, metadata)
        {
            return Some(Frame::Binary(frame));
        }
        let UserPayload::Json(payload) = &message.payload else {
            return None;
        };
        // The order of keys is the reference server's.
        let mut out = String::with_capacity(payload.len() + 96);
        out.push_str("{\"event\":");
        write_json_string(&mut out, &message.user_event);
        if let Some(metadata) = metadata {
            out.push_str(",\"meta\":");
            out.push_str(metadata.as_str());
        }
        out.push_str(",\"payload\":");
        out.push_str(payload.as_str());
        out.push_str(",\"type\":\"broadcast\"}");
        Some(self.encode(&Push {
            join_ref: None,
            reference: None,
            topic,
            event: "broadcast",
            payload: &out,
        }))
    }
}

struct Envelope<'a> {
    join_ref: Option<Ref>,
    reference: Option<Ref>,
    topic: Cow<'a, str>,
    event: Cow<'a, str>,
    payload: &'a RawValue,
}

/// V1. `ref` must be there, `join_ref` may be; further keys are ignored.
#[derive(Deserialize)]
struct ObjectEnvelope<'a> {
    #[serde(borrow)]
    topic: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    payload: &'a RawValue,
    #[serde(rename = "ref", deserialize_with = "nullable")]
    reference: Option<Ref>,
    #[serde(default, deserialize_with = "nullable")]
    join_ref: Option<Ref>,
}

impl<'a> From<ObjectEnvelope<'a>> for Envelope<'a> {
    fn from(object: ObjectEnvelope<'a>) -> Self {
        let ObjectEnvelope { topic, event, payload, reference, join_ref } = object;
        Self { join_ref, reference, topic, event, payload }
    }
}

/// V2: five elements; further ones are ignored.
struct ArrayEnvelope<'a>(Envelope<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for ArrayEnvelope<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ArrayVisitor)
    }
}

struct ArrayVisitor;

impl<'de> serde::de::Visitor<'de> for ArrayVisitor {
    type Value = ArrayEnvelope<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[join_ref, ref, topic, event, payload]")
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let missing = |place| serde::de::Error::invalid_length(place, &self);
        let envelope = Envelope {
            join_ref: seq.next_element::<NullableRef>()?.ok_or_else(|| missing(0))?.0,
            reference: seq.next_element::<NullableRef>()?.ok_or_else(|| missing(1))?.0,
            topic: seq.next_element::<CowStr<'de>>()?.ok_or_else(|| missing(2))?.0,
            event: seq.next_element::<CowStr<'de>>()?.ok_or_else(|| missing(3))?.0,
            payload: seq.next_element()?.ok_or_else(|| missing(4))?,
        };
        while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
        Ok(ArrayEnvelope(envelope))
    }
}

#[derive(Deserialize)]
struct CowStr<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
struct NullableRef(#[serde(deserialize_with = "nullable")] Option<Ref>);

/// A ref that may be null but, without `default`, not absent.
fn nullable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ref>, D::Error> {
    let raw = <&RawValue>::deserialize(deserializer)?;
    if raw.get() == "null" {
        return Ok(None);
    }
    serde_json::from_str(raw.get()).map(Some).map_err(serde::de::Error::custom)
}

fn write_ref(out: &mut String, reference: Option<&Ref>) {
    match reference {
        Some(reference) => reference.write_json(out),
        None => out.push_str("null"),
    }
}

fn ref_length(reference: &Ref) -> usize {
    let (Ref::Text(text) | Ref::Number(text)) = reference;
    text.len()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_are_matched_as_the_reference_server_does() {
        for (vsn, serializer) in [
            (None, Some(Serializer::V1)),
            (Some("1.0.0"), Some(Serializer::V1)),
            (Some("1.0.7"), Some(Serializer::V1)),
            (Some("2.0.0"), Some(Serializer::V2)),
            (Some("1.1.0"), None),
            (Some("3.0.0"), None),
            (Some("2.0.0-rc.1"), None),
            (Some("2"), None),
            (Some("abc"), None),
            (Some(""), None),
        ] {
            assert_eq!(Serializer::from_vsn(vsn), serializer, "{vsn:?}");
        }
    }

    #[test]
    fn a_numeric_ref_is_echoed_as_it_was_written() {
        let frame = Frame::text(r#"[null,1e2,"phoenix","heartbeat",{}]"#);
        let message = Serializer::V2.decode(frame).unwrap();
        assert_eq!(message.reference, Some(Ref::Number("1e2".into())));
    }

    #[test]
    fn an_array_is_no_message_of_v1_whatever_is_in_it() {
        let frame = Frame::text(r#"["phoenix","heartbeat",{},"1"]"#);
        assert_eq!(Serializer::V1.decode(frame), Err(Malformed::WrongShape));
    }

    #[test]
    fn a_field_is_accepted_at_the_bound_and_refused_one_past_it() {
        let frame =
            |length: usize| Frame::text(format!(r#"[null,"1","{}","e",{{}}]"#, "t".repeat(length)));
        assert!(Serializer::V2.decode(frame(FIELD_BYTES_MAX)).is_ok());
        assert_eq!(Serializer::V2.decode(frame(FIELD_BYTES_MAX + 1)), Err(Malformed::TooLong));
    }

    /// The parsers of payloads never see it, and nothing of it is kept while a join waits.
    #[test]
    fn a_control_payload_above_the_bound_is_dropped_with_its_frame_and_a_broadcast_is_not() {
        let decode = |event: &str, size: usize| {
            let text = "x".repeat(size - 2);
            let (v1, v2) = (
                format!(r#"{{"topic":"t","event":"{event}","ref":"1","payload":"{text}"}}"#),
                format!(r#"[null,"1","t","{event}","{text}"]"#),
            );
            [(Serializer::V1, v1), (Serializer::V2, v2)].map(|(serializer, text)| {
                let text = Utf8Bytes::from(text);
                let message = serializer.decode(Frame::Text(text.clone())).unwrap();
                (message.payload, Bytes::from(text).is_unique())
            })
        };
        for event in ["phx_join", "access_token", "phx_leave", "heartbeat", "presence", "else"] {
            for (payload, is_kept) in decode(event, CONTROL_BYTES_MAX) {
                assert_eq!((payload.len(), is_kept), (CONTROL_BYTES_MAX, false), "{event}");
            }
            for (payload, is_dropped) in decode(event, CONTROL_BYTES_MAX + 1) {
                assert_eq!((payload, is_dropped), (Payload::TooLarge, true), "{event}");
            }
        }
        for (payload, _) in decode("broadcast", CONTROL_BYTES_MAX + 1) {
            assert_eq!(payload.len(), CONTROL_BYTES_MAX + 1);
        }
    }

    #[test]
    fn what_does_not_fit_a_binary_frame_is_written_as_text() {
        let long = "e".repeat(FIELD_BYTES_MAX + 1);
        let broadcast = Broadcast::User {
            message: UserBroadcast {
                user_event: long.into(),
                payload: UserPayload::Json(Json::EMPTY),
            },
            metadata: None,
        };
        assert!(matches!(
            Serializer::V2.encode_broadcast("realtime:a", &broadcast),
            Some(Frame::Text(_))
        ));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic_a_decoder(bytes: Vec<u8>, kind in 0_u8..6) {
            let mut framed = vec![kind];
            framed.extend_from_slice(&bytes);
            for serializer in [Serializer::V1, Serializer::V2] {
                let _ = serializer.decode(Frame::binary(framed.clone()));
                let _ = serializer.decode(Frame::binary(bytes.clone()));
                let _ = serializer.decode(Frame::text(String::from_utf8_lossy(&bytes).into_owned()));
            }
        }

        #[test]
        fn random_json_never_panics_a_decoder(text in r#"[\[\]{}",:a-z0-9\\ ]{0,80}"#) {
            for serializer in [Serializer::V1, Serializer::V2] {
                let _ = serializer.decode(Frame::text(text.clone()));
            }
        }

        #[test]
        fn what_is_pushed_can_be_read_back(topic in ".{0,40}", reference in ".{1,10}", event in "[a-z_]{1,20}") {
            let (reference, payload) = (Ref::from(reference.as_str()), r#"{"a":[1,"x"]}"#);
            for serializer in [Serializer::V1, Serializer::V2] {
                let push = Push {
                    join_ref: None, reference: Some(&reference), topic: &topic, event: &event, payload,
                };
                let message = serializer.decode(serializer.encode(&push)).unwrap();
                prop_assert_eq!(&*message.topic, topic.as_str());
                prop_assert_eq!(&*message.event, event.as_str());
                prop_assert_eq!(message.reference, Some(reference.clone()));
                let Payload::Json(read) = message.payload else { panic!("text") };
                prop_assert_eq!(read.as_str(), payload);
            }
        }
    }
}
