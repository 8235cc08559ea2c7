//! Reads and checks the messages of one REST request.
//!
//! Source: supabase/realtime `batch_broadcast.ex` @833cf36.

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use crate::protocol::{
    message::{FIELD_BYTES_MAX, Json},
    serializer::Broadcast,
    topic::Privacy,
};

/// The body of a request.
#[derive(Deserialize)]
pub(super) struct Batch<'a> {
    #[serde(borrow)]
    pub(super) messages: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct RestFields<'a> {
    #[serde(borrow)]
    topic: Option<&'a RawValue>,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    private: Option<Value>,
    id: Option<Value>,
}

/// One message of a batch, checked.
pub(super) struct RestMessage {
    pub(super) topic: String,
    pub(super) privacy: Privacy,
    pub(super) broadcast: Broadcast,
}

impl RestMessage {
    /// Checks a message.
    ///
    /// # Errors
    /// The mistakes by field, as the reference server words them: `{"topic":["can't be blank"]}`.
    pub(super) fn check(message: &RawValue, payload_bytes_max: usize) -> Result<Self, Value> {
        // The derived reader would take an array of the fields, too.
        let is_object = message.get().starts_with('{');
        let fields = serde_json::from_str::<RestFields<'_>>(message.get());
        let Some(fields) = fields.ok().filter(|_| is_object) else {
            return Err(json!({ "topic": ["is invalid"] }));
        };
        let mut errors = serde_json::Map::new();
        let topic = text_field("topic", fields.topic, &mut errors);
        let event = text_field("event", fields.event, &mut errors);
        let privacy = match &fields.private {
            None | Some(Value::Null | Value::Bool(false)) => Privacy::Public,
            Some(Value::Bool(true)) => Privacy::Private,
            Some(Value::String(text)) if matches!(text.as_str(), "true" | "1") => Privacy::Private,
            Some(Value::String(text)) if matches!(text.as_str(), "false" | "0") => Privacy::Public,
            Some(_) => {
                errors.insert("private".to_owned(), json!(["is invalid"]));
                Privacy::Private
            }
        };
        let payload = fields.payload.map(RawValue::get).filter(|text| *text != "null");
        match payload {
            None => drop(errors.insert("payload".to_owned(), json!(["can't be blank"]))),
            Some(payload) if !payload.starts_with('{') => {
                errors.insert("payload".to_owned(), json!(["is invalid"]));
            }
            Some(payload) if payload.len() > payload_bytes_max => {
                let text = "Payload size exceeds tenant limit";
                errors.insert("payload".to_owned(), json!([text]));
            }
            Some(_) => {}
        }
        if !errors.is_empty() {
            return Err(errors.into());
        }
        let meta = match fields.id {
            Some(Value::String(id)) => format!(",\"meta\":{}", json!({ "id": id })),
            _ => String::new(),
        };
        // To both serializers as text, the payload as it was sent.
        let envelope = format!(
            "{{\"event\":{}{meta},\"payload\":{},\"type\":\"broadcast\"}}",
            Value::from(event),
            payload.unwrap_or("{}"),
        );
        let envelope =
            Json::parse(envelope.into()).map_err(|_deep| json!({ "payload": ["is invalid"] }))?;
        Ok(Self { topic, privacy, broadcast: Broadcast::Envelope(envelope) })
    }
}

/// Reads a text that is neither blank nor longer than a frame's field.
fn text_field(
    name: &str,
    value: Option<&RawValue>,
    errors: &mut serde_json::Map<String, Value>,
) -> String {
    let mut wrong = |text: &str| drop(errors.insert(name.to_owned(), json!([text])));
    let Some(value) = value.filter(|value| value.get() != "null") else {
        wrong("can't be blank");
        return String::new();
    };
    match serde_json::from_str::<String>(value.get()) {
        Ok(text) if text.trim().is_empty() => wrong("can't be blank"),
        Ok(text) if text.len() > FIELD_BYTES_MAX => wrong("is too long"),
        Ok(text) => return text,
        Err(_no_text) => wrong("is invalid"),
    }
    String::new()
}
