//! Reads and checks the messages of one REST request.
//!
//! Invariants: a batch is read one message after the other, and no further than one past its bound;
//! beside the messages that are sent, nothing grows with the body; an answer describes a few
//! mistakes and counts the rest.
//!
//! Source: supabase/realtime `batch_broadcast.ex` @833cf36.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};
use serde_json::{Value, json, value::RawValue};

use crate::protocol::{
    message::{FIELD_BYTES_MAX, Json},
    serializer::Broadcast,
    topic::Privacy,
};

/// Most messages with mistakes that one answer describes.
const DESCRIBED_MAX: usize = 10;

/// The body of a request.
#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RestFields<'a> {
    #[serde(borrow)]
    topic: Option<&'a RawValue>,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    private: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

/// Why a batch is not sent.
pub(super) enum BatchError {
    /// The body is no JSON object, or its `messages` are no list.
    Malformed,
    /// The batch has more messages than it may.
    TooMany,
    /// The mistakes, as the client is told them: `{"messages":[{},{"topic":["can't be blank"]}]}`.
    Invalid(Value),
}

/// The bounds of a batch.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Most messages.
    pub(super) messages_max: usize,
    /// Largest payload of a message.
    pub(super) payload_bytes_max: usize,
}

/// The messages of a batch, as far as they have been read.
struct Batch {
    bounds: Bounds,
    /// How many messages have been read.
    count: usize,
    /// The messages, while none has a mistake.
    messages: Vec<RestMessage>,
    /// The mistakes of each message up to the last that is described, `{}` for none.
    mistakes: Vec<Value>,
    /// How many messages have mistakes.
    mistaken: usize,
}

/// Reads the messages of a body, all of them or none.
///
/// # Errors
/// [`BatchError`]; of a batch with too many messages, only the first one too many has been read.
pub(super) fn read(body: &[u8], bounds: Bounds) -> Result<Vec<RestMessage>, BatchError> {
    let mut batch =
        Batch { bounds, count: 0, messages: Vec::new(), mistakes: Vec::new(), mistaken: 0 };
    batch.read(body)?;
    batch.finish()
}

impl Batch {
    fn read(&mut self, body: &[u8]) -> Result<(), BatchError> {
        let body: Body<'_> =
            serde_json::from_slice(body).map_err(|_syntax| BatchError::Malformed)?;
        let Some(list) = body.messages else { return Ok(()) };
        let mut list = serde_json::Deserializer::from_str(list.get());
        let read = list.deserialize_seq(&mut *self);
        if self.count > self.bounds.messages_max {
            return Err(BatchError::TooMany);
        }
        read.map_err(|_no_list| BatchError::Malformed)
    }

    /// Checks the next message.
    fn take(&mut self, message: &RawValue) {
        let is_described = self.mistaken < DESCRIBED_MAX;
        let mistakes = match RestMessage::check(message, self.bounds.payload_bytes_max) {
            Ok(message) => {
                if self.mistaken == 0 {
                    self.messages.push(message);
                }
                json!({})
            }
            Err(mistakes) => {
                self.messages = Vec::new();
                self.mistaken += 1;
                mistakes
            }
        };
        if is_described {
            self.mistakes.push(mistakes);
        }
    }

    fn finish(mut self) -> Result<Vec<RestMessage>, BatchError> {
        if self.count == 0 {
            return Err(BatchError::Invalid(json!({ "messages": ["can't be blank"] })));
        }
        if self.mistaken == 0 {
            return Ok(self.messages);
        }
        while self.mistaken <= DESCRIBED_MAX && self.mistakes.len() < self.count {
            self.mistakes.push(json!({}));
        }
        let mut errors = json!({ "messages": self.mistakes });
        if self.mistaken > DESCRIBED_MAX {
            errors["more"] = (self.mistaken - DESCRIBED_MAX).into();
        }
        Err(BatchError::Invalid(errors))
    }
}

impl<'de> Visitor<'de> for &mut Batch {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of messages")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(message) = list.next_element::<&RawValue>()? {
            self.count += 1;
            if self.count > self.bounds.messages_max {
                return Err(A::Error::custom("too many messages"));
            }
            self.take(message);
        }
        Ok(())
    }
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
    fn check(message: &RawValue, payload_bytes_max: usize) -> Result<Self, Value> {
        // The derived reader would take an array of the fields, too.
        let is_object = message.get().starts_with('{');
        let fields = serde_json::from_str::<RestFields<'_>>(message.get());
        let Some(fields) = fields.ok().filter(|_| is_object) else {
            return Err(json!({ "topic": ["is invalid"] }));
        };
        let mut errors = serde_json::Map::new();
        let topic = text_field("topic", fields.topic, &mut errors);
        let event = text_field("event", fields.event, &mut errors);
        let privacy = match fields.private.map_or("null", RawValue::get) {
            "null" | "false" | "\"false\"" | "\"0\"" => Privacy::Public,
            "true" | "\"true\"" | "\"1\"" => Privacy::Private,
            _invalid => {
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
        // An id of another type than text is none.
        let id = fields.id.map(RawValue::get).filter(|id| id.starts_with('"'));
        let meta = id.map_or_else(String::new, |id| format!(",\"meta\":{{\"id\":{id}}}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { messages_max: 1000, payload_bytes_max: 1000 };
    const GOOD: &str = r#"{"topic":"t","event":"e","payload":{}}"#;

    fn batch() -> Batch {
        let (messages, mistakes) = (Vec::new(), Vec::new());
        Batch { bounds: BOUNDS, count: 0, messages, mistakes, mistaken: 0 }
    }

    /// A body with `count` messages.
    fn body(message: &str, count: usize) -> String {
        format!("{{\"messages\":[{}]}}", vec![message; count].join(","))
    }

    fn errors(body: &str) -> Value {
        match read(body.as_bytes(), BOUNDS) {
            Err(BatchError::Invalid(errors)) => errors,
            Ok(_) | Err(BatchError::Malformed | BatchError::TooMany) => panic!("not invalid"),
        }
    }

    #[test]
    fn a_batch_is_read_up_to_its_bound_and_no_further() {
        assert_eq!(read(body(GOOD, 1000).as_bytes(), BOUNDS).ok().map(|all| all.len()), Some(1000));
        for message in ["{}", GOOD] {
            let body = body(message, 100_000);
            let mut batch = batch();
            assert!(matches!(batch.read(body.as_bytes()), Err(BatchError::TooMany)));
            assert_eq!(batch.count, 1001);
            assert!(batch.messages.len() <= 1000 && batch.mistakes.len() <= 1000);
        }
    }

    #[test]
    fn of_many_mistakes_the_first_ten_are_described_and_the_rest_counted() {
        let described = errors(&body("{}", 10));
        assert_eq!(described["messages"].as_array().map(Vec::len), Some(10));
        assert_eq!(described["more"], json!(null));
        let described = errors(&body("{}", 1000));
        assert_eq!(described["messages"].as_array().map(Vec::len), Some(10));
        assert_eq!(described["more"], 990);
        assert!(described.to_string().len() < 1024);
        // The place in the list names the message.
        let described = errors(&body(&format!("{GOOD},{{}},{GOOD}"), 11));
        let messages = described["messages"].as_array().cloned().unwrap_or_default();
        assert_eq!((messages.len(), &messages[0], &described["more"]), (29, &json!({}), &1.into()));
        assert!(messages[28]["topic"].is_array());
    }

    /// As trees, these would take a hundred bytes for each of their three.
    #[test]
    fn what_is_no_text_and_no_boolean_is_refused_or_left_out_unread() {
        let tree = format!("[{}]", vec!["[]"; 10_000].join(","));
        let invalid = format!(r#"{{"topic":"t","event":"e","payload":{{}},"private":{tree}}}"#);
        assert_eq!(errors(&body(&invalid, 1))["messages"][0], json!({ "private": ["is invalid"] }));
        let id = format!(r#"{{"topic":"t","event":"e","payload":{{}},"id":{tree}}}"#);
        let messages = read(body(&id, 1).as_bytes(), BOUNDS).unwrap_or_default();
        assert!(
            matches!(&messages[..], [RestMessage { broadcast: Broadcast::Envelope(envelope), .. }]
            if envelope.as_str() == r#"{"event":"e","payload":{},"type":"broadcast"}"#)
        );
    }
}
