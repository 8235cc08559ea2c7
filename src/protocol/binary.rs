//! The binary frames of serializer V2: kind 3 in, kind 4 out.
//!
//! ```text
//! kind 3, client to server: 03 | join_ref len | ref len | topic len | user_event len | metadata len | encoding
//!                              | join_ref | ref | topic | user_event | metadata | user payload
//! kind 4, server to client: 04 | topic len | user_event len | metadata len | encoding
//!                              | topic | user_event | metadata | user payload
//! ```
//!
//! Lengths are one byte; an empty string is null; encoding 0 is binary, anything else JSON.
//! Source: supabase-js realtime-js `serializer.ts`, supabase/realtime `user_broadcast.ex` @833cf36.

use bytes::{Buf, Bytes};

use super::message::{
    FIELD_BYTES_MAX, Json, Malformed, Message, Payload, Ref, UserBroadcast, UserPayload,
};

const USER_BROADCAST_PUSH: u8 = 3;
const USER_BROADCAST: u8 = 4;
const ENCODING_BINARY: u8 = 0;
const ENCODING_JSON: u8 = 1;

/// Reads a kind 3 frame. The client's metadata is checked and then dropped, as upstream.
///
/// # Errors
/// [`Malformed`]; the frame is then ignored.
pub(super) fn decode(mut frame: Bytes) -> Result<Message, Malformed> {
    if frame.try_get_u8().map_err(truncated)? != USER_BROADCAST_PUSH {
        return Err(Malformed::UnknownKind);
    }
    let mut lengths = [0_u8; 5];
    frame.try_copy_to_slice(&mut lengths).map_err(truncated)?;
    let encoding = frame.try_get_u8().map_err(truncated)?;
    let [join_ref, reference, topic, user_event, metadata] = lengths;
    let join_ref = take_text(&mut frame, join_ref)?;
    let reference = take_text(&mut frame, reference)?;
    let topic = take_text(&mut frame, topic)?;
    let user_event = take_text(&mut frame, user_event)?;
    let metadata = take(&mut frame, metadata)?;
    if !metadata.is_empty() && !Json::parse(metadata).is_ok_and(|json| json.is_object()) {
        return Err(Malformed::Metadata);
    }
    let payload = if encoding == ENCODING_BINARY {
        UserPayload::Binary(frame)
    } else {
        UserPayload::Json(Json::parse(frame).map_err(|_not_json| Malformed::NotJson)?)
    };
    Ok(Message {
        join_ref: null_if_empty(&join_ref),
        reference: null_if_empty(&reference),
        topic,
        event: "broadcast".into(),
        payload: Payload::UserBroadcast(UserBroadcast { user_event, payload }),
    })
}

/// Writes a kind 4 frame. Returns `None` if a field does not fit its length byte.
pub(super) fn encode(
    topic: &str,
    broadcast: &UserBroadcast,
    metadata: Option<&Json>,
) -> Option<Bytes> {
    let metadata = metadata.map_or("", Json::as_str);
    let (encoding, payload): (u8, &[u8]) = match &broadcast.payload {
        UserPayload::Json(json) => (ENCODING_JSON, json.as_str().as_bytes()),
        UserPayload::Binary(bytes) => (ENCODING_BINARY, bytes),
    };
    let fields = [topic, &broadcast.user_event, metadata];
    let mut frame = Vec::with_capacity(
        5 + fields.iter().map(|field| field.len()).sum::<usize>() + payload.len(),
    );
    frame.push(USER_BROADCAST);
    for field in fields {
        frame.push(u8::try_from(field.len()).ok()?);
    }
    frame.push(encoding);
    for field in fields {
        frame.extend_from_slice(field.as_bytes());
    }
    frame.extend_from_slice(payload);
    Some(frame.into())
}

fn take(frame: &mut Bytes, length: u8) -> Result<Bytes, Malformed> {
    let length = usize::from(length);
    if frame.len() < length {
        return Err(Malformed::Truncated);
    }
    Ok(frame.split_to(length))
}

fn take_text(frame: &mut Bytes, length: u8) -> Result<Box<str>, Malformed> {
    const { assert!(FIELD_BYTES_MAX == u8::MAX as usize) };
    let bytes = take(frame, length)?;
    std::str::from_utf8(&bytes).map(Into::into).map_err(|_not_utf8| Malformed::NotUtf8)
}

fn null_if_empty(text: &str) -> Option<Ref> {
    (!text.is_empty()).then(|| text.into())
}

fn truncated(_: bytes::TryGetError) -> Malformed {
    Malformed::Truncated
}
