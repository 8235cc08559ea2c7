//! One message of a merged topic: the endpoints that it invalidates, and how it is written again
//! when it stands for several.
//!
//! Invariants: endpoints are texts of 1 to [`ENDPOINT_BYTES_MAX`] bytes, [`LIST_MAX`] at most; the
//! fields of a payload that is written again are copied as they came, numbers digit by digit, but
//! for the union, the `timestamp` and `merged`.

use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use indexmap::IndexSet;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use crate::{
    access::{Merge, Rule},
    protocol::{
        message::{Json, UserBroadcast, UserPayload, write_json_string},
        serializer::Broadcast,
    },
};

/// Longest endpoint in bytes; a longer one is dropped, and counted.
pub(crate) const ENDPOINT_BYTES_MAX: usize = 512;

/// Most endpoints of one message; a longer list stands for everything of the feed.
const LIST_MAX: usize = 1_000;

/// Endpoints, each once, in the order in which they were first seen.
pub(crate) type Endpoints = IndexSet<Box<str>>;

/// Why an element of a message's list is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum BadEndpoint {
    /// Null, a number, an object: clients throw on it.
    NotText,
    /// Empty, or longer than the bound.
    Length,
    /// More than one message may have.
    TooMany,
}

impl BadEndpoint {
    /// The label of the metric.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// A broadcast that invalidates endpoints of a feed.
#[derive(Debug, Clone)]
pub(super) struct Invalidation {
    /// The broadcast as it came.
    pub(super) broadcast: Broadcast,
    /// The user's payload, an object.
    payload: Json,
    pub(super) endpoints: Endpoints,
    /// The elements of the list that are no endpoints.
    pub(super) bad: Vec<BadEndpoint>,
    /// The row of the history that holds it.
    pub(super) id: Option<i64>,
    /// The payload's `type`.
    pub(super) kind: Option<Box<str>>,
    /// The payload's `timestamp` as it was written. Clients drop a message that has the timestamp
    /// of another one.
    pub(super) timestamp: Option<Box<str>>,
    /// It stands for everything of the feed.
    pub(super) is_pointer: bool,
}

/// What all messages of one feed have in common.
#[derive(Debug)]
pub(super) struct Template {
    pub(super) rule: Arc<Rule>,
    pub(super) merge: Merge,
    pub(super) eid: Box<str>,
}

impl Template {
    /// Reads a broadcast to the feed's topic.
    ///
    /// # Errors
    /// The broadcast itself if it is not an invalidation: its user event is another one, or its
    /// payload is not a JSON object.
    pub(super) fn read(&self, broadcast: Broadcast) -> Result<Invalidation, Broadcast> {
        let user_event = self.rule.event.as_deref();
        let payload = match &broadcast {
            Broadcast::Envelope(envelope) => match Fields::read(envelope.as_str()) {
                Some(fields) if fields.text("event").as_deref() == user_event => fields
                    .raw("payload")
                    .and_then(|payload| Json::parse(payload.to_owned().into()).ok()),
                Some(_) | None => None,
            },
            Broadcast::User { message, metadata: _ } => match &message.payload {
                UserPayload::Json(json) if Some(&*message.user_event) == user_event => {
                    Some(json.clone())
                }
                UserPayload::Json(_) | UserPayload::Binary(_) => None,
            },
        };
        let Some((payload, fields)) = payload
            .as_ref()
            .and_then(|payload| Some((payload.clone(), Fields::read(payload.as_str())?)))
        else {
            return Err(broadcast);
        };
        let (endpoints, bad) = self.list(&fields);
        let id = fields.raw("id").and_then(|id| id.parse().ok());
        let (kind, timestamp) = (fields.text("type"), fields.raw("timestamp").map(Into::into));
        let is_pointer =
            fields.raw("pointer") == Some("true") || bad.contains(&BadEndpoint::TooMany);
        Ok(Invalidation { payload, endpoints, bad, id, kind, timestamp, is_pointer, broadcast })
    }

    /// Returns the endpoints of the payload's list, and its elements that are none.
    fn list(&self, fields: &Fields<'_>) -> (Endpoints, Vec<BadEndpoint>) {
        let (mut endpoints, mut bad) = (Endpoints::default(), Vec::new());
        let listed = fields.raw(&self.merge.union).map(serde_json::from_str::<Vec<Value>>);
        for element in listed.and_then(Result::ok).unwrap_or_default() {
            match element {
                Value::String(_) if endpoints.len() >= LIST_MAX => bad.push(BadEndpoint::TooMany),
                Value::String(text) if (1..=ENDPOINT_BYTES_MAX).contains(&text.len()) => {
                    endpoints.insert(text.into());
                }
                Value::String(_) => bad.push(BadEndpoint::Length),
                Value::Null
                | Value::Bool(_)
                | Value::Number(_)
                | Value::Array(_)
                | Value::Object(_) => {
                    bad.push(BadEndpoint::NotText);
                }
            }
        }
        (endpoints, bad)
    }

    /// Writes the invalidation with another list, under a new stamp. The message stands for
    /// `merged` invalidations.
    pub(super) fn rewritten(
        &self,
        newest: &Invalidation,
        endpoints: &Endpoints,
        stamp: Stamp,
        merged: usize,
    ) -> Broadcast {
        let fields = Fields::read(newest.payload.as_str()).unwrap_or_default();
        let ours = [&*self.merge.union, "timestamp", "merged"];
        let theirs = fields.0.iter().filter(|(name, _)| !ours.contains(&name.as_str()));
        let mut out = String::with_capacity(newest.payload.len() + endpoints.len() * 48);
        for (name, value) in theirs {
            out.push(if out.is_empty() { '{' } else { ',' });
            write_json_string(&mut out, name);
            out.push(':');
            out.push_str(value.get());
        }
        out.push(if out.is_empty() { '{' } else { ',' });
        self.write_union(&mut out, endpoints, stamp);
        out.push_str(&format!(",\"merged\":{merged}}}"));
        self.broadcast(out)
    }

    /// Writes a catch-up, of one client or after a gap:
    /// `{"type":"catch_up","event_eid":"AB3028","cause":"returned","endpoints":[…],"timestamp":…}`.
    pub(super) fn catch_up(&self, cause: &str, endpoints: &Endpoints, stamp: Stamp) -> Broadcast {
        let mut out = String::from("{\"type\":\"catch_up\",\"event_eid\":");
        write_json_string(&mut out, &self.eid);
        out.push_str(",\"cause\":");
        write_json_string(&mut out, cause);
        out.push(',');
        self.write_union(&mut out, endpoints, stamp);
        out.push('}');
        self.broadcast(out)
    }

    fn write_union(&self, out: &mut String, endpoints: &Endpoints, stamp: Stamp) {
        write_json_string(out, &self.merge.union);
        out.push_str(":[");
        for (number, endpoint) in endpoints.iter().enumerate() {
            if number > 0 {
                out.push(',');
            }
            write_json_string(out, endpoint);
        }
        out.push_str(&format!("],\"timestamp\":{stamp}"));
    }

    fn broadcast(&self, payload: String) -> Broadcast {
        // All parts are JSON, and so is the whole; an empty object would invalidate nothing.
        let payload = Json::parse(payload.into()).unwrap_or(Json::EMPTY);
        let user_event = self.rule.event.clone().unwrap_or_default();
        let message = UserBroadcast { user_event, payload: UserPayload::Json(payload) };
        Broadcast::User { message, metadata: None }
    }
}

/// The moment of a message that was written here, in microseconds since 1970.
///
/// It is written in seconds with half a microsecond added, so that it never equals a timestamp of
/// the database: clients drop a message that has the timestamp of another one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp(pub(super) u64);

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}5", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

/// The stamps of one feed.
#[derive(Debug, Default)]
pub(super) struct Stamps {
    pub(super) last: Stamp,
}

impl Stamps {
    /// Returns the stamp of this moment, which is later than every stamp before.
    pub(super) fn next(&mut self) -> Stamp {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        self.last = Stamp(now.max(self.last.0 + 1));
        self.last
    }
}

/// The fields of an object in their order, each value as it was written.
#[derive(Debug, Default)]
struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Fields<'a> {
    fn read(object: &'a str) -> Option<Self> {
        serde_json::from_str(object).ok()
    }

    /// Returns the last value of this name, as every JSON reader does.
    fn raw(&self, name: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(field, _)| field == name).map(|(_, value)| value.get())
    }

    fn text(&self, name: &str) -> Option<Box<str>> {
        serde_json::from_str::<String>(self.raw(name)?).ok().map(Into::into)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::settings::Config;

    fn template() -> Template {
        let rule = Arc::new(Config::defaults().topic.remove(0));
        Template { merge: rule.merge.clone().unwrap(), rule, eid: "AB3028".into() }
    }

    fn user(payload: &str) -> Broadcast {
        template().broadcast(payload.to_owned())
    }

    fn read(broadcast: Broadcast) -> Result<Invalidation, Broadcast> {
        template().read(broadcast)
    }

    fn texts(endpoints: &Endpoints) -> Vec<&str> {
        endpoints.iter().map(|endpoint| &**endpoint).collect()
    }

    #[test]
    fn what_is_no_endpoint_is_dropped_and_named() {
        let long = "x".repeat(ENDPOINT_BYTES_MAX + 1);
        let fits = "x".repeat(ENDPOINT_BYTES_MAX);
        let payload =
            format!(r#"{{"endpoints":["/a",null,"/b",7,"/a","","{long}","{fits}"],"id":12}}"#);
        let read = read(user(&payload)).unwrap();
        assert_eq!(texts(&read.endpoints), ["/a", "/b", &fits]);
        let (text, length) = (BadEndpoint::NotText, BadEndpoint::Length);
        assert_eq!(read.bad, [text, text, length, length]);
        assert_eq!(read.id, Some(12));
    }

    #[test]
    fn another_user_event_is_no_invalidation() {
        let envelope = r#"{"event":"other","payload":{"endpoints":["/a"]},"type":"broadcast"}"#;
        let envelope = Broadcast::Envelope(Json::parse(envelope.into()).unwrap());
        assert_eq!(read(envelope.clone()).unwrap_err(), envelope);
    }

    #[test]
    fn an_envelope_is_read_as_its_payload() {
        let envelope = r#"{"event":"cache_invalidation","payload":{"type":"t","endpoints":["/a"]},"type":"broadcast"}"#;
        let read = read(Broadcast::Envelope(Json::parse(envelope.into()).unwrap())).unwrap();
        assert_eq!((texts(&read.endpoints), read.kind.as_deref()), (vec!["/a"], Some("t")));
    }

    #[test]
    fn a_payload_without_a_list_invalidates_nothing() {
        for payload in ["{}", r#"{"endpoints":null}"#, r#"{"endpoints":"/a"}"#] {
            assert!(read(user(payload)).unwrap().endpoints.is_empty(), "{payload}");
        }
    }

    #[test]
    fn a_rewritten_message_keeps_what_is_not_ours_digit_by_digit() {
        let payload = r#"{ "type":"bid_placed", "amount":120.10000000000000001, "timestamp":1.5, "endpoints":["/a"], "merged":9, "id":3 }"#;
        let read = read(user(payload)).unwrap();
        let union = ["/b".into(), "/a\"".into()].into();
        let stamp = Stamp(1_700_000_000_000_001);
        let Broadcast::User { message, .. } = template().rewritten(&read, &union, stamp, 2) else {
            panic!()
        };
        let UserPayload::Json(json) = message.payload else { panic!() };
        assert_eq!(
            json.as_str(),
            r#"{"type":"bid_placed","amount":120.10000000000000001,"id":3,"endpoints":["/b","/a\""],"timestamp":1700000000.0000015,"merged":2}"#
        );
    }
}
