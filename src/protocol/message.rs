//! Messages as Phoenix means them, before a serializer has written them or after it has read them.
//!
//! Invariants: every string of a [`Message`] is at most [`FIELD_BYTES_MAX`] long; a [`Json`] is
//! valid JSON in UTF-8, nested at most [`DEPTH_MAX`] deep; nothing but a broadcast carries more than
//! [`CONTROL_BYTES_MAX`].

use std::{collections::HashMap, fmt};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::Utf8Bytes;

/// Longest topic, event, ref and user event, in bytes: what one length byte of the binary
/// serializer can say. Longer ones are refused at input, whatever the serializer.
pub const FIELD_BYTES_MAX: usize = 255;

/// Deepest nesting of a payload: the default of the common JSON parsers.
pub const DEPTH_MAX: usize = 128;

/// Largest payload of a message that is no broadcast, in bytes; a larger one is refused unparsed.
/// A join has room for two tokens of 8 KiB and for a hundred bindings of Postgres changes with long
/// filters; nothing else that a client library sends comes near.
pub const CONTROL_BYTES_MAX: usize = 64 * 1024;

/// A client's message.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The `ref` of the join that made the channel, as the client believes.
    pub join_ref: Option<Ref>,
    /// Names this push, so that its reply can be told from others.
    pub reference: Option<Ref>,
    /// As sent: `realtime:room-1`, `phoenix`.
    pub topic: Box<str>,
    /// The protocol event: `phx_join`, `broadcast`.
    pub event: Box<str>,
    /// What comes with it.
    pub payload: Payload,
}

/// What a client's message carries.
#[derive(Debug, Clone, PartialEq)]
pub enum Payload {
    /// The payload of a text frame, or of a binary one that holds JSON.
    Json(Json),
    /// A user broadcast push of the binary serializer (kind 3), whose event is `broadcast`.
    UserBroadcast(UserBroadcast),
    /// More than [`CONTROL_BYTES_MAX`] for an event other than `broadcast`. The bytes are not kept.
    TooLarge,
}

impl Payload {
    /// Length in bytes, of what is kept.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Json(json) => json.len(),
            Self::UserBroadcast(broadcast) => broadcast.payload.len(),
            Self::TooLarge => 0,
        }
    }

    /// The same payload in memory of its own. A payload shares the memory of the frame, and of the
    /// read that the frame came with, either of which may be much larger.
    #[must_use]
    pub fn detached(self) -> Self {
        let detach = |json: Json| Json(json.as_str().to_owned().into());
        match self {
            Self::Json(json) => Self::Json(detach(json)),
            Self::UserBroadcast(UserBroadcast { user_event, payload }) => {
                let payload = match payload {
                    UserPayload::Json(json) => UserPayload::Json(detach(json)),
                    UserPayload::Binary(bytes) => {
                        UserPayload::Binary(Bytes::copy_from_slice(&bytes))
                    }
                };
                Self::UserBroadcast(UserBroadcast { user_event, payload })
            }
            Self::TooLarge => Self::TooLarge,
        }
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is an object with a value of this name that is not null.
    #[must_use]
    pub fn has_field(&self, name: &str) -> bool {
        let Self::Json(json) = self else { return false };
        let fields = serde_json::from_str::<HashMap<String, &RawValue>>(json.as_str());
        fields.is_ok_and(|fields| fields.get(name).is_some_and(|value| value.get() != "null"))
    }
}

/// A user's event with its payload apart from the envelope.
#[derive(Debug, Clone, PartialEq)]
pub struct UserBroadcast {
    /// The application's event: `cursor-move`.
    pub user_event: Box<str>,
    /// The payload, carried as it came.
    pub payload: UserPayload,
}

/// The payload of a user broadcast.
#[derive(Debug, Clone, PartialEq)]
pub enum UserPayload {
    /// Encoding 1.
    Json(Json),
    /// Encoding 0: any bytes. Clients of serializer V1 cannot receive it.
    Binary(Bytes),
}

impl UserPayload {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Json(json) => json.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An opaque `ref` or `join_ref`: a string, or a number where a client sends one; echoed as it
/// came, never computed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ref {
    /// What every client library sends: `"1"`.
    Text(Box<str>),
    /// Kept as written: `22`.
    Number(Box<str>),
}

impl Ref {
    /// Appends the ref as JSON.
    pub(crate) fn write_json(&self, out: &mut String) {
        match self {
            Self::Text(text) => write_json_string(out, text),
            Self::Number(number) => out.push_str(number),
        }
    }

    /// Whether the ref is the empty string: a leftover of a join that was answered too late.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Text(text) if text.is_empty())
    }
}

impl From<&str> for Ref {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl fmt::Display for Ref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::Number(text) => f.write_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Ref {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?.get();
        let parsed = if raw.starts_with('"') {
            serde_json::from_str::<String>(raw).map(|text| Self::Text(text.into()))
        } else {
            serde_json::from_str::<serde_json::Number>(raw).map(|_| Self::Number(raw.into()))
        };
        parsed.map_err(|error| de::Error::custom(error.to_string()))
    }
}

/// A JSON value that is carried, not parsed: shared bytes which are known to be valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json(Utf8Bytes);

impl Json {
    /// The empty object.
    pub const EMPTY: Self = Self(Utf8Bytes::from_static("{}"));

    /// Checks that `bytes` are one JSON value in UTF-8, nested at most [`DEPTH_MAX`] deep.
    ///
    /// # Errors
    /// [`NotJson`] otherwise.
    pub fn parse(bytes: Bytes) -> Result<Self, NotJson> {
        let text = Utf8Bytes::try_from(bytes).map_err(|_not_utf8| NotJson)?;
        serde_json::from_str::<&RawValue>(&text).map_err(|_syntax| NotJson)?;
        if is_too_deep(&text) {
            return Err(NotJson);
        }
        Ok(Self(text))
    }

    /// A part of a text frame that the JSON parser has already accepted, sharing its bytes.
    ///
    /// # Errors
    /// [`NotJson`] if it is nested too deep.
    pub(crate) fn part_of(frame: &Utf8Bytes, part: &RawValue) -> Result<Self, NotJson> {
        let shared: &Bytes = frame.as_ref();
        if is_too_deep(part.get()) {
            return Err(NotJson);
        }
        let part = shared.slice_ref(part.get().as_bytes());
        Ok(Self(Utf8Bytes::try_from(part).map_err(|_not_utf8| NotJson)?))
    }

    /// Made from a value of ours.
    pub(crate) fn from_value(value: &serde_json::Value) -> Self {
        Self(value.to_string().into())
    }

    /// The JSON text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Never: a JSON value has at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the value is an object.
    #[must_use]
    pub fn is_object(&self) -> bool {
        self.0.trim_start().starts_with('{')
    }
}

/// The bytes are not one JSON value that we carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a JSON value in UTF-8, nested at most {DEPTH_MAX} deep")]
pub struct NotJson;

/// Why a client's frame is not a message. The frame is dropped and counted, nothing else happens.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    thiserror::Error,
    strum::VariantArray,
    strum::IntoStaticStr,
)]
#[strum(serialize_all = "snake_case")]
pub enum Malformed {
    /// The text, or the payload of a binary frame that says so, is not JSON.
    #[error("not JSON")]
    NotJson,
    /// The JSON is not of the serializer's shape.
    #[error("JSON of the wrong shape")]
    WrongShape,
    /// A binary frame ends before its header or fields do.
    #[error("truncated binary frame")]
    Truncated,
    /// A binary frame of a kind that clients do not send.
    #[error("unknown kind of binary frame")]
    UnknownKind,
    /// A field of a binary header is not UTF-8.
    #[error("field is not UTF-8")]
    NotUtf8,
    /// The metadata of a user broadcast is not a JSON object.
    #[error("metadata is not a JSON object")]
    Metadata,
    /// A topic, event or ref is longer than [`FIELD_BYTES_MAX`].
    #[error("field longer than {FIELD_BYTES_MAX} bytes")]
    TooLong,
}

impl Malformed {
    /// The label of the metric and of the vectors.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Appends `text` as a JSON string.
pub(crate) fn write_json_string(out: &mut String, text: &str) {
    // A plain string is the rule: no byte of it needs an escape.
    if text.bytes().all(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\') {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        out.push_str(&serde_json::Value::from(text).to_string());
    }
}

/// Whether brackets outside strings are nested deeper than [`DEPTH_MAX`].
fn is_too_deep(json: &str) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return true;
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_is_accepted_up_to_the_bound_and_not_beyond() {
        let nested =
            |depth: usize| Bytes::from(format!("{}{}", "[".repeat(depth), "]".repeat(depth)));
        assert!(Json::parse(nested(DEPTH_MAX)).is_ok());
        assert_eq!(Json::parse(nested(DEPTH_MAX + 1)), Err(NotJson));
        assert!(Json::parse(format!("\"{}\"", "[".repeat(DEPTH_MAX + 1)).into()).is_ok());
        assert!(Json::parse(format!("\"\\\"{}\"", "[".repeat(DEPTH_MAX + 1)).into()).is_ok());
    }

    #[test]
    fn a_string_that_needs_escapes_gets_them() {
        let mut out = String::new();
        write_json_string(&mut out, "a\"b\\c\n");
        assert_eq!(out, r#""a\"b\\c\n""#);
    }
}
